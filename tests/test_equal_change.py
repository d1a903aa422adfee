"""How far neurons move the residual stream, and the factors at which others move it as far."""

import pytest
import torch

import mmneurons as mmn
from mmneurons.attribution.ablation import replays
from mmneurons.attribution.equal_change import changes, equally_changing
from mmneurons.settings import ANSWER_PREFIX, PROMPT

IMAGE = mmn.pocket.scene(7, ["dog"]).image


def step_of(vlm):
    inputs = vlm.encode([[IMAGE]], PROMPT, ANSWER_PREFIX)
    return replays(vlm, inputs, [0]).replays[0]


@pytest.fixture(scope="module")
def step(random_vlm):
    return step_of(random_vlm)


def test_in_the_last_block_the_change_is_what_the_neurons_wrote(random_vlm, step):
    """Nothing lies between that block and the final norm: silence takes away the sum of activation times column."""
    last = len(step.activations) - 1
    w = random_vlm.model.model.language_model.layers[last].mlp.down_proj.weight.detach()
    indices = torch.tensor([3, 8, 40])
    written = w[:, indices] @ step.activations[last][indices]
    slots = indices + int(step.slot_starts[last])
    silenced, tripled, unchanged, nothing = changes(
        step, [slots, slots, slots, slots[:0]], torch.tensor([0.0, 3.0, 1.0, 0.0])
    ).tolist()
    assert silenced == pytest.approx(float(written.norm()), rel=1e-3)
    assert tripled == pytest.approx(2 * silenced, rel=1e-3)
    assert unchanged == pytest.approx(0, abs=1e-3 * silenced)
    assert nothing == pytest.approx(0, abs=1e-3 * silenced)
    assert changes(step, [slots]).tolist() == pytest.approx([silenced], rel=1e-4), "silence is the default"


def test_factors_of_the_last_block_by_hand(step):
    """There the change is linear: half as much is written by others, so that twice as much is taken: times -1."""
    last = len(step.activations) - 1
    start = int(step.slot_starts[last])
    chosen, other = torch.arange(5) + start, torch.arange(10, 16) + start
    whole, part = changes(step, [chosen, other]).tolist()
    factors, reached = equally_changing(step, chosen, [other, chosen, other[:0]])
    assert factors[0] == pytest.approx(1 - whole / part, rel=1e-3, abs=1e-3)
    assert factors[1] == pytest.approx(0, abs=1e-3)
    assert reached.tolist() == pytest.approx([1, 1, 0], abs=1e-3)
    assert factors[2] == 0, "an empty set is left as it is"


def test_lower_blocks_are_followed_through_all_later_ones(step):
    first = torch.arange(0, 20, 2)
    sets = [torch.arange(1, 20, 2), torch.arange(21, 60, 3)]
    factors, reached = equally_changing(step, first, sets)
    assert reached.tolist() == pytest.approx([1, 1], abs=0.01)
    (wanted,) = changes(step, [first])
    assert changes(step, sets, factors).tolist() == pytest.approx([float(wanted)] * 2, rel=0.01)


def test_each_set_of_a_mixture_has_its_own_factor(mixture_vlm):
    step = step_of(mixture_vlm)
    sets = [torch.arange(4), torch.arange(4, 9)]
    together = changes(step, sets, torch.tensor([-1.0, 2.0]))
    alone = [changes(step, [one], torch.tensor([factor]))[0] for one, factor in zip(sets, (-1.0, 2.0), strict=True)]
    assert together.tolist() == pytest.approx([float(one) for one in alone], rel=1e-3)


def test_where_nothing_is_to_be_matched_nothing_is_scaled_up(step):
    factors, reached = equally_changing(step, torch.tensor([], dtype=torch.long), [torch.arange(3)])
    assert reached.tolist() == [1]
    assert factors[0] == pytest.approx(1, abs=1e-3), "left as they are"
