"""The nouns of a text, found by taggers for some languages; a text in another language has none, and a note says so."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import regex

from mmneurons.errors import SettingError
from mmneurons.words.english import plain, singular
from mmneurons.words.languages import Language, hanta, language_of
from mmneurons.words.search import TOKEN
from mmneurons.words.spans import Decode, Word, words_at


class Noun(NamedTuple):
    """One noun as a tagger found it."""

    start: int
    """The noun's first character in the tagged text, counted from 0."""
    stop: int
    """One past the noun's last character."""
    lemma: str
    """The noun in the singular, lower case."""


@runtime_checkable
class Tagger(Protocol):
    """A tagger: whatever finds the nouns of a text."""

    def nouns(self, text: str) -> Sequence[Noun]:
        """Find every noun of `text`, one item per occurrence."""
        ...


@dataclass(frozen=True)
class HantaTagger:
    """A tagger of English, German or Dutch, by the Hanover tagger: pure Python, its models come inside the package.

    Nouns are common and proper nouns, and English words that HanTa does not know: rare nouns, nouns cut by the end of
    the text. A compound is its parts: "fire hydrant" gives both, "hot dog" gives "dog". Words in other scripts are no
    nouns. Known to be weak: a verb that could be a noun ("two dogs face the sea"), an -ing word next to its noun, names
    in -s ("James" becomes "jame").
    """

    language: Language = "en"

    def nouns(self, text: str) -> list[Noun]:
        """Find every noun of `text`, in order.

        The lemma is that of `singular` in English, as it errs less on captions than HanTa's; HanTa's in German; and in
        Dutch the word as it stands, because HanTa's Dutch lemmas are stems.
        """
        tokens = list(TOKEN.finditer(text))
        # HanTa's time grows with the cube of a word's length; no noun is that long.
        tagged = hanta(self.language).tag_sent([plain(token[0])[:40] for token in tokens])
        tags = [tag for _, _, tag in tagged]
        if self.language == "en":
            tags = _close_articles(tags)
        return [
            Noun(*token.span(), self._lemma(token[0], lemma))
            for token, tag, (_, lemma, _) in zip(tokens, tags, tagged, strict=True)
            if tag.startswith(_NOUN_TAGS[self.language]) and len(token[0]) > 1 and _LATIN.search(token[0])
        ]

    def _lemma(self, word: str, lemma: str) -> str:
        if self.language == "en":
            return singular(word)
        return lemma.lower() if self.language == "de" else plain(word).lower()


@dataclass(frozen=True)
class SpacyTagger:
    """A tagger of any language that spaCy has a model for: `pip install "mmneurons[spacy]"`.

    Args:
        model: An installed model that tags parts of speech, such as "zh_core_web_sm" or "es_core_news_sm".

    Raises:
        SettingError: spaCy or the model is not installed.
    """

    model: str

    def __post_init__(self) -> None:
        _spacy(self.model)  # a missing model is told here, before anything is generated

    def nouns(self, text: str) -> list[Noun]:
        """Find every common or proper noun of `text`, in order, with spaCy's lemma in lower case."""
        words = [word for word in _spacy(self.model)(text) if word.pos_ in ("NOUN", "PROPN")]
        return [Noun(w.idx, w.idx + len(w.text), (w.lemma_ or w.text).lower()) for w in words]


def tagger_for(text: str) -> Tagger | None:
    """Choose the tagger for the language of a text; None if there is none: ask for words, or give a tagger."""
    language = language_of(text)
    return None if language is None else HantaTagger(language)


def find_nouns(
    caption: str,
    token_ids: Sequence[int],
    decode: Decode,
    *,
    answer_prefix: str = "",
    tagger: Tagger | None = None,
) -> list[Word]:
    """Find the nouns of a caption, each with the generated tokens that wrote it.

    Args:
        caption: The generated text, `decode(token_ids).strip()`.
        token_ids: Every generated token, end-of-text and padding included, those of the prompt left out.
        decode: A function from token ids to text that skips special tokens.
        answer_prefix: The words that the answer was made to begin with: the tagger sees them, their nouns are dropped.
        tagger: The tagger; None: `tagger_for(caption)`, and no nouns in a language that it has no tagger for.

    Returns:
        One Word per occurrence, in order of appearance: two equal nouns give two. A noun cut by the end of the text is
        given as it stands; a noun that no token wrote is left out.

    Raises:
        WordError: `caption` is not what the tokens decode to.

    Source: Pan et al., Findings of ACL 2024. Their code takes a noun's first sub-token at its first occurrence, and
        pairs a list of nouns with a filtered list of tokens.
    """
    # The tagger reads the whole sentence, prefix and all; places are then counted from the caption's start, so that
    # those in the prefix are negative, and dropped by `words_at`.
    before = f"{answer_prefix} " if answer_prefix and not answer_prefix[-1].isspace() else answer_prefix
    tagger = tagger or tagger_for(caption)
    nouns = [] if tagger is None else tagger.nouns(before + caption)
    places = ((start - len(before), stop - len(before), lemma) for start, stop, lemma in nouns)
    return words_at(places, caption, token_ids, decode)


# HanTa's tags are those of its corpora: C5 for English, where UNC is a word it cannot place; STTS for German; D-COI for
# Dutch, where N( is a noun.
_NOUN_TAGS: dict[Language, tuple[str, ...]] = {
    "en": ("NN", "NP0", "UNC"),
    "de": ("NN", "NE"),
    "nl": ("N(",),
}
_LATIN = regex.compile(r"\p{Latin}")
_ARTICLES = frozenset({"AT0", "DPS"})
_NOUNS_AFTER_ARTICLE = frozenset({"AJ0", "VVB", "VVI"})
_GOES_ON = frozenset({"AJC", "AJS", "AV0", "CRD", "ORD"}) | _NOUNS_AFTER_ARTICLE


def _close_articles(tags: Sequence[str]) -> list[str]:
    """Return the tags with a noun at the end of each phrase that an article opens and no noun closes.

    HanTa takes the "husky" of "a husky on a sofa" for an adjective; but then "a" would have no noun.
    """
    closed = list(tags)
    for i, tag in enumerate(tags):
        if tag not in _ARTICLES:
            continue
        end = next((j for j in range(i + 1, len(tags)) if tags[j] not in _GOES_ON), len(tags))
        # "a black and white dog", "a big, red dog": the phrase goes on.
        joined = end + 1 < len(tags) and tags[end] in {"CJC", "PUN"} and tags[end + 1] not in _ARTICLES
        noun_follows = end < len(tags) and tags[end].startswith(_NOUN_TAGS["en"])
        if tags[end - 1] in _NOUNS_AFTER_ARTICLE and not joined and not noun_follows:
            closed[end - 1] = "NN1"
    return closed


@functools.cache
def _spacy(model: str) -> Any:
    """Load a model of spaCy, once."""
    try:
        import spacy  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise SettingError(
            "A tagger of spaCy needs the package spacy, which is not installed.", fix='pip install "mmneurons[spacy]"'
        ) from error
    try:
        return spacy.load(model)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"spaCy cannot load '{model}'.", seen=str(error)[:200], fix=f"python -m spacy download {model}"
        ) from error
