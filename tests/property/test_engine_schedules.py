"""Whatever an engine lives through, a finished greedy request has the tokens that the model gives alone.

Requests that share beginnings are admitted, cancelled, continued and forked; the store is squeezed; engines are closed
in the middle of everything, and others, set up differently, go on with what lies on disk: all of it, or an image of the
folder as a crash would leave it. The output head has near twins, so that any other number soon means another token.
"""

import contextlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from small_models import life_settings

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.selftest.subject import IdsOnly, high_entropy, plain_ids, small_config
from rorqual.errors import RequestError
from rorqual.model import Transformer
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")

VOCAB, PAGE, MOST = 64, 8, 24
PATIENCE_S = 300


@cache
def subject() -> Transformer:
    """Window, CSA, HCA (8 tokens an entry) and CSA."""
    return high_entropy(small_config(vocab_size=VOCAB, compress_ratios=[0, 4, 8, 4]))


@cache
def truth(prompt: tuple[int, ...], count: int) -> list[int]:
    return plain_ids(subject(), prompt, count)


@cache
def stem(number: int) -> list[int]:
    draw = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCAB, (80,), generator=draw).tolist()


engine_setups = st.fixed_dictionaries(
    {
        "max_running": st.sampled_from([1, 2, 5]), "chunk": st.sampled_from([3, 16, 64]),
        "max_state_bytes": st.sampled_from([None, None, 300_000, 500_000]),
    }
)  # fmt: skip
cache_setups = st.fixed_dictionaries(
    {
        "windows": st.sampled_from(["full", "periodic", "zero"]), "ends": st.booleans(),
        "memory_bytes": st.sampled_from([0, 60_000, 1 << 22]), "disk_bytes": st.sampled_from([1 << 17, 1 << 22]),
    }
)  # fmt: skip


class Schedules(RuleBasedStateMachine):
    """One folder, and the engines that live on it one after the other."""

    engine: Engine | None = None

    @initialize(setup=engine_setups, store=cache_setups, threads=st.sampled_from([1, 1, 2]))
    def start(self, setup: dict[str, Any], store: dict[str, Any], threads: int) -> None:
        self.parent = Path(tempfile.mkdtemp())
        self.folder = Path(tempfile.mkdtemp(dir=self.parent))
        self.requests: list[Request] = []
        torch.set_num_threads(threads)
        self.open(setup, store)

    def open(self, setup: dict[str, Any], store: dict[str, Any]) -> None:
        model = subject()
        self.cache = PrefixCache(model, folder=self.folder, running_tokens=2048, page_tokens=PAGE, **store)
        self.budget = self.cache.tree.budget
        self.engine = Engine(model, IdsOnly(VOCAB), max_queued=64, prefix_cache=self.cache, **setup)

    def submit(self, prompt: list[int], count: int, priority: int) -> None:
        assert self.engine is not None
        greedy = SamplingParams(temperature=0, max_tokens=count)
        self.requests.append(self.engine.submit(prompt, greedy, priority=priority, wait=True))

    @rule(
        number=st.integers(0, 1), cut=st.sampled_from([0, 8, 30, 63, 64, 80]) | st.integers(0, 80),
        more=st.lists(st.integers(0, 3), min_size=1, max_size=9), count=st.integers(1, MOST),
        priority=st.sampled_from([0, 0, 1, -1]),
    )  # fmt: skip
    def admit(self, number: int, cut: int, more: list[int], count: int, priority: int) -> None:
        self.submit(stem(number)[:cut] + more, count, priority)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99), other=st.none() | st.integers(0, VOCAB - 1), count=st.integers(1, MOST))
    def fork(self, which: int, other: int | None, count: int) -> None:
        """Go on from where a request is now: with its tokens so far, or with another token behind them."""
        first = self.requests[which % len(self.requests)]
        ids = [event.id for event in first.events if event.id is not None]
        prompt = [*first.prompt_ids, *ids, *([] if other is None else [other])]
        if len(prompt) < 150:
            self.submit(prompt, count, 0)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        self.requests[which % len(self.requests)].cancel()

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        self.check(self.requests.pop(which % len(self.requests)))

    @rule(share=st.sampled_from([0.0, 0.3, 1.0]))
    def evict(self, share: float) -> None:
        """The store's budget changes; the engine's thread evicts when it next stores something."""
        self.cache.tree.budget = int(self.budget * share)

    @rule(setup=engine_setups, store=cache_setups, end=st.sampled_from(["written", "image", "lost"]))
    def restart(self, setup: dict[str, Any], store: dict[str, Any], end: str) -> None:
        """Close the engine with all its requests. `written`: the cache writes what it has; `image`: the next engine
        gets a copy of the folder as it was before that, perhaps with half a record; `lost`: another folder."""
        self.close(end)
        self.open(setup, store)

    def close(self, end: str) -> None:
        assert self.engine is not None
        self.engine.close()
        if end != "written":
            image = Path(tempfile.mkdtemp(dir=self.parent))
            if end == "image":
                shutil.copytree(self.folder, image, dirs_exist_ok=True, copy_function=copy_if_there)
            self.folder = image
        self.cache.close()
        for request in self.requests:
            self.check(request)
        self.requests = []

    @staticmethod
    def check(request: Request) -> None:
        """Finished: all its tokens. Cancelled, or stopped by the end of its engine: as far as it came."""
        try:
            out = request.result(PATIENCE_S)
        except RequestError as error:
            assert error.status == 503, error
        else:
            assert request.cancelled or len(out.ids) == request.max_tokens
            assert out.exactness is not None and out.exactness.level == "bitwise"
        ids = [event.id for event in request.events if event.id is not None]
        assert ids == truth(request.prompt_ids, request.max_tokens)[: len(ids)]

    def teardown(self) -> None:
        if self.engine is not None:
            requests, self.requests = self.requests, []
            for request in requests:
                self.check(request)
            self.close("written")
            shutil.rmtree(self.parent)


def copy_if_there(source: str, target: str) -> None:
    """A file of a living cache may be renamed or deleted meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(source, target)


class LongSchedules(Schedules):
    """The same, to be run longer."""


TestSchedules = Schedules.TestCase
TestSchedules.settings = life_settings(16, 25)
TestLongSchedules = pytest.mark.slow(LongSchedules.TestCase)
TestLongSchedules.settings = life_settings(int(os.environ.get("RORQUAL_TEST_EXAMPLES", "150")), 50)


def test_a_wrong_entry_would_be_seen() -> None:
    """The least significant bits of stored entries are changed under a hit: other tokens come out."""
    model = subject()
    store = PrefixCache(model, memory_bytes=1 << 22, running_tokens=512, page_tokens=PAGE)
    prompts = [stem(number) for number in range(2, 8)]
    greedy = SamplingParams(temperature=0, max_tokens=MOST)
    with Engine(model, IdsOnly(VOCAB), prefix_cache=store) as engine:
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
        for layer, spec in enumerate(model.cfg.layers):
            if spec.compress_ratio:
                entries = store.pool.tensor(layer, "entries")
                entries.view(torch.int32).bitwise_xor_(64)
        outs = engine.generate(prompts, greedy)
    assert all(out.usage.cached_tokens == 80 for out in outs)
    assert any(list(out.ids) != truth(out.prompt_ids, MOST) for out in outs)
