"""What each verb can be told: a class for each, whose fields are its keyword arguments, its options and its provenance.

A field's default, its bounds (`setting`) and the text below it are the only place where they are said.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, get_args

from mmneurons.errors import SettingError

if TYPE_CHECKING:
    from mmneurons.words import Tagger

PROMPT = "Describe the image in few words."
"""Asked unless the user asks something else (Pan et al., section 4)."""
ANSWER_PREFIX = "An image of"
"""The words an answer to `PROMPT` is made to begin with, so that nouns come first (Pan et al., section 4)."""
MAX_NEW_TOKENS = 32

Score = Literal["logit", "logprob", "paper"]
Method = Literal["selective", "closed_form", "optimised"]
SCORES: tuple[Score, ...] = get_args(Score)
METHODS: tuple[Method, ...] = get_args(Method)
CHOICES: Mapping[str, tuple[str, ...]] = {"score": SCORES, "method": METHODS}
"""By name of a field, what it can be."""
Blocks = int | Literal["all"]
"""So many of the last blocks, or all."""


def setting(default: Any, *, at_least: float | None = None, option: str | None = None) -> Any:
    """A field of a settings class.

    Args:
        default: Its value where nobody says another.
        at_least: The smallest number that has a meaning.
        option: How the command line calls it, where that is not the field's own name.
    """
    return field(default=default, metadata={"at_least": at_least, "option": option})


@dataclass(frozen=True)
class Question:
    """What a model is asked about each image, how long its answer may be, and how many are asked at once.

    Raises:
        SettingError: of this class and of those made of it: a value that has no meaning.
    """

    prompt: str = PROMPT
    """What the model is asked."""
    answer_prefix: str | None = None
    """Words the answer begins with. Default: 'An image of' with the default prompt, none with another."""
    max_new_tokens: int = setting(MAX_NEW_TOKENS, at_least=1)
    """Stop an answer after this many tokens, if the model does not stop by itself."""
    batch_size: int = setting(8, at_least=1)
    """How many prompts are asked at once, by models whose batches change nothing."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.answer_prefix, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(
                "A prompt and an answer prefix are one text each, for all images.",
                seen=f"prompt={self.prompt!r}, answer_prefix={self.answer_prefix!r}"[:200],
                fix="Ask about the images that have other prompts in a call of their own.",
            )
        for one in fields(self):
            self._check(one.name, getattr(self, one.name), one.metadata.get("at_least"))

    def _check(self, name: str, value: Any, at_least: float | None) -> None:
        choices = CHOICES.get(name)
        if choices is not None and value not in choices:
            raise SettingError(f"There is no {name} '{value}'.", fix=f"Choose one of: {', '.join(choices)}.")
        if at_least is None or (name == "blocks" and value == "all"):
            return
        if not isinstance(value, int | float) or not value >= at_least:
            raise SettingError(f"'{name}' is {at_least:g} or more.", seen=f"{name}={value!r}")

    @property
    def question(self) -> Question:
        """What the model is asked, without what else a verb is told."""
        return Question(self.prompt, self.answer_prefix, self.max_new_tokens, self.batch_size)

    @property
    def prefix(self) -> str:
        """The words that the answer is made to begin with: those given; else the paper's, with the paper's prompt only.

        Behind a question of one's own, "An image of" would turn the answer into something else.
        """
        if self.answer_prefix is not None:
            return self.answer_prefix
        return ANSWER_PREFIX if self.prompt == PROMPT else ""


@dataclass(frozen=True)
class FindSettings(Question):
    """Which neurons `find` looks for, and what it tells of them."""

    top: int = setting(10, at_least=1)
    """How many neurons are listed for each noun."""
    score: Score = "logit"
    """How many logits of the word a neuron wrote (logit), how far it pushes log p of it, to first order (logprob), or
    what the released code prints (paper); see docs/method.md."""
    words: str | Sequence[str] | None = setting(None, option="--word")
    """A word of the answer to explain instead of its nouns; repeatable."""
    token_ids: Sequence[int] | None = None
    """Tokens of the answer to explain instead of its nouns, each wherever it was said."""
    against: str | None = None
    """Score why the noun rather than this word. A noun that is this word is left out."""
    maps: bool = False
    """Also show where in the image the neurons look: one more prefill."""
    blank: bool = False
    """Also show what is lost with a blank image: one more pass over the answer."""
    tagger: Tagger | None = None
    """What tells the nouns, such as `mmneurons.words.SpacyTagger("zh_core_web_sm")`; None: HanTa, in English, German
    and Dutch. In another language an answer then has no nouns, and a note says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is not None and self.token_ids is not None:
            raise SettingError("Ask for words or for tokens, not both.", fix="find(vlm, image, words=[...])")
        # One word is a list of one, none at all are the nouns; and what is recorded cannot change.
        words = (self.words,) if isinstance(self.words, str) else tuple(self.words or ()) or None
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "token_ids", None if self.token_ids is None else tuple(self.token_ids))


@dataclass(frozen=True)
class EditSettings(Question):
    """How `edit` makes a patch."""

    method: Method = "selective"
    """A change that spares what the reference shares (selective), the smallest one (closed_form), or by gradients
    (optimised); see docs/edit.md."""
    top: int = setting(400, at_least=1)
    """How many columns the edit moves: those that write most of SOURCE."""
    blocks: Blocks = setting(1, at_least=1)
    """Take the columns from this many of the last blocks, or from all."""
    ridge: float = setting(0.005, at_least=0)
    """How near the selective change is to the smallest one: 0 spares most."""
    wordings: tuple[str, ...] = setting((), option="--wording")
    """Another prompt under which the edit shall hold; repeatable."""

    @property
    def questions(self) -> list[Question]:
        """What the model is asked, one for each prompt."""
        first = self.question
        return [first, *(replace(first, prompt=prompt) for prompt in self.wordings)]


@dataclass(frozen=True)
class InspectSettings(Question):
    """How `inspect` ranks neurons."""

    score: Score = "logit"
    """By which of `find`'s scores neurons are ranked; see docs/method.md."""
    top: int = setting(10, at_least=1)
    """How many top neurons of each noun are tested (sensitivity)."""
    seed: int = 0
    """Of noise, random neurons and shuffled patches."""


@dataclass(frozen=True)
class DehallucinateSettings(Question):
    """How `dehallucinate` makes a patch."""

    say: str = "thing"
    """The word that comes where the model declines, one token."""
    payoff: float = setting(4.0, at_least=1.01)
    """It comes where the best guess is right with less than 1 / payoff."""
    top: int = setting(1000, at_least=1)
    """How many columns the edit moves: those along which the loss falls most steeply."""
    blocks: Blocks = setting("all", at_least=1)
    """Take the columns from this many of the last blocks, or from all."""
    rank: int = setting(32, at_least=1)
    """How many shared directions the columns move along."""
    steps: int = setting(900, at_least=1)
    """Steps of gradient descent, at most."""
    questions: int = setting(2000, at_least=0)
    """Of how many images it is asked as well whether something is there; these answers are to stay as they are."""


class QuestionOptions(TypedDict, total=False):
    """Keyword arguments of what asks a model: the fields of `Question`."""

    prompt: str
    answer_prefix: str | None
    max_new_tokens: int
    batch_size: int


class FindOptions(QuestionOptions, total=False):
    """Keyword arguments of `find`: the fields of `FindSettings`."""

    top: int
    score: Score
    words: str | Sequence[str] | None
    token_ids: Sequence[int] | None
    against: str | None
    maps: bool
    blank: bool
    tagger: Tagger | None


class EditOptions(QuestionOptions, total=False):
    """Keyword arguments of `edit`: the fields of `EditSettings`."""

    method: Method
    top: int
    blocks: Blocks
    ridge: float
    wordings: tuple[str, ...]


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
    questions: int


Kind = TypeVar("Kind", bound=Question)


def settled(kind: type[Kind], settings: Kind | None, options: Mapping[str, Any]) -> Kind:
    """The settings given, or the defaults, with the options given put over them.

    Raises:
        SettingError: a value that has no meaning.
        TypeError: an option that there is not.
    """
    return replace(settings, **options) if settings is not None else kind(**options)


@cache
def descriptions(kind: type[Question]) -> dict[str, str]:
    """By name of a field the text below it, of a settings class and of those that it is made of."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(dedent(inspect.getsource(one))).body
        body = cast("ast.ClassDef", tree).body
        for before, after in pairwise(body):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value)
                found[ast.unparse(before.target)] = " ".join(text.split())
    return found
