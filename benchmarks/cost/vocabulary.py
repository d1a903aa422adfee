"""What the random models read and say: a tokenizer of made-up words, and which of them pass for nouns."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import mmneurons as mmn
from mmneurons.settings import ANSWER_PREFIX
from mmneurons.words import HantaTagger, Noun, nouns

NOUNS_PER_CAPTION = 3
PAD, BEGIN, END = 0, 1, 2


def made_up(n_tokens: int, special: Mapping[str, str]) -> tuple[PreTrainedTokenizerFast, int]:
    """Byte-level BPE of made-up words (space, then three letters or four) and the id of the first of them.

    Args:
        n_tokens: Size of the vocabulary.
        special: Tokens of the model's own by name, from id 3 on.
    """
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    merges = [(a, b) for a, b in pairs] + [("Ġ", pair) for pair in pairs]
    first = ["<pad>", "<s>", "</s>", *special.values()]
    tokens = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    first_word = len(tokens)
    endings = [(f"Ġ{pair}", end) for ends in (letters, pairs) for pair in pairs for end in ends]
    merges += endings[: n_tokens - first_word]
    tokens += [a + b for a, b in endings[: n_tokens - first_word]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(first)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(special),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, first_word


class FirstWords(HantaTagger):
    """HanTa does its work; then the first words are called nouns: what random weights say has none."""

    def nouns(self, text: str) -> list[Noun]:
        """The first words after the answer prefix."""
        super().nouns(text)
        words = list(re.finditer(r"\w+", text))[len(ANSWER_PREFIX.split()) :]
        return [Noun(*word.span(), word[0]) for word in words[:NOUNS_PER_CAPTION]]


@contextmanager
def nouns_of(vlm: mmn.VLM) -> Iterator[None]:
    """Inside, `find` takes the first words of a random model's captions for nouns; the pocket model's are real."""
    if vlm.is_pocket:
        yield
        return
    with mock.patch.object(nouns, "tagger_for", return_value=FirstWords()):
        yield
