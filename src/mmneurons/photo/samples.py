"""Photographs that may be used for anything, as scikit-image brings them: `photo:coffee` and the like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmneurons.errors import ImageError

PREFIX = "photo:"
"""How the name of a photograph begins, where an image is asked for."""
INSTALL = "pip install scikit-image"


@dataclass(frozen=True)
class Photograph:
    """One photograph."""

    name: str
    """What stands behind `photo:`."""
    file: str
    """In the folder `data` of scikit-image."""
    shows: str
    """What is to be seen, in plain words."""
    licence: str
    """As scikit-image states it where it documents the picture."""


PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", "a woman in a space suit", "public domain (NASA)"),
    Photograph("brick", "brick.png", "a wall of bricks", "CC0 (CC0Textures)"),
    Photograph("camera", "camera.png", "a man behind a camera on a tripod", "CC0 (Lav Varshney)"),
    Photograph("cat", "chelsea.png", "the face of a cat", "CC0 (Stefan van der Walt)"),
    Photograph("clock", "clock_motion.png", "a clock, blurred by motion", "public domain (Stefan van der Walt)"),
    Photograph("coffee", "coffee.png", "a cup of coffee with a spoon", "CC0 (Rachel Michetti)"),
    Photograph("grass", "grass.png", "grass from above", "CC0 (linolafett)"),
    Photograph("gravel", "gravel.png", "gravel from above", "CC0 (CC0Textures)"),
    Photograph("rocket", "rocket.jpg", "a rocket that starts", "public domain (SpaceX)"),
)


def located(name: str) -> Path:
    """The file that is meant by a path or, of `photo:NAME`, where scikit-image, which is not imported, keeps it.

    Args:
        name: As a user gives it.

    Raises:
        ImageError: there is no photograph of that name, or scikit-image is not installed.
    """
    if not name.startswith(PREFIX):
        return Path(os.path.expanduser(name))  # Path.expanduser raises on an unknown ~user
    found = {PREFIX + one.name: one for one in PHOTOGRAPHS}
    if name not in found:
        raise ImageError(f"There is no photograph {name}.", fix=f"One of {', '.join(found)}")
    spec = find_spec("skimage")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "data" / found[name].file).is_file():
            return path
    raise ImageError(f"{name} is a picture of scikit-image, which is not installed.", fix=INSTALL)
