"""Where cut-out drawings come from: emoji sets and icons from npm, an emoji font and clip art from Debian.

Each drawing has a role. `world`: shipped, the drawings that scenes are made of. `style`: shipped, icons in a line style
of their own that are never trained on. `extra`: for training only: two more emoji sets, one-colour icons (recoloured
while training), and emoji of some 500 things that are not nouns of the world, from which the tower learns what
different drawings of one thing have in common.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import resvg_py
from nouns import NOUNS
from PIL import Image, ImageDraw, ImageFont

Role = Literal["world", "style", "extra"]
NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
OPENCLIPART = Path("/usr/share/openclipart/png")
WORLD_SETS = ("twemoji", "emojione", "fluent-emoji-flat", "fluent-emoji", "noto-v1", "fxemoji", "streamline-emojis")
EXTRA_SETS = ("openmoji", "emojione-v1")
STYLE_SETS = ("icon-park", "streamline-ultimate-color", "streamline-freehand-color")
LINE_SETS = ("game-icons", "mdi", "ph", "tabler", "fa7-solid", "mingcute", "material-symbols", "healthicons")
THINGS = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
"""The groups of emoji, as Twemoji's index names them, that show things and not faces, signs or flags."""
RENDERED = 160
"""Width and height at which vector drawings are rendered, in pixels."""
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
ICON_FORM = set("fill filled bold duotone face head side alt variant solid sharp rounded one two three 2 3".split())
"""Words in the name of an icon that say how it is drawn and not what it shows."""
ICON_SKIP = {"mouse", "kiwi", "apple"}
"""Names that icons give to other things: a computer mouse, a bird, a company."""


@dataclass
class Drawing:
    """One cut-out and where it came from."""

    label: str
    """A noun of the world or, for emoji of other things, the emoji."""
    source: str
    design: str
    """Drawings with the same design are versions of each other."""
    image: Image.Image
    role: Role
    two_tone: bool = False
    """Black lines on white, to be coloured at random."""


def all_drawings(npm: Path) -> Iterator[Drawing]:
    """Every drawing, as found; `npm` is the folder that holds `node_modules`."""
    for name in (*WORLD_SETS, *EXTRA_SETS):
        yield from _emoji_set(npm, name)
    yield from _fluent_3d(npm)
    yield from _noto_font()
    yield from _clip_art()
    for name in STYLE_SETS:
        yield from _named_icons(npm, name, "style")
    for name in LINE_SETS:
        yield from _named_icons(npm, name, "extra")
    yield from _other_things(npm)


@cache
def _icons(npm: Path, name: str) -> dict:
    return json.loads((npm / "node_modules/@iconify-json" / name / "icons.json").read_text())


@cache
def _table(npm: Path, name: str, file: str) -> dict:
    return json.loads((npm / "node_modules/@iconify-json" / name / file).read_text())


def _render(npm: Path, icon_set: str, name: str) -> Image.Image:
    icons = _icons(npm, icon_set)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _emoji_names(npm: Path, character: str) -> list[str]:
    """Names under which an icon set may have an emoji, from two sets' tables and from Unicode."""
    tables = [_table(npm, name, "chars.json") for name in ("twemoji", "fluent-emoji-flat")]
    code = f"{ord(character):x}"
    names = {table[key] for table in tables for key in (code, f"{code}-fe0f") if key in table}
    unicode_name = re.sub(r"[^a-z]+", "-", unicodedata.name(character, "").lower()).strip("-")
    return sorted((names | {unicode_name, unicode_name.replace("-", "")}) - {""})


def _emoji_name(npm: Path, icon_set: str, character: str) -> str | None:
    """The name that `icon_set` gives to an emoji, None if it does not have it."""
    names = _emoji_names(npm, character)
    if icon_set == "fxemoji":
        names = [FXEMOJI[character]] if character in FXEMOJI else [name.replace("-", "") for name in names]
    return next((name for name in names if name in _icons(npm, icon_set)["icons"]), None)


def _design(icon_set: str, character: str) -> str:
    """Fluent's flat, coloured and 3D emoji are one design, so are Emoji One's two versions."""
    return f"{icon_set.split('-')[0] if icon_set != 'noto-v1' else icon_set} {character}"


def _emoji_set(npm: Path, icon_set: str) -> Iterator[Drawing]:
    for noun, source in NOUNS.items():
        for character in source.emoji:
            name = _emoji_name(npm, icon_set, character)
            if name is not None:
                image = _render(npm, icon_set, name)
                role: Role = "extra" if icon_set in EXTRA_SETS else "world"
                yield Drawing(noun, f"{icon_set}/{name}", _design(icon_set, character), image, role)


def _fluent_3d(npm: Path) -> Iterator[Drawing]:
    for noun, source in NOUNS.items():
        for character in source.emoji:
            for suffix in ("", "-fe0f"):
                path = npm / f"node_modules/@lobehub/fluent-emoji-3d/assets/{ord(character):x}{suffix}.webp"
                if path.exists():
                    design = _design("fluent", character)
                    yield Drawing(noun, f"fluent-emoji-3d/{path.stem}", design, Image.open(path), "world")
                    break


def _noto_font() -> Iterator[Drawing]:
    font = ImageFont.truetype(NOTO_FONT, 109)  # the one size of its bitmaps
    for noun, source in NOUNS.items():
        for character in source.emoji:
            canvas = Image.new("RGBA", (136, 128))
            ImageDraw.Draw(canvas).text((0, 0), character + "\ufe0f", font=font, embedded_color=True)
            yield Drawing(noun, f"noto/{ord(character):x}", _design("noto", character), canvas, "world")


def _clip_art() -> Iterator[Drawing]:
    """Drawings of openclipart whose file name names exactly one noun."""
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
        yield Drawing(hits.pop(), f"openclipart/{path.stem}", f"openclipart {series}", Image.open(path), "world")


def _named_icons(npm: Path, icon_set: str, role: Role) -> Iterator[Drawing]:
    """Icons whose name, less the words that say how it is drawn, is a noun or another word for it."""
    named = {word: noun for noun, source in NOUNS.items() for word in (noun, *source.clipart) if word not in ICON_SKIP}
    for name in sorted(_icons(npm, icon_set)["icons"]):
        words = [word for word in name.split("-") if word not in ICON_FORM]
        if len(words) == 1 and words[0] in named and "outline" not in name:
            noun, image = named[words[0]], _render(npm, icon_set, name)
            if role == "extra":
                image = _two_tone(image)
            yield Drawing(noun, f"{icon_set}/{name}", f"{icon_set} {noun}", image, role, two_tone=role == "extra")


def _two_tone(image: Image.Image) -> Image.Image:
    """A one-colour icon as black on white: what its lines enclose becomes part of the cut-out."""
    lines = np.pad(np.asarray(image)[..., 3], 1)
    outside = (lines > 96).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 2)
    enclosed = (outside == 0)[1:-1, 1:-1]
    alpha = lines[1:-1, 1:-1]
    ink = np.where(enclosed, 255 - alpha, 0).astype(np.uint8)
    opaque = np.where(enclosed, 255, alpha)
    return Image.fromarray(np.dstack([ink, ink, ink, opaque]))


def _other_things(npm: Path) -> Iterator[Drawing]:
    """Emoji of things that are no noun of the world, in every emoji set."""
    mine = {character for source in NOUNS.values() for character in source.emoji}
    groups = _table(npm, "twemoji", "metadata.json")["categories"]
    things = {name for group in THINGS for name in groups[group]}
    for code, name in sorted(_table(npm, "twemoji", "chars.json").items()):
        character = chr(int(code.split("-")[0], 16))
        if name not in things or code.count("-") > code.count("fe0f") or character in mine:
            continue
        for icon_set in (*WORLD_SETS, *EXTRA_SETS, "noto"):
            found = _emoji_name(npm, icon_set, character)
            if found is not None:
                image = _render(npm, icon_set, found)
                yield Drawing(character, f"{icon_set}/{found}", _design(icon_set, character), image, "extra")
