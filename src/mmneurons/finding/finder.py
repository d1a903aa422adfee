"""image -> caption -> nouns -> contributions -> neurons.

One captioning run, batched, with the KV cache; activations are recorded while it decodes, and the model is not run
again. Maps, and the comparison with a blank image, cost one more forward pass each, only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, overload

from PIL import Image

from mmneurons.errors import SettingError, WordError
from mmneurons.finding.maps import with_blank, with_maps
from mmneurons.finding.result import Finding, NounFinding, Score
from mmneurons.finding.scoring import SCORES, Choices, Target, describe, score_targets
from mmneurons.vlm import provenance
from mmneurons.vlm.doctor import TOLERANCE
from mmneurons.vlm.grid import PatchGrid, find_grid, model_view
from mmneurons.vlm.images import OpenedImage, open_image
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT, token_of
from mmneurons.vlm.recording import record
from mmneurons.vlm.vlm import VLM, Answers, Picture, Pictures, as_list
from mmneurons.words import find_nouns, find_words, says

BLANK = (128, 128, 128)
"""The blank image: one grey."""


@overload
def find(vlm: VLM, images: Pictures, **choices: Any) -> list[Finding]: ...
@overload
def find(vlm: VLM, images: Picture, **choices: Any) -> Finding: ...
def find(  # pyright: ignore[reportInconsistentOverload]  # the overloads say what is returned, this what is taken
    vlm: VLM,
    images: Picture | Pictures,
    *,
    prompt: str = PROMPT,
    answer_prefix: str = ANSWER_PREFIX,
    top: int = 10,
    score: Score = "logit",
    words: str | Sequence[str] | None = None,
    against: str | None = None,
    maps: bool = False,
    blank: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Finding | list[Finding]:
    """Caption images, and for each noun find the neurons that wrote it.

    Args:
        vlm: The model, from `load`.
        images: A path, PIL image or array, or a list of them.
        prompt: What the model is asked.
        answer_prefix: Words that the answer is made to begin with; they are no nouns.
        top: How many neurons to list for each noun.
        score: "logit": how many logits of the word a neuron wrote. "logprob": how far it pushes log p of the word, to
            first order. "paper": what the released MM_Neurons code prints. See docs/method.md.
        words: Words of the caption to explain instead of its nouns.
        against: Another word: scores say why the noun rather than this one. A noun that is this word is left out.
        maps: Also where in the image each neuron is active, and heat maps of the top 1 to 1000: one more prefill.
        blank: Also what share of each score is lost with a blank image: one more pass over the caption.
        max_new_tokens: Where to stop if the model does not.
        batch_size: Images in one batch.
        progress: Called with the number of images done after each batch.

    Returns:
        One Finding, or a list of as many as images. A caption without nouns gives a Finding without nouns.

    Raises:
        ImageError: if something is not an image.
        WordError: if a word asked for is in none of the captions.
        SettingError: for a setting that has no meaning.

    Source: Pan et al., Findings of ACL 2024, section 3. Their code projects the gate alone onto the unembedding:
        `score="paper"`.
    """
    if score not in SCORES:
        raise SettingError(f"There is no score '{score}'.", fix=f"Choose one of: {', '.join(SCORES)}.")
    if top < 1 or batch_size < 1:
        raise SettingError("Sizes start at 1.", seen=f"top={top}, batch_size={batch_size}")
    opened = [open_image(image) for image in as_list(images)]
    wanted = (words,) if isinstance(words, str) else tuple(words or ()) or None
    choices = Choices(prompt, answer_prefix, top, score, wanted, against, maps, blank, max_new_tokens)
    findings: list[Finding] = []
    for start in range(0, len(opened), batch_size):
        findings += _find_batch(vlm, opened[start : start + batch_size], choices)
        if progress is not None:
            progress(len(findings))
    _check_words(findings, wanted)
    made_by = _provenance(vlm, choices, batch_size)
    findings = [replace(finding, provenance=made_by) for finding in findings]
    return findings if isinstance(images, list | tuple) else findings[0]


def _find_batch(vlm: VLM, opened: list[OpenedImage], choices: Choices) -> list[Finding]:
    """The whole way for one batch, top to bottom."""
    inputs = vlm.encode([o.image for o in opened], choices.prompt, choices.answer_prefix)
    with record(vlm.anatomy, gates=choices.score == "paper") as recording:
        answers = vlm.generate(inputs, choices.max_new_tokens, logits=True)
    targets = [t for row in range(len(opened)) for t in _targets(vlm, answers, row, choices)]
    nouns: list[NounFinding] = []
    notes: list[str] = []
    if targets:
        scored = score_targets(vlm, recording, answers, targets, choices)
        nouns = describe(vlm, scored)
        notes += _doubt(vlm, nouns)
        if choices.maps:
            grid = find_grid(vlm.model, inputs)
            if isinstance(grid, PatchGrid):
                nouns = with_maps(vlm, inputs, grid, scored, nouns)
            else:
                notes.append(f"No map is drawn: {grid}.")
        if choices.blank:
            grey = vlm.encode(
                [Image.new("RGB", o.image.size, BLANK) for o in opened], choices.prompt, choices.answer_prefix
            )
            nouns = with_blank(vlm, grey, answers, scored, nouns)
    return [
        Finding(
            image=o.name.encode("utf-8", "replace").decode(),  # a file name may hold bytes that JSON cannot
            prompt=choices.prompt,
            answer_prefix=choices.answer_prefix,
            caption=answers.texts[row],
            token_ids=answers.token_ids[row],
            score=choices.score,
            against=choices.against,
            nouns=(mine := tuple(n for n, t in zip(nouns, targets, strict=True) if t.row == row)),
            notes=(*vlm.notes(o), *notes, *_silence(answers.texts[row], mine, choices)),
            view=model_view(vlm.processor, inputs, row),
        )
        for row, o in enumerate(opened)
    ]


def _targets(vlm: VLM, answers: Answers, row: int, choices: Choices) -> list[Target]:
    """Which tokens of one caption are scored: the first of each noun, or of each word asked for.

    Raises:
        SettingError: if a word asked for begins with the same token as the one it is to be compared with.
    """
    caption, ids = answers.texts[row], answers.token_ids[row]

    def decode(part: Sequence[int]) -> str:
        return vlm.tokenizer.decode(part, skip_special_tokens=True)

    if choices.words is None:
        words = find_nouns(caption, ids, decode, answer_prefix=choices.answer_prefix)
    else:
        words = find_words([w for w in choices.words if says(caption, w)], caption, ids, decode)
    targets = [Target(row, word, word.steps[0], ids[word.steps[0]]) for word in words]
    if choices.against is not None:
        other = token_of(vlm.tokenizer, choices.against)
        if choices.words is not None and any(target.token_id == other for target in targets):
            raise SettingError(
                f"'{choices.against}' begins with the same token as a word to score: nothing to compare.",
                fix="Compare with a word that begins differently.",
            )
        targets = [target for target in targets if target.token_id != other]
    if choices.score == "paper":  # as the released code: a word's first occurrence only
        first = {target.word.text: target for target in reversed(targets)}
        targets = [target for target in targets if first[target.word.text] is target]
    return targets


def _doubt(vlm: VLM, nouns: Sequence[NounFinding]) -> list[str]:
    """Whether what was recorded adds up to the logits that this model gave; it does where the anatomy is right."""
    largest = max(abs(noun.logit) for noun in nouns)
    error = max(abs(noun.parts.total - noun.logit) for noun in nouns) / largest
    if error <= TOLERANCE.get(vlm.model.dtype, 0.0):
        return []
    return [f"Approximate: what was recorded misses the model's logits by {error:.1%}. See mmneurons doctor."]


def _silence(caption: str, nouns: Sequence[NounFinding], choices: Choices) -> list[str]:
    """What to say where something has no answer."""
    if choices.words is None:
        return [] if nouns else ["There is no noun in this caption."]
    return [f"'{word}' is not in this caption." for word in _missing(caption, choices.words)]


def _missing(caption: str, wanted: Sequence[str] | None) -> list[str]:
    return [word for word in wanted or () if not says(caption, word)]


def _check_words(findings: list[Finding], wanted: Sequence[str] | None) -> None:
    everywhere = set.intersection(*(set(_missing(f.caption, wanted)) for f in findings)) if findings else set()
    if everywhere:
        captions = "\n".join(f"  {finding.answer_prefix} {finding.caption}" for finding in findings[:5])
        raise WordError(
            f"Not in the caption: {', '.join(sorted(everywhere))}.",
            seen=f"The model said:\n{captions}",
            fix="Ask for a word that it said, or for none, to take the nouns.",
        )


def _provenance(vlm: VLM, choices: Choices, batch_size: int) -> dict[str, Any]:
    """What made these findings. Decoding is greedy: there is no seed."""
    settings = asdict(choices) | {"batch_size": batch_size, "decoding": "greedy"}
    return {"model": vlm.facts, "packages": provenance.versions(), "settings": settings}
