"""image -> caption -> nouns -> contributions -> neurons.

One captioning run, batched, with the KV cache; activations are recorded while it decodes, and the model is not run
again. Maps, and a blank image to compare with, cost one more forward pass each, only when asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack, overload

from mmneurons.data.images import OpenedImage
from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.errors import SettingError, WordError
from mmneurons.finding.batch import ScoredBatch, baseline_name, missing, name_of, score_batch
from mmneurons.finding.calibration import MAKE
from mmneurons.finding.grounding import calibration_for, ground
from mmneurons.finding.maps import with_maps
from mmneurons.finding.rereading import with_blank
from mmneurons.finding.result import Finding, NounFinding
from mmneurons.finding.scoring import describe
from mmneurons.progress import Progress
from mmneurons.settings import FindOptions, FindSettings, MeanActivations, Question, settled
from mmneurons.vlm import provenance
from mmneurons.vlm.age import unchanged
from mmneurons.vlm.asking import batches_of, rendered_prompts
from mmneurons.vlm.grid import Grids, find_grids, model_views
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.template import prompt_notes
from mmneurons.vlm.vlm import VLM, Inputs

UNCALIBRATED = (
    "No calibration of this model: internal confidence is shown as it is, and no noun is called unseen. Make one: "
    f"{MAKE}"
)


@overload
def find(
    vlm: VLM,
    images: Pictures,
    *,
    caption: str | Sequence[str] | None = ...,
    settings: FindSettings | None = ...,
    progress: Progress | None = ...,
    **options: Unpack[FindOptions],
) -> list[Finding]: ...
@overload
def find(
    vlm: VLM,
    images: None = ...,
    *,
    inputs: Inputs,
    settings: FindSettings | None = ...,
    progress: Progress | None = ...,
    **options: Unpack[FindOptions],
) -> list[Finding]: ...
@overload
def find(
    vlm: VLM,
    images: Picture | None = ...,
    *,
    caption: str | Sequence[str] | None = ...,
    settings: FindSettings | None = ...,
    progress: Progress | None = ...,
    **options: Unpack[FindOptions],
) -> Finding: ...
def find(
    vlm: VLM,
    images: Picture | Pictures | None = None,
    *,
    caption: str | Sequence[str] | None = None,
    inputs: Inputs | None = None,
    settings: FindSettings | None = None,
    progress: Progress | None = None,
    **options: Unpack[FindOptions],
) -> Finding | list[Finding]:
    """Let the model answer, and for each noun of its answer find the neurons that wrote it.

    Args:
        vlm: The model, from `load`.
        images: A path, PIL image or array, or a list of them, one prompt each; a list in the list is several images
            in one prompt; None for a prompt of words alone.
        caption: An answer that the model reads instead of giving one: its words are scored as if it had said them, in
            one pass. One text for each prompt, or one for all, with or without the answer prefix. Not with `inputs`.
        inputs: Ready-made model inputs, tensors by name, instead of images and prompt: one finding for each row.
            A model without a processor needs them, and shows its tokens by number.
        settings: What is asked and told of; None: the defaults.
        progress: Told how many prompts are done, after each batch.
        **options: Fields of `FindSettings`, such as `top=20` or `score="logprob"`, over those of `settings`.

    Returns:
        One Finding, or a list of as many as prompts (as rows, of `inputs`). An answer without nouns gives a Finding
        without nouns.

    Raises:
        ImageError: if something is not an image.
        ModelError: if there are neither images with a processor nor `inputs`.
        WordError: if a word or token asked for is in none of the answers.
        SettingError: for a setting that has no meaning.

    Source: Pan et al., Findings of ACL 2024, section 3. Their code projects the gate alone onto the unembedding:
        `score="paper"`.
    """
    choices = settled(FindSettings, settings, options)
    _check_asked(vlm, images, inputs, choices, caption)
    if inputs is not None:  # which hold the prompt
        choices = replace(choices, prompt="", answer_prefix="")
    findings: list[Finding] = []
    if inputs is not None:
        findings = _find_batch(vlm, vlm.placed(inputs), [[]] * _n_rows(inputs), None, choices)
    else:
        prompts = as_list(images)
        texts = None if caption is None else captions_for(len(prompts), caption, choices)
        for batch in batches_of(vlm, prompts, choices):
            mine = None if texts is None else texts[batch.first : batch.first + len(batch.rows)]
            findings += _find_batch(vlm, batch.inputs(vlm, choices), batch.rows, mine, choices)
            if progress is not None:
                progress("prompts", len(findings), len(prompts))
    _check_found(findings, choices, given=caption is not None)
    made = made_by(vlm, choices, given=caption is not None)
    findings = [replace(finding, provenance=made) for finding in findings]
    return findings if inputs is not None or isinstance(images, list | tuple) else findings[0]


def _with_grounds(
    batch: ScoredBatch, inputs: Inputs, grids: Grids | str, nouns: Sequence[NounFinding]
) -> tuple[list[NounFinding], list[str]]:
    """Add whether the image tokens say each noun, or a note that tells why that cannot be told."""
    if isinstance(grids, str):
        return [*nouns], [f"Whether nouns are seen in the picture is not told: {grids}."]
    calibration = calibration_for(batch.vlm, batch.choices.calibration)
    grounds = ground(batch.vlm, inputs, grids, batch.targets, batch.answers.texts, calibration)
    told = [] if calibration is not None else [UNCALIBRATED]
    return [replace(noun, grounded=one) for noun, one in zip(nouns, grounds, strict=True)], told


def captions_for(n_prompts: int, caption: str | Sequence[str], question: Question) -> list[str]:
    """The answer to each prompt, without the answer prefix: one for each, or the same for all.

    Raises:
        SettingError: another number of answers than of prompts, or one without a word.
    """
    texts = [caption] * n_prompts if isinstance(caption, str) else caption
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SettingError("An answer to be scored is a text, or a list of them.", seen=f"caption={caption!r}"[:200])
    if len(texts) != n_prompts:
        raise SettingError("Each prompt needs its answer.", seen=f"{n_prompts} prompts, {len(texts)} answers")
    texts = [text.strip() for text in texts]
    prefix = question.prefix.strip()
    if prefix:  # people write the whole sentence
        texts = [text.removeprefix(prefix) if f"{text} ".startswith(f"{prefix} ") else text for text in texts]
    if empty := [text for text in texts if not text.strip()]:
        raise SettingError("There is no word in the answer that is to be scored.", seen=repr(empty[0]))
    return list(texts)


@by_one_thread
def _find_batch(
    vlm: VLM, inputs: Inputs, rows: list[list[OpenedImage]], captions: list[str] | None, choices: FindSettings
) -> list[Finding]:
    with unchanged(vlm.model):
        return _found(vlm, inputs, rows, captions, choices)


def _found(
    vlm: VLM, inputs: Inputs, rows: list[list[OpenedImage]], captions: list[str] | None, choices: FindSettings
) -> list[Finding]:
    """The whole way for one batch, top to bottom."""
    # 1. Answers, the words of them that are explained, and what every neuron gave to each.
    batch = score_batch(vlm, inputs, rows, captions, choices)
    n_images, nouns = len(rows[0]), list[NounFinding]()
    notes = batch.notes()
    rendered = rendered_prompts(vlm, inputs)
    if n_images and vlm.processor is not None:
        notes += prompt_notes(vlm.processor, choices.prompt, n_images, vlm.day)
    grids = find_grids(vlm.model, inputs, n_images or _n_pictures(inputs))
    views = model_views(vlm.model, vlm.processor, inputs, grids, [len(row) for row in rows])
    if batch.scored is not None:
        # 2. The highest of them described.
        nouns = describe(vlm, batch.scored)
        if choices.maps:
            # 3. Where the neurons look: one more prefill, if asked for.
            if isinstance(grids, str):
                notes.append(f"No map is drawn: {grids}.")
            else:
                nouns = with_maps(vlm, inputs, grids, batch.scored, nouns)
        if choices.blank and batch.grey is not None:
            nouns = with_blank(vlm, batch.grey, batch.scored, nouns)
        if choices.grounded:
            nouns, told = _with_grounds(batch, inputs, grids, nouns)
            notes += told
    return [
        Finding(
            images=tuple(map(name_of, opened)),
            prompt=choices.prompt,
            answer_prefix=choices.prefix,
            rendered_prompt=rendered[row],
            caption=batch.answers.texts[row],
            token_ids=batch.answers.token_ids[row],
            score=choices.score,
            against=choices.against,
            says=choices.says,
            baseline=baseline_name(choices.baseline),
            nouns=tuple(n for n, t in zip(nouns, batch.targets, strict=True) if t.row == row),
            notes=batch.notes_of(row, notes),
            views=views[row],
        )
        for row, opened in enumerate(rows)
    ]


def _check_found(findings: list[Finding], choices: FindSettings, *, given: bool) -> None:
    absent = (set(missing(finding.caption, finding.token_ids, choices)) for finding in findings)
    everywhere = set.intersection(*absent) if findings else set()
    if everywhere:
        answers = "\n".join(f"  {finding.answer_prefix} {finding.caption}" for finding in findings[:5])
        said = "The answer" if given else "The model said"
        raise WordError(
            f"Not in the answer: {', '.join(sorted(map(str, everywhere)))}.",
            seen=f"{said}:\n{answers}",
            fix="Ask for a word that is in it, or for none, to take the nouns.",
        )


def _check_asked(vlm: VLM, images: Any, inputs: Inputs | None, choices: FindSettings, caption: Any) -> None:
    """Refuse what has no meaning together, or for this model."""
    if choices.calibration is not None:
        calibration_for(vlm, choices.calibration)
    if inputs is not None and images is not None:
        raise SettingError("Give images or ready-made inputs, not both.", fix="find(vlm, inputs={...})")
    if inputs is not None and caption is not None:
        raise SettingError(
            "An answer cannot be put behind ready-made inputs.", fix="Give images and a processor, or no answer."
        )
    if inputs is not None and (choices.blank or choices.baseline == "blank"):
        raise SettingError(
            "A blank image cannot be put into ready-made inputs.",
            fix="Give images and a processor, or neither blank=True nor baseline='blank'.",
        )
    if inputs is None and images is None and choices.baseline == "blank":
        raise SettingError(
            "A prompt without a picture has no blank one to compare with.",
            fix='baseline="zero"    CLI: --baseline zero',
        )
    if inputs is not None:
        vlm.check_batch(_n_rows(inputs))


def _n_rows(inputs: Inputs) -> int:
    """Prompts of ready-made inputs."""
    for name in ("input_ids", "decoder_input_ids", "pixel_values"):
        if name in inputs:
            return len(inputs[name])
    raise SettingError("Ready-made inputs need `input_ids` or `pixel_values`.", seen=f"Got: {', '.join(inputs)}")


def _n_pictures(inputs: Inputs) -> int:
    """Pictures in each row of ready-made inputs; where that cannot be told, one if there are pixels."""
    shapes = [inputs[name] for name in ("image_grid_thw", "spatial_shapes", "image_position_ids") if name in inputs]
    if shapes:
        return len(shapes[0]) // _n_rows(inputs)
    return int("pixel_values" in inputs)


def made_by(vlm: VLM, choices: FindSettings, *, given: bool) -> dict[str, Any]:
    """What made these findings. Decoding is greedy: there is no seed."""
    baseline = choices.baseline
    settings = asdict(replace(choices, tagger=None, baseline="zero", calibration=None)) | {
        "calibration": None if choices.calibration is None else dict(choices.calibration.made_by),
        "baseline": dict(baseline.facts) if isinstance(baseline, MeanActivations) else baseline,
        "answer_prefix": choices.prefix,
        "tagger": None if choices.tagger is None else repr(choices.tagger),
        "decoding": "given" if given else "greedy",
    }
    return {"model": vlm.facts, "packages": provenance.versions(), "settings": settings}
