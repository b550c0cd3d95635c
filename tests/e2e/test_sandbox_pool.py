"""The pool over real sandboxes: warm hand-outs, dead ones replaced, places, preemption, and nothing left at the end."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from full import often
from host_traces import descriptors, settled, traces_of
from sandboxes import need

from rorqual.errors import SandboxError
from rorqual.sandbox import processes, warm
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.errors import CapacityRejected, Gone
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.lease import Lease
from rorqual.sandbox.pool import Pool, Template

CONTAINER = Template.of("container", driver="bwrap", memory_mb=64, disk_mb=16)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pool]:
    """Pools with a data folder of their own."""
    need(("container", "bwrap"))
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path))
    return Pool


def play(tmp_path: Path, scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene, and see that it left nothing: no process, mount, group, file or descriptor."""
    before = descriptors()
    try:
        asyncio.run(scene())  # type: ignore[arg-type]
        assert Store().references() == []
    finally:
        Store().local.sweep(set())  # layers stay mounted for the next sandbox until they are collected
    assert settled(lambda: traces_of(tmp_path)) == []
    assert descriptors() <= before


async def kill_keeper(sandbox: AsyncSandbox | None) -> None:
    """Kill -9 its first process, and wait until the kernel took the rest away."""
    assert sandbox is not None and sandbox._record.running is not None
    keeper = sandbox._record.running.processes[0]
    tree = [keeper, *processes.below(keeper.pid)]
    os.kill(keeper.pid, signal.SIGKILL)
    await until(lambda: not any(map(processes.alive, tree)))


async def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + within_s
    while not true():
        assert asyncio.get_running_loop().time() < end, "it never came true"
        await asyncio.sleep(0.01)


def test_traces_are_noticed(make: Callable[..., Pool], tmp_path: Path) -> None:
    """The search that the other tests rely on finds a living sandbox."""

    async def scene() -> None:
        async with make() as pool:
            await pool.lease(CONTAINER)
            kinds = {line.split()[0] for line in traces_of(tmp_path)}
            assert {"process", "file"} <= kinds

    play(tmp_path, scene)


def test_warm_ones_are_handed_out_and_dead_ones_replaced(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=4, warm={CONTAINER: 2}) as pool:
            ready = {sandbox.id: sandbox for sandbox in pool._warm._ready[CONTAINER]}
            assert len(ready) == pool.stats().warm == pool.stats().made == 2
            first = await pool.lease(CONTAINER)
            assert first.sandbox_id in ready
            assert (await first.run("echo hello")).stdout == "hello\n"
            await until(lambda: pool.stats().warm == 2)
            killed = pool._warm._ready[CONTAINER][0]
            await kill_keeper(killed)
            second = await pool.lease(CONTAINER)
            assert second.sandbox_id not in (killed.id, first.sandbox_id)
            assert (await second.run(["true"])).exit_code == 0
            stats = pool.stats()
            assert (stats.handed_out_warm, stats.replaced, stats.awake) == (2, 1, 2)
            await until(lambda: pool.stats().warm == 2)
            other = await pool.lease(Template.of("container", driver="bwrap", memory_mb=80))
            assert (await other.run(["true"])).exit_code == 0 and pool.stats().handed_out_warm == 2

    play(tmp_path, scene)


@pytest.mark.slow
def test_a_warm_one_has_its_own_times_from_the_hand_out(
    make: Callable[..., Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "KEEP_S", 1.5)
    template = Template.of("container", driver="bwrap", idle_ttl=50.0, max_lifetime=70.0)

    async def scene() -> None:
        async with make(warm={template: 1}) as pool:
            for _ in range(4):  # longer than a warm one lives when nobody looks after it
                await asyncio.sleep(0.6)
                await pool._warm.look()
            assert pool.stats().made == 1 and pool.stats().replaced == 0
            lease = await pool.lease(template)
            await asyncio.sleep(2)
            assert (await lease.run(["true"])).exit_code == 0 and pool.stats().handed_out_warm == 1
            lifetimes = lease.sandbox._record.spec.lifetimes  # type: ignore[union-attr]
            assert lifetimes.idle_ttl == 50 and 72 < lifetimes.max_lifetime < 90
            spare = pool._warm._ready[template][0]
            await asyncio.sleep(1.8)
            with pytest.raises(Gone, match="idle_ttl|max_lifetime"):  # as if the pool had been killed
                await spare.ping()
            await pool._warm.look()
            await until(lambda: pool.stats().warm == 1 and pool._warm._ready[template][0] is not spare)

    play(tmp_path, scene)


def test_too_many_are_refused_with_a_time(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=1, max_waiting=1) as pool:
            first = await pool.lease(CONTAINER)
            waiting = asyncio.create_task(pool.lease(CONTAINER))
            await until(lambda: pool.stats().waiting == 1)
            with pytest.raises(CapacityRejected) as caught:
                await pool.lease(CONTAINER)
            assert caught.value.retry_after_s > 0
            with pytest.raises(CapacityRejected, match="0.05 s"):
                await asyncio.wait_for(make_room_for_one(pool, waiting), 20)
            assert pool.stats().refused == 2 and pool.stats().awake == 1
            again = await pool.lease(CONTAINER, timeout=20) if first.is_closed else None
            assert again is None

    async def make_room_for_one(pool: Pool, waiting: "asyncio.Task[Any]") -> None:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pool.lease(CONTAINER, timeout=0.05)

    play(tmp_path, scene)


def test_an_idle_lease_is_put_aside_and_woken_with_its_files(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=1) as pool:
            low = await pool.lease(CONTAINER, priority=0)
            await low.run("echo kept > note; mkdir deep; echo too > deep/file; rm -f /etc/hosts")
            old = low.sandbox_id
            high = await pool.lease(CONTAINER, priority=5)
            assert (low.has_place, low.sandbox_id) == (False, None) and low.aside is not None
            assert (pool.stats().awake, pool.stats().put_aside, pool.stats().preempted) == (1, 1, 1)
            woken = asyncio.create_task(low.run("cat note deep/file; test ! -e /etc/hosts"))
            await until(lambda: pool.stats().waiting == 1)
            assert (await high.run(["true"])).exit_code == 0
            await asyncio.sleep(0.05)
            assert not woken.done(), "one of lower priority took the place of a higher one"
            await high.close()
            result = await woken
            assert (result.stdout, result.exit_code, low.restored) == ("kept\ntoo\n", 0, 1)
            assert low.sandbox_id not in (None, old)
            second = await pool.lease(CONTAINER, priority=1)  # and once more, from files of two snapshots
            await second.close()
            assert (await low.run("cat note")).stdout == "kept\n" and low.restored == 2
            assert len(Store().references()) == 1

    play(tmp_path, scene)


def test_a_busy_lease_is_not_put_aside(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=1) as pool:
            low = await pool.lease(CONTAINER)
            command = asyncio.create_task(low.run("while [ ! -e go ]; do sleep 0.02; done; echo done"))
            await until(lambda: low.busy == 1)
            asked = asyncio.create_task(pool.lease(CONTAINER, priority=9))
            await asyncio.sleep(0.2)
            assert not asked.done() and low.has_place
            await low.sandbox.files.write("go", "")
            assert (await command).stdout == "done\n"
            high = await asked  # as soon as it is idle
            assert not low.has_place and pool.stats().preempted == 1
            with pytest.raises(CapacityRejected):
                await pool.lease(CONTAINER, priority=9, timeout=0.1)  # equal priority does not push
            assert high.has_place

    play(tmp_path, scene)


def test_a_dead_lease_gives_its_place_and_can_be_replaced(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=1) as pool:
            dead = await pool.lease(CONTAINER)
            await kill_keeper(dead.sandbox)
            other = await pool.lease(CONTAINER, priority=1)  # would have put it aside
            with pytest.raises(CapacityRejected):
                await pool.lease(CONTAINER, timeout=0.1)
            await other.close()
            with pytest.raises(Gone, match="replace"):
                await dead.run(["true"])
            await dead.replace()
            assert (await dead.run("echo again")).stdout == "again\n"
            await kill_keeper(dead.sandbox)
            with pytest.raises(Gone):
                await dead.run(["true"])
            await pool.look()
            assert not dead.has_place and pool.stats().awake == 0

    play(tmp_path, scene)


def test_places_are_shared_among_owners(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        async with make(capacity=2) as pool:
            order: list[str] = []

            async def visit(owner: str) -> None:
                async with await pool.lease(CONTAINER, owner=owner) as lease:
                    order.append(owner)
                    await lease.run(["true"])

            held = [await pool.lease(CONTAINER, owner="greedy") for _ in range(2)]
            greedy = [asyncio.create_task(visit("greedy")) for _ in range(3)]
            await until(lambda: pool.stats().waiting == 3)
            modest = asyncio.create_task(visit("modest"))
            await until(lambda: pool.stats().waiting == 4)
            await held[0].close()
            await asyncio.gather(*greedy, modest)
            assert order[0] == "modest" and sorted(order) == ["greedy"] * 3 + ["modest"]

    play(tmp_path, scene)


def test_a_closed_pool_ends_what_is_waiting_and_being_made(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        pool = await make(capacity=2, warm={CONTAINER: 1}).start()
        await pool.lease(CONTAINER)
        asked = [asyncio.create_task(pool.lease(CONTAINER)) for _ in range(3)]
        await asyncio.sleep(0.02)  # one is being made, two wait, and the warm place is being filled again
        await pool.close()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(outcome, Lease):  # it was quick enough to get the warm one
                with pytest.raises(Gone):
                    await outcome.run("true")
            else:
                assert isinstance(outcome, Gone)
        with pytest.raises(Gone):
            await pool.lease(CONTAINER)
        await pool.close()

    play(tmp_path, scene)


def test_a_cancelled_request_leaves_nothing(make: Callable[..., Pool], tmp_path: Path) -> None:
    """Cancelled at any moment of the making: no sandbox, no place and no descriptor is lost."""
    draw = random.Random(7)

    async def scene() -> None:
        async with make(capacity=2) as pool:
            await (await pool.lease(CONTAINER)).close()
            for _ in range(often(12, 150)):
                task = asyncio.create_task(pool.lease(CONTAINER))
                await asyncio.sleep(draw.uniform(0, 0.05))
                task.cancel()
                outcome = (await asyncio.gather(task, return_exceptions=True))[0]
                if not isinstance(outcome, BaseException):
                    await outcome.close()
                assert isinstance(outcome, asyncio.CancelledError) or outcome.is_closed
                assert pool.stats().awake == 0
            assert await asyncio.to_thread(settled, partial(traces_of, tmp_path)) == []

    play(tmp_path, scene)


def test_a_template_that_cannot_be_made_is_an_error_at_the_start(make: Callable[..., Pool], tmp_path: Path) -> None:
    async def scene() -> None:
        with pytest.raises(SandboxError, match="no-such-image"):
            await make(warm={CONTAINER: 1, Template.of("container", image="no-such-image"): 1}).start()

    play(tmp_path, scene)
