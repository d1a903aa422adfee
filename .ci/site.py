"""Hooks of mkdocs: pages that lie outside docs/ (README, changelog, notice, how models are trained) join the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "NOTICE": "NOTICE.md",
    "training/README.md": "training/README.md",
    "training/photo/README.md": "training/photo/README.md",
}
"""File of the repository -> page of the site."""
AS_IT_IS = ("LICENSE", "training/rejected.txt", "training/log.jsonl", "training/evaluation.json")
"""Files that pages link to, served as they are."""
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=f"# Notice\n\n{text}" if source == "NOTICE" else text))
    for source in AS_IT_IS:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Turn each link between files of the repository into one between pages of the site."""
    here = page.file.src_uri
    source = next((path for path, made in PAGES.items() if made == here), f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        link = match[0]
        if "://" in link or link.startswith("mailto:"):
            return link
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        goal = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(goal, posixpath.dirname(here) or ".")

    return LINK.sub(turned, markdown)
