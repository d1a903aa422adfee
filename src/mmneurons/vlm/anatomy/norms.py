"""Turn a norm of any class into data, by what the norm does and not by what it is called."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmneurons.maths.readout import Norm
from mmneurons.vlm import weights


def measure_norm(module: nn.Module, hidden: int) -> Norm:
    """Read weight, bias and epsilon off what a norm does, so that w and 1 + w, RMS and LayerNorm need no table.

    A LayerNorm sends a constant vector to its bias; an RMSNorm to its weight. Epsilon shows on a small input.
    """
    norm = _in_float32(module)
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    ones = torch.ones(hidden, device=device, dtype=torch.float32)
    with torch.inference_mode():
        bias = norm(torch.zeros(hidden, device=device, dtype=torch.float32))
        centred = bool(torch.allclose(norm(ones), bias, atol=1e-5))
        probe = ones.clone()
        # A LayerNorm takes the mean away, and would leave nothing of a vector of ones. Entries of +1 and -1 have mean
        # zero; with an odd hidden size one entry is left at 0, and is measured by a second probe below.
        if centred:
            probe[1::2] = -1
            if hidden % 2:
                probe[-1] = 0
        # The same probe large and small: epsilon counts for nothing in the one and dominates the other.
        small = 1e-3
        size = probe.pow(2).mean()
        large, little = (norm(c * probe) - bias for c in (1.0, small))
        # little / large = small * sqrt(size + eps) / sqrt(small^2 * size + eps), solved for eps.
        ratio = float((little.abs().sum() / large.abs().sum()).double()) ** 2
        eps = float(size) * small**2 * (1 - ratio) / (ratio - small**2)
        # The outputs were divided by sqrt(size + eps); undone, what is left is the weight as it acts (w, or 1 + w).
        weight = (large / torch.where(probe == 0, ones, probe)) * (size + eps).sqrt()
        if centred and hidden % 2:  # the entry that the first probe left at 0
            probe = torch.roll(probe, 1)
            weight[-1] = ((norm(probe) - bias)[-1] / probe[-1]) * (size + eps).sqrt()
    return Norm(weight=weight.clone(), bias=bias.clone(), eps=max(eps, 0.0), centred=centred)


def kind(module: nn.Module, norm: Norm) -> str:
    """Return the kind of a norm in words, such as "RMSNorm, weight stored as w" or "LayerNorm without bias"."""
    if norm.centred:
        return "LayerNorm" if norm.bias.any() else "LayerNorm without bias"
    stored = weights.parameters(module).get("weight")
    if stored is None or not isinstance(stored, Tensor):
        return "RMSNorm"
    # Gemma stores w - 1: compare the weight as it acts with the stored one, as it is and with 1 added.
    error = [(norm.weight - shift - stored.float().to(norm.weight.device)).abs().max() for shift in (0.0, 1.0)]
    return f"RMSNorm, weight stored as {'w' if error[0] < error[1] else 'w - 1'}"


def _in_float32(module: nn.Module) -> nn.Module:
    """Return a copy of the norm that computes in float32 and has no hooks; the module itself stays as it is."""
    # A shallow copy with dictionaries of its own: what is replaced below is replaced in the copy alone.
    norm = copy.copy(module)
    norm.__dict__ = dict(module.__dict__)
    for added in ("forward", "_hf_hook", "_old_forward"):  # what accelerate puts on a module, which would move weights
        norm.__dict__.pop(added, None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        norm.__dict__[hooks] = type(getattr(module, hooks))()
    fetched = weights.parameters(module)
    norm._parameters = {
        name: nn.Parameter(fetched[name].float(), requires_grad=False) if name in fetched else None
        for name in module._parameters
    }
    return norm
