"""`edit`, by whichever method: those of editing/, which the package is about, and those of baselines/, beside them.

patch = edit(vlm, images, source="dog", target="cat", method="rome")
with patch.applied(vlm): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from mmneurons.baselines.baseline import Change, Name, baseline
from mmneurons.baselines.lora import Adapter
from mmneurons.baselines.output_layer import HeadChange
from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.editing import edit as own
from mmneurons.editing.reference import Reference
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import OTHER_METHODS, EditChoices, EditOptions, EditSettings, settled
from mmneurons.vlm.vlm import VLM


@overload
def edit(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    source: str,
    target: str | None = None,
    reference: Reference | Literal["own"] | None = None,
    neurons: Sequence[Neuron] | None = None,
    settings: EditSettings | None = None,
    progress: Progress = untold,
    **options: Unpack[EditOptions],
) -> Patch: ...


@overload
def edit(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    source: str,
    target: str,
    method: Literal["lora"],
    reference: Reference | Literal["own"] | None = None,
    settings: EditSettings | None = None,
    progress: Progress = untold,
    **options: Unpack[EditChoices],
) -> Adapter: ...


@overload
def edit(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    source: str,
    target: str,
    method: Literal["logit_bias", "head_rows"],
    reference: Reference | Literal["own"] | None = None,
    settings: EditSettings | None = None,
    progress: Progress = untold,
    **options: Unpack[EditChoices],
) -> HeadChange: ...


def edit(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    source: str,
    target: str | None = None,
    reference: Reference | Literal["own"] | None = None,
    neurons: Sequence[Neuron] | None = None,
    settings: EditSettings | None = None,
    progress: Progress = untold,
    **options: Any,
) -> Change:
    """Make the model say `target` where it says `source`; anything else, where there is no target.

    The model is left as it was: `with edit(...).applied(vlm):` makes it say the other word.

    Args:
        vlm: The model, from `load`.
        images: A path, PIL image or array, or several; the model must say `source` of one of them at least.
        source: The word that is to go, singular.
        target: The word that is to come, singular; None: any other. The methods of other work need one.
        reference: What is to stay as it is, from `make_reference`. None: one is made of sentences that the package
            ships, for the pocket model of its own images and texts as well; "own": no more than the other words of the
            same answers, which stay in any case.
        neurons: Whose columns move, in the place of those that write most of `source`; for the package's own methods.
        settings: How; None: the defaults.
        progress: Told what is being done; how much there is of it is not known.
        **options: Fields of `EditSettings`, such as `top=200` or `method="rome"`, over those of `settings`; for
            `method` also "lora" (LoRA on every `w_out`), "logit_bias" (a constant on two logits) and "head_rows" (two
            rows of the head change places).

    Returns:
        A Patch, which can be saved, exported and stacked. LoRA makes an Adapter and the last two a HeadChange: no
        columns of the model, and so no patch; they can be `applied` alone. The `provenance` of each says what made it.

    Raises:
        WordError: the model says `source` of none of the images, or a word cannot be written in its tokens.
        SettingError: source and target are one word; settings out of range or without a meaning for the method; no
            strength turns any answer; PEFT is missing ("lora").
        ModelError: columns that cannot be written; experts, or adapters, where a method cannot work with them.
    """
    # Only what makes a patch is a field of the settings; the rest is asked for by name.
    named = options.pop("method") if options.get("method") in OTHER_METHODS else None
    settings = settled(EditSettings, settings, options)
    method: Name | Any = named or settings.method
    if method in own.OWN:
        return own.edit(
            vlm,
            images,
            source=source,
            target=target,
            reference=reference,
            neurons=neurons,
            settings=settings,
            progress=progress,
        )
    if target is None:
        raise SettingError(
            f"{method} replaces a word, and cannot remove one.", fix="Give a target, or method='selective'."
        )
    if neurons is not None:
        raise SettingError(f"{method} does not change columns of one's choice.", fix="Leave out `neurons`.")
    pictures = as_list(images)
    return baseline(
        vlm, method, pictures, source=source, target=target, reference=reference, settings=settings, progress=progress
    )
