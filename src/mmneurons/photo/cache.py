"""Where the photo model is kept: a folder in the cache, made once from the packages, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

from filelock import FileLock

from mmneurons.errors import ModelError
from mmneurons.photo.packages import PARTS, check_installed

CACHE = "MMNEURONS_CACHE"
"""The environment variable that names another place."""
LAYOUT = 1
"""Counted up when the same parts are put together in another way."""
MEGABYTES = 285
"""What the folder takes; half precision."""


def folder() -> Path:
    """The photo model as an ordinary Hugging Face folder, put together at the first call: half a minute, 1.6 GB.

    Raises:
        ModelError: packages are missing or hold other files, or the folder cannot be written.
    """
    importlib.import_module("mmneurons.photo.tower")  # tells transformers of the tower
    return kept(_make)


def kept(make: Callable[[Path], object]) -> Path:
    """The folder in the cache; where it is not there, `make` fills an empty one beside it, which is then renamed.

    Args:
        make: Fills the folder that it is given. If it raises or is stopped, nothing is left in the cache's place.

    Raises:
        ModelError: as `folder`.
    """
    place = cache() / f"photo-{_version()}"
    if (place / "config.json").is_file():
        return place
    check_installed()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second finds it made.
        with FileLock(place.with_suffix(".lock")):
            if not (place / "config.json").is_file():
                _say(place)
                with tempfile.TemporaryDirectory(
                    dir=place.parent, prefix="photo-making-", ignore_cleanup_errors=True
                ) as made:
                    make(Path(made))
                    shutil.rmtree(place, ignore_errors=True)  # one without config.json: a part of it was deleted
                    os.replace(made, place)
    except OSError as error:
        raise ModelError(
            "The photo model cannot be put into the cache.",
            seen=f"{place}: {error.strerror or error}; it takes {MEGABYTES} MB.",
            fix=f"Name another folder: {CACHE}=/a/folder",
        ) from error
    return place


def cache() -> Path:
    """The folder that holds what is made once: `MMNEURONS_CACHE`, or where the platform keeps such things."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mmneurons"


def projector() -> Path:
    """The projector that was trained for it, which the package ships."""
    path = resources.files("mmneurons.photo").joinpath("data/projector.safetensors")
    assert isinstance(path, Path)  # the package is installed as files, never imported from a zip
    return path


def _version() -> str:
    """Twelve digits that change with the parts, the projector, the layout, and how transformers names its classes."""
    digests, major = [part.sha256 for part in PARTS], metadata.version("transformers").partition(".")[0]
    return hashlib.sha256(f"{LAYOUT} {major} {digests}".encode() + projector().read_bytes()).hexdigest()[:12]


def _say(place: Path) -> None:
    logging.getLogger(__name__).warning(
        "Putting the photo model together, once: %d MB in %s (%s names another place).", MEGABYTES, place, CACHE
    )


def _make(place: Path) -> None:
    from mmneurons.photo.convert import write  # torch is slow to import, and not needed where the folder is there

    write(place)
