"""What is asked and answered: prompts that mean something else than they say, answers that are no words."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmneurons as mmn
from mmneurons.data import pictures
from mmneurons.errors import ImageError, ModelError, SettingError, WordError
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask
from mmneurons.vlm.tokens import continued


def test_spaces_around_the_prefix_change_nothing(vlm, sample_paths):
    findings = [mmn.find(vlm, sample_paths[0], answer_prefix=prefix) for prefix in ("An image of", " An image of  ")]
    assert findings[0].token_ids == findings[1].token_ids
    images = [mmn.pocket.scene(7, nouns=["dog"]).image]
    given = [vlm.encode(images, answer_prefix=prefix)["input_ids"] for prefix in ("An image of", "An image of ")]
    assert torch.equal(*given)


@pytest.mark.parametrize("asked", [{"prompt": "<image>\nWhat is this?"}, {"answer_prefix": "An <image> of"}])
def test_what_stands_for_a_picture_is_no_word(vlm, sample_paths, asked):
    with pytest.raises(SettingError, match=r"(?s)holds '<image>', which stands for a picture.*Leave '<image>' out"):
        mmn.find(vlm, sample_paths[0], **asked)


@pytest.mark.parametrize("score", ["logit", "logprob", "paper"])
def test_an_answer_that_is_given_scores_as_if_it_had_been_said(vlm, sample_paths, score):
    how = {"score": score, "maps": True, "blank": True, "batch_size": 3}
    said = mmn.find(vlm, list(sample_paths[:5]), **how)
    read = mmn.find(vlm, list(sample_paths[:5]), caption=[one.caption for one in said], **how)
    for one, other in zip(said, read, strict=True):
        assert other.token_ids == one.token_ids[:-1]  # all but the end of the text
        assert one.notes == other.notes[:-1]
        assert "did not choose it" in other.notes[-1]
        assert other.provenance["settings"] == one.provenance["settings"] | {"decoding": "given"}
        assert [noun.word for noun in other.nouns] == [noun.word for noun in one.nouns]
        for noun, again in zip(one.nouns, other.nouns, strict=True):
            for field in ("logit", "probability"):
                assert getattr(again, field) == pytest.approx(getattr(noun, field), abs=1e-4)
            twins = {twin.neuron: twin for twin in again.neurons}
            for neuron in noun.neurons:
                if (twin := twins.get(neuron.neuron)) is None:  # the last of the list may be as good as the next
                    assert neuron.score == pytest.approx(noun.neurons[-1].score, abs=1e-4)
                    continue
                assert twin.score == pytest.approx(neuron.score, abs=1e-4)
                assert twin.lost_without_image == pytest.approx(neuron.lost_without_image, rel=1e-3, abs=1e-3)
                assert np.allclose(twin.maps, neuron.maps, atol=1e-4)


def test_words_that_the_model_would_not_say_are_scored_where_they_stand(vlm, random_vlm, sample_paths):
    """Of each the logit and log p are those of a pass of the bare model over prompt and answer."""
    finding = mmn.find(vlm, sample_paths[0], caption="a banana behind two anchors")
    assert [noun.lemma for noun in finding.nouns] == ["banana", "anchor"]
    inputs = vlm.encode([Image.open(sample_paths[0])], answer_prefix="An image of a banana behind two anchors")
    with torch.inference_mode():
        log_p = vlm.model(**inputs).logits[0].float().log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    for noun in finding.nouns:
        place = len(ids) - len(finding.token_ids) + noun.step
        assert ids[place] == noun.token_id == finding.token_ids[noun.step]
        assert math.log(noun.probability) == pytest.approx(float(log_p[place - 1, noun.token_id]), rel=1e-4)
        assert noun.parts.total == pytest.approx(noun.logit, rel=1e-4)
    own = mmn.find(random_vlm, [sample_paths[0], sample_paths[1]], caption="a dog", prompt="What is it?")
    assert [one.caption for one in own] == ["a dog", "a dog"]


@pytest.mark.parametrize(
    ("images", "caption", "message"),
    [
        (2, ["a dog"], "2 prompts, 1 answers"),
        (1, " ", "no word in the answer"),
        (1, [""], "Each prompt|no word"),
        (1, "An image of", "no word in the answer"),
    ],
)
def test_answers_that_fit_nothing_are_refused(vlm, sample_paths, images, caption, message):
    with pytest.raises(SettingError, match=message):
        mmn.find(vlm, list(sample_paths[:images]), caption=caption)


def test_an_answer_is_not_put_behind_ready_made_inputs(vlm, sample_paths):
    inputs = vlm.encode([Image.open(sample_paths[0])])
    with pytest.raises(SettingError, match="behind ready-made inputs"):
        mmn.find(vlm, inputs=inputs, caption="a dog")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("before", "joint"), [("An image of", " "), ("assistant\n", ""), ("", ""), ("USER: a </s>", ""), ("</s>what", " ")]
)
def test_an_answer_goes_on_where_the_prompt_ends(vlm, before, joint):
    tokenizer = vlm.tokenizer
    written = tokenizer(before, add_special_tokens=False).input_ids
    text = before.rpartition("</s>")[2]
    whole = tokenizer(f"{text}{joint}a dog", add_special_tokens=False).input_ids
    ids = continued(tokenizer, written, " a dog\n")
    assert ids == whole[-len(ids) :]
    assert tokenizer.decode(ids).strip() == "a dog"
    assert continued(tokenizer, written, "a \udcff") == continued(tokenizer, written, "a ?")  # bytes that are no text


@pytest.mark.parametrize("images", [None, "one"])
@pytest.mark.parametrize("caption", ["a <image> dog", "a dog</s> a cat"])
def test_an_answer_holds_no_token_that_is_no_text(vlm, sample_paths, images, caption):
    with pytest.raises(SettingError, match="which is no text to this model"):
        mmn.find(vlm, sample_paths[0] if images else None, caption=caption)


@pytest.mark.parametrize(
    "asked", [{"prompt": ["x", "y"]}, {"answer_prefix": 3}, {"caption": 5}, {"caption": ["a dog", 5]}]
)
def test_what_is_no_text_is_refused(vlm, sample_paths, asked):
    with pytest.raises(SettingError, match="text"):
        mmn.find(vlm, list(sample_paths[:2]), **asked)


def test_a_caption_with_the_prefix_in_front_is_taken_without(vlm, sample_paths):
    whole, bare = (mmn.find(vlm, sample_paths[0], caption=text) for text in ("An image of a dog", "a dog"))
    assert whole.caption == bare.caption == "a dog"
    assert whole.token_ids == bare.token_ids


def test_an_answer_beyond_the_context_is_refused(vlm, sample_paths):
    with pytest.raises(SettingError, match="longer than what the model was made to read"):
        mmn.find(vlm, sample_paths[0], caption="a dog " * 600)


def test_a_word_that_a_given_answer_does_not_hold_is_told(vlm, sample_paths):
    with pytest.raises(WordError, match=r"(?s)Not in the answer: cat.*The answer:.*a dog"):
        mmn.find(vlm, sample_paths[0], caption="a dog", words="cat")


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "MPS backend out of memory", "CUBLAS ALLOC_FAILED"])
def test_too_little_memory_is_told_in_every_pass(random_vlm, sample_paths, said):
    def full(*_):
        raise RuntimeError(said)

    hook = random_vlm.model.model.language_model.layers[1].register_forward_hook(full)
    try:
        for caption in (None, "a dog"):
            with pytest.raises(ModelError, match="not enough memory for this batch"):
                mmn.find(random_vlm, sample_paths[0], caption=caption)
    finally:
        hook.remove()


def test_what_a_users_hook_raises_stays_what_it_is(random_vlm, sample_paths):
    def clumsy(module, args, output):
        torch.nn.functional.pad(output[0], "x")  # pyright: ignore[reportArgumentType] - raised within torch

    hook = random_vlm.model.model.language_model.layers[1].register_forward_hook(clumsy)
    try:
        with pytest.raises(TypeError):
            mmn.find(random_vlm, sample_paths[0])
    finally:
        hook.remove()


def test_pictures_are_opened_batch_by_batch_and_headers_before_any(vlm, sample_paths, monkeypatch, tmp_path):
    opened: list[str] = []
    really_open = pictures.open_image

    def watched(path):
        opened.append(str(path))
        return really_open(path)

    monkeypatch.setattr(pictures, "open_image", watched)
    batches = ask(vlm, list(sample_paths[:5]), Question(batch_size=2, max_new_tokens=2))
    assert opened == []
    assert next(batches).first == 0
    assert opened == list(sample_paths[:2])
    assert [batch.first for batch in batches] == [2, 4]
    assert opened == list(sample_paths[:5])
    (tmp_path / "none.png").write_bytes(b"no picture")
    opened.clear()
    with pytest.raises(ImageError, match=r"none\.png"):
        vlm.caption([*sample_paths[:4], tmp_path / "none.png"], batch_size=1)
    assert opened == []
    with pytest.raises(ImageError, match="cannot be used as an image"):
        vlm.caption([*sample_paths[:4], 5], batch_size=1)
    assert opened == ["5"]


def test_a_prompt_longer_than_the_context_is_refused(vlm, sample_paths):
    with pytest.raises(SettingError, match=r"(?s)longer than what the model was made to read.*\d+ tokens.*context is"):
        vlm.caption(sample_paths[0], "What is in the image? " * 200)


def test_the_placeholder_of_a_picture_is_never_said(random_vlm, sample_paths):
    model = copy.deepcopy(random_vlm.model)
    token = model.config.image_token_id
    head = nn.Linear(*reversed(model.lm_head.weight.shape))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[token] = 100.0  # as an untrained head may
    model.lm_head = head
    vlm = mmn.load(model, processor=random_vlm.processor)
    inputs = vlm.encode([mmn.pocket.scene(7, nouns=["dog"]).image])
    answers = vlm.generate(inputs, 4)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].float()
    assert token not in answers.token_ids[0]
    assert answers.token_ids[0][0] == int(logits.topk(2).indices[1])
    assert float(answers.logits[0, 0]) == pytest.approx(float(logits.topk(2).values[1]), abs=1e-4)
    assert float(answers.log_totals[0, 0]) == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)
    said = vlm.generate(vlm.encode([Image.open(sample_paths[0])]), 4).token_ids[0][0]
    found = mmn.find(vlm, sample_paths[0], token_ids=[said], answer_prefix="", blank=True)
    assert found.nouns[0].token_id == said


@pytest.mark.parametrize(
    ("dtype", "fix"), [(torch.float16, "--dtype bfloat16"), (torch.float32, "every weight should be finite")]
)
def test_logits_that_are_no_numbers_are_refused(random_vlm, sample_paths, dtype, fix):
    model = copy.deepcopy(random_vlm.model)
    vlm = mmn.load(model.to(dtype), processor=random_vlm.processor)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match="The logits are NaN"):
        vlm.anatomy.logits(torch.full((1, vlm.anatomy.hidden), torch.nan, dtype=dtype))
    projector = model.model.multi_modal_projector.linear_2
    projector.register_forward_hook(lambda module, args, output: output * torch.inf)  # in pictures alone
    for answered in (vlm.caption, lambda path: mmn.find(vlm, path)):
        with pytest.raises(ModelError, match=f"(?s)The logits are NaN in {name}.*{fix}"):
            answered(sample_paths[0])
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match=f"(?s)The logits are NaN in {name}.*{fix}"):
        mmn.load(model, processor=random_vlm.processor)
