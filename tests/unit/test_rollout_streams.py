"""Rollouts while a trainer works: the bound on staleness, and behind a server: whose log probabilities count."""

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from live_server import live
from mock_model import byte_tokenizer
from rollout_models import SAMPLING, flat, tiny_engine, tiny_policy, tiny_prompts, told

from rorqual.engine import SamplingParams
from rorqual.errors import ConfigError, RequestError
from rorqual.model import Transformer
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import Prompt, RolloutWorker
from rorqual.posttrain.rollouts_batch import RolloutBatch
from rorqual.posttrain.rollouts_server import ServerRollouts, correct, token_names
from rorqual.posttrain.rollouts_stream import RolloutStream
from rorqual.posttrain.scoring import token_logprobs
from rorqual.server import create_app

SHORT = SAMPLING.replace(max_tokens=12)


@pytest.mark.parametrize("max_staleness", [1, *(pytest.param(most, marks=pytest.mark.slow) for most in (0, 3))])
def test_no_token_is_older_than_the_bound_and_every_group_is_trained_on(max_staleness: int) -> None:
    prompts = tiny_prompts(12)
    with tiny_engine(tiny_policy()) as engine:
        worker = RolloutWorker(engine)
        batches = []
        with RolloutStream(worker, prompts, 2, SHORT, batch_groups=2, max_staleness=max_staleness) as stream:
            for batch in stream:
                for group in batch:
                    assert 0 <= stream.age(group) <= max_staleness
                    for one in group:
                        drawn = [version for version in one.versions if version >= 0]
                        assert drawn == sorted(drawn) and stream.version - drawn[0] <= max_staleness
                batches.append([group[0].prompt_id for group in batch])
                stream.publish(tiny_policy(seed=len(batches)).state_dict() if len(batches) < 3 else None)
            assert stream.dropped == 0 and stream.version == 6
            assert max(stream.staleness) <= max_staleness
    assert batches == [[f"p{n}", f"p{n + 1}"] for n in range(0, 12, 2)]


def test_with_turns_every_batch_is_drawn_by_the_newest_weights() -> None:
    with (
        tiny_engine(tiny_policy()) as engine,
        RolloutStream(RolloutWorker(engine), tiny_prompts(6), 2, SHORT, batch_groups=2, max_staleness=0) as stream,
    ):
        for step, batch in enumerate(stream):
            assert {version for one in flat(batch) for version in one.versions} == {-1, step}
            stream.publish()


def test_groups_in_flight_go_on_with_published_weights() -> None:
    """Nothing is begun again and nothing is lost: what the second batch had begun goes on under the next version."""
    prompts = tiny_prompts(2)
    endless = SamplingParams(max_tokens=200, suppress_token_ids=(byte_tokenizer().eos_token_id,))
    with tiny_engine(tiny_policy(), max_running=4) as engine:
        worker = RolloutWorker(engine, in_flight=4)
        with RolloutStream(worker, prompts, 2, endless, batch_groups=1, max_staleness=1) as stream:
            keep = worker._keep
            published: list[int] = []

            def keep_and_publish(run: Any, event: Any) -> None:
                keep(run, event)
                if run.id == "p1/0" and len(run.drawn.ids) == 50 and not published:
                    published.append(1)
                    worker.update_weights({}, 1)

            worker._keep = keep_and_publish  # type: ignore[method-assign]
            first, second = stream.batch(), stream.batch()
    assert len(first) == len(second) == 1
    for one in flat(second):
        assert len(one.answer) == 200 and {0, 1} == set(one.versions) - {-1}


def test_what_is_finished_first_may_be_taken_and_what_is_too_old_is_dropped() -> None:
    prompts = (Prompt(f"q{n}", (5, 6, 7 + n)) for n in range(40))
    with (
        tiny_engine(tiny_policy()) as engine,
        RolloutStream(
            RolloutWorker(engine), prompts, 2, SHORT, batch_groups=2, max_staleness=1, order="finished"
        ) as stream,
    ):
        seen = 0
        for batch in stream:
            seen += len(batch)
            assert all(stream.age(group) <= 1 for group in batch)
            stream.publish()
            stream.publish()  # a trainer that makes two updates of a batch: the next ones are older than planned
        assert stream.dropped > 0 and seen + stream.dropped == 40


def test_a_closed_stream_leaves_nothing_running() -> None:
    with tiny_engine(tiny_policy()) as engine:
        with RolloutStream(RolloutWorker(engine), tiny_prompts(8), 4, SAMPLING, batch_groups=2) as stream:
            stream.batch()
        assert engine.occupancy() == (0, 0)
        with pytest.raises(ConfigError, match="max_staleness=-1"):
            RolloutStream(RolloutWorker(engine), [], 1, batch_groups=1, max_staleness=-1)


@pytest.mark.parametrize("waits", [True, False])
def test_the_failure_of_any_group_reaches_the_trainer_at_once(waits: bool) -> None:
    """While it waits for another group that is far from whole, and where it asks or publishes without waiting."""
    endless = SamplingParams(max_tokens=100_000, suppress_token_ids=(byte_tokenizer().eos_token_id,))
    with tiny_engine(tiny_policy()) as engine:
        worker = RolloutWorker(engine)
        keep = worker._keep

        def failing(run: Any, event: Any) -> None:
            if run.prompt.id == "p3" and len(run.drawn.ids) == 3:
                raise OSError("the disk is full")
            if run.prompt.id != "p3":
                gate.wait(0.01)
            keep(run, event)

        gate = threading.Event()
        worker._keep = failing  # type: ignore[method-assign]
        endless = endless.replace(max_tokens=engine.context_limit - 64)
        with RolloutStream(worker, tiny_prompts(4), 1, endless, batch_groups=2, max_staleness=1) as stream:
            if waits:
                with pytest.raises(OSError, match="disk is full"):
                    stream.batch()
            else:
                end = time.monotonic() + 60
                while stream._failure is None and time.monotonic() < end:
                    time.sleep(0.01)
                for call in (stream.check, stream.publish, stream.batch):
                    with pytest.raises(OSError, match="disk is full"):
                        call()
            assert max(worker.running.values(), default=0) < endless.max_tokens  # type: ignore[type-var]
            assert len(worker.running) >= 3  # the others were under way and had not ended


# --------------------------------------------------------------------------------------------------------- servers


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_policy()


@pytest.fixture(scope="module")
def url(model: Transformer) -> Iterator[str]:
    with tiny_engine(model) as engine, live(create_app(engine, "minke")) as url:
        yield url


def scorer(model: Transformer) -> Any:
    choices = byte_tokenizer().vocab_size

    def score(batch: RolloutBatch) -> torch.Tensor:
        rows, length = batch.logprobs.shape
        mask = torch.arange(choices).expand(rows, length, choices)  # the head has padding rows
        with torch.no_grad():
            return token_logprobs(model, batch.ids, None, 1.0, mask, lengths=batch.lengths, wanted=batch.chosen)

    return score


def test_a_server_is_a_rollout_engine_with_its_own_log_probabilities(model: Transformer, url: str) -> None:
    source = ServerRollouts(url, byte_tokenizer(), version=lambda: 4, reward=lambda prompt, one: float(len(one.answer)))
    made = flat(source.generate(tiny_prompts(3), 3, SAMPLING))
    source.close()
    assert len({tuple(one.answer) for one in made}) > 5
    eos = byte_tokenizer().eos_token_id
    for one in made:
        assert one.truncated == (one.answer[-1] != eos) and one.reward == len(one.answer)
        assert set(one.versions) == {-1, 4}
    correct(made, scorer(model))  # the trainer has the server's weights: nothing to correct
    for one in made:
        for ours, theirs, weight, chosen in zip(
            one.trajectory.logprobs, one.server_logprobs, one.importance, one.trajectory.mask, strict=True
        ):
            assert ours == pytest.approx(theirs, abs=1e-4) and weight == pytest.approx(1.0, abs=1e-4)
            assert chosen or (theirs == 0.0 and weight == 1.0)


def test_other_weights_are_corrected_and_truncated(url: str) -> None:
    made = flat(ServerRollouts(url, byte_tokenizer()).generate(tiny_prompts(2), 3, SAMPLING))
    other, cap = tiny_policy(seed=5), 1.5
    correct(made, scorer(other), cap)
    weights = [
        (weight, math.exp(ours - theirs))
        for one in made
        for ours, theirs, weight, chosen in zip(
            one.trajectory.logprobs, one.server_logprobs, one.importance, one.trajectory.mask, strict=True
        )
        if chosen
    ]
    assert all(weight == pytest.approx(min(ratio, cap), rel=1e-6) for weight, ratio in weights)
    assert any(ratio > cap for _, ratio in weights) and any(ratio < 1 for _, ratio in weights)
    with pytest.raises(ConfigError, match="cap"):
        correct(made, scorer(other), 0.5)


def test_a_reply_that_breaks_off_goes_on_behind_its_last_token(url: str, tmp_path: Any) -> None:
    """And what is on record is not asked for again."""
    with RolloutLog(tmp_path, sync=False) as log:
        source = ServerRollouts(url, byte_tokenizer(), log=log, parallel=1)
        choices, asked = source._choices, []

        def breaking(body: Any) -> Iterator[dict[str, Any]]:
            asked.append(list(body["prompt"]))
            for number, choice in enumerate(choices(body)):
                if number == 5 and len(asked) < 4:
                    raise RequestError("the connection broke", status=502)
                yield choice

        source._choices = breaking  # type: ignore[method-assign]
        endless = SamplingParams(max_tokens=30)
        [one] = flat(source.generate([Prompt("p", (5, 6, 7, 8))], 1, endless))
        assert all(ids == one.trajectory.ids[: len(ids)] for ids in asked)
        assert [len(ids) for ids in asked] == sorted({len(ids) for ids in asked})
        source._choices = choices  # type: ignore[method-assign]
        again = ServerRollouts("http://127.0.0.1:9", byte_tokenizer(), model=source.model, log=log)  # nobody there
        assert told(flat(again.generate([Prompt("p", (5, 6, 7, 8))], 1, endless))) == told([one])


def answering(*lines: str) -> httpx2.Client:
    body = "".join(f"data: {line}\n\n" for line in lines)
    return httpx2.Client(transport=httpx2.MockTransport(lambda request: httpx2.Response(200, text=body)))


@pytest.mark.parametrize(
    ("piece", "logprobs"),
    [
        ('"token_ids": [70, 71], "logprobs": {"tokens": ["x", "y"], "token_logprobs": [-1.0, -2.0]}', [-1.0, -2.0]),
        ('"logprobs": {"tokens": ["token_id:70", "token_id:71"], "token_logprobs": [-1.0, -2.0]}', [-1.0, -2.0]),
        ('"token_ids": [70, 71], "logprobs": null', None),
    ],
    ids=["ids", "named ids", "no logprobs"],
)
def test_other_servers_ways_to_name_tokens(model: Transformer, piece: str, logprobs: list[float] | None) -> None:
    """An end token that is not shown is added; where no log probability is told, the weight is 1."""
    source = ServerRollouts("http://127.0.0.1:9", byte_tokenizer(), model="m")
    source._client = answering(f'{{"choices": [{{"text": "", {piece}, "finish_reason": "stop"}}]}}', "[DONE]")
    [one] = flat(source.generate(tiny_prompts(1), 1, SAMPLING))
    assert one.answer == [70, 71, byte_tokenizer().eos_token_id]
    told_of = one.server_logprobs[-3:]
    assert math.isnan(told_of[2])
    assert told_of[:2] == logprobs if logprobs is not None else all(map(math.isnan, told_of))
    correct([one], scorer(model))
    assert one.importance[-1] == 1.0 and (one.importance[-2] == 1.0) == (logprobs is None)
    assert not any(map(math.isnan, one.trajectory.logprobs))


def test_what_a_server_cannot_be_asked_is_refused() -> None:
    source = ServerRollouts("http://127.0.0.1:9", byte_tokenizer(), model="m")
    for sampling in (SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), SamplingParams(stop="x")):
        with pytest.raises(RequestError, match="temperature 1 and no filters"):
            next(source.generate(tiny_prompts(1), 1, sampling))
    source._client = answering('{"choices": [{"text": "hello", "finish_reason": "stop"}]}')
    with pytest.raises(RequestError, match="without token_ids or logprobs"):
        next(source.generate(tiny_prompts(1), 1, SAMPLING))
    with pytest.raises(ConfigError, match="no address"):
        ServerRollouts("minke", byte_tokenizer())


def test_every_token_has_a_name_of_its_own() -> None:
    names = token_names(byte_tokenizer())
    assert set(names.values()) == set(range(byte_tokenizer().vocab_size))
    assert names["a"] == byte_tokenizer().encode("a")[0]
