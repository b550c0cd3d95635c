"""The engine with models that weigh nothing: order, neighbours, limits, cancelling, failures."""

import ctypes
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mock_model import HashModel, MockModel, ScriptModel, byte_tokenizer

from rorqual.engine import Completion, Engine, SamplingParams, TokenEvent, Trajectory, sampler
from rorqual.engine.checks import as_array
from rorqual.errors import ConfigError, RequestError

TOKENIZER = byte_tokenizer()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(HashModel(), TOKENIZER, max_running=3, max_queued=4, chunk=16) as engine:
        yield engine


def model_of(engine: Engine) -> MockModel:
    assert isinstance(engine.model, MockModel)
    return engine.model


def reference(prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """Plain generation, one token after another."""
    model, ids = HashModel(), list(prompt)
    while len(ids) < len(prompt) + (params.max_tokens or 0):
        ids.append(sampler.sample(model.logits_after(ids), params, seed, len(ids)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_generation_equals_the_plain_loop(engine: Engine, length: int) -> None:
    prompt = [3 + i % 200 for i in range(length)]
    params = SamplingParams(max_tokens=12, seed=5, temperature=0.8)
    [out] = engine.generate(prompt, params)
    assert list(out.ids) == reference(prompt, params, 5)
    assert out.finish_reason == "length"
    assert (out.usage.prompt_tokens, out.usage.completion_tokens, out.usage.total_tokens) == (
        length,
        12,
        length + 12,
    )
    assert out.text == TOKENIZER.decode(out.ids)


def test_neighbours_do_not_matter(engine: Engine) -> None:
    prompts = [[10 + i] * (1 + 13 * i) for i in range(7)]
    params = [SamplingParams(max_tokens=20, seed=i, top_p=0.9) for i in range(7)]
    together = engine.generate(prompts, params)
    alone = [engine.generate(prompt, own)[0] for prompt, own in zip(prompts, params, strict=True)]
    assert [out.ids for out in together] == [out.ids for out in alone]
    assert [out.text for out in together] == [out.text for out in alone]


def test_a_fresh_seed_is_recorded_and_replays(engine: Engine) -> None:
    [first] = engine.generate("abc", SamplingParams(max_tokens=16))
    [again] = engine.generate("abc", SamplingParams(max_tokens=16, seed=first.seed))
    [other] = engine.generate("abc", SamplingParams(max_tokens=16))
    assert first.ids == again.ids != other.ids


def test_generation_can_be_resumed_from_the_middle(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=9)
    [whole] = engine.generate([5, 6], params)
    [rest] = engine.generate([5, 6, *whole.ids[:8]], params.replace(max_tokens=12))
    assert whole.ids == whole.ids[:8] + rest.ids


def test_the_end_token_stops_and_is_recorded_but_not_shown() -> None:
    with Engine(ScriptModel(lambda prompt: "Grüße 🐋"), TOKENIZER) as engine:
        [out] = engine.generate("<｜Assistant｜></think>")
    assert (out.text, out.finish_reason) == ("Grüße 🐋", "stop")
    assert out.ids[-1] == TOKENIZER.eos_token_id
    assert out.usage.completion_tokens == len("Grüße 🐋".encode()) + 1


def test_pieces_are_complete_characters() -> None:
    with Engine(ScriptModel(lambda prompt: "é🐋ü"), TOKENIZER) as engine:
        request = engine.submit(TOKENIZER.encode("<｜Assistant｜></think>"))
        pieces = [event.text for event in request]
    assert [piece for piece in pieces if piece] == ["é", "🐋", "ü"]
    with Engine(ScriptModel(lambda prompt: "🐋"), TOKENIZER) as engine:
        [cut] = engine.generate("<｜Assistant｜></think>", SamplingParams(max_tokens=3))
    assert (cut.text, cut.finish_reason) == ("\ufffd", "length")


def test_stop_strings_end_the_output_where_they_begin() -> None:
    with Engine(ScriptModel(lambda prompt: "one two three"), TOKENIZER) as engine:
        params = SamplingParams(stop=("two", "three"), logprobs=True)
        [out] = engine.generate("<｜Assistant｜></think>", params)
        assert (out.text, out.finish_reason) == ("one ", "stop")
        assert len(out.ids) == len("one two") == len(out.logprobs or ())


def test_stop_strings_do_not_match_inside_control_tokens() -> None:
    with Engine(ScriptModel(lambda prompt: "one</think>two"), TOKENIZER) as engine:
        [out] = engine.generate(
            "<｜Assistant｜><think>", SamplingParams(temperature=0, stop=("<", ">", "think", "eth"))
        )
    assert (out.text, out.finish_reason) == ("one</think>two", "stop")
    assert out.ids[-1] == TOKENIZER.eos_token_id


def test_rows_beyond_the_tokenizer_are_neither_read_nor_scored() -> None:
    model = HashModel()
    model.cfg.vocab_size += 5
    params = SamplingParams(max_tokens=2, logprobs=True, prompt_logprobs=True, top_logprobs=20)
    with Engine(model, TOKENIZER) as engine:
        [out] = engine.generate([5, 6, 7], params)
        with pytest.raises(RequestError, match=f"outside the vocabulary of {TOKENIZER.vocab_size} tokens"):
            engine.submit([5, TOKENIZER.vocab_size])
    assert out.prompt_scores is not None and out.top_logprobs is not None
    tops = [score.top_logprobs for score in out.prompt_scores] + list(out.top_logprobs)
    assert max(token for top in tops for token, _ in top) < TOKENIZER.vocab_size
    truth = torch.log_softmax(model.logits_after([5])[: TOKENIZER.vocab_size], dim=-1)
    assert out.prompt_scores[1].logprob == pytest.approx(float(truth[6]), abs=1e-5)


def test_stop_token_ids_end_the_output() -> None:
    letter = TOKENIZER.encode("w")[0]
    with Engine(ScriptModel(lambda prompt: "one two"), TOKENIZER) as engine:
        [out] = engine.generate("<｜Assistant｜></think>", SamplingParams(stop_token_ids=(letter,)))
    assert (out.text, out.finish_reason, out.ids[-1]) == ("one t", "stop", letter)


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    params = SamplingParams(max_tokens=5, seed=1, temperature=0.5, logprobs=True, top_logprobs=3)
    [out] = engine.generate([9, 8], params)
    assert out.logprobs is not None and out.top_logprobs is not None
    ids = [9, 8]
    for token, logprob, top in zip(out.ids, out.logprobs, out.top_logprobs, strict=True):
        truth = torch.log_softmax(HashModel().logits_after(ids), dim=-1)
        assert logprob == pytest.approx(float(truth[token]), abs=1e-5)
        assert [i for i, _ in top] == truth.argsort(descending=True)[:3].tolist()
        ids.append(token)


def test_prompt_tokens_can_be_scored_across_chunks(engine: Engine) -> None:
    prompt = [3 + i for i in range(37)]
    [out] = engine.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=True, top_logprobs=1))
    assert out.prompt_scores is not None
    assert [score.id for score in out.prompt_scores] == prompt
    assert out.prompt_scores[0].logprob is None
    for place in (1, 15, 16, 17, 36):
        truth = torch.log_softmax(HashModel().logits_after(prompt[:place]), dim=-1)
        assert out.prompt_scores[place].logprob == pytest.approx(float(truth[prompt[place]]), abs=1e-5)
        assert out.prompt_scores[place].top_logprobs[0][0] == int(truth.argmax())


def test_a_long_prompt_does_not_starve_its_neighbours() -> None:
    model = HashModel()
    with Engine(model, TOKENIZER, chunk=16) as engine:
        model.gate.clear()
        talker = engine.submit([3], SamplingParams(max_tokens=10))
        reader = engine.submit([4] * 160, SamplingParams(max_tokens=1))
        second = engine.submit([5] * 32, SamplingParams(max_tokens=1))
        model.gate.set()
        for request in (talker, reader, second):
            request.result(30)
    # While the long prompt was read, the talker got a token after every chunk, and the second reader every other one.
    order = [number for number, _ in model.chunks]
    assert order[0] == 0 and order[1:19:2] == [0] * 9
    read = [number for number in order if number]
    short, long = sorted(set(read), key=read.count)
    assert (read.count(short), read.count(long)) == (2, 10)
    assert read[:4] in ([long, short] * 2, [short, long] * 2)
    assert {count for number, count in model.chunks if number} == {16}


def test_requests_are_admitted_in_order_up_to_the_limit() -> None:
    model = HashModel()
    with Engine(model, TOKENIZER, max_running=2, max_queued=8) as engine:
        model.gate.clear()
        requests = [engine.submit([3 + i], SamplingParams(max_tokens=3)) for i in range(5)]
        deadline = time.monotonic() + 10
        while engine.occupancy()[0] < 1 and time.monotonic() < deadline:  # the engine waits in the first one's step
            time.sleep(0.005)
        model.gate.set()
        for request in requests:
            request.result(30)
    first_steps = [[number for number, _ in model.chunks].index(i) for i in range(5)]
    assert first_steps == sorted(first_steps)


def test_a_full_queue_refuses_with_429_and_generate_waits() -> None:
    model = HashModel()
    with Engine(model, TOKENIZER, max_running=1, max_queued=2) as engine:
        model.gate.clear()
        engine.submit([3], SamplingParams(max_tokens=1))
        deadline = time.monotonic() + 10
        while engine.occupancy()[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        for _ in range(2):
            engine.submit([3], SamplingParams(max_tokens=1))
        with pytest.raises(RequestError, match="Try again") as caught:
            engine.submit([3], SamplingParams(max_tokens=1))
        assert caught.value.status == 429
        threading.Timer(0.05, model.gate.set).start()
        assert len(engine.generate([[4]] * 9, SamplingParams(max_tokens=2))) == 9


def test_cancelling_while_running_and_while_waiting() -> None:
    model = HashModel()
    model.step_s = 0.002
    with Engine(model, TOKENIZER, max_running=1, max_queued=4) as engine:
        running = engine.submit([3])
        waiting = engine.submit([4])
        events = []
        for event in running:
            events.append(event)
            if len(events) == 3:
                waiting.cancel()
                running.cancel()
        assert events[-1] == TokenEvent(id=None, finish_reason="cancelled")
        assert running.result().finish_reason == "cancelled"
        assert len(running.result().ids) == len(events) - 1
        assert waiting.result(10).ids == ()
        assert engine.occupancy() == (0, 0)
        [after] = engine.generate([5], SamplingParams(max_tokens=2))
        assert after.finish_reason == "length"
        running.cancel()  # no effect any more


def test_the_context_limit_is_checked_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(RequestError, match="maximum context length is 4096 tokens.*requested 4097") as caught:
        engine.submit([3] * 4000, SamplingParams(max_tokens=97))
    assert caught.value.param == "max_tokens"
    with pytest.raises(RequestError, match="maximum context length") as caught:
        engine.submit([3] * 4096)
    assert caught.value.param == "messages"
    with Engine(HashModel(context=20), TOKENIZER) as small:
        [out] = small.generate([3] * 5)
        assert (len(out.ids), out.finish_reason) == (15, "length")


@pytest.mark.parametrize(
    ("tokens", "params", "text"),
    [
        ([], SamplingParams(), "no tokens"),
        ([275], SamplingParams(), "outside the vocabulary of 275"),
        ([-1], SamplingParams(), "outside the vocabulary"),
        ([1], SamplingParams(stop_token_ids=(999,)), "Token id 999 in stop_token_ids"),
    ],
)
def test_impossible_prompts_are_refused(engine: Engine, tokens: list[int], params: SamplingParams, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        engine.submit(tokens, params)


class FailsOn7(HashModel):
    def logits_after(self, ids: list[int]) -> torch.Tensor:
        if ids[0] == 7 and len(ids) > 3:
            raise ValueError("boom")
        logits = super().logits_after(ids)
        return logits * math.nan if ids[0] == 8 else logits


def test_a_failing_request_gets_an_error_and_the_others_go_on() -> None:
    with Engine(FailsOn7(), TOKENIZER) as engine:
        bad = engine.submit([7], SamplingParams(max_tokens=9))
        nan = engine.submit([8], SamplingParams(max_tokens=9))
        good = engine.submit([9], SamplingParams(max_tokens=9))
        with pytest.raises(RequestError, match="ValueError: boom") as caught:
            list(bad)
        assert caught.value.status == 500
        with pytest.raises(RequestError, match="ValueError: boom"):
            bad.result(10)
        with pytest.raises(RequestError, match="no token can be chosen"):
            nan.result(10)
        assert len(good.result(10).ids) == 9
        assert engine.is_alive
        with pytest.raises(RequestError, match="boom"):
            engine.generate([[9], [7], [9]], SamplingParams(max_tokens=9))


def test_a_broken_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HashModel()
    with Engine(model, TOKENIZER, max_running=1) as engine:
        model.gate.clear()
        requests = [engine.submit([3]), engine.submit([4])]
        monkeypatch.setattr(engine._scheduler, "next_round", lambda: 1 / 0)
        model.gate.set()
        for request in requests:
            with pytest.raises(RequestError, match="ZeroDivisionError"):
                request.result(10)
        with pytest.raises(RequestError, match="ZeroDivisionError"):
            engine.submit([3])


def test_closing_fails_what_is_unfinished() -> None:
    model = HashModel()
    model.step_s = 0.005
    engine = Engine(model, TOKENIZER, max_running=1)
    requests = [engine.submit([3]), engine.submit([4])]
    engine.close()
    engine.close()
    for request in requests:
        with pytest.raises(RequestError, match="closed") as caught:
            request.result(10)
        assert caught.value.status == 503
    with pytest.raises(RequestError, match="closed"):
        engine.submit([3])


def test_a_listener_gets_the_events_and_may_fail() -> None:
    with Engine(HashModel(), TOKENIZER) as engine:
        seen: list[TokenEvent] = []
        request = engine.submit([3], SamplingParams(max_tokens=4), listener=seen.append)
        assert list(request.result(10).ids) == [event.id for event in seen]
        with pytest.raises(RuntimeError, match="listener"):
            next(iter(request))

        def gone(event: TokenEvent) -> None:
            raise RuntimeError("event loop is closed")

        assert engine.submit([3], listener=gone).result(10).finish_reason == "cancelled"
        assert isinstance(engine.generate([3], SamplingParams(max_tokens=1))[0], Completion)


def test_result_times_out() -> None:
    model = HashModel()
    with Engine(model, TOKENIZER) as engine:
        model.gate.clear()
        request = engine.submit([3], SamplingParams(max_tokens=1))
        with pytest.raises(TimeoutError, match="still runs"):
            request.result(0.01)
        model.gate.set()
        request.result(10)


@pytest.mark.parametrize("limits", [{"max_running": 0}, {"max_queued": 0}, {"chunk": 0}])
def test_impossible_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="Set it to 1 or more"):
        Engine(HashModel(), TOKENIZER, **limits)


def test_params_must_match_the_prompts(engine: Engine) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 params"):
        engine.generate([[3], [4]], [SamplingParams()])


def test_trajectory_keeps_ids_logprobs_and_mask_together() -> None:
    trajectory = Trajectory()
    trajectory.add_given([1, 2])
    trajectory.add_chosen([3], [-0.5], policy_version=4)
    trajectory.add_given([5])
    assert trajectory == Trajectory([1, 2, 3, 5], [0.0, 0.0, -0.5, 0.0], [False, False, True, False], 4)
    assert len(trajectory) == 4
    with pytest.raises(RequestError, match="2 sampled ids came with 1 logprobs"):
        trajectory.add_chosen([1, 2], [0.0])
    with pytest.raises(RequestError, match="Make them equally long"):
        Trajectory([1], [], [])


def test_ids_become_an_array_or_are_left_to_the_check() -> None:
    for tokens in ((3, 1, 2), [3, 1, 2], np.array([3, 1, 2]), tuple(np.array([3, 1, 2]))):
        ids = as_array(tokens)
        assert ids is not None and ids.dtype == np.int32 and ids.tolist() == [3, 1, 2] and ids.flags.writeable
    for tokens in ((), (1, 1 << 31), (1, -(1 << 31) - 1), (1, "2"), (1.5,), [1, 1 << 40], [[1]], [1 << 80]):
        assert as_array(tokens) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"context_limit": 0}, "context_limit is 0"),
        ({"gap_s": -1}, "gap_s is -1"),
        ({"gap_s": float("nan")}, "gap_s is nan"),
        ({"max_running": "8"}, "max_running is '8'"),
        ({"chunk": 1.5}, "chunk is 1.5"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Engine(ScriptModel(lambda prompt: "x"), byte_tokenizer(), **limits)


@pytest.mark.parametrize(
    ("tokens", "options", "param"),
    [
        (["a"], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([[1]], {}, "prompt"),
        ([1], {"priority": "high"}, "priority"),
    ],
)
def test_what_is_no_token_id_and_no_priority_is_refused_by_name(tokens: Any, options: Any, param: str) -> None:
    with Engine(ScriptModel(lambda prompt: "x"), byte_tokenizer()) as engine:
        with pytest.raises(RequestError) as refused:
            engine.submit(tokens, SamplingParams(max_tokens=1), **options)
        assert refused.value.param == param
        every = SamplingParams(max_tokens=1, suppress_token_ids=range(byte_tokenizer().vocab_size))
        with pytest.raises(RequestError, match="names all"):
            engine.submit([1], every)
        assert engine.submit([1], SamplingParams(max_tokens=1)).result().ids, "and it goes on"


def test_the_engines_thread_uses_as_many_threads_as_were_set() -> None:
    """OpenMP asks each new thread anew, and C operations do not go through torch's own parallel loops."""
    found = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    if found is None:
        pytest.skip("torch brings no libgomp here")
    openmp, seen, before = ctypes.CDLL(str(found)), [], torch.get_num_threads()

    class Watched(HashModel):
        def forward_streams(self, tokens: torch.Tensor, *, state: Any) -> torch.Tensor:
            seen.append(openmp.omp_get_max_threads())
            return super().forward_streams(tokens, state=state)

    torch.set_num_threads(1)
    try:
        with Engine(Watched(), TOKENIZER) as engine:
            engine.generate([1, 2, 3], SamplingParams(max_tokens=2))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
