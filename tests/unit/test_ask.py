"""`rorqual ask`: a file and a question, the progress line, the cost, and what cannot be read."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from rorqual.cli import main
from rorqual.cli.ask import DOCUMENT, check_length, read_text, sentence
from rorqual.cli.reading import ReadingBar
from rorqual.errors import RequestError

QUESTION = "What is the number of the box?"
LIMITS = ["--effort", "none", "--max-tokens", "6", "--temperature", "0", "--threads", "1"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {i}: the box has number {i * 7}.\n" for i in range(60)), encoding="utf-8")
    return path


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["ask", *arguments])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err  # type: ignore[return-value]


def test_the_answer_is_the_model_s_own_to_the_rendered_prompt(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from rorqual.chat import parse_completion, render_messages, suppressed_ids
    from rorqual.checkpoint import load
    from rorqual.engine import Engine, SamplingParams

    code, out, err = run(QUESTION, "--file", str(book), *LIMITS, "--json", capsys=capsys)
    assert code == 0, err
    model, tokenizer = load("minke", dtype=torch.bfloat16)
    content = f"[file name]: book.txt\n[file content begin]\n{book.read_text()}\n[file content end]\n{QUESTION}"
    prompt = render_messages([{"role": "user", "content": content}], thinking_mode="chat")
    ids = tokenizer.encode_guarded(prompt.pieces())
    with Engine(model, tokenizer) as engine:
        params = SamplingParams(
            temperature=0.0, max_tokens=6, suppress_token_ids=suppressed_ids(tokenizer, thinking=False)
        )
        done = engine.submit(ids, params).result()
    report = json.loads(out)
    assert report["message"]["content"] == parse_completion(done.text, thinking_mode="chat", strict=False)["content"]
    assert report["usage"] == {
        "prompt_tokens": len(ids), "cached_tokens": 0, "completion_tokens": done.usage.completion_tokens,
    }  # fmt: skip
    assert re.search(rf"read {len(ids):,} tokens in .* s, wrote \d+ in .* s; peak memory [\d,]+ MiB", err)


def test_a_second_question_starts_from_the_cache(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--cache", str(tmp_path / "kept"), "--json"]
    first = json.loads(run(QUESTION, "--file", str(book), *LIMITS, *kept, capsys=capsys)[1])
    again = json.loads(run("How many lines are there?", "--file", str(book), *LIMITS, *kept, capsys=capsys)[1])
    plain = json.loads(run("How many lines are there?", "--file", str(book), *LIMITS, "--json", capsys=capsys)[1])
    assert first["usage"]["cached_tokens"] == 0
    assert again["usage"]["cached_tokens"] > again["usage"]["prompt_tokens"] // 2
    assert again["message"] == plain["message"]


def test_stdin_streams_to_stdout(
    book: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(book.read_bytes())))
    code, out, err = run(QUESTION, "--file", "-", *LIMITS, "--quiet", capsys=capsys)
    assert code == 0 and err == ""
    assert out.endswith("\n")


def test_what_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, zeros, empty = tmp_path / "a.png", tmp_path / "b.bin", tmp_path / "c.txt"
    image.write_bytes(b"\x89PNG\r\n"), zeros.write_bytes(b"ab\0c"), empty.write_text(" \n")
    for path, said in (
        (tmp_path / "none.txt", "none.txt cannot be read (No such file or directory)"),
        (tmp_path, "cannot be read (Is a directory)"),
        (image, "is not text (byte 0 is no UTF-8)"),
        (zeros, "is not text (there is a zero byte at 2)"),
        (empty, "c.txt is empty"),
    ):
        code, out, err = run(QUESTION, "--file", str(path), capsys=capsys)
        assert code == 2 and out == "" and said in err, err


def test_a_folder_that_cannot_be_used_is_named(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(QUESTION, "--file", str(book), "--cache", str(book), capsys=capsys)
    assert code == 2 and f"the cache folder {book} cannot be used" in err


def test_what_was_read_before_an_interruption_is_kept(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["--cache", str(tmp_path / "kept"), "--json"]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rorqual.cli.ask.CHUNK", 128)
        patched.setattr("rorqual.cli.ask.cost_of", interrupt)  # the answer is there, and not yet shown
        code, out, err = run(QUESTION, "--file", str(book), *LIMITS, *kept, capsys=capsys)
    assert code == 130 and out == "" and f"is kept in {tmp_path / 'kept'}" in err
    again = json.loads(run(QUESTION, "--file", str(book), *LIMITS, *kept, capsys=capsys)[1])
    assert again["usage"]["cached_tokens"] > again["usage"]["prompt_tokens"] // 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfWal")
    assert read_text(str(path)) == ("marked.txt", "Wal")
    assert DOCUMENT.format(name="n", text="{t}", question="q").startswith("[file name]: n\n[file content begin]\n{t}\n")


def test_a_text_too_long_names_both_numbers() -> None:
    with pytest.raises(RequestError, match="are 2,000,000 tokens.* 16 more, but minke reads at most 1,048,576.*Split"):
        check_length("a.txt", 2_000_000, 16, "minke", 1 << 20)
    with pytest.raises(RequestError, match="Lower --max-tokens"):
        check_length("a.txt", (1 << 20) - 8, 16, "minke", 1 << 20)
    check_length("a.txt", (1 << 20) - 16, 16, "minke", 1 << 20)


def test_the_bar_tells_rate_and_time_left() -> None:
    out, now = io.StringIO(), [0.0]
    bar = ReadingBar(out, is_shown=True, clock=lambda: now[0])
    for done, at in ((1000, 5.0), (2000, 6.0), (3000, 7.0)):  # what the first call brings may come from a cache
        now[0] = at
        bar(done, 5000)
    assert (
        out.getvalue().split("\r")[-1]
        == "reading [" + "#" * 14 + "." * 10 + "] 3,000/5,000 tokens, 1,000 tokens/s, 0:02 left"
    )
    bar.close()
    assert out.getvalue().endswith(" \r")
    now[0] = 99.0
    bar(500, 5000)  # the request lost its state and begins anew
    assert "tokens/s" not in out.getvalue().split("\r")[-1]


def test_the_bar_expects_tokens_to_become_dearer() -> None:
    out, now = io.StringIO(), [0.0]
    bar = ReadingBar(out, is_shown=True, clock=lambda: now[0])
    for done in range(0, 501, 10):  # the token at p costs p milliseconds
        now[0] = done**2 / 2000
        bar(done, 1000)
    left = out.getvalue().split("\r")[-1].rsplit(", ", 1)[1]
    minutes, seconds = re.fullmatch(r"(\d+):(\d+) left", left).groups()  # type: ignore[union-attr]
    assert 60 * int(minutes) + int(seconds) == pytest.approx((1000**2 - 500**2) / 2000, rel=0.05)


def test_a_hidden_bar_writes_nothing() -> None:
    out = io.StringIO()
    bar = ReadingBar(out, is_shown=False)
    bar(1, 2)
    assert list(bar.ended_by([1, 2])) == [1, 2]
    assert out.getvalue() == ""


def test_cost_without_a_known_peak() -> None:
    cost = {
        "usage": {"prompt_tokens": 5000, "cached_tokens": 4000, "completion_tokens": 7},
        "reading_s": 1.5, "answering_s": 0.25, "peak_bytes": None,
    }  # fmt: skip
    assert sentence(cost) == "read 5,000 tokens (4,000 from the cache) in 1.5 s, wrote 7 in 0.2 s"
