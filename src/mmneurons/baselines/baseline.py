"""Rivals of `edit`: other ways to make a model say TARGET where it says SOURCE, all asked and judged alike.

    rival = baseline(vlm, "rome", images, source="dog", target="cat", reference=reference, settings=None)
    with rival.applied(vlm): ...

| name | what changes | source |
| --- | --- | --- |
| `finetune` | all of one block's `w_out`, by Adam | |
| `lora` | every `w_out`, by a product of rank 8 | Hu et al., ICLR 2022 |
| `rome` | one block's `w_out`, by rank one | Meng et al., NeurIPS 2022 |
| `memit` | the `w_out` of a few blocks | Meng et al., ICLR 2023 |
| `random` | matched random columns, by the closed form of `edit` | |
| `logit_bias` | two logits, by a constant: an output-layer reference | |
| `head_rows` | two rows of the head, which change places: likewise | |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.controls import column_norms, loudness, matched
from mmneurons.baselines.lessons import Task
from mmneurons.baselines.trained import Adapter, Facts, finetune, lora, memit, rome
from mmneurons.data.pictures import Picture
from mmneurons.editing.columns import writers
from mmneurons.editing.edit import asked_with, edit
from mmneurons.editing.goals import Goal, ask_about, goals_of
from mmneurons.editing.reference import Reference
from mmneurons.editing.steps import Steps
from mmneurons.editing.strength import find_strength
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import EditSettings
from mmneurons.vlm import provenance
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import by_one_thread, restored
from mmneurons.vlm.prompts import tokens_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import inflected

Name = Literal["finetune", "lora", "rome", "memit", "random", "logit_bias", "head_rows"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True, eq=False)
class HeadChange:
    """What is done to the logits of some tokens, by a hook on the head's output; its weights, tied or not, stay."""

    pairs: tuple[tuple[int, int], ...]
    """SOURCE's token and TARGET's, for each form."""
    bias: float | None
    """Taken from the first and added to the second of each pair; None: they change places."""

    def __rmul__(self, factor: float) -> HeadChange:
        """A bias `factor` times as large."""
        return HeadChange(self.pairs, None if self.bias is None else factor * self.bias)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The head's output, changed."""
        new, sources = output.clone(), sorted({said for said, _ in self.pairs})
        for target in sorted({wanted for _, wanted in self.pairs}):
            if self.bias is not None:
                new[..., target] += self.bias
                continue
            # Forms of SOURCE can share one of TARGET (cow, cows: sheep); the likeliest of them changes place with it.
            mine = [said for said, wanted in self.pairs if wanted == target]
            new[..., target] = output[..., mine].max(-1).values
            new[..., mine] = output[..., [target]].expand(*output.shape[:-1], len(mine))
        if self.bias is not None:
            new[..., sources] -= self.bias
        return new

    @restored
    def applied(self, vlm: VLM) -> Iterator[HeadChange]:
        """Set the hook, and remove it whatever happens."""
        with vlm.alone(), hooked([partial(vlm.anatomy.head.register_forward_hook, self)]):
            yield self


@dataclass(frozen=True, eq=False)
class Rival:
    """An edit made another way."""

    name: Name
    change: Patch | Adapter | HeadChange
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain data: settings, `seconds` to make it, `steps` of Adam, `changed` numbers of the model, `stored` numbers."""

    @restored
    def applied(self, vlm: VLM) -> Iterator[Rival]:
        """Apply, and take back whatever happens; errors as of `Patch.apply`."""
        with self.change.applied(vlm):
            yield self


@by_one_thread
def baseline(
    vlm: VLM,
    name: Name,
    images: Sequence[Picture],
    *,
    source: str,
    target: str,
    reference: Reference | None = None,
    settings: EditSettings | None = None,
    block: int | None = None,
    seed: int = 0,
    progress: Progress = untold,
) -> Rival:
    """Make the model say `target` where it says `source`, not by `edit`. The model is left as it was.

    Args:
        vlm: The model, from `load`.
        name: Which of `NAMES`.
        images: Paths, PIL images or arrays; the model must say `source` of one of them at least.
        source: The word that is to go, singular.
        target: The word that is to come, singular.
        reference: What is to stay as it is. Without one, the other words of the same captions.
        settings: Prompts, answer prefix and batches for all; how columns are chosen and moved for "random" alone.
        block: Whose `w_out` "finetune" and "rome" change, the last of those that "memit" changes. None: the model's
            last; for "rome" the last but one, where it does better.
        seed: Of the random columns, of LoRA's first weights and of the order of reference images.
        progress: Told what is being done.

    Raises:
        WordError: the model says `source` of none of the images, or a word cannot be written in its tokens.
        SettingError: source and target are one word; there is no such baseline or block; no strength turns any answer
            ("random", "logit_bias"); PEFT is missing ("lora").
        ModelError: columns that cannot be written, experts ("finetune", "lora", "rome", "memit"), adapters ("lora").
    """
    if name not in NAMES:
        raise SettingError(f"There is no baseline '{name}'.", fix=f"Choose one of: {', '.join(NAMES)}.")
    settings = settings or EditSettings()

    def tell(stage: str) -> None:
        progress(stage, 0, 0)

    began = time.perf_counter()
    tell("answering about the images")
    asked = ask_about(vlm, images, settings.questions, source, target)
    task = Task(vlm, asked, source, target, reference, settings, seed, tell)
    change, facts = _MAKERS[name](task, block)
    made_by = {
        "baseline": name,
        "source": source,
        "target": target,
        "seed": seed,
        **asked_with(settings, asked),
        **facts,
        "seconds": time.perf_counter() - began,
        **_sizes(vlm, change),
        "images": len(images),
        "reference": None if reference is None else reference.facts,
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
    }
    return Rival(name, change, made_by)


def matched_neurons(vlm: VLM, goals: Sequence[Goal], chosen: Columns, seed: int) -> list[Neuron]:
    """Random neurons for others: for each one of the same FFN, about as loud where SOURCE is said, in the mean."""
    n = sum(len(goal.steps) for goal in goals)
    mean = [
        sum(
            (goal.steps.activations[i].float().abs().sum(0) for goal in goals),
            torch.zeros(ffn.size, dtype=torch.float32),
        )
        / n
        for i, ffn in enumerate(vlm.anatomy.ffns)
    ]
    # One step that stands for all; every expert's neurons have slots, in order.
    step = Replay(vlm.anatomy, goals[0].said, torch.empty(0, dtype=torch.float32), mean, [None] * len(mean), [])
    slots = torch.cat([mine + int(step.slot_starts[i]) for i, mine in chosen.indices.items()])
    loud = loudness(step.activations, step.experts, column_norms(vlm.anatomy))
    (drawn,) = matched(step.slot_starts, loud, slots, 1, seed, as_many=True).sets  # edits of one size
    return [step.neuron(slot) for slot in drawn.unique().tolist()]


def _random(task: Task, block: int | None) -> tuple[Patch, Facts]:
    goals = goals_of(task.vlm, task.asked, task.target)
    chosen = writers(task.vlm, goals, task.settings.top, task.settings.blocks)
    patch = edit(
        task.vlm,
        list(task.asked[0].images),
        source=task.source,
        target=task.target,
        reference=task.reference,
        neurons=matched_neurons(task.vlm, goals, chosen, task.seed),
        settings=task.settings,
        progress=lambda stage, done, total: task.tell(stage),
    )
    return patch, {"steps": 0, "search": patch.provenance["search"]}


def _head_rows(task: Task, block: int | None) -> tuple[HeadChange, Facts]:
    return HeadChange(_pairs(task), None), {"steps": 0}


def _logit_bias(task: Task, block: int | None) -> tuple[HeadChange, Facts]:
    """TARGET up and SOURCE down, as far as the reference bears: found as `edit` finds the strength of its patch."""
    unit, reference = HeadChange(_pairs(task), 1.0), task.reference
    needed: list[Tensor] = []
    harm = None
    for one in task.asked:
        if not one.found:
            continue
        rows = one.said.steps.at(torch.tensor([one.said.row(answer, word.steps[0]) for answer, word in one.found]))
        needed.append(_behind(task, rows, unit) / 2)  # as much is taken from SOURCE
    if reference is not None:
        harm = -_behind(task, reference.steps, unit)
        harm[torch.isin(reference.steps.token_ids, torch.tensor([said for said, _ in unit.pairs]))] = -torch.inf
    search = find_strength(
        task.vlm,
        unit,
        task.asked,
        task.source,
        task.target,
        start=max(0.1, max(float(each.max()) for each in needed)),
        reference=reference,
        harm=harm,
        tell=task.tell,
    )
    return search.strength * unit, {"steps": 0, "search": asdict(search)}


def _pairs(task: Task) -> tuple[tuple[int, int], ...]:
    """First tokens of SOURCE and of TARGET, for each form in which SOURCE was said."""
    tokenizer, found = task.vlm.tokenizer, set()
    for one in task.asked:
        for answer, word in one.found:
            said = one.said.token_ids[answer][word.steps[0]]
            found.add((said, tokens_of(tokenizer, inflected(task.target, word.text))[0]))
    pairs = tuple(sorted(pair for pair in found if pair[0] != pair[1]))
    if not pairs:
        raise SettingError(f"'{task.source}' and '{task.target}' begin with the same token.")
    return pairs


def _behind(task: Task, steps: Steps, change: HeadChange) -> Float[Tensor, "steps"]:
    """How far the likeliest token of TARGET is behind what was said."""
    wanted = sorted({target for _, target in change.pairs})
    logits = [task.vlm.anatomy.logits(rows)[:, wanted].max(-1).values.cpu() for rows in steps.residual.split(256)]
    return steps.logits - torch.cat(logits)


def _sizes(vlm: VLM, change: Patch | Adapter | HeadChange) -> dict[str, int]:
    """`changed`: numbers of the model that are others; `stored`: numbers that say how."""
    if isinstance(change, HeadChange):
        return {"changed": 0, "stored": len(change.pairs) * 2 + (change.bias is not None)}
    if isinstance(change, Adapter):
        ffns = [ffn for ffn in vlm.anatomy.ffns if ffn.name in change.names]
        changed = sum(ffn.size for ffn in ffns) * vlm.anatomy.hidden
        return {"changed": changed, "stored": sum(each.numel() for each in change.weights.values())}
    tensors = [change.directions, *(each for part in change.parts for each in (part.deltas, part.coefficients))]
    stored = sum(each.numel() for each in tensors if each is not None)
    return {"changed": len(change.neurons) * vlm.anatomy.hidden, "stored": stored}


_MAKERS: dict[str, Callable[[Task, int | None], tuple[Patch | Adapter | HeadChange, Facts]]] = {
    "finetune": finetune,
    "lora": lora,
    "rome": rome,
    "memit": memit,
    "random": _random,
    "logit_bias": _logit_bias,
    "head_rows": _head_rows,
}
