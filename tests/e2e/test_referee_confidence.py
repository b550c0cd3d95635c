"""From somebody's labelled questions to a referee that withholds what is too unsure, over real sockets."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live_server import live
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.cli.referee import _confidence
from rorqual.errors import ConfigError
from rorqual.referee import Options, Policy, Referee
from rorqual.referee.policy import PROFILES
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream

ASKED: list[dict[str, Any]] = []


async def knower(request: Request) -> Response:
    """Right about even numbers, and sure of it; lost on odd ones. Model `plain` refuses to tell log probabilities."""
    body = await request.json()
    ASKED.append(body)
    if body["model"] == "plain" and body.get("logprobs"):
        return JSONResponse({"error": {"message": "logprobs are not supported"}}, 400)
    number = int("".join(c for c in body["messages"][-1]["content"] if c.isdigit()))
    draw = random.Random(number)
    chance = draw.uniform(0.9, 1.0) if number % 2 == 0 else draw.uniform(0.1, 0.4)
    text = f"value{number}" if number % 2 == 0 else f"nonsense{draw.randrange(9)}"
    entry = {"token": text, "logprob": math.log(chance), "bytes": None, "top_logprobs": []}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [entry]}
    return JSONResponse({"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]})


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    app: Any = Starlette(routes=[Route("/v1/chat/completions", knower, methods=["POST"])])
    with live(app) as url:
        yield url


@pytest.fixture(scope="module")
def calibration(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    lines = [{"question": f"What of {n}?", "answer": f"value{n}" if n % 2 == 0 else None} for n in range(240)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [
        *(sys.executable, "-m", "rorqual", "referee", "calibrate", "--upstream", upstream, "--model-name", "knower"),
        *("--set", str(folder / "set.jsonl"), "--paraphrases", "0", "--out", str(folder / "c.json"), "--json"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["figures"]["auroc"] > 0.95 and set(told["thresholds"]) == {"0.05", "0.1"}
    return folder / "c.json"


@pytest.fixture
def referee(upstream: str, calibration: Path) -> Iterator[httpx2.Client]:
    sure = _confidence(calibration, "knower", upstream, "assistant")
    gateway = Gateway(Upstream(upstream), Options("enforce", Policy(PROFILES["assistant"])), Referee(confidence=sure))
    app: Any = create_gateway(gateway)
    with live(app) as url, httpx2.Client(base_url=url) as client:
        yield client


def ask(client: httpx2.Client, number: int, model: str = "knower", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"What of {number}?"}], **more}
    answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer


def test_sure_answers_pass_and_unsure_ones_are_withheld(referee: httpx2.Client) -> None:
    for number in range(1000, 1006):  # questions that it was not calibrated on
        answer = ask(referee, number)
        [choice] = answer["choices"]
        is_right = number % 2 == 0
        assert (choice["message"]["content"] == f"value{number}") == is_right
        assert answer["referee"]["verdict"] == ("pass" if is_right else "abstained")
        assert (answer["referee"]["p_correct"] > 0.75) == is_right
        assert "nonsense" not in json.dumps(choice)
        assert choice["logprobs"] is None  # this client did not ask for them
    assert ask(referee, 1000, logprobs=True)["choices"][0]["logprobs"]["content"]


def test_where_nothing_can_be_said_nothing_is_withheld(referee: httpx2.Client) -> None:
    """A model without a calibration, and an upstream that refuses log probabilities, whose answers still come."""
    for model in ("another", "plain"):
        answer = ask(referee, 1001, model)
        assert "nonsense" in answer["choices"][0]["message"]["content"]
        assert answer["referee"]["p_correct"] is None and answer["referee"]["verdict"] == "pass"
    assert not ASKED[-1].get("logprobs") and ASKED[-2].get("logprobs")


@pytest.mark.slow
def test_a_trial_shows_what_it_is_worth(upstream: str, calibration: Path, tmp_path: Path) -> None:
    lines = [
        {"question": f"What of {n}?"} | ({"answer": f"value{n}"} if n % 2 == 0 else {"unanswerable": True})
        for n in range(2000, 2040)
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [
        *(sys.executable, "-m", "rorqual", "referee", "trial", "--upstream", upstream, "--model-name", "knower"),
        *("--set", str(tmp_path / "set.jsonl"), "--confidence", str(calibration), "--out", str(tmp_path / "out")),
    ]
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["settings"]["confidence_id"] and result["n"] == 40
    wrong = {kind: row["wrong"] for kind, row in result["by_kind"].items()}
    assert wrong == {"answer": [0, 0], "unanswerable": [20, 0]}  # before and after
    assert result["headline"]["RET"] == 1.0


def test_a_calibration_of_another_model_is_refused(upstream: str, calibration: Path) -> None:
    with pytest.raises(ConfigError):
        _confidence(calibration, "another", upstream, "chat")
    with pytest.raises(ConfigError, match="belong together"):
        _confidence(calibration, None, upstream, "chat")
