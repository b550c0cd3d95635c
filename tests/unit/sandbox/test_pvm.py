"""A /dev/kvm of PVM's is named as the reason, once a probe failed and not before."""

import asyncio
from pathlib import Path
from typing import ClassVar

import pytest

from rorqual.errors import SandboxError
from rorqual.sandbox import probe as probing
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.drivers.qemu import Qemu
from rorqual.sandbox.vm import pvm

KVM = [driver for driver in (*probing.drivers("microvm"), *probing.drivers("vm")) if isinstance(driver, Qemu)]


def machine(root: Path, *, module: bool, flags: str) -> Path:
    """The files of a machine that tell."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nvmx flags\t: vnmi\nflags\t\t: fpu {flags} hypervisor\n\n" * 2)
    (root / "sys/module" / ("kvm_pvm" if module else "kvm_intel")).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("module", "flags", "found"),
    [
        (True, "sse2", True),
        (True, "vmx", False),
        (True, "svm sse2", False),
        (False, "sse2", False),
        (False, "vmx", False),
    ],
)
def test_pvm_is_its_module_without_virtualization(tmp_path: Path, module: bool, flags: str, found: bool) -> None:
    assert pvm.is_pvm(machine(tmp_path / "root", module=module, flags=flags)) is found
    assert not pvm.is_pvm(tmp_path / "nothing")


class Tried(Qemu):
    """A driver whose guest boots or not, as told."""

    kind: ClassVar = "microvm"
    name = "tried"
    board = "microvm"
    accelerator = "kvm"


@pytest.mark.parametrize("is_pvm", [True, False])
@pytest.mark.parametrize("boots", [True, False])
def test_only_a_probe_that_ran_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_pvm: bool, boots: bool
) -> None:
    tried = []

    async def attempt(driver: Driver) -> None:
        tried.append(driver.name)
        if not boots:
            raise SandboxError("qemu: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probing, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(probing, "agent_binary", lambda: None)
    monkeypatch.setattr(probing, "_try", attempt)
    monkeypatch.setattr(probing, "_worked", {})
    monkeypatch.setattr(pvm, "is_pvm", lambda: is_pvm)
    monkeypatch.setattr(Tried, "missing", lambda self: None)
    found = asyncio.run(probing.probe(Tried(), fresh=True))
    assert tried == ["tried"] and found.works is boots
    assert found.why == (
        "" if boots else pvm.REASON if is_pvm else "qemu: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed"
    )


def test_a_driver_that_emulates_blames_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pvm, "is_pvm", lambda: True)
    told = {driver.name: driver.explain("as seen") for driver in KVM}
    assert told["qemu-tcg"] == "as seen" and told["qemu-kvm"] == told["firecracker"] == pvm.REASON
