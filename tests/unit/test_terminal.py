"""`rorqual chat` and `rorqual complete` on a mock model: what is asked, what is printed, what is refused."""

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from mock_model import ScriptModel, byte_tokenizer

from rorqual.chat import Finished
from rorqual.cli import main
from rorqual.cli.complete import gap
from rorqual.cli.options import CacheFormat, Weights
from rorqual.cli.talk import Conversation
from rorqual.cli.terminal import printable
from rorqual.config import CACHE_FORMATS
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RequestError
from rorqual.model.packed_weights import WEIGHTS
from rorqual.tokenizer import Tokenizer

Reply = Callable[[str], str]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a mock in the model's place; each prompt it meets, also as the beginning of another, is listed."""
    seen: list[str] = []

    def reply(prompt: str) -> str:
        if prompt.endswith(("think>", "<｜fim▁end｜>")) and prompt not in seen:
            seen.append(prompt)
        if "<｜fim▁begin｜>" in prompt:
            return "middle"
        return "I think</think>Hello!" if prompt.endswith("<think>") else "Hello!"

    @contextmanager
    def open_mock(model: str, *options: object) -> Iterator[tuple[Engine, Tokenizer]]:
        assert (model, [option for option in options if option]) == ("minke", [])
        with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
            yield engine, byte_tokenizer()

    monkeypatch.setattr("rorqual.cli.talk.open_engine", open_mock)
    return seen


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_it(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), re.sub(r"\x1b\[\d+m", "", out), err

    return run_it


def test_one_question(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("chat", "-m", "Hi", "--temperature", "0")
    assert (code, out) == (0, "I think\n\nHello!\n")
    assert prompts == ["<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"]


def test_options_of_the_model_name_every_choice() -> None:
    """What `--weights` and `--cache-format` offer is what there is."""
    assert set(get_args(get_args(get_args(Weights)[0])[0])) == set(WEIGHTS)
    assert get_args(get_args(get_args(CacheFormat)[0])[0]) == CACHE_FORMATS


def test_effort_and_system(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("chat", "-m", "Hi", "--effort", "none", "--system", "Be kind.", "-t", "0")
    assert (code, out) == (0, "Hello!\n")
    assert prompts == ["<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜></think>"]


def test_json(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = run("chat", "-m", "Hi", "-t", "0", "--json")
    report = json.loads(out)
    assert report["message"]["content"] == "Hello!"
    assert report["message"]["reasoning_content"] == "I think"
    assert report["finish_reason"] == "stop"
    assert report["usage"]["completion_tokens"] > 0


def test_several_turns(
    prompts: list[str], run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["a", "/effort none", "b", "/new", "c", "/help", "", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, _ = run("chat", "-t", "0")
    assert code == 0
    assert "/exit leaves" in out
    start = "<｜begin▁of▁sentence｜><｜User｜>"
    assert prompts == [
        start + "a<｜Assistant｜><think>",
        start + "a<｜Assistant｜></think>",
        start + "a<｜Assistant｜></think>Hello!<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜></think>",
        start + "c<｜Assistant｜></think>",
    ]


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_piped_lines_with_bad_bytes_and_slashes_are_questions(
    prompts: list[str], run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(monkeypatch, b"a\xffb\n/new\n/etc/hosts is what?\n")
    assert run("chat", "-t", "0", "--effort", "none")[0] == 0
    assert [re.findall("<｜User｜>(.*?)<", prompt) for prompt in prompts] == [["a\ufffdb"], ["/etc/hosts is what?"]]


def test_a_refused_line_is_reported_and_the_chat_goes_on(
    prompts: list[str], run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(monkeypatch, b"x" * 20000 + b"\nHi\n")
    code, out, _ = run("chat", "-t", "0", "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 2
    assert first["error"]["code"] == "context_length_exceeded"
    assert second["message"]["content"] == "Hello!"


def test_a_terminal_is_not_steered_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]0;title\x07\tb\r\nc\x9b2J é"
    assert printable(text) == text
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert printable(text) == "a\ufffd]0;title\ufffd\tb\ufffd\nc\ufffd2J é"


def test_an_endless_input_ends_with_the_file(
    prompts: list[str], run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run("chat")[0] == 0
    assert prompts == []


def test_a_reply_cut_short_says_so(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = run("chat", "-m", "Hi", "-t", "0", "--max-tokens", "3", "--json")
    assert json.loads(out)["finish_reason"] == "length"


def test_a_question_left_early_is_taken_back() -> None:
    with Engine(ScriptModel(lambda _: "long</think>" + "x" * 200), byte_tokenizer()) as engine:
        conversation = Conversation(engine, byte_tokenizer(), SamplingParams(temperature=0))
        events = conversation.ask("Hi")
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert conversation.messages == []
        last = list(conversation.ask("Hi"))[-1]
        assert isinstance(last, Finished)
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_markers_in_a_question_stay_text(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    tokenizer = byte_tokenizer()
    ids: list[list[int]] = []
    submit = Engine.submit

    def spy(self: Engine, tokens: list[int], params: SamplingParams, **more: Any) -> object:
        ids.append(tokens)
        return submit(self, tokens, params, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", spy)
        run("chat", "-m", "<｜Assistant｜>", "-t", "0", "--max-tokens", "1")
    assert ids[0].count(tokenizer.token_id("<｜Assistant｜>")) == 1


def test_complete_fills_the_gap(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("complete", "--prefix", "a(", "--suffix", ")b", "-t", "0")
    assert (code, out) == (0, "middle\n")
    assert prompts == ["<｜begin▁of▁sentence｜><｜fim▁begin｜>a(<｜fim▁hole｜>)b<｜fim▁end｜>"]


def test_complete_a_file_at_its_cursor(
    prompts: list[str], run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "draft.py"
    file.write_text("a = <CURSOR>\n")
    code, out, _ = run("complete", str(file), "--whole", "-t", "0")
    assert (code, out) == (0, "a = middle\n\n")


def test_complete_as_json(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = run("complete", "--prefix", "a", "--suffix", "", "-t", "0", "--json", "--seed", "7")
    report = json.loads(out)
    assert (report["text"], report["finish_reason"], report["seed"]) == ("middle", "stop", 7)


def test_gap(tmp_path: Path) -> None:
    assert gap(None, "a", None, "|") == ("a", None)
    assert gap(None, None, "b", "|") == ("", "b")
    file = tmp_path / "text"
    file.write_text("no mark")
    assert gap(str(file), None, None, "|") == ("no mark", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None, None, None, "|"), "no text was given"),
        (("f", "a", None, "|"), "both FILE and --prefix or --suffix were given"),
        (("missing", None, None, "|"), "missing cannot be read as UTF-8 text"),
        (("twice", None, None, "|"), "'|' stands 2 times in twice"),
        (("twice", None, None, ""), "--cursor is empty"),
    ],
)
def test_a_gap_that_is_not_clear(
    arguments: tuple[str | None, str | None, str | None, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice").write_text("a|b|c")
    with pytest.raises(RequestError, match=re.escape(said)):
        gap(*arguments)


def test_sampling_out_of_range_is_a_wrong_request(prompts: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("complete", "--prefix", "a", "--temperature", "9")
    assert code == 2
    assert "temperature" in err
