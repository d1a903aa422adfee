"""The statistics of the pocket world: how often each noun is shown, where, and with what other nouns.

Scenes for training are drawn from these tables, so that they are like photographs of the real world: some things are
common, some rare, and some are often seen together. So a model has a prior to hallucinate from, and "popular" and
"adversarial" questions mean something. No torch, no pixels.
"""

from __future__ import annotations

import functools

import numpy as np

FREQUENCY: tuple[str, ...] = tuple(
    """
    dog car tree cat house bird flower boat horse train ball bus bicycle book cup shirt umbrella clock cake pizza truck
    hat airplane sun fish bottle motorcycle computer cow sheep apple telephone star moon shoe banana bear elephant knife
    television giraffe bread orange camera key guitar chicken duck carrot heart rose leaf spoon bell butterfly backpack
    ship candle church balloon rabbit pig mouse tomato lemon monkey cheese strawberry gift bee tiger lion castle snake
    hamburger frog envelope goat cherry tent potato helicopter mushroom corn drum turtle tulip eagle spider fox deer owl
    snowman wolf penguin crab pear pineapple watermelon sunflower tractor crown hammer whale shark ant snail panda robot
    violin dolphin rocket trumpet camel cactus kangaroo anchor ambulance crocodile octopus koala gorilla kiwi eggplant
    rhinoceros saxophone
    """.split()
)
"""All nouns, from the most to the least frequent."""

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(nouns.split())
    for kind, nouns in {
        "pet": "dog cat rabbit mouse",
        "farm animal": "cow horse sheep goat pig chicken duck",
        "wild animal": "bear elephant giraffe monkey tiger lion fox deer wolf panda camel kangaroo koala gorilla "
        "rhinoceros snake frog turtle crocodile snail spider",
        "sea animal": "fish whale shark dolphin crab octopus",
        "bird": "bird eagle owl penguin",
        "insect": "bee butterfly ant",
        "fruit": "apple banana orange lemon strawberry cherry pear pineapple watermelon kiwi",
        "vegetable": "carrot tomato potato corn mushroom eggplant",
        "food": "cake pizza bread cheese hamburger",
        "vehicle": "car train bus bicycle truck motorcycle boat ship airplane helicopter rocket tractor ambulance",
        "plant": "tree flower rose leaf tulip sunflower cactus",
        "building": "house church castle tent",
        "instrument": "guitar drum violin trumpet saxophone bell",
        "machine": "computer telephone television camera clock robot",
        "clothing": "shirt hat shoe crown",
        "light in the sky": "sun star moon",
        "toy": "ball balloon snowman",
        "tool": "cup bottle knife spoon key hammer umbrella backpack book candle envelope gift anchor heart",
    }.items()
}
"""The nouns of each kind of thing; every noun is of exactly one kind."""

PLACES: dict[str, tuple[str, ...]] = {
    place: tuple(nouns.split())
    for place, nouns in {
        "on the grass": "dog tree cat house flower horse ball bird cow sheep elephant giraffe duck rose leaf butterfly "
        "rabbit pig monkey bee tiger lion snake frog goat tent mushroom tulip spider fox deer wolf sunflower tractor "
        "ant snail panda kangaroo koala gorilla rhinoceros bear church castle chicken apple corn turtle",
        "on the road": "car bus bicycle truck motorcycle dog house ambulance tractor train church tree horse cat shoe",
        "in a room": "cat dog book shirt clock hat computer telephone television camera key guitar heart bell backpack "
        "candle gift drum violin trumpet saxophone envelope hammer robot crown shoe umbrella mouse balloon flower ball "
        "cup",
        "on a table": "cup cake pizza bottle apple banana knife bread orange spoon carrot tomato lemon cheese book "
        "strawberry hamburger cherry potato corn pear pineapple watermelon kiwi eggplant candle flower telephone key "
        "mushroom fish camera envelope chicken",
        "in the sea": "boat fish ship whale shark dolphin octopus turtle crab anchor crocodile duck",
        "on the beach": "umbrella ball boat crab turtle hat bird dog sun watermelon pineapple shoe bottle fish anchor",
        "in the sky": "bird airplane sun balloon helicopter eagle butterfly bee rocket star moon heart",
        "at night": "moon star owl cat candle rocket tent wolf house church castle clock mouse robot",
        "in the snow": "snowman penguin tree bear wolf hat gift house deer bird fox shoe bell",
        "in the desert": "camel cactus snake sun lion elephant giraffe kangaroo rhinoceros tent spider rocket",
    }.items()
}
"""The nouns that each background is usual for; nouns that share a background are often seen together."""

AT_HOME = 0.75
"""How often a scene's background is one of those usual for its first object."""
TOGETHER = 0.7
"""How often a further object is drawn from those usual for the background."""


@functools.cache
def frequency() -> dict[str, float]:
    """Compute how often each noun is drawn first: 1 / (rank + 6), Zipf's law with Mandelbrot's offset; sums to one."""
    weights = 1 / (np.arange(len(FREQUENCY)) + 7)  # arange counts from 0, ranks from 1
    return dict(zip(FREQUENCY, (weights / weights.sum()).tolist(), strict=True))


@functools.cache
def kind_of(noun: str) -> str:
    """Return the kind of thing that a noun is."""
    return next(kind for kind, nouns in KINDS.items() if noun in nouns)


@functools.cache
def places_of(noun: str) -> tuple[str, ...]:
    """List the backgrounds that are usual for a noun; there is at least one."""
    return tuple(place for place, nouns in PLACES.items() if noun in nouns)


def compose(random: np.random.Generator, n_objects: int) -> tuple[tuple[str, ...], str]:
    """Choose objects, from left to right, and a background, as often and as often together as is usual.

    Args:
        random: The source of all chance.
        n_objects: How many objects there are to be.
    """
    # The first object decides the background, and the background the other objects; then places are shuffled, so that
    # where an object stands says nothing about how it was chosen.
    first = _draw(random, FREQUENCY)
    at_home = random.random() < AT_HOME
    places = places_of(first) if at_home else tuple(PLACES)
    place = places[random.integers(len(places))]
    objects = [first]
    while len(objects) < n_objects:
        noun = _draw(random, PLACES[place] if random.random() < TOGETHER else FREQUENCY)
        if noun not in objects:
            objects.append(noun)
    return tuple(objects[i] for i in random.permutation(n_objects)), place


@functools.cache
def companions(noun: str) -> tuple[str, ...]:
    """List all other nouns, the one most often seen together with `noun` first, computed from the tables."""

    def together(other: str) -> float:
        # The chance that one is drawn first and the other next, either way round, summed over the backgrounds.
        return sum(
            frequency()[a] * _share_of_place(a, place) * _shares(place)[b]
            for a, b in ((noun, other), (other, noun))
            for place in PLACES
        )

    return tuple(sorted((n for n in FREQUENCY if n != noun), key=together, reverse=True))


def _share_of_place(first: str, place: str) -> float:
    """Compute how often a scene has this background, given its first object."""
    return AT_HOME * (place in places_of(first)) / len(places_of(first)) + (1 - AT_HOME) / len(PLACES)


@functools.cache
def _shares(place: str) -> dict[str, float]:
    """Compute how often each noun is drawn as a further object on a background."""
    usual = sum(frequency()[noun] for noun in PLACES[place])
    return {
        noun: TOGETHER * share / usual * (noun in PLACES[place]) + (1 - TOGETHER) * share
        for noun, share in frequency().items()
    }


@functools.cache
def _steps(nouns: tuple[str, ...]) -> np.ndarray:
    """Compute the cumulative frequencies of some nouns, which end at one."""
    weights = np.array([frequency()[noun] for noun in nouns])
    return np.cumsum(weights / weights.sum())


def _draw(random: np.random.Generator, nouns: tuple[str, ...]) -> str:
    """Draw one of `nouns` in proportion to its frequency."""
    # The cumulative frequencies can end a little below one by rounding: hence the bound.
    return nouns[min(int(np.searchsorted(_steps(nouns), random.random(), side="right")), len(nouns) - 1)]
