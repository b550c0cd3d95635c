"""The pool over two Ray nodes on this machine: placement, an edge killed in the middle of a command, a clean end."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from host_traces import settled, traces_of
from sandboxes import need

from rorqual.sandbox import bases
from rorqual.sandbox.async_sandbox import AsyncSandbox
from rorqual.sandbox.cluster import ClusterPool
from rorqual.sandbox.errors import CapacityRejected, FileError, Gone, Unsupported
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.pool import Template

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'rorqual[cluster]'")
pytestmark = pytest.mark.slow

SMALL = Template.of("container", driver="bwrap", memory_mb=64, disk_mb=16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray cluster of two nodes whose processes keep their state below one folder; all of it is ended afterwards."""
    need(("container", "bwrap"))
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RORQUAL_HOME", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        small = {"num_cpus": 1, "object_store_memory": 80 << 20}
        own = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
        (own / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", str(own))
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        started = list(cluster.list_all_nodes())
        try:
            started.append(cluster.add_node(**small))
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            pids = [one.process.pid for node in started for kind in node.all_processes.values() for one in kind]
            yield folder
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(own, ignore_errors=True)
    assert settled(lambda: [str(pid) for pid in pids if Path(f"/proc/{pid}").exists()], 20) == []


def play(home: Path, scene: Callable[[ClusterPool], Awaitable[None]], **arguments: object) -> None:
    """Run a scene with a pool, and see that nothing of its sandboxes is left on either node."""

    async def whole() -> None:
        async with ClusterPool(folder=home / "edges", seed=1, **arguments) as pool:  # type: ignore[arg-type]
            assert len(pool._nodes) == 2
            await scene(pool)

    try:
        asyncio.run(whole())
        assert Store(home / "layers").references() == []
    finally:
        Store(home / "layers").local.sweep(set())
    assert settled(lambda: [one for edge in [home, *(home / "edges").iterdir()] for one in traces_of(edge)]) == []
    assert list((home / "edges").iterdir()) == []


async def kill_edge(pool: ClusterPool, id: str) -> int:
    """Kill -9 the process that runs the edge of a node; returns its number."""
    node = next(node for node in pool._nodes if node.id == id)
    pid = await node.edge.process.remote()
    os.kill(pid, signal.SIGKILL)
    return int(pid)


def test_leases_spread_and_come_back_with_results_and_errors(home: Path) -> None:
    async def scene(pool: ClusterPool) -> None:
        leases = [await pool.lease(SMALL) for _ in range(4)]
        assert sorted(stats.awake for stats in (await pool.stats()).values()) == [2, 2]
        outcomes = await asyncio.gather(*(lease.run(f"echo {i}; exit {i}") for i, lease in enumerate(leases)))
        assert [(one.stdout, one.exit_code) for one in outcomes] == [(f"{i}\n", i) for i in range(4)]
        await leases[0].write("a/b", b"\0\xff")
        assert await leases[0].read("a/b", format="bytes") == b"\0\xff"
        with pytest.raises(FileError):
            await leases[1].read("a/b")
        with pytest.raises(Unsupported, match="another machine"):
            await leases[0].file("upload", "/etc/passwd", "x")
        with pytest.raises(CapacityRejected) as caught:
            await pool.lease(SMALL, timeout=0.1)
        assert caught.value.retry_after_s > 0
        await leases[0].close()
        await leases[0].close()
        with pytest.raises(Gone):
            await leases[0].run(["true"])
        assert (await (await pool.lease(SMALL, timeout=60)).run("echo room")).stdout == "room\n"

    play(home, scene, capacity=2, warm={SMALL: 1})


def test_an_edge_killed_in_the_middle_of_a_command_loses_and_repeats_nothing(home: Path) -> None:
    """What must not happen twice happens once, whether the edge dies before the end, or after it."""

    async def scene(pool: ClusterPool) -> None:
        lease, other = await pool.lease(SMALL), await pool.lease(SMALL)
        assert other.node_id != lease.node_id
        await lease.write("effects", "before\n")
        running = asyncio.create_task(lease.run("echo once >> effects; touch began; sleep 1.5; cat effects; exit 7"))
        beside = asyncio.create_task(other.run("sleep 1; echo undisturbed"))
        while not await lease.file("exists", "began"):
            await asyncio.sleep(0.02)
        first = await kill_edge(pool, lease.node_id)
        result = await asyncio.wait_for(running, 50)
        assert (result.stdout, result.exit_code) == ("before\nonce\n", 7)
        assert (await beside).stdout == "undisturbed\n"

        counted = await lease.run("echo again >> effects; wc -l < effects", call="my own name")
        second = await kill_edge(pool, lease.node_id)
        assert second != first
        replayed = await lease.run("echo again >> effects; wc -l < effects", call="my own name")
        assert (replayed.stdout, replayed.replayed, counted.replayed) == ("3\n", True, False)
        assert await lease.read("effects") == "before\nonce\nagain\n"
        stats = (await pool.stats())[lease.node_id]
        assert (stats.awake, stats.warm) == (1, 1), "the killed edge's leases and warm sandboxes are counted again"

    play(home, scene, capacity=2, warm={SMALL: 1})


def test_a_cancelled_caller_leaves_no_sandbox_and_those_of_edges_are_seen(home: Path) -> None:
    async def scene(pool: ClusterPool) -> None:
        for wait_s in (0.0, 0.02, 0.1):
            asking = asyncio.create_task(pool.lease(SMALL))
            await asyncio.sleep(wait_s)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            if not asking.cancelled():
                await asking.result().close()
        end = asyncio.get_running_loop().time() + 30
        while pool._handing_back or any(stats.awake for stats in (await pool.stats()).values()):
            assert asyncio.get_running_loop().time() < end, "a lease that nobody waits for was kept"
            await asyncio.sleep(0.05)
        lease = await pool.lease(SMALL)
        listed = await AsyncSandbox.list()
        assert len(listed) == 1 and listed[0].state == "ready"
        assert set(bases.known()) >= {home / "edges" / node.id for node in pool._nodes}
        await lease.close()

    play(home, scene, capacity=2)
    assert bases.known() == [home]


def test_leases_put_aside_survive_their_edge(home: Path) -> None:
    async def scene(pool: ClusterPool) -> None:
        low = [await pool.lease(SMALL) for _ in range(2)]
        for lease in low:
            await lease.write("note", lease.id)
        high = [await pool.lease(SMALL, priority=3) for _ in range(2)]
        assert [(one.awake, one.put_aside) for one in (await pool.stats()).values()] == [(1, 1), (1, 1)]
        await kill_edge(pool, low[0].node_id)
        for lease in high:
            assert (await lease.run("echo on")).stdout == "on\n"
            await lease.close()
        for lease in low:
            assert await lease.read("note") == lease.id

    play(home, scene, capacity=1)
