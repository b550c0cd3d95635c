"""Snapshots of sandboxes: layers in the store with a name, from which new ones start and to which old ones go back."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rorqual.sandbox.errors import SnapshotFailed, Unsupported
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.spec import SandboxSpec, Snapshot
from rorqual.sandbox.wire import Type

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

STILL_S = 3600.0
"""How long a sandbox may stand still for a snapshot, unless its paused_ttl is longer."""


def names_of(spec: SandboxSpec) -> list[str]:
    """Names of what a sandbox's root is stacked from, from the bottom up. A snapshot holds its whole stack's layers."""
    if spec.snapshot is not None:
        return [spec.snapshot]
    return [*([spec.image] if spec.image is not None else []), *spec.layers]


async def take(sandbox: AsyncSandbox, kind: Literal["disk", "full"], name: str | None) -> Snapshot:
    """See AsyncSandbox.snapshot; the sandbox stands still meanwhile.

    With a name it stays until it is removed by that name; without one it may be collected once its sandbox is gone and
    no open rollout log names it (docs/images.md).
    """
    capabilities = sandbox._driver.capabilities()
    if not (capabilities.snapshot_disk if kind == "disk" else capabilities.snapshot_memory):
        raise Unsupported(
            f"the {sandbox._driver.name} driver of {sandbox.kind} sandboxes takes no {kind} snapshots here; "
            "`rorqual sandbox doctor` lists drivers that can.",
            "snapshot_disk" if kind == "disk" else "snapshot_memory",
        )
    chosen = name or f"{sandbox.id}-{secrets.token_hex(4)}"
    made: list[Snapshot] = []

    async def record(digest: str) -> None:
        size = (await asyncio.to_thread(Store().layer, digest)).size if kind == "disk" else 0
        sequence = sandbox._history().last
        await asyncio.to_thread(_record, sandbox, chosen, digest, kind, sequence, name is not None)
        made.append(Snapshot(chosen, kind, digest, size, sequence, name))

    was_paused, lifetimes = sandbox._record.state == "paused", sandbox._record.spec.lifetimes
    sandbox._clock.stop()
    try:
        if not was_paused:  # nothing counts its idle time while it stands still, and this process may be killed
            sandbox._deadlines(max(lifetimes.paused_ttl, STILL_S))
        if kind == "full":
            await sandbox._driver.snapshot_full(sandbox._link.running, sandbox._home.path, record)
        else:
            await record(await _files(sandbox))
    finally:
        if not was_paused:
            sandbox._clock.go_on()
            sandbox._deadlines(None)
    taken = made[0]
    about = {"id": chosen, "covers": taken.history_seq, "of": kind, "digest": taken.digest}
    await sandbox._history().write("snapshot", about)
    return taken


async def _files(sandbox: AsyncSandbox) -> str:
    """What was written in it, as a layer; of a paused one, as it stands."""
    link, was_paused = sandbox._link, sandbox._record.state == "paused"
    try:
        if not was_paused:
            await link.request(Type.PAUSE)
            await link.request(Type.SYNC)
        return await sandbox._driver.snapshot_disk(link.running, sandbox._home.path)
    finally:
        if not was_paused:
            await link.request(Type.RESUME)


def _record(sandbox: AsyncSandbox, name: str, digest: str, kind: str, sequence: int, keep: bool) -> None:
    store = Store()
    below = store.resolve(names_of(sandbox._record.spec))
    note = {
        "history_seq": str(sequence),
        "sandbox": sandbox.id,
        "kind": kind,
        "base": "host" if _on_host(sandbox) else "",
    }
    if kind == "full":  # its files lie with the driver; the name only leads there
        note["full"] = digest
    layers = store.collapsed([*below, digest]) if kind == "disk" else below
    try:
        store.name(name, layers, kind="snapshot", owner=sandbox.id, keep=keep, note=note)
    except OSError as error:
        raise SnapshotFailed(f"snapshot {name} could not be recorded: {error}. Earlier ones still stand.") from error


def _on_host(sandbox: AsyncSandbox) -> bool:
    return on_host_root(sandbox._record.spec)


def on_host_root(spec: SandboxSpec) -> bool:
    """Whether the root stands on this machine's /usr: no image was named, nor was one below its snapshot."""
    if spec.snapshot is not None:
        found = Store().reference(spec.snapshot)
        return found is not None and found.note.get("base") == "host"
    return spec.image is None


async def fork(sandbox: AsyncSandbox, taken: Snapshot, n: int) -> list[AsyncSandbox]:
    """See AsyncSandbox.fork; if one cannot be made, those already made are ended."""
    from rorqual.sandbox.async_sandbox import AsyncSandbox

    spec = sandbox._record.spec
    made: list[AsyncSandbox] = []
    try:
        for _ in range(n):
            made.append(
                await AsyncSandbox.create(
                    spec.kind,
                    snapshot=taken.id,
                    cpu=spec.limits.cpu,
                    memory_mb=spec.limits.memory_mb,
                    disk_mb=spec.limits.disk_mb,
                    pids=spec.limits.pids,
                    network=spec.network,
                    env=spec.env,
                    user=spec.user,
                    cwd=spec.cwd,
                    idle_ttl=spec.lifetimes.idle_ttl,
                    max_lifetime=spec.lifetimes.max_lifetime,
                    paused_ttl=spec.lifetimes.paused_ttl,
                    driver=sandbox._record.driver,
                    metadata={**spec.metadata, "forked_from": sandbox.id},
                    home=sandbox._home.path.parent.parent,
                )
            )
    except BaseException:
        for one in made:
            await one.close()
        raise
    await sandbox._history().write("fork", {"snapshot": taken.id, "children": [one.id for one in made]})
    return made


async def roll_back(sandbox: AsyncSandbox, snapshot: str | Snapshot) -> None:
    """See AsyncSandbox.rollback. What it goes back to is checked before what runs is ended."""
    name = snapshot.id if isinstance(snapshot, Snapshot) else snapshot
    reference = await asyncio.to_thread(Store().reference, name)
    if reference is None or reference.note.get("sandbox") != sandbox.id:
        raise SnapshotFailed(f"{name!r} is no snapshot of sandbox {sandbox.id}; history() lists its snapshots.")
    spec = replace(sandbox._record.spec, snapshot=name)
    await sandbox._driver.check(spec, sandbox._home.path)
    left = await sandbox._driver.stop(sandbox._link.running, sandbox._home.path)
    if left:
        raise SnapshotFailed(f"sandbox {sandbox.id} could not be stopped for the rollback; left: {', '.join(left)}.")
    await sandbox._link.close()
    for leftover in ("exit.json", "oom", "keeper"):
        (sandbox._home.path / leftover).unlink(missing_ok=True)
    record = sandbox._record
    record.spec = spec
    record.incarnation += 1
    record.running = None
    sandbox._clock.go_on()
    sandbox._oom_seen = 0
    sandbox._set_state("preparing")
    sandbox._home.set_deadlines({"lifetime": record.created + record.spec.lifetimes.max_lifetime - time.time()})
    await sandbox._start(120.0)
    await sandbox._history().rolled_back(name, int(reference.note["history_seq"]))
