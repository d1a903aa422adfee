"""Losses are taken at steps of answers that the model is given; they are sums over the steps, in nats.

Logits are float32, (steps, vocab); each function says which steps it is for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def divergence(logits: Float[Tensor, "n vocab"], base: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Compute the KL divergence from the unedited model, whose logits are `base`, at steps that are to stay."""
    return F.kl_div(logits.log_softmax(1), base.log_softmax(1), reduction="sum", log_target=True)


def log_p(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Compute the log probability of a token at each step."""
    return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def log_not(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Compute the log probability of all but a token at each step: log(1 - p), accurate where p is near 1, too."""
    return logits.scatter(1, tokens[:, None], -torch.inf).logsumexp(1) - logits.logsumexp(1)


def lead(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Compute how far a token leads over the likeliest other one at each step, in logits."""
    # Without the token itself, which may be the likeliest.
    others = logits.scatter(1, tokens[:, None], -torch.inf)
    return logits.gather(1, tokens[:, None])[:, 0] - others.max(1).values


def abstention(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n nouns"], payoff: float) -> Float[Tensor, ""]:
    """Compute -log(p(any noun that may be said) + p(the word that names nothing) / payoff).

    Args:
        logits: At steps where an object is named.
        tokens: First the word's, then the nouns'; filled up with -1.
        payoff: Above 1.

    Source: Liu et al., "Deep Gamblers: Learning to Abstain with Portfolio Theory" (NeurIPS 2019): who loses nothing by
    declining but the payoff declines where the best guess is right with less than 1 / payoff.
    """
    good = logits.log_softmax(1).gather(1, tokens.clamp_min(0)).masked_fill(tokens < 0, -torch.inf)
    # Only the first, the word that names nothing, is paid for; what fills up has no probability.
    price = torch.zeros(good.shape[1], device=good.device, dtype=good.dtype)
    price[0] = torch.tensor(payoff, dtype=torch.float32).log()
    return -(good - price).logsumexp(1).sum()
