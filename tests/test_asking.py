"""What is asked and answered: prompts that mean something else than they say, answers that are no words."""

import copy

import pytest
import torch
from torch import nn

import mmneurons as mmn
from mmneurons.errors import ModelError, SettingError


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
    words = [mmn.find(vlm, sample_paths[0], token_ids=[answers.token_ids[0][0]], answer_prefix="", blank=True)]
    assert words[0].nouns[0].token_id == answers.token_ids[0][0]


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
    for ask in (vlm.caption, lambda path: mmn.find(vlm, path)):
        with pytest.raises(ModelError, match=f"(?s)The logits are NaN in {name}.*{fix}"):
            ask(sample_paths[0])
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match=f"(?s)The logits are NaN in {name}.*{fix}"):
        mmn.load(model, processor=random_vlm.processor)
