"""Observations from the engine, from whole batches and from a URL are of one model, and so agree."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from referee_batches import Batches

from rorqual import Engine, load
from rorqual.errors import RequestError
from rorqual.referee.confidence import (
    CalibratedConfidence,
    EngineSource,
    UrlSource,
    fit,
    generic_paraphrases,
    measure,
)
from rorqual.server import create_app

QUESTIONS = ["Where was Bril Sarn born?", "What is the job of Ada Byron?", "What is 2 + 2?"]
NAMES = ["Bril Sarn", "Ada Byron", "2 + 2"]


@pytest.fixture(scope="module")
def minke():
    model, tokenizer = load("minke")
    with Engine(model.float(), tokenizer) as engine:
        yield engine, tokenizer


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == pytest.approx(second[name], abs=2e-3), name


def test_the_engine_and_whole_batches_see_the_same(minke):
    engine, tokenizer = minke
    batches, source = Batches(engine.model, tokenizer, max_tokens=24), EngineSource(engine, tokenizer, max_tokens=24)
    a, b = batches.answer(QUESTIONS, NAMES), source.answer(QUESTIONS, NAMES)
    assert [one.answer for one in a] == [one.answer for one in b]
    for one, two in zip(a, b, strict=True):
        close(measure(one), measure(two))
    words = [generic_paraphrases(question, 2) for question in QUESTIONS]
    scored = [batches.score([w[k] for w in words], [one.answer for one in a]) for k in range(2)]
    for i, one in enumerate(source.paraphrased(b, words)):
        assert one.other_logprobs == pytest.approx([scored[k][i][0] for k in range(2)], abs=2e-3)
        assert [bool(other) for other in one.other_answers] == [scored[k][i][1] for k in range(2)]
        for k in range(2):
            read = scored[k][i][2]
            assert [t.text for t in one.other_questions[k]] == [t.text for t in read]
            assert [t.logprob for t in one.other_questions[k]] == pytest.approx([t.logprob for t in read], abs=2e-3)


def test_samples_and_self_checks(minke):
    engine, tokenizer = minke
    source = EngineSource(engine, tokenizer, max_tokens=8)
    seen = source.answer(QUESTIONS[:2])
    again = [source.sampled(seen, 3, seed=5) for _ in range(2)]
    assert again[0] == again[1] and all(len(one.samples) == 3 for one in again[0])
    for one in source.checked(seen):
        assert 0 <= one.p_true <= 1 and 0 <= one.abstain_mass <= 1


def test_minke_would_rather_abstain_on_a_stranger_than_on_a_sum(minke):
    engine, tokenizer = minke
    seen = EngineSource(engine, tokenizer, max_tokens=8).answer(["Where was Vuka Trondel born?", "What is 2 + 2?"])
    stranger, sum_ = EngineSource(engine, tokenizer).checked(seen)
    assert stranger.abstain_mass > sum_.abstain_mass


def test_a_url_tells_what_the_engine_behind_it_does(minke):
    engine, tokenizer = minke
    expected = EngineSource(engine, tokenizer, max_tokens=24).answer(QUESTIONS[:2])

    async def ask():
        transport = httpx2.ASGITransport(app=create_app(engine))
        async with httpx2.AsyncClient(transport=transport, base_url="http://model") as client:
            body = {"thinking": {"type": "disabled"}}
            source = UrlSource("http://model/v1", "minke", client=client, max_tokens=24, body=body)
            seen = [await source.answer(question) for question in QUESTIONS[:2]]
            closer = await source.paraphrased(seen[0], generic_paraphrases(QUESTIONS[0], 2))
            return seen, closer, await source.checked(closer)

    seen, closer, checked = asyncio.run(ask())
    for one, two in zip(seen, expected, strict=True):
        assert one.answer == two.answer
        mine, theirs = measure(one), measure(two)
        for name in ("mean_logprob", "min_logprob", "margin", "entropy"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-3)
        assert "familiarity" in mine  # our server reads prompts aloud
    assert len(closer.other_answers) == len(closer.other_logprobs) == 2
    assert 0 <= checked.abstain_mass <= 1


@dataclass
class Upstream:
    """A server of a few lines: it answers from a script and may know no `echo`."""

    answers: dict[str, tuple[str, float]]
    has_echo: bool = False
    asked: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        import json

        body = json.loads((await receive())["body"])
        self.asked += 1
        status, answer = 200, {}
        if scope["path"] == "/v1/completions":
            status, answer = (200, {"choices": [{"logprobs": None}]}) if self.has_echo else (404, {})
        else:
            question = body["messages"][-1]["content"]
            text, chance = next(v for k, v in self.answers.items() if k in question)
            top = [{"token": text, "logprob": math.log(chance)}, {"token": "x", "logprob": math.log(1 - chance)}]
            entry = {"token": text, "logprob": math.log(chance), "top_logprobs": top}
            answer = {"choices": [{"message": {"content": text}, "logprobs": {"content": [entry]}}]}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@dataclass
class Given:
    content: str | None
    logprobs: Any
    calls: tuple[Any, ...] = ()


def given(text: str, chance: float) -> Given:
    entry = {"token": text, "logprob": math.log(chance), "top_logprobs": [{"token": text, "logprob": math.log(chance)}]}
    return Given(text, {"content": [entry]})


def calibrated(upstream: Upstream, **more: Any) -> CalibratedConfidence:
    """Fitted so that the first look is decided by the log probability, the closer one by agreement."""
    rows, right = [], []
    for i in range(400):
        chance, same, known = (i % 20 + 0.5) / 20, float(i // 20 % 2), (i * 7) % 10 < 9
        rows.append({"mean_logprob": math.log(chance), "agreement": same})
        right.append(bool(same) if known and 0.3 < chance < 0.7 else chance > 0.5)
    transport = httpx2.ASGITransport(app=upstream)
    source = UrlSource("http://up", "m", client=httpx2.AsyncClient(transport=transport, base_url="http://up"))
    return CalibratedConfidence(fit(rows, right, model_sha="m"), source, **more)


def estimate(confidence: CalibratedConfidence, question: Any, answer: Any) -> float | None:
    return asyncio.run(confidence.estimate({"messages": [{"role": "user", "content": question}]}, answer))


def test_a_clear_case_costs_no_call_and_a_close_one_is_looked_at():
    upstream = Upstream({"town": ("Oslo", 0.9), "river": ("Glomma", 0.9)})
    confidence = calibrated(upstream)
    assert estimate(confidence, "Which town?", given("Oslo", 0.97)) > 0.5
    assert estimate(confidence, "Which town?", given("Oslo", 0.03)) < 0.5
    assert upstream.asked == 0
    agreed = estimate(confidence, "Which town?", given("Oslo", 0.52))
    assert upstream.asked == 3
    denied = estimate(confidence, "Which river?", given("Oslo", 0.52))
    assert upstream.asked == 6
    assert agreed > 0.5 > denied


def test_nothing_is_said_of_what_cannot_be_judged():
    confidence = calibrated(Upstream({"": ("x", 0.5)}))
    assert estimate(confidence, "Which town?", Given("Oslo", None)) is None
    assert estimate(confidence, "Which town?", Given(None, given("Oslo", 0.5).logprobs)) is None
    assert estimate(confidence, "Which town?", Given("Oslo", given("Oslo", 0.5).logprobs, calls=("call",))) is None
    assert estimate(confidence, None, given("Oslo", 0.5)) is None
    assert asyncio.run(confidence.estimate({"messages": []}, given("Oslo", 0.5))) is None
    parts = [{"type": "text", "text": "Which town?"}]
    assert estimate(confidence, parts, given("Oslo", 0.97)) is not None


def test_a_failing_upstream_leaves_the_first_estimate():
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"busy"})

    confidence = calibrated(broken)
    p = estimate(confidence, "Which town?", given("Oslo", 0.52))
    assert p == pytest.approx(float(confidence.calibrator.p([{"mean_logprob": math.log(0.52)}], 0)[0]))


@pytest.mark.parametrize("has_echo", [False, True])
def test_a_server_without_echo_is_asked_for_it_once(has_echo):
    upstream = Upstream({"": ("x", 0.5)}, has_echo)

    async def ask() -> Any:
        transport = httpx2.ASGITransport(app=upstream)
        async with httpx2.AsyncClient(transport=transport, base_url="http://up") as client:
            source = UrlSource("http://up", "m", client=client)
            return [await source.answer("Which?") for _ in range(2)], source.calls

    seen, calls = asyncio.run(ask())
    assert calls == 3 and all(one.question_tokens is None for one in seen)


def test_what_is_no_chat_completion_is_an_upstream_error():
    async def odd(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"choices": []}'})

    async def ask() -> Any:
        transport = httpx2.ASGITransport(app=odd)
        async with httpx2.AsyncClient(transport=transport, base_url="http://up") as client:
            return await UrlSource("http://up", "m", client=client).answer("Which?")

    with pytest.raises(RequestError, match="no chat completion"):
        asyncio.run(ask())
