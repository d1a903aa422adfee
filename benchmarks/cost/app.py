"""What the web app costs: a click next to `find`, a move of the slider next to `caption`; memory over many requests.

    python -m benchmarks.cost.app                      about ten minutes on two cores, no download
    python -m benchmarks.cost.app --quick --out FILE   few rounds: shows that it runs, measures nothing

It needs Gradio: pip install "mmneurons[app]". Writes its table between the markers of docs/measurements/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx  # pyright: ignore[reportMissingImports] - comes with Gradio
from gradio_client import Client, handle_file  # pyright: ignore[reportMissingImports]

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.settings import PROMPT
from mmneurons.vlm.vlm import VLM
from mmneurons.web import views
from mmneurons.web.launch import app, serving
from mmneurons.web.limits import Limits
from mmneurons.web.session import Session
from mmneurons.web.visit import Asked

from .tables import PAGE, Table, Tables, report, write
from .timing import Ratio, rounds, say

COLUMN = "pocket float32"
GROWTH = 15
"""MiB that a server may grow by in 450 clicks: one that kept the picture of each would grow by more."""
SCALES = (0.0, 0.5, 1.5, 2.0, 3.0)


def found_by(client: Client, path: str) -> None:
    """Ask a server for the neurons of a picture, as its page does."""
    card, notice = client.predict("pocket", handle_file(path), PROMPT, "", "", "logit", api_name="/find")
    if notice or "<iframe" not in card:
        raise RuntimeError(notice or card)


def measure_find(vlm: VLM, n: int, table: Table) -> None:
    """A click next to `find` of the same picture: by the function of the app, and through HTTP."""
    path, session, server = str(pocket.samples()[0].path), Session(), serving(vlm, (), Limits())
    page = app(vlm, block=False, port=free_port())
    try:
        client = Client(page.local_url, verbose=False)
        arms: dict[str, Callable[[], object]] = {
            "find": lambda: mmn.find(vlm, path, maps=True),
            "again": lambda: mmn.find(vlm, path, maps=True),
            "plain": lambda: mmn.find(vlm, path),
            "neurons": lambda: server.find(session, None, Asked(path)),
            "card": lambda: views.card(server.find(session, None, Asked(path))),
            "http": lambda: found_by(client, path),
        }
        seconds = measured(arms, n)
    finally:
        page.close()
    below = seconds["find"]
    for name, row in {
        "again": "`find` with maps / the same, which shows what disturbed the run",
        "neurons": "**a click, until its neurons are found / `find` with maps**",
        "card": "- until the card is written / `find` with maps",
        "http": "- until the card is there, uploaded and fetched through HTTP / `find` with maps",
        "plain": "- `find` without maps / `find` with maps",
    }.items():
        table[row][COLUMN] = str(Ratio.of(seconds[name], below))


def measure_slider(vlm: VLM, n: int, table: Table) -> None:
    """A move of the slider next to `caption` of the same picture."""
    path, session, server = str(pocket.samples()[0].path), Session(), serving(vlm, (), Limits())
    neuron = str(server.find(session, None, Asked(path)).nouns[0].neurons[0].neuron)
    image, scales = session.shown[-1].image, itertools.cycle(SCALES)
    arms: dict[str, Callable[[], object]] = {
        "caption": lambda: vlm.caption(image),
        "again": lambda: vlm.caption(image),
        "own": lambda: next(server.scale(session, None, neuron, next(scales))),
        "both": lambda: list(server.scale(session, None, neuron, next(scales))),
    }
    seconds = measured(arms, n)
    for name, row in {
        "again": "`caption` / the same",
        "own": "**a move of the slider, until its neuron's caption is there / `caption`**",
        "both": "- until that of the random neuron is there too / `caption`",
    }.items():
        table[row][COLUMN] = str(Ratio.of(seconds[name], seconds["caption"]))


def measured(arms: dict[str, Callable[[], object]], n: int) -> dict[str, list[float]]:
    """Seconds of each arm by round; each has run once before, since what is first is slow."""
    for run in arms.values():
        run()
    return rounds(arms, n)


def measure_memory(stops: Sequence[int], table: Table) -> None:
    """Resident memory of a server, in a process of its own, after so many requests in a row of one visitor.

    Raises:
        RuntimeError: it grew by more than `GROWTH` from the first of these stops to the last.
    """
    seen: list[float] = []
    paths = [str(sample.path) for sample in pocket.samples()]
    with started() as (url, process):
        client = Client(url, verbose=False)
        for i in range(1, max(stops) + 1):
            found_by(client, paths[i % len(paths)])
            if i in stops:
                held = resident(process.pid)
                table[f"resident memory of the server after {i} clicks, MiB"][COLUMN] = f"{held:.0f}"
                seen.append(held)
                say(f"  {i} clicks: {held:.0f} MiB")
    if seen[-1] - seen[0] > GROWTH:
        raise RuntimeError(f"The server grew by {seen[-1] - seen[0]:.0f} MiB from {stops[0]} clicks to {stops[-1]}.")


@contextmanager
def started() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server as a user does, and stop it at the end."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "mmneurons", "app", "--device", "cpu", "--port", str(port)])
    url = f"http://127.0.0.1:{port}/"
    try:
        while process.poll() is None:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def resident(process_id: int) -> float:
    """MiB of a process that are in memory, as Linux counts them."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds and few requests")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    n, stops = (2, (2, 3, 4)) if asked.quick else (21, (50, 250, 500))
    tables = Tables()
    vlm = mmn.load(device="cpu")
    measure_find(vlm, n, tables.app)
    measure_slider(vlm, n, tables.app)
    measure_memory(stops, tables.app)
    measured_all = report("app", tables, [f"{n} rounds; median of the ratios, and their range."], toy=asked.quick)
    write(asked.out, "app", measured_all)
    print(measured_all)


if __name__ == "__main__":
    main()
