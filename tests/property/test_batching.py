"""Many requests at once on tiny random networks: each gets what it would have got alone."""

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mock_model import byte_tokenizer
from plain_generation import alone
from small_models import build, chunkings, config, drawn, some_tokens

from rorqual.engine import Completion, Engine, SamplingParams, TokenEvent
from rorqual.engine.memory import StateCost
from rorqual.errors import ConfigError, RequestError
from rorqual.model import Scores, Segment, Transformer
from rorqual.ops.native import usable

TOKENIZER = byte_tokenizer()
CONFIG = config(vocab_size=TOKENIZER.vocab_size, num_hash_layers=2)
PATIENCE_S = 300
"""For a busy machine; what hangs is found all the same."""
MEMORY = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4}


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Window, CSA, HCA, CSA; two hash-routed layers."""
    return build(CONFIG)


def prompt(length: int, number: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(1000 * number + length)
    return torch.randint(3, 259, (length,), generator=draw).tolist()


def params(number: int, max_tokens: int) -> SamplingParams:
    """Every third request is greedy; the others draw, with and without filters."""
    if number % 3 == 0:
        return SamplingParams(temperature=0, max_tokens=max_tokens)
    filters: dict[str, Any] = {} if number % 3 == 1 else {"top_p": 0.9, "top_k": 50, "min_p": 0.01}
    return SamplingParams(temperature=0.8, seed=number, max_tokens=max_tokens, **filters)


def submit_all(engine: Engine, many: Sequence[tuple[list[int], SamplingParams]], **more: Any) -> list[Completion]:
    requests = [engine.submit(ids, own, wait=True, **more) for ids, own in many]
    return [request.result(PATIENCE_S) for request in requests]


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def batch(count: int, longest: int, tokens: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests of mixed lengths, short and long by turns."""
    lengths = [1 + (i * 37) % longest for i in range(count)]
    return [(prompt(length, i), params(i, 1 + (i * 5) % tokens)) for i, length in enumerate(lengths)]


def test_sixteen_at_once_equal_each_alone(model: Transformer) -> None:
    many = batch(16, 70, 12)
    with Engine(model, TOKENIZER, max_running=16, chunk=24) as engine:
        together = submit_all(engine, many)
        stats = engine.stats()
    assert [list(out.ids) for out in together] == [alone(model, *one, TOKENIZER.eos_token_id) for one in many]
    assert stats.tokens_per_step > 4, "they did share steps"
    assert stats.sampled_tokens == sum(len(out.ids) for out in together)
    assert stats.prompt_tokens == sum(len(ids) for ids, _ in many)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "engram", "bf16"])
def test_sixty_four_at_once_equal_each_alone(kind: str) -> None:
    model = build(config(vocab_size=TOKENIZER.vocab_size, engram=MEMORY if kind == "engram" else None))
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    many = batch(64, 300, 40)
    with Engine(model, TOKENIZER, max_running=64, chunk=128) as engine:
        together = submit_all(engine, many)
    assert [list(out.ids) for out in together] == [alone(model, *one, TOKENIZER.eos_token_id) for one in many]


@drawn(4)
@given(
    chunk=st.integers(1, 40),
    max_running=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
    pause=st.integers(0, 4),
)
def test_cancelling_some_changes_nothing_for_the_others(
    chunk: int, max_running: int, lengths: list[int], cancelled: set[int], pause: int
) -> None:
    model = build(CONFIG)
    many = [(prompt(length, i), params(i, 6)) for i, length in enumerate(lengths)]
    with Engine(model, TOKENIZER, max_running=max_running, chunk=chunk) as engine:
        requests = [engine.submit(ids, own) for ids, own in many]
        time.sleep(0.005 * pause)
        for i in cancelled & set(range(len(many))):
            requests[i].cancel()
        outs = [request.result(PATIENCE_S) for request in requests]
        assert engine.occupancy() == (0, 0)
    for i, (out, one) in enumerate(zip(outs, many, strict=True)):
        expected = alone(model, *one, TOKENIZER.eos_token_id)
        if out.finish_reason == "cancelled":
            assert i in cancelled and list(out.ids) == expected[: len(out.ids)]
        else:
            assert list(out.ids) == expected


def test_a_cancelled_request_frees_its_state_at_once(model: Transformer) -> None:
    states: list[Any] = []

    class Watched(Transformer):
        def new_state(self, *args: Any, **kwargs: Any) -> Any:
            state = super().new_state(*args, **kwargs)
            states.append(weakref.ref(state))
            return state

    watched = build(CONFIG)
    watched.__class__ = Watched
    with Engine(watched, TOKENIZER, max_running=2) as engine:
        stays, goes = (engine.submit(prompt(20, i), params(0, 3000)) for i in range(2))
        until(lambda: len(stays.events) > 3 and len(goes.events) > 3)
        assert engine.stats().state_bytes["window"] > 0
        goes.cancel()
        assert goes.result(PATIENCE_S).finish_reason == "cancelled"
        gc.collect()
        assert [ref() is None for ref in states] == [False, True]
        stays.cancel()
        stays.result(PATIENCE_S)
        assert engine.stats().state_bytes == {}


def test_a_budget_of_bytes_is_kept_by_waiting_and_by_starting_again() -> None:
    model = build(config(vocab_size=TOKENIZER.vocab_size, num_hidden_layers=1, compress_ratios=[4]))
    cost, endless = StateCost(model), (TOKENIZER.eos_token_id,)
    many = [(prompt(20 + i, i), params(i, 130).replace(suppress_token_ids=endless)) for i in range(4)]
    budget = cost(160) + cost(50)  # room for two to begin and for one to end
    with Engine(model, TOKENIZER, max_running=6, chunk=64, max_state_bytes=budget, log_steps=10_000) as engine:
        requests = [engine.submit(ids, own) for ids, own in many]
        most = 0
        while not all(request.finished for request in requests):
            held = engine.stats().state_bytes.get("total", 0)
            assert held <= budget
            most = max(most, held)
            time.sleep(0.001)
        outs = [request.result() for request in requests]
        stats, steps = engine.stats(), engine.step_log()
    assert [list(out.ids) for out in outs] == [alone(model, *one, TOKENIZER.eos_token_id) for one in many]
    assert stats.preemptions > 0 and most > budget / 2
    assert max(step.charged_bytes for step in steps) <= budget
    assert len(steps) == stats.rounds
    assert sum(step.prompt_tokens for step in steps) > sum(len(ids) for ids, _ in many), "some were read again"


def test_prompt_scores_survive_starting_again(model: Transformer) -> None:
    asked = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=True)
    ids = prompt(90)
    with Engine(model, TOKENIZER, max_running=1, chunk=8) as engine:
        [whole] = engine.generate(ids, asked)
        request = engine.submit(ids, asked)
        until(lambda: len(request.prompt_scores) > 20)
        [urgent] = [engine.submit(prompt(9), params(0, 2), priority=1).result(PATIENCE_S)]
        out = request.result(PATIENCE_S)
        assert engine.stats().preemptions == 1
    assert urgent.finish_reason == "length"
    assert out.ids == whole.ids and whole.prompt_scores is not None and out.prompt_scores is not None
    assert [score.id for score in out.prompt_scores] == ids
    if usable(torch.zeros(1)):  # the references add up in an order that depends on the chunks
        assert out.prompt_scores == whole.prompt_scores


def test_what_the_budget_can_never_hold_is_refused(model: Transformer) -> None:
    cost = StateCost(model)
    with Engine(model, TOKENIZER, max_state_bytes=cost(100)) as engine:
        with pytest.raises(RequestError, match="needs .* Please reduce the length") as caught:
            engine.submit(prompt(90), SamplingParams(max_tokens=50))
        assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
        with pytest.raises(RequestError, match="bytes of states") as caught:
            engine.submit(prompt(200))
        assert caught.value.param == "messages"
        request = engine.submit(prompt(90))
        assert cost(90 + request.max_tokens) <= cost(100) < cost(90 + request.max_tokens + 1)
        request.cancel()
    with pytest.raises(ConfigError, match="the state of a single token takes"):
        Engine(model, TOKENIZER, max_state_bytes=1000)


@drawn(20)
@given(chunks=chunkings(200))
def test_the_cost_of_a_state_is_never_below_what_it_holds(chunks: list[int]) -> None:
    model = MODELS[len(chunks) % 2]
    cost, state = StateCost(model), model.new_state()
    with torch.no_grad():
        for part in some_tokens(model, sum(chunks)).split(chunks):
            model(part[None], state=state)
            held = state.nbytes()["total"]
            assert held <= cost(state.lengths[0]) <= 2 * held + 4096


MODELS = (build(CONFIG), build(config(engram=MEMORY)))


class Poisoned(Transformer):
    """Fails after the layers have stored their part, when a segment begins with token 66 at position 30 or later."""

    def next_scores(self, segments: Sequence[Segment], *rest: Any) -> Scores:
        scores = super().next_scores(segments, *rest)
        for segment in segments:
            if segment.state.lengths[0] > 30 and 66 in segment.tokens:
                raise ValueError("boom")
        return scores


def test_a_request_that_breaks_a_shared_step_fails_alone() -> None:
    model = build(CONFIG)
    many = [(prompt(10 + 7 * i, i), params(i, 12)) for i in range(6)]
    many = [([65 if token == 66 else token for token in ids], own) for ids, own in many]
    suppressed = [(ids, own.replace(suppress_token_ids=(66,))) for ids, own in many]
    expected = [alone(model, *one, TOKENIZER.eos_token_id) for one in suppressed]
    model.__class__ = Poisoned
    with Engine(model, TOKENIZER, max_running=8, chunk=16) as engine:
        good = [engine.submit(ids, own) for ids, own in suppressed]
        bad = engine.submit([*[65] * 40, 66, 65], params(0, 5))
        with pytest.raises(RequestError, match="ValueError: boom") as caught:
            bad.result(PATIENCE_S)
        assert caught.value.status == 500
        assert [list(request.result(PATIENCE_S).ids) for request in good] == expected
        assert engine.stats().failed_steps >= 1
        assert engine.stats().finished["error"] == 1


def test_higher_priority_first_and_equals_in_order(model: Transformer) -> None:
    order: list[int] = []
    with Engine(model, TOKENIZER, max_running=1, chunk=16) as engine:
        first = engine.submit(prompt(100), params(0, 400))
        until(lambda: engine.occupancy()[0] == 1)

        def listen(number: int) -> Any:
            return lambda event: order.append(number) if event.finish_reason else None

        rest = [
            engine.submit(prompt(5, i), params(0, 2), priority=priority, listener=listen(i))
            for i, priority in enumerate([0, -1, 0, 5, -1, 5])
        ]
        first.cancel()
        for request in rest:
            request.result(PATIENCE_S)
    assert [i for i in order if i not in (3, 5)] == [0, 2, 1, 4]
    assert order.index(3) < order.index(5), "the urgent ones may have begun before the first was cancelled"


def test_a_deadline_ends_a_request_with_what_it_has(model: Transformer) -> None:
    with Engine(model, TOKENIZER, max_running=1) as engine:
        running = engine.submit(prompt(5), params(0, 4000), timeout_s=0.15)
        waiting = engine.submit(prompt(5), params(0, 4), timeout_s=0.1)
        events = list(running)
        assert events[-1] == TokenEvent(id=None, finish_reason="timeout")
        out = running.result(1)
        assert out.finish_reason == "timeout" and 0 < len(out.ids) < 4000
        assert waiting.result(5).ids == () and waiting.finish_reason == "timeout"
        assert engine.stats().finished["timeout"] == 2
        with pytest.raises(RequestError, match="Give seconds above 0") as caught:
            engine.submit([5], timeout_s=0.0)
        assert caught.value.param == "timeout_s"


def test_progress_of_a_long_prompt_is_told_and_its_listener_may_fail(model: Transformer) -> None:
    with Engine(model, TOKENIZER, chunk=32) as engine:
        seen: list[tuple[int, int]] = []
        engine.submit(prompt(100), params(0, 3), on_progress=lambda *told: seen.append(told)).result(PATIENCE_S)
        assert seen == [(32, 100), (64, 100), (96, 100), (100, 100)]

        def gone(done: int, total: int) -> None:
            raise RuntimeError("nobody looks any more")

        assert (
            engine.submit(prompt(100), params(0, 3), on_progress=gone).result(PATIENCE_S).finish_reason == "cancelled"
        )


def test_a_long_prompt_delays_decoding_by_one_chunk_a_token(model: Transformer) -> None:
    with Engine(model, TOKENIZER, max_running=4, chunk=16, log_steps=1000) as engine:
        talker = engine.submit(prompt(3), params(0, 900))
        until(lambda: len(talker.events) > 2)
        reader = engine.submit(prompt(256), params(0, 1))
        reader.result(PATIENCE_S)
        talker.result(PATIENCE_S)
        steps = engine.step_log()
    reading = [step for step in steps if step.prompt_tokens]
    assert max(step.tokens for step in steps) <= 4 + 16
    both = [step for step in reading if step.decoding]
    assert len(both) == 256 // 16 and all(step.prompt_tokens <= 16 for step in both)
