"""Whatever the store brings back, a request's tokens are those of a model that has no store.

Pages of 8 tokens on tiny random networks, so that page, block and window boundaries are all met within 100 tokens.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_models import TOLERANCE, build, config, drawn, life_settings, some_tokens
from torch import Tensor

from rorqual.engine.prefix_cache import Lease, PrefixCache
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.ops.native import usable_typed

PAGE = 8


@cache
def model_of(window: int = 8, engram: bool = False) -> Transformer:
    """All layer kinds; one of each kind of these is enough for many tests."""
    memory = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4}
    return build(config(sliding_window=window, **({"engram": memory} if engram else {})))


@cache
def is_invariant() -> bool:
    """Whether a token's logits have the same bits however the sequence is cut into calls."""
    model, row = model_of(), some_tokens(model_of(), 40)
    whole, state = uncached(model, row), model.new_state()
    with torch.no_grad():
        one_by_one = torch.cat([model(t[None, None], state=state)[0] for t in row])
    return torch.equal(whole, one_by_one)


def test_equal_bits_are_asked_for_here() -> None:
    """`agree` compares bits wherever the native operations run."""
    assert is_invariant() or not usable_typed(model_of().embed.weight)


def agree(a: Tensor, b: Tensor) -> bool:
    """The same bits where the operations allow it, else the same within the tolerance of the conformance vectors."""
    return torch.equal(a, b) if is_invariant() else bool((a - b).abs().max() < TOLERANCE)


def uncached(model: Transformer, row: Tensor) -> Tensor:
    """Logits [S, V] of a row in one call, with a state that nobody shares."""
    with torch.no_grad():
        return model(row[None], state=model.new_state())[0]


def new_cache(model: Transformer, **options: Any) -> PrefixCache:
    options = {"memory_bytes": 1 << 22, "running_tokens": 2048, "page_tokens": PAGE, **options}
    return PrefixCache(model, **options)


def run(cache: PrefixCache, lease: Lease, row: Tensor, end: int, chunk: int) -> Tensor | None:
    """Feed tokens up to `end` in chunks; the logits of the last, None when nothing was left to feed."""
    model, state, streams = cache.model, lease.state, None
    while state.lengths[0] < end:
        at = state.lengths[0]
        stop = cache.next_stop(lease)
        upto = min(end, at + chunk, end if stop is None else stop)
        with torch.no_grad():
            streams = model.forward_streams(row[None, at:upto], state=state)
        cache.progress(lease)
    if streams is None:
        return None
    with torch.no_grad():
        return model.final_hidden(streams[:, -1:])[0, -1]


def ask(cache: PrefixCache, prompt: Tensor, num_new: int, chunk: int = 7) -> tuple[list[int], Tensor, Lease]:
    """Greedy tokens after a prompt, the logits behind the prompt, and the lease; stored as the engine stores it."""
    lease = cache.begin(prompt.tolist())
    hidden = run(cache, lease, prompt, len(prompt), chunk)
    hidden = lease.hidden if hidden is None else hidden
    assert hidden is not None
    cache.end_of_prompt(lease, hidden)
    with torch.no_grad():
        logits = first = cache.model.logits(hidden)
        ids = [int(logits.argmax())]
        while len(ids) < num_new:
            logits = cache.model(torch.tensor([[ids[-1]]]), state=lease.state)[0, -1]
            ids.append(int(logits.argmax()))
    cache.end_of_output(lease)
    return ids, first, lease


def check(cache: PrefixCache, prompt: Tensor, num_new: int, chunk: int = 7) -> Lease:
    """One request, compared with the model alone."""
    ids, first, lease = ask(cache, prompt, num_new, chunk)
    row = torch.cat([prompt, torch.tensor(ids)])
    truth = uncached(cache.model, row)
    assert agree(first, truth[len(prompt) - 1])
    assert ids == truth[len(prompt) - 1 : -1].argmax(-1).tolist()
    e = lease.explanation
    assert e.memory_tokens + e.disk_tokens + e.computed_tokens == e.prompt_tokens == len(prompt)
    assert e.cached_tokens == lease.num_cached
    return lease


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    yield tmp_path if request.param == "disk" else None


@drawn(3)
@given(
    shared=st.integers(0, 60), left=st.integers(1, 20), right=st.integers(1, 20), window=st.sampled_from([1, 3, 8]),
    engram=st.booleans(), policy=st.sampled_from(["full", "periodic", "zero"]), chunk=st.sampled_from([3, 16, 64]),
    ends=st.booleans(), again=st.booleans(),
)  # fmt: skip
def test_a_shared_beginning_changes_no_token(
    shared: int, left: int, right: int, window: int, engram: bool, policy: Any, chunk: int, ends: bool, again: bool
) -> None:
    """Two prompts with a common beginning, and perhaps the first once more."""
    model = model_of(window, engram)
    cache = new_cache(model, windows=policy, ends=ends)
    row = some_tokens(model, shared)
    prompts = [torch.cat([row, some_tokens(model, n, draw_seed=s)]) for n, s in ((left, 5), (right, 6))]
    for prompt in [*prompts, *(prompts[:1] if again else ())]:
        check(cache, prompt, 3, chunk)
        gc.collect()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 50, 64])
def test_an_exact_repeat_runs_nothing(folder: Path | None, length: int) -> None:
    model = model_of()
    cache = new_cache(model, folder=folder)
    prompt = some_tokens(model, length)
    _, first, _ = ask(cache, prompt, 1)
    if folder is not None and length >= PAGE:  # shorter ones are not worth a record
        cache.close()
        cache = new_cache(model, folder=folder)
    again, logits, lease = ask(cache, prompt, 5)
    if folder is None or length >= PAGE:
        assert lease.num_cached == length and lease.explanation.reason == "exact repeat"
        assert lease.explanation.computed_tokens == lease.explanation.replayed_tokens == 0
        assert lease.explanation.checkpoint == ("memory" if folder is None or length < PAGE else "disk")
        assert lease.explanation.disk_tokens == (0 if folder is None or length < PAGE else length)
        assert torch.equal(logits, first)
    assert agree(logits, uncached(model, prompt)[-1])
    assert len(again) == 5
    cache.close()


def test_a_conversation_goes_on_from_the_end_of_the_output(folder: Path | None) -> None:
    model = model_of()
    cache = new_cache(model, folder=folder)
    row, before = some_tokens(model, 21), 0
    for turn in range(4):
        ids, _, lease = ask(cache, row, 6)
        if turn:
            assert lease.explanation.checkpoint != "none" and lease.explanation.replayed_tokens == 0
            assert lease.num_cached == before, "all but the last sampled token had been read"
        before = len(row) + 5
        row = torch.cat([row, torch.tensor(ids), some_tokens(model, 3, draw_seed=turn)])
        if folder is not None:
            cache.close()
            cache = new_cache(model, folder=folder)
    check(cache, row, 3)
    cache.close()


def test_policies_differ_in_what_is_run_again() -> None:
    """A prompt that leaves a stored one at token 70: with checkpoints at every page, every 24 tokens, and nowhere."""
    model = model_of(8)
    row = some_tokens(model, 90)
    other = torch.cat([row[:70], (row[70:] + 1) % 64])
    seen = {}
    for policy, options in (("full", {}), ("periodic", {"period": 24}), ("zero", {})):
        cache = new_cache(model, windows=policy, ends=False, **options)
        check(cache, row, 1)
        e = check(cache, other, 4).explanation
        assert (e.reason, e.differs_at) == ("different token", 70)
        assert (e.stored_token, e.asked_token) == (int(row[70]), int(other[70]))
        seen[policy] = (e.restored_at, e.replayed_tokens, e.checkpoint)
    assert seen["full"] == (64, 0, "memory")
    assert seen["periodic"] == (48, 16, "memory")
    assert seen["zero"] == (0, 4 * 7, "none"), "layers times tokens of a window before its own"


def test_the_second_prompt_that_leaves_a_text_finds_a_checkpoint_there() -> None:
    model = model_of(8)
    cache = new_cache(model)
    row = some_tokens(model, 90)
    questions = [torch.cat([row[:70], some_tokens(model, 9, draw_seed=s)]) for s in range(3)]
    seen = [check(cache, prompt, 3).explanation for prompt in (row, *questions)]
    assert [e.restored_at for e in seen] == [0, 0, 70, 70], "at the very token, not at the page before"
    assert [e.replayed_tokens for e in seen] == [0, 28, 0, 0]


def test_explanations_say_why() -> None:
    model = model_of()
    cache = new_cache(model, memory_bytes=1 << 20, ends=False, windows="full")
    row = some_tokens(model, 60)

    def reason(prompt: Tensor) -> str:
        return cache.begin(prompt.tolist()).explanation.reason

    assert reason(row) == "never stored"
    assert cache.begin(row.tolist(), ask=False).explanation.reason == "not asked"
    check(cache, row, 1)
    assert reason(row) == "below grain", "four tokens behind the last full page"
    assert reason(row[:56]) == "whole prompt"
    assert reason((row + 1) % 64) == "first token"
    assert reason(torch.cat([row[:56], some_tokens(model, 30)])) in ("end of stored text", "different token")
    assert reason(torch.cat([row[:20], (row[20:] + 1) % 64])) == "different token"
    text = cache.begin(torch.cat([row[:20], (row[20:] + 1) % 64]).tolist()).explanation.text()
    assert f"at position 20 the stored text goes on with token {int(row[20])}" in text
    cache.tree.budget = 0
    gc.collect()
    cache.tree.shrink()
    assert len(cache.tree) == 0
    assert reason(row) == "evicted"
    assert set(cache.stats.reasons) >= {"never stored", "evicted", "different token"}


def test_memory_stays_in_its_budget_and_pages_come_back() -> None:
    model = model_of()
    budget = 60_000
    cache = new_cache(model, memory_bytes=budget, running_tokens=128)
    for seed in range(12):
        check(cache, some_tokens(model, 60, draw_seed=seed), 3)
        gc.collect()
        cache.tree.shrink()
        tree = cache.tree
        assert tree.nbytes <= budget
        assert tree.page_bytes == len(tree) * cache.pool.page_bytes
        assert cache.pool.num_pages - cache.pool.num_free == len(tree)
    assert cache.tree.evicted_pages and cache.tree.evicted_points
    cache.clear()
    assert cache.tree.nbytes == 0 and cache.pool.num_free == cache.pool.num_pages


@pytest.mark.parametrize(
    "options",
    [{"memory_bytes": -1}, {"running_tokens": 0}, {"disk_bytes": 0}, {"write_bytes_per_hour": -1}, {"rewind": -1}],
)
def test_sizes_that_cannot_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        new_cache(model_of(), **options)


def test_a_page_shared_with_a_sequence_that_left_may_go_at_once() -> None:
    """Two prompts that are the same and read at once: the second stands on the first one's pages, which have no room
    once the first has left. That costs a checkpoint, not the step that took it.
    """
    model, row = model_of(), some_tokens(model_of(), 3 * PAGE + 2)
    cache = new_cache(model, memory_bytes=1)
    one, other = (cache.begin(row.tolist()) for _ in range(2))
    for lease in (one, other):
        assert run(cache, lease, row, 3 * PAGE, PAGE) is not None
    cache.end_of_output(one)
    one.state, one.node = model.new_state(), None
    gc.collect()
    with torch.no_grad():
        last = model.final_hidden(model.forward_streams(row[None, 3 * PAGE :], state=other.state)[:, -1:])[0, -1]
        cache.end_of_prompt(other, last)
        cache.end_of_output(other)
        assert agree(model.logits(last), uncached(model, row)[-1])


def test_running_sequences_take_pages_from_the_store() -> None:
    """The pool is smaller than budget and running sequences together: the store gives way."""
    model = model_of()
    cache = new_cache(model, memory_bytes=0, running_tokens=120)
    cache.tree.budget = 1 << 30
    for seed in range(4):
        check(cache, some_tokens(model, 90, draw_seed=seed), 3)
        gc.collect()
    assert cache.tree.evicted_pages > 20


class Life(RuleBasedStateMachine):
    """Requests with shared beginnings, admitted and fed by turns, forked, dropped, evicted, with restarts between."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: list[tuple[Lease, Tensor]] = []
        self.cache: PrefixCache | None = None

    @initialize(
        policy=st.sampled_from(["full", "periodic", "zero"]), ends=st.booleans(), disk=st.booleans(),
        window=st.sampled_from([1, 3, 8]), budget=st.sampled_from([30_000, 1 << 22]),
    )  # fmt: skip
    def start(self, policy: str, ends: bool, disk: bool, window: int, budget: int) -> None:
        self.folder = tempfile.TemporaryDirectory() if disk else None
        self.options: dict[str, Any] = {"windows": policy, "ends": ends, "memory_bytes": budget}
        if self.folder is not None:
            self.options |= {"folder": self.folder.name, "disk_bytes": 1 << 20}
        self.model = model_of(window)
        self.cache = new_cache(self.model, **self.options)
        self.stems = [some_tokens(self.model, 80, draw_seed=s) for s in range(2)]

    @rule(stem=st.integers(0, 1), cut=st.integers(0, 70), more=st.integers(1, 20), seed=st.integers(0, 3))
    def admit(self, stem: int, cut: int, more: int, seed: int) -> None:
        if len(self.leases) < 4:
            row = torch.cat([self.stems[stem][:cut], some_tokens(self.model, more, draw_seed=10 + seed)])
            assert self.cache is not None
            lease = self.cache.begin(row.tolist())
            self.leases.append((lease, row))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 3), chunk=st.integers(1, 30))
    def feed(self, which: int, chunk: int) -> None:
        """One chunk of one prompt."""
        lease, row = self.leases[which % len(self.leases)]
        at = lease.state.lengths[0]
        assert self.cache is not None
        if at < len(row):
            run(self.cache, lease, row, min(len(row), at + chunk), chunk)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 3), num_new=st.integers(1, 4))
    def finish(self, which: int, num_new: int) -> None:
        """The rest of a prompt and some tokens, compared with the model alone."""
        lease, row = self.leases.pop(which % len(self.leases))
        cache = self.cache
        assert cache is not None
        hidden = run(cache, lease, row, len(row), 16)
        hidden = lease.hidden if hidden is None else hidden
        if hidden is None:  # the prompt was read by an earlier `feed`
            return
        cache.end_of_prompt(lease, hidden)
        with torch.no_grad():
            logits = first = self.model.logits(hidden)
            ids = [int(logits.argmax())]
            for _ in range(num_new):
                logits = self.model(torch.tensor([[ids[-1]]]), state=lease.state)[0, -1]
                ids.append(int(logits.argmax()))
        cache.end_of_output(lease)
        truth = uncached(self.model, torch.cat([row, torch.tensor(ids)]))[len(row) - 1 : -1]
        assert agree(first, truth[0]) and agree(logits, truth[-1])
        assert ids == truth.argmax(-1).tolist()

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 3), back=st.integers(1, 6), seed=st.integers(0, 3))
    def take_back(self, which: int, back: int, seed: int) -> None:
        """Drafts that were not accepted: some tokens are read and taken back, and nothing of them may stay."""
        lease, row = self.leases[which % len(self.leases)]
        state, at = lease.state, lease.state.lengths[0]
        if state.is_exact and not state.is_replaying and at:
            with torch.no_grad():
                self.model(some_tokens(self.model, 1, back, draw_seed=90 + seed), state=state)
            state.truncate(at)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        lease, row = self.leases[which % len(self.leases)]
        if len(self.leases) < 4:
            copy = Lease(lease.state.fork(), lease.num_cached, lease.explanation, lease.hidden, lease.node)
            other = torch.cat([row[: lease.state.lengths[0]], some_tokens(self.model, 5, draw_seed=77)])
            if lease.state.lengths[0] < len(row):
                self.leases.append((copy, row))
            else:
                copy.hidden = None
                self.leases.append((copy, other))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        self.leases.pop(which % len(self.leases))

    @rule(share=st.sampled_from([0.0, 0.5]))
    def evict(self, share: float) -> None:
        assert self.cache is not None
        tree = self.cache.tree
        tree.budget, kept = int(tree.nbytes * share), tree.budget
        tree.shrink()
        tree.budget = kept

    @rule(politely=st.booleans())
    def restart(self, politely: bool) -> None:
        """Running requests and memory are lost; what is on disk stays."""
        assert self.cache is not None
        self.leases.clear()
        if politely:
            self.cache.flush()
        self.cache.close()
        self.cache = new_cache(self.model, **self.options)

    @invariant()
    def pages_add_up(self) -> None:
        if self.cache is None:
            return
        pool, counts = self.cache.pool, {}
        for node in self.cache.tree._nodes:
            counts[node.page] = counts.get(node.page, 0) + 1
        for lease, _ in self.leases:
            assert lease.state.table is not None
            for page in lease.state.table.pages:
                counts[page] = counts.get(page, 0) + 1
        assert all(pool.count(page) == count for page, count in counts.items())
        assert pool.num_pages - pool.num_free == len(counts)

    def teardown(self) -> None:
        self.leases.clear()
        if self.cache is not None:
            self.cache.close()


class LongLife(Life):
    """The same, to be run longer."""


TestLife = Life.TestCase
TestLife.settings = life_settings(4, 15)
TestLongLife = pytest.mark.slow(LongLife.TestCase)
TestLongLife.settings = life_settings(int(os.environ.get("RORQUAL_TEST_EXAMPLES", "60")), 40)
