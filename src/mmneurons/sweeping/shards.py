"""Shards are made here: images read ahead, the model asked batch by batch, and the shard written when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mmneurons.data.run import Failure, Run
from mmneurons.data.run_writer import ImageRow, NounColumns, image_table, neuron_table, write_shard
from mmneurons.finding.batch import baseline_name
from mmneurons.finding.numbers import top_numbers
from mmneurons.finding.reading import texts
from mmneurons.settings import SweepSettings
from mmneurons.sweeping.asking import Asked, Asker
from mmneurons.sweeping.reading import Items, ReadImage, portions, read_ahead
from mmneurons.vlm.vlm import VLM

Told = Callable[[int], None]
"""A callback, given how many more images are done."""
SORTED = 4
"""How many batches are read together, so that images of like length can share one."""


@dataclass(eq=False)
class _Shard:
    """What is known so far of the shard that is being made."""

    images: list[ImageRow] = field(default_factory=list)
    nouns: NounColumns = field(default_factory=NounColumns)
    failures: list[Failure] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    seconds: list[tuple[int, float]] = field(default_factory=list)
    """With the position of the image."""


def make_shards(
    vlm: VLM,
    run: Run,
    items: Items,
    shards: Iterable[int],
    settings: SweepSettings,
    *,
    workers: int,
    told: Told = lambda n_images: None,
) -> None:
    """Make shards of a run and write each when it is whole.

    Args:
        vlm: The model.
        run: The run; another process may make other shards of it.
        items: The whole data set, of which only the shards' own images are opened.
        shards: Which.
        settings: What is asked and kept.
        workers: How many threads read images.
        told: Called after each batch.
    """
    size = settings.batch_size
    assert isinstance(size, int)  # "auto" has been found to be a number
    asker, made = Asker(vlm, settings, size), _Shard()
    constants = {
        "score_name": settings.score,
        "against": settings.against,
        "says": settings.says,
        "baseline": baseline_name(settings.baseline),
    }
    plan = portions(((shard, run.slice_of(shard)) for shard in shards), SORTED * size)
    image_processor = getattr(vlm.processor, "image_processor", None)
    for portion, reads in read_ahead(items, plan, image_processor, workers):
        left = len(reads)
        for asked in asker.ask(reads):
            _add(made, vlm, asked)
            left -= len(asked.reads)
            told(len(asked.reads))
        for read in reads:
            made.stamps.append(read.stamp)
            if why := read.failure or asker.refused.get(read.position, ""):
                made.failures.append(Failure(read.position, _text(read.item.name), why))
        told(left)  # those that could not be used
        if portion.is_last:
            order = sorted(range(len(made.images)), key=lambda i: made.images[i].position)
            images, nouns = _in_order(made, order)
            write_shard(
                run,
                portion.shard,
                image_table(images),
                neuron_table(images, nouns, constants),
                failures=made.failures,
                smaller_batches=asker.smaller,
                stamps=made.stamps,
                seconds=[seconds for _, seconds in sorted(made.seconds)],
            )
            made = _Shard()
            asker.smaller.clear()
            asker.refused.clear()


def _add(made: _Shard, vlm: VLM, asked: Asked) -> None:
    """Keep what was found of one batch."""
    batch, shared = asked.batch, asked.batch.notes()
    first, choices = len(made.images), batch.choices
    for row, read in enumerate(asked.reads):
        n_nouns = sum(target.row == row for target in batch.targets)
        made.images.append(_image_row(read, batch.answers.texts[row], batch.answers.token_ids[row], n_nouns))
        image = made.images[-1]
        image.prompt, image.answer_prefix, image.given = choices.prompt, choices.prefix, batch.given
        image.notes = batch.notes_of(row, shared)
        made.seconds.append((read.position, asked.seconds / len(asked.reads)))
    if batch.scored is None:
        return
    numbers, nouns, place = top_numbers(batch.scored), made.nouns, {}
    for i, target in enumerate(batch.targets):
        place[target.row] = place.get(target.row, -1) + 1
        nouns.image.append(first + target.row)
        nouns.noun.append(place[target.row])
        nouns.word.append(target.word.text)
        nouns.lemma.append(target.word.lemma)
        nouns.start.append(target.word.start)
        nouns.token.append(texts(vlm, [target.token_id])[0])
        nouns.token_id.append(target.token_id)
        nouns.step.append(target.step)
        nouns.n_tokens.append(len(target.word.steps))
        nouns.probability.append(batch.scored.probabilities[i])
        nouns.logit.append(batch.scored.logits[i])
        nouns.layer.append(numbers.layer[i])
        nouns.expert.append(numbers.expert[i])
        nouns.index.append(numbers.index[i])
        nouns.score.append(numbers.score[i])
        nouns.activation.append(numbers.activation[i])
        if numbers.baseline is not None:
            nouns.baseline.append(numbers.baseline[i])


def _image_row(read: ReadImage, caption: str, token_ids: tuple[int, ...], n_nouns: int) -> ImageRow:
    assert read.opened is not None
    width, height = read.opened.image.size
    return ImageRow(
        position=read.position,
        name=_text(read.item.name),
        content=read.content,
        width=width,
        height=height,
        prompt="",
        answer_prefix="",
        caption=caption,
        given=False,
        token_ids=token_ids,
        n_nouns=n_nouns,
        notes=(),
        objects=read.item.objects,
        captions=read.item.captions,
    )


def _in_order(made: _Shard, order: list[int]) -> tuple[list[ImageRow], NounColumns]:
    """Put images, and the nouns with them, in the order of the data set: batches may have run in another."""
    place = {old: new for new, old in enumerate(order)}
    columns = vars(made.nouns)
    of_image = [place[image] for image in made.nouns.image]
    by_image = sorted(range(len(of_image)), key=of_image.__getitem__)  # stable: nouns of one image stay in order
    moved = {name: [values[i] for i in by_image] for name, values in columns.items() if values}
    if of_image:
        moved["image"] = [of_image[i] for i in by_image]
    return [made.images[i] for i in order], NounColumns(**moved)


def _text(name: str) -> str:
    """Return a name as text: a file name may hold bytes that Parquet and JSON cannot."""
    return name.encode("utf-8", "replace").decode()
