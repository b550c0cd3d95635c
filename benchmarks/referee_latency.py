"""What a gateway adds to a request: the referee in mode observe beside LiteLLM's proxy, over the same bare upstream.

    python benchmarks/referee_latency.py
    python benchmarks/referee_latency.py --quick --json

The upstream answers at once, in a process of its own; so do the referee (as `rorqual referee` starts, with its
journal, its ledger and continuity) and LiteLLM's proxy (one worker, no database, no callbacks). One client asks all
three by turns over a kept connection, one request at a time: a prompt of about 1,000 tokens with a tool, and a call as
the answer, whole and as a stream.

added      milliseconds beyond the bare upstream at the median, to the answer's last byte. bound: the 3 ms it may add.
cpu        processor milliseconds a request of the gateway's process, all threads, by /proc.

LiteLLM's proxy needs more than `litellm` (its extra `proxy`): --peer-packages names a folder with what is not installed
beside it, which only its process sees.
"""

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from measure import note, print_line

MOST_ADDED_MS = 3.0
KEY = f"sk-{secrets.token_hex(24)}"  # LiteLLM's proxy does not start without one
BLOCK = 20
"""Requests in a row to one of the three, before the next has its turn."""

TOOLS = [{"type": "function", "function": {"name": "read_file", "description": "Read a file.", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}},
    "required": ["path"]}}}]  # fmt: skip
PROMPT = "Look at src/main.py and say what it does. " + "The project is about whales and their songs. " * 85
USAGE = {"prompt_tokens": 1000, "completion_tokens": 30, "total_tokens": 1030}
CALL = {"id": "call_0", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "src/main.py"}'}}

MOCK = r"""
import asyncio, sys
from pathlib import Path

whole, stream = (Path(name).read_bytes() for name in sys.argv[1:3])

class Upstream(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
            if len(self.data) < end + 4 + length:
                return
            body, self.data = self.data[end + 4 : end + 4 + length], self.data[end + 4 + length :]
            self.transport.write(stream if b'"stream":true' in body.replace(b" ", b"") else whole)

async def main():
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def answers() -> tuple[bytes, bytes]:
    """The upstream's responses, whole and streamed."""
    around = {"id": "c", "created": 1, "model": "m"}
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    body = json.dumps({**around, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    deltas.append({"tool_calls": [{**CALL, "index": 0, "function": {"name": "read_file", "arguments": ""}}]})
    for piece in CALL["function"]["arguments"]:  # type: ignore[index]
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
    ends = [None] * len(deltas) + ["tool_calls"]
    events = [
        {**around, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        for delta, end in zip([*deltas, {}], ends, strict=True)
    ]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (line.encode() + b"\n\n"
                      for line in text.removesuffix("\n\n").split("\n\n")))  # fmt: skip
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return whole, head + chunks + b"0\r\n\r\n"


class Side:
    """One of the three, asked over one kept connection. pid: whose processor time counts; None for nobody's."""

    def __init__(self, name: str, port: int, pid: int | None) -> None:
        self.name, self.port, self.pid = name, port, pid
        self.times: list[float] = []
        self.cpu_s = 0.0
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def block(self, body: bytes, count: int, *, keep: bool) -> None:
        """Ask `count` times. keep: whether it counts."""
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer " + KEY.encode() + b"\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        self._socket.close()
        self._connect()  # servers close connections that were idle while the others had their turn
        before = self._cpu()
        for _ in range(count):
            began = time.perf_counter()
            self._socket.sendall(request)
            self._answer()
            if keep:
                self.times.append(time.perf_counter() - began)
        if self.pid is not None:
            time.sleep(0.05)  # what is done after an answer counts too
        if keep:
            self.cpu_s += self._cpu() - before

    def close(self) -> None:
        self._socket.close()

    def _answer(self) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], data[:400]
        lower = head.lower()
        if b"content-length:" in lower:
            length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
            while len(body) < length:
                body += self._more()
        else:
            while not body.endswith(b"0\r\n\r\n"):
                body += self._more()
        assert b"read_file" in body, body[:400]

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 16)
        assert data, f"{self.name} closed the connection"
        return data

    def _cpu(self) -> float:
        if self.pid is None:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
        )
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()


def referee(stack: ExitStack, folder: Path, upstream: int) -> Side:
    command = [sys.executable, "-m", "rorqual", "referee", "--upstream", f"http://127.0.0.1:{upstream}", "--port", "0",
               "--json", "--log", "off"]  # fmt: skip
    started = stack.enter_context(process(command, folder / "referee.log", RORQUAL_HOME=str(folder / "home")))
    assert started.stdout is not None
    port = int(json.loads(started.stdout.readline())["url"].rpartition(":")[2])
    return Side("referee", port, started.pid)


def litellm(stack: ExitStack, folder: Path, upstream: int, packages: Path | None) -> Side:
    settings = folder / "litellm.yaml"
    settings.write_text(
        "model_list:\n  - model_name: m\n    litellm_params:\n      model: openai/m\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: sk-bench\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = [str(packages)] if packages is not None else []
    command = [sys.executable, "-c", "from litellm import run_server; run_server()", "--config", str(settings),
               "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]  # fmt: skip
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION",
        "LITELLM_MASTER_KEY": KEY,
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    started = stack.enter_context(process(command, folder / "litellm.log", **environment))
    deadline = time.monotonic() + 180
    while True:
        try:
            return Side("LiteLLM proxy", port, started.pid)
        except OSError:
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "litellm.log").read_text()[-1500:]) from None
            time.sleep(0.3)


def measure(sides: list[Side], stream: bool, rounds: int) -> None:
    """All sides by turns; the first two rounds warm up."""
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "tools": TOOLS, "stream": stream}
    ).encode()
    for side in sides:
        side.times, side.cpu_s = [], 0.0
    for number in range(rounds + 2):
        for side in sides if number % 2 else reversed(sides):
            side.block(body, BLOCK, keep=number >= 2)


def lines(sides: dict[str, Side], case: str, rounds: int, failure: str | None) -> Iterator[dict[str, Any]]:
    def at(side: Side, share: float) -> float:
        return 1000 * statistics.quantiles(side.times, n=100, method="inclusive")[round(100 * share) - 1]

    bare, ours, peer = sides["bare"], sides["referee"], sides.get("LiteLLM proxy")
    percentiles = {
        side.name: {f"p{p}": round(at(side, p / 100), 3) for p in (5, 50, 95, 99)} for side in sides.values()
    }
    config = {"requests": rounds * BLOCK, "ms": percentiles, "cpus": os.cpu_count(), "journal": True, "ledger": True}
    common = {"case": case, "peer_name": "LiteLLM proxy", "config": config, "spread": {"ours": [], "peer": []}}
    if failure is not None:
        common["peer_failure"] = failure
    added = at(ours, 0.5) - at(bare, 0.5)
    theirs = None if peer is None else at(peer, 0.5) - at(bare, 0.5)
    yield {
        "name": "referee_latency", "unit": "ms added at p50", **common, "ours": added, "peer": theirs,
        "ratio": None if theirs is None else theirs / added, "bound": MOST_ADDED_MS, "bound_share": None,
    }  # fmt: skip
    cpu = 1000 * ours.cpu_s / len(ours.times)
    cpu_peer = None if peer is None else 1000 * peer.cpu_s / len(peer.times)
    yield {
        "name": "referee_cpu", "unit": "ms of CPU a request", **common, "ours": cpu, "peer": cpu_peer,
        "ratio": None if cpu_peer is None else cpu_peer / cpu, "bound": None, "bound_share": None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="200 requests instead of 1,000 to each")
    parser.add_argument("--peer-packages", type=Path, help="folder with packages that only LiteLLM's process sees")
    arguments = parser.parse_args()
    rounds = 10 if arguments.quick else 50
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, data in zip(("whole", "stream"), answers(), strict=True):
            (folder / name).write_bytes(data)
        command = [sys.executable, "-c", MOCK, str(folder / "whole"), str(folder / "stream")]
        mock = stack.enter_context(process(command, folder / "mock.log"))
        assert mock.stdout is not None
        upstream = int(mock.stdout.readline())
        sides = {"bare": Side("bare", upstream, None)}
        note("starting the referee")
        sides["referee"] = referee(stack, folder, upstream)
        failure = None
        note("starting LiteLLM's proxy")
        try:
            sides["LiteLLM proxy"] = litellm(stack, folder, upstream, arguments.peer_packages)
        except RuntimeError as error:
            failure = str(error).strip().splitlines()[-1][:200]
        for stream in (False, True):
            measure(list(sides.values()), stream, rounds)
            for line in lines(sides, f"1K/mock/1t/{'stream' if stream else 'whole'}", rounds, failure):
                print_line(line, as_json=arguments.json)
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    main()
