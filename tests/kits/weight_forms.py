"""`w_out` in every form that it can be stored in, each with its matrix worked out by other means; for test_weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AriaTextConfig, Llama4TextConfig, Qwen3VLMoeTextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts
from transformers.pytorch_utils import Conv1D

from kits.library import hf, lacking

HIDDEN, NEURONS, EXPERTS = 64, 192, 3
"""Multiples of 32: on a CPU with AVX512-BF16 the 4-bit kernel of bitsandbytes wants them."""


@dataclass
class Form:
    """A module that stores a matrix in some way, and the matrix as worked out here."""

    module: nn.Module
    matrix: Tensor
    bias: Tensor | None
    tolerance: float = 1e-6
    """How far `dense` may be from `matrix`, of numbers of about 1."""
    kernel: float = 1e-5
    """How far what the module returns may be from matrix @ activations, relative to its size."""
    repacked: float = 0.0
    """How far `dense` may move when the module is run."""
    expert: int | None = None


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(NEURONS, HIDDEN, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


def of(module: nn.Module, plain: nn.Linear, **rest: Any) -> Form:
    return Form(module, plain.weight.detach().float(), None if plain.bias is None else plain.bias.detach(), **rest)


# Plain, transposed, off-loaded


def make_plain(tmp_path) -> Form:
    return of(linear(), linear())


def make_without_bias(tmp_path) -> Form:
    return of(linear(bias=False), linear(bias=False))


def make_bfloat16(tmp_path) -> Form:
    return of(linear(dtype=torch.bfloat16), linear(dtype=torch.bfloat16), kernel=1e-2)


def make_conv1d(tmp_path) -> Form:
    conv = Conv1D(HIDDEN, NEURONS)
    with torch.no_grad():
        conv.weight.copy_(linear().weight.T)
        conv.bias.copy_(linear().bias)
    return of(conv, linear())


def make_subclass(tmp_path) -> Form:
    class Renamed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.einsum("...i,oi->...o", input, self.weight) + self.bias

    module = Renamed(NEURONS, HIDDEN).eval()
    module.load_state_dict(linear().state_dict())
    return of(module, linear())


def make_scaled_subclass(tmp_path) -> Form:
    """The weight is not the matrix; only running the module tells."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input / 2)

    module = Scaled(NEURONS, HIDDEN).eval()
    module.load_state_dict(linear().state_dict())
    return Form(module, linear().weight.detach() / 2, linear().bias.detach(), tolerance=1e-5)


def make_parametrized(tmp_path) -> Form:
    """The weight is computed from others whenever it is asked for."""
    return of(weight_norm(linear()), linear(), tolerance=1e-5)


def make_cpu_offloaded(tmp_path) -> Form:
    holder = nn.Sequential(linear())
    accelerate.cpu_offload(holder, execution_device=torch.device("cpu"))
    return of(holder[0], linear())


def make_disk_offloaded(tmp_path) -> Form:
    holder = nn.Sequential(linear(dtype=torch.bfloat16))
    accelerate.disk_offload(holder, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    return of(holder[0], linear(dtype=torch.bfloat16), kernel=1e-2)


def make_offloaded_with_another_hook(tmp_path) -> Form:
    form = make_cpu_offloaded(tmp_path)
    add_hook_to_module(form.module, ModelHook(), append=True)
    return form


# LoRA


def lora(*adapters: str, base: nn.Linear | None = None, **options: Any) -> tuple[Any, Any]:
    """A model of one linear layer with LoRA adapters, not zero; and the layer as PEFT has wrapped it."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.5, **options)
    model: Any = get_peft_model(nn.Sequential(base or linear()), config, adapter_name=adapters[0])  # pyright: ignore[reportArgumentType]
    for name in adapters[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.eval()
    return model, model.base_model.model[0]


def delta(layer: Any, *adapters: str) -> Tensor:
    products = [layer.lora_B[name].weight @ layer.lora_A[name].weight for name in adapters]
    return sum(products, torch.zeros(HIDDEN, NEURONS)).detach() * 6 / 4


def make_lora(tmp_path) -> Form:
    _, layer = lora("one")
    return Form(layer, linear().weight.detach() + delta(layer, "one"), linear().bias.detach(), tolerance=1e-5)


def make_lora_merged(tmp_path) -> Form:
    model, layer = lora("one")
    model.merge_adapter()
    return Form(layer, linear().weight.detach() + delta(layer, "one"), linear().bias.detach(), tolerance=1e-5)


def make_lora_disabled(tmp_path) -> Form:
    model, layer = lora("one")
    model.base_model.disable_adapter_layers()
    return of(layer, linear())


def make_lora_merged_and_disabled(tmp_path) -> Form:
    """PEFT takes the adapter out at the next run; what that run computes is what must be read before it."""
    model, layer = lora("one")
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.disable_adapter_layers()
    return of(layer, linear(), tolerance=1e-5)


def make_lora_two_adapters(tmp_path) -> Form:
    model, layer = lora("one", "two", "three")
    model.base_model.set_adapter(["one", "three"])
    matrix = linear().weight.detach() + delta(layer, "one", "three")
    return Form(layer, matrix, linear().bias.detach(), tolerance=1e-5)


def make_lora_with_bias(tmp_path) -> Form:
    _, layer = lora("one", lora_bias=True)
    bias = linear().bias.detach() + layer.lora_B["one"].bias.detach() * 6 / 4
    return Form(layer, linear().weight.detach() + delta(layer, "one"), bias, tolerance=1e-5)


def make_lora_on_eight_bit(tmp_path) -> Form:
    _, layer = lora("one", base=eight_bit())
    return Form(
        layer, rounded_to_eight_bit() + delta(layer, "one"), linear().bias.detach(), tolerance=1e-5, kernel=1e-2
    )


def make_dora(tmp_path) -> Form:
    _, layer = lora("one", use_dora=True)
    changed = linear().weight.detach() + delta(layer, "one")
    magnitude = layer.lora_magnitude_vector["one"].weight.detach()
    matrix = changed * (magnitude / changed.norm(dim=1))[:, None]
    return Form(layer, matrix, linear().bias.detach(), tolerance=1e-4)


def make_ia3(tmp_path) -> Form:
    """Another tuner than LoRA: it scales the activations."""
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(linear()), config)  # pyright: ignore[reportArgumentType]
    layer = model.eval().base_model.model[0]
    scale = torch.rand(NEURONS) + 0.5
    with torch.no_grad():
        layer.ia3_l["default"].copy_(scale[None])
    return Form(layer, linear().weight.detach() * scale, linear().bias.detach(), tolerance=1e-5)


# Packed


def eight_bit() -> Any:
    module = Linear8bitLt(NEURONS, HIDDEN, has_fp16_weights=False, threshold=6.0)
    module.load_state_dict(linear().state_dict())
    return module.to("cpu").eval()


def rounded_to_eight_bit() -> Tensor:
    half = linear().weight.detach().half().float()
    largest = half.abs().amax(1, keepdim=True)
    return (half * (127 / largest)).round() * largest / 127


def four_bit(kind: str, double: bool) -> Any:
    module = Linear4bit(NEURONS, HIDDEN, quant_type=kind, compress_statistics=double)
    module.load_state_dict(linear().state_dict())
    return module.to("cpu").eval()


def unpacked(module: Any) -> Tensor:
    """Two numbers a byte, high half first; each the entry of a table times the scale of its block of 64."""
    state = module.weight.quant_state
    packed = module.weight.data.flatten()
    table_index = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scale = state.absmax
    if state.nested:
        inner = state.state2
        blocks = torch.arange(len(scale)) // inner.blocksize
        scale = inner.code[scale.long()] * inner.absmax[blocks] + state.offset
    return (state.code[table_index] * scale.repeat_interleave(64)).reshape(HIDDEN, NEURONS)


def of_four_bit(module: Any) -> Form:
    # A CPU with AVX512-BF16 computes in bfloat16, and its first run rounds the scales to that (one part in 256).
    return Form(module, unpacked(module), linear().bias.detach(), kernel=1e-2, repacked=2e-2)


def make_eight_bit(tmp_path) -> Form:
    # LLM.int8() rounds activations to one part in 127 of the largest of their row, outliers (over 6) apart.
    return Form(eight_bit(), rounded_to_eight_bit(), linear().bias.detach(), tolerance=1e-5, kernel=1e-2)


def make_eight_bit_after_a_run(tmp_path) -> Form:
    """A run moves the scales from the weight to the module."""
    form = make_eight_bit(tmp_path)
    form.module(torch.randn(2, NEURONS))
    return form


def make_eight_bit_offloaded(tmp_path) -> Form:
    form = make_eight_bit(tmp_path)
    holder = nn.Sequential(form.module)
    accelerate.cpu_offload(holder, execution_device=torch.device("cpu"))
    form.module = holder[0]
    return form


def make_nf4(tmp_path) -> Form:
    return of_four_bit(four_bit("nf4", double=False))


def make_nf4_double(tmp_path) -> Form:
    return of_four_bit(four_bit("nf4", double=True))


def make_fp4(tmp_path) -> Form:
    return of_four_bit(four_bit("fp4", double=False))


def make_fp4_double(tmp_path) -> Form:
    return of_four_bit(four_bit("fp4", double=True))


def make_nf4_after_a_run(tmp_path) -> Form:
    """Repacked, on such a CPU."""
    form = make_nf4_double(tmp_path)
    with torch.no_grad():
        form.module(torch.randn(2, NEURONS))
    state: Any = form.module.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    assert getattr(state, "packing_format_for_cpu", False) == has_avx512bf16()
    form.tolerance = 2e-2
    return form


class Halved(Tensor):
    """A weight that is stored as half of what it means, and says so itself, as torchao's and quanto's do."""

    def dequantize(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return (self.dequantize() / 2).as_subclass(Halved)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            args = [arg.dequantize() if isinstance(arg, Halved) else arg for arg in args]
        return super().__torch_function__(func, types, args, kwargs or {})


def make_self_dequantising(tmp_path) -> Form:
    module = linear()
    weight = module.weight.detach()
    module.weight = nn.Parameter((weight / 2).as_subclass(Halved), requires_grad=False)
    return Form(module, weight, module.bias.detach(), tolerance=1e-5)


def make_fp8(tmp_path) -> Form:
    """The last block is cut short; its kernel needs a GPU, so it is not run."""
    module = hf.of("integrations.finegrained_fp8", "FP8Linear")(NEURONS, HIDDEN, block_size=(48, 80), has_bias=True)
    with torch.no_grad():
        module.weight.copy_(linear().weight)
        module.weight_scale_inv.copy_(torch.rand(2, 3) + 0.5)
        module.bias.copy_(linear().bias)
    matrix = module.weight.detach().float()
    for row in range(2):
        for column in range(3):
            part = matrix[row * 48 : (row + 1) * 48, column * 80 : (column + 1) * 80]
            part *= module.weight_scale_inv.detach()[row, column]
    return Form(module, matrix, linear().bias.detach())


# Fused experts: the expert's output is taken from the module's own forward


def randomised(module: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


def qwen3_vl_moe_experts(config: Qwen3VLMoeTextConfig) -> nn.Module:
    experts: Any = Qwen3VLMoeTextExperts(config)
    if experts.gate_up_proj.shape[1] == HIDDEN:
        lacking("stores these experts transposed")
    return experts


def make_qwen3_vl_moe(tmp_path) -> Form:
    config = Qwen3VLMoeTextConfig(hidden_size=HIDDEN, moe_intermediate_size=NEURONS, num_experts=EXPERTS)
    module = randomised(qwen3_vl_moe_experts(config))
    return Form(module, module.down_proj[2].detach().clone(), None, expert=2)


def make_qwen3_vl_moe_square(tmp_path) -> Form:
    config = Qwen3VLMoeTextConfig(hidden_size=HIDDEN, moe_intermediate_size=HIDDEN, num_experts=EXPERTS)
    module = randomised(qwen3_vl_moe_experts(config))
    return Form(module, module.down_proj[2].detach().clone(), None, expert=2)


def make_aria(tmp_path) -> Form:
    config = AriaTextConfig(hidden_size=HIDDEN, intermediate_size=NEURONS, moe_num_experts=EXPERTS)
    module = randomised(hf.of("models.aria.modeling_aria", "AriaExperts")(config))
    if not hasattr(module, "down_proj"):
        lacking("Aria's experts are one product, without neurons of each")
    return Form(module, module.down_proj[2].detach().T, None, expert=2)


def make_llama4(tmp_path) -> Form:
    config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=NEURONS, num_local_experts=EXPERTS)
    module = randomised(Llama4TextExperts(config))
    return Form(module, module.down_proj[2].detach().T, None, expert=2)


def make_llama4_square(tmp_path) -> Form:
    """No attribute tells the orientation, nor does a size; `gate_up_proj` does."""
    config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
    module = randomised(Llama4TextExperts(config))
    return Form(module, module.down_proj[2].detach().T, None, expert=2)


def make_offloaded_experts(tmp_path) -> Form:
    form = make_aria(tmp_path)
    holder = nn.Sequential(form.module)
    accelerate.cpu_offload(holder, execution_device=torch.device("cpu"))
    form.module = holder[0]
    return form


def make_experts_with_bias(tmp_path) -> Form:
    form = make_qwen3_vl_moe(tmp_path)
    form.module.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    form.bias = form.module.down_proj_bias.detach()[2]
    return form


def make_fp8_experts(tmp_path) -> Form:
    config = Qwen3VLMoeTextConfig(hidden_size=HIDDEN, moe_intermediate_size=NEURONS, num_experts=EXPERTS)
    module = hf.of("integrations.finegrained_fp8", "FP8Experts")(config, block_size=(32, 64))
    with torch.no_grad():
        module.gate_up_proj.zero_()
        module.gate_up_proj_scale_inv.fill_(1)  # else whatever the memory held, NaN now and then
        module.down_proj.copy_(torch.randn(EXPERTS, HIDDEN, NEURONS))
        module.down_proj_scale_inv.copy_(torch.rand(EXPERTS, 2, 3) + 0.5)
    scale = module.down_proj_scale_inv.detach().repeat_interleave(32, 1).repeat_interleave(64, 2)
    return Form(module, module.down_proj.detach()[2].float() * scale[2], None, expert=2)


def make_experts_with_lora_elsewhere(tmp_path) -> Form:
    """An adapter on another parameter of the same module wraps it, but leaves `down_proj` as it is."""
    form = make_qwen3_vl_moe(tmp_path)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model: Any = get_peft_model(nn.ModuleDict({"experts": form.module}), config)  # pyright: ignore[reportArgumentType]
    form.module = model.base_model.model["experts"]
    return form


def make_experts_with_lora_merged(tmp_path) -> Form:
    form = make_qwen3_vl_moe(tmp_path)
    experts: Any = form.module
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    model: Any = get_peft_model(nn.ModuleDict({"experts": experts}), config)  # pyright: ignore[reportArgumentType]
    model.merge_adapter()
    assert not torch.equal(experts.down_proj[2], form.matrix)
    form.module, form.matrix = model.base_model.model["experts"], experts.down_proj[2].detach()
    return form


DENSE = [
    make_plain,
    make_without_bias,
    make_bfloat16,
    make_conv1d,
    make_subclass,
    make_scaled_subclass,
    make_parametrized,
    make_cpu_offloaded,
    make_disk_offloaded,
    make_offloaded_with_another_hook,
    make_lora,
    make_lora_merged,
    make_lora_disabled,
    make_lora_merged_and_disabled,
    make_lora_two_adapters,
    make_lora_with_bias,
    make_lora_on_eight_bit,
    make_dora,
    make_ia3,
    make_eight_bit,
    make_eight_bit_after_a_run,
    make_eight_bit_offloaded,
    make_nf4,
    make_nf4_double,
    make_nf4_after_a_run,
    make_fp4,
    make_fp4_double,
    make_self_dequantising,
    make_fp8,
]
FUSED = [
    make_qwen3_vl_moe,
    make_qwen3_vl_moe_square,
    make_aria,
    make_llama4,
    make_llama4_square,
    make_offloaded_experts,
    make_experts_with_bias,
    make_experts_with_lora_elsewhere,
    make_experts_with_lora_merged,
    make_fp8_experts,
]
