"""The language of a text, as far as it matters here: English, German or Dutch, whose nouns HanTa knows, or another."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import regex

from mmneurons.words.english import plain

Language = Literal["en", "de", "nl"]

_WORD = regex.compile(r"\p{Latin}[\p{Latin}\p{M}]*")
_OTHER_LETTER = regex.compile(r"(?!\p{Latin})\p{L}")
_GERMAN = frozenset("der das dem ein eine einen einem einer eines und auf mit im ist sind zwei drei vor neben".split())
_DUTCH = frozenset("een het van op met naar bij aan zijn twee drie voor naast".split())
# Articles, "and", "with", "in", "is" of more languages. None of these is a word of English captions.
_FOREIGN = (_GERMAN | _DUTCH) - {"van", "met"} | frozenset(
    """
    un una unos unas y con en del por para es está están une des dans avec sur les dos gli il lo che è sono nel nella
    della sulla um uma e em na os och ett på og er ja w z jest je ve bir bu dan yang seekor sebuah și cu pe egy és az và
    trên một
    """.split()
)
_NAMES = frozenset("el la los las de du des da au le den di et".split())
"""Foreign words, too, but so usual in English names ("Los Angeles") that a short text with one is still English."""
_SHORT = 4
"""From how many words on a text is long enough to be judged by the share of its English words."""


def language_of(text: str) -> Language | None:
    """Tell the language of a text, as far as HanTa's vocabulary and a few articles show it; in doubt it is English.

    None stands for another language: the text is mostly in another script; or it is in Latin letters with fewer English
    words than words of other languages; or, from four words on, less than a quarter of them are English (less than half
    if one is foreign).
    """
    words = [plain(word).lower() for word in _WORD.findall(text)]
    if len(_OTHER_LETTER.findall(text)) > sum(map(len, words)):
        return None
    # English, unless foreign words outnumber English ones, or a text long enough has too few English words.
    is_long = len(words) >= _SHORT
    foreign = sum(word in _FOREIGN or (is_long and word in _NAMES) for word in words)
    known = sum(word not in _FOREIGN and word in _english() for word in words)
    strange = is_long and (4 if foreign == 0 else 2) * known < len(words)
    if known >= foreign and not strange:
        return "en"
    # What is not English is German or Dutch only on evidence: a quarter of its words are among the most usual ones.
    german, dutch = (sum(word in mine for word in words) for mine in (_GERMAN, _DUTCH))
    if 4 * max(german, dutch) < len(words):
        return None
    return "de" if german >= dutch else "nl"


@functools.cache
def hanta(language: Language) -> Any:
    """Load HanTa's tagger for a language; once, as it takes a while."""
    from HanTa import HanoverTagger

    name = {"en": "en", "de": "ger", "nl": "dutch"}[language]
    # By its full path: HanTa would otherwise unpickle a file of that name from the working directory.
    return HanoverTagger.HanoverTagger(str(Path(HanoverTagger.__file__).with_name(f"morphmodel_{name}.pgz")))


@functools.cache
def _english() -> frozenset[str]:
    """The words that are frequent in HanTa's English corpus, less names, letters, and foreign words that it quotes."""
    tagger = hanta("en")
    skipped = {"UNC", "NP0", "ZZ0"}
    return frozenset(
        word
        for word, tags in tagger.cache.items()
        if tagger.int2tag[max(tags, key=lambda tag: tag[1])[0]] not in skipped
    )
