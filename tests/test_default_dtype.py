"""Numbers are made in the type that they are meant in, whatever `torch.set_default_dtype` says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mmneurons as mmn

MAKERS = {"zeros", "empty", "ones", "full", "eye", "rand", "randn", "linspace"}


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def other_default(request) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_tensor_of_numbers_names_its_type():
    nameless = []
    for path in (Path(mmn.__file__).parent).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS:
                of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
                if of_torch and "dtype" not in {keyword.arg for keyword in call.keywords}:
                    nameless.append(f"{path.name}:{call.lineno}")
    assert nameless == []


def test_find_edit_and_doctor_give_the_same(vlm, sample_paths, other_default):
    mine = mmn.load(device="cpu")
    assert mine.model.dtype == torch.float32
    checks = mmn.doctor(mine, sample_paths[0], max_new_tokens=3).checks
    assert [check for check in checks if not check.passed] == []
    found = mmn.find(mine, sample_paths[0], maps=True, blank=True)
    patch = mmn.edit(mine, sample_paths[:1], source="gorilla", target="horse", reference="own")
    with patch.applied(mine):
        edited = mine.caption(sample_paths[0])
    torch.set_default_dtype(torch.float32)
    assert found.caption == vlm.caption(sample_paths[0])
    assert "horse" in edited
    usual = mmn.find(vlm, sample_paths[0], maps=True, blank=True)
    for noun, other in zip(found.nouns, usual.nouns, strict=True):
        assert [n.neuron for n in noun.neurons] == [n.neuron for n in other.neurons]
        assert [n.score for n in noun.neurons] == pytest.approx([n.score for n in other.neurons], rel=1e-4)
