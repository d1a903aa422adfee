"""Words of a generated text, the nouns among them, and the generated tokens that wrote each word.

Every word is looked up among the tokens by its own characters. A list of words is never paired with a list of tokens by
place, so a noun left out cannot shift the others. The text is never encoded again: it need not split into the tokens
that it was written with.
"""

from mmneurons.words.english import inflected as inflected
from mmneurons.words.english import same_stem as same_stem
from mmneurons.words.english import singular as singular
from mmneurons.words.nouns import HantaTagger as HantaTagger
from mmneurons.words.nouns import Noun as Noun
from mmneurons.words.nouns import SpacyTagger as SpacyTagger
from mmneurons.words.nouns import Tagger as Tagger
from mmneurons.words.nouns import find_nouns as find_nouns
from mmneurons.words.nouns import tagger_for as tagger_for
from mmneurons.words.search import Phrases as Phrases
from mmneurons.words.search import find_words as find_words
from mmneurons.words.search import says as says
from mmneurons.words.search import turned as turned
from mmneurons.words.spans import Decode as Decode
from mmneurons.words.spans import Place as Place
from mmneurons.words.spans import Word as Word
from mmneurons.words.spans import token_spans as token_spans
from mmneurons.words.spans import words_at as words_at
