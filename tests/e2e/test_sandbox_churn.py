"""Many sandboxes made, used and ended at once while processes of all sorts are killed -9: nothing is left of them."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from churn_client import IDLE_S
from full import often
from host_traces import descriptors, settled, traces_of

from rorqual.errors import SandboxError
from rorqual.sandbox import processes
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.drivers import driver, drivers
from rorqual.sandbox.home import all_homes
from rorqual.sandbox.probe import probe
from rorqual.sandbox.sweep import sweep

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parents[1] / "support" / "churn_client.py"
LIGHT = {"zygote": 20, "bwrap": 40, "runc": 20}
HEAVY = {"gvisor": 4, "qemu-tcg": 1}
SORTS = {"keeper", "holder", "inside", "client"}
"""What is killed, each at least once."""


@dataclass
class Tally:
    """What the clients said, and what was killed."""

    made: set[str] = field(default_factory=set)
    used: int = 0
    bad: list[str] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)

    def hear(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if word == "made":
            self.made.add(rest)
        elif word == "used":
            self.used += 1
        elif word == "descriptors":
            self.descriptors.append(int(rest))
        else:
            self.bad.append(line.strip())


class Clients:
    """Processes that make sandboxes; a new one for each that ended, until there were enough sandboxes."""

    def __init__(self, home: Path, kinds: list[tuple[str, str, int]], tally: Tally, log: Path) -> None:
        self.home, self.kinds, self.tally, self.log = home, json.dumps(kinds), tally, log
        self.running: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []
        self.seed = 0

    def start(self, count: int) -> None:
        self.seed += 1
        command = [sys.executable, str(CLIENT), str(self.home), str(self.seed), str(count), self.kinds]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True)
        reader = threading.Thread(target=self.listen, args=(client,))
        reader.start()
        self.running.append(client)
        self.readers.append(reader)

    def listen(self, client: "subprocess.Popen[str]") -> None:
        assert client.stdout is not None
        with client.stdout:
            for line in client.stdout:
                if line.endswith("\n"):
                    self.tally.hear(line)

    def reap(self) -> None:
        self.running = [client for client in self.running if client.poll() is None]

    def end(self) -> None:
        for client in self.running:
            client.kill()
        for client in self.running:
            client.wait()
        for reader in self.readers:
            reader.join()


def victims(home: Path) -> Iterator[tuple[str, processes.Process]]:
    """Host processes of living sandboxes, by what they are."""
    for place in all_homes(home):
        keepers = place.keeper()
        for name, process in zip(("keeper", "holder"), keepers, strict=False):
            yield name, process
        if len(keepers) == 2:
            for process in processes.below(keepers[1].pid):
                yield "inside", process


def test_nothing_is_left_after_many_lives_and_kills(tmp_path: Path) -> None:
    target, draw, tally = often(60, 500), random.Random(5), Tally()
    weights = LIGHT | (HEAVY if target >= 500 else {})
    found = [one for kind in ("function", "container", "microvm") for one in drivers(kind)]  # type: ignore[arg-type]
    kinds = [
        (one.kind, one.name, weights[one.name])
        for one in found
        if one.name in weights and asyncio.run(probe(one)).works
    ]
    if not kinds:
        pytest.skip("neither function nor container sandboxes can be made here; `rorqual sandbox doctor` says why")
    before, home, log = descriptors(), tmp_path / "home", tmp_path / "clients.log"
    clients = Clients(home, kinds, tally, log)
    try:
        while len(tally.made) < target or not all(tally.killed[sort] for sort in SORTS):
            clients.reap()
            while len(clients.running) < 1 + draw.randrange(4):
                clients.start(draw.randrange(5, 40))
            time.sleep(draw.uniform(0, 0.3))
            if draw.random() < 0.06 and clients.running:
                draw.choice(clients.running).send_signal(signal.SIGKILL)
                tally.killed["client"] += 1
            elif choices := list(victims(home)):
                sort = draw.choice(sorted({name for name, _ in choices}))
                process = draw.choice([process for name, process in choices if name == sort])
                tally.killed[sort] += processes.send(process, signal.SIGKILL)
    finally:
        clients.end()
    time.sleep(IDLE_S)  # those whose client was killed end by themselves, by their idle time or the time to be paused
    left = settled(lambda: [*sweep(home), *(place.id for place in all_homes(home))], 60)
    print(f"{len(tally.made)} made, {tally.used} used, killed {dict(tally.killed)}, {clients.seed} clients")
    assert left == [] and settled(lambda: traces_of(home)) == []
    assert tally.bad == [], "\n".join([*tally.bad, log.read_text()[-2000:]])
    stayed = f"descriptors that stayed open: {tally.descriptors}\n{log.read_text()[-2000:]}"
    assert all(count <= 0 for count in tally.descriptors), stayed
    assert tally.used > target / 4
    assert descriptors() <= before
    assert os.listdir(home) == ["sandboxes"] and sorted(os.listdir(home / "sandboxes")) == [".gone", ".making"]


def test_no_child_outlives_a_runtime_killed_while_it_starts(tmp_path: Path) -> None:
    """bwrap is killed as soon as it is seen, when its child may not yet have asked to die with it."""
    found = asyncio.run(probe(driver("container", "bwrap")))
    if not found.works:
        pytest.skip(f"containers through bwrap: {found.why}")
    draw, killed = random.Random(1), Counter[str]()

    async def start_and_kill() -> None:
        making = asyncio.create_task(
            AsyncSandbox.create("container", driver="bwrap", home=tmp_path, memory_mb=64, disk_mb=16)
        )
        await asyncio.sleep(draw.uniform(0.005, 0.05))
        end = time.monotonic() + 1
        while not making.done() and time.monotonic() < end:
            for name, process in victims(tmp_path):
                if name == "inside":
                    killed[name] += processes.send(process, signal.SIGKILL)
            await asyncio.sleep(0.001)
        outcome = (await asyncio.gather(making, return_exceptions=True))[0]
        if isinstance(outcome, AsyncSandbox):
            with contextlib.suppress(SandboxError):
                await outcome.close()
        else:
            assert isinstance(outcome, SandboxError), outcome

    async def scene() -> None:
        for _ in range(often(25, 200)):
            await asyncio.wait_for(start_and_kill(), 30)

    asyncio.run(scene())
    assert killed["inside"] > 0 and settled(lambda: [*sweep(tmp_path), *traces_of(tmp_path)]) == []
