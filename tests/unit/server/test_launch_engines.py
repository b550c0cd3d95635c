"""Launch commands of other engines, and keeping one running; a small program stands in, since none is installed."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from rorqual.cli import main
from rorqual.errors import ConfigError, MissingExtraError
from rorqual.server import launch as launching
from rorqual.server.launch import Launch, check_installed, running

STAND_IN = """
import http.server, json, os, pathlib, sys, time
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(float(sys.argv[3]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "flash", "owned_by": "vllm", "max_model_len": 9000}]}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def flags(command: list[str]) -> dict[str, str | None]:
    """Flag -> value; None for a switch."""
    out: dict[str, str | None] = {}
    for i, word in enumerate(command):
        if word.startswith("--"):
            follows = command[i + 1] if i + 1 < len(command) else "--"
            out[word] = None if follows.startswith("--") else follows
    return out


def test_vllm():
    command = Launch(
        "vllm", "org/Flash", "flash", 4, 8100, parallel="data", context=262144, more=["--seed", "1"]
    ).command()
    assert command[:3] == ["vllm", "serve", "org/Flash"]
    found = flags(command)
    assert found["--data-parallel-size"] == "4" and "--tensor-parallel-size" not in found
    assert found["--tokenizer-mode"] == found["--tool-call-parser"] == found["--reasoning-parser"] == "deepseek_v4"
    assert (
        found["--max-model-len"] == "262144" and found["--block-size"] == "256" and found["--kv-cache-dtype"] == "fp8"
    )
    assert found["--host"] == "127.0.0.1" and found["--port"] == "8100" and found["--seed"] == "1"
    assert "--enable-expert-parallel" in found
    single = flags(Launch("vllm", "m", "m", 1, 8100).command())
    assert single["--tensor-parallel-size"] == "1" and not {"--enable-expert-parallel", "--max-model-len"} & set(single)


def test_sglang():
    found = flags(Launch("sglang", "org/Pro", "pro", 8, 8100, context=4096).command())
    assert found["--tp-size"] == found["--ep-size"] == "8" and found["--context-length"] == "4096"
    assert found["--tool-call-parser"] == "deepseekv4" and found["--reasoning-parser"] == "deepseek-v4"
    assert "--dp-size" not in found
    spread = flags(Launch("sglang", "org/Pro", "pro", 8, 8100, parallel="data").command())
    assert spread["--dp-size"] == "8" and "--enable-dp-attention" in spread
    assert (
        Launch("sglang", "a model", "m", 1, 1)
        .shown()
        .startswith("python -m sglang.launch_server \\\n    --model-path 'a ")
    )


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["serve", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = run("org/Flash", "--engine", "vllm", "--gpus", "2", "--engine-arg=--seed=3", "--dry-run")
    assert code == 0 and out == Launch("vllm", "org/Flash", "Flash", 2, 8100, more=["--seed=3"]).shown() + "\n"
    for arguments, words in (
        (["--dry-run"], "Name one: --engine vllm"),
        (["--engine", "vllm", "--upstream", "http://127.0.0.1:1"], "Leave one of them out"),
        (["--upstream", "127.0.0.1:1"], "Give an address such as"),
        (["--upstream", "http://127.0.0.1:9", "--port", "0"], "no server answers at http://127.0.0.1:9"),
    ):
        code, _, err = run("minke", *arguments)
        assert code == 2 and words in err, err
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtraError, match="vllm is not installed here.*--dry-run.*--upstream"):
        check_installed("vllm")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_is_waited_for_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "_LOOK_S", 0.05)
    script, pid = tmp_path / "engine.py", tmp_path / "pid"
    script.write_text(STAND_IN)
    port = free_port()
    launch = Launch("vllm", "m", "flash", 1, port)
    monkeypatch.setattr(Launch, "command", lambda _self: [sys.executable, str(script), str(port), str(pid), "0.3"])
    with running(launch) as offer:
        assert (offer.model, offer.dialect, offer.context) == ("flash", "vllm", 9000)
        assert alive(int(pid.read_text()))
    assert not alive(int(pid.read_text()))
    monkeypatch.setattr(Launch, "command", lambda _self: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ConfigError, match="vllm ended with status 3 before it served"), running(launch):
        pass
    monkeypatch.setattr(Launch, "command", lambda _self: [sys.executable, "-c", "import time; time.sleep(60)"])
    began = time.monotonic()
    with pytest.raises(ConfigError, match="does not answer at"), running(launch, patience_s=0.3):
        pass
    assert time.monotonic() - began < 20


def test_another_server_on_the_port_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "_LOOK_S", 0.05)
    script, pid, port = tmp_path / "engine.py", tmp_path / "pid", free_port()
    script.write_text(STAND_IN)
    monkeypatch.setattr(Launch, "command", lambda _self: [sys.executable, str(script), str(port), str(pid), "0"])
    with (
        pytest.raises(ConfigError, match="does not answer at"),
        running(Launch("vllm", "m", "other", 1, port), patience_s=1),
    ):
        pass
