"""One file a substrate; which of them work here is found out by running a command in each (`probe.py`)."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

from rorqual.errors import SandboxError
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.spec import KINDS, Kind

ORDER: dict[Kind, tuple[tuple[str, str], ...]] = {
    "function": (("zygote", "rorqual.sandbox.drivers.zygote:Zygote"),),
    "container": (
        ("bwrap", "rorqual.sandbox.drivers.bwrap:Bwrap"),
        ("runc", "rorqual.sandbox.drivers.runc:Runc"),
    ),
    "microvm": (
        ("firecracker", "rorqual.sandbox.drivers.firecracker:Firecracker"),
        ("qemu-microvm-kvm", "rorqual.sandbox.drivers.qemu:QemuMicrovmKvm"),
        ("gvisor", "rorqual.sandbox.drivers.gvisor:Gvisor"),
        ("qemu-tcg", "rorqual.sandbox.drivers.qemu:QemuMicrovmTcg"),
    ),
    "vm": (
        ("qemu-kvm", "rorqual.sandbox.drivers.qemu:QemuKvm"),
        ("qemu-tcg", "rorqual.sandbox.drivers.qemu:QemuTcg"),
    ),
}
"""For each kind its drivers by preference: name, and where the class is."""


@cache
def drivers(kind: Kind) -> tuple[Driver, ...]:
    """The drivers of a kind, the preferred one first."""
    found = []
    for _, place in ORDER[kind]:
        module, _, name = place.partition(":")
        if importlib.util.find_spec(module) is not None:
            found.append(getattr(importlib.import_module(module), name)())
    return tuple(found)


def driver(kind: Kind, name: str) -> Driver:
    """The driver of that name. Raises: SandboxError naming those there are."""
    if kind not in KINDS:
        raise SandboxError(f"there is no kind of sandbox {kind!r}. Kinds: {', '.join(KINDS)}.")
    for one in drivers(kind):
        if one.name == name:
            return one
    names = ", ".join(one.name for one in drivers(kind))
    raise SandboxError(f"no driver {name!r} makes {kind} sandboxes. There are: {names}.")
