"""Calibration of an endpoint on a labelled set: reading it, asking, fitting on one half, measuring on the other."""

import asyncio
import json
import math
import random

import httpx2
import pytest

from rorqual.errors import DataError
from rorqual.evals.calibrate import FORCED, Labelled, calibrate, identity, read_labelled
from rorqual.referee.confidence import Calibrator, UrlSource


async def knower(scope, receive, send):
    """A model that is right about even numbers with its stated probability, and lost on odd ones; 13 it declines."""
    body = json.loads((await receive())["body"])
    if scope["path"] != "/v1/chat/completions":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        return
    assert body["messages"][0] == {"role": "system", "content": FORCED}
    number = int("".join(c for c in body["messages"][-1]["content"] if c.isdigit()))
    draw = random.Random(number)
    chance = draw.uniform(0.6, 1.0) if number % 2 == 0 else draw.uniform(0.1, 0.6)
    text = f"value{number}" if number % 2 == 0 and draw.random() < chance else "nonsense"
    text = "I don't know." if number == 13 else text
    entry = {"token": text, "logprob": math.log(chance), "top_logprobs": []}
    answer = {"choices": [{"message": {"content": text}, "logprobs": {"content": [entry]}}]}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def calibrated(questions, **more):
    async def go():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=knower)) as client:
            source = UrlSource("http://up/v1", "m", client=client, system=FORCED)
            return await calibrate(source, questions, **more)

    return asyncio.run(go())


def test_a_set_is_asked_fitted_and_measured_on_what_was_held_back(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [{"question": f"What of {n}?", "answer": f"value{n}" if n % 2 == 0 else None} for n in range(600)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    seen = []
    found = calibrated(read_labelled(path), paraphrases=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600) and found.num_declined == 1
    assert found.calls == 601  # the prompt is tried to be read once
    assert found.figures["auroc"] > 0.9 and found.figures["ece"] < 0.12
    assert 200 < found.figures["held_out"] < 400
    assert found.calibrator.measured["auroc"] == found.figures["auroc"]
    assert [p.alpha for p in found.promises] == [0.05, 0.10]
    assert found.promises[0].threshold >= found.promises[1].threshold
    saved = found.calibrator.save(tmp_path / "c.json")
    assert Calibrator.load(saved, model_sha=identity("http://up", "m")) == found.calibrator


def test_answers_are_compared_as_people_read_them():
    one = Labelled("Where?", ("Oslo", "Kristiania"), "g")
    assert one.is_right("oslo.") and one.is_right(" Kristiania") and not one.is_right("Oslo or Rome")
    assert not Labelled("Where?", (), "g").is_right("")


@pytest.mark.parametrize(
    "line", ["[]", '{"question": "x"}', '{"question": "", "answer": "y"}', '{"question": "x", "answer": 3}', "{"]
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "a", "answer": ["b", "c"], "group": 4, "paraphrases": ["d"]}\n\n' + line + "\n")
    with pytest.raises(DataError, match="line 3"):
        read_labelled(path)
    path.write_text(path.read_text().splitlines()[0])
    assert read_labelled(path) == [Labelled("a", ("b", "c"), "4", None, ("d",))]
    with pytest.raises(DataError, match="cannot read"):
        read_labelled(tmp_path / "none.jsonl")
