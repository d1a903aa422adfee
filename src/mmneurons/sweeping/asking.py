"""The model is asked about a portion of images, batch by batch; where memory is too small for one, by halves of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mmneurons.errors import MmneuronsError, ModelError
from mmneurons.finding.batch import ScoredBatch, score_batch
from mmneurons.finding.finder import captions_for
from mmneurons.settings import SweepSettings
from mmneurons.sweeping.reading import ReadImage
from mmneurons.vlm.age import unchanged
from mmneurons.vlm.failures import first_line, is_out_of_memory
from mmneurons.vlm.prompts import image_lengths
from mmneurons.vlm.vlm import VLM

ALL_FAIL = 8
"""After so many images in a row that the model refuses, and none before that it took, the fault is not theirs."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Images that the model was asked about together."""

    reads: list[ReadImage]
    batch: ScoredBatch
    seconds: float


@dataclass(eq=False)
class Asker:
    """Asks the model about portions of images, and remembers what could not be done."""

    vlm: VLM
    settings: SweepSettings
    batch_size: int
    smaller: list[str] = field(default_factory=list)
    """Batches that memory was too small for, since this was last emptied."""
    refused: dict[int, str] = field(default_factory=dict)
    """By position the images that the model or its processor refused, since this was last emptied."""
    _n_taken: int = 0
    _n_refused: int = 0

    def ask(self, reads: Sequence[ReadImage]) -> Iterator[Asked]:
        """Ask about images that could be read, in batches; those with a caption to read apart from those without.

        Batches are the same whenever the same images are given. They are not in the order of the images: those whose
        prompts are of like length share one, as all are padded to the longest.

        Raises:
            ModelError: memory is too small for one image, or the model refuses all of many images.
        """
        usable = [read for read in reads if read.opened is not None]
        with_caption = [read for read in usable if self.settings.given and read.item.caption]
        for group in (with_caption, [read for read in usable if read not in with_caption]):
            for batch in self._batches(group):
                yield from self._together(batch, given=group is with_caption)

    def _batches(self, reads: list[ReadImage]) -> Iterator[list[ReadImage]]:
        sizes = [read.opened.image.size for read in reads if read.opened is not None]
        length = dict(zip(reads, image_lengths(self.vlm.processor, sizes), strict=True))
        ordered, size = sorted(reads, key=length.__getitem__), self.batch_size  # stable
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def _together(self, reads: list[ReadImage], *, given: bool) -> Iterator[Asked]:
        if self.vlm.family.one_at_a_time and len(reads) > 1:
            for read in reads:
                yield from self._together([read], given=given)
            return
        try:
            asked = self._asked(reads, given=given)
        except (MmneuronsError, RuntimeError, MemoryError) as error:
            failed = error
        else:
            self._n_taken += len(reads)
            yield asked
            return
        # Outside the handler: the traceback would hold the tensors that memory was too small for.
        no_memory = is_out_of_memory(failed) or is_out_of_memory(failed.__cause__)
        why = first_line(failed)
        del failed
        if no_memory and len(reads) > 1:
            _free_memory()
            self.smaller.append(_spans([read.position for read in reads]))
            half = -(-len(reads) // 2)
            yield from self._together(reads[:half], given=given)
            yield from self._together(reads[half:], given=given)
        elif no_memory:
            raise ModelError(
                "There is not enough memory for a single image.",
                seen=why,
                fix='Load the model smaller: dtype="bfloat16"    CLI: --dtype bfloat16, --bits 4',
            )
        elif len(reads) > 1:  # one of them may be at fault
            for read in reads:
                yield from self._together([read], given=given)
        else:
            self._refuse(reads[0], why)

    def _asked(self, reads: list[ReadImage], *, given: bool) -> Asked:
        began = time.perf_counter()
        rows = [[read.opened] for read in reads if read.opened is not None]
        said = [read.item.caption or "" for read in reads]
        with self.vlm.alone(), unchanged(self.vlm.model):
            captions = captions_for(len(said), said, self.settings) if given else None
            inputs = self.vlm.encode([[row[0].image] for row in rows], self.settings.prompt, self.settings.prefix)
            batch = score_batch(self.vlm, inputs, rows, captions, self.settings)
        return Asked(reads, batch, time.perf_counter() - began)

    def _refuse(self, read: ReadImage, why: str) -> None:
        self.refused[read.position] = why
        self._n_refused += 1
        if not self._n_taken and self._n_refused >= ALL_FAIL:
            raise ModelError(f"The model refuses every image: the first {self._n_refused} of them.", seen=why)


def _spans(positions: list[int]) -> str:
    """Name positions by their spans: [7, 0, 1, 2] -> "0-2, 7"."""
    found: list[list[int]] = []
    for position in sorted(positions):
        if found and position == found[-1][-1] + 1:
            found[-1].append(position)
        else:
            found.append([position])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in found)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
