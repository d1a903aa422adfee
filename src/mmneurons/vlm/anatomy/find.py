"""A loaded model -> its Anatomy: structure, one tiny pass, and the paths on which writes reach the final norm."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from mmneurons.vlm import weights
from mmneurons.vlm.anatomy import probe
from mmneurons.vlm.anatomy.norms import measure_norm
from mmneurons.vlm.anatomy.parts import Anatomy, Block, Ffn, LogitRule, NormSite, Source, WritePath
from mmneurons.vlm.anatomy.probe import N_TOKENS, Pass, Seen, explain
from mmneurons.vlm.anatomy.structure import (
    FoundFfn,
    Tree,
    find_ffns,
    find_tree,
    is_norm,
    linear_shape,
    mixes_positions,
    no_ffn,
    square_ffns,
)


def find_anatomy(model: PreTrainedModel, decoder: str | None = None) -> Anatomy:
    """Find the language model's blocks, their neurons, what else writes into the stream, final norm and unembedding.

    Runs the language model once on a few made-up tokens; nothing in the model is changed.

    Args:
        model: A vision-language model of Hugging Face, loaded.
        decoder: Path of the language model in it, if the rule cannot tell.

    Raises:
        ModelError: if a part has no match or more than one, or its weights cannot be read.
    """
    tree = find_tree(model, decoder)
    ffns = [find_ffns(tree.name(block), block, tree.hidden) for block in tree.layers]
    for found in ffns:
        for ffn in found:
            weights.check(ffn.module)
    weights.check(tree.head)
    seen = probe.run(tree, ffns)
    final, before = probe.find_final_norm(seen)
    tracer = _Tracer(tree, seen, ffns)
    embedding = tracer.trace_blocks(final)
    doubts = tracer.doubts
    if seen.rule is None:
        doubts.append("What the model does to the head's output is neither a scale nor a softcap.")
    if any("down_proj_bias" in ffn.module._parameters for ffn in tracer.ffns):
        doubts.append("The experts have biases, which are counted to nothing here.")
    rule = replace(seen.rule or LogitRule(), before=before)
    return Anatomy(
        owner=tree.owner,
        decoder_name=tree.name(tree.root),
        blocks=tuple(Block(tree.name(block), block) for block in tree.layers),
        ffns=tuple(sorted(tracer.ffns, key=lambda ffn: ffn.layer)),
        sources=tuple(sorted(tracer.sources, key=lambda source: source.layer)),
        norms=tuple(tracer.norms),
        embedding=embedding,
        norm_module=final.module,
        norm_name=tree.name(final.module),
        norm=measure_norm(final.module, tree.hidden),
        head=tree.head,
        head_name=tree.name(tree.head),
        logit_rule=rule,
        hidden=tree.hidden,
        dtype=seen.dtype,
        vocab=linear_shape(tree.head)[1],
        doubts=tuple(doubts),
    )


@dataclass(eq=False)
class _Tracer:
    """Follows each block's output back to what it was made of, from the last block to the first."""

    tree: Tree
    seen: Pass
    found: list[list[FoundFfn]]
    ffns: list[Ffn] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def trace_blocks(self, final: Seen) -> WritePath | None:
        """Fill in everything; the path of the embedding."""
        stream: WritePath | None = None
        after = final.input
        for layer in reversed(range(len(self.found))):
            block = self.seen.blocks[layer]
            name = self.tree.name(self.tree.layers[layer])
            last = layer == len(self.found) - 1 and final in block.parts  # post-LN: its last norm is the final one
            target = final.input if last else block.left
            assert target is not None
            if after is not None and not last and (apart := _apart(block.left, after)) > self.seen.limit:
                self.doubts.append(f"Something is written into the stream after {name} ({apart:.1%} of it).")
            stream = self._trace_block(layer, target, final if last else None, stream)
            after = block.entered
        return stream

    def _trace_block(self, layer: int, target, before: Seen | None, out: WritePath | None) -> WritePath | None:
        """Where everything in one block goes, given where its output goes; the path of what enters it."""
        walk = _Walk(self, layer)
        walk.follow(target, before, out)
        if silent := walk.silent():  # it writes, but hardly stands out from what is rounded
            walk = _Walk(self, layer, writers=[found.module for found in silent])
            walk.follow(target, before, out)
            silent = walk.silent()
        if not walk.ffns and not silent:
            raise no_ffn(self.tree.name(self.tree.layers[layer]))
        if walk.error < self.seen.limit and len(walk.entered) == 1:
            # The sum is whole without these, even beside a tiny stream: a gate at zero (Mllama as initialised).
            walk.ffns += [self.ffn(layer, found, WritePath(0.0, None, out)) for found in silent]
            self.ffns += sorted(walk.ffns, key=lambda ffn: ffn.n_experts or 0)
            self.sources += walk.sources
            self.norms += walk.norms
            return walk.entered[0]
        name = self.tree.name(self.tree.layers[layer])
        self.doubts.append(
            f"What block {name} writes is not a sum of what its parts give "
            f"({walk.error:.1%} is left over): its neurons are taken to write into the stream as they are."
        )
        self.ffns += [self.ffn(layer, found, out) for found in self.found[layer]]
        ffn_ids = {id(found.module) for found in self.found[layer]}
        mixers = [m for m in self.tree.layers[layer].children() if mixes_positions(m) and id(m) not in ffn_ids]
        self.sources += [Source(layer, self.tree.name(m), m, "attention", out) for m in mixers]
        return out

    def ffn(self, layer: int, found: FoundFfn, path: WritePath | None, gate: nn.Module | None = None) -> Ffn:
        n_neurons, n_experts = weights.shape(found.module, self.tree.hidden)
        name = self.tree.name(found.module)
        experts = n_experts if found.is_experts else None
        return Ffn(layer, name, found.module, n_neurons, experts, found.activation, gate, path)


@dataclass(eq=False)
class _Walk:
    """One block taken apart."""

    tracer: _Tracer
    layer: int
    writers: Collection[nn.Module] = ()
    error: float = 0.0
    entered: list[WritePath | None] = field(default_factory=list)
    """The paths on which what entered the block goes on; there should be one."""
    ffns: list[Ffn] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)

    def follow(self, target, before: Seen | None, path: WritePath | None) -> None:
        """Take a vector apart whose path is known, and give each summand its own."""
        seen = self.tracer.seen
        rounding = torch.finfo(seen.dtype).eps
        terms, error = explain(target, seen.blocks[self.layer], before, rounding=rounding, writers=self.writers)
        self.error = max(self.error, error)
        for term in terms:
            mine = path if term.scale == 1.0 else WritePath(term.scale, None, path)
            if term.part is None:
                self.entered.append(mine)
            elif is_norm(term.part.module):
                self._through_norm(term.part, mine)
            else:
                self._leaf(term.part, mine)

    def silent(self) -> list[FoundFfn]:
        """The block's FFNs that nothing was found to come from."""
        return [found for found in self.tracer.found[self.layer] if id(found.module) not in self.reached]

    def _through_norm(self, part: Seen, path: WritePath | None) -> None:
        tree = self.tracer.tree
        norm = measure_norm(part.module, tree.hidden)
        site = NormSite(tree.name(part.module), part.module, norm, path)
        self.norms.append(site)
        self.follow(part.input, part, WritePath(1.0, site, path))

    def _leaf(self, part: Seen, path: WritePath | None) -> None:
        tracer, module = self.tracer, part.module
        self.reached.add(id(module))
        for found in tracer.found[self.layer]:
            if found.module is module:
                self.ffns.append(tracer.ffn(self.layer, found, path, part.gate))
                return
        for found in square_ffns(tracer.tree.layers[self.layer], tracer.tree.hidden):
            if found.module is module:
                weights.check(module)
                self.ffns.append(tracer.ffn(self.layer, found, path, part.gate))
                return
        kind: Literal["attention", "other"] = "attention" if self._in_mixer(module) else "other"
        self.sources.append(Source(self.layer, tracer.tree.name(module), module, kind, path))

    def _in_mixer(self, module: nn.Module) -> bool:
        block = self.tracer.tree.layers[self.layer]
        return any(mixes_positions(m) and any(part is module for part in m.modules()) for m in block.modules())


def _apart(one, other) -> float:
    """How far two vectors differ in the stream that nothing was done to."""
    one, other = one[:N_TOKENS], other[:N_TOKENS]
    return float((one - other).norm() / other.norm().clamp_min(1e-30))
