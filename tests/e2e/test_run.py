"""`rorqual.server.run` as a process: says where it listens, answers, ends on Ctrl-C with a stream open."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import rorqual

PROGRAM = """
from mock_model import ScriptModel, byte_tokenizer
from rorqual.server import run
model = ScriptModel(lambda prompt: "more " * 3000)
model.step_s = 0.01
run(model, byte_tokenizer(), port=0, on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""
BODY = b'{"model": "minke", "messages": [{"role": "user", "content": "Hi"}], "stream": true}'


def test_a_server_process_starts_answers_and_ends() -> None:
    paths = [Path(rorqual.__file__).parents[1], Path(__file__).parents[1] / "support"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            assert answer.status == 200
        request = urllib.request.Request(f"{url}/v1/chat/completions", BODY, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as stream:
            assert b'"role":"assistant"' in stream.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "ended\n", err
    assert process.returncode == 0
    assert "Traceback" not in err, err
