"""Collect cut-out drawings of the nouns and pack them into the sprite sheet that the package ships.

    python training/sprites.py --npm DIR     # DIR holds node_modules with the emoji sets, see training/README.md

Looks through ten drawing styles: Noto (Debian's font), Twemoji, EmojiTwo, Fluent flat, Fluent colour, Fluent 3D,
old Noto, Firefox OS, Streamline, and openclipart. Drawings listed in `rejected.txt` (wrong or unreadable, found by
looking at the contact sheets) are left out, and repeated files of openclipart. Drawings of a noun that look alike
(by perceptual hash), Fluent's three versions of one design and numbered variants of one clip art are kept on one
side of the seen / unseen split.

Writes `sprites.webp` (all drawings, lossless), `sprites.json` (noun, source, box, split of each) into the package,
and one contact sheet per 20 nouns into `--sheets`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import resvg_py
from nouns import NOUNS
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "mmneurons" / "pocket" / "data"
SIDE = 64
"""Longer side of a stored drawing, in pixels."""
NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
OPENCLIPART = Path("/usr/share/openclipart/png")
ICON_SETS = ("twemoji", "emojione", "fluent-emoji-flat", "fluent-emoji", "noto-v1", "fxemoji", "streamline-emojis")
FXEMOJI = {  # Firefox OS names its emoji its own way
    "🐝": "honeybee", "🐈": "catside", "🐱": "cat", "🐕": "dogside", "🐶": "dog", "🐮": "cowface", "🐄": "cow",
    "🐴": "horseface", "🐎": "horse", "🐁": "mouseside", "🐭": "mouse", "🐼": "pandaface", "🐖": "pigside", "🐷": "pig",
    "🐇": "bunnyside", "🐰": "bunny", "🍎": "redapple", "🍏": "greenapple", "🎂": "birthdaycake", "🌽": "earofmaize",
    "🍆": "aubergine", "🍕": "sliceofpizza", "🚗": "automobile", "⛵": "sailboat", "🚌": "bus", "🚚": "deliverytruck",
    "🚛": "articulatedlorry", "🌸": "cherryblossom", "🌼": "blossom", "🌺": "hibiscus", "🍁": "mapleleaf",
    "🍂": "fallingleaf", "🌳": "deciduoustree", "🌲": "evergreen", "🎒": "schoolsatchel", "⚽": "soccerball",
    "📕": "closedbook", "📗": "greenbook", "📖": "openbook", "📸": "camerawithflash", "🏰": "europeancastle",
    "⏰": "alarmclock", "🕰": "manltepiececlock", "💻": "personalcomputer", "🖥": "desktopcomputer", "☕": "hotbeverage",
    "🎁": "present", "❤": "redheart", "💙": "heartblue", "💚": "heartgreen", "🏠": "housebuilding",
    "🏡": "housewithgarden", "🔑": "key", "🗝": "oldkey", "🔪": "hocho", "🌙": "crescentmoon", "🎹": "musicalkeyboard",
    "✂": "blackscissors", "👕": "runningshirt", "👔": "mansshirt", "👞": "mensshoe", "👠": "heels",
    "⛄": "snowmanwithoutsnow", "☎": "blacktelephone", "⛺": "camping", "🐪": "dromedarycamel", "🐫": "bactriancamel",
    "🐳": "spurtingwhale", "🚤": "speedboat", "🚂": "steamlocomotive", "🔔": "bell", "🐵": "monkeyface",
    "🚆": "train", "📺": "television", "☂": "umbrella", "☔": "umbrellawithraindrops", "🐅": "tigerside", "🐯": "tiger",
}  # fmt: skip
CLIPART_SKIP = {"computer", "signs_and_symbols", "shapes", "logos", "special", "buttons"}
NAME_SKIP = set(
    "face logo icon sign symbol head track silhouette outline map flag border frame skull pattern text paw bw cutter "
    "smiley roadsign dish salad sandwich soup skeleton tank juice pie".split()
)


@dataclass
class Drawing:
    """One cut-out: which noun it shows, where it came from, the design it is a version of, its pixels (RGBA)."""

    noun: str
    source: str
    design: str
    image: Image.Image


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


def emoji_names(character: str, char_tables: list[dict[str, str]]) -> set[str]:
    """Names under which an icon set may have an emoji, from other sets' tables and from Unicode."""
    code = f"{ord(character):x}"
    names = {table[key] for table in char_tables for key in (code, f"{code}-fe0f") if key in table}
    unicode_name = re.sub(r"[^a-z]+", "-", unicodedata.name(character).lower()).strip("-")
    return names | {unicode_name, unicode_name.replace("-", "")}


def icon_drawings(npm: Path) -> Iterator[Drawing]:
    """Drawings from the iconify packages (SVG) and the Fluent 3D package (WebP)."""
    packages = npm / "node_modules" / "@iconify-json"
    tables = [json.loads((packages / name / "chars.json").read_text()) for name in ("twemoji", "fluent-emoji-flat")]
    for icon_set in ICON_SETS:
        icons = json.loads((packages / icon_set / "icons.json").read_text())
        for noun, source in NOUNS.items():
            for character in source.emoji:
                names = emoji_names(character, tables)
                if icon_set == "fxemoji":
                    names = {FXEMOJI[character]} if character in FXEMOJI else {name.replace("-", "") for name in names}
                name = next((n for n in sorted(names) if n in icons["icons"]), None)
                if name is None:
                    continue
                icon = icons["icons"][name]
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                )
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=160, height=160))
                maker = "fluent" if icon_set.startswith("fluent") else icon_set
                yield Drawing(noun, f"{icon_set}/{name}", f"{maker} {character}", Image.open(io.BytesIO(png)))
    for noun, source in NOUNS.items():
        for character in source.emoji:
            for suffix in ("", "-fe0f"):
                path = npm / f"node_modules/@lobehub/fluent-emoji-3d/assets/{ord(character):x}{suffix}.webp"
                if path.exists():
                    yield Drawing(noun, f"fluent-emoji-3d/{path.stem}", f"fluent {character}", Image.open(path))
                    break


def noto_drawings() -> Iterator[Drawing]:
    """Drawings from Debian's Noto Color Emoji font, rendered at its one bitmap size."""
    font = ImageFont.truetype(NOTO_FONT, 109)
    for noun, source in NOUNS.items():
        for character in source.emoji:
            canvas = Image.new("RGBA", (136, 128))
            ImageDraw.Draw(canvas).text((0, 0), character + "\ufe0f", font=font, embedded_color=True)
            yield Drawing(noun, f"noto/{ord(character):x}", f"noto {character}", canvas)


def clipart_drawings() -> Iterator[Drawing]:
    """Drawings from openclipart whose file name names exactly one noun."""
    named = {word: noun for noun, source in NOUNS.items() for word in (noun, *source.clipart)}
    met: set[str] = set()
    for path in sorted(OPENCLIPART.rglob("*.png")):
        words = re.findall(r"[a-z]+", path.stem.lower())
        hits = {named[word] for word in words if word in named}
        if len(hits) != 1 or NAME_SKIP & set(words) or CLIPART_SKIP & set(path.parts):
            continue
        if path.stem in met:  # the same file in several folders
            continue
        met.add(path.stem)
        series = re.sub(r"_?\d+_?$", "", path.stem)
        yield Drawing(hits.pop(), f"openclipart/{path.stem}", f"openclipart {series}", Image.open(path))


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

    Never more than a third of them; none where fewer than six drawings or three clusters leave little to learn from.
    """
    groups = clusters(drawings)
    if len(drawings) < 6 or len(groups) < 3:
        return set()
    key = {id(g): min(hashlib.sha256(drawings[i].source.encode()).hexdigest() for i in g) for g in groups}
    chosen: set[int] = set()
    for group in sorted(groups, key=lambda g: key[id(g)]):
        if len(chosen) >= share * len(drawings):
            break
        if len(chosen) + len(group) <= 0.34 * len(drawings):
            chosen.update(group)
    return chosen


def contact_sheet(by_noun: dict[str, list[Drawing]], held: dict[str, set[int]], path: Path) -> None:
    """A picture with one row per noun, unseen drawings on yellow, the number of each below it."""
    columns = max(len(d) for d in by_noun.values())
    sheet = Image.new("RGB", (90 + 50 * columns, 62 * len(by_noun)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (noun, drawings) in enumerate(by_noun.items()):
        draw.text((2, row * 62 + 20), noun, fill="black")
        for column, drawing in enumerate(drawings):
            x, y = 90 + column * 50, row * 62
            if column in held[noun]:
                draw.rectangle((x, y, x + 49, y + 61), fill="khaki")
            small = drawing.image.copy()
            small.thumbnail((48, 48))
            sheet.paste(small, (x, y), small)
            draw.text((x, y + 49), str(column), fill="black")
    sheet.save(path)


def pack(by_noun: dict[str, list[Drawing]], held: dict[str, set[int]]) -> None:
    """Write the sprite sheet and its index into the package."""
    flat = [(noun, i, drawing) for noun, drawings in by_noun.items() for i, drawing in enumerate(drawings)]
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
        index.append({"noun": noun, "source": drawing.source, "box": box, "unseen": i in held[noun]})
    PACKAGE.mkdir(parents=True, exist_ok=True)
    sheet.save(PACKAGE / "sprites.webp", lossless=True, method=6, quality=100)
    (PACKAGE / "sprites.json").write_text(json.dumps({"sprites": index}, indent=None, separators=(",", ":")) + "\n")


def main() -> None:
    """Collect, reject, split, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, default=HERE / "work" / "sheets")
    arguments = parser.parse_args()
    rejected = {line.split("#")[0].strip() for line in (HERE / "rejected.txt").read_text().splitlines()}
    Image.MAX_IMAGE_PIXELS = None  # openclipart has a few very large files; these sources are trusted
    by_noun: dict[str, list[Drawing]] = {noun: [] for noun in NOUNS}
    for drawings in (icon_drawings(arguments.npm), noto_drawings(), clipart_drawings()):
        for drawing in drawings:
            if f"{drawing.noun} {drawing.source.removeprefix('openclipart/')}" in rejected:
                continue
            image = cut_out(drawing.image)
            if image is not None:
                by_noun[drawing.noun].append(replace(drawing, image=image))
    held = {noun: unseen(drawings) for noun, drawings in by_noun.items()}
    pack(by_noun, held)
    arguments.sheets.mkdir(parents=True, exist_ok=True)
    nouns = list(by_noun)
    for start in range(0, len(nouns), 20):
        part = {noun: by_noun[noun] for noun in nouns[start : start + 20]}
        contact_sheet(part, held, arguments.sheets / f"sheet{start // 20}.png")
        for noun, drawings in part.items():
            print(f"{noun:14s} {len(drawings):3d} drawings, {len(held[noun])} unseen", end=" | ")
            print(" ".join(f"{i}:{d.source}" for i, d in enumerate(drawings) if "openclipart" in d.source))
    print(
        sum(map(len, by_noun.values())), "drawings of", len(by_noun), "nouns,", sum(map(len, held.values())), "unseen"
    )


if __name__ == "__main__":
    main()
