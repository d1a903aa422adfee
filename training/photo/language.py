"""The frozen language model, and how well it says what it is to say of image tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captions import ASKED, caption
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.photo.convert import CHAT, language
from mmneurons.settings import PROMPT

USUAL, SHORT = 0.9, 0.9
"""Share of the batches with the usual question, and among these of those that leave it out: half as many tokens."""


class Reader:
    """SmolLM2 reading image tokens.

    Args:
        work: Where it is kept once it was read from its package.
    """

    def __init__(self, work: Path) -> None:
        self.model, self.tokenizer = language_model(work)
        self.embedding: Float[Tensor, "vocabulary hidden"] = self.model.get_input_embeddings().weight

    def words(self, nouns: Sequence[str]) -> Float[Tensor, "nouns hidden"]:
        """The input embedding of each noun, a mean over its tokens."""
        return torch.stack([self.embedding[self.ids(f" {noun}")].mean(0) for noun in nouns])

    def losses(
        self,
        image: Float[Tensor, "rows tokens hidden"],
        places: Int[Tensor, "rows tokens"],
        side: int,
        named: Sequence[Sequence[str]],
        rng: random.Random,
        *,
        whole: bool = False,
    ) -> Float[Tensor, "rows"]:
        """Negative log-probability, in nats, of the caption of each picture.

        Args:
            image: Image tokens.
            places: Where in the grid each is, row by row; those left out keep their places in the sequence.
            side: Of the grid.
            named: What is to be said of each picture.
            rng: Draws the question.
            whole: Whether it is the usual one, never cut short.
        """
        # 1. The same question for all, and for each its answer.
        rows, n_kept = image.shape[:2]
        before, after, begin = self._question(rng, whole)
        ends = [self.tokenizer.eos_token_id]
        answers = [self.ids(f"{begin} {caption(nouns)}" if begin else f" {caption(nouns)}") + ends for nouns in named]
        length = max(map(len, answers))
        ids = torch.tensor([answer + ends * (length - len(answer)) for answer in answers])
        wanted = torch.tensor([answer + [-100] * (length - len(answer)) for answer in answers])
        # 2. The language model, from embeddings on.
        shared = [self.embedding[part].expand(rows, -1, -1) for part in (before, after)]
        embedded = torch.cat([shared[0], image, shared[1], self.embedding[ids[:, :-1]]], 1)
        behind = torch.arange(embedded.shape[1] - len(before) - n_kept) + len(before) + side**2
        positions = torch.cat(
            [torch.arange(len(before)).expand(rows, -1), places + len(before), behind.expand(rows, -1)], 1
        )
        counts = wanted != -100
        # 3. Its vocabulary is half of the work: it is asked where something is to be said, and in one product.
        logits = self.model.lm_head(self._hidden(embedded, positions)[:, -length:][counts])
        each = F.cross_entropy(logits, wanted[counts], reduction="none")
        return torch.zeros(rows, length).masked_scatter(counts, each).sum(1)

    def _question(self, rng: random.Random, whole: bool) -> tuple[list[int], list[int], str]:
        """Tokens before and behind the image, and words that the answer begins with by itself."""
        prompt, prefix, begin = ASKED[0] if whole or rng.random() < USUAL else rng.choice(ASKED[1:])
        before, after = CHAT.split("{image}")
        after = after.format(prompt=prompt) + prefix
        if prompt == PROMPT and not whole and rng.random() < SHORT:
            before, after = before.partition("user")[0], f"\n{prefix}"
        return self.ids(before), self.ids(after), begin

    def _hidden(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states. The mask is given, since positions with gaps look like several packed texts."""
        n = embedded.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None].expand(len(embedded), 1, n, n)
        return self.model.model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, special ones by their names."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def language_model(work: Path) -> tuple[Any, Any]:
    """The language model, read from its package once and kept as safetensors."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = work / "language"
    if not (folder / "tokenizer.json").exists():
        model, tokenizer = language()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)
