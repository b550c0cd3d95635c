"""How much host memory an idle sandbox of each driver takes, and how many fit in 8 GiB.

    python benchmarks/sandbox_density.py
    python benchmarks/sandbox_density.py --quick --json --only bwrap

Sandboxes are really started (`config.started`), each runs one command and then idles; every tenth step all of them are
weighed in three ways: `pss`, the processes' share of memory; `group`, what their control groups were charged, with the
share of the processes outside (the keeper); `machine`, by how much the memory that others could get shrank, which also
has what the kernel keeps for namespaces and mounts. The slope of each over the number of sandboxes is what one more
costs. `ours` is 8 GiB over the largest of the three slopes, so the least favourable; `machine` counts where it explains
its own points (correlation above 0.9), since it sees whatever else goes on. `config.extrapolated` says whether so many
were really started. The peer is the same runtime started by hand with a sleeping program, weighed by `pss`. bound: bare
sleeping processes.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
from typing import Any

import measure
from sandbox_runtimes import (
    GIB,
    available_bytes,
    first_output,
    is_machine,
    plain_runtime,
    sandbox_bytes,
    tree_pss,
    working_drivers,
)

from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.drivers.base import Driver

ROOM = 8 * GIB
SETTLE_S = 1.0


def slope(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Least squares: growth for one more, and the correlation."""
    counts, values = [float(count) for count, _ in points], [value for _, value in points]
    if len(points) < 2 or min(values) == max(values):
        return 0.0, 0.0
    return statistics.linear_regression(counts, values).slope, statistics.correlation(counts, values)


async def weigh(driver: Driver, number: int, step: int) -> dict[str, Any]:
    """Start up to `number` idle sandboxes and weigh them on the way."""
    points: dict[str, list[tuple[int, float]]] = {"pss": [], "group": [], "machine": []}
    idle: list[AsyncSandbox] = []
    before = available_bytes()
    try:
        while len(idle) < number:
            for _ in range(min(step, number - len(idle))):
                sandbox = await AsyncSandbox.create(
                    driver.kind, driver=driver.name, idle_ttl=float("inf"), max_lifetime=3600
                )
                idle.append(sandbox)
                await first_output(sandbox)
            await asyncio.sleep(SETTLE_S)
            sums: dict[str, int] = {}
            for sandbox in idle:
                for way, value in (await asyncio.to_thread(sandbox_bytes, sandbox)).items():
                    sums[way] = sums.get(way, 0) + value
            for way, value in {**sums, "machine": before - available_bytes()}.items():
                points[way].append((len(idle), float(value)))
            measure.note(f"{driver.kind}/{driver.name}: {len(idle)} sandboxes, " + ", ".join(
                f"{way} {found[-1][1] / len(idle) / (1 << 20):.2f} MiB each" for way, found in points.items() if found
            ))  # fmt: skip
            if available_bytes() < 2 * GIB:
                measure.note("no more are started: less than 2 GiB are left")
                break
        for sandbox in idle:
            await sandbox.ping()  # all of them live
    finally:
        for start in range(0, len(idle), 8):
            await asyncio.gather(*(sandbox.close() for sandbox in idle[start : start + 8]))
    return {"started": len(idle), "points": points}


def weigh_plain(driver: Driver, number: int) -> tuple[str, float | None]:
    """Share of memory of one of `number` sleeping programs in the same runtime by hand."""
    plain = plain_runtime(driver)
    if plain is None:
        return "nothing by hand", None
    try:
        with contextlib.ExitStack() as stack:
            children = [stack.enter_context(plain.idle()) for _ in range(number)]
            subprocess.run(["sleep", "2"])
            if any(child.poll() is not None for child in children):
                return plain.name, None
            return plain.name, statistics.mean(tree_pss(child.pid) for child in children)
    finally:
        plain.close()


def bare_bytes(number: int) -> float:
    """Share of memory of one of `number` bare sleeping processes."""
    children = [subprocess.Popen(["/bin/sleep", "1000"], stdin=subprocess.DEVNULL) for _ in range(number)]
    try:
        subprocess.run(["sleep", "1"])
        return statistics.mean(tree_pss(child.pid) for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()


async def measure_driver(options: argparse.Namespace, driver: Driver, number: int) -> None:
    """One line."""
    heavy = is_machine(driver)
    found = await weigh(driver, number, max(1, number // 10 if not heavy else 1))
    slopes = {way: slope(points) for way, points in found["points"].items() if points}
    each = {way: value for way, (value, fit) in slopes.items() if value > 0 and (way != "machine" or fit > 0.9)}
    if not each:
        measure.note(f"{driver.kind}/{driver.name}: too few sandboxes for a slope")
        return
    largest = max(each.values())
    fits = int(ROOM / largest)
    name, plain = weigh_plain(driver, 4 if heavy else 10)
    bare = bare_bytes(10)
    line = {
        "name": "sandbox_density",
        "case": f"{driver.kind}/{driver.name}",
        "unit": "idle sandboxes in 8 GiB",
        "ours": fits,
        "peer": None if plain is None else int(ROOM / plain),
        "peer_name": name,
        "ratio": None if plain is None else fits / int(ROOM / plain),
        "bound": int(ROOM / bare),
        "bound_share": fits / int(ROOM / bare),
        "spread": {way: [min(v / n for n, v in points), max(v / n for n, v in points)]
                   for way, points in found["points"].items() if points},
        "config": {
            "bytes_each": {way: round(value) for way, (value, _) in slopes.items()},
            "correlation": {way: round(fit, 3) for way, (_, fit) in slopes.items()},
            "started": found["started"],
            "extrapolated": found["started"] < fits,
            "peer_bytes_each": plain,
            **measure.machine(),
        },
    }  # fmt: skip
    measure.print_line(line, as_json=options.json)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="30 light ones, 6 of gVisor, 2 emulated machines")
    parser.add_argument("--number", type=int, help="how many to start (300; gVisor 40, emulated machines 10)")
    parser.add_argument("--only", nargs="*", default=[], help="drivers, e.g. bwrap vm/qemu-tcg")
    options = parser.parse_args()
    for driver in await working_drivers(options.only):
        usual = (2, 6, 30) if options.quick else (10, 40, 300)
        number = usual[0] if is_machine(driver) else usual[1] if driver.name == "gvisor" else usual[2]
        await measure_driver(options, driver, options.number or number)


if __name__ == "__main__":
    asyncio.run(main())
