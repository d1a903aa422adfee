"""Evaluation sets: fixed scenes that figures are measured on, made from seeds and checked by hash.

    for scene in pocket.evaluation_set("find-500"): ...
    pocket.edit_set("dog").held_out
    pocket.pope("adversarial")

| set | what it holds |
| --- | --- |
| `find-500` | 500 scenes of drawings from training, one to three objects, every noun as often as the others |
| `locality-500` | 250 scenes as usual in the world, 250 with every noun as often as the others |
| `pope-500` | 500 scenes as usual in the world, for `pope` |
| `reference-400` | 200 and 200 like those of `locality-500`, for an edit to be made with |
| `hallucination-500` | 125 each: objects that hide each other, small ones, ones never seen together, another style |
| `hallucination-8000` | 2,000 each like those of `hallucination-500`, for a patch to be made with |

No set depends on what a model says. No torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

import numpy as np

from mmneurons.errors import MmneuronsError, SettingError
from mmneurons.pocket import world
from mmneurons.pocket.scenes import BACKGROUNDS, LENGTHS, Scene, Split, nouns, scene, with_article

FIRST_SEED = 700_000_000
"""The first seed of evaluation sets; training's begin at 1,000,000,000, so that no scene is in both."""
Negatives = Literal["random", "popular", "adversarial"]
"""How the nouns that are not there are chosen for POPE's questions."""
N_EDIT, N_HELD_OUT = 8, 40
"""How many scenes an `EditSet` has to edit on, and to judge the edit on."""


@dataclass(frozen=True)
class EvaluationSet(Sequence[Scene]):
    """A sequence of fixed scenes."""

    name: str
    """The name of the set, such as `find-500`."""
    scenes: tuple[Scene, ...]
    """The scenes, in order."""
    groups: tuple[str, ...]
    """For each scene what is special about it, or its number of objects where nothing is."""

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]  # slices are not needed
        return self.scenes[index]


@dataclass(frozen=True)
class EditSet:
    """Scenes that show one noun: some to edit on, others to judge the edit on."""

    source: str
    """The noun that all of them show."""
    edit: tuple[Scene, ...]
    """The 8 scenes to edit on."""
    held_out: tuple[Scene, ...]
    """The 40 scenes to judge on, the last 10 with drawings kept from training where there are any."""


@dataclass(frozen=True)
class EditPair:
    """One edit to try: the word that is to go, and the one that is to come."""

    source: str
    """The word that the model says now."""
    target: str
    """The word that it is to say instead."""
    near: bool
    """Whether both nouns are of one kind, such as two pets."""


@dataclass(frozen=True)
class Question:
    """A yes-or-no question about a scene: whether a noun is in it."""

    scene: Scene
    noun: str
    answer: bool
    """The true answer."""

    @property
    def text(self) -> str:
        """The prompt, as Li et al. (POPE, EMNLP 2023) word it."""
        return f"Is there {with_article(self.noun)} in the image?"


EDIT_PAIRS: tuple[EditPair, ...] = tuple(
    EditPair(*pair.split("-"), near=near)
    for near, pairs in (
        (True, "dog-cat car-bus guitar-violin apple-pear cow-sheep lion-tiger rose-sunflower train-truck cup-bottle "
         "lemon-orange duck-chicken bicycle-motorcycle hat-shoe sun-moon cake-pizza"),
        (False, "tree-clock house-fish bird-book horse-rocket ball-bear umbrella-elephant banana-boat computer-knife "
         "airplane-flower star-shirt butterfly-bread castle-cheese key-frog rabbit-camera bell-tomato"),
    )
    for pair in pairs.split()
)  # fmt: skip
"""The 30 edits to try, 15 within a kind and 15 across; no noun is the source of two, no target is a source."""


@functools.cache
def evaluation_set(name: str) -> EvaluationSet:
    """Make one of the fixed sets of scenes, and check that it is what it was.

    Args:
        name: A name of the table above.

    Raises:
        SettingError: there is no such set.
        MmneuronsError: this machine draws other pixels than those that the set is defined by.
    """
    if name not in MAKERS:
        raise SettingError(f"There is no evaluation set '{name}'.", fix=f"Choose one of: {', '.join(MAKERS)}.")
    groups, scenes = zip(*MAKERS[name](), strict=True)
    _check(name, scenes)
    return EvaluationSet(name, scenes, groups)


@functools.cache
def edit_set(source: str) -> EditSet:
    """Make the scenes that show `source`, any noun that has drawings, with none to two other objects in turn.

    The targets of `EDIT_PAIRS` for this source are in none of them.

    Raises:
        SettingError: there is no such noun.
        MmneuronsError: this machine draws other pixels than those that the set is defined by.
    """
    if source not in world.FREQUENCY:
        raise SettingError(f"There is no noun '{source}'.", fix="See mmneurons.pocket.nouns() for what there is.")
    made = make_edit_scenes(source)
    _check(f"edit/{source}", made)
    return EditSet(source, tuple(made[:N_EDIT]), tuple(made[N_EDIT:]))


@functools.cache
def pope(negatives: Negatives) -> tuple[Question, ...]:
    """Make questions about the scenes of `pope-500`: for each object one about it, and one about a noun not there.

    Args:
        negatives: How the latter are chosen (Li et al., EMNLP 2023): "random" any noun, "popular" one of the 20 most
            frequent, "adversarial" one of the 10 that the world shows most often with the object.

    Raises:
        SettingError: there are no such negatives.
    """
    if negatives not in get_args(Negatives):
        raise SettingError(f"There are no '{negatives}' negatives.", fix=f"Choose: {', '.join(get_args(Negatives))}.")
    random = np.random.default_rng(FIRST_SEED)
    questions = []
    for shown in evaluation_set("pope-500"):
        # Nouns asked about already are left out, so that no question about a scene comes twice.
        asked = set(shown.objects)
        for noun in shown.objects:
            pool = {
                "random": world.FREQUENCY,
                "popular": world.FREQUENCY[:20],
                "adversarial": [n for n in world.companions(noun) if n not in asked][:10],
            }[negatives]
            absent = random.choice([n for n in pool if n not in asked])
            asked.add(absent)
            questions += [Question(shown, noun, True), Question(shown, str(absent), False)]
    return tuple(questions)


def make_edit_scenes(source: str) -> list[Scene]:
    """Make the scenes of `edit_set`, unchecked."""
    # The targets of the source's edits never stand beside it: an answer that says them tells that the edit did it.
    targets = {pair.target for pair in EDIT_PAIRS if pair.source == source}
    others = [noun for noun in nouns() if noun != source and noun not in targets]
    first = FIRST_SEED + 10_000_000 + 1000 * world.FREQUENCY.index(source)
    made = []
    for i in range(N_EDIT + N_HELD_OUT):
        # Held-out scenes end with ten of unseen drawings: does the edit hold for the noun, or for the drawings?
        random = np.random.default_rng(first + i)
        split: Split = "unseen" if i >= N_EDIT + N_HELD_OUT - 10 and source in nouns("unseen") else "seen"
        shown = [noun for noun in others if noun in nouns(split)]
        beside = random.choice(shown, i % len(LENGTHS), replace=False).tolist()
        place = int(random.integers(len(beside) + 1))
        made.append(scene(first + i, [*beside[:place], source, *beside[place:]], split))
    return made


def digest(scenes: Sequence[Scene]) -> str:
    """Compute the SHA-256 of captions, pixels and masks."""
    content = hashlib.sha256()
    for made in scenes:
        content.update(made.caption.encode())
        content.update(made.image.tobytes())
        content.update(np.packbits(made.masks).tobytes())
    return content.hexdigest()


def hashes() -> dict[str, str]:
    """Return the digest that each set is defined by, by its name."""
    return json.loads(resources.files("mmneurons.pocket").joinpath("data/sets.json").read_text(encoding="utf-8"))


def _check(name: str, scenes: Sequence[Scene]) -> None:
    """Refuse scenes that are not the ones that the set is defined by: figures on them would not compare."""
    expected = hashes().get(name)
    if digest(scenes) != expected:
        raise MmneuronsError(
            f"The scenes of '{name}' come out otherwise on this machine than they are defined.",
            seen=f"digest {digest(scenes)}, not {expected}; NumPy {np.__version__}",
            fix="Report it, with the versions of NumPy and Pillow; figures measured on these scenes do not compare.",
        )


def _deck(random: np.random.Generator, known: Sequence[str]) -> Iterator[str]:
    """Yield nouns without end, each once before any comes again."""
    while True:
        yield from random.permutation(known).tolist()


def _balanced(first: int, n: int) -> Iterator[tuple[str, Scene]]:
    """Yield scenes of one, two and three objects in turn, every noun as often as the others."""
    random = np.random.default_rng(first)
    # A deck of cards instead of dice: dice would show some nouns far more often than others.
    deck, places = _deck(random, nouns()), _deck(random, tuple(BACKGROUNDS))
    for i in range(n):
        objects: list[str] = []
        while len(objects) < 1 + i % len(LENGTHS):
            noun = next(deck)
            if noun not in objects:  # at the seam of two shuffles the same noun can come twice
                objects.append(noun)
        yield _count(len(objects)), scene(first + i, objects, background=next(places))


def _natural(first: int, n: int) -> Iterator[tuple[str, Scene]]:
    """Yield scenes as usual in the world."""
    for i in range(n):
        made = scene(first + i, natural=True)
        yield _count(len(made.objects)), made


def _count(n: int) -> str:
    return "1 object" if n == 1 else f"{n} objects"


def _hard(first: int, n: int) -> Iterator[tuple[str, Scene]]:
    """Yield scenes that models tend to get wrong, a quarter of each sort, chosen by what is in them alone."""
    random = np.random.default_rng(first)
    for i in range(n // 4):
        yield "hidden", scene(first + i, _even(random, nouns(), 2), overlap=0.55)
        yield "small", scene(first + i, _even(random, nouns(), 1 + i % 3), scale=0.6)
        yield "rare together", scene(first + i, *_strangers(random))
        yield "other style", scene(first + i, _even(random, nouns("style"), 1 + i % 3), "style")


def _even(random: np.random.Generator, known: Sequence[str], n: int) -> list[str]:
    return random.choice(known, n, replace=False).tolist()


def _strangers(random: np.random.Generator) -> tuple[list[str], Split, str]:
    """Choose two nouns that share no usual background, and a background that is usual for neither."""
    while True:
        pair = _even(random, nouns(), 2)
        usual = [set(world.places_of(noun)) for noun in pair]
        unusual = sorted(set(BACKGROUNDS) - usual[0] - usual[1])
        if unusual and not usual[0] & usual[1]:
            return pair, "seen", unusual[random.integers(len(unusual))]


MAKERS: dict[str, Callable[[], Iterator[tuple[str, Scene]]]] = {
    "find-500": lambda: _balanced(FIRST_SEED, 500),
    "locality-500": lambda: iter([*_natural(FIRST_SEED + 1_000_000, 250), *_balanced(FIRST_SEED + 1_500_000, 250)]),
    "pope-500": lambda: _natural(FIRST_SEED + 2_000_000, 500),
    "reference-400": lambda: iter([*_natural(FIRST_SEED + 4_000_000, 200), *_balanced(FIRST_SEED + 4_500_000, 200)]),
    "hallucination-500": lambda: _hard(FIRST_SEED + 3_000_000, 500),
    "hallucination-8000": lambda: _hard(FIRST_SEED + 5_000_000, 8000),
}
"""For each set a function that yields its scenes with their groups, unchecked. Ranges of seeds do not overlap."""
