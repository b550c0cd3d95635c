"""The commands as a person runs them, on a small random checkpoint: serve until Ctrl-C, chat, complete."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from mock_model import byte_tokenizer

from rorqual import ModelConfig, Transformer
from rorqual.checkpoint import save_official
from rorqual.model import init_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers with random weights, and the byte tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "calf"
    tokenizer = byte_tokenizer()
    changes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "compress_ratios": (0, 4, 0)}
    model = Transformer(ModelConfig.preset("minke").replace(**changes))
    init_weights(model, 1)
    save_official(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    return folder


def rorqual(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rorqual", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_serve_until_interrupted(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rorqual",
        "serve",
        str(folder),
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            where = json.loads(server.stdout.readline())
            assert where["model"] == "calf"
            assert where["url"].startswith("http://127.0.0.1:")
            with urllib.request.urlopen(f"{where['api']}/models", timeout=60) as answer:
                assert [model["id"] for model in json.load(answer)["data"]] == ["calf"]
            with urllib.request.urlopen(where["url"], timeout=60) as answer:
                assert answer.headers.get_content_type() == "text/html"
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert "Traceback" not in err


def test_chat_and_complete(folder: Path) -> None:
    limits = ["--max-tokens", "4", "--seed", "1", "--threads", "1", "--json"]
    said = rorqual("chat", str(folder), "-m", "Hi", "--effort", "none", *limits)
    assert said.returncode == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["message"]["role"] == "assistant"
    assert 1 <= report["usage"]["completion_tokens"] <= 4

    completed = rorqual("complete", "--prefix", "a", "--suffix", "b", "--model", str(folder), *limits)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_packed_weights_and_caches_everywhere(folder: Path, tmp_path: Path) -> None:
    """The commands that answer take the same options, and load what they name."""
    book = tmp_path / "book.txt"
    book.write_text("A box.\n" * 40)
    packed = ["--weights", "fp4-int8", "--cache-format", "fp8", "--max-tokens", "2", "--threads", "1", "--json"]
    for command in (
        ["chat", str(folder), "-m", "Hi", "--effort", "none"],
        ["complete", "--prefix", "a", "--model", str(folder)],
        ["ask", "--file", str(book), "--model", str(folder), "--speculate", "What?"],
    ):
        result = rorqual(*command, *packed)
        assert result.returncode == 0, result.stderr
    refused = rorqual("ask", "--file", str(book), "--model", str(folder), "--weights", "fp5", "What?")
    assert refused.returncode == 2 and "'fp5' is not one of" in refused.stderr


def test_an_unknown_model_is_explained() -> None:
    result = rorqual("serve", "./no-such-folder", "--port", "0")
    assert result.returncode == 1
    assert "CheckpointError: there is no model './no-such-folder'" in result.stderr
    assert "Traceback" not in result.stderr
