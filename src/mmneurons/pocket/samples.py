"""What is shipped beside the code: the pocket model's folder and sample images with their truth."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One shipped image: a scene of drawings that the model was never trained on."""

    name: str
    path: Path
    caption: str
    """The truth, not what a model says."""
    objects: tuple[str, ...]
    """From left to right."""
    background: str
    masks_path: Path

    def masks(self) -> Bool[np.ndarray, "objects height width"]:
        """Where each object is visible, in the order of `objects`."""
        indexed = np.asarray(Image.open(self.masks_path))
        return np.stack([indexed == i + 1 for i in range(len(self.objects))])


def folder() -> Path:
    """The pocket model as an ordinary Hugging Face folder."""
    return _data() / "model"


@functools.cache
def samples() -> tuple[Sample, ...]:
    """The sample images."""
    base = _data() / "samples"
    return tuple(
        Sample(
            name=entry["name"],
            path=base / f"{entry['name']}.png",
            caption=entry["caption"],
            objects=tuple(entry["objects"]),
            background=entry["background"],
            masks_path=base / f"{entry['name']}.mask.png",
        )
        for entry in json.loads((base / "samples.json").read_text(encoding="utf-8"))
    )


def _data() -> Path:
    data = resources.files("mmneurons.pocket").joinpath("data")
    assert isinstance(data, Path)  # the package is installed as files, never imported from a zip
    return data
