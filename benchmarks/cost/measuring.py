"""What is measured of one case: `find` next to `generate`, what is asked for apart, rivals, growth with nouns."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from PIL import Image

import mmneurons as mmn
from mmneurons.editing.edit import edit
from mmneurons.files import CACHE
from mmneurons.finding import batch, finder
from mmneurons.finding.scoring import describe, score_targets
from mmneurons.settings import EditSettings, Method
from mmneurons.vlm import provenance
from mmneurons.vlm.anatomy.find import find_anatomy
from mmneurons.vlm.anatomy.probe import N_TOKENS

from .cases import NEW_TOKENS, Case, check_baseline, choices_of, look_at_baseline, target_at
from .gradients import STEPS, gradient_cached, gradient_whole, integrated_cached
from .rivals import project_all, released
from .tables import Tables
from .timing import Ratio, device_peak, rounds, seconds_of, stopwatch

NOUNS = (1, 3, 10, 30, 100)
PLACES = {
    "processor": (mmn.VLM, "encode"),
    "generation": (mmn.VLM, "generate"),
    "words": (batch, "find_nouns"),
    "scoring": (batch, "score_targets"),
    "describing": (finder, "describe"),
    "picture": (finder, "model_views"),
    "versions": (provenance, "versions"),
}
"""The parts of `find`, each a function it calls."""
CLOSED: tuple[Method, ...] = ("closed_form", "selective")
"""The ways to edit that need no gradients."""
GRADIENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gradient": ("gradient x activation, whole prefix", gradient_whole),
    "cached": ("gradient x activation, cached", gradient_cached),
    "integrated": (f"integrated gradients, cached, {STEPS} steps", integrated_cached),
}


def measure_pairs(case: Case, n: int, tables: Tables) -> None:
    """`find` next to `generate`, and where its extra time goes."""
    # Either runs both once; the first time, the tagger loads and the weights are hashed.
    if case.vlm.model.dtype == torch.float32:
        found = check_baseline(case)
    else:
        found, alike = look_at_baseline(case)
        tables.cost["captions as `model.generate` gives them: again / plain / `find`"][case.column] = alike
    plain_parts: list[dict[str, float]] = []
    find_parts: list[dict[str, float]] = []

    def watched(run: Callable[[], object], log: list[dict[str, float]]) -> None:
        with stopwatch(PLACES) as spent:
            run()
        log.append(spent)

    seconds = rounds(
        {"generate": partial(watched, case.generate, plain_parts), "find": partial(watched, case.find, find_parts)}, n
    )
    plain, whole = seconds["generate"], seconds["find"]
    parts = {name: [spent[name] for spent in find_parts] for name in PLACES}
    parts["rest"] = [total - sum(spent.values()) for total, spent in zip(whole, find_parts, strict=True)]
    for name in ("processor", "generation"):  # what `generate` alone needs for them is no extra
        parts[name] = [more - less[name] for more, less in zip(parts[name], plain_parts, strict=True)]
    parts["recording"] = parts.pop("generation")
    parts["rest"] = [a + b for a, b in zip(parts["rest"], parts.pop("processor"), strict=True)]

    column, table = case.column, tables.cost
    table["nouns scored"][column] = str(sum(len(finding.nouns) for finding in found))
    table["`generate`, seconds"][column] = f"{statistics.median(plain):.3f}"
    table["`find`, seconds"][column] = f"{statistics.median(whole):.3f}"
    table["**`find` / `generate`**"][column] = f"**{Ratio.of(whole, plain)}**"
    for name in ("recording", "words", "scoring", "describing", "picture", "versions", "rest"):
        share = 100 * statistics.median(part / total for part, total in zip(parts[name], plain, strict=True))
        table[f"- {name}, % of `generate`"][column] = f"{share:.1f}"


def measure_extras(case: Case, n: int, tables: Tables) -> None:
    """What is asked for apart, next to `find`; and what is done once per model."""
    vlm = case.vlm
    ids = vlm.encode(case.images[:1], "")["input_ids"][:, -1:].expand(1, N_TOKENS)  # plain words

    def read() -> None:
        with torch.inference_mode():
            vlm.model(input_ids=ids, use_cache=False)

    arms: dict[str, Callable[[], object]] = {
        "find": case.find,
        "maps": partial(case.find, maps=True),
        "blank": partial(case.find, blank=True),
        "hash": partial(provenance.weights_hash, vlm.model),
        "read": read,
        "analysis": partial(find_anatomy, vlm.model),
    }
    for run in arms.values():
        run()
    seconds = rounds(arms, n)
    column, table = case.column, tables.cost
    table["`find` with maps / without"][column] = str(Ratio.of(seconds["maps"], seconds["find"]))
    table["`find` with a blank image / without"][column] = str(Ratio.of(seconds["blank"], seconds["find"]))
    table["weights hash, once per model, seconds"][column] = f"{statistics.median(seconds['hash']):.3f}"
    table["analysis in `load`, seconds"][column] = f"{statistics.median(seconds['analysis']):.3f}"
    table["- one forward pass over as many tokens, seconds"][column] = f"{statistics.median(seconds['read']):.3f}"


def measure_rivals(case: Case, n: int, tables: Tables, projections: list[torch.Tensor], built: str) -> None:
    """The released algorithm and gradients, next to `find`, for the same nouns of one image.

    Args:
        case: One image.
        n: Rounds.
        tables: Where the numbers go.
        projections: What the released algorithm has built beforehand, one for each block.
        built: How many seconds that took, and what else is to be said of it.
    """
    image, vlm, said = case.images[0], case.vlm, case.said()
    arms: dict[str, Callable[[], object]] = {
        "generate": case.generate,
        "find": case.find,
        "released": partial(released, vlm, image, said, projections, NEW_TOKENS),
    }
    arms |= {name: partial(run, vlm, image, said, NEW_TOKENS) for name, (_, run) in GRADIENTS.items()}
    for run in arms.values():
        run()
    seconds = rounds(arms, n)
    column, weights_bytes = case.name, sum(part.nbytes for part in vlm.model.parameters())
    table, held = tables.rivals, sum(part.nbytes for part in projections)
    table["nouns of the image"][column] = str(len(said))
    table["released algorithm / `find`"][column] = str(Ratio.of(seconds["released"], seconds["find"]))
    table["- its projections, built once, seconds"][column] = built
    table["- their size, MiB (and over that of the weights)"][column] = (
        f"{held / 2**20:.0f} ({held / weights_bytes:.2f})"
    )
    for name, (row, _) in GRADIENTS.items():
        beyond = [(a - b) / len(said) for a, b in zip(seconds[name], seconds["generate"], strict=True)]
        table[f"{row} / `find`"][column] = str(Ratio.of(seconds[name], seconds["find"]))
        table[f"- {row}: ms for each noun"][column] = f"{1000 * statistics.median(beyond):.1f}"


def build_projections(case: Case, n_blocks: int | None = None) -> tuple[list[torch.Tensor], str]:
    """One projection for each block, and the seconds they took.

    With `n_blocks`, only so many are built; the other blocks borrow them, and the seconds are extrapolated.
    """
    total = len(case.vlm.anatomy.ffns)
    made: list[torch.Tensor] = []
    seconds = seconds_of(lambda: made.extend(project_all(case.vlm, n_blocks)))
    if len(made) == total:
        return made, f"{seconds:.2f}"
    return [made[i % len(made)] for i in range(total)], (
        f"{seconds * total / len(made):.2f} (from {len(made)} of {total} blocks; all do not fit)"
    )


def measure_growth(case: Case, n: int, tables: Tables) -> None:
    """Scoring and describing against the number of nouns, next to one read of every `w_out`."""
    vlm, (recording, answers) = case.vlm, case.recorded("logit")
    choices = choices_of("logit")
    torch.manual_seed(0)
    token_ids = torch.randperm(vlm.anatomy.vocab)[: max(NOUNS)].tolist()

    def score(n_nouns: int) -> None:
        score_targets(vlm, recording, answers, targets[:n_nouns], choices)

    def tell(n_nouns: int) -> None:
        describe(vlm, scored[n_nouns])

    def read() -> None:
        for ffn in vlm.anatomy.ffns:
            ffn.module.get_parameter("weight").sum()

    targets = [target_at(i % recording.n_passes, token_id) for i, token_id in enumerate(token_ids)]
    scored = {k: score_targets(vlm, recording, answers, targets[:k], choices) for k in NOUNS}
    arms: dict[str, Callable[[], object]] = {"read": read}
    arms |= {f"score {k}": partial(score, k) for k in NOUNS} | {f"tell {k}": partial(tell, k) for k in NOUNS}
    seconds = rounds(arms, n)
    column, table = case.name, tables.growth
    table["one read of every `w_out`, ms"][column] = f"{1000 * statistics.median(seconds['read']):.2f}"
    for k in NOUNS:
        table[f"{k} nouns: scoring, ms (over that read)"][column] = (
            f"{1000 * statistics.median(seconds[f'score {k}']):.2f} "
            f"({Ratio.of(seconds[f'score {k}'], seconds['read']).median:.3g})"
        )
        table[f"{k} nouns: describing, ms"][column] = f"{1000 * statistics.median(seconds[f'tell {k}']):.2f}"
    few, many = ([a + b for a, b in zip(seconds[f"score {k}"], seconds[f"tell {k}"], strict=True)] for k in (1, 10))
    further = statistics.median((b - a) / 9 for a, b in zip(few, many, strict=True))
    tables.rivals["- `find`: ms for each further noun"][column] = f"{1000 * further:.1f}"


def measure_edits(
    case: Case,
    others: list[Image.Image],
    n: int,
    tables: Tables,
    texts: Sequence[str] = (),
    pair: tuple[str, str] | None = None,
) -> None:
    """An edit over one batched `generate` of its images.

    Args:
        case: The images of the edit.
        others: Images that it is to leave as they are.
        n: Rounds.
        tables: Where the numbers go.
        texts: Texts that it is to leave as they are.
        pair: Source and target; None: the word that most images say, and one that none says.
    """
    vlm, column, table = case.vlm, case.column, tables.edits
    # The reference, worked out, and read from where the first one kept it.
    held: list[mmn.Reference] = []
    make = partial(mmn.make_reference, vlm, others, texts, max_new_tokens=NEW_TOKENS)
    with TemporaryDirectory() as cache, mock.patch.dict(os.environ, {CACHE: cache}):
        made, again = (seconds_of(lambda: held.append(make())) for _ in range(2))
    source, target = pair or _words(case)
    search: dict[str, dict[str, Any]] = {}

    def run(method: Method) -> None:
        settings = EditSettings(method=method, max_new_tokens=NEW_TOKENS, batch_size=len(case.images))
        kept = "own" if method == "closed_form" else held[0]
        patch = edit(vlm, [*case.images], source=source, target=target, reference=kept, settings=settings)
        search[method] = dict(patch.provenance["search"])

    arms: dict[str, Callable[[], object]] = {"generate": case.generate, "control": case.generate}
    arms |= {method: partial(run, method) for method in CLOSED}
    for arm in arms.values():
        arm()
    seconds = rounds(arms, n)
    seconds["optimised"] = [seconds_of(partial(run, "optimised"))] * n  # minutes: once
    kept = f"reference of {len(others)} images" + (f" and {len(texts)} texts" if texts else "")
    table[f"{kept}: worked out, seconds; read from disk by the next edit"][column] = f"{made:.2f}; {again:.2f}"
    table["`generate` over the edit images, seconds"][column] = f"{statistics.median(seconds['generate']):.3f}"
    table["- the same again / the same, which shows what disturbed the run"][column] = str(
        Ratio.of(seconds["control"], seconds["generate"])
    )
    plain = device_peak(case.generate) if vlm.device.type == "cuda" else None
    for method, found in search.items():
        table[f"`{method}` / `generate`"][column] = str(Ratio.of(seconds[method], seconds["generate"]))
        did = f"{found['turned']:.0%}, {found['generated']}"
        table[f"- {method}: answers turned, and generated to know it"][column] = did
        if plain is not None and method in CLOSED:
            peak = device_peak(partial(run, method))
            table[f"- {method}: peak device memory over that of `generate`"][column] = f"{peak / plain:.3f}"


def _words(case: Case) -> tuple[str, str]:
    """The word that most images say, and one that none says."""
    tokenizer = case.vlm.tokenizer
    told = Counter(word for text in case.generate().texts for word in set(text.split()))
    unsaid = (word for word in tokenizer.get_vocab() if word[0] == "Ġ" and len(word) > 3 and word[1:] not in told)
    return told.most_common(1)[0][0], next(w[1:] for w in unsaid if tokenizer.tokenize(f" {w[1:]}") == [w])
