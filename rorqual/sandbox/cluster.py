"""The pool across machines: one edge per Ray node, the same calls as `Pool`.

Ray places edges and restarts them; correctness does not rest on it. An edge that was killed comes back with an empty
memory, takes its leases over from its folder, and a command that was under way is asked for again under the same key:
it is joined, or answered from the record, and never run twice. Ray's own retries are off for that reason.

Source: V4 report, section 5.2.5 (one edge a machine, placement by sampling); extra `cluster`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rorqual import log
from rorqual.errors import MissingExtraError, RorqualError
from rorqual.folders import data_folder
from rorqual.sandbox.edge import Edge
from rorqual.sandbox.errors import CapacityRejected, Gone, TransportError
from rorqual.sandbox.pool import PoolStats, Template
from rorqual.sandbox.spec import CommandResult

_logger = log.get(__name__)

PLACEMENT_TRIES = 3
"""Edges that may refuse a lease before the caller is refused."""
RESTART_S = 60.0
"""How long a call waits for an edge that was killed to come back."""


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "a pool across machines needs Ray, which is not installed. Run: pip install 'rorqual[cluster]'"
        ) from error
    return ray


@dataclass(frozen=True)
class _Node:
    """An edge and the Ray node it is tied to."""

    id: str
    edge: Any


class ClusterPool:
    """Sandboxes on all nodes of a Ray cluster.

    capacity, max_waiting: of each node. warm: kept ready on each node. folder: where each edge keeps its state, a path
    on the node's own disk. address: of a running cluster ("auto" finds it); None uses the one Ray is connected to, or
    starts one on this machine. Raises: MissingExtraError without the extra `cluster`.
    """

    def __init__(
        self,
        *,
        capacity: int = 8,
        warm: Mapping[Template, int] | None = None,
        max_waiting: int = 256,
        folder: str | Path | None = None,
        address: str | None = None,
        seed: int | None = None,
    ) -> None:
        self._ray = _ray()
        self._capacity, self._warm, self._max_waiting = capacity, dict(warm or {}), max_waiting
        self._folder = Path(folder) if folder is not None else data_folder() / "edges"
        self._address = address
        self._random = random.Random(seed)
        self._nodes: list[_Node] = []
        self._in_flight: Counter[str] = Counter()
        self._handing_back: set[asyncio.Task[None]] = set()

    async def start(self) -> ClusterPool:
        """Start an edge on every node that is alive, or find the one that is there."""
        ray = self._ray
        if not ray.is_initialized():
            await asyncio.to_thread(ray.init, address=self._address, log_to_driver=False)
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0, max_concurrency=1000)(Edge)
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            id = node["NodeID"]
            edge = actor.options(
                name=f"rorqual-edge-{id}",
                namespace="rorqual",
                get_if_exists=True,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=id, soft=False),
            ).remote(self._folder / id, capacity=self._capacity, warm=self._warm, max_waiting=self._max_waiting)
            self._nodes.append(_Node(id, edge))
        await asyncio.gather(*(node.edge.start.remote() for node in self._nodes))
        return self

    async def lease(
        self,
        template: Template | str = "container",
        *,
        priority: int = 0,
        owner: str = "",
        timeout: float | None = None,
    ) -> ClusterLease:
        """A sandbox on the less loaded of two nodes drawn at random; others are tried when it refuses.

        A caller that is cancelled gets none: what was asked for is handed back.
        Raises: CapacityRejected when `PLACEMENT_TRIES` nodes refused.
        """
        template = template if isinstance(template, Template) else Template.of(template)
        id, tried = uuid.uuid4().hex, set[str]()
        refusal = CapacityRejected(f"none of the cluster's {len(self._nodes)} edges answers; try again in 1 s.", 1.0)
        for _ in range(PLACEMENT_TRIES):
            node = await self._choose(tried)
            if node is None:
                break
            tried.add(node.id)
            self._in_flight[node.id] += 1
            try:
                await self._call(node, "lease", id, template, priority=priority, owner=owner, timeout=timeout)
                return ClusterLease(self, node, id)
            except CapacityRejected as error:
                refusal = error
            except BaseException:
                self._hand_back(node, id)
                raise
            finally:
                self._in_flight[node.id] -= 1
        raise refusal

    async def stats(self) -> dict[str, PoolStats]:
        """The pool's figures by node."""
        figures = await asyncio.gather(*(self._call(node, "stats") for node in self._nodes))
        return {node.id: stats for node, stats in zip(self._nodes, figures, strict=True)}

    async def close(self) -> None:
        """End all leases and all edges; Ray itself is left as it was."""
        await asyncio.gather(*self._handing_back, return_exceptions=True)
        await asyncio.gather(*(self._call(node, "close") for node in self._nodes))
        for node in self._nodes:
            self._ray.kill(node.edge)
        self._nodes.clear()

    async def __aenter__(self) -> ClusterPool:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _hand_back(self, node: _Node, id: str) -> None:
        """End a lease that nobody waits for any more, whether it is made already or not.

        The edge is asked before this returns, so that a caller whose event loop ends with it leaves nothing either.
        """
        try:
            asked = node.edge.end.remote(id)
        except Exception as error:  # Ray is going down, and the edge's sandboxes have their times
            _logger.warning("a lease could not be handed back to node %s: %s", node.id, error)
            return

        async def see_to_it() -> None:
            try:
                await asked
            except self._ray.exceptions.RayActorError:  # the edge was killed: its lease is on record
                await self._call(node, "end", id)

        task = asyncio.get_running_loop().create_task(see_to_it())
        self._handing_back.add(task)
        task.add_done_callback(self._handed_back)

    def _handed_back(self, task: asyncio.Task[None]) -> None:
        self._handing_back.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.warning("a lease could not be handed back: %s", error)

    async def _choose(self, tried: set[str]) -> _Node | None:
        """The less loaded of two, by what each says and what this pool has just sent there; None when all were tried.

        One that does not answer counts as tried: it may be dying or coming back.
        """
        while free := [node for node in self._nodes if node.id not in tried]:
            pair = self._random.sample(free, min(2, len(free)))
            asked = (self._call(node, "stats", retry=False) for node in pair)
            loads: list[tuple[int, str, _Node]] = []
            for node, stats in zip(pair, await asyncio.gather(*asked, return_exceptions=True), strict=True):
                if isinstance(stats, PoolStats):
                    load = stats.awake + stats.put_aside + stats.waiting + self._in_flight[node.id]
                    loads.append((load, node.id, node))
                elif isinstance(stats, TransportError):
                    tried.add(node.id)
                else:
                    raise stats
            if loads:
                return min(loads)[2]
        return None

    async def _call(self, node: _Node, method: str, *args: Any, retry: bool = True, **keywords: Any) -> Any:
        """Ask an edge; one that was killed is waited for and asked again, if asking twice does no harm.

        Raises: what the edge raised; TransportError when it is gone for `RESTART_S`, or at once if not `retry`.
        """
        errors = self._ray.exceptions
        give_up = time.monotonic() + RESTART_S
        wait_s = 0.1
        while True:
            try:
                return await getattr(node.edge, method).remote(*args, **keywords)
            except errors.RayTaskError as error:
                cause = error.cause if hasattr(error, "cause") else error
                raise cause if isinstance(cause, RorqualError) else error from None
            except errors.RayActorError as error:
                if not retry or time.monotonic() > give_up:
                    raise TransportError(f"the edge on node {node.id} died in {method}: {error}", retry) from error
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, 2.0)


class ClusterLease:
    """One sandbox somewhere in the cluster. `run` is exact: an edge killed in the middle neither loses nor repeats."""

    def __init__(self, pool: ClusterPool, node: _Node, id: str) -> None:
        self.id = id
        self.node_id = node.id
        self._pool, self._node = pool, node
        self._calls = itertools.count()

    async def run(self, command: str | list[str], *, call: str | None = None, **keywords: Any) -> CommandResult:
        """`commands.run`; `call` names it for a retry by the caller, else it gets a name of its own."""
        call = call or f"{self.id}:{next(self._calls)}"
        return await self._do(True, "commands", "run", command, call=call, **keywords)

    async def read(self, path: str, **keywords: Any) -> Any:
        """`files.read`."""
        return await self._do(True, "files", "read", path, **keywords)

    async def write(self, path: str, data: str | bytes, **keywords: Any) -> None:
        """`files.write`; an append is not sent twice, so it may fail with TransportError when the edge dies."""
        await self._do(not keywords.get("append", False), "files", "write", path, data, **keywords)

    async def file(self, name: str, *args: Any, **keywords: Any) -> Any:
        """Another call of `files` (list, stat, exists, mkdir, move, remove)."""
        return await self._do(name in ("list", "stat", "exists"), "files", name, *args, **keywords)

    async def snapshot(self) -> str:
        """A disk snapshot; a lease of any node that sees the same layer store can start from it."""
        return await self._pool._call(self._node, "snapshot", self.id)

    async def close(self) -> None:
        """Destroy the sandbox and free its place."""
        await self._pool._call(self._node, "end", self.id)

    async def __aenter__(self) -> ClusterLease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, retry: bool, room: str, name: str, *args: Any, **keywords: Any) -> Any:
        try:
            return await self._pool._call(self._node, "do", self.id, room, name, *args, retry=retry, **keywords)
        except Gone as error:
            raise Gone(f"{error} (node {self.node_id})", error.reason) from None
