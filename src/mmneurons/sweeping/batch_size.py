"""The batch size that gives the most images a second, found by trying sizes on the first images of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from mmneurons.data.dataset import Item
from mmneurons.settings import SweepSettings
from mmneurons.sweeping.asking import Asker
from mmneurons.sweeping.reading import ReadImage, read_image
from mmneurons.vlm.vlm import VLM

FIRST = 4
"""The size that is tried first; each after it is twice as large."""
GAIN = 1.1
"""A size is worth its memory where it gives so many times the images a second of the size before."""
SHARE = 8
"""One image of so many is asked about at most together, so that trying takes at most a quarter of a sweep's time."""


def tried_on(items: Sequence[Item], settings: SweepSettings) -> Sequence[Item]:
    """Return the first images, as many as the largest size that can be tried; a batch is never larger than a shard."""
    return items[: max(FIRST, min(settings.shard_size, len(items) // SHARE))]


def with_best_batch_size(vlm: VLM, items: Sequence[Item], settings: SweepSettings) -> tuple[SweepSettings, str]:
    """Find the batch size that gives the most images a second.

    Sizes are doubled for as long as memory is large enough and images a second rise.

    Args:
        vlm: The model.
        items: The images to try on, of `tried_on`; nothing that is found of them is kept.
        settings: What is asked and kept.

    Returns:
        The settings with that size, and what was seen.

    Raises:
        ModelError: as of a sweep: memory is too small for one image, or the model refuses all images.
    """
    if vlm.family.one_at_a_time:
        return replace(settings, batch_size=1), "a batch would change what this model answers"
    if len(items) <= FIRST:
        return replace(settings, batch_size=FIRST), "too few images to try others"
    processor = getattr(vlm.processor, "image_processor", None)
    read = (read_image(i, item, processor) for i, item in enumerate(items))
    best, rates = _tried(Asker(vlm, settings, len(items)), (one for one in read if one.opened is not None))
    seen = ", ".join(f"{rate:.3g} with {size}" for size, rate in rates.items())
    return replace(settings, batch_size=best), f"images a second on the first images: {seen or 'not known'}"


def _tried(asker: Asker, readable: Iterator[ReadImage]) -> tuple[int, dict[int, float]]:
    """Try sizes, each on the first so many images; return the best, and the images a second of all."""
    images = list(islice(readable, 1))
    _ask(asker, images)  # what is set up at first use counts for no size
    rates: dict[int, float] = {}
    size = best = FIRST
    while True:
        images += islice(readable, size - len(images))
        if len(images) < size:
            return best, rates
        together, seconds = _ask(asker, images)
        if asker.refused:  # then all were asked one by one, which tells nothing of the size
            images = [one for one in images if one.position not in asker.refused]
            asker.refused.clear()
            continue
        if asker.smaller:
            return best if rates else together, rates
        before, rates[size] = rates.get(best, 0.0), size / seconds
        if rates[size] < GAIN * before:
            return best, rates
        best, size = size, 2 * size


def _ask(asker: Asker, images: list[ReadImage]) -> tuple[int, float]:
    """Ask about images at once; return how many were asked together where memory was too small for all, and seconds."""
    together, seconds = [len(images)], 0.0
    for asked in asker.ask(images):
        together.append(len(asked.reads))
        seconds += asked.seconds
    return min(together), seconds
