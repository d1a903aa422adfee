"""Scores over a baseline: the same sums, of what this picture adds. Against hooks of this file's own."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from test_cli import call
from test_families import LIMIT, case
from test_find import raw_pass
from torch import Tensor

import mmneurons as mmn
from mmneurons.data.images import open_image
from mmneurons.errors import ModelError, SettingError
from mmneurons.finding import result
from mmneurons.finding.baseline import baseline_of
from mmneurons.finding.rereading import trace_again
from mmneurons.finding.scoring import Target, read_out, score_targets, unembed_rows
from mmneurons.settings import FindSettings
from mmneurons.vlm.asking import answer
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.traces import pick_trace
from mmneurons.words import Word

GREY = (128, 128, 128)
EVERY = 10**6


def grey_like(image):
    grey = image.copy()
    grey.paste(GREY, (0, 0, *grey.size))
    return grey


@contextmanager
def outputs_of(modules):
    """What each module gives, run after run: of a `w_out`, whatever activations this package says it had."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def keep(i, module, args, output):
        seen[i].append((output[0] if isinstance(output, tuple) else output).detach().clone())  # some are added to

    hooks = [module.register_forward_hook(partial(keep, i)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "name", ["llava", "gemma3", "qwen3_vl_moe", "llama4", "blip-2 (opt)", "blip-2 (flan-t5)", "idefics3"]
)
def test_over_another_picture_the_scores_add_up_to_a_logit_difference(name):
    """All blocks: the sum of all scores is what the FFNs wrote into the logit, less what they write with the other
    picture, read along the directions held. Outputs are hooked, and not worked out from activations."""
    one = case(name)
    vlm, (inputs, others) = one.vlm, (one.alone[0], {**one.alone[0]})
    others["pixel_values"] = others["pixel_values"].flip(-1) * 0.5 + 0.3
    given = list(one.answers[0].token_ids)
    answers, recording = answer(vlm, inputs, FindSettings(), given=given, recorder=record)
    targets = [Target(0, Word(str(i), str(i), 0, 1, (i,)), i, ids) for i, ids in enumerate(given[0])]
    token_ids = [target.token_id for target in targets]
    choices = FindSettings(baseline="blank")
    grey = trace_again(vlm, others, answers, targets, choices)
    scored = score_targets(vlm, recording, answers, targets, choices, baseline_of(vlm, targets, choices, grey))
    assert scored.scores.shape[1] == vlm.anatomy.n_neurons  # experts that only one of the pictures asks count, too

    written: list[list[Tensor]] = []
    for each in (inputs, others):
        with outputs_of([ffn.module for ffn in vlm.anatomy.ffns]) as seen:
            vlm.read(each, answers)
        steps = [-len(token_ids) - 1 + i for i in range(len(token_ids))]
        # Llama 4 gives each expert's own output for every position, to be summed behind the module.
        shape = (-1, min(outputs[-1].numel() for outputs in seen) // vlm.anatomy.hidden, vlm.anatomy.hidden)
        written.append([outputs[-1].reshape(shape).sum(0)[steps].float() for outputs in seen])
    trace = pick_trace(recording, torch.tensor([[0, target.step] for target in targets]))
    directions = read_out(vlm, trace, token_ids, unembed_rows(vlm.anatomy, token_ids, trace.residual), choices)
    expected = sum(
        ((ours - theirs) * directions.at(ffn.path)).sum(-1)
        for ffn, ours, theirs in zip(vlm.anatomy.ffns, *written, strict=True)
    )
    assert isinstance(expected, Tensor)
    bound = float(answers.logits.abs().max())
    assert float(expected.abs().max()) > 1e-3 * bound, "the picture changes nothing: that would show nothing"
    torch.testing.assert_close(scored.scores.sum(-1), expected, rtol=0, atol=LIMIT * bound)
    torch.testing.assert_close(scored.written.ffn, scored.contributions.sum(-1))
    assert scored.written.total.tolist() == pytest.approx(scored.logits, abs=LIMIT * bound)


def test_blank_is_the_activation_behind_a_grey_picture(random_vlm, sample_paths):
    """By hand on a LLaVA: each activation, each score, and the sum with attention as the whole logit difference."""
    image = open_image(sample_paths[0]).image
    found = mmn.find(random_vlm, image, caption="a dog in the snow", top=EVERY, baseline="blank")
    zero = mmn.find(random_vlm, image, caption="a dog in the snow", top=EVERY, blank=True)
    assert (found.baseline, zero.baseline, found.provenance["settings"]["baseline"]) == ("blank", "zero", "blank")
    heard: list[list[Tensor]] = []
    passes = []
    for one in (image, grey_like(image)):
        with outputs_of([layer.self_attn for layer in random_vlm.model.model.language_model.layers]) as seen:
            passes.append(raw_pass(random_vlm, one, list(found.token_ids)))
        heard.append([outputs[-1] for outputs in seen])
    raw, without = passes
    language, unembed = random_vlm.model.model.language_model, random_vlm.model.lm_head.weight.detach()
    assert len(found.nouns) == 2
    for noun, plain in zip(found.nouns, zero.nouns, strict=True):
        position = raw["prompt"] + noun.step - 1
        x, other = raw["x"][position].detach(), without["x"][position].detach()
        sigma = (x.pow(2).mean() + language.norm.variance_epsilon).sqrt()
        blank_sigma = (other.pow(2).mean() + language.norm.variance_epsilon).sqrt()
        g = language.norm.weight.detach() * unembed[noun.token_id] / sigma
        total = torch.tensor(0.0)
        contributions = {n.neuron: n for n in plain.neurons}
        assert len(noun.neurons) == random_vlm.anatomy.n_neurons
        for n in noun.neurons:
            column = language.layers[n.neuron.layer].mlp.down_proj.weight.detach()[:, n.neuron.index]
            a, b = (float(each["a"][n.neuron.layer][0, position, n.neuron.index]) for each in (raw, without))
            assert (n.activation, n.baseline) == (pytest.approx(a, abs=1e-4), pytest.approx(b, abs=1e-4))
            assert n.score == pytest.approx((a - b) * float(column @ g), abs=1e-4)
            total += n.score
            # The score is itself what is lost, up to the norm's scale: a share of it is not told.
            assert n.lost_without_image is None
            scaled = 1 - b * float(column @ (g * sigma / blank_sigma)) / (a * float(column @ g))
            assert contributions[n.neuron].lost_without_image == pytest.approx(scaled, rel=1e-2, abs=1e-2)
        # With what attention wrote more, it is the whole difference of the logits, the norm's scale held; the embedding
        # of the last word read is the same in both.
        difference = noun.logit - float(other @ g)
        assert abs(difference) > 0.1
        attention = sum(float((one - two)[0, position] @ g) for one, two in zip(*heard, strict=True))
        assert float(total) + attention == pytest.approx(difference, abs=1e-3)
        assert noun.parts == plain.parts or noun.parts.total == pytest.approx(plain.parts.total)


def test_what_a_neuron_says_follows_what_it_does_over_its_baseline(random_vlm, sample_paths):
    found = mmn.find(random_vlm, sample_paths[0], caption="a dog", top=EVERY, baseline="blank").nouns[0]
    zero = mmn.find(random_vlm, sample_paths[0], caption="a dog", top=EVERY).nouns[0]
    plain = {n.neuron: n for n in zero.neurons}
    turned = [n for n in found.neurons if n.baseline is not None and (n.activation < 0) != (n.activation < n.baseline)]
    assert turned
    for n in turned[:20]:
        card = mmn.explain_neuron(random_vlm, n.neuron, n_neighbours=0)
        assert n.tokens == (card.suppressed if n.activation < (n.baseline or 0.0) else card.tokens)
        assert n.tokens != plain[n.neuron].tokens


def test_a_map_follows_the_sign_that_the_words_follow(vlm, sample_paths):
    """A neuron that fires less than behind a blank picture pushes against its column: its map is turned with it."""
    over = mmn.find(vlm, sample_paths[0], baseline="blank", top=50, maps=True)
    plain = mmn.find(vlm, sample_paths[0], top=5120, maps=True)
    turned = 0
    for noun, usual in zip(over.nouns, plain.nouns, strict=True):
        known = {neuron.neuron: neuron.maps for neuron in usual.neurons}
        for neuron in noun.neurons:
            excess = neuron.activation - neuron.baseline
            sign = 1 if (excess > 0) == (neuron.activation > 0) else -1
            turned += sign < 0
            ours, theirs = torch.tensor(neuron.maps), torch.tensor(known[neuron.neuron])
            torch.testing.assert_close(ours, sign * theirs, rtol=1e-5, atol=1e-6)
    assert turned, "else nothing was seen"


@pytest.fixture(scope="module")
def reference(vlm, sample_paths):
    return mmn.make_reference(vlm, list(sample_paths[1:9]))


def test_a_reference_is_the_mean_where_other_nouns_are_said(vlm, reference, sample_paths):
    found = mmn.find(vlm, sample_paths[0], top=20, baseline=reference)
    assert found.baseline == "reference"
    assert found.provenance["settings"]["baseline"]["images"] == 8
    others = mmn.find(vlm, list(sample_paths[1:9]))
    for noun in found.nouns:
        rows = []
        for path, other in zip(sample_paths[1:9], others, strict=True):
            raw = raw_pass(vlm, open_image(path).image, list(other.token_ids))
            for one in other.nouns:
                if one.lemma != noun.lemma:
                    rows.append([layer[0, raw["prompt"] + one.step - 1].detach() for layer in raw["a"]])
        for n in noun.neurons:
            mean = torch.stack([row[n.neuron.layer][n.neuron.index] for row in rows]).mean()
            assert n.baseline == pytest.approx(float(mean), rel=1e-3, abs=1e-3)
        assert [n.score for n in noun.neurons] == sorted((n.score for n in noun.neurons), reverse=True)


def test_what_is_lost_over_a_reference_is_a_share_of_the_score_over_it(vlm, reference, sample_paths):
    """By hand: the same means are taken off the activations behind a grey picture, read along its own directions."""
    image = open_image(sample_paths[0]).image
    found = mmn.find(vlm, image, top=30, baseline=reference, blank=True)
    grey = raw_pass(vlm, grey_like(image), list(found.token_ids))
    language, unembed = vlm.model.model.language_model, vlm.model.lm_head.weight.detach()
    for noun in found.nouns:
        position = grey["prompt"] + noun.step - 1
        x = grey["x"][position].detach()
        sigma = (x.pow(2).mean() + language.norm.variance_epsilon).sqrt()
        g = language.norm.weight.detach() * unembed[noun.token_id] / sigma
        for n in noun.neurons:
            column = language.layers[n.neuron.layer].mlp.down_proj.weight.detach()[:, n.neuron.index]
            fired = float(grey["a"][n.neuron.layer][0, position, n.neuron.index])
            assert n.baseline is not None
            left = (fired - n.baseline) * float(column @ g)
            assert n.lost_without_image == pytest.approx(1 - left / n.score, rel=1e-3, abs=1e-3)


def test_what_has_no_baseline_is_told(vlm, random_vlm, reference, sample_paths):
    with pytest.raises(SettingError, match=r"(?s)no baseline 'grey'.*zero, blank.*make_reference"):
        FindSettings(baseline="grey")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match=r"(?s)are what is lost.*--no-blank"):
        FindSettings(baseline="blank", blank=True)
    with pytest.raises(SettingError, match="without a picture has no blank"):
        mmn.find(vlm, None, caption="a dog", prompt="Say something.", baseline="blank")
    with pytest.raises(SettingError, match="ready-made inputs"):
        mmn.find(vlm, inputs=vlm.encode([open_image(sample_paths[0]).image]), baseline="blank")
    with pytest.raises(SettingError, match="gates"):
        mmn.find(vlm, sample_paths[0], score="paper", baseline=reference)
    with pytest.raises(ModelError, match="made with other weights"):
        mmn.find(random_vlm, sample_paths[0], caption="a dog", baseline=reference)
    only = mmn.make_reference(vlm, [], ["A dog is a kind of animal."])
    with pytest.raises(SettingError, match=r"(?s)says no noun but 'dog'.*make_reference"):
        mmn.find(vlm, sample_paths[0], caption="a dog", baseline=only)


@pytest.mark.parametrize("score", ["logprob", "paper"])
def test_other_scores_take_a_blank_baseline_too(vlm, sample_paths, score):
    zero, blank = (
        mmn.find(vlm, sample_paths[0], score=score, top=vlm.anatomy.n_neurons, baseline=baseline)
        for baseline in ("zero", "blank")
    )
    for noun, over in zip(zero.nouns, blank.nouns, strict=True):
        contributions = {n.neuron: n for n in noun.neurons}
        for n in over.neurons[:50]:
            plain = contributions[n.neuron]
            assert plain.activation == pytest.approx(n.activation)
            if abs(plain.activation) > 1e-2:
                share = 1 - (n.baseline or 0.0) / n.activation
                assert n.score == pytest.approx(plain.score * share, rel=1e-3, abs=1e-5)


def test_saved_and_shown(vlm, sample_paths, tmp_path, capsys, monkeypatch):
    found = mmn.find(vlm, sample_paths[0], baseline="blank", says="standardised")
    mmn.save_findings(found, tmp_path / "f.json")
    (read,) = mmn.load_findings(tmp_path / "f.json")
    assert (read.baseline, read.says) == ("blank", "standardised")
    assert read.nouns[0].neurons[0].baseline == pytest.approx(found.nouns[0].neurons[0].baseline, rel=1e-6)
    row = read.rows()[0]
    assert (row["baseline"], row["says"]) == ("blank", "standardised")
    assert row["baseline_activation"] == read.nouns[0].neurons[0].baseline
    mmn.write_report(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "over those of the same answer with a blank image" in page
    assert "next to all neurons, in deviations" in page
    options = ["--baseline", "blank", "--says", "raw", "--no-maps"]
    code, shown, _ = call(capsys, monkeypatch, "find", sample_paths[0], *options)
    assert code == 0
    assert "baseline blank" in shown
    assert "says, raw" in shown


def test_other_images_on_the_command_line(vlm, sample_paths, capsys, tmp_path, monkeypatch):
    for path in sample_paths[1:5]:
        (tmp_path / Path(path).name).write_bytes(Path(path).read_bytes())
    options = ["--baseline", str(tmp_path), "--no-maps", "--json", "-"]
    code, out, _ = call(capsys, monkeypatch, "find", sample_paths[0], *options)
    assert code == 0
    (found,) = result.from_json(out)
    assert found.baseline == "reference"
    expected = mmn.find(vlm, sample_paths[0], baseline=mmn.make_reference(vlm, sample_paths[1:5]))
    assert [n.neuron for n in found.nouns[0].neurons] == [n.neuron for n in expected.nouns[0].neurons]
