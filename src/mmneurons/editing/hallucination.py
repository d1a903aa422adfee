"""Say a word for "I do not know" where the model would name what is not there.

    patch = dehallucinate(vlm, images, objects)     # objects: what each image truly shows

The columns that tell absent objects from present ones are moved so that `say`, a word that names nothing, leads where
what would be said is absent, and nowhere else: the model declines to answer. No gradients: a regression.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmneurons.editing.columns import Columns, Move, features, patch_of
from mmneurons.editing.goals import Goal
from mmneurons.editing.patch import Patch
from mmneurons.editing.reference import Reference
from mmneurons.editing.steps import Said, Steps, answer_steps, join
from mmneurons.errors import SettingError, WordError
from mmneurons.inspection.hallucination import Chair, Vocabulary, chair, chair_of
from mmneurons.maths.ranking import top_k
from mmneurons.vlm import provenance
from mmneurons.vlm.anatomy.ways import Directions, frozen_rows
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT, tokens_of
from mmneurons.vlm.vlm import VLM, Picture
from mmneurons.words import find_words

LEAD = 10.0
"""Logits by which the word is to lead where an absent object is named, and to trail where a present one is."""
ABSENT, OTHER = 3.0, 0.3
"""Weights of steps that name an absent object, and of steps that name none, beside 1 for a present one."""
FOLDS = 5
"""How strong it may be is tried on images that it was not worked out from."""
ROUNDS = 5
"""Of the regression, at most, until the same steps pull."""
STRENGTHS = tuple(0.05 * i for i in range(1, 41))
SPARE = 0.01
"""Ridge of the direction, of the mean second moment of what the tokens' rows read."""


@dataclass(frozen=True)
class DehallucinateSettings:
    """How the edit is made."""

    say: str = "thing"
    """The word that comes in the place of an absent object."""
    keep: float = 0.98
    """Share of the present objects named that are to stay."""
    top: int = 1000
    """Columns that move: those that tell absent objects from present ones best."""
    blocks: int | None = 1
    """Of so many of the last blocks; None: of all."""
    ridge: float = 0.03
    """Of the regression, in the mean second moment of the columns."""
    prompt: str = PROMPT
    answer_prefix: str = ANSWER_PREFIX
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class Named:
    """The first step of every object that the answers name."""

    steps: Int[Tensor, "nouns"]
    """Rows of `Said.steps`."""
    absent: Bool[Tensor, "nouns"]
    found: tuple[tuple[int, int], ...]
    """Which answer, and which step of it."""


def dehallucinate(
    vlm: VLM,
    images: Sequence[Picture],
    objects: Sequence[Collection[str]],
    *,
    vocabulary: Vocabulary | None = None,
    reference: Reference | None = None,
    settings: DehallucinateSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Patch:
    """Make the model say `settings.say` where it would name what is not there.

    Args:
        vlm: The model, from `load`.
        images: Of which the model names some that are there and some that are not.
        objects: What is there, image by image.
        vocabulary: The nouns that count; None: those of any of these lists.
        reference: Answers and texts that are to stay as they are, from `make_reference`.
        settings: How.
        progress: Told what is being done.

    Returns:
        The patch; `provenance["search"]` says what it did to these images.

    Raises:
        SettingError: settings out of range, lists that do not fit the images, or no noun that is absent or present.
        WordError: the word has more than one token, or none of its own to begin with.
    """
    settings, tell = settings or DehallucinateSettings(), progress or (lambda what: None)
    if len(images) != len(objects):
        raise SettingError("Each image needs its list of objects.", seen=f"{len(images)} images, {len(objects)} lists.")
    if not 0 < settings.keep <= 1 or settings.top < 1 or settings.ridge <= 0:
        raise SettingError("keep lies in (0, 1], top is 1 or more, ridge above 0.", seen=str(settings))
    vocabulary = vocabulary or Vocabulary(objects)
    tokens = tokens_of(vlm.tokenizer, settings.say)
    if len(tokens) > 1:
        raise WordError(
            f"'{settings.say}' has {len(tokens)} tokens, and one must do.",
            seen=f"The tokenizer writes it as {vlm.tokenizer.convert_ids_to_tokens(tokens)}.",
            fix="Choose another word that names nothing: thing, object, something.",
        )
    tell("answering about the images")
    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    said = answer_steps(vlm, images, settings.prompt, settings.answer_prefix, **limits)
    named = named_steps(vlm, said, objects, vocabulary)
    if not bool(named.absent.any()) or bool(named.absent.all()):
        which = "absent" if bool(named.absent.all()) or not len(named.absent) else "present"
        raise SettingError(
            f"All objects that the model names are {which}, or none is named.",
            seen=f"{len(named.absent)} nouns named, {int(named.absent.sum())} of them absent.",
            fix="Give more images, with what is truly in them.",
        )
    tell("choosing columns")
    goal = Goal(
        int(said.steps.token_ids[named.steps[named.absent][0]]), tokens[0], said.steps.at(named.steps[named.absent])
    )
    study = Study.of(vlm, said, named, goal, reference, vocabulary, settings)
    strength = study.strength(settings.keep)
    if strength is None:
        raise SettingError(
            "No strength takes an absent object without more present ones than allowed.",
            seen=f"keep={settings.keep}, {int(named.absent.sum())} absent nouns of {len(named.absent)}.",
            fix="Give more images, or allow more to be lost: keep=0.95",
        )
    move = Move(goal, study.row, study.columns, study.along, strength * study.solve(study.every))
    patch = patch_of(vlm, study.columns, [move])
    tell("looking at what is said")
    before = chair(said.texts, objects, vocabulary)
    with patch.applied(vlm):
        after = chair(vlm.caption([*images], settings.prompt, settings.answer_prefix, **limits), objects, vocabulary)
    return replace(
        patch,
        provenance={
            "source": None,
            "target": settings.say,
            "settings": asdict(settings),
            "search": {"strength": strength, "before": _facts(before), "after": _facts(after)},
            "images": len(images),
            "named": len(named.absent),
            "absent": int(named.absent.sum()),
            "reference": None if reference is None else reference.facts,
            "model": dict(vlm.facts),
            "packages": provenance.versions(),
        },
    )


def named_steps(vlm: VLM, said: Said, objects: Sequence[Collection[str]], vocabulary: Vocabulary) -> Named:
    """Where the answers name objects, the first time each."""

    def decode(ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(ids, skip_special_tokens=True)

    found, absent = [], []
    for answer, (text, ids, there) in enumerate(zip(said.texts, said.token_ids, objects, strict=True)):
        true = Vocabulary([there]).nouns
        for noun in vocabulary.named(text):
            found.append((answer, find_words(noun, text, ids, decode)[0].steps[0]))
            absent.append(noun not in true)
    rows = [said.row(answer, step) for answer, step in found]
    return Named(torch.tensor(rows, dtype=torch.long), torch.tensor(absent, dtype=torch.bool), tuple(found))


def lacking(vlm: VLM, steps: Steps, goal: Goal) -> Float[Tensor, "steps"]:
    """Logits that the word lacks of what is said."""
    logits = vlm.anatomy.logits(steps.residual)[:, : vlm.n_tokens].float().cpu()
    return logits.max(1).values - logits[:, goal.wanted]


def without(said: Said, named: Named) -> Bool[Tensor, "steps"]:
    """The steps at which no object begins."""
    rest = torch.ones(len(said.steps), dtype=torch.bool)
    rest[named.steps] = False
    return rest


@dataclass(frozen=True, eq=False)
class Study:
    """The regression: what the columns shall add to the logit of the word at each step."""

    row: Float[Tensor, "hidden"]
    """What the logit of the word, less the mean of those of the nouns named, reads."""
    columns: Columns
    along: dict[int, Float[Tensor, "hidden"]]
    inputs: Float[Tensor, "steps columns"]
    """What one unit of each column adds there."""
    gap: Float[Tensor, "steps"]
    """Logits that the word lacks there of what is said."""
    absent: Bool[Tensor, "steps"]
    """An absent object is named there."""
    weights: Float[Tensor, "steps"]
    folds: Int[Tensor, "steps"]
    """By answer; -1: in every fold."""
    n_named: int
    """Of the steps the first so many, at which these images' nouns are named."""
    ridge: float

    @staticmethod
    def of(
        vlm: VLM,
        said: Said,
        named: Named,
        goal: Goal,
        reference: Reference | None,
        vocabulary: Vocabulary,
        settings: DehallucinateSettings,
    ) -> Study:
        """Of all steps of the answers and of the reference; what the latter names is taken to be there."""
        anatomy = vlm.anatomy
        nouns, absent, others = said.steps.at(named.steps), named.absent, [said.steps.at(without(said, named))]
        rows = anatomy.unembed[nouns.token_ids.to(anatomy.unembed.device)].float().cpu()
        row = anatomy.unembed[goal.wanted].float().cpu() - rows.mean(0)
        columns = telling(nouns, absent, settings.top, settings.blocks)
        along = sparing(vlm, nouns.at(absent), row, columns)
        folds = nouns.answers % FOLDS
        outside = []
        if reference is not None and reference.said is not None:
            shown = [vocabulary.nouns] * len(reference.said.texts)
            kept = named_steps(vlm, reference.said, shown, vocabulary)
            nouns = join([nouns, reference.said.steps.at(kept.steps)])
            absent = torch.cat([absent, kept.absent])
            folds = torch.cat([folds, torch.full((len(kept.steps),), -1)])
            outside.append(reference.said.steps.at(without(reference.said, kept)))
        if reference is not None and reference.text_steps is not None:
            outside.append(reference.text_steps)
        every = [nouns, *others, *outside]
        n_rest = sum(map(len, every[1:]))
        gap = torch.cat([lacking(vlm, steps, goal) for steps in every])
        return Study(
            row,
            columns,
            along,
            torch.cat([features(steps, row, columns, along) for steps in every]),
            gap,
            torch.cat([absent, torch.zeros(n_rest, dtype=torch.bool)]),
            torch.cat([torch.where(absent, ABSENT, 1.0), torch.full((n_rest,), OTHER)]),
            torch.cat([folds, others[0].answers % FOLDS, torch.full((n_rest - len(others[0]),), -1)]),
            len(named.absent),
            settings.ridge,
        )

    @property
    def every(self) -> Bool[Tensor, "steps"]:
        """All steps."""
        return torch.ones(len(self.gap), dtype=torch.bool)

    def solve(self, rows: Bool[Tensor, "steps"]) -> Float[Tensor, "columns"]:
        """Ridge regression on some of the steps; those that are on their side by `LEAD` do not pull (squared hinge)."""
        x, w = self.inputs[rows].double(), self.weights[rows].double()
        side = torch.where(self.absent[rows], 1.0, -1.0)
        wanted = (self.gap[rows] + side * LEAD).double()
        r = self.ridge * float((x.pow(2) * w[:, None]).sum(0).mean())
        pulling, found = torch.ones(len(x), dtype=torch.bool), torch.zeros(x.shape[1], dtype=x.dtype)
        for _ in range(ROUNDS):
            moment = (x[pulling] * w[pulling, None]).T @ x[pulling] + r * torch.eye(x.shape[1], dtype=x.dtype)
            found = torch.linalg.solve(moment, (x[pulling] * w[pulling, None]).T @ wanted[pulling])
            now = side * (x @ found - wanted) < 0
            if torch.equal(now, pulling):
                break
            pulling = now
        return found.float()

    def strength(self, keep: float) -> float | None:
        """The one at which most absent nouns give way and enough present ones stay, on images left out in turn."""
        n, absent, gap = self.n_named, self.absent[: self.n_named], self.gap[: self.n_named]
        lift = torch.zeros(n)
        for fold in range(FOLDS):
            mine = self.folds[:n] == fold
            lift[mine] = self.inputs[:n][mine] @ self.solve(self.folds != fold)
        best, most = None, 0
        for s in STRENGTHS:
            gone = s * lift > gap
            lost, taken = int((gone & ~absent).sum()), int((gone & absent).sum())
            if taken > most and lost <= (1 - keep) * int((~absent).sum()):
                best, most = s, taken
        return best


def sparing(vlm: VLM, steps: Steps, row: Float[Tensor, "hidden"], columns: Columns) -> dict[int, Tensor]:
    """For each FFN the direction that adds to what `row` reads and least to the logits of all tokens.

    Along `row` itself, tokens whose rows are like it would rise as well. The reads are those of a step in the middle.
    """
    tokens, middle = vlm.anatomy.unembed[: vlm.n_tokens].float().cpu(), len(steps) // 2
    final, *norms = (part[middle].expand(len(tokens), -1) for part in (steps.residual, *steps.norms))
    every = Directions(vlm.anatomy, frozen_rows(vlm.anatomy, tokens, final), norms)
    wanted = steps.directions(row.expand(len(steps), -1))
    found = {}
    for i in columns.indices:
        way = vlm.anatomy.ffns[i].way
        reads = every.at(way).double()
        moment = reads.T @ reads / len(reads)
        r = SPARE * moment.diagonal().mean()
        found[i] = torch.linalg.solve(moment + r * torch.eye(len(moment)), wanted.at(way).mean(0).double()).float()
    return found


def telling(nouns: Steps, absent: Bool[Tensor, "nouns"], top: int, blocks: int | None) -> Columns:
    """The columns whose activations differ most between absent and present nouns, in standard deviations."""
    anatomy = nouns.anatomy
    first = 0 if blocks is None else len(anatomy.blocks) - blocks
    scores = {}
    for i, ffn in enumerate(anatomy.ffns):
        if ffn.layer >= first:
            fired = nouns.activations[i].float()
            spread = fired.std(0)
            apart = (fired[absent].mean(0) - fired[~absent].mean(0)).abs()
            scores[i] = torch.where(spread > 0, apart / spread.clamp_min(1e-12), 0.0)
    whole = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    chosen[top_k(whole, min(top, int((whole > 0).sum())))] = True
    parts = chosen.split([len(part) for part in scores.values()])
    return Columns(
        anatomy, {i: part.nonzero()[:, 0] for i, part in zip(scores, parts, strict=True) if bool(part.any())}
    )


@dataclass(frozen=True)
class Judged:
    """Images that the patch was not made with, before and after; and the cheap rival on the same."""

    before: Chair
    after: Chair
    rival: Chair
    """The captions before, without as many of their least likely nouns as are named less with the patch."""
    n_images: int


def judge(
    vlm: VLM, patch: Patch, images: Sequence[Picture], objects: Sequence[Collection[str]], vocabulary: Vocabulary
) -> Judged:
    """Judge a patch of `dehallucinate` on other images; the model is left as it was."""
    made = patch.provenance["settings"]
    limits: dict[str, Any] = {"max_new_tokens": made["max_new_tokens"], "batch_size": made["batch_size"]}
    said = answer_steps(vlm, images, made["prompt"], made["answer_prefix"], **limits)
    with patch.applied(vlm):
        after = vlm.caption([*images], made["prompt"], made["answer_prefix"], **limits)
    now = [vocabulary.named(text) for text in after]
    usual = [vocabulary.named(text) for text in said.texts]
    named = named_steps(vlm, said, objects, vocabulary)
    at = said.steps.at(named.steps)
    likely = at.logits - vlm.anatomy.logits(at.residual)[:, : vlm.n_tokens].float().cpu().logsumexp(1)
    n_fewer = max(0, sum(map(len, usual)) - sum(map(len, now)))
    deleted = set(likely.argsort()[:n_fewer].tolist())
    kept: list[list[str]] = [[] for _ in usual]
    nouns = [(answer, noun) for answer, mine in enumerate(usual) for noun in mine]
    for i, (answer, noun) in enumerate(nouns):
        if i not in deleted:
            kept[answer].append(noun)
    return Judged(chair_of(usual, objects), chair_of(now, objects), chair_of(kept, objects), len(images))


def _facts(found: Chair) -> dict[str, float | int | None]:
    means = {name: getattr(found, name) for name in ("chair_i", "chair_s", "recall", "named")}
    return {name: None if one is None else one.mean for name, one in means.items()}
