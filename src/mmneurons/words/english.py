"""English nouns: their singular, their plural, and one spelling for what reads the same."""

from __future__ import annotations

import re
import unicodedata

SHORTEST = 3
"""Letters that a token has at least to say a noun."""


def singular(noun: str) -> str:
    """Return the singular of an English noun or compound, in lower case; any other word comes back in lower case.

    It goes by the ending and a table of irregular nouns, blind to context: "leaves" are a tree's, "glasses" hold water.
    Nouns that have no singular stay as they are: "scissors", "jeans", "people".
    """
    # Only the last word of a compound has a plural: "fire trucks", "merry-go-rounds".
    word = " ".join(plain(noun).lower().split())
    last = re.split("[ -]", word)[-1]
    head = word[: len(word) - len(last)]
    if last in _IRREGULAR:
        return head + _IRREGULAR[last]
    for ending, one in _ENDINGS:
        if ending.search(last):
            return head + ending.sub(one, last)
    return word


def inflected(noun: str, like: str) -> str:
    """Bring a singular noun into the form of another word: "cat" like "dogs" is "cats", like "Dog" is "Cat".

    A plural counts if `singular` leads back from it to the noun; a noun that has none comes back as it is.

    Args:
        noun: The noun, in the singular and in lower case.
        like: The word whose number and first letter it takes on.
    """
    form = noun
    if singular(like) != like.lower() and noun not in _ONE_FORM:
        irregular = [plural for plural, one in _IRREGULAR.items() if one == noun and plural != noun]
        # Candidates, the likeliest first; the first that `singular` undoes is taken, so that the two never disagree.
        regular = [noun + "es", noun + "s"] if re.search("(s|sh|ch|x|z)$", noun) else [noun + "s", noun + "es"]
        ending = [re.sub(one, many, noun) for one, many in _PLURALS if re.search(one, noun)]
        form = next((f for f in [*irregular, *ending, *regular] if singular(f) == noun and f != noun), noun)
    return form[0].upper() + form[1:] if like[:1].isupper() else form


def plain(text: str) -> str:
    """Return one spelling for what reads the same: composed accents, plain wide letters, straight apostrophes."""
    return unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u02bc", "'")


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
# Tried in order, and the first that fits is used: "ss" before "s", or "glass" would lose a letter.
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


def same_stem(noun: str, token: str, said: str) -> bool:
    """Whether a token says a noun: the token that was said, the same word in another number, or the same beginning.

    The same beginning: four letters at least, and all but two letters of the shorter word ("swim", "swimming"). Tokens
    of fewer than three letters begin too many words, and never count.

    Args:
        noun: The noun, singular or plural.
        token: What a neuron says, as text.
        said: The token by which the noun was said, as text.
    """
    word = token.strip().lower()
    if len(word) < SHORTEST or not word.isalpha():
        return False
    if word == said.strip().lower() or singular(word) == singular(noun):
        return True
    shared = next((i for i, (a, b) in enumerate(zip(word, noun, strict=False)) if a != b), min(len(word), len(noun)))
    return shared >= max(SHORTEST + 1, min(len(word), len(noun)) - 2)
