"""An edit request says where SOURCE is said, and what is to be said there instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.data.content import image_hash, key_of
from mmneurons.data.pictures import Picture, open_row
from mmneurons.editing.answers import TracedAnswers, TracedSteps, join, occurrences, trace_answers, trace_given
from mmneurons.errors import SettingError, WordError
from mmneurons.settings import Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.teacher_forcing import Given
from mmneurons.vlm.tokens import tokens_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word, inflected, singular, turned
from mmneurons.words.english import plain

HASH_LENGTH = 16
"""Characters that are kept of an image's hash."""
HELD_BACK, ENOUGH = 4, 6
"""Every so manyth image takes no part when the strength of an edit is chosen, so that the edit can be judged by it;
where SOURCE is said of so many at least: of fewer, none can be spared."""


@dataclass(frozen=True, eq=False)
class TokenGoal:
    """A TokenGoal is a set of steps at which one token is to be said in place of another."""

    said: int
    """The token that is said there."""
    wanted: int | None
    """The token that shall be; None: any other."""
    steps: TracedSteps
    runners_up: tuple[int, ...] = ()
    """Of a removal: what is likeliest at each step but for the token that is said."""

    def row(self, unembed: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "hidden"]:
        """Return the unembedding row of the token wanted (of a removal, the runners-up's mean) less that of `said`.

        To lower the token that is said alone would let in what is least like it, whether it fits there or not.
        """
        wanted = list(self.runners_up) if self.wanted is None else [self.wanted]
        return unembed[wanted].float().cpu().mean(0) - unembed[self.said].float().cpu()


@dataclass(frozen=True, eq=False)
class EditRequest:
    """An EditRequest holds the images of an edit and the answers to one prompt."""

    images: Sequence[Picture]
    question: Question
    answers: TracedAnswers
    found: Sequence[tuple[int, Word]]
    """Where SOURCE is: which answer, and the word there."""

    @property
    def saying(self) -> list[int]:
        """The answers that say SOURCE."""
        return sorted({answer for answer, _ in self.found})

    @property
    def searched(self) -> list[int]:
        """The answers that say SOURCE and by which the strength of the edit is chosen."""
        few = len(self.saying) < ENOUGH
        return [i for i in self.saying if few or i % HELD_BACK != HELD_BACK - 1]

    @property
    def others(self) -> TracedSteps:
        """The steps that do not write SOURCE."""
        rows = torch.ones(len(self.answers.steps), dtype=torch.bool)
        for answer, word in self.found:
            rows[[self.answers.row(answer, step) for step in word.steps]] = False
        return self.answers.steps.at(rows)


def make_requests(
    vlm: VLM, images: Sequence[Picture], questions: Sequence[Question], source: str, target: str | None
) -> list[EditRequest]:
    """Ask each question about the images of an edit.

    Raises:
        SettingError: a word is empty, source and target are one word, or the target is a plural.
        WordError: the model says `source` of none of the images.
    """
    if not source.strip() or (target is not None and not target.strip()):
        raise SettingError(
            "A word of an edit is empty.",
            seen=f"source={source!r}, target={target!r}",
            fix="Give a source and a target, or no target to remove the source.",
        )
    if target is not None and singular(source) == singular(target):
        raise SettingError(f"'{source}' is to become '{target}': the same word.", fix="Choose another target.")
    if target is not None and singular(target) != " ".join(plain(target).lower().split()):
        raise SettingError(
            f"'{target}' is a plural.",
            seen="Plurals are made where the answers have one.",
            fix=f"target={singular(target)!r}",
        )
    # Each prompt is one request: its answers, and where they say SOURCE.
    requests = []
    for question in questions:
        said = trace_answers(vlm, images, question)
        requests.append(EditRequest(images, question, said, occurrences(vlm, said, source)))
    if not any(one.found for one in requests):
        answers = "\n".join(f"  {one.question.prefix} {text}" for one in requests for text in one.answers.texts[:5])
        raise WordError(
            f"The model says '{source}' of none of the images.",
            seen=f"It said:\n{answers}",
            fix="Give images of which it does, or a word that it says.",
        )
    return requests


def share_turned(vlm: VLM, requests: Sequence[EditRequest], source: str, target: str | None) -> float:
    """Compute the share of answers that said SOURCE and, generated now, no longer do, and say TARGET if there is one.

    Only those are asked for by which the strength is chosen.
    """
    done = []
    for one in requests:
        texts = texts_of(vlm, [one.images[i] for i in one.searched], one.question)
        done += [turned(text, source, target) for text in texts]
    return sum(done) / len(done)


def searched_images(requests: Sequence[EditRequest]) -> list[str]:
    """Return hashes of the images by which the strength is chosen, since an edit is not to be judged by them alone."""
    chosen = {i: one.images[i] for one in requests for i in one.searched}
    return [prompt_hash(chosen[i]) for i in sorted(chosen)]


def prompt_hash(image: Picture) -> str:
    """Hash what is shown in one prompt, in short: its pixels."""
    return key_of([image_hash(one.image) for one in open_row(image)])[:HASH_LENGTH]


def rewritten(
    vlm: VLM, ids: Sequence[int], words: Sequence[Word], target: str
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Write TARGET, in the right form, for each of the words; return the answer, and first step and tokens of each.

    Raises:
        WordError: a form of the target has no token.
    """
    new: list[int] = []
    written = []
    read = 0
    # Between the words the answer is copied as it is.
    for word in words:
        new += ids[read : word.steps[0]]
        wanted = tokens_of(vlm.tokenizer, inflected(target, word.text), like=ids[word.steps[0]])
        written.append((len(new), wanted))
        new += wanted
        read = word.steps[-1] + 1
    return [*new, *ids[read:]], written


def given(vlm: VLM, one: EditRequest, target: str | None) -> list[Given]:
    """Prepare answers for teacher forcing, with TARGET in place of SOURCE; without a target, as they are.

    Raises:
        WordError: a form of the target has no token.
    """
    made = []
    for i, said in enumerate(one.answers.token_ids):
        words = sorted((word for answer, word in one.found if answer == i), key=lambda word: word.steps[0])
        # A removal: the first token of each word is what shall not be said, the rest of the word is left open.
        if target is None:
            writing = {step for word in words for step in word.steps}
            kept = {step: -1 for step in range(len(said)) if step not in writing}
            made.append(Given(list(said), {word.steps[0]: (said[word.steps[0]],) for word in words}, kept))
            continue
        # Every token of TARGET is wanted at its step; all other steps stay, and behind TARGET it is not to come again.
        ids, written = rewritten(vlm, said, words, target)
        turn = {start + k: (token,) for start, wanted in written for k, token in enumerate(wanted)}
        firsts = {start: wanted[0] for start, wanted in written}
        kept, behind = dict[int, int](), -1
        for step in range(len(ids)):
            behind = firsts.get(step, behind)
            if step not in turn:
                kept[step] = behind
        made.append(Given(ids, turn, kept))
    return made


def token_goals(vlm: VLM, requests: Sequence[EditRequest], target: str | None) -> list[TokenGoal]:
    """Make a goal for each form in which SOURCE is said (dog, dogs, Dog), and for each further token of TARGET.

    The further tokens are wanted behind those before them: at these steps the answer is forced, and where the model
    goes on by itself, nothing is to be done.

    Raises:
        WordError: a form of the target has no token, or its tokens are those that SOURCE begins with.
    """
    steps: dict[tuple[int, int | None], list[TracedSteps]] = {}
    for one in requests:
        for answer, word in one.found:
            ids = one.answers.token_ids[answer]
            said, wanted = ids[word.steps[0]], [None]
            if target is not None:
                wanted = tokens_of(vlm.tokenizer, inflected(target, word.text), like=said)
            # The first token gives way where SOURCE begins ...
            row = one.answers.steps.at(torch.tensor([one.answers.row(answer, word.steps[0])]))
            steps.setdefault((int(row.token_ids), wanted[0]), []).append(row)
            # ... and the others behind it, where the model would go on otherwise: the answer is forced up to there.
            if len(wanted) > 1:
                begun = [*ids[: word.steps[0]], *wanted[:-1]]
                forced = trace_given(vlm, one.images[answer], begun, one.question)
                for i, token in enumerate(wanted[1:], start=word.steps[0] + 1):
                    row = forced.at(torch.tensor([i]))
                    if int(row.token_ids) != token:
                        steps.setdefault((int(row.token_ids), token), []).append(row)
    # Two words can begin with one token: there is nothing to do.
    goals = [_goal(vlm, *tokens, join(rows)) for tokens, rows in steps.items() if tokens[0] != tokens[1]]
    if not goals:
        raise WordError(
            f"What is said begins with all tokens of '{target}': there is none to be said instead.",
            fix="Choose another target.",
        )
    return goals


def _goal(vlm: VLM, said: int, wanted: int | None, steps: TracedSteps) -> TokenGoal:
    if wanted is not None:
        return TokenGoal(said, wanted, steps)
    logits = vlm.anatomy.logits(steps.residual)[:, : vlm.n_tokens].float().clone()
    logits[:, said] = -torch.inf
    return TokenGoal(said, None, steps, tuple(logits.argmax(-1).tolist()))
