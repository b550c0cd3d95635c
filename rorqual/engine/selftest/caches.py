"""Checks of the prefix cache: what it brings back, for every residue of the prompt's length, is what was computed.

A text is stored once; then every prompt that is a beginning of it is asked for: from memory, and from disk by a cache
that was opened after a restart, with each of the three policies for windows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from rorqual.engine.prefix_cache import Lease, PrefixCache, Windows
from rorqual.engine.selftest.report import Check
from rorqual.engine.selftest.residues import NEXT, Row, one_by_one
from rorqual.model import Transformer

Place = Literal["memory", "disk"]


def new_cache(model: Transformer, folder: str | None, windows: Windows) -> PrefixCache:
    """A cache of moderate size, on disk with a folder."""
    return PrefixCache(
        model, folder=folder, windows=windows, memory_bytes=64 << 20, running_tokens=4096, disk_bytes=256 << 20
    )  # fmt: skip


@torch.inference_mode()
def read(cache: PrefixCache, lease: Lease, prompt: Tensor, chunk: int) -> Tensor:
    """The final hidden state [D] behind a prompt, stored on the way as the engine stores it."""
    hidden = lease.hidden
    while (done := lease.state.lengths[0]) < len(prompt):
        stop = cache.next_stop(lease)
        end = min(len(prompt), done + chunk, len(prompt) if stop is None else stop)
        streams = cache.model.forward_streams(prompt[None, done:end], state=lease.state)
        hidden = cache.model.final_hidden(streams[:, -1:])[0, -1]
        cache.progress(lease)
    assert hidden is not None
    cache.end_of_prompt(lease, hidden)
    return hidden


def hits(row: Row, check: Check, place: Place, windows: Windows) -> None:
    """Every beginning of a stored text, and the logits behind it and behind the next tokens."""
    model, cached = row.model, 0
    with tempfile.TemporaryDirectory() as folder:
        cache = new_cache(model, folder if place == "disk" else None, windows)
        lease = cache.begin(row.tolist())
        read(cache, lease, row.tokens, 100)
        cache.end_of_output(lease)
        for n in row.lengths:
            if place == "disk" and n % 16 == 1:  # a restart
                cache.close()
                cache = new_cache(model, folder, windows)
            lease = cache.begin(row.tolist(n))
            cached += lease.explanation.cached_tokens
            hidden = read(cache, lease, row.tokens[:n], 64)
            with torch.inference_mode():
                logits = model.logits(hidden)
            where = f"a prompt of {n} tokens, {lease.num_cached} of them from {place}"
            check.same(logits, row.logits[n - 1], where)
            found = one_by_one(model, row.tokens[n : n + NEXT], lease.state)
            check.same(found, row.after(n), f"decoding after {where}")
        cache.close()
    check.note = f"{cached} of {sum(row.lengths)} prompt tokens came from the store"


def checks() -> Iterator[tuple[str, str, Callable[[Row, Check], None]]]:
    """Name, description and function of every check of the cache."""
    places: tuple[Place, ...] = ("memory", "disk")
    policies: tuple[Windows, ...] = ("full", "periodic", "zero")
    for place in places:
        for windows in policies:
            about = f"after hits of the prefix cache ({'on disk, restarted' if place == 'disk' else 'in memory'})"
            yield f"cache, {place}, {windows}", about, _bound(place, windows)


def _bound(place: Place, windows: Windows) -> Callable[[Row, Check], None]:
    return lambda row, check: hits(row, check, place, windows)
