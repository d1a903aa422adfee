"""Collect cut-out drawings, split seen from unseen, and pack what the package ships and what only training uses.

    python training/sprites.py --npm DIR     # DIR holds node_modules with the emoji sets, see training/README.md

`drawings.py` says where drawings come from. Drawings listed in `rejected.txt` (wrong or unreadable, found by looking at
the contact sheets) are left out. Drawings of a noun that look alike (by perceptual hash) or are versions of one design
stay on one side of the seen / unseen split, those that are not shipped included.

Writes `sprites.webp` (lossless) and `sprites.json` (noun, source, box, split) into the package, the drawings for
training only as `work/extra.npz`, and one contact sheet per 20 nouns into `--sheets`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from drawings import Drawing, all_drawings
from nouns import NOUNS
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "mmneurons" / "pocket" / "data"
SIDE = 64
"""Longer side of a stored drawing, in pixels."""


def cut_out(image: Image.Image) -> Image.Image | None:
    """The drawing without its empty margin, `SIDE` at most; None if it has no background to cut away or is a sliver."""
    image = image.convert("RGBA")
    alpha = np.asarray(image)[..., 3]
    rows, columns = np.where(alpha > 20)
    if len(rows) < 50:
        return None
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    image = image.crop(box)
    opaque = np.asarray(image)[..., 3].mean()
    if opaque > 250 or not 0.25 < image.width / image.height < 4:
        return None
    # Resize with premultiplied alpha, so that invisible pixels lend no colour to the edge.
    scale = SIDE / max(image.size)
    size = (max(4, round(image.width * scale)), max(4, round(image.height * scale)))
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def fingerprint(image: Image.Image) -> np.ndarray:
    """Perceptual hash: signs of neighbouring differences of a 9 x 9 thumbnail on grey, grey values, mirror-free."""
    canvas = Image.new("RGBA", (SIDE, SIDE), (128, 128, 128, 255))
    canvas.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    small = np.asarray(canvas.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    return np.concatenate([(np.diff(small, axis=axis) > 2).ravel() for axis in (0, 1)])


def clusters(drawings: list[Drawing], threshold: int = 22) -> list[list[int]]:
    """Groups of drawings of one design, or that look alike (`threshold` of 144 bits apart, mirrored or not)."""
    hashes = [(fingerprint(d.image), fingerprint(d.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) for d in drawings]
    groups: list[list[int]] = []
    for i, (mine, _) in enumerate(hashes):

        def alike(j: int, i: int = i, mine: np.ndarray = mine) -> bool:
            same_design = drawings[i].design == drawings[j].design
            return same_design or min((mine != h).sum() for h in hashes[j]) <= threshold

        near = [g for g in groups if any(alike(j) for j in g)]
        groups = [g for g in groups if g not in near] + [[i, *(j for g in near for j in g)]]
    return groups


def unseen(drawings: list[Drawing], share: float = 0.15) -> set[int]:
    """Which drawings of one noun are kept from training: whole clusters, chosen by a hash of their sources.

    Never more than a third of those shipped; none where fewer than six drawings or three clusters leave little to
    learn from.
    """
    shipped = {i for i, drawing in enumerate(drawings) if drawing.role == "world"}
    groups = [g for g in clusters(drawings) if shipped & set(g)]
    if len(shipped) < 6 or len(groups) < 3:
        return set()
    key = {id(g): min(hashlib.sha256(drawings[i].source.encode()).hexdigest() for i in g) for g in groups}
    chosen: set[int] = set()
    for group in sorted(groups, key=lambda g: key[id(g)]):
        if len(shipped & chosen) >= share * len(shipped):
            break
        if len(shipped & (chosen | set(group))) <= 0.34 * len(shipped):
            chosen.update(group)
    return chosen


def contact_sheet(by_noun: dict[str, list[Drawing]], held: dict[str, set[int]], path: Path) -> None:
    """A picture with one row per noun, unseen drawings on yellow, the style on blue, the number of each below it."""
    columns = max(len(d) for d in by_noun.values())
    sheet = Image.new("RGB", (90 + 50 * columns, 62 * len(by_noun)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (noun, drawings) in enumerate(by_noun.items()):
        draw.text((2, row * 62 + 20), noun, fill="black")
        for column, drawing in enumerate(drawings):
            x, y = 90 + column * 50, row * 62
            colour = "khaki" if column in held[noun] else {"style": "lightblue", "extra": "lightgrey"}.get(drawing.role)
            if colour:
                draw.rectangle((x, y, x + 49, y + 61), fill=colour)
            small = drawing.image.copy()
            small.thumbnail((48, 48))
            sheet.paste(small, (x, y), small)
            draw.text((x, y + 49), str(column), fill="black")
    sheet.save(path)


def pack(by_noun: dict[str, list[Drawing]], held: dict[str, set[int]]) -> None:
    """Write the sprite sheet and its index into the package."""
    flat = [(noun, i, d) for noun, drawings in by_noun.items() for i, d in enumerate(drawings) if d.role != "extra"]
    columns = 48
    sheet = Image.new("RGBA", (columns * SIDE, -(-len(flat) // columns) * SIDE))
    index = []
    for n, (noun, i, drawing) in enumerate(flat):
        left, top = n % columns * SIDE, n // columns * SIDE
        pixels = np.asarray(drawing.image).astype(np.uint16)
        # Five bits a colour and four of alpha halve the file and are not seen at this size.
        pixels[..., :3] = np.minimum(pixels[..., :3] + 4, 255) // 8 * 255 // 31
        pixels[..., 3] = (pixels[..., 3] + 8) // 17 * 17
        pixels[pixels[..., 3] == 0] = 0
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)), (left, top))
        box = [left, top, left + drawing.image.width, top + drawing.image.height]
        split = "style" if drawing.role == "style" else "unseen" if i in held[noun] else "seen"
        index.append({"noun": noun, "source": drawing.source, "box": box, "split": split})
    PACKAGE.mkdir(parents=True, exist_ok=True)
    sheet.save(PACKAGE / "sprites.webp", lossless=True, method=6, quality=100)
    (PACKAGE / "sprites.json").write_text(json.dumps({"sprites": index}, indent=None, separators=(",", ":")) + "\n")


def pack_extra(drawings: list[Drawing], path: Path) -> None:
    """Write the drawings for training only: pixels (drawings, SIDE, SIDE, 4), size, label, whether two-tone."""
    pixels = np.zeros((len(drawings), SIDE, SIDE, 4), dtype=np.uint8)
    for row, drawing in zip(pixels, drawings, strict=True):
        row[: drawing.image.height, : drawing.image.width] = np.asarray(drawing.image)
    sizes = np.array([d.image.size for d in drawings])
    labels, two_tone = np.array([d.label for d in drawings]), np.array([d.two_tone for d in drawings])
    sources = np.array([d.source for d in drawings])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, pixels=pixels, sizes=sizes, labels=labels, two_tone=two_tone, sources=sources)


def main() -> None:
    """Collect, reject, split, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, default=HERE / "work" / "sheets")
    arguments = parser.parse_args()
    rejected = {line.split("#")[0].strip() for line in (HERE / "rejected.txt").read_text().splitlines()}
    Image.MAX_IMAGE_PIXELS = None  # openclipart has a few very large files; these sources are trusted
    by_label: dict[str, list[Drawing]] = {noun: [] for noun in NOUNS}
    for drawing in all_drawings(arguments.npm):
        if f"{drawing.label} {drawing.source.removeprefix('openclipart/')}" in rejected:
            continue
        image = cut_out(drawing.image)
        if image is not None:
            by_label.setdefault(drawing.label, []).append(replace(drawing, image=image))
    by_noun = {noun: by_label[noun] for noun in NOUNS}
    held = {noun: unseen(drawings) for noun, drawings in by_noun.items()}
    pack(by_noun, held)
    extra = [
        drawing
        for label, drawings in by_label.items()
        for i, drawing in enumerate(drawings)
        if drawing.role == "extra" and i not in held.get(label, ())
    ]
    pack_extra(extra, HERE / "work" / "extra.npz")
    arguments.sheets.mkdir(parents=True, exist_ok=True)
    nouns = list(by_noun)
    for start in range(0, len(nouns), 14):
        part = {noun: by_noun[noun] for noun in nouns[start : start + 14]}
        contact_sheet(part, held, arguments.sheets / f"sheet{start // 14}.png")
        for noun, drawings in part.items():
            roles = Counter("unseen" if i in held[noun] else d.role for i, d in enumerate(drawings))
            print(f"{noun:14s} {dict(roles)}", end=" | ")
            print(" ".join(f"{i}:{d.source}" for i, d in enumerate(drawings) if "emoji" not in d.source))
    roles = Counter(d.role for drawings in by_noun.values() for d in drawings)
    print(dict(roles), sum(map(len, held.values())), "unseen;", len(by_label) - len(NOUNS), "other things")


if __name__ == "__main__":
    main()
