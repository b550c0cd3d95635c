"""From `create` to the first output of a command: cold, from a snapshot and from a warm pool, for each driver here.

    python benchmarks/sandbox_start.py
    python benchmarks/sandbox_start.py --quick --json --only bwrap zygote

sandbox_start.cold       a new sandbox. For QEMU the machine is booted (its template is removed before each).
sandbox_start.template   QEMU only, the usual start: from the memory of a machine that was booted once.
sandbox_start.snapshot   from a snapshot of a sandbox with files in it: a disk snapshot, for QEMU a full one.
sandbox_start.warm       a lease of a pool that has one ready (`rorqual.sandbox.Pool`).

Each has two lines, the median and (`_p99`) the 99th percentile. The peer is the same runtime started by hand for that
one command (`sandbox_runtimes.py`), started by turns with ours; for QEMU it is the boot of the same guest up to its
ready agent, in the last cold start. bound: a bare process from fork to output, by turns too. `config.times` says how
often.
"""

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

import measure
from sandbox_runtimes import Plain, bare_process, first_output, is_machine, percentile, plain_runtime, working_drivers

from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.pool import Pool, Template
from rorqual.sandbox.vm import template as templates

Start = Callable[[], Awaitable[tuple[float, float | None]]]
"""One start: seconds, and what the peer took if that was measured in it."""


async def timed(making: Awaitable[AsyncSandbox]) -> float:
    """Seconds until the first output; the sandbox is ended afterwards."""
    start = time.perf_counter()
    sandbox = await making
    try:
        await first_output(sandbox)
        return time.perf_counter() - start
    finally:
        await sandbox.close()


def create(driver: Driver, **more: Any) -> Awaitable[AsyncSandbox]:
    return AsyncSandbox.create(driver.kind, driver=driver.name, **more)


async def measured(
    options: argparse.Namespace, driver: Driver, way: str, times: int, start: Start, plain: Plain | None
) -> None:
    """Start by turns with the peer and the bare process, and print the two lines."""
    ours, peer, bare, failure = [], [], [], None
    for number in range(times + 1):
        took, boot = await start()
        if plain is not None and failure is None:
            try:
                boot = plain.once()
            except (RuntimeError, OSError) as error:
                failure = str(error)
        least = bare_process()
        if number:  # the first of each is thrown away
            ours.append(1000 * took)
            bare.append(1000 * least)
            peer += [] if boot is None else [1000 * boot]
    name = plain.name if plain is not None else "booting the same guest"
    for suffix, share in (("", 0.5), ("_p99", 0.99)):
        value, bound = percentile(ours, share), percentile(bare, share)
        other = percentile(peer, share) if peer else None
        line = {
            "name": f"sandbox_start.{way}{suffix}",
            "case": f"{driver.kind}/{driver.name}",
            "unit": "ms",
            "ours": value,
            "peer": other,
            "peer_name": name,
            "ratio": None if other is None else other / value,
            "bound": bound,
            "bound_share": bound / value,
            "spread": measure.spread(ours, peer),
            "config": {"times": times, "statistic": "99th percentile" if suffix else "median", **measure.machine()},
        }
        measure.print_line(line | ({"peer_failure": failure} if failure else {}), as_json=options.json)


async def measure_driver(options: argparse.Namespace, driver: Driver) -> None:
    """All ways of one driver."""
    heavy = is_machine(driver)
    times = options.times or ((2 if heavy else 10) if options.quick else 100)
    boots = min(times, options.boots)
    plain = plain_runtime(driver)
    boot_s: list[float] = []

    async def cold() -> tuple[float, float | None]:
        if heavy:
            shutil.rmtree(templates.folder(), ignore_errors=True)
        took = await timed(create(driver))
        if heavy:
            boot_s[:] = [found.boot_s for path in templates.folder().iterdir() if (found := templates._read(path))]
        return took, boot_s[0] if boot_s else None

    async def again() -> tuple[float, float | None]:
        return await timed(create(driver)), boot_s[0] if boot_s else None

    try:
        await measured(options, driver, "cold", boots if heavy else times, cold, plain)
        if heavy:
            await measured(options, driver, "template", times, again, plain)
        await from_snapshot(options, driver, times, boot_s, plain)
        await from_pool(options, driver, times, boot_s, plain)
    finally:
        if plain is not None:
            plain.close()


async def from_snapshot(
    options: argparse.Namespace, driver: Driver, times: int, boot_s: list[float], plain: Plain | None
) -> None:
    """Starts from a state with 100 small files."""
    capabilities = driver.capabilities()
    if not (capabilities.snapshot_memory or capabilities.snapshot_disk):
        measure.note(f"{driver.name} takes no snapshots here")
        return
    async with await create(driver) as sandbox:
        await sandbox.commands.run("mkdir work && cd work && for i in $(seq 100); do echo $i > $i; done", check=True)
        taken = await sandbox.snapshot("full" if capabilities.snapshot_memory else "disk", name="start-benchmark")
        try:

            async def start() -> tuple[float, float | None]:
                return await timed(create(driver, snapshot=taken)), boot_s[0] if boot_s else None

            await measured(options, driver, "snapshot", times, start, plain)
        finally:
            forget(taken.id)


def forget(name: str) -> None:
    """Drop the name of a snapshot, of either sort."""
    if Store().reference(name) is not None:
        Store().forget(name)
    else:
        from rorqual.sandbox.vm import snapshot as full

        shutil.rmtree(full.folder() / name, ignore_errors=True)


async def from_pool(
    options: argparse.Namespace, driver: Driver, times: int, boot_s: list[float], plain: Plain | None
) -> None:
    """Leases of warm sandboxes, each taken when the pool has one ready again."""
    template = Template.of(driver.kind, driver=driver.name)
    async with Pool(capacity=1, warm={template: 1}) as pool:

        async def start() -> tuple[float, float | None]:
            while pool.stats().warm < 1:
                await asyncio.sleep(0.01)
            begin = time.perf_counter()
            async with await pool.lease(template) as lease, lease.working() as sandbox:
                await first_output(sandbox)
                return time.perf_counter() - begin, boot_s[0] if boot_s else None

        await measured(options, driver, "warm", times, start, plain)
        if pool.stats().handed_out_warm != times + 1:
            raise SystemExit(f"of {times + 1} leases only {pool.stats().handed_out_warm} were warm ones")


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="10 starts of each, 2 of emulated machines")
    parser.add_argument("--times", type=int, help="starts of each (100)")
    parser.add_argument("--boots", type=int, default=10, help="at most so many boots of emulated machines (10)")
    parser.add_argument("--only", nargs="*", default=[], help="drivers, e.g. bwrap vm/qemu-tcg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:  # cold starts remove templates, which others here may be using
        os.environ["XDG_CACHE_HOME"] = own
        for driver in await working_drivers(options.only):
            await measure_driver(options, driver)


if __name__ == "__main__":
    asyncio.run(main())
