"""The settings of each verb: one class, whose fields are its keyword arguments, its options and its provenance.

Here alone each field has its default, its bounds (`setting`) and its description: the text below it is the help of the
command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, get_args, runtime_checkable

from mmneurons.errors import SettingError

if TYPE_CHECKING:
    from mmneurons.words import Tagger

PROMPT = "Describe the image in few words."
"""The prompt that is used unless the user gives another (Pan et al., section 4)."""
ANSWER_PREFIX = "An image of"
"""The words an answer to `PROMPT` is made to begin with, so that nouns come first (Pan et al., section 4)."""
MAX_NEW_TOKENS = 32
"""The most tokens of an answer, unless the user says otherwise."""

Score = Literal["logit", "logprob", "paper", "followed", "gradient"]
Method = Literal["selective", "closed_form", "optimised", "finetune", "rome", "memit", "random"]
"""The ways to make a patch: the first three are `edit`'s own, the others what they are compared with."""
OtherMethod = Literal["lora", "logit_bias", "head_rows"]
"""The ways to make a change that is no patch: adapters beside the weights, a hook on the head."""
Says = Literal["standardised", "raw"]
Baseline = Literal["zero", "blank"]
SCORES: tuple[Score, ...] = get_args(Score)
SAYS: tuple[Says, ...] = get_args(Says)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
METHODS: tuple[Method, ...] = get_args(Method)
OTHER_METHODS: tuple[OtherMethod, ...] = get_args(OtherMethod)
CHOICES: Mapping[str, tuple[str, ...]] = {"score": SCORES, "says": SAYS, "method": METHODS}
"""The values that a field can take, by the name of the field."""
Blocks = int | Literal["all"]
"""How many of the last blocks are meant, or all of them."""
BatchSize = int | Literal["auto"]
"""How many prompts are asked at once, or what is found to be best."""


def setting(default: Any, *, at_least: float | None = None, besides: Any = (), option: str | None = None) -> Any:
    """Declare a field of a settings class.

    Args:
        default: Its value where nobody gives another.
        at_least: The smallest number that has a meaning.
        besides: What it may be that is no number: a tuple of a word, or of None.
        option: The name of its option on the command line, where that is not the field's own name.
    """
    return field(default=default, metadata={"at_least": at_least, "besides": besides, "option": option})


FRACTIONS = ("ridge", "payoff")
"""Fields that need not be whole numbers."""


@dataclass(frozen=True)
class Question:
    """A Question says what a model is asked about each image, how long answers may be, and how many are asked at once.

    Raises:
        SettingError: a value has no meaning, here or in a class derived from this one.
    """

    prompt: str = PROMPT
    """The question or instruction that the model is given with each image."""
    answer_prefix: str | None = None
    """Words that the answer is made to begin with; the model goes on from them. Default: 'An image of' with the default
    prompt, none with another."""
    max_new_tokens: int = setting(MAX_NEW_TOKENS, at_least=1)
    """Cut an answer off after this many tokens, if the model has not ended it by then."""
    batch_size: int = setting(8, at_least=1)
    """How many prompts the model is given at once; always 1 where a batch would change a model's answers."""

    def __post_init__(self) -> None:
        # A list with a prompt for each image is a likely slip: there is one prompt for all of them.
        if not isinstance(self.prompt, str) or not isinstance(self.answer_prefix, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(
                "A prompt and an answer prefix are one text each, for all images.",
                seen=f"prompt={self.prompt!r}, answer_prefix={self.answer_prefix!r}"[:200],
                fix="Ask about the images that have other prompts in a call of their own.",
            )
        for one in fields(self):
            self._check(one.name, getattr(self, one.name), **one.metadata)

    def _check(self, name: str, value: Any, at_least: float | None = None, besides: Any = (), **_: Any) -> None:
        """Refuse a value that is none of the field's choices, or below its bound."""
        choices = CHOICES.get(name)
        if choices is not None and value not in choices:
            raise SettingError(f"There is no {name} '{value}'.", fix=f"Choose one of: {', '.join(choices)}.")
        if at_least is None or value in besides:
            return
        # `not <=` instead of `>`: it refuses NaN, too.
        is_number = isinstance(value, int | float if name in FRACTIONS else int) and not isinstance(value, bool)
        if not is_number or not at_least <= value < float("inf"):
            kind = "" if name in FRACTIONS else "a whole number, "
            other = "".join(f", or '{word}'" for word in besides if word)
            raise SettingError(f"'{name}' is {kind}{at_least:g} or more{other}.", seen=f"{name}={value!r}")

    @property
    def question(self) -> Question:
        """The part of these settings that says what the model is asked."""
        return Question(self.prompt, self.answer_prefix, self.max_new_tokens, self.batch_size)

    @property
    def prefix(self) -> str:
        """The words that the answer is made to begin with: those given, else the paper's with the paper's prompt.

        After a question of the user's own, "An image of" would lead the answer away from the question.
        """
        if self.answer_prefix is not None:
            return self.answer_prefix
        return ANSWER_PREFIX if self.prompt == PROMPT else ""


@runtime_checkable
class MeanActivations(Protocol):
    """What activations can be compared with: a `mmneurons.Reference`."""

    @property
    def facts(self) -> Mapping[str, object]:
        """What a result says of it."""
        ...

    def mean_at_other_nouns(self, vlm: Any, lemma: str, tagger: Tagger | None) -> list[Any]:
        """Per FFN the mean activation of each neuron, (neurons,), where nouns are said that are not `lemma`."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """What turns internal confidence into a probability: a `mmneurons.Calibration`."""

    @property
    def made_by(self) -> Mapping[str, object]:
        """Model, images and settings that made it."""
        ...

    def probability(self, confidence: float) -> float:
        """The probability that an object of this internal confidence is in the picture."""
        ...


@dataclass(frozen=True)
class FindSettings(Question):
    """These settings say which neurons `find` looks for, and what it reports about them."""

    top: int = setting(10, at_least=1)
    """How many neurons are listed for each noun."""
    score: Score = "logit"
    """How neurons are scored: by the logits of the noun that they wrote (logit), by how far they push its log
    probability, to first order (logprob), the same with what later FFNs (followed) or all later blocks (gradient:
    gradient x activation) make of it, or as in the paper's released code (paper). Which to choose:
    docs/measurements/scores.md; what each is: docs/reference/method.md."""
    says: Says = "standardised"
    """What the tokens of a neuron are: those that it pushes hardest next to all neurons of the model (standardised), or
    those that its column pushes most, as in the paper (raw)."""
    baseline: Baseline | MeanActivations = "zero"
    """What activations are compared with: nothing, as in the paper (zero), the same answer read with a blank image
    (blank), or other pictures' answers where they say other nouns (a `mmneurons.Reference`)."""
    words: str | Sequence[str] | None = setting(None, option="--word")
    """A word of the answer to explain instead of its nouns; repeatable."""
    token_ids: Sequence[int] | None = None
    """Token ids of the answer to explain instead of its nouns, each wherever it was said."""
    against: str | None = None
    """Another word: the scores then say why the model said the noun rather than this word. Nouns that are this word are
    left out."""
    maps: bool = False
    """Also show where in the image the neurons are active; this takes a second pass over the prompt."""
    blank: bool = False
    """Also show how much of each score is lost with a blank image, in a second pass; not over the baseline `blank`."""
    grounded: bool = False
    """Also show how much of each noun the image tokens say, and whether it is seen; a second pass over the prompt."""
    calibration: Calibrated | None = None
    """What that means in this model: a `mmneurons.Calibration`; None: that of the pocket model, else none."""
    tagger: Tagger | None = None
    """A tagger of nouns, such as `mmneurons.words.SpacyTagger("zh_core_web_sm")`; None: HanTa, for English, German and
    Dutch. In another language an answer then has no nouns, and a note says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is not None and self.token_ids is not None:
            raise SettingError("Ask for words or for tokens, not both.", fix="find(vlm, image, words=[...])")
        if isinstance(self.baseline, MeanActivations):
            if self.score == "paper":
                raise SettingError(
                    "A reference has activations, but not the gates that score='paper' takes for them.",
                    fix="baseline='blank', or another score.",
                )
        elif self.baseline == "blank" and self.blank:
            raise SettingError(
                "Scores over a blank image are what is lost without the image: of each its whole.",
                seen="baseline='blank' with blank=True",
                fix="Leave one out. CLI: --baseline blank --no-blank, or --blank alone",
            )
        elif self.baseline not in BASELINES:
            raise SettingError(
                f"There is no baseline {str(self.baseline)[:40]!r}.",
                fix=f"Choose one of: {', '.join(BASELINES)}, or give a Reference: make_reference(vlm, images).",
            )
        # A single word is a list of one; an empty list means the nouns, like None. Tuples, as settings do not change.
        words = (self.words,) if isinstance(self.words, str) else tuple(self.words or ()) or None
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "token_ids", None if self.token_ids is None else tuple(self.token_ids))


@dataclass(frozen=True)
class SweepSettings(FindSettings):
    """These settings say which neurons a `sweep` keeps for each noun, and how the images are divided."""

    top: int = setting(100, at_least=1)
    """How many neurons are kept for each noun."""
    # A sweep puts a number in its place before a model is asked.
    batch_size: BatchSize = setting(8, at_least=1, besides=("auto",))  # pyright: ignore[reportIncompatibleVariableOverride]
    """How many prompts the model is given at once, always 1 where a batch would change a model's answers; or auto: as
    many as give the most images a second, found on the first images, or as the run was begun with."""
    given: bool = False
    """Score the captions that the images come with, where they have one, instead of what the model says."""
    shard_size: int = setting(256, at_least=1)
    """How many images are kept at once: a sweep that is stopped goes on after the last whole shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps or self.blank or isinstance(self.baseline, MeanActivations):
            raise SettingError(
                "A sweep keeps neither maps nor comparisons with a blank image, and knows no Reference.",
                fix="Ask `find` about the images that matter; baseline='blank' compares in a sweep, too.",
            )


@dataclass(frozen=True)
class EditSettings(Question):
    """These settings say how `edit` makes a patch."""

    method: Method = "selective"
    """How the change is found: in closed form, sparing what the reference answers rely on (selective), as the smallest
    change in closed form (closed_form), or by gradient descent (optimised); or as in other work, to compare with: by
    fine-tuning one block (finetune), ROME (rome), MEMIT (memit), or the closed form on matched random columns
    (random); see docs/guide/edit.md."""
    top: int = setting(1000, at_least=1)
    """How many columns the edit moves, at most all there are: the ones that contribute most to SOURCE."""
    blocks: Blocks = setting(1, at_least=1, besides=("all",))
    """Take the columns from this many of the last blocks, or from all."""
    ridge: float = setting(0.3, at_least=0)
    """Strength of the regularisation of the selective change: 0 spares the reference most, larger values change columns
    by smaller shares of their length."""
    wordings: tuple[str, ...] = setting((), option="--wording")
    """Another prompt under which the edit is to hold as well; repeatable."""
    block: int | None = setting(None, at_least=0, besides=(None,))
    """The block that finetune and rome change, and the last that memit changes. Default: the model's last; for rome the
    last but one, where it does better."""
    seed: int = setting(0, at_least=0)
    """Seed of the random columns, of LoRA's first weights and of the order in which reference images are learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wordings = (self.wordings,) if isinstance(self.wordings, str) else tuple(self.wordings)
        object.__setattr__(self, "wordings", wordings)

    @property
    def questions(self) -> list[Question]:
        """The questions that the model is asked about each image: one for each prompt, `prompt` first."""
        # `wordings` are prompts alone: prefix and limits are those of the first question.
        first = self.question
        return [first, *(replace(first, prompt=prompt) for prompt in self.wordings)]


@dataclass(frozen=True)
class InspectSettings(Question):
    """These settings say how `inspect` ranks neurons."""

    score: Score = "logit"
    """The score of `find` by which neurons are ranked; see docs/reference/method.md."""
    top: int = setting(10, at_least=1)
    """How many top neurons of each noun are tested (sensitivity only)."""
    seed: int = setting(0, at_least=0)
    """Seed of the noise, the random neurons and the shuffled patches."""


@dataclass(frozen=True)
class DehallucinateSettings(Question):
    """These settings say how `dehallucinate` makes a patch."""

    say: str = "thing"
    """The word, one token, that the model learns to say where it declines to name an object."""
    payoff: float = setting(4.0, at_least=1.01)
    """What a right guess is worth: the model declines where its best guess has a probability below 1 / payoff."""
    top: int = setting(1000, at_least=1)
    """How many columns the edit moves: the ones along which the loss falls most steeply."""
    blocks: Blocks = setting("all", at_least=1, besides=("all",))
    """Take the columns from this many of the last blocks, or from all."""
    rank: int = setting(32, at_least=1)
    """How many directions the columns move along; all columns share them (the rank of the change)."""
    steps: int = setting(900, at_least=1)
    """The most steps of gradient descent."""
    n_asked: int = setting(2000, at_least=0)
    """The number of images about which yes-or-no questions are asked as well, whose answers are to stay as they are."""


class QuestionOptions(TypedDict, total=False):
    """Keyword arguments of every function that asks a model: the fields of `Question`."""

    prompt: str
    answer_prefix: str | None
    max_new_tokens: int
    batch_size: int


class FindOptions(QuestionOptions, total=False):
    """Keyword arguments of `find`: the fields of `FindSettings`."""

    top: int
    score: Score
    says: Says
    baseline: Baseline | MeanActivations
    words: str | Sequence[str] | None
    token_ids: Sequence[int] | None
    against: str | None
    maps: bool
    blank: bool
    grounded: bool
    calibration: Calibrated | None
    tagger: Tagger | None


class SweepOptions(FindOptions, total=False):
    """Keyword arguments of `sweep`: the fields of `SweepSettings`."""

    given: bool
    shard_size: int
    batch_size: BatchSize  # pyright: ignore[reportIncompatibleVariableOverride]


class EditChoices(QuestionOptions, total=False):
    """Keyword arguments of `edit`: the fields of `EditSettings` but for the method."""

    top: int
    blocks: Blocks
    ridge: float
    wordings: tuple[str, ...]
    block: int | None
    seed: int


class EditOptions(EditChoices, total=False):
    """Keyword arguments of `edit` that makes a patch: the fields of `EditSettings`."""

    method: Method


class InspectOptions(QuestionOptions, total=False):
    """Keyword arguments of `inspect`: the fields of `InspectSettings`."""

    score: Score
    top: int
    seed: int


class DehallucinateOptions(QuestionOptions, total=False):
    """Keyword arguments of `dehallucinate`: the fields of `DehallucinateSettings`."""

    say: str
    payoff: float
    top: int
    blocks: Blocks
    rank: int
    steps: int
    n_asked: int


Kind = TypeVar("Kind", bound=Question)


def settled(kind: type[Kind], settings: Kind | None, options: Mapping[str, Any]) -> Kind:
    """Combine settings with keyword arguments: the settings given, or the defaults, with the options put over them.

    Raises:
        SettingError: a value has no meaning.
        TypeError: there is no such option.
    """
    known = [one.name for one in fields(kind)]
    if unknown := [name for name in options if name not in known]:
        hint = "".join(f" Did you mean '{near}'?" for near in get_close_matches(unknown[0], known, 1))
        raise TypeError(f"There is no option '{unknown[0]}'.{hint} There are: {', '.join(known)}.")
    return replace(settings, **options) if settings is not None else kind(**options)
