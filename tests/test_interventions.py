import pytest
import torch

import mmneurons as mmn
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.vlm.hooks.interventions import Intervention, intervene, shuffled


@pytest.fixture
def given(random_vlm):
    scenes = [mmn.pocket.scene(seed).image for seed in range(2)]
    return random_vlm.encode(scenes)


@torch.inference_mode()
def stream(vlm, given):
    """What each position's last block gives: (batch, positions, hidden)."""
    return vlm.model(**given, output_hidden_states=True).hidden_states[-2]


def down(vlm, layer):
    return vlm.model.model.language_model.layers[layer].mlp.down_proj


def test_values_replace_activations(random_vlm, given):
    seen = []
    hook = down(random_vlm, 1).register_forward_hook(lambda _, args, output: seen.append(args[0]))
    try:
        with intervene(random_vlm, ["L1.u5", "L1.u2"], values=[0.25, -3.0]):
            random_vlm.model(**given)
        random_vlm.model(**given)
    finally:
        hook.remove()
    changed, plain = seen
    assert (changed[..., 5] == 0.25).all()
    assert (changed[..., 2] == -3.0).all()
    others = [i for i in range(changed.shape[-1]) if i not in (2, 5)]
    assert torch.equal(changed[..., others], plain[..., others])


def test_positions_are_counted_through_cached_decoding(random_vlm, given):
    n_prompt = given["input_ids"].shape[1]
    fired = []
    hook = down(random_vlm, 0).register_forward_hook(lambda _, args, output: fired.append(args[0][..., 7].clone()))
    try:
        with intervene(random_vlm, ["L0.u7"], values=9.0, positions=[3, n_prompt + 1]):
            random_vlm.generate(given, 4)
    finally:
        hook.remove()
    whole = torch.cat(fired, dim=1)
    assert (whole == 9.0).all(0).nonzero().flatten().tolist() == [3, n_prompt + 1]


def test_earlier_positions_do_not_notice(random_vlm, given):
    plain = stream(random_vlm, given)
    with intervene(random_vlm, ["L0.u1", "L2.u3"], scale=5, positions=[40]):
        changed = stream(random_vlm, given)
    assert torch.equal(changed[:, :40], plain[:, :40])
    assert (changed[:, 40] - plain[:, 40]).abs().max() > 1e-4


@pytest.mark.parametrize("how", [{"scale": 0.0}, {"noise": 3.0}])
def test_rows_of_one_batch_are_changed_each_in_its_way(random_vlm, given, how):
    neurons = tuple(map(Neuron.parse, ("L0.u1", "L2.u3"))), tuple(map(Neuron.parse, ("L0.u1", "L1.u7")))
    first, second = (Intervention(mine, **how, seed=i, rows=(i,)) for i, mine in enumerate(neurons))
    with intervene(random_vlm, first), intervene(random_vlm, second):
        together = stream(random_vlm, given)
    for i, mine in enumerate(neurons):
        with intervene(random_vlm, Intervention(mine, **how, seed=i)):
            torch.testing.assert_close(together[i], stream(random_vlm, given)[i])
    with intervene(random_vlm, first):
        alone = stream(random_vlm, given)
    torch.testing.assert_close(alone[1], stream(random_vlm, given)[1])


def test_nested_changes_add_up_and_records_see_them(random_vlm, given):
    twice, thrice = intervene(random_vlm, ["L0.u1"], scale=2), intervene(random_vlm, ["L0.u1", "L1.u1"], scale=3)
    with twice, thrice, mmn.record(random_vlm.anatomy, writes=False) as inside:
        random_vlm.read(given)
    with mmn.record(random_vlm.anatomy, writes=False) as plain:
        random_vlm.read(given)
    torch.testing.assert_close(inside.activations(0)[..., 1], 6 * plain.activations(0)[..., 1])
    assert not torch.equal(inside.activations(1)[..., 2], plain.activations(1)[..., 2])


def test_noise_depends_on_its_seed_and_not_on_the_order(random_vlm, given):
    def noisy(names, seed):
        with intervene(random_vlm, names, noise=0.5, seed=seed):
            return stream(random_vlm, given)

    first = noisy(["L0.u1", "L2.u9"], 1)
    assert torch.equal(first, noisy(["L2.u9", "L0.u1"], 1))
    assert not torch.equal(first, noisy(["L0.u1", "L2.u9"], 2))


def test_nothing_stays_behind_after_an_error(random_vlm, given):
    plain = stream(random_vlm, given)
    with pytest.raises(RuntimeError), intervene(random_vlm, ["L0.u1"], scale=0):
        raise RuntimeError
    assert torch.equal(stream(random_vlm, given), plain)


def test_a_caption_changes_while_its_neurons_are_turned_round(vlm):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    finding = mmn.find(vlm, scene.image, top=300)
    neurons = [n.neuron for n in finding.nouns[0].neurons]
    with intervene(vlm, neurons, scale=-3) as change:
        assert change == Intervention(tuple(neurons), scale=-3)
        assert vlm.caption(scene.image) != finding.caption
    assert vlm.caption(scene.image) == finding.caption
    with intervene(vlm, change):
        assert vlm.caption(scene.image) != finding.caption


@torch.inference_mode()
def test_shuffled_patches_change_places_and_nothing_else_does(random_vlm, given):
    positions = torch.nonzero(given["input_ids"][0] == random_vlm.model.config.image_token_id).T.expand(2, -1)
    entered = []
    block = random_vlm.model.model.language_model.layers[0]
    with shuffled(random_vlm, positions, seed=1):
        hook = block.register_forward_hook(lambda _, args, kwargs, output: entered.append(args[0]), with_kwargs=True)
        answers = random_vlm.generate(given, 3)
    random_vlm.generate(given, 1)
    hook.remove()
    mixed, plain = entered[0], entered[-1]
    others = [i for i in range(plain.shape[1]) if i not in positions[0].tolist()]
    assert torch.equal(mixed[:, others], plain[:, others])
    assert not torch.equal(mixed[:, positions[0]], plain[:, positions[0]])
    for row in range(2):  # every patch is still there, once
        assert torch.equal(*(x[row, positions[row]][x[row, positions[row], 0].argsort()] for x in (mixed, plain)))
    assert len(answers.token_ids[0]) == 3


@pytest.mark.parametrize(
    ("neurons", "how", "says"),
    [
        (["L0.u1"], {}, "one thing"),
        (["L0.u1"], {"scale": 0, "noise": 1.0}, "one thing"),
        (["L0.u1"], {"values": [1.0, 2.0]}, "2 values for 1"),
        (["L0.u1", Neuron(0, 1)], {"scale": 0}, "named twice"),
        (["L9.u1"], {"scale": 0}, "no neuron L9.u1"),
        (["L0.e1.u1"], {"scale": 0}, "no neuron L0.e1.u1"),
        (["dog"], {"scale": 0}, "not the name of a neuron"),
    ],
)
def test_what_has_no_meaning_is_refused(random_vlm, neurons, how, says):
    with pytest.raises(SettingError, match=says), intervene(random_vlm, neurons, **how):
        pass
