"""Write a prompt as a model expects it, and turn it into the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import date
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from mmneurons.errors import ModelError, SettingError
from mmneurons.vlm.locking import restored
from mmneurons.vlm.processors import ImageAndTokenizer
from mmneurons.vlm.template import REFUSALS, joined, rendered_turn
from mmneurons.vlm.tokens import ids_of

WORDINGS = ("What is in the image?", "Write a short caption.", "What do you see?")
"""Other ways to ask for a caption."""


def prompt_text(
    processor: Any,
    prompt: str,
    answer_prefix: str = "",
    n_images: int = 1,
    *,
    image_token: str = "",
    day: date | None = None,
) -> str:
    """Write the text of one prompt, by the chat template of processor or tokenizer, or as it is without one.

    Args:
        processor: The model's processor.
        prompt: What is asked.
        answer_prefix: Words that the answer is made to begin with; they stand at the end.
        n_images: Number of pictures in front of the prompt; 0 for words alone.
        image_token: Text that stands for a picture, where no template and no processor would write it: it is put
            before the prompt once for each picture, on a line of its own.
        day: The day that the template takes for today; None for the real one.

    Returns:
        The text, not yet expanded to one token per patch.
    """
    text = rendered_turn(processor, prompt, n_images, image_token=image_token, day=day)
    if text is None:
        text = f"{image_token}\n" * n_images + prompt if image_token else prompt
    return joined(processor, text, answer_prefix)


def image_lengths(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many image tokens pictures of these sizes, (width, height), become, by the processor's own count.

    Where a processor does not count, all are 0: what is ordered by these numbers then stays in its order.
    """
    try:
        counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
        lengths = [int(n) for n in counted.num_image_tokens]
        return lengths if len(lengths) == len(sizes) else [0] * len(sizes)
    except Exception:  # noqa: BLE001 - no processor has to offer this, and nothing but time depends on it
        return [0] * len(sizes)


def encode_prompt(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    prompt: str,
    answer_prefix: str = "",
    *,
    image_token_id: int | None = None,
    padding_side: str = "left",
    decoder_start: int | Sequence[int] | None = None,
    keep_end: bool = False,
    names: Collection[str] | None = None,
    day: date | None = None,
) -> BatchFeature:
    """Encode a batch as model inputs: in each row the same prompt, and pictures of its own.

    Families differ in whether the text must hold a token for each picture, and in whether pictures are given row by
    row or in one list; both are found out by trying.

    Args:
        processor: The model's processor.
        images: For each row its RGB pictures, as many in each row; none for words alone.
        prompt: What is asked.
        answer_prefix: Words that the answer is made to begin with.
        image_token_id: Token that stands for a patch in `input_ids`; None if nothing does, or if it is not known.
        padding_side: "left" for decoders, which continue the text; "right" for encoders with absolute positions.
        decoder_start: For encoder-decoder models, the token or tokens that a decoder's text begins with.
        keep_end: Whether an end-of-text token that the tokenizer writes stays; BLIP takes it away itself.
        names: Arguments that the model's `forward` takes; anything else is left out. None keeps all that was made.
        day: The day that the chat template takes for today; None for the real one.

    Returns:
        Tensors, on the CPU, in the processor's dtype. `input_ids` ends with the answer prefix; or, with
        `decoder_start`, `decoder_input_ids` does, and there is no `input_ids` if only the decoder reads words.

    Raises:
        SettingError: if rows have different numbers of pictures, or there are none; or words hold a picture's token.
        ModelError: if the processor takes the prompt in no form.
    """
    if len({len(row) for row in images}) != 1:
        raise SettingError("Every row has the same number of pictures.", seen=f"{[len(row) for row in images]}")
    _check_words(processor, f"{prompt}\n{answer_prefix}", image_token_id)
    answer_prefix = answer_prefix.strip(" ")  # a space at the end would be a token of its own, before one of the answer
    in_text = answer_prefix if decoder_start is None else ""
    # Decoder-only: the prefix stands at the end of the prompt. Some processors end a prompt with a token or text of
    # their own behind it; then it is encoded without the prefix, whose tokens are appended.
    written = partial(prompt_text, processor, prompt, day=day)
    with _padded(processor.tokenizer, padding_side):
        batch = _encode(processor, images, written, in_text, image_token_id, padding_side)
        if decoder_start is None and not keep_end and "input_ids" in batch:
            _open_end(batch, processor.tokenizer)
            if in_text and not _ends_with(batch, processor.tokenizer, in_text):
                batch = _encode(processor, images, written, "", image_token_id, padding_side)
                _append(batch, ids_of(processor.tokenizer, in_text), image_token_id)
    # Encoder-decoder: the prefix is the beginning of the decoder's own sequence.
    if decoder_start is not None:
        start = [decoder_start] if isinstance(decoder_start, int) else list(decoder_start)
        begun = torch.tensor(start + ids_of(processor.tokenizer, answer_prefix))
        batch["decoder_input_ids"] = begun.repeat(len(images), 1)
    if names is not None:
        for name in set(batch) - {*names, "decoder_input_ids"}:
            del batch[name]
    return batch


def _check_words(processor: Any, words: str, image_token_id: int | None) -> None:
    """Refuse words that hold the token of a picture, which is written here, once for each picture."""
    tokens = {str(_of_either(processor, "image_token") or ""), str(_of_either(processor, "video_token") or "")}
    added = getattr(processor.tokenizer, "added_tokens_decoder", {})
    if image_token_id in added:
        tokens.add(str(added[image_token_id]))
    if held := next((token for token in sorted(tokens - {""}) if token in words), None):
        raise SettingError(
            f"The prompt holds '{held}', which stands for a picture.",
            fix=f"Leave '{held}' out: it is put in front of the words for each picture that is given.",
        )


def _encode(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    written: Callable[..., str],
    answer_prefix: str,
    image_token_id: int | None,
    padding_side: str,
) -> BatchFeature:
    """Encode the first form of a prompt that the processor takes and in which the pictures have image tokens.

    `written` is `prompt_text` of this prompt, which lacks the answer prefix and the number of pictures.
    """
    n_images = len(images[0])
    token = str(_of_either(processor, "image_token") or "")
    image_id = image_token_id if image_token_id is not None else _of_either(processor, "image_token_id")
    # The forms: as the template or the processor writes it, then with the token of each picture in the text.
    texts = [written(answer_prefix, n_images)]
    if token and n_images:
        texts.append(written(answer_prefix, n_images, image_token=token))
    taken: list[BatchFeature] = []
    refused: list[Exception] = []
    for text in dict.fromkeys(texts):
        try:
            batch = _called(processor, images, text, padding_side)
            # The same text for one picture as for several: the pictures are not in it, and the processor may use the
            # first one only. More image tokens for all than for one show that it does not.
            if n_images > 1 and text == written(answer_prefix, 1):
                one = _n_patches(_called(processor, [images[0][:1]], text, padding_side), image_id)
                if _n_patches(batch, image_id) <= one or image_id is None:
                    refused.append(ValueError("It takes one picture for a prompt."))
                    if one or image_id is None:  # it writes the token of the picture itself
                        break
                    continue
        except REFUSALS as error:
            refused.append(error)
            continue
        batch.pop("labels", None)  # some processors add it for training
        # Taken, and the pictures are in it as far as can be told; else the next form may be better.
        if not n_images or image_id is None or "input_ids" not in batch or _n_patches(batch, image_id):
            return batch
        taken.append(batch)
    if taken:
        return taken[0]
    raise ModelError(
        f"The processor cannot encode a prompt with {n_images} picture{'' if n_images == 1 else 's'}.",
        seen="\n".join(f"{type(processor).__name__}: {shorten(str(error), 300)}" for error in refused),
        fix='Give tensors made elsewhere: inputs={"input_ids": ..., "pixel_values": ...}',
    ) from refused[0]


def _n_patches(batch: BatchFeature, image_token_id: int | None) -> int:
    """Count the image tokens of the first row."""
    if image_token_id is None or "input_ids" not in batch:
        return 0
    return int((batch["input_ids"][0] == image_token_id).sum())


def _called(processor: Any, images: Sequence[Sequence[Image.Image]], text: str, padding_side: str) -> BatchFeature:
    """Encode one text in every row; pictures are given row by row, or in one list if the processor refuses that."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": padding_side}
    if not isinstance(processor, ImageAndTokenizer):
        options["text"] = [text] * len(images)
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and bos in text:
        options["add_special_tokens"] = False  # the chat template has written it already
    if images[0]:
        options["images"] = [list(row) for row in images]
    try:
        batch = _tolerant(processor, options)
    except REFUSALS:
        if not images[0]:
            raise
        options["images"] = [image for row in images for image in row]
        batch = _tolerant(processor, options)
    # Two tokens for the beginning of text would be a prompt that the model has never seen.
    if _n_bos(batch, processor.tokenizer) > 1:  # some processors add one of their own
        other = _tolerant(processor, options | {"add_special_tokens": False})
        return other if _n_bos(other, processor.tokenizer) else batch
    return batch


def _tolerant(processor: Any, options: dict[str, Any]) -> BatchFeature:
    """Call a processor, without `padding_side` if it does not know that: the tokenizer is set to the side as well."""
    try:
        return processor(**options)
    except TypeError as error:
        if "padding_side" not in str(error):
            raise
        return processor(**{name: value for name, value in options.items() if name != "padding_side"})


def _n_bos(batch: BatchFeature, tokenizer: Any) -> int:
    """Count the tokens for the beginning of text in the first row, padding aside."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or "input_ids" not in batch:
        return 0
    written = batch["input_ids"][0] == bos
    if "attention_mask" in batch:
        written &= batch["attention_mask"][0].bool()
    return int(written.sum())


@restored
def _padded(tokenizer: Any, side: str) -> Iterator[None]:
    """Let the tokenizer pad on this side inside the `with`, by its end token if it has none for padding."""
    own = tokenizer.padding_side
    lacks_pad = tokenizer.pad_token is None
    try:
        tokenizer.padding_side = side
        if lacks_pad:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        yield
    finally:
        tokenizer.padding_side = own
        if lacks_pad:
            tokenizer.pad_token = None


def _open_end(batch: BatchFeature, tokenizer: Any) -> None:
    """Remove the end-of-text tokens that a tokenizer writes behind every text, since the model is to go on."""
    ends = {getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")} - {None}
    while batch["input_ids"].shape[1] > 1 and set(batch["input_ids"][:, -1].tolist()) <= ends:
        for name, tensor in _by_position(batch).items():
            batch[name] = tensor[:, :-1]


def _ends_with(batch: BatchFeature, tokenizer: Any, words: str) -> bool:
    """Whether the first row ends with these words."""
    # Compared as text: behind other words their tokens can differ. Two tokens more are read, as their number can, too.
    ids = ids_of(tokenizer, words)
    written = tokenizer.decode(batch["input_ids"][0, -len(ids) - 2 :].tolist())
    return _squashed(written).endswith(_squashed(tokenizer.decode(ids)))


def _append(batch: BatchFeature, ids: list[int], image_token_id: int | None) -> None:
    """Append tokens to every row, for processors that end a prompt with something of their own."""
    written = batch["input_ids"]
    for name, tensor in _by_position(batch).items():
        # Every input with one entry per position grows as well, each by what it means for a token of text.
        fill = torch.zeros_like(tensor[:, :1]).repeat_interleave(len(ids), dim=1)
        if name == "input_ids":
            fill += torch.tensor(ids)
        elif name == "attention_mask":
            fill += 1
        elif tensor.ndim > 2:  # a mask of the pictures that each position sees
            fill += tensor[:, -1:]
        elif name == "token_type_ids" and image_token_id is not None:
            # Where pictures are of type 0, the types tell the prompt (0) from what is written after it (1).
            fill += 1 - int(tensor[written == image_token_id].max())
        batch[name] = torch.cat([tensor, fill], dim=1)


def _by_position(batch: BatchFeature) -> dict[str, Tensor]:
    """Return the tensors that have one entry for each position of `input_ids`."""
    shape = batch["input_ids"].shape
    return {name: t for name, t in batch.items() if name.endswith(("ids", "mask")) and t.shape[:2] == shape}


def _of_either(processor: Any, name: str) -> Any:
    """Return an attribute of the processor or, if it has none, of its tokenizer."""
    found = getattr(processor, name, None)
    return found if found is not None else getattr(processor.tokenizer, name, None)


def _squashed(text: str) -> str:
    """Remove spaces and case, which tokenizers do not give back faithfully; line ends stay."""
    return text.replace(" ", "").casefold()
