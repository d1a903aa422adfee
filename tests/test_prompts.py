import inspect
from datetime import date

import pytest
import torch
import transformers
from kits.library import hf, lacking
from kits.processor_zoo import FAMILIES, byte_level, metaspace_bpe, picture, processor, template, unigram, word_piece
from kits.tiny_models import TINY, tiny_model
from transformers import BatchFeature

from mmneurons.errors import ModelError, SettingError, WordError
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.processors import ImageAndTokenizer
from mmneurons.vlm.prompts import encode_prompt, image_lengths, prompt_text
from mmneurons.vlm.template import DATED, LEFT_OUT, prompt_notes
from mmneurons.vlm.tokens import text_of, token_of, tokens_of

# Of processors of transformers 5.23 that give a tensor to numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PREFIX = ANSWER_PREFIX
COUNTS = [(family, n) for family in FAMILIES for n in range(family.min_images, family.max_images + 1)]


def rows(n_rows: int, n_images: int) -> list:
    """Pictures of different size from row to row, so that rows of some families differ in length."""
    return [[picture(10 * i + j, 60 if i % 2 == 0 else 30) for j in range(n_images)] for i in range(n_rows)]


def image_id(found) -> int | None:
    """As the model's config has it."""
    known = getattr(found.tokenizer, "image_token_id", None) or getattr(found, "image_token_id", None)
    return known or found.tokenizer.get_vocab().get("<image>")


def squashed(text: str) -> str:
    return text.replace(" ", "").lower()


@pytest.mark.parametrize(("family", "n_images"), COUNTS, ids=[f"{f.model_type}-{n}" for f, n in COUNTS])
def test_every_family_takes_the_prompt(family, n_images):
    found = processor(family.model_type)
    tokenizer = found.tokenizer
    before = (tokenizer.padding_side, tokenizer.pad_token)
    one = encode_prompt(found, rows(1, n_images), PROMPT, PREFIX, image_token_id=image_id(found))
    two = encode_prompt(found, rows(2, n_images), PROMPT, PREFIX, image_token_id=image_id(found))
    assert (tokenizer.padding_side, tokenizer.pad_token) == before
    assert ("pixel_values" in one) == (n_images > 0)
    assert "labels" not in one
    ids, mask = two["input_ids"], two["attention_mask"]
    for row, real in zip(ids, mask.bool(), strict=True):
        written = tokenizer.decode(row[real])
        assert squashed(written).endswith(squashed(PREFIX))
        assert squashed(PROMPT) in squashed(written)
        assert row[real].tolist().count(tokenizer.bos_token_id) <= 1
    assert mask[:, -1].all()
    if n_images and family.n_tokens:
        n_tokens = n_images * family.n_tokens
        if family.model_type == "llava_onevision" and n_images > 1:
            n_tokens = n_images * (16 + 1)  # several pictures are not cut into tiles
        assert int((one["input_ids"] == image_id(found)).sum()) == n_tokens
    shorter = ids.shape[1] - one["input_ids"].shape[1]
    torch.testing.assert_close(ids[0, shorter:], one["input_ids"][0])
    assert not mask[0, :shorter].any()
    for name, tensor in two.items():
        if name.endswith(("ids", "mask")) and tensor.ndim == 2 and "aspect" not in name:
            assert tensor.shape == ids.shape, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_pictures_are_as_long_as_their_prompts(family):
    """But for what all prompts have, and for processors that do not count."""
    if family.model_type == "glm4v" and transformers.__version__.startswith("4."):
        lacking("Glm4vProcessor counts otherwise than it writes.")
    found, sizes = processor(family.model_type), [(60, 40), (30, 40), (200, 30), (120, 120), (16, 16)]
    lengths = image_lengths(found, sizes)
    if hasattr(found, "_get_num_multimodal_tokens"):
        prompts = [
            encode_prompt(found, [[picture(0, *size)]], PROMPT, image_token_id=image_id(found))["input_ids"].shape[1]
            for size in sizes
        ]
        assert len({prompt - length for prompt, length in zip(prompts, lengths, strict=True)}) == 1
    else:
        assert lengths == [0] * len(sizes)


def test_some_rows_are_padded():
    batch = encode_prompt(processor("llava_next"), rows(2, 1), PROMPT)
    assert batch["attention_mask"].sum(1).tolist() == [58, 60]
    assert batch["attention_mask"][0].tolist() == [0, 0] + [1] * 58


@pytest.mark.parametrize("model_type", ["git", "blip-2"])
def test_families_that_take_one_picture(model_type):
    found = processor(model_type)
    with pytest.raises(ModelError, match=r"with 2 pictures\.(.|\n)*takes one picture(.|\n)*inputs=\{"):
        encode_prompt(found, rows(1, 2), PROMPT, image_token_id=image_id(found))


def test_a_family_that_takes_no_words_alone():
    with pytest.raises(ModelError, match=r"with 0 pictures\.\nPaliGemmaProcessor: `images` are expected"):
        encode_prompt(processor("paligemma"), [[]], PROMPT)


@pytest.mark.parametrize("images", [[], rows(1, 1) + rows(1, 2)], ids=["none", "uneven"])
def test_rows_with_different_numbers_of_pictures(images):
    with pytest.raises(SettingError, match="same number of pictures"):
        encode_prompt(processor("llava"), images, PROMPT)


def test_the_answer_follows_the_line_end_of_paligemma():
    found = processor("paligemma")
    batch = encode_prompt(found, rows(2, 1), "caption", PREFIX, image_token_id=image_id(found))
    assert found.tokenizer.decode(batch["input_ids"][0]) == f"{'<image>' * 4}<s>caption\n{PREFIX}"
    n = len(found.tokenizer(PREFIX, add_special_tokens=False).input_ids)
    types = batch["token_type_ids"][0].tolist()
    assert types == [0] * (len(types) - n) + [1] * n  # not seen by the prompt, which sees itself whole


def test_a_template_gives_the_text():
    text = prompt_text(processor("llava"), "Which colour?", PREFIX, 2)
    assert text == f"USER: <image>\n<image>\nWhich colour? ASSISTANT: {PREFIX}"
    assert prompt_text(processor("llava"), "Which colour?", "", 0) == "USER: Which colour? ASSISTANT:"


class Plain:
    """A processor with a template of one's choice that keeps what it was called with."""

    image_token = "<image>"

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.calls = []

    def apply_chat_template(self, conversation, **options):
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)

    def __call__(self, text, images=None, **options):
        self.calls.append({"text": text, "images": images, **options})
        made = self.tokenizer(text, **options)
        if images is not None:
            made["pixel_values"] = torch.zeros(len(images), 1)
        return BatchFeature(made)


def test_a_template_for_words_alone_gets_the_image_token_as_a_word():
    words = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    found = Plain(byte_level({"image_token": "<image>"}), words)
    assert prompt_text(found, "a dog", "", 1) == "[a dog]"  # not the list of parts
    batch = encode_prompt(found, rows(1, 2), "a dog", PREFIX, image_token_id=image_id(found))
    assert found.tokenizer.decode(batch["input_ids"][0]) == f"<s>[<image>\n<image>\na dog] {PREFIX}"


def test_a_template_that_refuses_lists_gets_a_string():
    strict = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"
    assert prompt_text(Plain(byte_level({}), strict), "a dog", "", 0) == "a dog!"


def test_the_template_of_a_tokenizer_is_used_and_thinking_is_off():
    found = Plain(byte_level({}))
    found.tokenizer.chat_template = template("<image>") + "{% if enable_thinking is not false %}<think>{% endif %}"
    assert prompt_text(found, "a dog", "") == "USER: <image>\na dog ASSISTANT:"


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES if family.chat])
def test_the_template_of_every_family_is_used(model_type):
    # SmolVLM's processor asks its video part for settings while it renders: without torchvision it has none.
    assert prompt_text(processor(model_type), "a dog", PREFIX).startswith("USER: ")
    assert prompt_notes(processor(model_type), "a dog", 1) == []


def test_a_template_that_cannot_be_used_is_told():
    found = Plain(byte_level({}), "{{ raise_exception('Not for you.') }}")
    assert prompt_text(found, "a dog", PREFIX) == f"a dog {PREFIX}"
    assert prompt_notes(found, "a dog", 1) == [LEFT_OUT]
    assert prompt_notes(Plain(byte_level({})), "a dog", 1) == []


def test_of_several_templates_the_default_is_used():
    found = Plain(byte_level({}))
    found.chat_template = {"tool_use": "tools", "default": template("<image>")}  # pyright: ignore[reportAttributeAccessIssue]
    assert prompt_text(found, "a dog", "") == "USER: <image>\na dog ASSISTANT:"


@pytest.mark.parametrize(
    ("opens", "closes"), [("<think>\n", "<think>\n\n</think>"), ("[THINK]", "[THINK]\n\n[/THINK]")]
)
def test_a_place_for_thoughts_is_closed_before_the_answer_begins(opens, closes):
    found = Plain(byte_level({}), "{{ messages[0]['content'][-1]['text'] }}\n" + opens)
    assert prompt_text(found, "a dog", PREFIX, 0) == f"a dog\n{closes}\n\n{PREFIX}"
    plain = Plain(byte_level({}), "{{ messages[0]['content'][-1]['text'] }}\n" + opens + "None.</think>")
    assert prompt_text(plain, "a dog", "", 0).endswith("None.</think>")


def test_behind_a_token_of_its_own_a_byte_level_answer_begins_without_a_space():
    # As models of Tekken and Granite are trained: [/INST]An, and not [/INST] An.
    chat = "{{ messages[0]['content'][-1]['text'] }}[/INST]"
    for tokenizer, end in ((byte_level({"end": "[/INST]"}), "[/INST]An image"), (byte_level({}), "[/INST] An image")):
        assert prompt_text(Plain(tokenizer, chat), "a dog", "An image", 0) == f"a dog{end}"
    assert prompt_text(Plain(metaspace_bpe(), chat), "a dog", "An image", 0) == "a dog[/INST] An image"


DATED_TEMPLATE = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}: {% endif %}{{ messages[0]['content'] }}"
)


def test_the_date_of_a_template_can_be_chosen_and_is_told():
    found = Plain(byte_level({}), DATED_TEMPLATE)
    day = date(2024, 7, 26)
    assert prompt_text(found, "a dog", "", 0, day=day) == "26 Jul 2024: a dog"
    batch = encode_prompt(found, [[]], "a dog", day=day)
    assert "26 Jul 2024" in found.tokenizer.decode(batch["input_ids"][0])
    assert prompt_text(found, "a dog", "", 0).startswith(date.today().strftime("%d %b %Y"))
    assert prompt_notes(found, "a dog", 0) == [DATED]
    assert prompt_notes(found, "a dog", 0, day) == []
    # A date that is written into other prompts only is not told.
    assert prompt_notes(Plain(byte_level({}), "{% if tools %}" + DATED_TEMPLATE + "{% endif %}a dog"), "a dog", 0) == []


def test_a_date_that_cannot_be_chosen_is_refused():
    found = Plain(byte_level({}), "{% set form = '%Y' %}{{ strftime_now(form) }} {{ messages[0]['content'] }}")
    with pytest.raises(SettingError, match="cannot be chosen"):
        prompt_text(found, "a dog", "", 0, day=date(2024, 7, 26))
    assert prompt_notes(found, "a dog", 0) == [DATED]


def test_a_template_that_writes_the_first_token_itself():
    found = Plain(byte_level({"image_token": "<image>"}), template("<image>", bos="{{ bos_token }}"))
    batch = encode_prompt(found, rows(1, 1), "a dog", PREFIX)
    assert found.tokenizer.decode(batch["input_ids"][0]) == f"<s>USER: <image>\na dog ASSISTANT: {PREFIX}"
    assert len(found.calls) == 1


def test_without_a_template_the_image_token_is_written_only_where_it_is_missing():
    found = Plain(byte_level({"image_token": "<image>"}))
    batch = encode_prompt(found, rows(1, 1), "a dog", image_token_id=image_id(found))
    assert [call["text"] for call in found.calls] == [["a dog"], ["<image>\na dog"]]
    assert found.tokenizer.decode(batch["input_ids"][0]) == "<s><image>\na dog"
    other = Plain(found.tokenizer)
    encode_prompt(other, rows(1, 1), "a dog", image_token_id=found.tokenizer.encode("a")[-1])
    assert [call["text"] for call in other.calls] == [["a dog"]]


def test_a_processor_that_takes_pictures_in_one_list_and_knows_no_padding_side():
    class Flat(Plain):
        def __call__(self, text, images=None, return_tensors=None, padding=None):  # pyright: ignore
            if images and isinstance(images[0], list):
                raise ValueError("Pictures, not lists.")
            assert self.tokenizer.padding_side == "left"
            return super().__call__(text, images, return_tensors=return_tensors, padding=padding)

    found = Flat(byte_level({}))
    found.tokenizer.padding_side = "right"
    assert encode_prompt(found, rows(2, 1), "a dog")["pixel_values"].shape == (2, 1)
    assert found.tokenizer.padding_side == "right"


def test_a_processor_that_refuses_says_why():
    class Refuses(Plain):
        def __call__(self, *_, **__):
            raise ValueError("There is no\n  way.")

    with pytest.raises(ModelError, match=r"with 1 picture\.\nRefuses: There is no way\.\n"):
        encode_prompt(Refuses(byte_level({})), rows(1, 1), "a dog")


def test_a_tokenizer_without_padding_stays_so():
    found = Plain(byte_level({}, pad=False))
    encode_prompt(found, rows(2, 0), "a dog")
    assert found.calls[0]["padding"]
    assert found.tokenizer.pad_token is None
    with pytest.raises(TypeError):
        encode_prompt(found, rows(1, 1), 1)  # pyright: ignore[reportArgumentType]
    assert found.tokenizer.pad_token is None


def test_what_a_tokenizer_writes_behind_a_text_goes_unless_it_is_asked_for():
    found = processor("git")
    pieces = [encode_prompt(found, rows(1, 1), "a dog", PREFIX, keep_end=keep) for keep in (False, True)]
    texts = [found.tokenizer.decode(piece["input_ids"][0]) for piece in pieces]
    assert texts == ["[CLS] a dog an image of", "[CLS] a dog an image of [SEP]"]
    assert pieces[0]["attention_mask"].shape == pieces[0]["input_ids"].shape


def test_only_what_the_model_takes():
    batch = encode_prompt(processor("gemma3"), rows(1, 1), "a dog", decoder_start=2, names=["input_ids"])
    assert set(batch) == {"input_ids", "decoder_input_ids"}


def test_an_encoder_decoder_begins_its_answer_in_the_decoder():
    tokenizer = unigram()
    found = transformers.Blip2Processor(hf.BlipImageProcessorPil(), tokenizer, num_query_tokens=4)
    batch = encode_prompt(found, rows(2, 1), PROMPT, PREFIX, padding_side="right", decoder_start=0)
    assert str(tokenizer.decode(batch["input_ids"][0])).endswith(f"{PROMPT}</s>")
    assert batch["decoder_input_ids"].shape[0] == 2
    assert batch["decoder_input_ids"][1, 0] == 0
    assert tokenizer.decode(batch["decoder_input_ids"][1, 1:]) == PREFIX
    begun = encode_prompt(found, rows(1, 1), PROMPT, "", decoder_start=[0, 1])["decoder_input_ids"]
    assert begun.tolist() == [[0, 1]]


def test_a_pair_gives_words_to_the_decoder_alone():
    pair = ImageAndTokenizer(hf.ViTImageProcessorPil(size={"height": 8, "width": 8}), byte_level({}, pad=False))
    batch = encode_prompt(pair, rows(2, 1), PROMPT, PREFIX, decoder_start=1)
    assert set(batch) == {"pixel_values", "decoder_input_ids"}
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert pair.tokenizer.decode(batch["decoder_input_ids"][0]) == f"<s>{PREFIX}"


@pytest.mark.parametrize(
    ("model_type", "n_images"), [(name, n) for name in TINY for n in (0, 1, 2) if (name, n) != ("paligemma", 0)]
)
def test_the_model_takes_it_and_reads_a_row_of_a_batch_as_it_does_alone(model_type, n_images):
    found, model = processor(model_type), tiny_model(model_type)
    options = {"image_token_id": model.config.image_token_id, "names": inspect.signature(model.forward).parameters}
    logits = []
    for n_rows in (1, 2):
        inputs = encode_prompt(found, rows(n_rows, n_images), PROMPT, PREFIX, **options)
        made = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert made.sequences.shape == (n_rows, inputs["input_ids"].shape[1] + 3)
        logits.append(torch.stack(made.logits)[:, 0])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


TOKENIZERS = {
    "byte-level": byte_level({}),
    "metaspace": metaspace_bpe(),
    "unigram": unigram(),
    "word-piece": word_piece(),
}


@pytest.mark.parametrize(
    ("kind", "piece"), [("byte-level", "Ġcat"), ("metaspace", "▁cat"), ("unigram", "▁c"), ("word-piece", "cat")]
)
def test_the_first_token_of_a_word_is_that_of_a_sentence(kind, piece):
    tokenizer = TOKENIZERS[kind]
    token = token_of(tokenizer, "cat")
    assert tokenizer.convert_ids_to_tokens(token) == piece
    assert token in tokenizer("An image of a dog and a cat", add_special_tokens=False).input_ids
    assert token_of(tokenizer, " cat ") == token


@pytest.mark.parametrize("word", ["", " ", "zebra"])
def test_a_word_without_a_token_of_its_own(word):
    with pytest.raises(WordError, match="no token of its own to begin with"):
        token_of(TOKENIZERS["word-piece"], word)


def test_the_space_before_a_word_is_not_its_first_token():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokens_of(tokenizer, "zebra")
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["Ġ", "z"]
    assert token_of(tokenizer, "zebra") == ids[1]


CHINESE = byte_level({}, sentences=["一只棕色的狗在草地上", "狗和猫", "the 狗 of the house"] * 9 + ["a dog"] * 5)


def test_a_word_of_a_script_without_spaces_is_written_without_one():
    assert CHINESE.decode(tokens_of(CHINESE, "狗")) == "狗"
    assert token_of(CHINESE, "狗") == CHINESE("狗", add_special_tokens=False).input_ids[0]
    assert CHINESE.decode(tokens_of(CHINESE, "dog")) == " dog"


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZERS["byte-level"], metaspace_bpe(byte_fallback=True)], ids=["byte", "spm"]
)
def test_a_first_token_that_is_part_of_a_character_tells_no_word(tokenizer):
    assert tokenizer.decode(tokens_of(tokenizer, "狗")).strip() == "狗"
    with pytest.raises(WordError, match="no token of its own to begin with"):
        token_of(tokenizer, "狗")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_a_word_takes_the_space_of_the_one_whose_place_it_takes(kind):
    tokenizer = TOKENIZERS[kind]
    spaced = tokenizer("a dog", add_special_tokens=False).input_ids[-1]
    bare = next(i for i in tokenizer('"dog"', add_special_tokens=False).input_ids if "d" in tokenizer.decode([i]))
    behind = [tokenizer.convert_ids_to_tokens(tokens_of(tokenizer, "cat", like=like)) for like in (spaced, bare)]
    assert [pieces[0][0] in "Ġ▁" for pieces in behind] == [True, False]
    assert ["".join(pieces).strip("Ġ▁") for pieces in behind] == ["cat", "cat"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "unigram"])
def test_no_two_tokens_are_shown_alike(kind):
    tokenizer = TOKENIZERS[kind]
    texts = [text_of(tokenizer, i) for i in range(len(tokenizer))]
    assert len({*texts}) == len(texts)


def test_a_token_that_joins_two_words_is_not_taken_for_the_second():
    class Joins:
        """Writes "a dog" as one token, and every other word as one of its own."""

        unk_token_id = None
        pieces = ("a", "dog", "the", "a dog")

        def __call__(self, text, add_special_tokens):
            joined = [text] if text in self.pieces else text.split()
            return BatchFeature({"input_ids": [self.pieces.index(piece) for piece in joined]})

        def decode(self, ids):
            return " ".join(self.pieces[i] for i in ids)

    assert token_of(Joins(), "dog") == 1
