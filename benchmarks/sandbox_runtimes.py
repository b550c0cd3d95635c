"""What the sandbox benchmarks share: which drivers work here, the same runtimes used plainly, and memory on the host.

A plain runtime is what one would start by hand to get one command's output: no agent, no layers, no limits on disk or
memory, no history. It does less than a sandbox; the comparison says what the rest costs.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.sandbox import cgroups, processes
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.drivers import drivers
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.drivers.bwrap import pss
from rorqual.sandbox.probe import probe
from rorqual.sandbox.spec import KINDS

GIB = 1 << 30
WORD = "ready"


async def working_drivers(only: list[str]) -> list[Driver]:
    """Drivers through which a command runs here; with `only`, those named so (NAME or KIND/NAME)."""
    found = []
    for kind in KINDS:
        for driver in drivers(kind):
            if only and not {driver.name, f"{kind}/{driver.name}"} & set(only):
                continue
            if (await probe(driver)).works:
                found.append(driver)
    return found


def is_machine(driver: Driver) -> bool:
    """Whether it starts a whole (emulated) machine, from a template that is booted once."""
    return driver.name.startswith("qemu")


async def first_output(sandbox: AsyncSandbox) -> None:
    """The first thing a task does: a call in a function sandbox, else a command; checked."""
    if sandbox.kind == "function":
        said = (await sandbox.call(f"print('{WORD}')")).stdout
    else:
        said = (await sandbox.commands.run(["echo", WORD])).stdout
    if said != f"{WORD}\n":
        raise SystemExit(f"a {sandbox.kind} sandbox answered {said!r}")


def bare_process() -> float:
    """Seconds for fork, exec, output and end of a bare process: no isolation can be quicker."""
    return _timed(["/bin/echo", WORD])


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    took = time.perf_counter() - start
    if done.stdout != f"{WORD}\n".encode():
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    return took


@dataclass
class Plain:
    """A runtime by hand. `words`: the command line before the program; `program`: what it runs."""

    name: str
    words: list[str]
    bundle: Path | None = None
    scratch: list[Path] = field(default_factory=list)
    program: list[str] = field(default_factory=lambda: ["/bin/echo", WORD])
    count: int = 0

    def once(self) -> float:
        """Seconds from nothing to the program's output."""
        with self._line(self.program) as line:
            return _timed(line)

    @contextlib.contextmanager
    def idle(self) -> Iterator[subprocess.Popen[bytes]]:
        """One that sleeps."""
        idle = ["/bin/sleep", "1000"]
        if self.program[0] != "/bin/echo":
            idle = [*self.program[:-1], "import time; time.sleep(1000)"]
        with (
            self._line(idle) as line,
            subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as child,
        ):
            try:
                yield child
            finally:
                processes.end_all([*processes.below(child.pid), *filter(None, [processes.identify(child.pid)])])

    @contextlib.contextmanager
    def _line(self, program: list[str]) -> Iterator[list[str]]:
        if self.bundle is None:
            yield [*self.words, *program]
            return
        self.count += 1
        name = f"plain-{os.getpid()}-{self.count}"
        folder = self.bundle.parent / name
        folder.mkdir()
        config = json.loads((self.bundle / "config.json").read_text())
        config["process"]["args"] = program
        (folder / "config.json").write_text(json.dumps(config))
        try:
            yield [*self.words, "run", "--bundle", str(folder), name]
        finally:
            subprocess.run([*self.words, "delete", "--force", name], capture_output=True)
            shutil.rmtree(folder)

    def close(self) -> None:
        """Remove its files."""
        for path in self.scratch:
            shutil.rmtree(path, ignore_errors=True)


def plain_runtime(driver: Driver) -> Plain | None:
    """The runtime below this driver, by hand; None where only a boot compares (see `sandbox_start.py`)."""
    if driver.name == "zygote":
        return Plain("a new python3", [], program=["python3", "-I", "-c", f"print('{WORD}')"])
    if driver.name == "bwrap":
        show = [word for name in ("usr", "bin", "lib", "lib64") for word in ("--ro-bind-try", f"/{name}", f"/{name}")]
        alone = ["--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
        return Plain("bwrap by hand", ["bwrap", *show, *alone, "--tmpfs", "/tmp"])
    if driver.name in ("runc", "gvisor"):
        top = Path(tempfile.mkdtemp(prefix="plain-"))
        if driver.name == "runc":
            return Plain("runc run by hand", ["runc", "--root", str(top / "state")], _bundle(top), [top])
        from rorqual.sandbox.drivers.gvisor import binary

        root = ["--rootless"] if os.geteuid() else []
        words = [str(binary()), "--root", str(top / "state"), "--network=none", "--ignore-cgroups", *root]
        return Plain("runsc run by hand", words, _bundle(top), [top])
    return None


def _bundle(top: Path) -> Path:
    """An OCI bundle over this machine's /usr."""
    bundle, root = top / "bundle", top / "root"
    bundle.mkdir()
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    ]
    root.mkdir()
    for name in ("usr", "bin", "lib", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            (root / name).symlink_to(os.readlink(path))
        elif path.is_dir():
            (root / name).mkdir()
            mounts.append({"destination": f"/{name}", "type": "bind", "source": f"/{name}", "options": ["rbind", "ro"]})
    for name in ("proc", "dev"):
        (root / name).mkdir()
    spaces = [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "hostname": "plain",
        "mounts": mounts,
        "linux": {"namespaces": spaces},
    }
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def tree_pss(pid: int) -> int:
    """Memory of a process and all below it, shared pages divided among their users."""
    return pss(pid) + sum(pss(process.pid) for process in processes.below(pid))


def sandbox_bytes(sandbox: AsyncSandbox) -> dict[str, int]:
    """Host memory of one sandbox, two ways: `pss`, the share of all its processes; `group`, what its control group was
    charged (file pages and kernel memory too), with the share of the processes that stand outside of it.
    """
    running = sandbox._record.running
    assert running is not None
    tree = {process.pid for first in running.processes for process in (first, *processes.below(first.pid))}
    shares = {pid: pss(pid) for pid in tree}
    found = {"pss": sum(shares.values())}
    if running.cgroups:
        group = cgroups.adopt(running.cgroups)
        inside = set(group.pids())
        found["group"] = group.memory_bytes() + sum(share for pid, share in shares.items() if pid not in inside)
    return found


def available_bytes() -> int:
    """Memory of this machine that processes could still get (`MemAvailable`)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/meminfo does not say how much memory is available")


def percentile(values: list[float], share: float) -> float:
    """The value below or at which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]
