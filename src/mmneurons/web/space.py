"""The files of a Hugging Face Space that runs the app."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mmneurons.errors import SettingError
from mmneurons.files import check_folder, write_whole

GRADIO = "6.31.0"
"""The version of Gradio that the app is tested with."""

_APP = '''"""A Hugging Face Space: click a word of a caption, see the neurons that wrote it, edit, undo."""

import mmneurons as mmn

# A Space is public by its nature, and its own machine asks no name: it listens on all of its addresses.
mmn.app({models}, host="0.0.0.0", port=7860)
'''
_README = """---
title: Multi-modal neurons
sdk: gradio
sdk_version: {gradio}
app_file: app.py
python_version: "3.12"
pinned: false
license: apache-2.0
---

Click a word of a caption, see the neurons that wrote it, edit, undo. Written by `mmneurons app --export-space`.
"""


def write_space(folder: Path, models: Sequence[str] = ()) -> None:
    """Write `app.py`, `requirements.txt` and `README.md` of a Space into a folder.

    Args:
        folder: The folder; it is made where it is missing.
        models: Hub ids of the models; none: the pocket model.

    Raises:
        SettingError: a file of these names is there already, or the folder cannot be written.
    """
    check_folder(folder)
    loads = ", ".join(f"{name!r}: mmn.load({name!r})" for name in models)
    files = {
        "app.py": _APP.format(models="{" + loads + "}" if models else "mmn.load()"),
        "requirements.txt": f"mmneurons[app]=={metadata.version('mmneurons')}\n",
        "README.md": _README.format(gradio=GRADIO),
    }
    if there := [name for name in files if (folder / name).exists()]:
        raise SettingError(f"{folder} has {', '.join(there)} already.", fix="Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content.encode())
