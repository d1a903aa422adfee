"""What one run of training is: the numbers that its commands give, kept beside the projector."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Plan:
    """One run."""

    layers: int = 2
    """Of the projector: 1 is linear, 2 has a GELU between, whose units are the nouns."""
    side: int = 5
    """Of the grid of image tokens: 3, 5 or 9."""
    window: int = 5
    """Over how many features, in both directions, each image token is averaged."""
    units: int = 800
    """Steps that teach the units to tell nouns apart, without the language model."""
    steps: int = 850
    """Steps through the language model."""
    full: int = 250
    """Of these, the last ones that read all image tokens and the whole question, of half as many pictures."""
    kept: int = 6
    """Image tokens that the others read, drawn anew for each picture."""
    batch: int = 16
    rate: float = 1e-4
    """Learning rate, of two layers that of the first."""
    last: float = 5e-4
    """Of two layers, the second's."""
    imagined: float = 0.25
    """Share of the pictures that are moved to a class of the tower's own classifier; 0 for pictures alone."""
    collages: float = 0.2
    joined: float = 0.3
    """Shares of collages and of grids that are cut and joined."""
    seed: int = 0
