"""Find against the raw Hugging Face model: every number recomputed here, by loops and hooks of this file's own."""

import copy
from dataclasses import replace

import pytest
import torch

import mmneurons as mmn
from mmneurons.data.images import open_image
from mmneurons.errors import ModelError, SettingError, WordError
from mmneurons.finding import batch
from mmneurons.vlm.doctor import additivity, additivity_error
from mmneurons.vlm.hooks import recording as recording_module
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.traces import Trace, pick_trace
from mmneurons.vlm.vlm import VLM, Answers
from mmneurons.words import HantaTagger, Word


def raw_pass(vlm: VLM, image, token_ids, requires_grad=False):
    """One teacher-forced forward of the bare model: down_proj inputs, gates, residual, logits, prompt length."""
    text = "USER: <image>\nDescribe the image in few words. ASSISTANT: An image of"
    batch = vlm.processor(images=[image], text=[text], return_tensors="pt").to(dtype=vlm.model.dtype)
    n_prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], torch.tensor([token_ids])], 1)
    got = {"a": [], "gate": [], "x": None, "prompt": n_prompt, "image": batch["input_ids"][0] == 3}
    language = vlm.model.model.language_model
    handles = []
    for layer in language.layers:

        def keep(module, args):
            a = args[0].detach().requires_grad_() if requires_grad and not got["a"] else args[0]
            if requires_grad:
                a.retain_grad()
            got["a"].append(a)
            return (a,)

        handles.append(layer.mlp.down_proj.register_forward_pre_hook(keep))
        handles.append(layer.mlp.act_fn.register_forward_hook(lambda m, i, o: got["gate"].append(o[0])))
    handles.append(language.norm.register_forward_pre_hook(lambda m, i: got.__setitem__("x", i[0][0])))
    with torch.set_grad_enabled(requires_grad):
        got["logits"] = vlm.model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0]
    for handle in handles:
        handle.remove()
    return got


@torch.no_grad()
def slow_scores(vlm: VLM, raw, position, token_id, score, against=None):
    """Scores in double precision, one block at a time, from the definitions."""
    unembed = vlm.model.lm_head.weight.double()
    gamma = vlm.model.model.language_model.norm.weight.double()
    x = raw["x"][position].double()
    sigma = (x.pow(2).mean() + 1e-6).sqrt()
    row = unembed[token_id] - (0 if against is None else unembed[against])
    if score == "paper":
        direction = row
    elif score == "logit":
        direction = gamma * row / sigma
    else:
        if against is None:
            p = raw["logits"][position].double().softmax(-1)
            row = row - sum(p[v] * unembed[v] for v in range(len(p)))
        jacobian = torch.diag(gamma) @ (torch.eye(len(x)) / sigma - torch.outer(x, x) / (len(x) * sigma**3))
        direction = jacobian.T @ row
    scores = []
    for layer, block in enumerate(vlm.model.model.language_model.layers):
        recorded = raw["gate"][layer] if score == "paper" else raw["a"][layer][0]
        scores.append(recorded[position].double() * (block.mlp.down_proj.weight.double().T @ direction))
    return torch.cat(scores)


@pytest.fixture(scope="module")
def images(sample_paths):
    return [open_image(path).image for path in sample_paths[:4]]


@pytest.fixture(scope="module")
def bf16_vlm(vlm):
    return mmn.load(copy.deepcopy(vlm.model).bfloat16(), processor=vlm.processor)


@pytest.mark.parametrize("score", ["logit", "logprob", "paper"])
@pytest.mark.parametrize("against", [None, "castle"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_equal_a_slow_computation(vlm, bf16_vlm, images, score, against, dtype):
    model = vlm if dtype == "float32" else bf16_vlm
    other = None if against is None else vlm.tokenizer(" castle", add_special_tokens=False).input_ids[0]
    for image in images:
        found = mmn.find(model, image, score=score, against=against, top=5)
        assert found.nouns
        raw = raw_pass(model, image, list(found.token_ids))
        for noun in found.nouns:
            position = raw["prompt"] + noun.step - 1
            expected = slow_scores(model, raw, position, noun.token_id, score, other)
            best = expected.topk(5)
            width = model.anatomy.ffns[0].n_neurons
            names = [mmn.Neuron(i // width, i % width) for i in best.indices.tolist()]
            scores = torch.tensor([n.score for n in noun.neurons], dtype=torch.double)
            # Decoding step by step and one long pass round differently: a little in float32, more in bfloat16.
            rtol = 1e-3 if dtype == "float32" else 5e-2
            torch.testing.assert_close(scores, best.values, rtol=rtol, atol=rtol * float(best.values[0]))
            if dtype == "float32":
                assert [n.neuron for n in noun.neurons] == names
                p = raw["logits"][position].softmax(-1)[noun.token_id]
                assert noun.probability == pytest.approx(float(p), rel=1e-3)


def test_bf16_scores_are_computed_in_float32(bf16_vlm, images):
    found = mmn.find(bf16_vlm, images[0])
    scores = torch.tensor([n.score for n in found.nouns[0].neurons])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_logprob_is_gradient_times_activation_in_the_last_block(vlm, images):
    # In double precision: where p is close to 1, float32 loses the gradient of log p to cancellation.
    exact = mmn.load(copy.deepcopy(vlm.model).double(), processor=vlm.processor)
    for image in images[:2]:
        found = mmn.find(vlm, image, score="logprob", top=10**6)
        raw = raw_pass(exact, image, list(found.token_ids), requires_grad=True)
        for noun in found.nouns:
            for a in raw["a"]:
                a.grad = None
            position = raw["prompt"] + noun.step - 1
            raw["logits"][position].log_softmax(-1)[noun.token_id].backward(retain_graph=True)
            last = raw["a"][-1]
            expected = (last.grad * last)[0, position].detach()
            scores = torch.zeros_like(expected)
            for n in noun.neurons:
                if n.neuron.layer == len(raw["a"]) - 1:
                    scores[n.neuron.index] = n.score
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            assert expected.abs().max() > 0


def recorded(vlm: VLM, image) -> tuple[Trace, Answers]:
    """What was recorded where each token of one caption was predicted."""
    with record(vlm.anatomy) as recording:
        answers = vlm.generate(vlm.encode([image], answer_prefix="An image of"))
    return pick_trace(recording, torch.tensor([[0, i] for i in range(len(answers.token_ids[0]))])), answers


def test_additivity_on_every_token_of_every_sample(vlm, sample_paths):
    for path in sample_paths:
        check = additivity(vlm, *recorded(vlm, open_image(path).image))
        assert check.passed, check.detail


@pytest.mark.parametrize("spoil", ["no attention", "weight read as 1 + w", "another column", "embedding missed"])
def test_additivity_notices_what_is_read_wrongly(random_vlm, images, spoil):
    # Of random weights: every part of them writes enough to be missed.
    trace, answers = recorded(random_vlm, images[0])
    if spoil == "no attention":
        trace = replace(trace, sources=[torch.zeros_like(wrote) for wrote in trace.sources])
    elif spoil == "embedding missed":
        trace = replace(trace, embedding=torch.zeros_like(trace.embedding))
    elif spoil == "another column":
        trace.activations[0] = trace.activations[0].roll(1, -1)
    else:
        norm = replace(random_vlm.anatomy.norm, weight=random_vlm.anatomy.norm.weight + 1)
        trace = replace(trace, anatomy=replace(random_vlm.anatomy, norm=norm))
    assert additivity_error(random_vlm, trace, answers) > 1e-3


def test_parts_add_up_to_the_logit(vlm, sample_paths):
    for found in mmn.find(vlm, list(sample_paths[:8])):
        for noun in found.nouns:
            parts = noun.parts
            assert parts.total == pytest.approx(noun.logit, rel=1e-4, abs=1e-4)
            # Here the score is `logit`: the top neurons' share is the sum of their scores.
            assert parts.top == pytest.approx(sum(n.score for n in noun.neurons), rel=1e-4, abs=1e-5)


def test_the_papers_prefix_goes_with_the_papers_prompt(vlm, images):
    """A question of one's own is answered from its beginning, everywhere; what was used is recorded."""
    for asked, prefix in [({}, "An image of"), ({"prompt": "What is this?"}, ""), ({"answer_prefix": "A"}, "A")]:
        finding = mmn.find(vlm, images[0], **asked)
        assert finding.answer_prefix == finding.provenance["settings"]["answer_prefix"] == prefix
        assert vlm.caption(images[0], **asked) == finding.caption
        assert vlm.caption(images[0], **(asked | {"answer_prefix": prefix})) == finding.caption
        assert mmn.make_reference(vlm, [images[0]], **asked).question.prefix == prefix


def test_a_batch_gives_what_single_images_give(vlm, sample_paths):
    paths = list(sample_paths[:10])
    together = mmn.find(vlm, paths, batch_size=10)
    assert len({len(found.token_ids) for found in together}) > 1, "captions of one length would show nothing"
    for path, found in zip(paths, together, strict=True):
        alone = mmn.find(vlm, path)
        assert (alone.caption, alone.token_ids) == (found.caption, found.token_ids)
        for one, other in zip(alone.nouns, found.nouns, strict=True):
            assert one.neurons[0].neuron == other.neurons[0].neuron
            scores = [torch.tensor([n.score for n in noun.neurons]) for noun in (one, other)]
            torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


def test_recording_changes_no_bit(vlm, images):
    inputs = vlm.encode(images)
    with torch.inference_mode():
        before = vlm.model(**inputs).logits
        with record(vlm.anatomy, gates=True):
            during = vlm.model(**inputs).logits
    assert torch.equal(before, during)


@pytest.mark.parametrize("spoiled", ["nothing", "residual stream"])
def test_what_is_kept_without_a_copy_is_what_a_copy_holds(vlm, images, monkeypatch, spoiled):
    """On a GPU tensors are kept as they are, but for those that the model changes in place later in the pass."""
    first = vlm.model.model.language_model.layers[0]
    inputs, made = vlm.encode(images), []

    def change(module, args):
        if spoiled == "residual stream":
            args[0].mul_(1.01)

    in_place = first.input_layernorm.register_forward_pre_hook(change)
    try:
        for copying in (("cpu",), ()):
            monkeypatch.setattr(recording_module, "COPYING", copying)
            with record(vlm.anatomy, gates=True) as recording:
                vlm.generate(inputs, 6)
            made.append(recording)
    finally:
        in_place.remove()
    lists = [[*r.raw, *r.gates, *r.sources, *r.norms, r.embedding, r.residual] for r in made]
    for one, other in zip(*lists, strict=True):
        assert len(one) == len(other) == 6
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    shared = [a.data_ptr() for parts in lists[1] for a in parts[2:]]
    assert len(shared) == len({*shared})


@pytest.mark.parametrize("whole", [False, True], ids=["a part of a block", "a whole block"])
def test_what_is_not_reached_at_a_later_step_is_told_unless_its_block_was_left_out(vlm, images, monkeypatch, whole):
    """Silence must not be taken for zero, at the first step or any other; a block that is left out writes nothing."""
    block, steps = vlm.model.model.language_model.layers[1], []
    part = block if whole else block.mlp
    really = part.forward

    def forward(hidden_states, **options):
        steps.append(hidden_states.shape)
        if len(steps) == 3:
            return hidden_states if whole else torch.zeros_like(hidden_states)
        return really(hidden_states, **options)

    monkeypatch.setattr(part, "forward", forward)
    inputs = vlm.encode(images[:1])
    if not whole:
        with pytest.raises(ModelError, match=r"(?s)Missed: .*layers\.1\.mlp\.down_proj"), record(vlm.anatomy):
            vlm.generate(inputs, 5)
        return
    with record(vlm.anatomy) as recording:
        vlm.generate(inputs, 5)
    silent = [bool((part == 0).all()) for part in recording.raw[1]]
    assert silent == [False, False, True, False, False]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_interruption(vlm, images, interruption):
    vlm.caption(images[0])  # transformers puts hooks of its own on the vision tower at the first run
    mine = vlm.model.lm_head.register_forward_hook(lambda *_: None)
    stop = vlm.model.model.language_model.layers[2].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(interruption)
    )
    own, before = vlm.model.generation_config, hooks(vlm.model)
    try:
        with pytest.raises(interruption):
            mmn.find(vlm, images[0])
        assert hooks(vlm.model) == before  # those of this test too: a user's own hooks stay
        assert vlm.model.generation_config is own
    finally:
        mine.remove()
        stop.remove()


def test_a_block_that_is_not_reached_is_no_zero(random_vlm, images):
    layer = random_vlm.model.model.language_model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden_states, **_: hidden_states
    try:
        with pytest.raises(mmn.MmneuronsError, match=r"layers\.1"):
            mmn.find(random_vlm, images[0])
    finally:
        layer.forward = forward


def test_the_checkpoints_own_generation_settings_do_not_matter(vlm, images):
    expected = vlm.caption(images)
    own = vlm.model.generation_config
    vlm.model.generation_config = copy.deepcopy(own)
    vlm.model.generation_config.update(
        do_sample=True, temperature=5.0, num_beams=3, suppress_tokens=list(range(300, 600)), repetition_penalty=9.0
    )
    try:
        assert vlm.caption(images) == expected
    finally:
        vlm.model.generation_config = own


def test_a_model_in_training_is_read_in_evaluation_and_left_in_training(vlm, images):
    model = copy.deepcopy(vlm.model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.model.vision_tower.eval()
    adopted = mmn.load(model, processor=vlm.processor)
    assert adopted.caption(images) == vlm.caption(images)
    assert model.training
    assert not model.model.vision_tower.training


def test_maps_are_activations_at_the_image_tokens(vlm, images):
    found = mmn.find(vlm, images[1], maps=True, top=3)
    raw = raw_pass(vlm, images[1], list(found.token_ids))
    noun = found.nouns[0]
    position = raw["prompt"] + noun.step - 1
    expected = slow_scores(vlm, raw, position, noun.token_id, "logit")
    width = vlm.anatomy.ffns[0].n_neurons
    order = expected.topk(50).indices.tolist()
    maps = []
    for flat in order:
        a = raw["a"][flat // width][0, :, flat % width]
        maps.append(a[: raw["prompt"]][raw["image"]].view(8, 8) * a[position].sign())
    for n, one in zip(noun.neurons, maps, strict=False):
        torch.testing.assert_close(torch.tensor(n.maps[0]), one, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(noun.regions[1][0]), maps[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(noun.regions[50][0]), torch.stack(maps).mean(0), rtol=1e-3, atol=1e-4)
    assert set(noun.regions) == {1, 10, 50, 100, 500, 1000}


def test_what_is_lost_without_the_image(vlm, images):
    found = mmn.find(vlm, images[1], blank=True, top=5)
    grey = images[1].copy()
    grey.paste((128, 128, 128), (0, 0, *grey.size))
    raw = raw_pass(vlm, grey, list(found.token_ids))
    width = vlm.anatomy.ffns[0].n_neurons
    for noun in found.nouns:
        without = slow_scores(vlm, raw, raw["prompt"] + noun.step - 1, noun.token_id, "logit")
        for n in noun.neurons:
            lost = 1 - without[n.neuron.layer * width + n.neuron.index].item() / n.score
            assert n.lost_without_image == pytest.approx(lost, rel=1e-3, abs=1e-3)


def test_layers_count_the_top_neurons(vlm, images):
    noun = mmn.find(vlm, images[0], top=100).nouns[0]
    counts = [sum(n.neuron.layer == layer for n in noun.neurons) for layer in range(5)]
    assert list(noun.layers[100]) == counts
    assert [sum(noun.layers[k]) for k in (10, 100, 1000)] == [10, 100, 1000]


def test_says_follows_the_sign_of_the_activation(vlm, images):
    unembed = vlm.model.lm_head.weight * vlm.model.model.language_model.norm.weight
    found = mmn.find(vlm, images[0], top=200, says="raw")
    assert any(n.activation < 0 for n in found.nouns[0].neurons)
    for n in found.nouns[0].neurons:
        column = vlm.model.model.language_model.layers[n.neuron.layer].mlp.down_proj.weight[:, n.neuron.index]
        logits = unembed @ column * (1 if n.activation >= 0 else -1)
        assert vlm.tokenizer.decode([int(logits.argmax())]) == n.tokens[0] or "\ufffd" in vlm.tokenizer.decode(
            [int(logits.argmax())]
        )
        assert len(n.tokens) == 10
        assert len(n.suppressed) == 3


def test_words_are_scored_whether_nouns_or_not(vlm, images):
    caption = vlm.caption(images[0])
    found = mmn.find(vlm, images[0], words=caption.split()[0])
    assert found.nouns[0].step == 0
    assert found.nouns[0].word == caption.split()[0]


def test_a_word_that_was_not_said_is_an_error_that_prints_the_caption(vlm, images):
    caption = vlm.caption(images[0])
    with pytest.raises(WordError) as error:
        mmn.find(vlm, images[0], words=["submarine"])
    assert caption in str(error.value)


def test_a_word_said_of_one_image_only_is_noted_on_the_other(vlm, images):
    captions = vlm.caption(images)
    first, second = next((a, b) for a in (0, 1) for b in (2, 3) if captions[a].split()[1] not in captions[b])
    word = captions[first].split()[1].strip(",")
    found = mmn.find(vlm, [images[first], images[second]], words=[word])
    assert found[0].nouns
    assert not found[1].nouns
    assert any(word in note for note in found[1].notes)


def test_a_noun_left_out_does_not_shift_the_others(vlm, images, monkeypatch):
    whole = mmn.find(vlm, images, batch_size=4)
    real = batch.find_nouns

    def without_the_first(*args, **options) -> list[Word]:
        return real(*args, **options)[1:]

    monkeypatch.setattr(batch, "find_nouns", without_the_first)
    for before, after in zip(whole, mmn.find(vlm, images, batch_size=4), strict=True):
        assert [noun.step for noun in after.nouns] == [noun.step for noun in before.nouns[1:]]
        for one, other in zip(after.nouns, before.nouns[1:], strict=True):
            assert (one.word, one.token_id, one.neurons[0].neuron) == (
                other.word,
                other.token_id,
                other.neurons[0].neuron,
            )
            assert one.neurons[0].score == pytest.approx(other.neurons[0].score, rel=1e-4)


def test_the_paper_scores_the_first_occurrence_only(vlm, images, monkeypatch):
    real = batch.find_nouns
    monkeypatch.setattr(batch, "find_nouns", lambda *a, **o: [w for w in real(*a, **o) for _ in range(2)])
    assert len(mmn.find(vlm, images[0], score="paper").nouns) * 2 == len(mmn.find(vlm, images[0]).nouns)


def test_a_caption_without_nouns_says_so(vlm, images, monkeypatch):
    monkeypatch.setattr(batch, "find_nouns", lambda *_, **__: [])
    found = mmn.find(vlm, images[0], maps=True, blank=True)
    assert found.nouns == ()
    assert any("no noun" in note for note in found.notes)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"score": "grad"}, "logit, logprob, paper"),
        ({"top": 0}, "top=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_settings_without_meaning_are_refused(vlm, images, choice, message):
    with pytest.raises(SettingError, match=message):
        mmn.find(vlm, images[0], **choice)


def test_against_a_word_that_is_no_word_is_refused(vlm, images):
    for word in ("", "  ", "\u65e5"):
        with pytest.raises(WordError, match="no token of its own"):
            mmn.find(vlm, images[0], against=word)


def test_a_noun_is_not_compared_with_itself(vlm, images):
    nouns = mmn.find(vlm, images[0]).nouns
    left = mmn.find(vlm, images[0], against=nouns[0].word).nouns
    assert [noun.word for noun in left] == [noun.word for noun in nouns[1:]]


def test_a_gate_that_is_not_called_is_no_activation(random_vlm, images):
    mlp = random_vlm.model.model.language_model.layers[1].mlp
    forward = mlp.forward
    silu = torch.nn.functional.silu
    mlp.forward = lambda x: mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    try:
        with pytest.raises(mmn.MmneuronsError, match=r"activation function was reached.*|layers\.1"):
            mmn.find(random_vlm, images[0], score="paper")
    finally:
        mlp.forward = forward


def test_a_softcap_is_noticed(vlm, images):
    capped = copy.deepcopy(vlm.model)
    capped.lm_head.register_forward_hook(lambda module, args, output: 5 * torch.tanh(output / 5))
    model = mmn.load(capped, processor=vlm.processor)
    assert not next(check for check in mmn.doctor(model, images[0]).checks if "add up" in check.name).passed
    assert any("Approximate" in note for note in mmn.find(model, images[0]).notes)
    assert not any("Approximate" in note for note in mmn.find(vlm, images[0]).notes)


def test_against_the_noun_itself_is_refused(vlm, images):
    noun = mmn.find(vlm, images[0]).nouns[0]
    with pytest.raises(SettingError, match="nothing to compare"):
        mmn.find(vlm, images[0], words=[noun.word], against=noun.word)


def test_an_empty_prompt_and_no_prefix_work(vlm, images):
    found = mmn.find(vlm, images[0], prompt="", answer_prefix="", max_new_tokens=6)
    assert len(found.token_ids) <= 6


def test_a_language_without_a_tagger_is_said_and_another_tagger_is_taken(vlm, images, monkeypatch):
    usual = mmn.find(vlm, images[0])
    assert usual.nouns
    assert usual.provenance["settings"]["tagger"] is None
    monkeypatch.setattr("mmneurons.words.nouns.language_of", lambda text: None)
    found = mmn.find(vlm, images[0])
    assert found.nouns == ()
    assert found.notes[-1].startswith("No noun tagger for the language of this answer")
    asked = mmn.find(vlm, images[0], words=usual.nouns[0].word)
    (one,), other = asked.nouns, usual.nouns[0]
    assert (one.word, one.start, one.token_id) == (other.word, other.start, other.token_id)
    assert [n.neuron for n in one.neurons] == [n.neuron for n in other.neurons]
    assert [n.score for n in one.neurons] == pytest.approx([n.score for n in other.neurons], rel=1e-4)
    given = mmn.find(vlm, images[0], tagger=HantaTagger())
    assert given.nouns == usual.nouns
    assert given.provenance["settings"]["tagger"] == "HantaTagger(language='en')"


def test_progress_counts_images(vlm, images):
    told: list[tuple[str, float, int]] = []
    mmn.find(vlm, images, batch_size=3, progress=lambda *now: told.append(now))
    assert told == [("prompts", 3, 4), ("prompts", 4, 4)]
