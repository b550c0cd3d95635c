"""How many idle sandboxes of each driver fit in 8 GiB: started until they do no more.

    python benchmarks/sandbox_density.py
    python benchmarks/sandbox_density.py --only vm/qemu-tcg --within 600
    python benchmarks/sandbox_density.py --quick --json --only bwrap

Sandboxes are made, each runs one command and then idles, until one limit is reached; at the end every one must answer.
`config.limit` says which came first: memory, processes, open files, or time (`--within`). Memory is held to 8 GiB by a
control group around everything: this client, keepers, sandboxes, what the kernel keeps for them, and file pages (the
kernel drops those that nobody has mapped before it refuses anything, so they are not counted as taken). Where no such
group can be made, it is by how much the memory that others could get shrank. `ours` is what was alive at the end; where
time came first it is extrapolated from the bytes each took (`config.extrapolated`).

`--quick` starts few and extrapolates: they are weighed every tenth step in three ways: `pss`, the processes' share of
memory; `group`, what their control groups were charged, with the share of the processes outside (the keeper);
`machine`, by how much the memory that others could get shrank. The slope of each over the number of sandboxes is what
one more costs; the largest of the three counts (`machine` only where its points lie on a line).

The peer is the same runtime started by hand with a sleeping program, weighed by `pss`. bound: bare sleeping processes.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import time
from typing import Any

import measure
from sandbox_room import Room
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
AT_ONCE = 4
NEAR = 0.985
"""Share of the room at which filling stops, so that the last sandbox is not the one that is killed for memory."""


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


async def fill(driver: Driver, within_s: float) -> dict[str, Any]:
    """Start idle sandboxes until something keeps the next from coming; see that all of them answer."""
    idle: list[AsyncSandbox] = []
    limit = "time"
    with Room(ROOM) as room:
        first = await make_idle(driver)  # what is made once: a template, mounts, programs in the cache
        before, shrunk_before, begin = room.used_bytes(), room.shrunk_bytes(), time.monotonic()
        points = [(1, before)]
        try:
            while time.monotonic() - begin < within_s:
                made = await asyncio.gather(*(make_idle(driver) for _ in range(AT_ONCE)), return_exceptions=True)
                idle += [one for one in made if isinstance(one, AsyncSandbox)]
                points.append((1 + len(idle), room.used_bytes()))
                failed = [one for one in made if isinstance(one, BaseException)]
                if failed:
                    limit = f"{type(failed[0]).__name__}: {failed[0]}"
                    break
                each = (points[-1][1] - before) / len(idle)
                if points[-1][1] + AT_ONCE * each > NEAR * ROOM:
                    limit = "memory"
                    break
                if len(idle) % 100 < AT_ONCE:
                    if (reached := room.reached()) is not None:
                        limit = reached
                        break
                    measure.note(f"{driver.kind}/{driver.name}: {len(idle)}, {each / (1 << 20):.2f} MiB each")
            took_s = time.monotonic() - begin
            await asyncio.sleep(SETTLE_S)
            used, shrunk, counts = room.used_bytes(), room.shrunk_bytes(), room.counts()
            answers = await asyncio.gather(*(answered(sandbox) for sandbox in [first, *idle]))
        finally:
            for start in range(0, len(idle), 8):
                await asyncio.gather(*(sandbox.close() for sandbox in idle[start : start + 8]))
            await first.close()
    return {
        "alive": sum(answers),
        "limit": limit,
        "bytes_each": (used - before) / max(1, len(idle)),
        "before": before,
        "used_bytes": used,
        "machine_bytes_each": round((shrunk - shrunk_before) / max(1, len(idle))),
        "fill_s": round(took_s, 1),
        "measured_by": room.how,
        **counts,
    }


async def make_idle(driver: Driver) -> AsyncSandbox:
    """One that has run its first command."""
    sandbox = await AsyncSandbox.create(driver.kind, driver=driver.name, idle_ttl=float("inf"), max_lifetime=3600)
    try:
        await first_output(sandbox)
    except BaseException:
        await sandbox.close()
        raise
    return sandbox


async def answered(sandbox: AsyncSandbox) -> bool:
    """Whether it lives."""
    try:
        await sandbox.ping()
        return True
    except Exception as error:
        measure.note(f"{sandbox.id} does not answer: {error}")
        return False


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


async def measure_driver(options: argparse.Namespace, driver: Driver, number: int | None) -> None:
    """One line: filled, or with `number` from so many."""
    heavy = is_machine(driver)
    if number is None:
        found = await fill(driver, options.within)
        fits, spread = found["alive"], None
        is_guess = found["limit"] == "time" and found["bytes_each"] > 0
        if is_guess:
            fits = int((ROOM - found["before"]) / found["bytes_each"])
        config = {**found, "bytes_each": round(found["bytes_each"]), "extrapolated": is_guess}
    else:
        sample = await weigh(driver, number, max(1, number // 10 if not heavy else 1))
        slopes = {way: slope(points) for way, points in sample["points"].items() if points}
        each = {way: value for way, (value, fit) in slopes.items() if value > 0 and (way != "machine" or fit > 0.9)}
        if not each:
            measure.note(f"{driver.kind}/{driver.name}: too few sandboxes for a slope")
            return
        fits = int(ROOM / max(each.values()))
        spread = {way: [min(v / n for n, v in points), max(v / n for n, v in points)]
                  for way, points in sample["points"].items() if points}  # fmt: skip
        config = {
            "bytes_each": {way: round(value) for way, (value, _) in slopes.items()},
            "correlation": {way: round(fit, 3) for way, (_, fit) in slopes.items()},
            "started": sample["started"],
            "extrapolated": sample["started"] < fits,
        }
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
        "spread": spread,
        "config": {**config, "peer_bytes_each": plain, **measure.machine()},
    }
    measure.print_line(line, as_json=options.json)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="30 light ones, 6 of gVisor, 2 emulated machines")
    parser.add_argument("--number", type=int, help="start so many and extrapolate, instead of filling 8 GiB")
    parser.add_argument("--within", type=float, default=280.0, help="seconds of filling for each driver")
    parser.add_argument("--only", nargs="*", default=[], help="drivers, e.g. bwrap vm/qemu-tcg")
    options = parser.parse_args()
    for driver in await working_drivers(options.only):
        few = 2 if is_machine(driver) else 6 if driver.name == "gvisor" else 30
        await measure_driver(options, driver, options.number or (few if options.quick else None))


if __name__ == "__main__":
    asyncio.run(main())
