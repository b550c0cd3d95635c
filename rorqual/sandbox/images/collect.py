"""Removes layers that nothing needs: no image or snapshot by name, no sandbox, no rollout that may yet go back to one.

What is only just made is left alone for a while, so that a layer is not taken between its writing and its naming. All
errors on the way to knowing what is needed stop the collection: nothing is removed on a guess.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError
from rorqual.folders import data_folder
from rorqual.journal import Close, EnvSnapshot, Reader, Request
from rorqual.sandbox.images.store import Reference, Store

GRACE_S = 3600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Collected:
    """What was removed, or would be: names of snapshots, layers, half-written files, local mounts and copies."""

    names: list[str]
    layers: list[str]
    bytes: int
    temporary: int
    local: list[str]


def collect(
    store: Store,
    *,
    home: Path | None = None,
    journals: Iterable[Path] = (),
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> Collected:
    """Remove what nothing needs any more, and say what.

    home: the data folder whose `sandboxes/` and agents' runs are looked through; journals: folders of more rollout
    logs that may still be resumed, besides those of `Store.protect`; grace_s: younger layers and snapshots stay.
    Raises: SandboxError or JournalError when something that may name a layer cannot be read; nothing is removed then.
    """
    living = living_sandboxes(home)
    logs = [*journals, *store.protected(), *sorted((home or data_folder()).glob("agents/*/journal"))]
    pinned = set(words_of(living)) | set(open_snapshots(logs))
    before = time.time() - grace_s
    names = [one for one in store.references() if _is_over(one, living, pinned, before)]
    over = {one.name for one in names}
    kept = [one for one in store.references() if one.name not in over]
    needed = {digest for one in kept for digest in one.layers} | {word for word in pinned if _DIGEST.fullmatch(word)}
    in_use = used_layers(store, living)
    if not dry_run:
        for one in names:
            store.forget(one.name)
    layers = list(store.collectable(needed | in_use, before))
    size = sum(store.remove_if_old(key, before) if not dry_run else store.size_of(key) for key in layers)
    temporary = store.objects.sweep_temporary(dry_run)
    local = [] if dry_run else store.local.sweep(in_use, cached=needed)
    return Collected([one.name for one in names], layers, size, temporary, local)


def living_sandboxes(home: Path | None = None) -> dict[str, Any]:
    """The record of every sandbox whose folder is there, by id: dead ones count until they are swept away."""
    found = {}
    base = home or data_folder()
    for path in sorted([*base.glob("sandboxes/*/spec.json"), *base.glob("edges/*/sandboxes/*/spec.json")]):
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
