"""Search for given words in a text, in any script: the one way to find them, for `find`, edits, CHAIR and POPE."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import regex

from mmneurons.errors import WordError
from mmneurons.words.english import singular
from mmneurons.words.spans import Decode, Place, Word, words_at

# As HanTa's corpus splits them: "dog" + "'s", "do" + "n't"; hyphens and other apostrophes stay inside a word.
_CLITIC = r"(?:n['\u2019\u02bc]t|['\u2019\u02bc](?:s|re|ve|ll|d|m))\b"
# Scripts that put no spaces between words: each letter is a token, so that words asked for are found by characters. A
# word in katakana is one, as a rule: bread (パン) is not in panda (パンダ).
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_KATAKANA = r"[\p{Katakana}\u30fc\uff70\uff9e\uff9f]"
_HANGUL = r"\p{Hangul}"
_LETTER = rf"(?:(?!{_CLITIC}|{_UNSPACED}|{_KATAKANA}|{_HANGUL}|\u02bc)[\p{{L}}\p{{N}}]\p{{M}}*)"
TOKEN = regex.compile(
    rf"{_CLITIC}|(?={_UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*|(?:{_KATAKANA}\p{{M}}*)+|(?:{_HANGUL}\p{{M}}*)+"
    rf"|{_LETTER}+(?:(?!{_CLITIC})[-'\u2019\u02bc]{_LETTER}+)*|[^\p{{L}}\p{{N}}_\s]",
    regex.IGNORECASE,
)
"""A pattern that splits a text into words, clitics and signs; in scripts without spaces, into letters."""
# l'herbe, qu'un, dell'erba: the word begins behind it as well.
_ELISION = regex.compile(
    r"(?:[cdjlmnst]|(?:jus|lors|puis|quoi)?qu|[dns]?[aeu]ll|coll|un|quest|quell)['\u2019\u02bc](?=\p{L})",
    regex.IGNORECASE,
)
_IS_HANGUL = regex.compile(_HANGUL)
_BEGINS_UNSPACED = regex.compile(rf"{_UNSPACED}|{_KATAKANA}")
# Korean particles and the copula stand at the end of a noun's last word.
_PARTICLES = regex.compile(
    "들?(?:이|가|은|는|을|를|의|께서|과|와|이?랑|하고|도|만|까지|부터|보다|처럼|마다|이?나"
    "|(?:에|에서|에게|에게서|한테|으?로)(?:는|도|만|의)?|입니다|이다|이에요|예요|이고|이며)?"
)


def find_words(wanted: str | Sequence[str], caption: str, token_ids: Sequence[int], decode: Decode) -> list[Word]:
    """Find every occurrence of given words or phrases, nouns or not, each with the tokens that wrote it.

    Whole words are found, whatever their case, and the singular for the plural and the reverse: "hot dog" is found in
    "Two Hot dogs".

    Args:
        wanted: A word or phrase, or several.
        caption: The generated text, `decode(token_ids).strip()`.
        token_ids: Every generated token, end-of-text and padding included, those of the prompt left out.
        decode: A function from token ids to text that skips special tokens.

    Returns:
        The words in order of appearance, each place once; at least one Word for each of `wanted`.

    Raises:
        WordError: one of `wanted` is not in the caption, or `caption` is not what the tokens decode to.
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
    """Tell whether a caption says a word or phrase, by the rules of `find_words`."""
    return bool(_phrase(phrase).places(caption))


def is_unspaced(word: str) -> bool:
    """Tell whether a word begins in a script that puts no spaces between words."""
    return _BEGINS_UNSPACED.match(word) is not None


def turned(caption: str, source: str, target: str | None) -> bool:
    """Tell whether a caption does what an edit wants: it says `target`, if there is one, and not `source`."""
    return not says(caption, source) and (target is None or says(caption, target))


class Phrases:
    """A set of words and phrases to look for in texts, each with what it stands for.

    Whole words are found, whatever their case, and the singular for the plural and the reverse. A phrase is found where
    its words follow each other with nothing but white space between them. The French or Italian article elided before a
    word, and the Korean particle behind it, are left out. Where a script puts no spaces between words, they are found
    by their characters.

    Args:
        meanings: What each word or phrase stands for: its lemma, or the name of an object.
    """

    def __init__(self, meanings: Mapping[str, str]) -> None:
        # Both sides of a comparison go through `singular`, so that plurals and capitals need no rules of their own.
        self._meanings = {singular(phrase): meaning for phrase, meaning in meanings.items()}
        self._longest = max((len(TOKEN.findall(phrase)) for phrase in meanings), default=0)

    def places(self, text: str) -> list[Place]:
        """Find the places of all phrases, in order: at each word the longest, none that begins inside another."""
        tokens = [match.span() for match in TOKEN.finditer(text)]
        found: list[Place] = []
        for i, (first, _) in enumerate(tokens):
            if found and first < found[-1][1]:
                continue
            for last in reversed(tokens[i : i + self._longest]):
                place = self._place(text, tokens[i], last)
                if place is not None:
                    found.append(place)
                    break
        return found

    def _place(self, text: str, first: tuple[int, int], last: tuple[int, int]) -> Place | None:
        """Find a phrase that runs from one token to another, less an elided article or a particle."""
        for start in _starts(text, *first):
            for stop in _stops(text, *last):
                meaning = self._meanings.get(singular(text[start:stop]))
                if meaning is not None:
                    return start, stop, meaning
        return None


def _starts(text: str, start: int, stop: int) -> Iterator[int]:
    """Yield the places where the word that a token begins may begin: the token's own, and behind an elided article."""
    yield start
    elided = _ELISION.match(text, start, stop)
    if elided:
        yield elided.end()


def _stops(text: str, start: int, stop: int) -> Iterator[int]:
    """Yield the places where the word that a token ends may end: the token's own, and before a Korean particle."""
    yield stop
    if _IS_HANGUL.match(text, start):
        yield from (end for end in range(stop - 1, start, -1) if _PARTICLES.fullmatch(text, end, stop))


@functools.lru_cache(maxsize=256)
def _phrase(phrase: str) -> Phrases:
    return Phrases({phrase: singular(phrase)})
