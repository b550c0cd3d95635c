"""The accelerator of this machine, whoever built it: everything that other rooms must know about devices.

`torch.accelerator` names it (CUDA, ROCm, XPU, MPS, or a back end that a package of its maker registers, as `torch_npu`
does). Other rooms carry `torch.device` objects around and never ask which kind they are, other than CPU or not.
"""

import torch
from torch import Tensor

DEVICE_NAMES = ("cuda", "hip", "rocm", "xpu", "mps", "npu", "nccl", "rccl", "hccl")
"""Words that only `ops/` may use; `tests/unit/test_devices.py` keeps them out of every other room."""


def accelerator() -> torch.device | None:
    """The accelerator, without index, or None where torch finds none that works."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def name(device: torch.device) -> str:
    """What the maker calls it (`NVIDIA H200`), or torch's name where nothing tells."""
    if device.type == "cpu":
        return str(device)
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(tell(device)) if tell is not None else str(device)


def build() -> str:
    """What this torch was built for, in words."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return "CPU build" if accelerator() is None else "with an accelerator"


def describe() -> str:
    """The device that models can run on, in words."""
    here = accelerator()
    if here is not None:
        return f"{torch.accelerator.device_count()} x {name(here)}; load models with device={here.type!r}"
    if torch.version.cuda or torch.version.hip:
        return "no usable GPU, so the CPU is used"
    return "CPU; for a GPU: make install TORCH=cuda"


def staged(tensor: Tensor) -> Tensor:
    """A CPU tensor's copy in pinned memory, which an accelerator reads by itself; the tensor where there is none."""
    try:
        return tensor.pin_memory()
    except (RuntimeError, NotImplementedError):  # back ends without pinned memory: their copies wait
        return tensor


def rng_state(device: torch.device) -> Tensor | None:
    """The state of an accelerator's default generator, uint8; None for the CPU and where a maker has none."""
    give = None if device.type == "cpu" else getattr(torch.get_device_module(device), "get_rng_state", None)
    return None if give is None else give(device)


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put back what `rng_state` gave; does nothing on the CPU, which cannot go on with another device's draws."""
    take = None if device.type == "cpu" else getattr(torch.get_device_module(device), "set_rng_state", None)
    if take is not None:
        take(state, device)
