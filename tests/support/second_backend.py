"""A second device for tests, on torch's PrivateUse1 place for back ends of others; and a pytest plugin that uses it.

The device is called `second`. Its numbers lie in main memory and its operations are those of the CPU, but nothing else
treats it as the CPU: its tensors have no address and no numpy view, their `is_cpu` is False, and an operation that
mixes them with a CPU tensor (other than a single number) fails, as on a GPU. So it finds tensors made without
`device=`, and code that takes every tensor for the CPU's. What it cannot find: waits that are missing, and numerics of
real chips.

    python -m pytest -p second_backend tests/property/test_state.py

runs tests there: tensors that test code makes without naming a device, and every `Transformer`, lie on the device; the
package has to place what it makes itself. `torch.accelerator` names it, as it names a GPU.

Needs torch's back ends written in Python (2.10 or later; `AVAILABLE`). Registering it cannot be undone in a process.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "second"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
TESTS = str(Path(__file__).parents[1])
FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
        "tensor", "tril_indices", "zeros",
    )
)  # fmt: skip
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::set_.source_Tensor")
"""Operations that may see tensors of two devices."""

SIZED_BY_VALUE = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm")
"""Factories that torch would otherwise run on an empty tensor which the operation resizes."""

INSTEAD = {torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default}
"""Operations that only mark a tensor: the marks are not looked at below `__torch_dispatch__`."""


class There(Tensor):
    """A tensor on the device; `raw` is where its numbers are, with the same shape and strides."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        name = func._schema.name
        if name not in CROSSING and any(not isinstance(t, There) and t.dim() for t in tensors):
            found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")
        own_args, own = tree_map(raw_of, (args, dict(kwargs)))
        device = kwargs.get("device")
        if device is not None:
            own["device"] = "cpu"
        out = INSTEAD.get(func, func)(*own_args, **own)
        if device is not None and torch.device(device).type != NAME:
            return out
        return wrapped(func, out, args, kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.detach().cpu()!r} on {NAME}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} is not pickled; move it to the CPU first")

    def data_ptr(self) -> int:
        raise RuntimeError(f"a tensor on {NAME} has no address that the CPU could read")


def raw_of(x: Any) -> Any:
    return x.raw if isinstance(x, There) else x


def wrapped(func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """`out` as tensors of the device: what an operation wrote to is what it was given."""
    written = [
        given for argument, given in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]  # fmt: skip
    named = {a.name: a for a in func._schema.arguments}
    written += [
        given
        for name, given in kwargs.items()
        if named[name].alias_info is not None and named[name].alias_info.is_write
    ]
    if any(isinstance(given, There) and given.shape != given.raw.shape for given in written):
        raise NotImplementedError(f"{func._schema.name} gave a tensor on {NAME} another shape in place")
    if written and isinstance(out, Tensor):
        return written[0]
    if written and isinstance(out, tuple):
        return tuple(written)
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) and not isinstance(x, There) else x, out)


def is_registered() -> bool:
    """Whether this process has the device."""
    return hasattr(torch, NAME)


def register() -> None:
    """Make the device known to torch; once a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` would leave `raw` behind
    torch.inference_mode = _without_gradients  # type: ignore[misc, assignment]  # tensors written in Python know none
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in SIZED_BY_VALUE:
        library.impl(name, _made_on_cpu(getattr(torch.ops.aten, name.partition(".")[0]), name), "PrivateUse1")
    register.kept = library  # type: ignore[attr-defined]  # its operations go with it


def _without_gradients(mode: bool = True) -> Any:
    return torch.set_grad_enabled(not mode)


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> Tensor:  # fmt: skip
    return There(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> Tensor:  # fmt: skip
    return There(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _made_on_cpu(packet: Any, name: str) -> Any:
    """Factory `name` of the device."""
    function = getattr(packet, name.partition(".")[2] or "default")

    def make(*args: Any, **kwargs: Any) -> Tensor:
        return There(function(*args, **{**kwargs, "device": "cpu"}))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(..., device=)` ends in."""
    raw_of(target).copy_(raw_of(source))
    return target


class FromTests(TorchFunctionMode):
    """Tensors made by test code without a device lie on the second one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None and _is_test(sys._getframe(1).f_code.co_filename):
            generator = kwargs.get("generator")
            if generator is not None or func is torch.as_tensor:
                return func(*args, **kwargs).to(NAME)
            return func(*args, **{**kwargs, "device": NAME})
        return func(*args, **kwargs)


def _is_test(file: str) -> bool:
    return file.startswith(TESTS) and not file.startswith(__file__)


def move_models() -> None:
    """Let every Transformer be built on the device, as a program that asks for it would."""
    from rorqual.model import Transformer

    build = Transformer.__init__

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if self.embed.weight.device.type == "cpu":
            self.to(NAME)

    Transformer.__init__ = built  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    register()
    move_models()
    mode = FromTests()
    mode.__enter__()
