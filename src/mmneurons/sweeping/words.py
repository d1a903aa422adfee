"""What each neuron of a run says, read off the weights once for the whole run, when all of its neurons are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import torch

from mmneurons.data.run import Run
from mmneurons.data.run_writer import write_words
from mmneurons.finding.reading import columns_of, reader_for
from mmneurons.progress import Progress, untold
from mmneurons.settings import SweepSettings
from mmneurons.vlm.vlm import VLM

AT_ONCE = 256
"""How many neurons are read together; always the same ones, so that a run that was stopped gets the same words."""
BELOW = "activation - coalesce(baseline_activation, 0::FLOAT) < 0"
"""Whether a neuron fired below what it is compared with: it then says what its column pushes down."""


def make_words(vlm: VLM, run: Run, settings: SweepSettings, progress: Progress = untold) -> None:
    """Write what every neuron of a run's shards says, in each direction in which it fired."""
    files = [str(file) for file in run.files("neurons")]
    with duckdb.connect() as connection:
        found = connection.execute(
            f'SELECT DISTINCT layer, expert, "index", {BELOW} AS below FROM read_parquet(?) ORDER BY ALL', [files]
        ).fetchall()
    rows: list[dict[str, Any]] = []
    with vlm.alone(), torch.inference_mode():
        for said in _said(vlm, found, settings):
            rows += said
            progress("neurons read", len(rows), len(found))
    write_words(run, rows)


def _said(vlm: VLM, found: list[tuple[Any, ...]], settings: SweepSettings) -> Iterator[list[dict[str, Any]]]:
    """Read neurons some at a time."""
    ffns = vlm.anatomy.ffns
    of_layer = {(ffn.layer, ffn.n_experts is not None): i for i, ffn in enumerate(ffns)}
    reader = reader_for(vlm, settings.says, settings.score)
    for start in range(0, len(found), AT_ONCE):
        part = found[start : start + AT_ONCE]
        places = [
            (i := of_layer[layer, expert is not None], (expert or 0) * ffns[i].n_neurons + index)
            for layer, expert, index, _ in part
        ]
        columns = columns_of(vlm.anatomy, places, vlm.anatomy.norm.weight.device)
        signs = torch.tensor([-1.0 if below else 1.0 for *_, below in part])
        promoted, suppressed = reader.tokens(reader.read(columns, places, signs))
        yield [
            {"layer": layer, "expert": expert, "index": index, "below": below, "tokens": up, "suppressed": down}
            for (layer, expert, index, below), up, down in zip(part, promoted, suppressed, strict=True)
        ]
