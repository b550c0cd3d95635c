"""What the sandbox tests share: the drivers that work here, and what a sandbox left on the host."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from failures import has_failed

from rorqual import Sandbox
from rorqual.sandbox.drivers import driver, drivers
from rorqual.sandbox.home import sandboxes_folder
from rorqual.sandbox.probe import probe
from rorqual.sandbox.spec import KINDS, Kind

CHEAP = {("container", "bwrap"), ("function", "zygote"), ("container", "runc")}
CASES = [
    pytest.param(
        (kind, one.name),
        id=f"{kind}-{one.name}",
        marks=() if (kind, one.name) == ("container", "bwrap") else pytest.mark.slow,
    )
    for kind in KINDS
    for one in drivers(kind)
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
    return case not in CHEAP


class Shared:
    """A sandbox that tests share until one of them fails, for it may have left anything: the next gets a fresh one."""

    def __init__(self, make: Callable[[], Sandbox]) -> None:
        self._make = make
        self._made: Sandbox | None = None

    @contextmanager
    def lent(self, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
        """For the time of one test."""
        if self._made is None:
            self._made = self._make()
        yield self._made
        if has_failed(request):
            self.close()

    def close(self) -> str | None:
        """End it; the id of the one that was there."""
        made, self._made = self._made, None
        if made is None:
            return None
        made.close()
        return made.id


def traces(sandbox_id: str) -> list[str]:
    """Processes, mounts, control groups and folders on the host that name this sandbox."""
    found = []
    seen: set[str] = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if sandbox_id.encode() in (path / "cmdline").read_bytes():
                found.append(f"process {path.name}")
            namespace = os.readlink(path / "ns" / "mnt")
            if namespace not in seen:  # one look at each: there may be thousands of processes
                seen.add(namespace)
                found += [f"mount of {path.name}" for line in (path / "mountinfo").open() if sandbox_id in line]
        except OSError:
            continue
    for top, folders, _ in os.walk("/sys/fs/cgroup"):  # other tests' groups may go meanwhile, which it passes over
        found += [f"control group {top}/{name}" for name in folders if name == sandbox_id]
    if (sandboxes_folder() / sandbox_id).exists():
        found.append(f"folder {sandbox_id}")
    return found
