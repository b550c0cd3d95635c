"""The initramfs of a guest: the agent as /init, the kernel modules it loads, empty folders. Nothing else runs there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from rorqual.folders import cache_folder
from rorqual.sandbox.agent.build import agent_binary
from rorqual.sandbox.vm.cpio import Archive
from rorqual.sandbox.vm.kernel import GuestKernel
from rorqual.sandbox.vm.modules import in_order

PCI_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "erofs", "overlay", "ext4")
MMIO_MODULES = ("virtio_mmio", "virtio_blk", "erofs", "overlay", "ext4", "vmw_vsock_virtio_transport")
FOLDERS = ("dev", "proc", "sys", "layers", "upper", "merged")


def build_initramfs(kernel: GuestKernel, wanted: tuple[str, ...] = PCI_MODULES) -> tuple[Path, str]:
    """The archive as a file in the cache, and its SHA-256; the same kernel and agent give the same bytes.

    Raises: SandboxError when a module is missing or the agent cannot be built.
    """
    archive = Archive()
    archive.add_file("init", agent_binary("RORQUAL_GUEST_INIT").read_bytes(), 0o755)
    for folder in FOLDERS:
        archive.add_folder(folder)
    archive.add_device("dev/console", 5, 1)
    modules = in_order(kernel.modules, wanted) if kernel.modules is not None else []
    for module in modules:
        archive.add_file(f"modules/{module.name}.ko", module.data)
    archive.add_file("modules/order", "".join(f"{module.name}.ko\n" for module in modules).encode())
    data = archive.to_bytes()
    digest = hashlib.sha256(data).hexdigest()
    target = cache_folder() / "initramfs" / digest[:24]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=target.parent)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    return target, digest
