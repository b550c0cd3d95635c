"""A client process of the churn test: makes sandboxes, uses them and ends them in every way, until it is killed.

    python churn_client.py HOME SEED COUNT '[["container", "bwrap", 3], ...]'

Lines on standard output: `made ID`, `used`, `bad TEXT` for anything that went wrong in another way than a SandboxError,
and `descriptors N` at its end: open files that came to stay.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import traceback
from pathlib import Path

from rorqual.errors import RorqualError, SandboxError
from rorqual.sandbox.async_sandbox import AsyncSandbox

held: list[AsyncSandbox] = []
IDLE_S = 3.0
HANGS_S = 60.0


def say(*words: object) -> None:
    print(*words, flush=True)


def opened() -> dict[str, str]:
    """Open files of this process, by number, with what each is."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


async def use(sandbox: AsyncSandbox, draw: random.Random) -> None:
    """A few operations whose outcome is known."""
    for _ in range(draw.randrange(1, 4)):
        what = draw.randrange(6)
        if what == 0:
            result = await sandbox.commands.run("echo out; echo err >&2; exit 3", timeout=20)
            if not result.signal and (result.stdout, result.stderr, result.exit_code) != ("out\n", "err\n", 3):
                say("bad", f"{result}".replace("\n", " "))
        elif what == 1:
            data = draw.randbytes(draw.randrange(100_000))
            await sandbox.files.write("sub/data", data)
            if await sandbox.files.read("sub/data", format="bytes") != data:
                say("bad a file came back otherwise")
        elif what == 2:
            await sandbox.commands.start("sleep 100 & setsid sleep 100; wait")
        elif what == 3:
            await sandbox.commands.run("yes | head -c 3000000; (sleep 50 &)", timeout=20, max_output=1000)
        elif what == 4:
            await sandbox.pause()
            await sandbox.resume()
        elif sandbox.kind == "function":
            called = await sandbox.call("def f(x):\n    return x + 1", "f", [4])
            if called.value != 5 and called.error != "WorkerEnded":
                say(f"bad {called}".replace("\n", " "))
    say("used")


async def one(home: Path, draw: random.Random, kinds: list[tuple[str, str, int]]) -> None:
    """The life of one sandbox; some are left behind, some cancelled in the middle."""
    kind, driver, _ = draw.choices(kinds, [weight for _, _, weight in kinds])[0]
    small = {"memory_mb": 64, "disk_mb": 16} if kind in ("function", "container") else {}
    making = AsyncSandbox.create(
        kind,
        driver=driver,
        home=home,
        idle_ttl=IDLE_S,
        max_lifetime=120,
        paused_ttl=IDLE_S,  # one whose client is killed while it is paused has no idle time
        **small,  # type: ignore[arg-type]
    )
    if draw.random() < 0.1:
        with contextlib.suppress(TimeoutError):
            held.append(await asyncio.wait_for(making, draw.uniform(0, 0.1)))
            say("made", held[-1].id)
        return
    sandbox = await making
    say("made", sandbox.id)
    end = draw.random()
    try:
        if end < 0.1:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(use(sandbox, draw), draw.uniform(0, 0.1))
        else:
            await use(sandbox, draw)
    finally:
        if end < 0.8:
            await sandbox.close()
        elif end < 0.9:
            await sandbox.detach()
            if draw.random() < 0.5:
                await (await AsyncSandbox.connect(sandbox.id, home=home)).close()
        else:
            held.append(sandbox)


async def main(home: Path, seed: int, count: int, kinds: list[tuple[str, str, int]]) -> None:
    draw = random.Random(seed)
    places = asyncio.Semaphore(draw.randrange(1, 5))

    async def guest(number: int) -> None:
        async with places:
            try:
                await asyncio.wait_for(one(home, random.Random(seed * 1000 + number), kinds), HANGS_S)
            except SandboxError:
                pass  # it, or what it ran in, was killed
            except TimeoutError:
                say("bad it hung")
            except (RorqualError, Exception):
                say("bad", traceback.format_exc().replace("\n", " | "))

    await guest(-1)
    before = opened()
    await asyncio.gather(*(guest(number) for number in range(count)))
    for sandbox in held:
        with contextlib.suppress(SandboxError):
            await sandbox.detach()
    gc.collect()
    now = opened()
    print(*(name for number, name in now.items() if before.get(number) != name), file=sys.stderr)
    say("descriptors", len(now) - len(before))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])))
