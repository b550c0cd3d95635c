"""Leases of a cluster that nobody waits for any more: handed back by the pool, given up by the edge."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rorqual.sandbox import cluster
from rorqual.sandbox.edge import LEASES, Edge
from rorqual.sandbox.errors import CapacityRejected, Gone
from rorqual.sandbox.pool import Template

CONTAINER = Template.of("container")


class FakeSandbox:
    """As much of a sandbox as an edge needs; `made` has those that were not closed."""

    def __init__(self, made: set["FakeSandbox"]) -> None:
        self.id, self._made = "container-000000000000", made
        made.add(self)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self._made.discard(self)


@pytest.fixture
def made() -> set[FakeSandbox]:
    return set()


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: set[FakeSandbox]) -> Edge:
    """An edge whose sandboxes are fakes and take a moment to make."""
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "data"))

    async def make(**keywords: Any) -> FakeSandbox:
        await asyncio.sleep(0.02)
        return FakeSandbox(made)

    monkeypatch.setattr("rorqual.sandbox.edge.AsyncSandbox.create", make)
    return Edge(tmp_path / "edge", capacity=1)


def play(edge: Edge, made: set[FakeSandbox], scene: Coroutine[Any, Any, None]) -> None:
    """Run a scene; afterwards the edge holds nothing but what was leased."""

    async def whole() -> None:
        await scene
        assert edge._making == {} and len(made) == len(edge._leases)
        assert (await edge.stats()).awake == len(made)
        assert {path.stem for path in (edge._folder / LEASES).iterdir()} == set(edge._leases)
        await edge.close()
        assert made == set()

    asyncio.run(whole())


async def cancelled(work: Coroutine[Any, Any, Any], after_s: float) -> None:
    task = asyncio.ensure_future(work)
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_names_that_were_asked_for_are_not_kept(edge: Edge, made: set[FakeSandbox]) -> None:
    async def scene() -> None:
        for number in range(5):
            await edge.lease(f"used-{number}", CONTAINER)
            await edge.end(f"used-{number}")
        await edge.lease("held", CONTAINER)
        for number in range(5):
            with pytest.raises(CapacityRejected):
                await edge.lease(f"refused-{number}", CONTAINER, timeout=0.001)

    play(edge, made, scene())


def test_who_asks_for_one_that_is_made_waits_for_the_same(edge: Edge, made: set[FakeSandbox]) -> None:
    async def scene() -> None:
        await asyncio.gather(
            *(edge.lease("one", CONTAINER) for _ in range(3)), cancelled(edge.lease("one", CONTAINER), 0.01)
        )
        assert len(made) == 1
        await edge.lease("one", CONTAINER)
        assert len(made) == 1

    play(edge, made, scene())


def test_a_lease_that_nobody_waits_for_is_not_made(edge: Edge, made: set[FakeSandbox]) -> None:
    async def scene() -> None:
        await cancelled(edge.lease("one", CONTAINER), 0.01)
        await asyncio.sleep(0.05)
        assert made == set() and edge._leases == {}

    play(edge, made, scene())


@pytest.mark.parametrize("is_full", [False, True], ids=["while it is made", "while it waits for a place"])
def test_one_that_is_ended_on_its_way_is_given_up(edge: Edge, made: set[FakeSandbox], is_full: bool) -> None:
    async def scene() -> None:
        if is_full:
            await edge.lease("other", CONTAINER)
        asking = asyncio.ensure_future(edge.lease("one", CONTAINER))
        await asyncio.sleep(0.01)
        await edge.end("one")
        with pytest.raises(Gone, match="ended while it was made"):
            await asking
        assert "one" not in edge._leases
        if not is_full:
            await edge.lease("one", CONTAINER)

    play(edge, made, scene())


# --- the pool, with edges that are called as Ray's actors are


class Died(Exception):
    """Stands for ray.exceptions.RayActorError."""


class Actor:
    """Calls go to the edge in tasks of their own, which the caller's end does not end. `dies` calls fail first."""

    def __init__(self, edge: Edge, dies: int = 0) -> None:
        self.edge, self.dies, self.calls = edge, dies, list[str]()
        self.tasks: list[asyncio.Future[Any]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **keywords: Any) -> Any:
            self.calls.append(name)
            if name == "end" and self.dies:
                self.dies -= 1
                return asyncio.ensure_future(self._die())
            self.tasks.append(asyncio.ensure_future(getattr(self.edge, name)(*args, **keywords)))
            return asyncio.shield(self.tasks[-1])

        return SimpleNamespace(remote=remote)

    async def _die(self) -> None:
        raise Died


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[[Actor], cluster.ClusterPool]:
    errors = SimpleNamespace(RayActorError=Died, RayTaskError=type("RayTaskError", (Exception,), {}))
    monkeypatch.setattr(cluster, "_ray", lambda: SimpleNamespace(exceptions=errors, kill=lambda edge: None))

    def make(actor: Actor) -> cluster.ClusterPool:
        made = cluster.ClusterPool()
        made._nodes = [cluster._Node("n", actor)]
        return made

    return make


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.015])
@pytest.mark.parametrize("dies", [0, 2])
def test_a_cancelled_caller_of_the_cluster_leaves_no_sandbox(
    edge: Edge, made: set[FakeSandbox], pool: Callable[[Actor], cluster.ClusterPool], after_s: float, dies: int
) -> None:
    async def scene() -> None:
        actor = Actor(edge, dies)
        await edge.start()
        asking = asyncio.ensure_future(pool(actor).lease(CONTAINER))
        while "lease" not in actor.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(after_s)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while actor.calls.count("end") <= dies:
            await asyncio.sleep(0.01)
        await asyncio.wait(actor.tasks)
        assert actor.calls.count("end") == dies + 1

    play(edge, made, scene())


def test_a_loop_that_ends_with_its_caller_has_asked_the_edge(
    edge: Edge, pool: Callable[[Actor], cluster.ClusterPool]
) -> None:
    actor = Actor(edge)

    async def scene() -> None:
        await edge.start()
        async with asyncio.timeout(0.005):
            await pool(actor).lease(CONTAINER)

    with pytest.raises(TimeoutError):
        asyncio.run(scene())
    assert actor.calls[-1] == "end"
