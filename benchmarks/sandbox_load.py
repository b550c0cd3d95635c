"""Sandboxes and the journal under load: the five load cases of the specification (section 12.6).

    python benchmarks/sandbox_load.py
    python benchmarks/sandbox_load.py --quick --json --only P2 P4
    python benchmarks/sandbox_load.py --only P4 --soak 86400 --folder /var/tmp     a day

P1  200 idle containers, 40 idle gVisor sandboxes or 10 idle emulated machines alive within 6 GiB: how many are alive
    and answer, and what they take. The bound is the number asked for.
P2  20 creations a second of containers for 60 s: each is asked for at its time whether the ones before are done or
    not, runs a command and is ended. Time from the asking to the command's output, 99th percentile; how many failed.
P3  4,000 acknowledged tokens a second by 64 requests, each in a thread that appends a token and commits, at its own
    even pace: time to the acknowledgement, 99th percentile, the rate that was reached, and how many syncs that took.
P4  A soak: sandboxes are made, used and ended by eight tasks at once while keepers, holders and what runs inside are
    killed -9 at random. Growth of descriptors, memory, mounts, files, processes, control groups and threads from the
    end of the first fifth to the end.
P5  Small tasks, each in a new container on an image of this machine's packages that is mounted from the layer store:
    bytes of the image that had to come from the store, and their share of it (`sandbox_layers.py` says how it counts).
    The bound is 15 %. Root only; elsewhere layers are unpacked, which reads them whole.

`config.kept` says whether the specification's condition held. The peer of P2 is `bwrap` by hand at the same rate; the
others have none (P3's is in `journal.py`).
"""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import sandbox_layers as layers
from sandbox_density import slope
from sandbox_runtimes import (
    GIB,
    WORD,
    available_bytes,
    first_output,
    is_machine,
    percentile,
    plain_runtime,
    sandbox_bytes,
    working_drivers,
)

from rorqual.errors import SandboxError
from rorqual.journal import Journal, Tokens
from rorqual.journal.disk import Disk
from rorqual.sandbox import processes
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.home import all_homes
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.sweep import sweep

SMALL = {"memory_mb": 64, "disk_mb": 16}


def line(name: str, case: str, unit: str, ours: float, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A line without a peer, unless `more` has one."""
    usual = {"peer": None, "peer_name": "none", "ratio": None, "bound": None, "bound_share": None, "spread": {}}
    own = {"name": f"sandbox_load.{name}", "case": case, "unit": unit, "ours": ours}
    return own | usual | more | {"config": {**config, **measure.machine()}}


async def p1(driver: Driver, share: float = 1.0) -> dict[str, Any]:
    """Idle sandboxes: of as many as the specification asks for this share, within the same share of the memory."""
    full = 10 if is_machine(driver) else 40 if driver.name == "gvisor" else 200
    asked = max(2, int(full * share))
    before, idle = available_bytes(), list[AsyncSandbox]()
    try:
        for _ in range(asked):
            idle.append(await AsyncSandbox.create(driver.kind, driver=driver.name, idle_ttl=3600))
        await asyncio.sleep(2)
        weighed = [await asyncio.to_thread(sandbox_bytes, sandbox) for sandbox in idle]
        machine = before - available_bytes()
        for sandbox in idle:
            await first_output(sandbox)
    finally:
        await end_all(idle)
    taken = max(sum(one["pss"] for one in weighed), sum(one.get("group", 0) for one in weighed))
    within = 6 * GIB * asked // full
    whole = max(taken, machine) if asked == full else taken  # beside a few, the machine's own noise is large
    config = {"bytes": taken, "bytes_machine": machine, "within": within, "kept": whole <= within}
    return line("P1", f"{driver.kind}/{driver.name}", "idle sandboxes that answer", len(idle), config,
                bound=asked, bound_share=len(idle) / asked)  # fmt: skip


async def end_all(sandboxes: list[AsyncSandbox]) -> None:
    for start in range(0, len(sandboxes), 8):
        await asyncio.gather(*(sandbox.close() for sandbox in sandboxes[start : start + 8]), return_exceptions=True)


async def p2(driver: Driver, rate: int = 20, seconds: int = 60) -> dict[str, Any]:
    """Creations at a steady rate, come what may."""
    took, failed = list[float](), list[str]()

    async def ours() -> None:
        start = time.perf_counter()
        try:
            sandbox = await AsyncSandbox.create(driver.kind, driver=driver.name, **SMALL)  # type: ignore[arg-type]
            try:
                await first_output(sandbox)
                took.append(time.perf_counter() - start)
            finally:
                await sandbox.close()
        except SandboxError as error:
            failed.append(str(error))

    await at_rate(ours, rate, seconds)
    plain, by_hand = plain_runtime(driver), list[float]()

    async def peer() -> None:
        assert plain is not None
        start = time.perf_counter()
        await asyncio.to_thread(plain.once)
        by_hand.append(time.perf_counter() - start)

    if plain is not None:
        await at_rate(peer, rate, seconds)
        plain.close()
    value, other = 1000 * percentile(took, 0.99), 1000 * percentile(by_hand, 0.99) if by_hand else None
    config = {"rate": rate, "seconds": seconds, "done": len(took), "failed": len(failed), "first_failure": failed[:1],
              "median_ms": 1000 * statistics.median(took), "kept": value < 2000 and not failed}  # fmt: skip
    return line("P2", f"{driver.kind}/{driver.name}", "ms, 99th percentile", value, config, peer=other,
                peer_name=plain.name if plain is not None else "none", ratio=other / value if other else None,
                spread=measure.spread([1000 * one for one in took], [1000 * one for one in by_hand]))  # fmt: skip


async def at_rate(work: Any, rate: int, seconds: int) -> None:
    """Start `work` so often a second, without waiting for what was started before; returns when all is done."""
    start, tasks = time.perf_counter(), []
    for number in range(rate * seconds):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(work()))
    await asyncio.gather(*tasks)


class CountingDisk(Disk):
    """Counts the syncs that acknowledgements waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_synced = 0

    def write(self, descriptor: int, data: bytes, offset: int, *, synced: bool) -> None:
        """See `Disk`; zeros are room made ahead, which nothing was acknowledged for."""
        super().write(descriptor, data, offset, synced=synced)
        self.num_synced += synced and any(data)


def p3(
    parent: str | None = None, requests: int = 64, rate: int = 4000, seconds: int = 30, disk: CountingDisk | None = None
) -> dict[str, Any]:
    """Tokens of so many requests, each acknowledged before the next, in a folder of `parent`."""
    disk = disk or CountingDisk()
    took: list[list[float]] = [[] for _ in range(requests)]
    with tempfile.TemporaryDirectory(dir=parent) as folder, Journal(Path(folder) / "log", disk=disk) as journal:
        begin = time.perf_counter() + 0.5

        def one(request: int) -> None:
            pace = requests / rate
            for position in range(int(seconds / pace)):
                due = begin + pace * (position + request / requests)
                time.sleep(max(0.0, due - time.perf_counter()))
                journal.append(Tokens(request + 1, position, 1, (position % 1000,)))
                journal.commit()
                took[request].append(time.perf_counter() - due)

        threads = [threading.Thread(target=one, args=(request,)) for request in range(requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = time.perf_counter() - begin
    waits = [1000 * one for row in took for one in row]
    config = {"requests": requests, "asked_per_s": rate, "reached_per_s": len(waits) / whole, "seconds": seconds,
              "median_ms": statistics.median(waits), "longest_ms": max(waits), "tokens": len(waits),
              "syncs": disk.num_synced}  # fmt: skip
    config["kept"] = percentile(waits, 0.99) < 100 and len(waits) / whole > 0.95 * rate
    return line("P3", f"{requests} requests", "ms, 99th percentile", percentile(waits, 0.99), config,
                bound=rate, bound_share=min(1.0, len(waits) / whole / rate))  # fmt: skip


class Soak:
    """P4. Its state lies in a folder of its own, so that everything in it can be counted."""

    def __init__(self, home: Path, drivers: list[Driver], seconds: float) -> None:
        self.home, self.drivers, self.end = home, drivers, time.monotonic() + seconds
        self.made = self.lost = self.killed = 0
        self.draw = random.Random(11)

    async def run(self) -> list[tuple[int, dict[str, float]]]:
        """Samples (second, figures), one after each quiet moment in which nothing should be there."""
        begin, samples = time.monotonic(), []
        while time.monotonic() < self.end:
            round_end = min(self.end, time.monotonic() + 10)
            killer = asyncio.create_task(self.kill())
            await asyncio.gather(*(self.guest(round_end) for _ in range(8)))
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)
            await asyncio.to_thread(sweep, self.home)
            await asyncio.sleep(0.5)
            samples.append((int(time.monotonic() - begin), self.figures()))
            measure.note(f"{samples[-1]} {self.made} made, {self.lost} lost, {self.killed} killed")
        return samples

    async def guest(self, until: float) -> None:
        """Sandboxes one after the other."""
        while time.monotonic() < until:
            driver = self.draw.choice(self.drivers)
            self.lost += 1
            with contextlib.suppress(SandboxError):
                async with await AsyncSandbox.create(
                    driver.kind,
                    driver=driver.name,
                    home=self.home,
                    **SMALL,  # type: ignore[arg-type]
                ) as sandbox:
                    self.made += 1
                    said = await sandbox.commands.run(["echo", WORD])
                    if said.signal is None and said.stdout != f"{WORD}\n":  # else it was among those that were killed
                        raise SystemExit(f"a {sandbox.kind} sandbox answered {said!r}")
                    await sandbox.files.write("data", os.urandom(10_000))
                    await sandbox.commands.start("sleep 100 & sleep 100")
                    await sandbox.commands.run("yes | head -c 100000", timeout=20)
                self.lost -= 1

    async def kill(self) -> None:
        """Something of a sandbox, a few times a second."""
        while True:
            await asyncio.sleep(self.draw.uniform(0, 0.6))
            homes = all_homes(self.home)
            keepers = self.draw.choice(homes).keeper() if homes else []
            tree = [*keepers, *(one for first in keepers[1:] for one in processes.below(first.pid))]
            if tree:
                self.killed += processes.send(self.draw.choice(tree), signal.SIGKILL)

    def figures(self) -> dict[str, float]:
        """What must not grow."""
        ids = {path.name for path in (self.home / "sandboxes" / ".gone").glob("*")}
        groups = sum(path.name in ids for path in Path("/sys/fs/cgroup").glob("**/rorqual/*"))
        mine = str(self.home)
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "resident_mib": measure.process_bytes("VmRSS") / (1 << 20),
            "mounts": sum(mine in text for text in Path("/proc/self/mountinfo").read_text().splitlines()),
            "files": sum(not any(part in (".gone", ".making") for part in path.parts) for path in
                         (self.home / "sandboxes").rglob("*")),
            "processes": sum(mine in _command(path) for path in Path("/proc").glob("[0-9]*")),
            "control_groups": groups,
            "threads": threading.active_count(),
        }  # fmt: skip


def _command(path: Path) -> str:
    try:
        return (path / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


async def p4(drivers: list[Driver], seconds: float, parent: str | None = None) -> list[dict[str, Any]]:
    """A soak of so many seconds, in a folder of `parent`."""
    home = Path(tempfile.mkdtemp(prefix="soak-", dir=parent))
    soak = Soak(home, drivers, seconds)
    try:
        samples = await soak.run()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    settled = samples[len(samples) // 5 :]
    config = {
        "made": soak.made,
        "killed": soak.killed,
        "lost_to_kills": soak.lost,
        "drivers": [driver.name for driver in drivers],
        "samples": len(samples),
        "seconds": samples[-1][0],
    }
    lines = []
    for name in settled[0][1]:
        values = [figures[name] for _, figures in settled]
        per_hour = slope([(second, figures[name]) for second, figures in settled])[0] * 3600
        more = {**config, "first": values[0], "last": values[-1], "per_hour": per_hour}
        lines.append(line(f"P4.{name}", "soak", "growth", values[-1] - values[0], more, spread={"ours": [
            min(values), max(values)], "peer": []}))  # fmt: skip
    return lines


async def p5(driver: Driver, image: str | None = None, parent: str | None = None) -> dict[str, Any]:
    """Tasks on an image of the user's store, or on one made in a folder of `parent`."""
    with contextlib.ExitStack() as stack:
        if image is None:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)))
            stack.enter_context(mock.patch.dict(os.environ, RORQUAL_HOME=str(made)))
            await asyncio.to_thread(layers.make_image, Store(), image := "tasks")
        store = Store()
        stack.callback(store.local.drop)
        files = [await asyncio.to_thread(store.object_path, digest) for digest in store.resolve([image])]
        verified, size = store.objects.counters.bytes_read, sum(file.stat().st_size for file in files)
        read = {name: await _read_by(driver, image, files, text) for name, text in layers.TASKS.items()}
    shares = {name: count / size for name, count in read.items()}
    most = max(shares.values())
    config = {"image_bytes": size, "read_bytes": read, "shares": shares, "verified_bytes": verified}
    config["kept"] = most < 0.15
    return line("P5", f"{driver.kind}/{driver.name}", "share of the image, largest of the tasks", most, config,
                bound=0.15, bound_share=most / 0.15,
                spread={"ours": [min(shares.values()), most], "peer": []})  # fmt: skip


async def _read_by(driver: Driver, image: str, files: list[Path], task: str) -> int:
    """Bytes of an image's files that a container in which a task runs made the machine read."""
    for file in files:
        layers.drop_pages(file)
    if left := sum(map(layers.resident_bytes, files)):
        raise SystemExit(f"{left} bytes of the image are held in memory by something else; end it and try again.")
    async with await AsyncSandbox.create(driver.kind, driver=driver.name, image=image) as sandbox:
        await sandbox.commands.run(task, check=True)
        return sum(map(layers.resident_bytes, files))


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--only", nargs="*", default=["P1", "P2", "P3", "P4", "P5"], help="which cases")
    parser.add_argument("--drivers", nargs="*", default=[], help="drivers, e.g. bwrap vm/qemu-tcg; all that work here")
    parser.add_argument("--soak", type=float, help="seconds of P4 (300; with --quick 20)")
    parser.add_argument("--image", help="image of P5 (one made of this machine's packages)")
    parser.add_argument("--folder", help="where journal and soak write (the temporary folder)")
    options = parser.parse_args()
    drivers = await working_drivers(options.drivers)
    light = [driver for driver in drivers if driver.kind in ("function", "container")]
    if "P1" in options.only:
        for driver in drivers:
            measure.print_line(await p1(driver, 0.1 if options.quick else 1.0), as_json=options.json)
    if "P2" in options.only:
        for driver in light:
            if driver.kind == "container":
                measure.print_line(await p2(driver, seconds=6 if options.quick else 60), as_json=options.json)
    if "P3" in options.only:
        seconds = 5 if options.quick else 30
        measure.print_line(await asyncio.to_thread(p3, options.folder, seconds=seconds), as_json=options.json)
    if "P4" in options.only and light:
        for one in await p4(light, options.soak or (20 if options.quick else 300), options.folder):
            measure.print_line(one, as_json=options.json)
    if "P5" in options.only and os.geteuid() == 0:
        for driver in light:
            if driver.name == "bwrap":
                measure.print_line(await p5(driver, options.image, options.folder), as_json=options.json)


if __name__ == "__main__":
    asyncio.run(main())
