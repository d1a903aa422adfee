"""The nouns of a generated text, and the generated tokens that wrote each.

Every word is looked up among the tokens by its own characters: a list of words is never paired with a list of tokens
by place, so a noun left out cannot shift the others. Nothing is encoded again: a text need not split as it was written.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mmneurons.errors import WordError

Span = tuple[int, int]
Place = tuple[int, int, str]
"""First character of a word in a text, one past its last, and what it stands for: its lemma, or an object's name."""
Decode = Callable[[Sequence[int]], str]

# As HanTa's corpus splits them: "dog" + "'s", "do" + "n't"; hyphens and other apostrophes stay inside a word.
_CLITIC = r"(?:n['\u2019]t|['\u2019](?:s|re|ve|ll|d|m))\b"
_LETTER = rf"(?:(?!{_CLITIC})[^\W_][\u0300-\u036f]*)"
_TOKEN = re.compile(rf"{_CLITIC}|{_LETTER}+(?:(?!{_CLITIC})[-'\u2019]{_LETTER}+)*|[^\w\s]", re.IGNORECASE)


@dataclass(frozen=True)
class Word:
    """One occurrence of a word, or of a phrase, in a caption."""

    text: str
    """As written: capital letter, plural and all."""
    lemma: str
    """Lower case, singular."""
    start: int
    """First character in the caption, counted from 0."""
    stop: int
    """One past the last character."""
    steps: tuple[int, ...]
    """Generated tokens that wrote it, in order, 0 the first token generated. Never empty."""


class Noun(NamedTuple):
    """What a tagger says of one noun."""

    start: int
    """First character in the tagged text, counted from 0."""
    stop: int
    """One past the last character."""
    lemma: str
    """Lower case, singular."""


class Tagger(Protocol):
    """Tells the nouns of a text."""

    def nouns(self, text: str) -> Sequence[Noun]:
        """Every noun of `text`, one item per occurrence."""
        ...


class HantaTagger:
    """Tells English nouns with the Hanover tagger: pure Python, its model comes inside the package HanTa.

    Nouns are common and proper ones, and words HanTa does not know: rare nouns, nouns cut by the end of the text. A
    compound is its parts: "fire hydrant" gives both, "hot dog" gives "dog". Known to be weak: a verb that could be a
    noun ("two dogs face the sea"), an -ing word next to its noun, names in -s ("James" becomes "jame").
    """

    def nouns(self, text: str) -> list[Noun]:
        """Every noun of `text`, in order; the lemma is `singular`, which errs less on captions than HanTa's own."""
        tokens = list(_TOKEN.finditer(text))
        # HanTa's time grows with the cube of a word's length; no noun is that long.
        tagged = _hanta().tag_sent([_plain(token[0])[:40] for token in tokens])
        tags = _close_articles([tag for _, _, tag in tagged])
        return [
            Noun(*token.span(), singular(token[0]))
            for token, tag in zip(tokens, tags, strict=True)
            if tag in _NOUN_TAGS and len(token[0]) > 1
        ]


def find_nouns(
    caption: str,
    token_ids: Sequence[int],
    decode: Decode,
    *,
    answer_prefix: str = "",
    tagger: Tagger | None = None,
) -> list[Word]:
    """The nouns of a caption, each with the generated tokens that wrote it.

    Args:
        caption: The text generated, `decode(token_ids).strip()`.
        token_ids: Every token generated, end-of-text and padding included, the prompt's left out.
        decode: Token ids to text, special tokens skipped.
        answer_prefix: The start of the answer that was given to the model: the tagger sees it, its nouns are dropped.
        tagger: What tells the nouns; `HantaTagger()` if None.

    Returns:
        One Word per occurrence, in order of appearance: two equal nouns give two. A noun cut by the end of the text is
        given as it stands; a noun that no token wrote is left out.

    Raises:
        WordError: if `caption` is not what the tokens decode to.

    Source: Pan et al., Findings of ACL 2024. Their code takes a noun's first sub-token at its first occurrence, and
        pairs a list of nouns with a filtered list of tokens.
    """
    before = f"{answer_prefix} " if answer_prefix and not answer_prefix[-1].isspace() else answer_prefix
    nouns = (tagger or HantaTagger()).nouns(before + caption)
    places = ((start - len(before), stop - len(before), lemma) for start, stop, lemma in nouns)
    return words_at(places, caption, token_ids, decode)


def find_words(wanted: str | Sequence[str], caption: str, token_ids: Sequence[int], decode: Decode) -> list[Word]:
    """Every occurrence of the words or phrases asked for, nouns or not, each with the tokens that wrote it.

    Whole words, whatever the case, singular for plural and the reverse: "hot dog" is found in "Two Hot dogs".

    Args:
        wanted: A word or phrase, or several.
        caption: The text generated, `decode(token_ids).strip()`.
        token_ids: Every token generated, end-of-text and padding included, the prompt's left out.
        decode: Token ids to text, special tokens skipped.

    Returns:
        In order of appearance, each place once; at least one Word for each of `wanted`.

    Raises:
        WordError: if one of `wanted` is not in the caption, or `caption` is not what the tokens decode to.
    """
    phrases = [wanted] if isinstance(wanted, str) else wanted
    found = {phrase: _phrase(phrase).places(caption) for phrase in phrases}
    missing = [repr(phrase) for phrase, places in found.items() if not places]
    if missing:
        raise WordError(
            f"Not in the caption: {', '.join(missing)}.",
            seen=f"The caption is {caption!r}.",
            fix="Ask for whole words that it has, spelled as it spells them; or for none, to take its nouns.",
        )
    return words_at({place for places in found.values() for place in places}, caption, token_ids, decode)


def says(caption: str, phrase: str) -> bool:
    """Whether `find_words` would find the word or phrase in the caption."""
    return bool(_phrase(phrase).places(caption))


def turned(caption: str, source: str, target: str | None) -> bool:
    """Whether a caption does what an edit wants: says `target`, if there is one, and not `source`."""
    return not says(caption, source) and (target is None or says(caption, target))


class Phrases:
    """Words and phrases to look for: the one way in which words asked for, CHAIR and POPE find them in a text.

    Whole words, whatever the case, singular for plural and the reverse; a phrase is found where its words stand in a
    row with nothing but white space between them.

    Args:
        meanings: What each word or phrase stands for.
    """

    def __init__(self, meanings: Mapping[str, str]) -> None:
        self._meanings = {singular(phrase): meaning for phrase, meaning in meanings.items()}
        self._longest = max((len(_TOKEN.findall(phrase)) for phrase in meanings), default=0)

    def places(self, text: str) -> list[Place]:
        """Where they stand, in order; of two that begin together the longer, and none that begins inside another."""
        tokens = list(_TOKEN.finditer(text))
        found: list[Place] = []
        for i, first in enumerate(tokens):
            if found and first.start() < found[-1][1]:
                continue
            for last in reversed(tokens[i : i + self._longest]):
                meaning = self._meanings.get(singular(text[first.start() : last.end()]))
                if meaning is not None:
                    found.append((first.start(), last.end(), meaning))
                    break
        return found


def words_at(places: Iterable[Place], caption: str, token_ids: Sequence[int], decode: Decode) -> list[Word]:
    """The words at places of the caption, in order, less those outside it and those that no token wrote.

    Args:
        places: Such as `Phrases.places` gives; the lemma of each word is what its place stands for.
        caption: The text generated, `decode(token_ids).strip()`.
        token_ids: Every token generated, end-of-text and padding included, the prompt's left out.
        decode: Token ids to text, special tokens skipped.

    Raises:
        WordError: if `caption` is not what the tokens decode to.
    """
    text, spans = _decoded_spans(token_ids, decode)
    if text.strip() != caption:
        raise WordError(
            "The caption is not what its tokens decode to.",
            seen=f"The caption is {caption!r},\nthe tokens say {text.strip()!r}.",
            fix="Pass caption=decode(token_ids).strip(), and only the tokens generated, not those of the prompt.",
        )
    lead = len(text) - len(text.lstrip())
    words = []
    for start, stop, lemma in sorted(places):
        steps = tuple(i for i, (a, b) in enumerate(spans) if max(a - lead, start) < min(b - lead, stop))
        if start >= 0 and stop <= len(caption) and steps:
            words.append(Word(caption[start:stop], lemma, start, stop, steps))
    return words


def token_spans(token_ids: Sequence[int], decode: Decode) -> list[Span]:
    """The characters of the decoded text that each token wrote, or wrote bytes of.

    Decodes every prefix once. A prefix settles the characters that it shares with the whole text; if it ends in
    anything else (part of a character, a space that clean-up takes back), its last token began the next character.

    Args:
        token_ids: The tokens, in the order generated.
        decode: Token ids to text, special tokens skipped.

    Returns:
        One (start, stop) per token, in characters of `decode(token_ids)`. Neither decreases; together they cover the
        text; two overlap only in a character that both wrote bytes of. A token that wrote nothing has start == stop.
    """
    return _decoded_spans(token_ids, decode)[1]


def singular(noun: str) -> str:
    """The singular of an English noun or compound, in lower case; any other word comes back in lower case.

    By the ending and a table of the irregular, blind to context: "leaves" are a tree's, "glasses" hold water. Nouns
    that have no singular stay as they are: "scissors", "jeans", "people".
    """
    word = " ".join(_plain(noun).lower().split())
    last = re.split("[ -]", word)[-1]
    head = word[: len(word) - len(last)]
    if last in _IRREGULAR:
        return head + _IRREGULAR[last]
    for ending, one in _ENDINGS:
        if ending.search(last):
            return head + ending.sub(one, last)
    return word


def inflected(noun: str, like: str) -> str:
    """A singular noun in the form of another word: "cat" like "dogs" is "cats", like "Dog" is "Cat".

    Plurals are those that `singular` leads back to the noun; a noun that has none comes back as it is.
    """
    form = noun
    if singular(like) != like.lower() and noun not in _ONE_FORM:
        irregular = [plural for plural, one in _IRREGULAR.items() if one == noun and plural != noun]
        regular = [noun + "es", noun + "s"] if re.search("(s|sh|ch|x|z)$", noun) else [noun + "s", noun + "es"]
        ending = [re.sub(one, many, noun) for one, many in _PLURALS if re.search(one, noun)]
        form = next((f for f in [*irregular, *ending, *regular] if singular(f) == noun and f != noun), noun)
    return form[0].upper() + form[1:] if like[:1].isupper() else form


def _decoded_spans(token_ids: Sequence[int], decode: Decode) -> tuple[str, list[Span]]:
    """The whole text, and `token_spans`."""
    prefixes = [decode(token_ids[: i + 1]) for i in range(len(token_ids))]
    text = prefixes[-1] if prefixes else ""
    spans, settled = [], 0
    for prefix in prefixes:
        # Never back: one more byte can turn a whole run of characters into U+FFFD until the next one is complete.
        start, settled = settled, max(settled, _shared(prefix, text))
        began = len(prefix) > settled and settled < len(text)
        spans.append((start, settled + began))
    return text, spans


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@functools.lru_cache(maxsize=256)
def _phrase(phrase: str) -> Phrases:
    return Phrases({phrase: singular(phrase)})


def _plain(text: str) -> str:
    """Accents composed, apostrophes straight: one spelling for what reads the same."""
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


@functools.cache
def _hanta() -> Any:
    from HanTa import HanoverTagger

    # By its full path: HanTa would otherwise unpickle a file of that name from the working directory.
    return HanoverTagger.HanoverTagger(str(Path(HanoverTagger.__file__).with_name("morphmodel_en.pgz")))


# HanTa's tags for English are those of the British National Corpus (C5); UNC is a word it cannot place.
_NOUN_TAGS = frozenset({"NN", "NN0", "NN1", "NN2", "NP0", "UNC"})
_ARTICLES = frozenset({"AT0", "DPS"})
_NOUNS_AFTER_ARTICLE = frozenset({"AJ0", "VVB", "VVI"})
_GOES_ON = frozenset({"AJC", "AJS", "AV0", "CRD", "ORD"}) | _NOUNS_AFTER_ARTICLE


def _close_articles(tags: Sequence[str]) -> list[str]:
    """The tags, with a noun at the end of each phrase that an article opens and no noun closes.

    HanTa takes the "husky" of "a husky on a sofa" for an adjective; but then "a" would have no noun.
    """
    closed = list(tags)
    for i, tag in enumerate(tags):
        if tag not in _ARTICLES:
            continue
        end = next((j for j in range(i + 1, len(tags)) if tags[j] not in _GOES_ON), len(tags))
        # "a black and white dog", "a big, red dog": the phrase goes on.
        joined = end + 1 < len(tags) and tags[end] in {"CJC", "PUN"} and tags[end + 1] not in _ARTICLES
        noun_follows = end < len(tags) and tags[end] in _NOUN_TAGS
        if tags[end - 1] in _NOUNS_AFTER_ARTICLE and not joined and not noun_follows:
            closed[end - 1] = "NN1"
    return closed


# "plural:singular"; a noun alone is its own singular.
_IRREGULAR = {
    plural: one or plural
    for plural, one in re.findall(
        r"(\w+)(?::(\w+))?",
        "series species news always perhaps its canvas christmas atlas lens omen abdomen specimen ramen rhinoceros "
        "jeans pants shorts trousers leggings overalls pajamas clothes sunglasses goggles binoculars scissors tongs "
        "mice:mouse oxen:ox lives:life calves:calf halves:half scarves:scarf thieves:thief hooves:hoof cacti:cactus "
        "fungi:fungus skis:ski taxis:taxi kiwis:kiwi bikinis:bikini zucchinis:zucchini menus:menu emus:emu axes:axe "
        "headaches:headache caches:cache mustaches:mustache moustaches:moustache avalanches:avalanche quiches:quiche "
        "toes:toe canoes:canoe hoes:hoe quizzes:quiz rhinoceroses:rhinoceros irises:iris trellises:trellis gases:gas "
        "canvases:canvas atlases:atlas lenses:lens tvs:tv cookies:cookie movies:movie selfies:selfie hoodies:hoodie "
        "zombies:zombie brownies:brownie smoothies:smoothie collies:collie genies:genie beanies:beanie "
        "veggies:veggie magpies:magpie neckties:necktie bowties:bowtie",
    )
}
_ONE_FORM = frozenset({"sheep", "fish", "deer", "moose", "aircraft"})
_PLURALS = (
    ("(tomat|potat|mosquit|her|ech|torped|volcan|buffal)o$", r"\1oes"),
    ("man$", "men"), ("(ch)ild$", r"\1ildren"), ("foot$", "feet"), ("tooth$", "teeth"), ("goose$", "geese"),
    ("(el|wol|lea|loa)f$", r"\1ves"), ("(kni|wi)fe$", r"\1ves"), ("([^aeiou])y$", r"\1ies"),
)  # fmt: skip
# The first that fits.
_ENDINGS = tuple(
    (re.compile(plural + "$"), one)
    for plural, one in (
        ("men", "man"),
        ("children", "child"),
        ("feet", "foot"),
        ("teeth", "tooth"),
        ("geese", "goose"),
        ("(el|wol|lea|loa)ves", r"\1f"),
        ("(kni|wi)ves", r"\1fe"),
        ("(ss|us|is)", r"\1"),
        ("shoes", "shoe"),
        ("oes", "o"),
        ("(.[^aeiou])ies", r"\1y"),
        ("(ss|sh|ch|x|zz)es", r"\1"),
        ("([^aeo]us)es", r"\1"),
        (r"(\w{3})s", r"\1"),
    )
)
