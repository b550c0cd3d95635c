"""Low-rank adapters on a built model: frozen weights, and beside some of them a product of two thin matrices.

Source: LoRA (Hu et al., 2021): y = W x + (alpha / r) B A x, with A random and B zero at first, so that an adapter that
has not been trained changes nothing, bit for bit. W may be packed (FP4, FP8, ...; `packed_weights.py`): gradients pass
through it to its input. Adapters go on `Linear` modules and on the stacked matrices of routed experts, one pair an
expert. `attach` swaps the class of the modules concerned, so parameter names stay and the adapter's stand beside them:

    layers.3.attn.wq_a.weight   layers.3.attn.wq_a.lora_A [r, in]   layers.3.attn.wq_a.lora_B [out, r]
    layers.3.ffn.experts.w1     layers.3.ffn.experts.w1_lora_A [E, r, in]   ...w1_lora_B [E, out, r]

Attach before `quantised.quantise`, which then rounds the frozen weights alone. Left out: embedding, head, router and
norms; files (`checkpoint/adapters.py`).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.errors import ConfigError
from rorqual.model import decode
from rorqual.model.linear import Linear
from rorqual.model.moe import Experts
from rorqual.model.quantised import is_quantised
from rorqual.ops.frozen import LowRank
from rorqual.ops.linear import linear, linear_exact
from rorqual.ops.packed_weight import PackedWeight

EXPERT_MATRICES = ("w1", "w2", "w3")


@dataclass(frozen=True)
class AdapterSpec:
    """Which modules get adapters, and of what size."""

    rank: int
    alpha: float
    """The adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """Names of modules as globs: whole (`layers.3.attn.wq_a`) or their last parts (`wq_a`, `attn.*`, `experts.w1`).
    Modules of MTP have to be named as such (`mtp.0.attn.*`)."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped in training (`model.train()`); not for routed experts."""
    layers: tuple[int, ...] | None = None
    """Only layers with these numbers; all unless given."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not math.isfinite(self.alpha) or not self.targets:
            raise ConfigError(
                f"an adapter of rank {self.rank}, alpha {self.alpha}, dropout {self.dropout} and targets "
                f"{list(self.targets)} cannot be. Give a rank of 1 or more, a finite alpha, a dropout from 0 to below "
                "1 and at least one target."
            )

    @property
    def scaling(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Target:
    """A matrix, or a stack of them, that may have an adapter."""

    name: str
    """Of the module, or of the stack of an `Experts` module: `layers.3.ffn.experts.w1`."""
    owner: nn.Module
    matrix: str | None
    """Which stack of routed experts; None for a `Linear`."""

    @property
    def weight(self) -> Tensor | PackedWeight:
        """As it is held, never a rounded copy."""
        leaf = self.matrix or "weight"
        found = self.owner._parameters.get(leaf)
        return self.owner.__dict__[leaf] if found is None else found

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in], or [E, out, in] of a stack."""
        return tuple(self.weight.shape)

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of A and B in their module."""
        prefix = "" if self.matrix is None else f"{self.matrix}_"
        return f"{prefix}lora_A", f"{prefix}lora_B"

    @property
    def full_parameters(self) -> tuple[str, str]:
        """Names of A and B in the model."""
        module = self.name if self.matrix is None else self.name.rpartition(".")[0]
        a, b = self.parameters
        return f"{module}.{a}", f"{module}.{b}"


def possible_targets(model: nn.Module) -> list[Target]:
    """Everything in a model that may have an adapter, in the order of its modules."""
    out: list[Target] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            out.append(Target(name, module, None))
        elif isinstance(module, Experts) and module.streamed is None:
            out += [Target(f"{name}.{matrix}", module, matrix) for matrix in EXPERT_MATRICES]
    return out


def choose_targets(model: nn.Module, spec: AdapterSpec) -> list[Target]:
    """What `spec` names. Raises: ConfigError for a target that names nothing there, or dropout on routed experts."""
    every = possible_targets(model)
    inside = [target for target in every if spec.layers is None or _layer(target.name) in spec.layers]
    for pattern in spec.targets:
        if not any(_fits(target.name, pattern) for target in inside):
            parts = sorted({target.name.split(".", 2)[-1] for target in every})
            where = "" if spec.layers is None else f" in layers {list(spec.layers)}"
            raise ConfigError(
                f"the adapter's target {pattern!r} names no module{where} of this model that can have one. "
                f"These can: {', '.join(parts)}."
            )
    chosen = [target for target in inside if any(_fits(target.name, pattern) for pattern in spec.targets)]
    if spec.dropout and any(target.matrix for target in chosen):
        raise ConfigError(
            f"the adapter has dropout {spec.dropout} and routed experts among its targets, whose matrices are changed "
            "rather than their inputs. Set dropout to 0, or leave the experts out."
        )
    return chosen


def _fits(name: str, pattern: str) -> bool:
    if name.startswith("mtp.") and not pattern.startswith("mtp."):
        return False  # no loss of the trunk reaches the MTP module
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


class _Adapted(nn.Module):
    """What modules with an adapter share."""

    adapter: AdapterSpec
    adapter_is_on: bool


class _AdaptedLinear(Linear, _Adapted):
    """W x + scaling B A x."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = super().forward(x)
        return y + linear(linear(self._dropped(x), self.lora_A), self.lora_B) * self._scaling if self._on else y

    def exact(self, x: Tensor) -> Tensor:
        """[..., in] -> fp32 [..., out]."""
        y = super().exact(x)
        return (
            y + linear_exact(linear_exact(self._dropped(x), self.lora_A), self.lora_B) * self._scaling
            if self._on
            else y
        )

    def grouped(self, x: Tensor, groups: int) -> Tensor:
        """[..., G, in] -> [..., G, out / G]."""
        y = super().grouped(x, groups)
        return y + linear(linear(self._dropped(x), self.lora_A), self.lora_B, groups) * self._scaling if self._on else y

    @property
    def _on(self) -> bool:
        return bool(self.__dict__["adapter_is_on"])

    @property
    def _scaling(self) -> float:
        return self.__dict__["adapter"].scaling

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.__dict__["adapter"].dropout, self.training)


class _AdaptedExperts(Experts, _Adapted):
    """Stacks with a low-rank change each; those without stay as they are."""

    def stacks(self) -> tuple[Tensor, Tensor, Tensor]:
        w1, w3, w2 = super().stacks()
        changes = self.low_rank()
        changed = [
            w if name not in changes else w + changes[name].delta().to(w.dtype)
            for name, w in (("w1", w1), ("w3", w3), ("w2", w2))
        ]
        return changed[0], changed[1], changed[2]

    def low_rank(self) -> dict[str, LowRank]:
        if not self.__dict__["adapter_is_on"]:
            return {}
        scaling, found = self.__dict__["adapter"].scaling, self._parameters
        return {
            name: LowRank(a, b, scaling)
            for name in EXPERT_MATRICES
            if (a := found.get(f"{name}_lora_A")) is not None and (b := found.get(f"{name}_lora_B")) is not None
        }


def attach(model: nn.Module, spec: AdapterSpec, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze `model` and give it adapters: A uniform as `nn.Linear` begins, B zero. Returns their parameters' names.

    Raises: ConfigError as `choose_targets`, for a model that has adapters, that is under `quantise`, or whose experts
    are streamed from disk (through which no gradient passes).
    """
    if next(adapted(model), None) is not None:
        raise ConfigError("This model has adapters already. Merge or detach them before attaching others.")
    if is_quantised(model):
        raise ConfigError(
            "This model computes with rounded weights (quantise), which an adapter has to be attached before. Call "
            "release(model), attach, then quantise again."
        )
    if any(isinstance(module, Experts) and module.streamed is not None for module in model.modules()):
        raise ConfigError(
            "This model's experts are streamed from disk, through which no gradient passes to an adapter. Load it "
            "without `memory`."
        )
    targets = choose_targets(model, spec)
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for target in targets:
        *stack, out, width = target.shape
        weight = target.weight
        device = weight.codes.device if isinstance(weight, PackedWeight) else weight.device
        bound = width**-0.5
        a = (torch.rand(*stack, spec.rank, width, generator=draw) * 2 - 1) * bound
        install(target, spec, a.to(device, dtype), torch.zeros(*stack, out, spec.rank, dtype=dtype, device=device))
    decode.forget(model)
    return adapter_names(model)


def install(target: Target, spec: AdapterSpec, a: Tensor, b: Tensor) -> None:
    """Put A and B beside one matrix. Raises: ConfigError when their shapes do not fit it."""
    *stack, out, width = target.shape
    wanted = ((*stack, spec.rank, width), (*stack, out, spec.rank))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise ConfigError(
            f"{target.name} is {target.shape}, so an adapter of rank {spec.rank} has the shapes {wanted[0]} and "
            f"{wanted[1]}, but {tuple(a.shape)} and {tuple(b.shape)} came. The adapter belongs to another model."
        )
    owner = target.owner
    if not isinstance(owner, _Adapted):
        owner.__class__ = _AdaptedLinear if target.matrix is None else _AdaptedExperts
        owner.__dict__ |= {"adapter": spec, "adapter_is_on": True}
    for name, tensor in zip(target.parameters, (a, b), strict=True):
        owner.register_parameter(name, nn.Parameter(tensor))


def adapted(model: nn.Module) -> Iterator[Target]:
    """The matrices of a model that have adapters."""
    for target in possible_targets(model):
        if target.parameters[0] in target.owner._parameters:
            yield target


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapter parameters: what a trainer of adapters trains."""
    return [name for target in adapted(model) for name in target.full_parameters]


def spec_of(model: nn.Module) -> AdapterSpec:
    """The spec of a model's adapters. Raises: ConfigError when it has none."""
    for target in adapted(model):
        found: AdapterSpec = target.owner.__dict__["adapter"]
        return found
    raise ConfigError("This model has no adapters. Attach or load some first.")


def pair(target: Target) -> tuple[Tensor, Tensor]:
    """A and B of a matrix that has an adapter."""
    a, b = (target.owner._parameters[name] for name in target.parameters)
    assert a is not None and b is not None
    return a, b


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, fp32, and take them off: the same function without their cost.

    Raises: ConfigError where a weight is packed, which a small change would have to be rounded into.
    """
    targets = list(adapted(model))
    for target in targets:
        if isinstance(target.weight, PackedWeight):
            raise ConfigError(
                f"{target.name} is packed in {target.weight.format}, so the adapter cannot be merged into it without "
                "rounding. Load the base without `weights`, merge, and save it with experts='fp4'; or leave the "
                "adapter beside it."
            )
    for target in targets:
        a, b = (tensor.float() for tensor in pair(target))
        weight = target.weight
        assert isinstance(weight, Tensor)
        delta = (b @ a) * target.owner.__dict__["adapter"].scaling
        weight.copy_((weight.float() + delta).to(weight.dtype))
    detach(model)


def detach(model: nn.Module) -> None:
    """Take the adapters off: the model is its base again (still frozen)."""
    for target in list(adapted(model)):
        for name in target.parameters:
            del target.owner._parameters[name]
        if not any("lora_" in name for name in target.owner._parameters):
            _restore(target.owner)
    decode.forget(model)


def _restore(module: nn.Module) -> None:
    kind = type(module)
    bases = {_AdaptedLinear: Linear, _AdaptedExperts: Experts}
    if kind not in bases:
        raise ConfigError("Adapters were rounded over (quantise). Call release(model) before detaching them.")
    module.__class__ = bases[kind]
    for name in ("adapter", "adapter_is_on"):
        module.__dict__.pop(name, None)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for a while: a reference policy that costs no second copy."""
    owners: Iterable[Any] = {id(target.owner): target.owner for target in adapted(model)}.values()
    owners = list(owners)
    before = [owner.__dict__["adapter_is_on"] for owner in owners]
    for owner in owners:
        owner.__dict__["adapter_is_on"] = False
    decode.forget(model)
    try:
        yield
    finally:
        for owner, is_on in zip(owners, before, strict=True):
            owner.__dict__["adapter_is_on"] = is_on
        decode.forget(model)
