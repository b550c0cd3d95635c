"""Work on the side: done in pieces, whatever else the engine does, without holding requests up for long."""

import threading
import time
from collections.abc import Generator

import pytest
from mock_model import HashModel, byte_tokenizer

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.aside import MOST_WAITING, SHARE
from rorqual.errors import RequestError

LONG = SamplingParams(max_tokens=60, temperature=0)


def pieces(count: int, seconds: float = 0.0) -> Generator[None, None, str]:
    for _ in range(count):
        time.sleep(seconds)
        yield
    return threading.current_thread().name


def test_it_runs_on_the_engines_thread_and_returns_its_value() -> None:
    with Engine(HashModel(), byte_tokenizer()) as engine:
        assert engine.aside(pieces(5)).result(10) == "rorqual-engine"
        assert engine.generate("abc", SamplingParams(max_tokens=3))[0].ids


def test_requests_get_most_of_the_time() -> None:
    """Beside a request, pieces get their share of the steps' time and one piece more, not every round."""
    model = HashModel()
    model.step_s = 0.005
    with Engine(model, byte_tokenizer()) as engine:
        request = engine.submit([65], LONG)
        side = engine.aside(pieces(10_000, 0.005))
        began = time.perf_counter()
        request.result(30)
        took = time.perf_counter() - began
        alone = engine.stats().busy_s
        assert took < alone * (1 + SHARE) + 0.3
        assert not side.done()


def test_a_failure_stays_its_own() -> None:
    def fails() -> Generator[None, None, None]:
        yield
        raise RequestError("cannot")

    with Engine(HashModel(), byte_tokenizer()) as engine:
        with pytest.raises(RequestError, match="cannot"):
            engine.aside(fails()).result(10)
        assert engine.is_alive and engine.aside(pieces(1)).result(10)


def test_too_much_is_refused_and_closing_ends_the_rest() -> None:
    model = HashModel()
    with Engine(model, byte_tokenizer()) as engine:
        model.gate.clear()  # the engine stands in a step
        request = engine.submit([65], LONG)
        while engine.requests()[0].phase == "waiting":
            time.sleep(0.001)
        futures = [engine.aside(pieces(3)) for _ in range(MOST_WAITING)]
        with pytest.raises(RequestError) as error:
            engine.aside(pieces(3))
        assert error.value.status == 429
        futures[0].cancel()
        closing = threading.Thread(target=engine.close)
        closing.start()
        model.gate.set()
        closing.join(30)
    for future in futures[1:]:
        with pytest.raises(RequestError) as error:
            future.result(10)
        assert error.value.status == 503
    assert request.error is not None
    with pytest.raises(RequestError) as error:
        engine.aside(pieces(1))
    assert error.value.status == 503
