import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmneurons.maths.ranking import said_tokens, top_k
from mmneurons.maths.readout import Norm, expected_row, frozen_direction, jacobian_direction
from mmneurons.vlm.anatomy.norms import measure_norm

HIDDEN = 12


def norms():
    torch.manual_seed(0)
    made = {
        "rms": LlamaRMSNorm(HIDDEN, eps=1e-5),
        "one plus w": GemmaRMSNorm(HIDDEN, eps=1e-6),
        "layer norm": nn.LayerNorm(HIDDEN, eps=1e-5),
        "layer norm, odd width": nn.LayerNorm(HIDDEN + 1, eps=1e-12),
        "layer norm, no bias": nn.LayerNorm(HIDDEN, bias=False),
        "large epsilon": LlamaRMSNorm(HIDDEN, eps=0.1),
        "half": LlamaRMSNorm(HIDDEN, eps=1e-5).bfloat16(),
    }
    for module in made.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.3)
    return made


@pytest.mark.parametrize("kind", norms())
def test_a_norm_is_measured_as_what_it_does(kind):
    module = norms()[kind]
    hidden = next(module.parameters()).shape[0]
    measured = measure_norm(module, hidden)
    x = torch.randn(5, hidden)
    torch.testing.assert_close(measured(x), module.float()(x), rtol=2e-5, atol=2e-5)
    assert measured.centred == isinstance(module, nn.LayerNorm)


def by_hand(centred=False):
    weight = torch.tensor([2.0, 1.0, -1.0])
    return Norm(weight, torch.zeros(3), eps=0.0, centred=centred)


def test_frozen_direction_of_a_toy():
    # x = (3, 0, 4): mean square 25/3, sigma 5/sqrt(3); weight * row = (2, 0, -3).
    direction = frozen_direction(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[3.0, 0.0, 4.0]]), by_hand())
    torch.testing.assert_close(direction, torch.tensor([[2.0, 0.0, -3.0]]) * 3**0.5 / 5)


def test_frozen_direction_of_a_layer_norm_ignores_what_is_the_same_everywhere():
    direction = frozen_direction(torch.randn(2, 3), torch.randn(2, 3), by_hand(centred=True))
    torch.testing.assert_close(direction.sum(-1), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("centred", [False, True])
def test_jacobian_direction_is_the_gradient(centred):
    torch.manual_seed(1)
    norm = Norm(torch.randn(HIDDEN), torch.randn(HIDDEN), eps=1e-3, centred=centred)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    rows = torch.randn(4, HIDDEN)
    (gradient,) = torch.autograd.grad((norm(x) * rows).sum(), x)
    torch.testing.assert_close(jacobian_direction(rows, x.detach(), norm), gradient, rtol=1e-4, atol=1e-5)


def test_expected_row_reads_every_chunk():
    probabilities, unembed = torch.rand(3, 10), torch.randn(10, 4)
    expected = expected_row(probabilities, unembed.bfloat16(), chunk=3)
    torch.testing.assert_close(expected, probabilities @ unembed.bfloat16().float())


@given(
    st.integers(1, 60).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_top_k_breaks_ties_by_index_in_each_row(rows):
    found = [top_k(torch.tensor(rows, dtype=torch.float32), k) for k in (1, 5, 80)]
    for row, values in enumerate(rows):
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert [part[row].tolist() for part in found] == [order[:1], order[:5], order[:80]]
        assert top_k(torch.tensor(values, dtype=torch.float32), 5).tolist() == order[:5]


def test_said_tokens_of_a_toy():
    unembed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 2.0]])
    up, down = said_tokens(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), unembed, n_promoted=2, n_suppressed=1)
    assert up.tolist() == [[3, 0], [2, 1]]
    assert down.tolist() == [[2], [3]]


@pytest.mark.parametrize("vocab", [600, 5119, 5120, 20001])
def test_said_tokens_of_a_large_vocabulary_are_those_of_a_full_sort(vocab, monkeypatch):
    monkeypatch.setattr("mmneurons.maths.ranking.LOGITS_AT_ONCE", 2 * vocab)  # several slices
    torch.manual_seed(0)
    columns, unembed = torch.randn(5, 3), torch.randn(vocab, 3)
    order = (columns @ unembed.T).argsort(dim=-1, descending=True)
    up, down = said_tokens(columns, unembed)
    assert torch.equal(up, order[:, :10])
    assert torch.equal(down, order.flip(-1)[:, :3])
