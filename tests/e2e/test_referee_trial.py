"""`rorqual referee trial`: paired answers before and after, whose figures are counted again here by hand."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from live_server import live
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.cli import main
from rorqual.evals.records import read_records
from rorqual.evals.statistics import mcnemar_exact, wilson

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]},
    },
}
# question, the set's line, and what the endpoint says the first time and after
SUM = "Our list: 17 apples and 25 pears. How many fruits?"
LINES: list[tuple[dict[str, Any], list[str | dict[str, Any]]]] = [
    ({"question": "Capital of Norway?", "answer": ["Oslo", "Kristiania"]}, ["It is Oslo."]),
    ({"question": "Capital of Peru?", "answer": "Lima"}, ["Quito."]),
    ({"question": SUM, "answer": 42}, ["17 + 25 = 43", "42"]),
    ({"question": "Give n as JSON.", "schema": SCHEMA}, ['{"n": 3,}']),
    ({"question": "Give n, twice.", "schema": SCHEMA, "answer": {"n": 4}}, ['{"n": "x"}', '{"n": "y"}', '{"n": "z"}']),
    ({"question": "Who won?", "evidence": "The final was called off.", "unanswerable": True}, ["I don't know."]),
    ({"question": "Who lost?", "evidence": ["No final was held."], "unanswerable": True}, ["The whales."]),
    (
        {
            "messages": [{"role": "user", "content": "Weather of three days?"}],
            "tools": [TOOL],
            "answer": {"name": "weather", "arguments": {"days": 3}},
        },
        [{"name": "weather", "arguments": '{"days": "3"}'}],
    ),
]
GRADES = "CIIIIAII", "CICCAAIC"


class Endpoint:
    """Answers by the question; counts what it was asked."""

    def __init__(self, lines: list[tuple[dict[str, Any], list[Any]]]) -> None:
        self.said = {self.question(line): answers for line, answers in lines}
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.takes_schema = True

    @staticmethod
    def question(line: dict[str, Any]) -> str:
        return str(line["messages"][0]["content"] if "messages" in line else line["question"])

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        if not self.takes_schema and body.get("response_format", {}).get("type") == "json_schema":
            return JSONResponse({"error": {"message": "response_format: json_schema is not available"}}, 400)
        text = next(m["content"] for m in body["messages"] if m["role"] == "user")
        question = next(one for one in self.said if text.endswith(one))
        with self.lock:
            turn, self.asked[question] = self.asked[question], self.asked[question] + 1
            self.bodies.append(body)
        answers = self.said[question]
        says = answers[min(turn, len(answers) - 1)]
        message: dict[str, Any] = {"role": "assistant", "content": says}
        if isinstance(says, dict):
            call = {"id": "c1", "type": "function", "function": says}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if isinstance(says, dict) else "stop"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
        return JSONResponse({"id": "a", "object": "chat.completion", "choices": [choice], "usage": usage})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/v1/chat/completions", self.chat, methods=["POST"]), Route("/v1/models", self.models)]
        )


def write_set(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
    return path


def run(endpoint: Endpoint, file: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    with live(endpoint.app()) as url, pytest.raises(SystemExit) as ended:  # type: ignore[arg-type]
        main(["referee", "trial", "--upstream", url, "--set", str(file), "--out", str(folder), "--json", *more])
    told = capsys.readouterr()
    result: dict[str, Any] = json.loads(told.out)
    assert ended.value.code in ((0, None) if result["valid"] else (1,)), told.err
    return result


def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder, endpoint = (
        write_set(tmp_path / "my.jsonl", [line for line, _ in LINES]),
        tmp_path / "t",
        Endpoint(LINES),
    )
    result = run(endpoint, file, folder, capsys, "--price", "0.1,1,2")
    bare, after = (read_records(folder / f"{name}.jsonl") for name in ("bare", "referee"))
    by_line = [{r.item_id: r.grade for r in records} for records in (bare, after)]
    names = [f"line-{1 + 2 * i}" for i in range(len(LINES))]
    assert tuple("".join(grades[name] for name in names) for grades in by_line) == GRADES
    before, later = result["before"], result["after"]
    for grades, arm in zip(GRADES, (before, later), strict=True):
        expected = wilson(grades.count("I"), len(grades))
        assert expected is not None and arm["wrong"] == {
            "value": expected.value,
            "low": expected.low,
            "high": expected.high,
        }
        assert arm["HR"] == grades.count("I") / (len(grades) - grades.count("C"))
        assert arm["OI"] == 100 * (grades.count("C") - grades.count("I")) / len(grades)
    cured = sum(b == "I" != a for b, a in zip(*GRADES, strict=True))
    assert result["change"]["wrong"] == {"difference": -cured / len(LINES), "p": mcnemar_exact(cured, 0)}
    assert result["change"]["RET"] == 1.0 and result["change"]["right_to_wrong"]["n"] == 0
    assert result["headline"] == {"HR": later["HR"], "RET": 1.0, "OI": later["OI"]}
    # cost: every upstream call is paid, those of further rounds by the referee's arm alone
    calls, questions = len(endpoint.bodies), len(LINES)
    assert before["cost"] == pytest.approx(questions * (1000 * 1 + 200 * 2) / 1e6)
    assert later["cost"] == pytest.approx(calls * (1000 * 1 + 200 * 2) / 1e6) and calls > questions
    assert later["tokens"]["completion"] == 200 * calls
    assert result["change"]["VER"] == (calls - questions) / questions
    assert all(a.t_total_ms >= b.t_total_ms for b, a in zip(bare, after, strict=True))
    assert sum(result["verdicts"].values()) == questions and "arith_wrong" in result["reasons"]
    told = next(body for body in endpoint.bodies if body["messages"][0]["content"].endswith("Who won?"))
    assert told["messages"][0]["content"] == "[doc-1] The final was called off.\n\nWho won?"
    assert not any("referee" in body for body in endpoint.bodies)
    page = Path(result["report"]).read_text()
    # C, A of an unanswerable one, P, other A, I
    assert "before: 1 right, 1 rightly declined, 0 partly right, 0 not answered, 6 wrong" in page
    assert "after: 4 right, 1 rightly declined, 0 partly right, 1 not answered, 2 wrong" in page
    assert "<svg role=" in page and "src=" not in page and "href=" not in page and "<script" not in page
    assert json.loads((folder / "result.json").read_text()) == result


def test_resuming_asks_only_what_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = write_set(tmp_path / "my.jsonl", [line for line, _ in LINES]), tmp_path / "t"
    endpoint = Endpoint(LINES)
    with live(endpoint.app()) as url:  # type: ignore[arg-type]
        arguments = ["referee", "trial", "--upstream", url, "--set", str(file), "--out", str(folder), "--json"]
        with pytest.raises(SystemExit):
            main(arguments)
        whole = json.loads(capsys.readouterr().out)
        for name, kept in (("bare", 4), ("referee", 3)):
            path = folder / f"{name}.jsonl"
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]) + b'{"run_id": "half a li')
        done = {record.item_id for record in read_records(folder / "referee.jsonl")}
        endpoint.asked.clear()
        with pytest.raises(SystemExit):
            main(arguments)
        again = json.loads(capsys.readouterr().out)
        assert len(endpoint.asked) == len(LINES) - len(done)
        assert again["after"]["grades"] == whole["after"]["grades"] and again["run_id"] == whole["run_id"]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--mode", "annotate"])
        assert ended.value.code == 2 and "other settings (mode)" in capsys.readouterr().err


def test_an_endpoint_without_schemas_is_asked_for_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [LINES[3]]
    file, endpoint = write_set(tmp_path / "my.jsonl", [lines[0][0]]), Endpoint(lines)
    endpoint.takes_schema = False
    result = run(endpoint, file, tmp_path / "t", capsys)
    assert [body["response_format"] for body in endpoint.bodies] == [{"type": "json_object"}]
    assert result["before"]["grades"]["I"] == 1 and result["after"]["grades"]["C"] == 1


def test_a_call_that_is_blocked_is_not_a_wrong_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, endpoint = LINES[7][0], Endpoint([(LINES[7][0], [{"name": "weather", "arguments": '{"days": 9}'}])])
    policy = tmp_path / "policy.toml"
    policy.write_text('[[forbid]]\ntool = "weather"\n')
    file = write_set(tmp_path / "my.jsonl", [line])
    result = run(endpoint, file, tmp_path / "t", capsys, "--policy", str(policy))
    assert result["before"]["grades"]["I"] == 1 and result["after"]["grades"]["A"] == 1
    assert result["verdicts"] == {"blocked": 1} and result["reasons"] == {"side_effect_forbidden": 1}


def test_an_endpoint_that_refuses_leaves_nothing_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": "no such model"}}, 404)

    endpoint = Endpoint(LINES)
    endpoint.chat = refuse  # type: ignore[method-assign]
    file = write_set(tmp_path / "my.jsonl", [LINES[0][0]])
    result = run(endpoint, file, tmp_path / "t", capsys)
    assert not result["valid"] and result["undecided"]["n"] == 1 and result["headline"]["HR"] is None
    assert any("no such model" in reason for reason in result["undecided"]["reasons"])


@pytest.mark.parametrize("line, told", [
    ("{", "line 3 of"),
    ("[]", "line 3 of"),
    ({"answer": "x"}, "give either question or messages"),
    ({"question": "q"}, "nothing says what is right"),
    ({"question": "q", "answer": []}, "nothing says what is right"),
    ({"question": "q", "answer": "x", "mood": 1}, "mood"),
    ({"question": "q", "unanswerable": "yes"}, "unanswerable"),
    ({"question": "q", "answer": "x", "unanswerable": True}, "it is unanswerable and has an answer"),
    ({"question": "q", "answer": {"a": 1}}, "is no text or number"),
    ({"question": "q", "schema": {"type": "whale"}}, "schema"),
    ({"question": "q", "answer": "x", "id": "line-1"}, "of line 1"),
])  # fmt: skip
def test_a_line_that_is_no_question(line: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_set(tmp_path / "my.jsonl", [{"question": "q", "answer": "x"}, line])
    with pytest.raises(SystemExit) as ended:
        main(["referee", "trial", "--upstream", "http://127.0.0.1:9", "--set", str(file)])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and "line 3 of" in err


def test_options_before_the_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["referee", "--mode", "enforce", "trial", "--upstream", "http://a", "--set", "x"])
    assert ended.value.code == 2 and "--mode before trial has no effect" in capsys.readouterr().err
