"""One batch of prompts: answered once, its words picked, and every neuron scored for each of them.

`find` makes Findings of it, a sweep rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmneurons.data.images import OpenedImage
from mmneurons.errors import SettingError
from mmneurons.finding.baseline import baseline_of
from mmneurons.finding.rereading import blank_like, trace_again
from mmneurons.finding.result import BaselineName
from mmneurons.finding.scoring import Scored, Target, recorder_for, score_targets
from mmneurons.settings import Baseline, FindSettings, MeanActivations
from mmneurons.vlm.asking import answer, tokens_of_answer
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.tokens import token_of
from mmneurons.vlm.traces import Trace
from mmneurons.vlm.vlm import VLM, Answers, Inputs
from mmneurons.words import Word, find_nouns, find_words, says, tagger_for

NO_TAGGER = (
    "No noun tagger for the language of this answer: ask for its words (--word, words=[...]) or give a tagger "
    "(--tagger, tagger=SpacyTagger(...))."
)


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Answers to prompts that were asked together, and the scores of all neurons for their words."""

    vlm: VLM
    choices: FindSettings
    rows: list[list[OpenedImage]]
    """The pictures of each prompt."""
    answers: Answers
    given: bool
    """Whether the model read the answers instead of generating them."""
    targets: list[Target]
    """The words that are explained, prompt by prompt in the order of the answers."""
    scored: Scored | None
    """Their scores; None without a word."""
    grey: Trace | None
    """The state where the same words are read with a blank image; None unless asked for."""

    def notes(self) -> list[str]:
        """List what a reader of any of these answers should be told."""
        notes = [*self.vlm.loading.notes] if self.vlm.loading else []
        notes += ["The model was given this answer to read; it did not choose it."] if self.given else []
        return notes + (_doubt(self.vlm, self.scored) if self.scored is not None else [])

    def notes_of(self, row: int, shared: Sequence[str]) -> tuple[str, ...]:
        """List what a reader of one answer should be told: of its pictures, what is shared, of words not there."""
        of_images = (note for opened in self.rows[row] for note in self.vlm.notes(opened))
        is_found = any(target.row == row for target in self.targets)
        return (*of_images, *shared, *_silence(self.answers, row, self.choices, is_found=is_found))


def score_batch(
    vlm: VLM, inputs: Inputs, rows: list[list[OpenedImage]], captions: list[str] | None, choices: FindSettings
) -> ScoredBatch:
    """Answer a batch and score every neuron for the words of its answers.

    Args:
        vlm: The model, which this thread has to itself.
        inputs: From `VLM.encode`, or ready-made.
        rows: The pictures of each prompt.
        captions: Answers to read instead of generating, one for each prompt.
        choices: What is asked, and how neurons are scored.
    """
    given = None if captions is None else [tokens_of_answer(vlm, inputs, text) for text in captions]
    # 1. Answer once, and record what the neurons did where each token was chosen.
    answers, recording = answer(vlm, inputs, choices, given=given, recorder=recorder_for(vlm, choices))
    # 2. The words of the answers that are to be explained.
    targets = [t for row in range(len(rows)) for t in targets_of(vlm, answers, row, choices)]
    grey, scored = None, None
    if targets:
        # 3. The same words read without the picture, if asked for: one more pass.
        if rows[0] and (choices.blank or choices.baseline == "blank"):
            blank = [[blank_like(opened.image) for opened in row] for row in rows]
            inputs_of_blank = vlm.encode(blank, choices.prompt, choices.prefix)
            grey = trace_again(vlm, inputs_of_blank, answers, targets, choices)
        # 4. What every neuron gave to each of them.
        baseline = baseline_of(vlm, targets, choices, grey)
        scored = score_targets(vlm, recording, answers, targets, choices, baseline, inputs)
    return ScoredBatch(vlm, choices, rows, answers, captions is not None, targets, scored, grey)


def name_of(opened: OpenedImage) -> str:
    """Return the name of a picture as text: a file name may hold bytes that JSON cannot."""
    return opened.name.encode("utf-8", "replace").decode()


def baseline_name(baseline: Baseline | MeanActivations) -> BaselineName:
    """Return what results call a baseline."""
    return "reference" if isinstance(baseline, MeanActivations) else baseline


def targets_of(vlm: VLM, answers: Answers, row: int, choices: FindSettings) -> list[Target]:
    """Which tokens of one caption are scored: the first of each noun, or of each word asked for.

    Raises:
        SettingError: if a word asked for begins with the same token as the one it is to be compared with.
    """
    caption, ids = answers.texts[row], answers.token_ids[row]

    def decode(part: Sequence[int]) -> str:
        return vlm.tokenizer.decode(part, skip_special_tokens=True)

    if choices.token_ids is not None:
        words = [_word_of(vlm, ids, step, decode) for step, token in enumerate(ids) if token in choices.token_ids]
    elif choices.words is None:
        words = find_nouns(caption, ids, decode, answer_prefix=choices.prefix, tagger=choices.tagger)
    else:
        words = find_words([w for w in choices.words if says(caption, w)], caption, ids, decode)
    targets = [Target(row, word, word.steps[0], ids[word.steps[0]]) for word in words]
    if choices.against is not None:
        others = {t.token_id: token_of(vlm.tokenizer, choices.against, like=t.token_id) for t in targets}
        if (choices.words or choices.token_ids) and any(token == other for token, other in others.items()):
            raise SettingError(
                f"'{choices.against}' begins with the same token as a word to score: nothing to compare.",
                fix="Compare with a word that begins differently.",
            )
        targets = [target for target in targets if target.token_id != others[target.token_id]]
    if choices.score == "paper":  # as the released code: a word's first occurrence only
        first = {target.word.text: target for target in reversed(targets)}
        targets = [target for target in targets if first[target.word.text] is target]
    return targets


def _word_of(vlm: VLM, ids: Sequence[int], step: int, decode: Callable[[Sequence[int]], str]) -> Word:
    """One generated token as a word of the answer; one that is no text (end-of-text) stands at no place in it."""
    before = decode(ids[:step]).lstrip()
    added = decode(ids[: step + 1]).lstrip()[len(before) :]
    text = added.strip()
    if not text:
        text = vlm.token_text(ids[step])
        return Word(text, text.lower(), 0, 0, (step,))
    start = len(before) + len(added) - len(added.lstrip())
    return Word(text, text.lower(), start, start + len(text), (step,))


def _doubt(vlm: VLM, scored: Scored) -> list[str]:
    """Whether what was recorded adds up to the logits that this model gave; it does where the anatomy is right."""
    totals = scored.written.total.tolist()
    largest = max(map(abs, scored.logits))
    error = max(abs(total - logit) for total, logit in zip(totals, scored.logits, strict=True)) / largest
    if error <= tolerance(vlm):
        return []
    return [f"Approximate: what was recorded misses the model's logits by {error:.1%}. See mmneurons doctor."]


def _silence(answers: Answers, row: int, choices: FindSettings, *, is_found: bool) -> list[str]:
    """What to say where something has no answer."""
    if choices.words is None and choices.token_ids is None:
        if is_found:
            return []
        if choices.tagger is None and tagger_for(answers.texts[row]) is None:
            return [NO_TAGGER]
        return ["There is no noun in this answer."]
    return [
        f"{_shown(word)} is not in this answer."
        for word in missing(answers.texts[row], answers.token_ids[row], choices)
    ]


def missing(text: str, token_ids: Sequence[int], choices: FindSettings) -> list[str | int]:
    """The words and tokens asked for that an answer does not have."""
    words = [word for word in choices.words or () if not says(text, word)]
    return words + [token for token in choices.token_ids or () if token not in token_ids]


def _shown(word: str | int) -> str:
    return f"'{word}'" if isinstance(word, str) else f"token {word}"
