"""What the language model reads: captions, half of them asked for by `PROMPT`, and conversations about a scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmneurons.pocket import scenes, world
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.prompts import WORDINGS


def caption(objects: Sequence[str], background: str) -> str:
    """The whole answer to `PROMPT`."""
    return f"{ANSWER_PREFIX} {scenes.say(objects, background)}"


def question(noun: str) -> str:
    """The question that POPE asks."""
    return f"Is there {scenes.with_article(noun)} in the image?"


def turns(random: np.random.Generator, objects: Sequence[str], background: str) -> list[tuple[str, str]]:
    """Prompts and answers about one scene: a caption, one question for yes and one for no, and what is on one side.

    The noun that is not there is drawn evenly, by frequency, or from those usually seen with an object of the scene, a
    third of the time each: POPE's three kinds of negatives.
    """
    asked = PROMPT if random.random() < 0.5 else str(random.choice(WORDINGS))
    here = str(random.choice(objects))
    made = [(asked, caption(objects, background)), (question(here), "yes")]
    made.append((question(absent(random, objects)), "no"))
    if len(objects) > 1:
        side, noun = ("left", objects[0]) if random.random() < 0.5 else ("right", objects[-1])
        made.append((f"What is on the {side}?", scenes.with_article(noun)))
    return made


def absent(random: np.random.Generator, objects: Sequence[str]) -> str:
    """A noun that is not among `objects`."""
    while True:
        how = random.integers(3)
        if how == 0:
            noun = str(random.choice(world.FREQUENCY))
        elif how == 1:
            (noun,), _ = world.compose(random, 1)
        else:
            noun = str(random.choice(world.companions(str(random.choice(objects)))[:10]))
        if noun not in objects:
            return noun
