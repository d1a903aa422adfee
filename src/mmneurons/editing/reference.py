"""What an edit shall leave as it is: answers about images, and texts. Made once, used for any number of edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmneurons.editing.steps import Said, Steps, answer_steps, join, occurrences, text_steps
from mmneurons.errors import SettingError
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.vlm import VLM, Picture


@dataclass(frozen=True, eq=False)
class Reference:
    """Steps of answers and texts of the unedited model; from `make_reference`."""

    said: Said | None
    images: tuple[Picture, ...]
    """Those that `said` is about, to be captioned again with an edit."""
    prompt: str
    answer_prefix: str
    max_new_tokens: int
    texts: tuple[str, ...]
    text_steps: Steps | None

    @cached_property
    def steps(self) -> Steps:
        """Of the answers, then of the texts."""
        parts = [] if self.said is None else [self.said.steps]
        return join(parts if self.text_steps is None else [*parts, self.text_steps])

    @property
    def facts(self) -> dict[str, object]:
        """What a patch says of it."""
        return {"images": len(self.images), "texts": len(self.texts), "prompt": self.prompt, "steps": len(self.steps)}

    def says(self, vlm: VLM, word: str) -> Bool[Tensor, "steps"]:
        """Which of `steps` write a word."""
        rows = torch.zeros(len(self.steps), dtype=torch.bool)
        if self.said is not None:
            for answer, found in occurrences(vlm, self.said, word):
                rows[[self.said.row(answer, step) for step in found.steps]] = True
        return rows

    def without(self, vlm: VLM, word: str) -> Steps:
        """The steps that do not write a word."""
        return self.steps.at(~self.says(vlm, word))

    def by_image(self, vlm: VLM, word: str, values: Float[Tensor, "steps"]) -> list[float]:
        """For each image the largest of the values of its answer's steps; minus infinity where it says a word."""
        assert self.said is not None
        values = values.clone()
        values[self.says(vlm, word)[: len(values)]] = torch.inf
        worst = torch.full((len(self.images),), -torch.inf)
        worst = worst.scatter_reduce(0, self.said.steps.answers, values, "amax")
        return [-torch.inf if value == torch.inf else value for value in worst.tolist()]


def make_reference(
    vlm: VLM,
    images: Sequence[Picture] = (),
    texts: Sequence[str] = (),
    *,
    prompt: str = PROMPT,
    answer_prefix: str = ANSWER_PREFIX,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Let the model answer about images and read texts, unedited.

    Args:
        vlm: The model, from `load`, without patches.
        images: Unlike each other and like what the edited model will see; 100 and more.
        texts: Sentences, read without an image.
        prompt: What the model is asked about each image.
        answer_prefix: Words that the answer is made to begin with.
        max_new_tokens: Where to stop if the model does not.
        batch_size: Images in one batch.
        progress: Called with images done.

    Raises:
        SettingError: neither image nor text.
        ModelError: texts for an encoder-decoder.
    """
    if not images and not texts:
        raise SettingError("A reference needs images or texts.", fix="make_reference(vlm, [image, ...])")
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    said = answer_steps(vlm, images, prompt, answer_prefix, **options) if images else None
    read = text_steps(vlm, texts) if texts else None
    return Reference(said, tuple(images), prompt, answer_prefix, max_new_tokens, tuple(texts), read)
