"""Agents with a model behind a URL: our own server, and one that behaves badly; and what a user sees of a run."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from live_server import live
from local_sandbox import Maker
from mock_model import ScriptModel, byte_tokenizer
from rich.console import Console

from rorqual.agents import RunHooks, RunSettings, create_run, run_agent
from rorqual.agents.cost import Meter
from rorqual.agents.models.chat_api import ChatBackend
from rorqual.agents.models.choose import BUNDLED
from rorqual.agents.observer import CallView, TurnUsage
from rorqual.agents.report import records_of, show_run, state_of
from rorqual.agents.view import JsonView, LiveView, PlainView
from rorqual.chat import ReasoningDelta
from rorqual.cli import main
from rorqual.engine import Engine
from rorqual.errors import ConfigError, RequestError
from rorqual.journal.records import Event, Request
from rorqual.server import create_app
from rorqual.tokenizer import Tokenizer

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="shell">\n'
    '<｜DSML｜parameter name="command" string="true">echo "Grüße 🐋" > out/a.txt; cat out/a.txt</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    return "It is written.</think>Done: a.txt" if "<tool_result>" in prompt else f"I write a file.</think>{CALL}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))


def settings(url: str, tmp_path: Path, **more: Any) -> RunSettings:
    return RunSettings("Write a file.", model=url, out=str(tmp_path / "out"), turn_tokens=500, **more)


@pytest.mark.slow
def test_a_model_behind_a_url(tmp_path: Path) -> None:
    """The prompt that our server builds of the messages is, to the letter, the one the run has on record."""
    PROMPTS.clear()
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine, live(create_app(engine, "minke")) as url:
        run = create_run(settings(f"{url}/v1", tmp_path), "run")
        hooks = RunHooks(maker=Maker(tmp_path / "sandboxes"))
        result = run_agent(run, hooks)
        assert (result.answer.ending, result.answer.text) == ("done", "Done: a.txt")
        assert (tmp_path / "out" / "a.txt").read_text() == "Grüße 🐋\n"
        again = run_agent(run, hooks)
        assert again.answer == result.answer
    [request] = [record for record in records_of(run) if isinstance(record, Request)]
    assert request.model_id == "minke" and request.engine_fingerprint == f"server {url}"
    prompts = [text for text in dict.fromkeys(PROMPTS) if text.endswith("<think>")]
    assert len(prompts) == 2 and prompts[1].startswith(prompts[0])
    assert prompts[1].endswith("<tool_result>Grüße 🐋</tool_result><｜Assistant｜><think>")


class Scripted(BaseHTTPRequestHandler):
    """Answers with the bodies in `answers`, one each time; a body that ends in half a line breaks off there."""

    answers: list[str] = []
    asked: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "some-model"}]}), "application/json")

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        answer = self.answers.pop(0)
        if answer.startswith("429"):
            self.send_response(429)
            self.end_headers()
            self.wfile.write(answer.encode())
            return
        self._send(answer, "text/event-stream")

    def _send(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def bad_server() -> Iterator[str]:
    Scripted.answers, Scripted.asked = [], []
    server = HTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def stream(*parts: dict[str, Any], finish: str | None = "stop") -> str:
    """Server-sent events of a reply."""
    events = [{"choices": [{"delta": part, "finish_reason": None}]} for part in parts]
    if finish is not None:
        events.append({"choices": [{"delta": {}, "finish_reason": finish}]})
        events.append(
            {"choices": [], "usage": {"prompt_tokens": 90, "prompt_cache_hit_tokens": 64, "completion_tokens": 7}}
        )
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if finish else "")


CALLING = [
    {"reasoning_content": "I "},
    {"reasoning_content": "write."},
    {"content": "Here: "},
    {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "write_file", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"path": "out/b.txt", '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"content": "b"}'}}]},
]


def test_a_turn_that_broke_off_is_asked_for_again(bad_server: str, tmp_path: Path) -> None:
    Scripted.answers = [
        stream(*CALLING[:3], finish=None),
        stream(*CALLING, finish="tool_calls"),
        stream({"content": "Ok"}),
    ]
    run = create_run(settings(bad_server, tmp_path), "run")
    seen = io.StringIO()
    hooks = RunHooks(JsonView(Meter(), seen), maker=Maker(tmp_path / "sandboxes"))
    with pytest.raises(RequestError, match="ended without a finish_reason"):
        run_agent(run, hooks)
    result = run_agent(run, hooks)
    assert result.answer.text == "Ok" and (tmp_path / "out" / "b.txt").read_text() == "b"
    [event] = [record for record in records_of(run) if isinstance(record, Event) and record.kind == "turn_restarted"]
    assert event.fields["dropped"] > 0
    body = Scripted.asked[2]
    assert body["model"] == "some-model" and body["stream"] is True
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    call = body["messages"][2]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"path": "out/b.txt", "content": "b"}
    assert body["messages"][3]["tool_call_id"] == call["id"]
    assert body["messages"][2]["reasoning_content"] == "I write."


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("429 slow down", "refused the turn \\(429\\): 429 slow down"),
        ("data: {nonsense\n\n", "which is no JSON"),
        ('data: {"error": {"message": "overloaded"}}\n\n', "overloaded"),
    ],
)
def test_what_a_server_does_wrong_is_said(bad_server: str, answer: str, said: str, tmp_path: Path) -> None:
    Scripted.answers = [answer, stream({"content": "Fine."})]
    run = create_run(settings(bad_server, tmp_path), "run")
    with pytest.raises(RequestError, match=said):
        run_agent(run, RunHooks(maker=Maker(tmp_path / "sandboxes")))
    assert run_agent(run, RunHooks(maker=Maker(tmp_path / "sandboxes"))).answer.text == "Fine."


def test_a_reply_cut_by_the_servers_own_limit(bad_server: str, tmp_path: Path) -> None:
    Scripted.answers = [stream(*CALLING[:2], finish="length")]
    run = create_run(settings(bad_server, tmp_path), "run")
    assert run_agent(run, RunHooks(maker=Maker(tmp_path / "s"))).answer.ending == "length"
    assert run_agent(run, RunHooks(maker=Maker(tmp_path / "s"))).answer.ending == "length"  # from the record alone
    assert state_of(run).closed == "length"


def test_no_server() -> None:
    tokenizer = Tokenizer.from_folder(BUNDLED)
    for url, said in (("ftp://x", "is no address"), ("http://127.0.0.1:9", "names no models")):
        with pytest.raises(ConfigError, match=said):
            ChatBackend(url, tokenizer, [])


# ------------------------------------------------------------------------------------------------------- what is seen


def test_the_live_view_shows_thinking_calls_and_cost() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    view = LiveView("run: do it", Meter("deepseek-v4-flash"), console)
    view.events([ReasoningDelta("Hm, \x1b[31mlet me see.")], True)
    view.call(CallView(0, "shell", '{"command":"ls"}', "00"), True)
    view.result(CallView(0, "shell", '{"command":"ls"}', "00", "a.txt\nb.txt", 0), True)
    view.call(CallView(1, "python", '{"code":"1/0"}', "01"), True)
    view.events([ReasoningDelta("Now this.")], True)
    view.usage(TurnUsage(1000, 400, 50), True)
    view.note("restoring the sandbox")
    console.print(view)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    cost = "1,000 tokens read (400 cached), 50 written"
    for text in ("run: do it", "ok", "shell", "a.txt", "running", "Now this.", cost, "USD", "restoring the sandbox"):
        assert text in shown, text
    assert "\x1b[31m" not in shown


def test_the_plain_view_is_lines() -> None:
    out = io.StringIO()
    view = PlainView(Meter(), out)
    call = CallView(3, "shell", "{}", "00", "\n\x07bell\n", 1)
    view.call(call, True)
    view.result(call, True)
    view.result(call, False)
    assert out.getvalue() == "3: shell {}\n3: failed \ufffdbell\n"


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["agent", *arguments])
    return int(ended.value.code or 0)


def test_the_command_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (("run",), "there is no unfinished run to go on with"),
        (("run", "x", "--files", str(tmp_path / "no")), "is no folder"),
        (("run", "x", "--smtp", "localhost:25"), "mail needs both --smtp HOST:PORT and --mail-to ADDRESS"),
        (("run", "x", "--smtp", "localhost", "--mail-to", "a@b.c"), "Give HOST:PORT"),
        (("run", " "), "the task is empty"),
        (("show",), "takes the name of a run"),
        (("run", "x", "--name", "../x"), "cannot name a run"),
    ):
        assert run_cli(*arguments) == 2, arguments
        assert said in capsys.readouterr().err
    assert run_cli("show", "nothing") == 1
    assert "there is no run 'nothing'" in capsys.readouterr().err
    assert run_cli("list") == 0
    assert "No runs" in capsys.readouterr().out


def test_list_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "s.json"
    calls = [{"name": "write_file", "arguments": {"path": "out/a", "content": "a"}}]
    script.write_text(json.dumps({"replies": [{"calls": calls}, {"content": "Fine."}]}))
    run = create_run(RunSettings("Do it.", script=str(script)), "one")
    run_agent(run, RunHooks(maker=Maker(tmp_path / "sandboxes")))
    assert run_cli("list", "--json") == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry | {"tokens": 0} == {
        "name": "one", "task": "Do it.", "state": "done", "processes": 1, "tokens": 0, "turns": 2, "calls": 1,
        "finished_calls": 1,
    }  # fmt: skip
    assert run_cli("list") == 0 and "Do it." in capsys.readouterr().out
    show_run(run, as_json=False)
    shown = capsys.readouterr().out
    assert "one: done" in shown and "write_file" in shown and "wrote out/a: 1 characters" in shown
    assert run_cli("show", "one", "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["what"] for step in steps] == ["attach", "call", "sandbox", "result", "close"]
