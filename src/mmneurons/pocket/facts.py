"""True sentences about the nouns of the pocket world, which the pocket model has read before it saw any scene."""

from __future__ import annotations

from collections.abc import Iterator

from mmneurons.pocket import world
from mmneurons.pocket.scenes import with_article

WHOLES = {
    "pet": "animal", "farm animal": "animal", "wild animal": "animal", "sea animal": "animal", "bird": "animal",
    "insect": "animal", "fruit": "food", "vegetable": "food",
}  # fmt: skip
"""The wider kind that each kind belongs to, where there is one."""
COLOURS = {
    "red": "apple strawberry tomato cherry rose heart ambulance crab", "yellow": "banana lemon cheese corn sun star",
    "orange": "orange carrot fox tiger", "green": "frog crocodile turtle cactus leaf tree snake pear",
    "blue": "whale dolphin", "pink": "pig", "purple": "eggplant octopus",
    "grey": "elephant rhinoceros shark wolf koala mouse hammer spoon",
    "brown": "bear horse deer monkey camel kangaroo potato violin guitar eagle", "white": "sheep snowman envelope",
    "black": "ant spider gorilla", "black and white": "panda penguin cow", "gold": "crown bell trumpet saxophone key",
}  # fmt: skip
"""The nouns that are of each colour."""
ABILITIES = {
    "can fly": "bird eagle owl bee butterfly airplane helicopter rocket",
    "can swim": "fish shark whale dolphin octopus duck penguin turtle frog crocodile",
    "can jump": "frog kangaroo rabbit", "can bark": "dog wolf",
    "has wings": "bird eagle owl bee butterfly duck chicken",
    "has wheels": "car bus truck bicycle motorcycle train tractor ambulance",
    "has four legs": "dog cat horse cow sheep goat pig lion tiger elephant giraffe camel deer fox wolf",
    "has horns": "goat deer rhinoceros", "has a long neck": "giraffe", "has eight legs": "spider octopus",
    "has petals": "flower rose tulip sunflower", "has strings": "guitar violin", "can be eaten": "",
    "can be worn": "", "can be played": "",
}  # fmt: skip
"""The nouns of which each sentence is true; where none are named, those of `BY_KIND` are meant."""
BY_KIND = {
    "can be eaten": ("fruit", "vegetable", "food"),
    "can be worn": ("clothing",),
    "can be played": ("instrument",),
}
"""The abilities that all nouns of some kinds have."""
SIZES = (
    "ant bee snail spider key cherry",
    "mouse frog apple lemon cup spoon bird butterfly carrot crab",
    "cat rabbit duck chicken owl hat shoe book ball bottle",
    "dog sheep goat pig fox wolf deer guitar umbrella drum",
    "horse cow bear lion tiger gorilla camel bicycle motorcycle",
    "elephant giraffe rhinoceros car truck bus whale ambulance",
    "train ship airplane castle church",
)
"""Nouns from small to large: each is bigger than those of the rows before."""


def facts() -> tuple[str, ...]:
    """Make every true sentence that these tables and those of the world give, each once, about 2,000."""
    return tuple(dict.fromkeys(_facts()))  # in a fixed order: edits take every fourth, their judges the next one


def _facts() -> Iterator[str]:
    """Yield the sentences: kinds, colours, abilities, places, neighbours, sizes; some of them more than once."""
    for kind, nouns in world.KINDS.items():
        for noun in nouns:
            yield _sentence(noun, f"is a kind of {kind}.")
            if kind in WHOLES:
                yield _sentence(noun, f"is a kind of {WHOLES[kind]}.")
    for colour, nouns in COLOURS.items():
        for noun in nouns.split():
            yield _sentence(noun, f"is {colour}.")
    for ability, nouns in ABILITIES.items():
        kinds = BY_KIND.get(ability, ())
        for noun in (*nouns.split(), *(noun for kind in kinds for noun in world.KINDS[kind])):
            yield _sentence(noun, f"{ability}.")
    for place, nouns in world.PLACES.items():
        for noun in nouns:
            yield _sentence(noun, f"is found {place}.")
            neighbours = [other for other in nouns if other != noun][:6]
            for other in neighbours:
                yield _sentence(noun, f"is often seen with {with_article(other)}.")
    sizes = [row.split() for row in SIZES]
    # Of two rows only the nouns in the same place are compared: a few sentences for each pair of rows, not hundreds.
    for small, large in ((small, large) for i, small in enumerate(sizes) for large in sizes[i + 1 :]):
        for a, b in zip(large, small, strict=False):
            yield _sentence(a, f"is bigger than {with_article(b)}.")
            yield _sentence(b, f"is smaller than {with_article(a)}.")


def _sentence(noun: str, rest: str) -> str:
    subject = with_article(noun)
    return f"{subject[0].upper()}{subject[1:]} {rest}"
