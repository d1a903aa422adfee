"""When a caption names a noun: the word itself, in singular or plural, a synonym, or a wider word for it."""

from __future__ import annotations

import re

SAME = {
    "airplane": ("plane", "aircraft", "jet"),
    "aubergine": ("eggplant",),
    "ball": ("golf ball", "soccer ball", "football"),
    "beaver": ("rodent",),
    "bird": ("ibis", "heron"),
    "boat": ("sailboat", "ship"),
    "brown cap mushroom": ("mushroom",),
    "butterfly": ("moth",),
    "cannon": ("gun",),
    "car": ("automobile", "vehicle"),
    "carrots": ("carrot",),
    "cassette player": ("tape player", "stereo"),
    "chainsaw": ("chain saw", "saw"),
    "church": ("cathedral", "chapel"),
    "cougar": ("puma", "mountain lion"),
    "crayfish": ("crawfish", "lobster"),
    "crocodile": ("alligator",),
    "cup": ("mug",),
    "dollar bill": ("money", "bill", "banknote"),
    "gas pump": ("petrol pump",),
    "gramophone": ("record player", "phonograph"),
    "gun": ("revolver", "pistol"),
    "horn": ("trumpet", "french horn", "trombone", "brass instrument"),
    "jug": ("pitcher", "ewer"),
    "kiwi": ("kiwi fruit",),
    "lamp": ("light",),
    "laptop": ("computer",),
    "leopard": ("jaguar",),
    "motorbike": ("motorcycle", "moped"),
    "mushroom": ("brown cap mushroom",),
    "parachute": ("parachutist",),
    "phone": ("telephone", "cellphone"),
    "pigeon": ("dove", "bird"),
    "red beet": ("beet", "beetroot"),
    "red grapefruit": ("grapefruit",),
    "rhino": ("rhinoceros",),
    "rooster": ("chicken", "cock"),
    "satsumas": ("satsuma", "mandarin", "tangerine"),
    "shell": ("nautilus", "seashell"),
    "ship": ("boat",),
    "skate": ("roller skate",),
    "stop sign": ("sign",),
    "tree": ("bonsai",),
    "truck": ("garbage truck", "lorry"),
    "watch": ("wristwatch", "clock"),
    "wild cat": ("wildcat", "lynx", "cat"),
    "wrench": ("spanner",),
    "zucchini": ("courgette",),
}
"""Exact synonyms, and for a few nouns the next wider word or the kind that the pictures show."""


def names(caption: str, noun: str, *, strict: bool = False) -> bool:
    """Whether a caption names a noun.

    Args:
        caption: What a model says.
        noun: What is to be named.
        strict: By its own word alone, not by a synonym.
    """
    return any(_has(caption, word) for word in (noun, *(() if strict else SAME.get(noun, ()))))


def _has(caption: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)", caption, re.IGNORECASE) is not None
