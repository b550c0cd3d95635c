"""What the sandbox tests share: the drivers that work here, and what a sandbox left on the host."""

import asyncio
import os
from pathlib import Path

import pytest

from rorqual.sandbox.drivers import ORDER, driver
from rorqual.sandbox.home import sandboxes_folder
from rorqual.sandbox.probe import probe
from rorqual.sandbox.spec import Kind

QUICK = {("container", "bwrap"), ("function", "zygote")}
CASES = [
    pytest.param((kind, name), id=f"{kind}-{name}", marks=() if (kind, name) in QUICK else pytest.mark.slow)
    for kind, rows in ORDER.items()
    for name, _ in rows
]


def need(case: tuple[Kind, str]) -> dict[str, str]:
    """Arguments of `create` for a driver; skips the test where a command cannot be run through it."""
    kind, name = case
    found = asyncio.run(probe(driver(kind, name)))
    if not found.works:
        pytest.skip(f"{kind} through {name}: {found.why}")
    return {"kind": kind, "driver": name}


def is_full_machine(case: tuple[Kind, str]) -> bool:
    """Whether each command costs so much there that tests repeat less."""
    return case not in QUICK


def traces(sandbox_id: str) -> list[str]:
    """Processes, mounts, control groups and folders on the host that name this sandbox."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if sandbox_id.encode() in (path / "cmdline").read_bytes():
                found.append(f"process {path.name}")
            if int(path.name) != os.getpid():
                found += [f"mount of {path.name}" for line in (path / "mountinfo").open() if sandbox_id in line]
        except OSError:
            continue
    for top in Path("/sys/fs/cgroup").glob("**/rorqual/*"):
        if top.name == sandbox_id:
            found.append(f"control group {top}")
    if (sandboxes_folder() / sandbox_id).exists():
        found.append(f"folder {sandbox_id}")
    return found
