"""How learning rates rise and fall."""

from __future__ import annotations

import math


def share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over 20 steps, constant, then half a cosine over the last third."""
    left = (steps - step) / (steps / 3)
    return min(1.0, (step + 1) / 20) * (1.0 if left >= 1 else 0.5 - 0.5 * math.cos(math.pi * left))
