"""Where the photo model is kept: a folder in the cache, made once from the packages, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

from filelock import FileLock

from mmneurons.errors import ModelError
from mmneurons.files import CACHE, cache_folder
from mmneurons.photo.packages import INSTALL, PARTS, check_installed

LAYOUT = 1
"""Counted up when the same parts are put together in another way."""
SEAL = "files.json"
"""Sizes of the other files: written last."""
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
    place = cache_folder() / f"photo-{_version()}"
    try:
        if is_whole(place):
            return place
        check_installed()
        place.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second finds it made.
        with FileLock(place.with_suffix(".lock")):
            if not is_whole(place):
                _say(place)
                with tempfile.TemporaryDirectory(
                    dir=place.parent, prefix="photo-making-", ignore_cleanup_errors=True
                ) as made:
                    make(Path(made))
                    _seal(Path(made))
                    shutil.rmtree(place, ignore_errors=True)  # a part of it was deleted, or cut short
                    os.replace(made, place)
    except ImportError as error:
        raise ModelError("The photo model cannot be put together.", seen=str(error), fix=INSTALL) from error
    except OSError as error:
        if error.errno is None:  # transformers raises such ones of files that it cannot read
            raise ModelError("The photo model cannot be put together.", seen=str(error), fix=INSTALL) from error
        raise ModelError(
            "The photo model cannot be put into the cache.",
            seen=f"{place}: {error.strerror or error}; it takes {MEGABYTES} MB.",
            fix=f"Name another folder: {CACHE}=/a/folder",
        ) from error
    return place


def is_whole(place: Path) -> bool:
    """Whether every file of a folder that was made is there, as long as it was."""
    try:
        sizes = json.loads((place / SEAL).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False


def _seal(made: Path) -> None:
    """Note the size of every file, and let other users of the machine read them, as folders of a cache are."""
    sizes = {path.name: path.stat().st_size for path in made.iterdir()}
    (made / SEAL).write_text(json.dumps(sizes), encoding="utf-8")
    made.chmod(0o755)


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
    from mmneurons.photo.convert import write

    write(place)
