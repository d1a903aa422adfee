"""Whether a noun is grounded, as data: no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Grounded:
    """How much of a noun the model's own image tokens say, and what that means."""

    confidence: Share
    """Internal confidence: the largest probability that the unembedding, read at any patch behind any block, gives."""
    layer: Count
    """The block behind which it was read."""
    picture: Count
    """The picture in which it was read, counted from 0."""
    row: Count
    """The patch, from the top."""
    column: Count
    """The patch, from the left."""
    probability: Share | None = None
    """Calibrated: the probability that the object is in the picture. None: no calibration judges this noun."""
    seen: bool | None = None
    """Whether that reaches the calibration's threshold; False: not seen in the picture."""
