"""`rorqual serve --upstream` in front of `rorqual serve`: two processes, the bundled model, the same greedy answer."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

pytestmark = pytest.mark.slow


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "rorqual", "serve", "minke", "--port", "0", "--json", "--no-ledger", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_two_processes():
    body = {
        "model": "minke",
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    with served() as back, served("--upstream", back) as front:
        answers = [httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120).json() for url in (back, front)]
        assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["choices"][0]["message"]
        assert answers[0]["usage"]["total_tokens"] == answers[1]["usage"]["total_tokens"]
        streamed = httpx2.post(f"{front}/v1/chat/completions", json={**body, "stream": True}, timeout=120).text
        assert streamed.rstrip().endswith("data: [DONE]")
