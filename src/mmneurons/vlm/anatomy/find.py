"""Make the anatomy of a loaded model.

The structure is looked at, one tiny forward pass is run, and the paths on which writes reach the final norm are traced.
"""

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
    """Find a model's blocks and neurons, whatever else writes into the residual stream, final norm and unembedding.

    Runs the language model once on a few made-up tokens; nothing in the model is changed.

    Args:
        model: A vision-language model of Hugging Face, loaded.
        decoder: Path of the language model in it, if the rule cannot tell.

    Raises:
        ModelError: if a part has no match or more than one, or its weights cannot be read.
    """
    # Structure first, and every matrix is checked before the forward pass: what cannot be read is refused early, by
    # name.
    tree = find_tree(model, decoder)
    ffns = [find_ffns(tree.name(block), block, tree.hidden) for block in tree.layers]
    for found in ffns:
        for ffn in found:
            weights.check(ffn.module)
    weights.check(tree.head)
    # One forward pass shows what structure cannot: gates, multipliers, softcaps, the order of norms. From the final
    # norm the tracer goes back to the embedding.
    seen = probe.run(tree, ffns)
    final, before = probe.find_final_norm(seen)
    tracer = _Tracer(tree, seen, ffns)
    embedding = tracer.trace_blocks(final)
    # What could not be told is kept as a doubt, not raised: contributions are then approximate, and `doctor` says so.
    doubts = tracer.doubts
    if seen.rule is None:
        doubts.append("What the model does to the head's output is neither a scale nor a softcap.")
    if any("down_proj_bias" in ffn.module._parameters for ffn in tracer.ffns):
        doubts.append("The experts have biases, which are counted to nothing here.")
    # The tracer goes from the last block to the first; the anatomy lists everything from the first to the last.
    # `sorted` is stable, so that a dense FFN stays in front of the experts of its block.
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
    """A tracer takes each block's output apart into what it was made of, from the last block to the first."""

    tree: Tree
    seen: Pass
    found: list[list[FoundFfn]]
    ffns: list[Ffn] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def trace_blocks(self, final: Seen) -> WritePath | None:
        """Trace all blocks, fill in the fields, and return the path of the embedding to the final norm."""
        # `stream` is the path from the output of the current block on, and `after` the vector that was read there: the
        # final norm's input, then what entered the block above.
        stream: WritePath | None = None
        after = final.input
        for layer in reversed(range(len(self.found))):
            block = self.seen.blocks[layer]
            name = self.tree.name(self.tree.layers[layer])
            # In a post-LN model the last norm of the last block is the final norm itself: what entered that norm is
            # taken apart, and only what ran before it can be a summand.
            last = layer == len(self.found) - 1 and final in block.parts
            target = final.input if last else block.left
            assert target is not None
            # What left this block must be what the next one read; a write between two blocks belongs to neither.
            if after is not None and not last and (apart := _apart(block.left, after)) > self.seen.limit:
                self.doubts.append(f"Something is written into the stream after {name} ({apart:.1%} of it).")
            stream = self._trace_block(layer, target, final if last else None, stream)
            after = block.entered
        return stream

    def _trace_block(self, layer: int, target, before: Seen | None, out: WritePath | None) -> WritePath | None:
        """Trace one block, given the path of its output, and return the path of what enters the block."""
        walk = _Walk(self, layer)
        walk.follow(target, before, out)
        # An FFN whose write hardly stands out from the rounding of the sum is not found the first time. The second fit
        # is told that its module does write, and keeps it where its scale is certain.
        if silent := walk.silent():
            walk = _Walk(self, layer, writers=[found.module for found in silent])
            walk.follow(target, before, out)
            silent = walk.silent()
        if not walk.ffns and not silent:
            raise no_ffn(self.tree.name(self.tree.layers[layer]))
        if walk.error < self.seen.limit and len(walk.entered) == 1:
            # The sum is complete without the silent FFNs, even beside a tiny stream: a gate at zero multiplies them
            # (Mllama as initialised). They stay neurons, on a path with the factor 0.
            walk.ffns += [self.ffn(layer, found, WritePath(0.0, None, out)) for found in silent]
            self.ffns += sorted(walk.ffns, key=lambda ffn: ffn.n_experts or 0)
            self.sources += walk.sources
            self.norms += walk.norms
            return walk.entered[0]
        # The sum has a rest that nothing explains. The block is still usable: FFNs and mixers are taken to write
        # straight into the residual stream, and the doubt says how large the rest is.
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
        """Return one FFN that was found, with the path of its writes, as an entry of the anatomy."""
        n_neurons, n_experts = weights.shape(found.module, self.tree.hidden)
        name = self.tree.name(found.module)
        experts = n_experts if found.is_experts else None
        return Ffn(layer, name, found.module, n_neurons, experts, found.activation, gate, path)


@dataclass(eq=False)
class _Walk:
    """A walk takes one block apart and keeps what it meets: FFNs, other sources, norms, and what entered."""

    tracer: _Tracer
    layer: int
    writers: Collection[nn.Module] = ()
    error: float = 0.0
    entered: list[WritePath | None] = field(default_factory=list)
    """Paths on which the vector that entered the block goes on; in a sum that is understood there is exactly one."""
    ffns: list[Ffn] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)

    def follow(self, target, before: Seen | None, path: WritePath | None) -> None:
        """Take apart a vector whose path is known, and give each of its summands a path of its own."""
        seen = self.tracer.seen
        rounding = torch.finfo(seen.dtype).eps
        terms, error = explain(target, seen.blocks[self.layer], before, rounding=rounding, writers=self.writers)
        self.error = max(self.error, error)
        # A summand is the vector that entered the block, a norm's output (whose input is taken apart in turn, which
        # makes this recursive), or what an FFN or another module wrote.
        for term in terms:
            mine = path if term.scale == 1.0 else WritePath(term.scale, None, path)
            if term.part is None:
                self.entered.append(mine)
            elif is_norm(term.part.module):
                self._through_norm(term.part, mine)
            else:
                self._leaf(term.part, mine)

    def silent(self) -> list[FoundFfn]:
        """Return the block's FFNs of which no summand was found."""
        return [found for found in self.tracer.found[self.layer] if id(found.module) not in self.reached]

    def _through_norm(self, part: Seen, path: WritePath | None) -> None:
        """Note a norm on the path, and go on with what entered it."""
        tree = self.tracer.tree
        norm = measure_norm(part.module, tree.hidden)
        site = NormSite(tree.name(part.module), part.module, norm, path)
        self.norms.append(site)
        self.follow(part.input, part, WritePath(1.0, site, path))

    def _leaf(self, part: Seen, path: WritePath | None) -> None:
        """Note a module that wrote a summand, as an FFN or as another source."""
        tracer, module = self.tracer, part.module
        self.reached.add(id(module))
        for found in tracer.found[self.layer]:
            if found.module is module:
                self.ffns.append(tracer.ffn(self.layer, found, path, part.gate))
                return
        # An FFN as wide as the residual stream has no shape that tells its output projection from its input projection.
        # The pass has told: this one writes into the stream.
        for found in square_ffns(tracer.tree.layers[self.layer], tracer.tree.hidden):
            if found.module is module:
                weights.check(module)
                self.ffns.append(tracer.ffn(self.layer, found, path, part.gate))
                return
        kind: Literal["attention", "other"] = "attention" if self._in_mixer(module) else "other"
        self.sources.append(Source(self.layer, tracer.tree.name(module), module, kind, path))

    def _in_mixer(self, module: nn.Module) -> bool:
        """Whether a module of this block is a mixer or lies in one."""
        block = self.tracer.tree.layers[self.layer]
        return any(mixes_positions(m) and any(part is module for part in m.modules()) for m in block.modules())


def _apart(one, other) -> float:
    """Return how far two tensors differ, relative to the second, in the rows where the stream was not made small."""
    one, other = one[:N_TOKENS], other[:N_TOKENS]
    return float((one - other).norm() / other.norm().clamp_min(1e-30))
