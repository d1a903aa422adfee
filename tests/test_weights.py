"""Reading `w_out` however it is stored: each form against a matrix that is worked out by other means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import kits.weight_forms as forms
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from kits.weight_forms import EXPERTS, HIDDEN, NEURONS, Form, linear, lora
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Llama4TextConfig,
    Qwen3VLMoeTextConfig,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts
from transformers.pytorch_utils import Conv1D

from mmneurons.errors import ModelError
from mmneurons.vlm import weights


def named(makers: list) -> list:
    return [pytest.param(make, id=make.__name__.removeprefix("make_")) for make in makers]


def snapshot(module: nn.Module) -> list:
    """All that a read could change. (Not `state_dict()`: that of a 4-bit module changes it.)"""
    kept = []
    for each in module.modules():
        kept += [each.training, list(each.__dict__), dict(each._forward_hooks), dict(each._forward_pre_hooks)]
        kept += [type(each), vars(each).get("forward"), vars(each).get("_hf_hook")]
        for tensor in [*each.parameters(recurse=False), *each.buffers(recurse=False)]:
            kept += [id(tensor), tensor.device, tensor.dtype, tensor._version, held(tensor)]
            kept += [copy.copy(vars(value)) for value in vars(tensor).values() if hasattr(value, "absmax")]
        state = vars(each).get("state")
        kept += [dict(vars(state))] if state is not None else []
    return kept


def held(tensor: Tensor) -> object:
    return None if tensor.is_meta else copy.deepcopy(tensor.detach())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if hasattr(a, "qdata"):
            return torch.equal(a.qdata, b.qdata)  # pyright: ignore[reportAttributeAccessIssue]
        return a is b or torch.equal(a.float(), b.float())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


@pytest.mark.parametrize("make", named(forms.DENSE + forms.FUSED))
def test_every_form_is_read_the_same(make: Callable[[Path], Form], tmp_path):
    form = make(tmp_path)
    module, expert = form.module, form.expert
    for name, part in module.named_modules():
        if "parametrizations" in name:  # which run whenever the weight is looked at, by whomever
            continue
        part.register_forward_hook(lambda *_: pytest.fail("a hook of the user's saw a read"))
        part.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the user's saw a read"))
    before = snapshot(module)
    hidden, neurons = form.matrix.shape
    torch.manual_seed(4)
    directions, indices = torch.randn(5, hidden), torch.tensor([neurons - 1, 0, 7])
    random_state = torch.get_rng_state()

    weights.check(module)
    assert weights.shape(module, hidden) == (neurons, None if expert is None else EXPERTS)
    dense = weights.dense(module, expert).float()
    torch.testing.assert_close(dense, form.matrix, rtol=0, atol=form.tolerance)
    torch.testing.assert_close(weights.project(directions, module, expert), directions @ dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weights.columns(module, indices, expert), dense.T[indices], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, part in weights.chunks(module, expert)], 1), dense)
    bias = weights.bias(module, expert)
    assert (bias is None) == (form.bias is None)
    if form.bias is not None:
        torch.testing.assert_close(bias, form.bias, check_dtype=False)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(snapshot(module), before)


@pytest.mark.parametrize("make", named([make for make in forms.DENSE if make is not forms.make_fp8]))
def test_the_matrix_is_what_the_module_multiplies_by(make: Callable[[Path], Form], tmp_path):
    form = make(tmp_path)
    dense, bias = weights.dense(form.module).float(), weights.bias(form.module)
    torch.manual_seed(5)
    activations = torch.randn(7, form.matrix.shape[1])
    activations[:, 3] *= 20  # an outlier, which LLM.int8() treats apart
    dtype = next(p.dtype for p in form.module.parameters() if p.dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        seen = form.module(activations.to(dtype)).float()
    expected = activations @ dense.T + (0 if bias is None else bias)
    assert (seen - expected).norm() <= form.kernel * expected.norm()
    after = weights.dense(form.module).float()
    torch.testing.assert_close(after, dense, rtol=0, atol=max(form.tolerance, form.repacked))


@pytest.mark.parametrize("make", named([forms.make_qwen3_vl_moe, forms.make_qwen3_vl_moe_square, forms.make_aria]))
def test_an_expert_is_what_its_module_multiplies_by(make: Callable[[Path], Form], tmp_path):
    form = make(tmp_path)
    module: Any = form.module
    module.config._experts_implementation = "eager"
    tokens = torch.randn(4, HIDDEN)
    entry = module.gate_up_proj[form.expert]
    gate, up = (tokens @ (entry if module.is_transposed else entry.T)).chunk(2, dim=-1)
    chosen = torch.full((4, 1), form.expert or 0)
    seen = module(tokens, chosen, torch.ones(4, 1))
    expected = (module.act_fn(gate) * up) @ weights.dense(module, form.expert).T
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", named([forms.make_llama4, forms.make_llama4_square]))
def test_an_expert_of_llama4_is_what_its_module_multiplies_by(make: Callable[[Path], Form], tmp_path):
    form = make(tmp_path)
    module: Any = form.module
    tokens = torch.randn(EXPERTS, 4, HIDDEN)
    gate, up = (tokens[2] @ module.gate_up_proj[2]).chunk(2, dim=-1)
    seen = module(tokens.reshape(-1, HIDDEN)).reshape(EXPERTS, 4, HIDDEN)[2]
    expected = (module.act_fn(gate) * up) @ weights.dense(module, 2).T
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-3)


def test_plain_weights_are_not_copied():
    module, conv = linear(), Conv1D(HIDDEN, NEURONS)
    assert weights.dense(module).data_ptr() == module.weight.data_ptr()
    assert weights.dense(conv).data_ptr() == conv.weight.data_ptr()
    assert weights.dense(linear(dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_many_slices(dtype, transposed):
    """Larger than one slice along either axis, and not a multiple of it; summed in float32."""
    neurons, hidden = 9000, 260
    matrix = torch.randn(hidden, neurons, dtype=dtype)
    module: Any = Conv1D(hidden, neurons) if transposed else nn.Linear(neurons, hidden)
    module.weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix)
    assert weights.SLICE["cpu"] < matrix.numel()
    assert neurons > 2 * weights.CHUNK
    directions = torch.randn(3, hidden)
    exact = directions.double() @ matrix.double()
    torch.testing.assert_close(weights.project(directions, module).double(), exact, rtol=1e-5, atol=1e-4)
    parts = list(weights.chunks(module))
    assert torch.equal(torch.cat([part for _, part in parts], 1), matrix.float())
    assert [part.start for part, _ in parts] == list(range(0, neurons, weights.CHUNK))


def test_a_gradient_does_not_flow_through_a_read():
    directions = torch.randn(2, HIDDEN, requires_grad=True)
    assert not weights.project(directions, linear()).requires_grad
    assert not weights.columns(linear(), torch.tensor([1])).requires_grad
    assert not weights.dense(lora("one")[1]).requires_grad


def test_what_was_seen_to_use_its_weight_is_not_run_again(tmp_path):
    form = forms.make_subclass(tmp_path)
    weights.check(form.module)
    form.module.forward = lambda input: pytest.fail("it was run")
    weights.project(torch.randn(1, HIDDEN), form.module)


# Whole models, as users load them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny LLaVA on disk."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
    )
    text = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("llava"))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    return path


def load(folder: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at load
        return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def four(kind: str, **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **options)


CONFIGS = {
    "eight_bit": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": four("nf4"),
    "nf4_double": four("nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "fp4_double": four("fp4", bnb_4bit_use_double_quant=True),
    "fp4_stored_as_bfloat16": four("fp4", bnb_4bit_quant_storage=torch.bfloat16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_loaded_quantised(name, folder):
    """In it the weight of every FFN is read, close to the unquantised one, and is what its module multiplies by."""
    plain, packed = load(folder), load(folder, quantization_config=CONFIGS[name], device_map="cpu")
    for was, block in zip(plain.model.language_model.layers, packed.model.language_model.layers, strict=True):
        module = block.mlp.down_proj
        weights.check(module)
        assert weights.is_quantised(module)
        assert not weights.is_quantised(was.mlp.down_proj)
        dense, original = weights.dense(module).float(), was.mlp.down_proj.weight.detach()
        assert 0 < (dense - original).norm() < 0.2 * original.norm()
        calls: list = []
        handle = module.register_forward_hook(lambda _, args, output, calls=calls: calls.append((args[0], output)))
        with torch.no_grad():
            packed(input_ids=torch.tensor([[1, 5, 6, 7]]))
        handle.remove()
        inputs, outputs = (each.float()[0] for each in calls[0])
        assert (outputs - inputs @ dense.T).norm() <= 2e-2 * outputs.norm()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_loaded_off_loaded(place, folder, tmp_path):
    plain = load(folder)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    moved = load(folder, device_map={**device_map, "model.language_model": place}, offload_folder=str(tmp_path))
    for was, block in zip(plain.model.language_model.layers, moved.model.language_model.layers, strict=True):
        assert block.mlp.down_proj.weight.is_meta == (place == "disk")
        assert torch.equal(weights.dense(block.mlp.down_proj), was.mlp.down_proj.weight)
        assert block.mlp.down_proj.weight.is_meta == (place == "disk")
        norm = weights.parameters(block.input_layernorm)
        assert torch.equal(norm["weight"], was.input_layernorm.weight)
    assert list(weights.parameters(moved.model.language_model)) == []


# What is refused


class Curved(nn.Module):
    """Calls itself linear."""

    in_features, out_features = NEURONS, HIDDEN

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :HIDDEN].tanh()


class Failing(Curved):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this device")


class OfPairs(Curved):
    def forward(self, x: Tensor) -> Any:
        return x, x


class Mute(nn.Module):
    """Says nothing of its sizes."""


def on_meta() -> nn.Module:
    return linear().to("meta")


def packed_in_bytes() -> nn.Module:
    module = linear()
    module.weight = nn.Parameter(torch.zeros(HIDDEN, NEURONS, dtype=torch.uint8), requires_grad=False)
    return module


def bare_fp8() -> nn.Module:
    module = linear()
    module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return module


def half_of_a_shard() -> nn.Module:
    module = linear()
    module.weight = nn.Parameter(module.weight.detach()[:, : NEURONS // 2])
    return module


def not_quantised_yet() -> nn.Module:
    return Linear4bit(NEURONS, HIDDEN)


def quantised_at_every_run() -> nn.Module:
    return Linear8bitLt(NEURONS, HIDDEN, has_fp16_weights=True)


def four_bit_offloaded() -> nn.Module:
    holder = nn.Sequential(forms.four_bit("nf4", double=False))
    accelerate.cpu_offload(holder, execution_device=torch.device("cpu"))
    return holder[0]


def packed_that_cannot() -> nn.Module:
    class Stuck(Tensor):
        def dequantize(self):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise NotImplementedError("not for this layout")

    module = linear()
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Stuck), requires_grad=False)
    return module


def experts_in_bytes() -> nn.Module:
    module = Llama4TextExperts(Llama4TextConfig(hidden_size=8, intermediate_size=16, num_local_experts=2))
    module.down_proj = nn.Parameter(module.down_proj.detach().to(torch.int8), requires_grad=False)
    return module


def experts_of_no_told_direction() -> nn.Module:
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.zeros(2, 8, 8))
    return module


def experts_with_lora() -> nn.Module:
    config = Qwen3VLMoeTextConfig(hidden_size=16, moe_intermediate_size=24, num_experts=2)
    model: Any = get_peft_model(
        nn.ModuleDict({"experts": forms.randomised(Qwen3VLMoeTextExperts(config))}),  # pyright: ignore[reportArgumentType]
        LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]),
    )
    return model.base_model.model["experts"]


def dora_merged_and_disabled() -> nn.Module:
    model, layer = lora("one", use_dora=True)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.disable_adapter_layers()
    return layer


REFUSED = [
    (on_meta, "weight is on the meta device", "device_map"),
    (packed_in_bytes, "torch.uint8", "plain weights"),
    (bare_fp8, "torch.float8_e4m3fn", "plain weights"),
    (half_of_a_shard, "maps 192 to 64", "plain weights"),
    (not_quantised_yet, "not quantised yet", r"model\.to\(device\)"),
    (quantised_at_every_run, "quantises them at every run", "load_in_8bit=True"),
    (four_bit_offloaded, "4-bit weight is off-loaded", "without off-loading"),
    (packed_that_cannot, "not for this layout", "plain weights"),
    (Curved, "not linear", "plain weights"),
    (Failing, "no kernel for this device", "plain weights"),
    (OfPairs, "one row of the residual stream", "plain weights"),
    (Mute, "how many inputs", "plain weights"),
    (experts_in_bytes, "torch.int8", "plain weights"),
    (experts_of_no_told_direction, "8 x 8", "plain weights"),
    (experts_with_lora, "adapter is active on its fused experts", "merge_and_unload"),
    (dora_merged_and_disabled, "merged and disabled", "unmerge_adapter"),
]


@pytest.mark.parametrize(("make", "why", "fix"), [pytest.param(*row, id=row[0].__name__) for row in REFUSED])
def test_what_cannot_be_read_is_refused_by_name_with_a_way_out(make, why, fix):
    module = make()
    with pytest.raises(ModelError, match=rf"(?s)of type {type(module).__name__}\..*{why}.*{fix}"):
        weights.check(module)


@pytest.fixture
def mesh(tmp_path) -> Iterator[Any]:
    """One process that calls itself a group."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_a_shard_is_refused(mesh):
    module = linear()
    module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), mesh))
    with pytest.raises(ModelError, match=r"(?s)is a shard.*DTensor, torch\.float32, \(64, 192\), on cpu.*tp_plan"):
        weights.check(module)


def test_the_sizes_of_experts_come_from_hidden_where_nothing_else_tells():
    class Ungated(nn.Module):
        def __init__(self, *shape: int):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(shape))

    assert weights.shape(Ungated(3, 8, 5), hidden=8) == (5, 3)
    assert weights.shape(Ungated(3, 5, 8), hidden=8) == (5, 3)
    with pytest.raises(ModelError, match="6"):
        weights.shape(Ungated(3, 5, 8), hidden=6)


def test_an_expert_has_to_be_named_and_only_where_there_are_any():
    with pytest.raises(ValueError, match="expert=None"):
        weights.dense(forms.make_aria(Path()).module)
    with pytest.raises(ValueError, match="expert=1"):
        weights.columns(linear(), torch.tensor([0]), expert=1)
