"""image -> caption -> SOURCE -> its neurons -> how far each column updates -> how strong -> patch.

    patch = edit(vlm, ["a.png", "b.png"], source="dog", target="cat")
    with patch.applied(vlm): ...

The closed forms need no gradients. The model is left as it was: strengths are tried with patches that are taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, Unpack

from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.editing.closed_form import flip_risk, needed_strength, select_columns, solve, unit_patch
from mmneurons.editing.gradient import optimise
from mmneurons.editing.reference import Reference, reference_of
from mmneurons.editing.request import EditRequest, make_requests, searched_images, token_goals
from mmneurons.editing.strength import find_strength
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import EditOptions, EditSettings, Method, settled
from mmneurons.vlm import provenance
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM

OWN: tuple[Method, ...] = ("selective", "closed_form", "optimised")
"""The methods that are made here; `mmneurons.methods` has them all."""


@by_one_thread
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
) -> Patch:
    """Make the model say `target` where it says `source`; anything else, where there is no target.

    Args:
        vlm: The model, from `load`.
        images: A path, PIL image or array, or several; the model must say `source` of one of them at least.
        source: The word that is to go, singular.
        target: The word that is to come, singular; None: any other.
        reference: What is to stay as it is, from `make_reference`. None: one is made of sentences that the package
            ships, for the pocket model of its own images and texts as well; "own": no more than the other words of the
            same answers, which stay in any case.
        neurons: Whose columns move, in the place of those that write most of `source`.
        settings: How; None: the defaults.
        progress: Told what is being done; how much there is of it is not known.
        **options: Fields of `EditSettings`, such as `top=200` or `method="closed_form"`, over those of `settings`.

    Returns:
        The patch; `provenance["search"]` says what it did to the images and the reference when its strength was chosen.

    Raises:
        WordError: the model says `source` of none of the images, or a word cannot be written in its tokens.
        SettingError: source and target are one word; settings out of range; no strength turns any answer.
        ModelError: columns that cannot be written.
    """
    settings = settled(EditSettings, settings, options)
    if settings.method not in OWN:
        raise SettingError(f"{settings.method} is none of {', '.join(OWN)}.", fix="mmneurons.edit knows all methods.")
    if settings.block is not None:
        raise SettingError(
            f"{settings.method} takes its columns from the last blocks, and not from one that is named.",
            seen=f"block={settings.block}",
            fix="blocks=2 takes them from the last two    CLI: --blocks 2",
        )

    def tell(stage: str) -> None:
        progress(stage, 0, 0)

    tell("answering about the images")
    images = as_list(images)
    # 1. What the model says of the images, and at which steps it says SOURCE.
    requests = make_requests(vlm, images, settings.questions, source, target)
    # 2. Which token is to give way to which there, and the columns that write the first.
    goals = token_goals(vlm, requests, target)
    tell("choosing columns")
    columns = (
        select_columns(vlm, goals, settings.top, settings.blocks)
        if neurons is None
        else Columns.of(vlm.anatomy, neurons)
    )
    # 3. What is to stay as it is.
    tell("reading what is to stay as it is")
    reference = reference_of(vlm, reference, settings.question)
    if settings.method == "optimised":
        # 4a. By gradients: direction and strength at once.
        patch = optimise(vlm, columns, requests, source, target, reference, tell=tell)
        search = dict(patch.provenance)
    else:
        # 4b. Without: a direction for each column, by what is to change and what is to stay ...
        kept = [one.others for one in requests]
        if reference is not None:
            kept.append(reference.without(vlm, source))
        updates = solve(vlm, columns, goals, kept, settings.ridge if settings.method == "selective" else None)
        unit = unit_patch(vlm, columns, updates)
        # ... and a strength, tried on what the model then generates.
        start = max(needed_strength(vlm, update) for update in updates)
        risk = None if reference is None else flip_risk(vlm, reference, updates)
        found = find_strength(
            vlm,
            unit,
            requests,
            source,
            target,
            start=start,
            lowest=min(vlm.anatomy.ffns[i].layer for i in columns.indices),
            reference=reference,
            risk=risk,
            tell=tell,
        )
        patch, search = found.strength * unit, asdict(found)
    # 5. What made it goes with it.
    made_by = {
        "source": source,
        "target": target,
        **recorded_settings(settings, requests),
        "search": search,
        "images": len(images),
        "said_source": [len(one.saying) for one in requests],
        "searched": searched_images(requests),
        "reference": None if reference is None else reference.facts,
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
    }
    return replace(patch, provenance=made_by)


def recorded_settings(settings: EditSettings, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """The settings as a patch records them: with the prefix of the first prompt, to be evaluated by, and of each."""
    chosen, prefixes = asdict(settings), [one.question.prefix for one in requests]
    del chosen["prompt"], chosen["wordings"]
    chosen |= {"prompts": [one.question.prompt for one in requests], "answer_prefix": prefixes[0]}
    return {"settings": chosen, "answer_prefixes": prefixes}
