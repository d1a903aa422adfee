"""The data shipped beside the code: the pocket model's folder, and samples, images with true captions and masks."""

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
    """One shipped image: a scene of drawings that the pocket model was never trained on."""

    name: str
    """The name of the sample, such as `mushroom-gorilla`."""
    path: Path
    """The file of the image."""
    caption: str
    """The true caption, not what a model says."""
    objects: tuple[str, ...]
    """The nouns shown, from left to right."""
    background: str
    """The background, as the caption says it."""
    masks_path: Path
    """The file of the masks: pixels of object i have the value i + 1."""

    def masks(self) -> Bool[np.ndarray, "objects height width"]:
        """Read the mask of each object, True where it is visible, in the order of `objects`."""
        indexed = np.asarray(Image.open(self.masks_path))  # one grey image for all objects of the scene
        return np.stack([indexed == i + 1 for i in range(len(self.objects))])


def folder() -> Path:
    """Return the folder of the pocket model, an ordinary Hugging Face folder."""
    return _data() / "model"


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Return the samples that come with the package."""
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
