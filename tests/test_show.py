"""What `patch show` says, as data and as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mmneurons as mmn
from mmneurons.errors import ModelError
from mmneurons.neurons import Neuron
from mmneurons.patches.describe import describe_patch
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart, stack
from mmneurons.report.patch import patch_text
from mmneurons.vlm.columns import HASH_BYTES, column_hashes

MADE_BY: dict[str, Any] = {
    "source": "dog",
    "target": "cat",
    "settings": {"method": "selective"},
    "search": {"strength": 34.9034, "turned": 1.0, "changed": 1, "looked_at": 16},
    "images": 8,
    "reference": {"images": 60, "texts": 0},
    "model": {"id": "pocket", "revision": None, "dtype": "float32"},
}


def toy(vlm, columns: dict[int, list[int]], directions: torch.Tensor, coefficients: list[list[float]], **more) -> Patch:
    """A patch by coefficients, column after column."""
    parts, rows = [], torch.tensor(coefficients)
    for layer, mine in columns.items():
        indices = torch.tensor(mine)
        hashes = column_hashes(ledger_of(vlm).pristine((layer, None), indices))
        parts.append(PatchPart(layer, None, indices, hashes, None, rows[: len(mine)]))
        rows = rows[len(mine) :]
    return Patch(vlm.anatomy.hidden, tuple(parts), directions, more.get("provenance", MADE_BY))


@pytest.fixture(scope="module")
def says_cat(vlm):
    """Column L4.u3 is moved far along what the logit of " cat" reads, L2.u1 a little."""
    token = vlm.tokenizer(" cat", add_special_tokens=False).input_ids[0]
    direction = vlm.anatomy.unembed[token].detach().float()
    return toy(vlm, {2: [1], 4: [3]}, direction[None] / direction.norm(), [[0.5], [100.0]])


def test_sizes_shares_and_tokens(vlm, says_cat):
    told = describe_patch(says_cat, vlm)
    far, little = told.changes
    assert (far.neuron, little.neuron) == (Neuron(4, 3), Neuron(2, 1))
    assert (far.size, little.size) == (pytest.approx(100), pytest.approx(0.5))
    for change in told.changes:
        column = vlm.anatomy.ffns[change.neuron.layer].module.weight.detach()[:, change.neuron.index]
        assert change.share == pytest.approx(change.size / float(column.norm()))
    assert far.after[0] == " cat"
    card = mmn.explain_neuron(vlm, far.neuron)
    assert list(far.before) == list(card.tokens[: len(far.before)])
    assert (told.blocks, told.rank, told.hash) == ((2, 4), 1, says_cat.hash)


def test_patches_that_are_active_do_not_count_and_nothing_changes(vlm, says_cat):
    expected = describe_patch(says_cat, vlm)
    with says_cat.applied(vlm), (2 * says_cat).applied(vlm):
        before = ledger_of(vlm).active
        assert describe_patch(says_cat, vlm) == expected
        assert ledger_of(vlm).active == before


def test_without_a_model_there_are_sizes_alone(vlm, says_cat):
    told = describe_patch(says_cat)
    assert [change.size for change in told.changes] == [change.size for change in describe_patch(says_cat, vlm).changes]
    assert {(change.share, change.before, change.after) for change in told.changes} == {(None, (), ())}


def test_bytes_are_those_of_the_file(says_cat, tmp_path):
    says_cat.save(tmp_path / "p.safetensors")
    assert describe_patch(says_cat).n_bytes == (tmp_path / "p.safetensors").stat().st_size


def test_the_rank_is_that_of_the_change(vlm):
    """Whatever the number of directions: alike ones, unused ones, and in full."""
    one, two, three = torch.randn(3, vlm.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    columns = {1: [0, 1], 3: [2, 3]}
    alike = toy(vlm, columns, torch.stack([one, 2 * one]), [[1.0, 0], [0, 1], [1, 1], [2, 0]])
    assert describe_patch(alike).rank == 1
    second = toy(vlm, columns, torch.stack([one, 2 * one]), [[0.0, 1], [0, 1], [0, 3], [0, 2]])
    assert describe_patch(second).rank == 1
    unused = toy(vlm, columns, torch.stack([one, two, three]), [[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0]])
    assert describe_patch(unused).rank == 2
    full = replace(unused, parts=tuple(replace(p, deltas=unused.deltas(p), coefficients=None) for p in unused.parts))
    assert describe_patch(replace(full, directions=None)).rank == 2
    assert describe_patch(Patch(8, ())).rank == 0


def test_a_patch_of_another_model_is_refused(vlm, random_vlm, says_cat):
    with pytest.raises(ModelError, match=r"another model"):
        describe_patch(says_cat, random_vlm)
    wrong = replace(says_cat.parts[1], hashes=torch.zeros(1, HASH_BYTES, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"L4\.u3 is not the one"):
        describe_patch(replace(says_cat, parts=(says_cat.parts[0], wrong)), vlm)
    deep = replace(says_cat.parts[1], layer=77)
    with pytest.raises(ModelError, match=r"(?s)another model.*L77\.u3"):
        describe_patch(replace(says_cat, parts=(deep,)), vlm)


def test_the_text(vlm, says_cat):
    lines = patch_text(describe_patch(says_cat, vlm)).splitlines()
    assert lines[0].startswith("2 columns of 2 blocks (2, 4), rank 1, ")
    assert lines[1].split() == ["hash", says_cat.hash[:16]]
    told = dict(line.split(maxsplit=1) for line in lines[2 : lines.index("")])
    assert told == {
        "source": "dog",
        "target": "cat",
        "model": "pocket float32",
        "images": "8",
        "reference": "60 images, 0 texts",
        "search": "strength 34.9, turned 1, reference answers changed 1 of 16",
        "method": "selective",
    }
    head, far, little = lines[lines.index("") + 1 :]
    assert head.split("  ")[0] == "neuron"
    assert far.startswith("L4.u3")
    assert far[head.index("says after") :].startswith("cat ")
    assert little.startswith("L2.u1")
    bare = patch_text(describe_patch(says_cat), listed=1).splitlines()
    assert bare[-2].split() == ["L4.u3", "100"]
    assert bare[-1] == "... and 1 more, that change less (mmneurons patch show --all)"


def test_the_text_of_a_removal_a_stack_and_a_stranger_s_file(vlm, says_cat):
    removal = replace(says_cat, provenance=MADE_BY | {"target": None, "reference": None, "search": {}})
    text = patch_text(describe_patch(removal))
    assert "target     (anything else)" in text
    assert "reference  none" in text
    both = patch_text(describe_patch(stack([says_cat, 2 * removal])))
    assert "1: target     cat" in both
    assert "2: target     (anything else)" in both
    for odd in ({}, {"stacked": 3}, {"source": "\x1b[31mdog\n", "model": 7, "search": [1], "settings": None}):
        text = patch_text(describe_patch(replace(says_cat, provenance=odd)))
        assert "\x1b" not in text
        assert "\r" not in text
    assert "0 columns of 0 blocks, rank 0" in patch_text(describe_patch(Patch(8, ())))
