"""Quantisation-aware training on a built model: its weights as the released files would store them.

Source: V4 report (FP4 quantisation-aware training); which tensor has which format: the released checkpoints.

    FP4, 1 x 32     routed experts (or FP8, as in the base checkpoints)
    FP8, 128 x 128  attention's and the indexer's projections, shared experts, MTP projections
    bf16            embedding, head, norms, router, compressors, the indexer's head weights
    fp32            mHC, sinks, position and router biases, and whatever the released models do not have

`quantise` swaps the class of the modules concerned for one in which reading a parameter gives its rounded value, so no
computation can reach past it; the gradient goes straight through to the fp32 master. Names stay as they are, and
`parameters()`, `get_parameter` and `state_dict()` have the masters. A rounded copy is made once and kept until its
master changes. Left out: files (`checkpoint/packed.py`).
"""

import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import decode
from rorqual.model.linear import Linear
from rorqual.model.moe import MoE
from rorqual.ops.fake_quant import WeightFormat, fake_fp8_input, rounded_weight, straight_through

ExpertFormat = Literal["fp4", "fp8"]
StoredFormat = Literal["fp4", "fp8", "bf16", "fp32"]

_LAYER = r"(?:layers|mtp)\.\d+\."
_EXPERTS = re.compile(_LAYER + r"ffn\.experts\.(?:\d+\.)?w[123](?:\.weight)?")
_FP8 = re.compile(
    _LAYER + r"(?:attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj)\.weight"
)
_BF16 = re.compile(
    r"(?:embed|head|norm)\.weight|"
    + _LAYER
    + r"(?:(?:attn_norm|ffn_norm|enorm|hnorm|norm|ffn\.gate|attn\.q_norm|attn\.kv_norm|attn\.indexer\.weights_proj)"
    r"|attn\.(?:indexer\.)?compressor\.(?:wkv|wgate|norm))\.weight"
)


def stored_format(name: str, experts: ExpertFormat) -> StoredFormat:
    """How the tensor called `name` (ours or official, never a scale) is stored when experts are in `experts`."""
    if _EXPERTS.fullmatch(name):
        return experts
    if _FP8.fullmatch(name):
        return "fp8"
    return "bf16" if _BF16.fullmatch(name) else "fp32"


class WeightQuantiser:
    """Masters to rounded values, straight through, each rounded once per change of the master.

    A change is seen by torch's version counter; after one that bypasses it (`.data`, another process), call `forget`.
    """

    def __init__(self, formats: Mapping[str, WeightFormat]) -> None:
        self.formats = dict(formats)
        """Format by parameter name within the module."""
        self._kept: dict[str, tuple[weakref.ref[Tensor], tuple[int, int, torch.dtype], Tensor]] = {}

    def __call__(self, name: str, master: Tensor) -> Tensor:
        """The value that computations use; a parameter without a format is its own."""
        if name not in self.formats:
            return master
        return straight_through(master, self.value(name, master))

    def value(self, name: str, master: Tensor) -> Tensor:
        """The rounded value, without gradient; it must not be written to."""
        key = (master._version, master.data_ptr(), master.dtype)
        kept = self._kept.get(name)
        if kept is not None and kept[0]() is master and kept[1] == key:
            return kept[2]
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass later
            rounded = rounded_weight(master.detach(), self.formats[name])
        self._kept[name] = (weakref.ref(master), key, rounded)
        return rounded

    def forget(self) -> None:
        """Drop the rounded copies."""
        self._kept.clear()

    def __deepcopy__(self, _memo: dict[int, Any]) -> "WeightQuantiser":
        return WeightQuantiser(self.formats)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _reading_rounded(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, with parameters read through the module's `stored_as`."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    def read(self: nn.Module, name: str) -> Any:  # called for what is no plain attribute: parameters, buffers, modules
        value = kind.__getattr__(self, name)
        return self.__dict__["stored_as"](name, value) if isinstance(value, nn.Parameter) else value

    def master(self: nn.Module, target: str) -> nn.Parameter:
        parameter = self._parameters[target]
        assert parameter is not None
        return parameter

    body = {"__getattr__": read, "get_parameter": master, "__module__": kind.__module__}
    return _CLASSES.setdefault(kind, type(f"Quantised{kind.__name__}", (kind,), body))


def quantise(model: nn.Module, experts: ExpertFormat) -> None:
    """Compute with `model`'s weights as they are stored with experts in FP4 or FP8; replaces an earlier call.

    Raises: ConfigError when a row of experts cannot be packed in pairs.
    """
    release(model)
    decode.forget(model)
    found = {id(module): (module, name) for name, module in model.named_modules()}
    plans: list[tuple[nn.Module, dict[str, WeightFormat]]] = []
    for module, prefix in found.values():
        formats: dict[str, WeightFormat] = {}
        for name, parameter in module.named_parameters(recurse=False):
            kind = stored_format(f"{prefix}.{name}" if prefix else name, experts)
            if kind == "fp4" and parameter.shape[-1] % 2:
                raise ConfigError(
                    f"{prefix}.{name} has rows of {parameter.shape[-1]}, but FP4 packs two values in a byte. "
                    "Choose an even hidden_size and moe_intermediate_size."
                )
            if kind != "fp32":
                formats[name] = kind
        if formats:
            plans.append((module, formats))
    for module, formats in plans:
        module.__class__ = _reading_rounded(type(module))
        module.__dict__["stored_as"] = WeightQuantiser(formats)


def release(model: nn.Module) -> None:
    """Compute with the masters again."""
    decode.forget(model)
    for module, _, _ in _quantised(model):
        module.__class__ = type(module).__bases__[0]
        del module.__dict__["stored_as"]


def is_quantised(model: nn.Module) -> bool:
    """Whether `quantise` is in force."""
    return next(_quantised(model), None) is not None


def forget(model: nn.Module) -> None:
    """Round anew at the next use. For changes of masters that torch's version counters do not show."""
    for _, _, quantiser in _quantised(model):
        quantiser.forget()


@torch.no_grad()
def used_values(model: nn.Module) -> dict[str, Tensor]:
    """The rounded values in use, by parameter name; empty without `quantise`. They must not be written to."""
    return {name: rounded for name, _, rounded, _ in _pairs(model)}


@torch.no_grad()
def quantisation_error(model: nn.Module) -> dict[str, float]:
    """RMS of (rounded - master) over RMS of the masters, by group: experts, fp8, bf16, mtp_experts, mtp_fp8."""
    sums: dict[str, list[float]] = {}
    for name, master, rounded, kind in _pairs(model):
        group = "bf16" if kind == "bf16" else "experts" if _EXPERTS.fullmatch(name) else "fp8"
        group = f"mtp_{group}" if name.startswith("mtp.") and group != "bf16" else group
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += float(torch.linalg.vector_norm(rounded - master, dtype=torch.float32)) ** 2
        total[1] += float(torch.linalg.vector_norm(master, dtype=torch.float32)) ** 2
    return {group: (error / norm) ** 0.5 if norm else 0.0 for group, (error, norm) in sums.items()}


def round_activations(model: nn.Module, rounding: str) -> None:
    """Make `model` round activations as `ModelConfig.activation_rounding` = `rounding` says, in place of what it did.

    Raises: ConfigError for another word, or for `v4-inputs` where experts are exchanged between processes.
    """
    if rounding == "v4-inputs":
        refuse_exchange(model)
    for module in model.modules():
        cfg = getattr(module, "cfg", None)
        if isinstance(cfg, ModelConfig):
            module.__dict__["cfg"] = cfg.replace(activation_rounding=rounding)
    round_inputs(model, is_on=rounding == "v4-inputs")


def keep_cache_as(model: nn.Module, cache_format: str) -> None:
    """Make `model` compute with, and its new states hold, entries and index keys as `ModelConfig.cache_format` says.

    States and page pools made before cannot be used any more. Raises: ConfigError for another word.
    """
    decode.forget(model)
    for module in model.modules():
        cfg = getattr(module, "cfg", None)
        if isinstance(cfg, ModelConfig):
            module.__dict__["cfg"] = cfg.replace(cache_format=cache_format)


def round_inputs(model: nn.Module, *, is_on: bool = True) -> None:
    """FP8 (1 x 128) inputs of every FP8 and FP4 matrix but `wo_a`, which the released code dequantises."""
    decode.forget(model)
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.round_inputs = is_on
        if isinstance(module, Linear) and _FP8.fullmatch(f"{name}.weight") and not name.endswith("wo_a"):
            hook = module.__dict__.pop("_input_hook", None)
            if hook is not None:
                hook.remove()
            if is_on:
                module.__dict__["_input_hook"] = module.register_forward_pre_hook(_round_first)


def refuse_exchange(model: nn.Module) -> None:
    """Raises: ConfigError where experts live on several processes, whose exchange does not round inputs."""
    if any(isinstance(module, MoE) and module.exchange is not None for module in model.modules()):
        raise ConfigError(
            "The inputs of experts are to be rounded to FP8 (activation_rounding v4-inputs, qat.activations), but the "
            "experts are spread over processes, where only weights are rounded. Set qat.activations=false or "
            "parallel.ep=1."
        )


def _round_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_fp8_input(inputs[0]), *inputs[1:])


def _quantised(model: nn.Module) -> Iterator[tuple[nn.Module, str, WeightQuantiser]]:
    for name, module in model.named_modules():
        quantiser = module.__dict__.get("stored_as")
        if isinstance(quantiser, WeightQuantiser):
            yield module, name, quantiser


def _pairs(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, WeightFormat]]:
    """Name, master, rounded value and format of every weight that is rounded."""
    for module, prefix, quantiser in _quantised(model):
        for name, kind in quantiser.formats.items():
            master = module._parameters[name]
            assert master is not None
            yield f"{prefix}.{name}", master, quantiser.value(name, master), kind
