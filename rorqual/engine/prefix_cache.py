"""The prefix cache: a prompt's sequence starts from what earlier requests computed, in memory or on disk.

Pages of entries are shared as they are; the window at the place where a match ends comes from a checkpoint there or
from running tokens again, whichever is less work, and both are exact: later logits have the bits they have without a
cache. Three policies say where checkpoints are kept besides at the ends of prompts and outputs: `full` at every page,
`periodic` every so many tokens, `zero` nowhere. Source: V4 report, on-disk storage of the cache; V4.1 report section
3.2.1 for checkpoints at the end of prompt and output.

Used by one thread, the engine's. `begin` gives a sequence its state; `progress`, `end_of_prompt` and `end_of_output`
store what it has become.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.store.disk import DiskStore
from rorqual.engine.store.explain import Explanation, Reason
from rorqual.engine.store.fingerprint import store_fingerprint
from rorqual.engine.store.lookup import Found, Lookup
from rorqual.engine.store.tree import Node, Point, PrefixTree, Tokens
from rorqual.engine.store.turns import TurnStore, TurnTokenizer
from rorqual.errors import ConfigError
from rorqual.model import State, Transformer
from rorqual.model.pages import PagePool
from rorqual.model.window_checkpoint import capture, install, install_without, replay_starts

Windows = Literal["full", "periodic", "zero"]

PREPARED_BYTES = 256 << 20
"""Memory that is made ready at the start for what lies on disk; bringing it only when a prompt waits for its pages
takes longer than reading them.
"""

BRANCH_TOKENS = 64
"""Where a prompt leaves stored text so far behind the last checkpoint, another one is taken for those that follow."""


@dataclass(eq=False)
class Lease:
    """A running sequence: its state, how much of its prompt it has seen, and where it stands in the tree.

    hidden: the final hidden state [D] of the last prompt token when the very prompt was there; then nothing needs to be
    computed before the first token is sampled.
    """

    state: State
    num_cached: int
    explanation: Explanation
    hidden: Tensor | None = None
    node: Node | None = None
    root: Node | None = None
    """Where texts of its scope begin."""
    branch: int = 0
    """Where this prompt leaves stored text without a checkpoint there: one is taken, for the next that does so."""


@dataclass
class CacheStats:
    """Counts since the cache was made."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    replayed_tokens: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)

    def add(self, explanation: Explanation) -> None:
        """Count a request."""
        self.requests += 1
        self.hits += explanation.cached_tokens > 0
        self.prompt_tokens += explanation.prompt_tokens
        self.cached_tokens += explanation.cached_tokens
        self.disk_tokens += explanation.disk_tokens
        self.replayed_tokens += explanation.replayed_tokens
        self.reasons[explanation.reason] += 1


class PrefixCache:
    """Shares prefixes between the sequences of `model`.

    memory_bytes: most that pages and checkpoints kept for later requests may take.
    running_tokens: tokens that running sequences may hold besides (the model's context length unless given).
    folder, disk_bytes, write_bytes_per_hour: the disk cache, none without a folder.
    windows, period: policy for window checkpoints; `periodic` keeps one every `period` tokens, by default as many as
    would have to be run again without any. ends: also at the end of each prompt and output, and where a prompt leaves
    another (a document with another question), so that the next one finds a checkpoint there.
    rewind: how far states can be cut back exactly (see `Transformer.new_state`).
    tokenizer: needed to remember sampled turns, so that conversations which clients send back as text hit.

    Raises ConfigError for settings that cannot work, OSError when the folder cannot be used.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        memory_bytes: int = 1 << 30,
        running_tokens: int | None = None,
        folder: str | Path | None = None,
        disk_bytes: int = 8 << 30,
        write_bytes_per_hour: int | None = None,
        windows: Windows = "zero",
        period: int | None = None,
        ends: bool = True,
        rewind: int = 128,
        page_tokens: int | None = None,
        tokenizer: TurnTokenizer | None = None,
    ) -> None:
        _check_sizes(
            memory_bytes=(memory_bytes, 0), running_tokens=(running_tokens, 1), disk_bytes=(disk_bytes, 1),
            write_bytes_per_hour=(write_bytes_per_hour, 1), rewind=(rewind, 0),
        )  # fmt: skip
        cfg = model.cfg
        running = cfg.max_position_embeddings if running_tokens is None else running_tokens
        probe = PagePool(cfg, model.reference, 1, page_tokens)
        size = probe.page_tokens
        kept = memory_bytes // max(4 * size, probe.page_bytes)
        self.pool = PagePool(cfg, model.reference, running + size * (kept + 1), page_tokens)
        self.model, self.ends, self.rewind = model, ends, rewind
        far = 64 * size * (1 + cfg.num_hidden_layers * cfg.sliding_window)
        self.replay_tokens = far - replay_starts(cfg, far)[0]
        """Tokens to run again where no checkpoint stands: window times layers."""
        self.period = self._checked_period(windows, period, size)
        self.fingerprint = store_fingerprint(model, size)
        self.tree = PrefixTree(self.pool, memory_bytes, self.fingerprint)
        self.pool.make_room = self.tree.free_pages
        self.disk = (
            None if folder is None else DiskStore(folder, self.fingerprint, disk_bytes, write_bytes_per_hour)
        )  # fmt: skip
        if self.disk is not None:
            self.pool.prepare(min(self.disk.nbytes, memory_bytes, PREPARED_BYTES))
        path = None if self.disk is None or tokenizer is None else self.disk.folder / "turns"
        self.turns = None if tokenizer is None else TurnStore(tokenizer, path)
        self.stats = CacheStats()

    def _checked_period(self, windows: Windows, period: int | None, size: int) -> int | None:
        if windows not in ("full", "periodic", "zero"):
            raise ConfigError(
                f"windows is {windows!r}; use 'full' (a checkpoint every page), 'periodic' (every `period` tokens) or "
                "'zero' (run tokens again)."
            )
        if windows != "periodic":
            if period is not None:
                raise ConfigError(f"period is {period}, but windows is {windows!r}, which has none. Leave it out.")
            return size if windows == "full" else None
        period = -(-self.replay_tokens // size) * size if period is None else period
        if period < size or period % size:
            raise ConfigError(f"period is {period}; it must be a multiple of the page's {size} tokens.")
        return period

    # Beginning

    def begin(self, tokens: Sequence[int] | Tokens, ask: bool = True, scope: str = "") -> Lease:
        """A state for a prompt, as far along as the store can bring it; the caller feeds tokens from `num_cached` on.

        ask: False leaves the store alone, for a request that needs every position's logits. After a hit the state may
        run tokens again whose entries are there (`State.is_replaying`): nothing may be sampled from their streams.
        scope: what is stored for one is never used for another.
        """
        began = time.perf_counter()
        ids = np.asarray(tokens, dtype=np.int32)
        state, root = self.model.new_state(1, rewind=self.rewind, pool=self.pool), self.tree.root_of(scope)
        if not ask or not len(ids):
            explanation = Explanation(len(ids), computed_tokens=len(ids), reason="not asked")
            return Lease(state, 0, explanation, None, root, root)
        if self.disk is not None:
            self.disk.refresh()
        lookup = Lookup(self.tree, self.disk, ids, self.replay_tokens, root)
        found = lookup.run()
        point = found.point if isinstance(found.point, Point) else None
        node = found.hit.nodes[found.num_pages - 1] if found.num_pages else root
        if found.num_pages or point is not None:
            found.table.truncate(found.num_pages * self.pool.page_tokens)
            self._install(state, ids, found, point)
            self.tree.touch(node, point)
        explanation = self._explain(lookup, found, state.lengths[0], time.perf_counter() - began)
        self.tree.shrink()
        self.stats.add(explanation)
        hidden = point.hidden if point is not None and found.is_exact else None
        if hidden is not None:  # as it was computed: in another precision the output head's sums have other bits
            hidden = hidden.to(self.model.streams_dtype)
        leaves_at = max(found.num_pages * self.pool.page_tokens, explanation.differs_at or 0)
        branch = leaves_at if self.ends and leaves_at - found.restored_at >= BRANCH_TOKENS else 0
        return Lease(state, state.lengths[0], explanation, hidden, node, root, branch)

    def _install(self, state: State, ids: Tokens, found: Found, point: Point | None) -> None:
        tokens, frozen = torch.from_numpy(ids), found.num_pages * self.pool.page_tokens
        if point is None:
            install_without(state, tokens, frozen, found.table)
        else:
            install(state, tokens, point.position, point.content, found.table, frozen)

    def _explain(self, lookup: Lookup, found: Found, cached: int, seconds: float) -> Explanation:
        size, total = self.pool.page_tokens, len(lookup.ids)
        stored = max(found.num_pages * size, found.restored_at)
        tail = max(0, found.restored_at - found.num_pages * size)  # comes with the checkpoint
        on_disk = min(lookup.disk_pages * size, stored) + (tail if found.point is lookup.from_disk else 0)
        why = lookup.departure(found)
        return Explanation(
            prompt_tokens=total,
            memory_tokens=stored - on_disk,
            disk_tokens=on_disk,
            computed_tokens=total - stored,
            replayed_tokens=stored - cached,
            restored_at=found.restored_at,
            checkpoint="none" if found.point is None else "disk" if found.point is lookup.from_disk else "memory",
            reason=why.reason,
            differs_at=why.position,
            stored_token=why.stored,
            asked_token=why.asked,
            bytes_read=lookup.bytes_read,
            seconds=seconds,
        )

    # Storing

    def next_stop(self, lease: Lease) -> int | None:
        """Where the sequence's next chunk must end at the latest, so that a checkpoint can be taken there."""
        position = lease.state.lengths[0]
        stops = [] if self.period is None else [(position // self.period + 1) * self.period]
        return min([*stops, *([lease.branch] if lease.branch > position else [])], default=None)

    def progress(self, lease: Lease) -> None:
        """Store the full pages of a sequence, and a checkpoint where the policy wants one.

        Call it after a step and before the next; the state must hold no drafts that may be taken back.
        """
        state, size = lease.state, self.pool.page_tokens
        if state.interrupted or not state.is_exact or state.table is None:
            return
        node, length = self._place(lease), state.lengths[0]
        full = length // size
        if node.depth < full:
            ids, pages, depth = state.tokens[0].numpy(), state.table.pages, node.depth
            blocks = [ids[size * at : size * (at + 1)].tobytes() for at in range(depth, full)]
            nodes = self.tree.insert(node, blocks, pages[depth:full])
            if self.disk is not None:
                for parent, one in zip([node, *nodes], nodes, strict=False):
                    if not self.disk.has_page(one.key):
                        content = self.pool.read([one.page])[0]
                        self.disk.put_page(parent.key, one.key, one.block, (one.depth - 1) * size, content)
            node = nodes[-1]
            self.tree.touch(node)
        lease.node = node
        if length and (length == lease.branch or (self.period is not None and length % self.period == 0)):
            self._checkpoint(lease, None, is_last=False)
        self.tree.shrink()

    def end_of_prompt(self, lease: Lease, hidden: Tensor | None) -> None:
        """Store a sequence that has just read its prompt; hidden [D] is the final hidden state of its last token.

        A conversation's next prompt often leaves this one at its very last token (`<think>`, where it then says that
        the reasoning was left out), so the page before that gets a checkpoint too.
        """
        self.progress(lease)
        if self.ends:
            size = self.pool.page_tokens
            self._checkpoint(lease, None, is_last=False, position=(lease.state.lengths[0] - 1) // size * size)
            self._checkpoint(lease, hidden, is_last=False)
            self.tree.shrink()

    def end_of_output(
        self, lease: Lease, prompt: Sequence[int] = (), output: Sequence[int] = (), scope: str = ""
    ) -> None:
        """Store a sequence whose output is complete, as far as it has been read, and the turn that was sampled."""
        if self.turns is not None and output:
            self.turns.remember([*prompt, *output], len(prompt), scope)
        self.progress(lease)
        if self.ends:
            self._checkpoint(lease, None, is_last=True)
            self.tree.shrink()

    def _checkpoint(self, lease: Lease, hidden: Tensor | None, is_last: bool, position: int | None = None) -> None:
        """Keep a window checkpoint at the sequence's end, or at an earlier `position` that its rings still reach."""
        state, size = lease.state, self.pool.page_tokens
        length = state.lengths[0] if position is None else position
        if state.interrupted or not state.is_exact or length < max(1, state.floor[0]):
            return
        node = self._place(lease)
        if node.depth < length // size:  # the last page was another sequence's, who left, and there is no room for it
            return
        while node.depth > length // size:
            assert node.parent is not None
            node = node.parent
        tail = state.tokens[0, node.depth * size : length].numpy().tobytes()
        old = node.points.get(tail)
        if old is not None and (hidden is None or old.hidden is not None):
            self.tree.touch(node, old)
            return
        kept = None if hidden is None else hidden.detach().float().cpu().clone()
        point = self.tree.add_point(node, tail, capture(state, length), kept)
        if self.disk is not None and length >= size:
            self.disk.put_point(node.key, tail, length, point.content, point.hidden, is_last)

    def _place(self, lease: Lease) -> Node:
        """The sequence's deepest node in the tree, found again when it was evicted or the sequence was cut back."""
        size, full = self.pool.page_tokens, lease.state.lengths[0] // self.pool.page_tokens
        node = lease.node
        if node is None or not (node.is_alive and node.depth <= full):
            hit = self.tree.match(lease.state.tokens[0, : full * size].numpy(), lease.root)
            node = hit.nodes[-1] if hit.nodes else lease.root or self.tree.root
        return node

    def as_sampled(self, tokens: Sequence[int], scope: str = "") -> Sequence[int]:
        """A rendered prompt's ids with turns that were sampled in this scope as they were sampled: the same bytes."""
        return tokens if self.turns is None else self.turns.restore(tokens, scope)[0]

    def clear(self) -> None:
        """Forget everything in memory, as after a change of weights."""
        self.tree.clear()

    def flush(self) -> None:
        """Wait until all that was stored is on disk."""
        if self.disk is not None:
            self.disk.flush()

    def close(self) -> None:
        """Write what is queued and close the files."""
        if self.disk is not None:
            self.disk.close()


def _check_sizes(**given: tuple[int | None, int]) -> None:
    """Raises: ConfigError for a number below its least; None is no limit."""
    for name, (value, least) in given.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, so the prefix cache could not work. Set it to {least} or more.")
