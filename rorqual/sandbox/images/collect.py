"""Removes layers and full snapshots that nothing needs: no image or snapshot by name, no sandbox, no rollout that may
yet go back to one.

What is only just made is left alone for a while, so that a layer is not taken between its writing and its naming. All
errors on the way to knowing what is needed stop the collection: nothing is removed on a guess.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.folders import data_folder
from rorqual.journal import Close, EnvSnapshot, Reader, Request
from rorqual.sandbox import bases
from rorqual.sandbox.images.store import Reference, Store
from rorqual.sandbox.vm import snapshot

GRACE_S = 3600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Collected:
    """What was removed, or would be: names of snapshots, layers, half-written files, local mounts and copies.

    full: full snapshots of virtual machines by id, which are files beside the store. bytes: of these and the layers.
    """

    names: list[str]
    layers: list[str]
    bytes: int
    temporary: int
    local: list[str]
    full: list[str] = field(default_factory=list)


def collect(
    store: Store,
    *,
    home: Path | None = None,
    journals: Iterable[Path] = (),
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> Collected:
    """Remove what nothing needs any more, and say what.

    home: the data folder whose sandboxes (also those kept elsewhere, see `bases`), agents' runs and full snapshots are
    looked through; journals: folders of more rollout logs that may still be resumed, besides those of `Store.protect`;
    grace_s: younger layers and snapshots stay. Full snapshots are collected with the data folder's own store.
    Raises: SandboxError or JournalError when something that may name a layer cannot be read; nothing is removed then.
    """
    needs = _needs_of(store, home, journals, time.time() - grace_s)
    before, needed = needs.before, needs.layers
    in_use = used_layers(store, needs.living)
    if not dry_run:
        for one in needs.over:
            store.forget(one.name)
    layers = list(store.collectable(needed | in_use, before))
    size = sum(store.remove_if_old(key, before) if not dry_run else store.size_of(key) for key in layers)
    temporary = store.objects.sweep_temporary(dry_run)
    local = [] if dry_run else store.local.sweep(in_use, cached=needed)
    full, halves = _collect_full(store, home, needs, dry_run)
    names = [one.name for one in needs.over]
    return Collected(names, layers, size + sum(full.values()), temporary + halves, local, list(full))


def collect_full(home: Path | None = None, *, grace_s: float = GRACE_S) -> Collected:
    """Remove only full snapshots of the data folder `home` that nothing needs, with their names. Raises: as above."""
    store = Store((home or data_folder()) / "layers")
    needs = _needs_of(store, home, (), time.time() - grace_s)
    names = [one.name for one in needs.over if "full" in one.note]
    for name in names:
        store.forget(name)
    full, halves = _collect_full(store, home, needs, False)
    return Collected(names, [], sum(full.values()), halves, [], list(full))


def _collect_full(store: Store, home: Path | None, needs: _Needs, dry_run: bool) -> tuple[dict[str, int], int]:
    if store.folder.absolute() != ((home or data_folder()) / "layers").absolute():
        return {}, 0  # their names are in the data folder's store, so nothing can be said from another
    return snapshot.collect(needs.full, needs.before, home, dry_run=dry_run)


@dataclass(frozen=True)
class _Needs:
    """What must stay: layers by digest, full snapshots by id; and the names of snapshots that are over."""

    living: dict[str, Any]
    over: list[Reference]
    layers: set[str]
    full: set[str]
    before: float


def _needs_of(store: Store, home: Path | None, journals: Iterable[Path], before: float) -> _Needs:
    living = living_sandboxes(home)
    logs = [*journals, *store.protected(), *sorted((home or data_folder()).glob("agents/*/journal"))]
    pinned = set(words_of(living)) | set(open_snapshots(logs))
    references = store.references()
    over = [one for one in references if _is_over(one, living, pinned, before)]
    kept = [one for one in references if one not in over]
    layers = {digest for one in kept for digest in one.layers} | {word for word in pinned if _DIGEST.fullmatch(word)}
    full = {one.note["full"] for one in kept if "full" in one.note} | {word for word in pinned if snapshot.is_id(word)}
    return _Needs(living, over, layers, full, before)


def living_sandboxes(home: Path | None = None) -> dict[str, Any]:
    """The record of every sandbox whose folder is there, by id: dead ones count until they are swept away.

    Raises: SandboxError when one cannot be read, or a folder that has sandboxes cannot be looked into.
    """
    found = {}
    for path in sorted(path for base in bases.known(home, strict=True) for path in base.glob("sandboxes/*/spec.json")):
        try:
            found[path.parent.name] = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # it just went
        except (OSError, ValueError) as error:
            raise SandboxError(
                f"{path} cannot be read: {error}. Remove that sandbox (`rorqual sandbox prune`)."
            ) from error
    return found


def used_layers(store: Store, living: dict[str, Any]) -> set[str]:
    """Layers that sandboxes stand on: digests in their records, and what the names in them stand for now."""
    words = set(words_of(living))
    named = {digest for word in words if (one := store.reference(word)) for digest in one.layers}
    return named | {word for word in words if _DIGEST.fullmatch(word)}


def words_of(value: object) -> Iterator[str]:
    """Every text in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield str(key)
            yield from words_of(below)
    elif isinstance(value, list):
        for below in value:
            yield from words_of(below)


def open_snapshots(journals: Iterable[Path]) -> Iterator[str]:
    """Ids of the snapshots in rollout logs that a request which has not ended may go back to."""
    for folder in journals:
        taken: list[EnvSnapshot] = []
        requests, closed = set(), set()
        with closing(Reader(folder)) as reader:
            for _, record in reader.poll():
                if isinstance(record, EnvSnapshot):
                    taken.append(record)
                elif isinstance(record, Request):
                    requests.add(record.request)
                elif isinstance(record, Close):
                    closed.add(record.request)
        for record in taken:
            if (record.request not in closed) if record.request is not None else requests - closed:
                yield record.snapshot_id


def _is_over(one: Reference, living: dict[str, Any], pinned: set[str], before: float) -> bool:
    """Whether a snapshot has nobody left: its sandbox is gone and nothing names it or its layers."""
    return (
        one.kind == "snapshot"
        and not one.keep
        and one.owner not in living
        and one.created < before
        and one.name not in pinned
        and not pinned & set(one.layers[-1:])
    )
