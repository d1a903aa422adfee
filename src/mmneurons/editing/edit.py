"""image -> caption -> SOURCE -> its neurons -> how far each column moves -> how strong -> patch.

    patch = edit(vlm, ["a.png", "b.png"], source="dog", target="cat")
    with patch.applied(vlm): ...

The closed forms need no gradients. The model is left as it was: strengths are tried with patches that are taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.editing.columns import Move, lead, moves_for, patch_of, writers
from mmneurons.editing.goals import Asked, ask_about, goals_of
from mmneurons.editing.optimised import optimise
from mmneurons.editing.reference import Reference
from mmneurons.editing.strength import find_strength
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.settings import MAX_NEW_TOKENS, PROMPT, Question
from mmneurons.vlm import provenance
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM

Method = Literal["selective", "closed_form", "optimised"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class EditSettings:
    """How an edit is made."""

    method: Method = "selective"
    """"selective" discounts what the reference shares; "closed_form" is the smallest change; "optimised" is Adam's."""
    top: int = 400
    """Columns that move: those that write most of SOURCE."""
    blocks: int | None = 1
    """They are taken from so many of the last blocks; None: from all."""
    ridge: float = 0.005
    """Of "selective"; larger is nearer to "closed_form"."""
    prompts: tuple[str, ...] = (PROMPT,)
    """What the model is asked about each of the images."""
    answer_prefix: str | None = None
    """None: "An image of" with the default prompt, none with another."""
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 8

    @property
    def questions(self) -> list[Question]:
        """What the model is asked, one for each prompt."""
        return [Question(prompt, self.answer_prefix, self.max_new_tokens, self.batch_size) for prompt in self.prompts]


@by_one_thread
def edit(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    source: str,
    target: str | None = None,
    reference: Reference | None = None,
    neurons: Sequence[Neuron] | None = None,
    settings: EditSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Patch:
    """Make the model say `target` where it says `source`; anything else, where there is no target.

    Args:
        vlm: The model, from `load`.
        images: A path, PIL image or array, or several; the model must say `source` of one of them at least.
        source: The word that is to go, singular.
        target: The word that is to come, singular; None: any other.
        reference: What is to stay as it is, from `make_reference`. Without one, the other words of the same answers.
        neurons: Whose columns move, in the place of those that write most of `source`.
        settings: How.
        progress: Told what is being done.

    Returns:
        The patch; `provenance["search"]` says what it did to the images and the reference when its strength was chosen.

    Raises:
        WordError: the model says `source` of none of the images, or a word cannot be written in its tokens.
        SettingError: source and target are one word; settings out of range; no strength turns any answer.
        ModelError: columns that cannot be written.
    """
    settings, tell = settings or EditSettings(), progress or (lambda what: None)
    _check(vlm, settings)
    tell("answering about the images")
    images = as_list(images)
    # 1. What the model says of the images, and at which steps it says SOURCE.
    asked = ask_about(vlm, images, settings.questions, source, target)
    # 2. Which token is to give way to which there, and the columns that write the first.
    goals = goals_of(vlm, asked, target)
    tell("choosing columns")
    columns = (
        writers(vlm, goals, settings.top, settings.blocks) if neurons is None else Columns.of(vlm.anatomy, neurons)
    )
    if settings.method == "optimised":
        # 3a. By gradients: direction and strength at once.
        patch = optimise(vlm, columns, asked, source, target, reference, tell=tell)
        search = dict(patch.provenance)
    else:
        # 3b. Without: a direction for each column, by what is to change and what is to stay ...
        kept = [one.others for one in asked]
        if reference is not None:
            kept.append(reference.without(vlm, source))
        moves = moves_for(vlm, columns, goals, kept, settings.ridge if settings.method == "selective" else None)
        unit = patch_of(vlm, columns, moves)
        # ... and a strength, tried on what the model then generates.
        start = max(_needed(vlm, move) for move in moves)
        harm = None if reference is None else harm_of(vlm, reference, moves)
        found = find_strength(vlm, unit, asked, source, target, start=start, reference=reference, harm=harm, tell=tell)
        patch, search = found.strength * unit, asdict(found)
    # 4. What made it goes with it.
    made_by = {
        "source": source,
        "target": target,
        **asked_with(settings, asked),
        "search": search,
        "images": len(images),
        "said_source": [len(one.saying) for one in asked],
        "reference": None if reference is None else reference.facts,
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
    }
    return replace(patch, provenance=made_by)


def asked_with(settings: EditSettings, asked: Sequence[Asked]) -> dict[str, Any]:
    """The settings as a patch records them: with the prefix of the first prompt, to be judged by, and of each."""
    prefixes = [one.question.prefix for one in asked]
    return {"settings": asdict(settings) | {"answer_prefix": prefixes[0]}, "answer_prefixes": prefixes}


def _check(vlm: VLM, settings: EditSettings) -> None:
    if settings.method not in METHODS:
        raise SettingError(f"There is no method '{settings.method}'.", fix=f"Choose one of: {', '.join(METHODS)}.")
    n_blocks = len(vlm.anatomy.blocks)
    if settings.blocks is not None and not 1 <= settings.blocks <= n_blocks:
        raise SettingError(f"The model has {n_blocks} blocks.", seen=f"blocks={settings.blocks}")
    if settings.top < 1 or settings.ridge < 0 or not settings.prompts:
        raise SettingError(
            "An edit moves one column at least, has a ridge of 0 or more and one prompt at least.",
            seen=f"top={settings.top}, ridge={settings.ridge}, prompts={settings.prompts}",
        )


def _needed(vlm: VLM, move: Move) -> float:
    """The strength at which a move turns each of its steps, to first order; those that it hardly reaches left out."""
    logits = vlm.anatomy.logits(move.goal.steps.residual).float().cpu().clone()
    said = logits[:, move.goal.said].clone()
    logits[:, move.goal.said] = -torch.inf
    ahead = said - (logits.max(-1).values if move.goal.wanted is None else logits[:, move.goal.wanted])
    effect = move.effect(move.goal.steps)
    reached = effect > 0.1
    return float((ahead[reached] / effect[reached]).max().clamp_min(0.1)) if bool(reached.any()) else 1.0


def harm_of(vlm: VLM, reference: Reference, moves: Sequence[Move]) -> Float[Tensor, "steps"]:
    """For each reference step 1 / the strength at which, to first order, something else is said there.

    That may be what is wanted, SOURCE, or what is second likeliest. Minus infinity where SOURCE is said.
    """
    steps, unembed = reference.steps, vlm.anatomy.unembed
    tokens = {move.goal.said for move in moves} | {move.goal.wanted for move in moves if move.goal.wanted is not None}
    harm = torch.full((len(steps),), -torch.inf, dtype=torch.float32)
    said = unembed[steps.token_ids.to(unembed.device)].float().cpu()
    for others in (reference.seconds, *(torch.full_like(reference.seconds, token) for token in sorted(tokens))):
        rows = unembed[others.to(unembed.device)].float().cpu()
        adds = torch.stack([move.adds(steps, rows - said) for move in moves]).sum(0)
        harm = harm.maximum(adds / lead(steps, rows).clamp_min(1e-3))
    for move in moves:
        harm[steps.token_ids == move.goal.said] = -torch.inf
    return harm
