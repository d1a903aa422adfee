import contextlib
import hashlib
import json
import os
import signal
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits import weight_forms
from kits.bounds import bounded

import mmneurons as mmn
from mmneurons.editing.evaluate_edits import cases
from mmneurons.errors import FormatError, MissingFileError, ModelError, SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches import ledger
from mmneurons.patches.describe import describe_patch
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart, stack
from mmneurons.report.patch import patch_text
from mmneurons.vlm import weights
from mmneurons.vlm.age import editing
from mmneurons.vlm.columns import HASH_BYTES, column_hashes

HIDDEN = 48  # of `random_vlm`
IMAGE = mmn.pocket.scene(3, ["dog", "car"]).image


def layers(vlm):
    return [block.mlp.down_proj.weight for block in vlm.model.model.language_model.layers]


def bits(vlm):
    return [w.detach().clone() for w in layers(vlm)]


def same(before, vlm):
    return all(torch.equal(a, b) for a, b in zip(before, layers(vlm), strict=True))


def a_patch(vlm, places, seed=0, rank_one=False):
    """A patch of random changes: {layer: columns}."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for layer, columns in places.items():
        indices = torch.tensor(sorted(columns))
        hashes = column_hashes(layers(vlm)[layer].detach()[:, indices].T)
        width = 1 if rank_one else vlm.anatomy.hidden
        change = torch.randn(len(indices), width, generator=random)
        parts.append(PatchPart(layer, None, indices, hashes, *((None, change) if rank_one else (change, None))))
    hidden = vlm.anatomy.hidden
    directions = torch.randn(1, hidden, generator=random) if rank_one else None
    return Patch(hidden, tuple(parts), directions, {"seed": seed})


@pytest.fixture
def edited(random_vlm):
    """The model; whatever a test leaves applied is taken back."""
    before = bits(random_vlm)
    yield random_vlm
    for patch in ledger_of(random_vlm).active:
        patch.revert(random_vlm)
    assert same(before, random_vlm)


def test_columns_are_what_they_were_and_the_deltas(edited):
    before = bits(edited)
    patch = a_patch(edited, {0: [3, 70], 2: [5]})
    with patch.applied(edited):
        now = bits(edited)
        for part in patch.parts:
            columns = part.indices
            torch.testing.assert_close(now[part.layer][:, columns].T, before[part.layer][:, columns].T + part.deltas)
            others = [i for i in range(80) if i not in columns.tolist()]
            assert torch.equal(now[part.layer][:, others], before[part.layer][:, others])
        assert torch.equal(now[1], before[1])
    assert same(before, edited)


def test_a_patched_model_is_a_model_with_those_weights(edited):
    patch = 3 * a_patch(edited, {1: list(range(40))}, rank_one=True)
    inputs = edited.encode([[IMAGE]])
    with torch.no_grad():
        usual = edited.model(**inputs).logits
        with patch.applied(edited):
            seen = edited.model(**inputs).logits
            weight = layers(edited)[1]
            kept = weight.detach().clone()
        assert not torch.allclose(seen, usual, atol=1e-2)
        plain = weight.detach().clone()
        try:
            weight.copy_(plain)
            weight[:, :40] += patch.deltas(patch.parts[0]).T
            assert torch.allclose(weight, kept)
            torch.testing.assert_close(edited.model(**inputs).logits, seen)
        finally:
            weight.copy_(plain)
        assert torch.equal(edited.model(**inputs).logits, usual)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=25))
def test_any_order_of_applying_and_taking_back_is_exact(random_vlm, moves):
    patches = [a_patch(random_vlm, {0: [1, 2, 3 + i], i % 3: [10 + i, 40]}, i, i % 2 == 0) for i in range(4)]
    before = bits(random_vlm)
    states: dict[tuple, list] = {(): before}
    active: set[int] = set()
    for i in moves:
        (patches[i].revert if i in active else patches[i].apply)(random_vlm)
        active ^= {i}
        key = tuple(sorted(active))
        seen = states.setdefault(key, bits(random_vlm))
        assert same(seen, random_vlm)
    for i in active:
        patches[i].revert(random_vlm)
    assert same(before, random_vlm)


def test_a_half_precision_model_is_rounded_once(vlm):
    from conftest import make_random_vlm

    half = make_random_vlm(vlm, torch.bfloat16)
    patches = [1e-3 * a_patch(half, {0: [4]}, seed) for seed in range(8)]
    before = bits(half)
    for patch in patches:
        patch.apply(half)
    total = torch.stack([p.deltas(p.parts[0]) for p in sorted(patches, key=lambda p: p.hash)]).sum(0)
    expected = (before[0][:, 4].float() + total[0]).bfloat16()
    assert torch.equal(layers(half)[0][:, 4], expected)
    for patch in patches[::-1]:
        patch.revert(half)
    assert same(before, half)


def test_an_exception_leaves_the_model_as_it_was(edited):
    before = bits(edited)
    with pytest.raises(KeyboardInterrupt), a_patch(edited, {0: [1]}).applied(edited):
        raise KeyboardInterrupt
    assert same(before, edited)


def test_a_failure_while_writing_leaves_nothing_half_applied(edited, monkeypatch):
    patch = a_patch(edited, {0: [1], 2: [4]})
    before = bits(edited)
    plan = ledger.Ledger._plan

    def broken(self, active):
        made = plan(self, active)
        return [*made[:1], replace(made[1], view=made[1].view[:5])]

    monkeypatch.setattr(ledger.Ledger, "_plan", broken)
    with pytest.raises(RuntimeError):
        patch.apply(edited)
    monkeypatch.undo()
    assert same(before, edited)
    assert ledger_of(edited).active == ()
    with patch.applied(edited):
        assert not same(before, edited)


def test_ctrl_c_while_writing_waits_for_the_end(edited, monkeypatch):
    patch = a_patch(edited, {0: [1], 2: [4]})
    plan = ledger.Ledger._plan

    class Interrupts(list):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return super().__iter__()

    monkeypatch.setattr(ledger.Ledger, "_plan", lambda self, active: Interrupts(plan(self, active)))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            patch.apply(edited)
    finally:
        signal.signal(signal.SIGINT, usual)
    monkeypatch.undo()
    assert ledger_of(edited).active == (patch,)
    for part in patch.parts:
        hashes = column_hashes(layers(edited)[part.layer].detach()[:, part.indices].T)
        assert not (hashes == part.hashes).all(1).any()


def test_a_patch_of_another_model_is_refused_and_the_column_named(edited, vlm):
    from conftest import make_random_vlm

    patch = a_patch(edited, {0: [1], 2: [4, 9]})
    before = bits(vlm)
    with pytest.raises(ModelError, match=r"(?s)another model.*48.*192"):
        patch.apply(vlm)
    assert same(before, vlm)
    other = make_random_vlm(vlm, seed=1)
    with pytest.raises(ModelError, match=r"(?s)column L0\.u1 is not the one"):
        patch.apply(other)
    rounded = make_random_vlm(vlm, torch.bfloat16)
    with pytest.raises(ModelError, match="dtype"):
        patch.apply(rounded)
    deep = Patch(HIDDEN, (PatchPart(7, None, *whole(edited)),))
    with pytest.raises(ModelError, match="There is no layer 7"):
        deep.apply(edited)
    wide = Patch(HIDDEN, (PatchPart(0, None, torch.tensor([80]), *whole(edited)[1:]),))
    with pytest.raises(ModelError, match="No neuron 80"):
        wide.apply(edited)


def whole(vlm):
    return torch.tensor([0]), column_hashes(layers(vlm)[0].detach()[:, :1].T), torch.ones(1, HIDDEN)


def test_a_model_changed_by_something_else_is_refused(edited):
    first, second = a_patch(edited, {0: [1]}), a_patch(edited, {0: [1, 2]}, seed=1)
    first.apply(edited)
    mine = layers(edited)[0].detach()[:, 1].clone()
    with torch.no_grad():
        layers(edited)[0][:, 1] += 1
    with pytest.raises(ModelError, match=r"L0\.u1 was changed by something else"):
        second.apply(edited)
    with torch.no_grad():
        layers(edited)[0][:, 1] = mine
    second.apply(edited)  # its hashes are of the columns before any edit


def test_clean_weights_that_were_loaded_are_clean(edited):
    """As after `load_state_dict`: a patch that the ledger still counts can be taken back, and nothing is changed."""
    before = bits(edited)
    patch = a_patch(edited, {0: [1]})
    with patch.applied(edited), torch.no_grad():
        layers(edited)[0].copy_(before[0])
    assert same(before, edited)


def test_weights_that_something_else_replaced_can_be_taken_for_unedited(vlm):
    from conftest import make_random_vlm

    own = make_random_vlm(vlm)
    patch = a_patch(own, {0: [1]})
    patch.apply(own)
    old_hash = own.facts["weights_hash"]
    own.model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"(?s)changed by something else.*forget"):
        patch.revert(own)
    mmn.forget(own)
    assert ledger_of(own).active == ()
    assert own.facts["weights_hash"] != old_hash
    with pytest.raises(ModelError, match="dtype"):
        patch.apply(own)
    before = bits(own)
    with a_patch(own, {0: [1]}).applied(own):
        assert not same(before, own)
    assert same(before, own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_patch_that_overflows_is_refused_before_it_is_written(vlm, dtype):
    from conftest import make_random_vlm

    own = make_random_vlm(vlm, dtype)
    before = bits(own)
    indices = torch.tensor([3])
    hashes = column_hashes(before[0][:, indices].T)
    change = torch.full((1, HIDDEN), 0.9 * torch.finfo(dtype).max)
    whole = Patch(HIDDEN, (PatchPart(0, None, indices, hashes, change),))
    with (0.5 * whole).applied(own):
        for other in (0.7 * whole, -1.0 * whole):  # too large together, or if the other is taken back first
            with pytest.raises(SettingError, match=r"too large for the model's column L0\.u3"):
                other.apply(own)
    assert same(before, own)


def test_coefficients_and_directions_that_overflow_are_no_patch():
    part = PatchPart(0, None, torch.tensor([1]), torch.zeros(1, HASH_BYTES, dtype=torch.uint8), None, torch.ones(1, 2))
    Patch(HIDDEN, (part,), torch.full((2, HIDDEN), 1e38))
    with pytest.raises(SettingError, match="larger than float32"):
        Patch(HIDDEN, (part,), torch.full((2, HIDDEN), 2e38))


def test_a_column_that_held_nan_before_is_given_back_bit_for_bit(vlm):
    from conftest import make_random_vlm

    own = make_random_vlm(vlm)
    with editing(own.model), torch.no_grad():  # such a model gives no logits, and is refused where it is noticed
        layers(own)[0][0, 5] = torch.nan
        layers(own)[0][1, 5] = -0.0
    before = [weight.numpy().tobytes() for weight in bits(own)]
    with a_patch(own, {0: [5, 6]}).applied(own):
        assert [weight.numpy().tobytes() for weight in bits(own)] != before
    assert [weight.numpy().tobytes() for weight in bits(own)] == before


def test_a_failed_apply_remembers_nothing(edited, monkeypatch):
    patch = a_patch(edited, {0: [1], 2: [4]})
    plan = ledger.Ledger._plan
    monkeypatch.setattr(
        ledger.Ledger, "_plan", lambda self, active: [replace(c := plan(self, active)[0], view=c.view[:5])]
    )
    with pytest.raises(RuntimeError):
        patch.apply(edited)
    monkeypatch.undo()
    kept = layers(edited)[0].detach()[:, 1].clone()
    try:
        with torch.no_grad():
            layers(edited)[0][:, 1] += 1
        with pytest.raises(ModelError, match=r"L0\.u1 is not the one"):
            patch.apply(edited)
    finally:
        with torch.no_grad():
            layers(edited)[0][:, 1] = kept


def test_twice_and_never_are_refused(edited):
    patch = a_patch(edited, {0: [1]})
    with pytest.raises(SettingError, match="not applied"):
        patch.revert(edited)
    with patch.applied(edited), pytest.raises(SettingError, match="applied already"):
        patch.apply(edited)


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, False)])
def test_a_stack_does_what_all_do(edited, kinds):
    one, two = (a_patch(edited, {0: [1, 5], i: [7, 9]}, i, kind) for i, kind in zip((1, 2), kinds, strict=True))
    both = one + two
    with one.applied(edited), two.applied(edited):
        apart = bits(edited)
    with both.applied(edited):
        for a, b in zip(apart, layers(edited), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
    assert set(map(str, both.neurons)) == {*map(str, one.neurons), *map(str, two.neurons)}


def test_patches_that_expect_different_columns_do_not_stack(edited, vlm):
    from conftest import make_random_vlm

    other = make_random_vlm(vlm, seed=1)
    with pytest.raises(SettingError, match=r"different columns of L0\.u1"):
        stack([a_patch(edited, {0: [1]}), a_patch(other, {0: [1]})])


@pytest.mark.parametrize("rank_one", [True, False])
def test_a_file_gives_the_same_patch_and_the_same_bytes(random_vlm, tmp_path, rank_one):
    patch = a_patch(random_vlm, {0: [1, 5], 2: [7]}, rank_one=rank_one)
    patch.save(tmp_path / "a.safetensors")
    again = Patch.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert again.hash == patch.hash
    assert again.provenance == {"seed": 0}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_bytes_of_the_format_do_not_change_unnoticed(tmp_path):
    hashes = column_hashes(torch.arange(8.0).view(2, 4))
    full = PatchPart(3, None, torch.tensor([1, 7]), hashes, torch.arange(8.0).view(2, 4))
    thin = PatchPart(3, 5, torch.tensor([0, 2]), hashes, None, torch.tensor([[0.5], [-2.0]]))
    Patch(4, (full, thin), torch.ones(1, 4), {"source": "dog"}).save(tmp_path / "p.safetensors")
    assert hashlib.sha256((tmp_path / "p.safetensors").read_bytes()).hexdigest() == GOLDEN
    assert Patch.load(tmp_path / "p.safetensors").neurons == [Neuron.parse(n) for n in NAMES]


GOLDEN = "c47fcae49d9bc06848b3c41e7af57859b8a1593cdb84bc503b283e4bcd8909c1"
NAMES = ("L3.e5.u0", "L3.u1", "L3.e5.u2", "L3.u7")


def test_a_notebook_shows_a_patch_in_a_line_and_a_table(random_vlm):
    patch = replace(
        a_patch(random_vlm, {0: [1, 5], 1: [2]}), provenance={"source": "<b>dog</b>\n" * 99, "target": None}
    )
    assert len(repr(patch)) < 150
    assert "\n" not in repr(patch)
    assert f"3 columns of 2 blocks, hash {patch.hash[:12]}" in repr(patch)
    table = patch._repr_html_()
    assert "<b>" not in table
    assert "<tr><th>target</th><td>(anything else)</td></tr>" in table
    longest = float(patch.deltas(patch.parts[1])[0].norm())
    assert f"<tr><th>block 1</th><td>1 column, |change| up to {longest:.3g}</td></tr>" in table
    assert "<table>" in Patch(4, ())._repr_html_()


def test_a_rank_one_patch_is_small_at_any_width(tmp_path):
    n, hidden = 100, 4096
    hashes = torch.zeros(n, HASH_BYTES, dtype=torch.uint8)
    part = PatchPart(20, None, torch.arange(n), hashes, None, torch.ones(n, 1))
    Patch(hidden, (part,), torch.ones(1, hidden)).save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 21_000


def damaged(good: bytes):
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])

    def with_header(change):
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    def metadata(**values):
        facts = json.loads(header["__metadata__"]["mmneurons_patch"]) | values
        return with_header(lambda h: h["__metadata__"].update({"mmneurons_patch": json.dumps(facts)}))

    def rename(place):
        return lambda h: h.update({k.replace("L0", place, 1): h.pop(k) for k in list(h) if k.startswith("L0")})

    nan = bytearray(good)
    start, _ = header["L0.deltas"]["data_offsets"]
    nan[8 + length + start : 8 + length + start + 4] = np.float32("nan").tobytes()
    yield "empty", b"", "0 bytes"
    yield "truncated", good[:-5], ""
    yield "cut in the header", good[:40], "header says"
    yield "a huge header", struct.pack("<Q", 2**60) + good[8:], "header says"
    yield "no patch", with_header(lambda h: h.pop("__metadata__")), "not that of a patch"
    yield "another schema", metadata(schema=9), "Schema 9"
    yield "the schema before", metadata(schema=1), "Schema 1"
    yield "deep nesting", metadata(provenance={"a": json.loads("[" * 500 + "]" * 500)}), "nested"
    yield "a number of 400 digits", metadata(provenance={"search": {"strength": 10**400}}), "64 bits"
    yield "a text that cannot be written", metadata(provenance={"source": "\ud800"}), ""
    yield "an unknown fact", metadata(more=1), "more"
    flipped = bytearray(good)
    flipped[-3] ^= 1
    yield "a flipped bit", bytes(flipped), "not those that were saved"
    for name in ("L00", "L\u0660", "L0.e00", "L9999999", "L-1", "L 0"):
        yield f"a place {name}", with_header(rename(name)), "It holds"
    yield "no width", metadata(hidden="wide"), "hidden"
    yield "another width", metadata(hidden=47), "47"
    yield "not a number", bytes(nan), "NaN"
    yield "a foreign tensor", with_header(lambda h: h.update({"../evil": h.pop("L0.deltas")})), "evil"
    yield "another type", with_header(lambda h: h["L0.deltas"].update(dtype="I32")), "int32"
    yield "overlapping tensors", with_header(lambda h: h["L0.deltas"].update(data_offsets=[0, 16])), ""
    yield "no hashes", with_header(lambda h: h.update({"L9.indices": h.pop("L0.hashes")})), ""


def test_a_damaged_file_is_refused(random_vlm, tmp_path):
    path = tmp_path / "p.safetensors"
    a_patch(random_vlm, {0: [1, 5]}).save(path)
    for name, content, message in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"p\.safetensors") as told:
            Patch.load(path)
        assert message in str(told.value), name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
made_by = st.dictionaries(
    st.sampled_from(["source", "target", "settings", "search", "model", "images", "reference", "stacked"]),
    json_values | st.dictionaries(st.sampled_from(["strength", "turned", "looked_at", "prompts", "id"]), json_values),
)


@settings(max_examples=50)
@given(st.data())
def test_whatever_is_in_a_file_it_is_refused_or_can_be_shown(random_vlm, tmp_path_factory, data):
    """Bytes changed anywhere, or facts of any kind."""
    path = tmp_path_factory.mktemp("any") / "p.safetensors"
    replace(a_patch(random_vlm, {0: [1, 5]}, rank_one=True), provenance=data.draw(made_by)).save(path)
    content = bytearray(path.read_bytes())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)
    ):
        content[place] = byte
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with bounded():
        try:
            patch = Patch.load(path)
        except FormatError:
            return
        assert f"{len(patch.neurons)} " in patch_text(describe_patch(patch)).encode().decode()
        with contextlib.suppress(SettingError):
            cases({"p": patch})


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(MissingFileError, match="There is no file"):
        Patch.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([5, 5])}, "rise"),
        ({"indices": torch.tensor([-1, 5])}, "rise"),
        ({"deltas": torch.zeros(2, 7)}, "Deltas"),
        ({"deltas": torch.full((2, HIDDEN), torch.inf)}, "NaN or infinity"),
        ({"deltas": None}, "one of them"),
        ({"deltas": None, "coefficients": torch.zeros(2, 1)}, "Coefficients"),
        ({"hashes": torch.zeros(2, 3, dtype=torch.uint8)}, "hashes"),
    ],
)
def test_an_unsound_patch_cannot_be_made(change, message):
    usual = {
        "indices": torch.tensor([1, 5]),
        "hashes": torch.zeros(2, HASH_BYTES, dtype=torch.uint8),
        "deltas": torch.zeros(2, HIDDEN),
    }
    with pytest.raises(SettingError, match=message):
        Patch(HIDDEN, (PatchPart(0, None, **(usual | change)),))


def test_what_is_written_through_the_view_is_what_the_module_multiplies_by():
    for module in (torch.nn.Linear(5, 3), __import__("transformers.pytorch_utils").pytorch_utils.Conv1D(3, 5)):
        view = weights.writable(module)
        assert tuple(view.shape) == (3, 5)
        view[:, 2] = torch.tensor([1.0, 2.0, 3.0])
        one_hot = torch.nn.functional.one_hot(torch.tensor([2]), 5).float()
        torch.testing.assert_close(module(one_hot) - module(0 * one_hot), torch.tensor([[1.0, 2.0, 3.0]]))


WRITABLE = """plain without_bias bfloat16 conv1d subclass cpu_offloaded lora lora_disabled lora_two_adapters lora_merged
qwen3_vl_moe qwen3_vl_moe_square aria llama4 llama4_square experts_with_bias experts_with_lora_elsewhere""".split()
REFUSED = "scaled_subclass disk_offloaded eight_bit nf4 lora_on_eight_bit self_dequantising fp8 fp8_experts".split()


@pytest.mark.parametrize("name", WRITABLE)
def test_in_every_form_that_can_be_written_one_column_changes(name, tmp_path):
    form = getattr(weight_forms, f"make_{name}")(tmp_path)
    before = weights.dense(form.module, form.expert).float().clone()
    view = weights.writable(form.module, form.expert)
    assert view.shape == before.shape
    with torch.no_grad():
        view[:, 3] += 1
    after = weights.dense(form.module, form.expert).float()
    changed = torch.zeros_like(before)
    changed[:, 3] = 1
    torch.testing.assert_close(after - before, changed, rtol=0, atol=2e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_by_name(name, tmp_path):
    form = getattr(weight_forms, f"make_{name}")(tmp_path)
    with pytest.raises(ModelError, match=r"A module of type .* cannot be edited"):
        weights.writable(form.module, form.expert)
