"""A server under 200 streaming clients that misbehave: does it lose state, grow, or answer wrongly?

    python benchmarks/soak.py --json [--quick] [--clients 200] [--seconds 300]

`rorqual serve minke` in a process of its own, and clients over real sockets. The answers that greedy decoding must give
are asked for first, one at a time. Then every client loops, by its own draws: a stream or a whole answer read to its
end, in any of three dialects (chat completions, Responses, Anthropic messages where it is served), a stream left after
some chunks, a stream read so slowly that the server's buffers fill, a body that is too large (announced or just sent),
a body that is no request, a tool turn. Every answer that was read to its end is compared with the known one.

* `soak.wrong`: answers that differ (`ours`), of so many compared; anything but the expected status counts as wrong.
* `soak.left`: what is left a little after the last client has gone: running and waiting requests, bytes of their
  states, open connections, threads more than before.
* `soak.memory`: resident MiB at the end over those after the first fifth of the time, and the largest between; the
  prefix cache has its bound (64 MiB) and is full by then.

Exit code 1 when an answer is wrong or something is left.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import measure

TOO_LARGE = 64 << 20
CACHE_BYTES = 64 << 20
TOOL: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Question:
    """One thing to ask in one dialect, and where its answer stands."""

    path: str
    body: dict[str, Any]
    read: Callable[[Any], str]

    def key(self) -> str:
        return json.dumps([self.path, self.body], sort_keys=True)


@dataclass
class Tally:
    """What all clients saw."""

    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def check(self, what: str, given: Any, expected: Any) -> None:
        self.compared += 1
        if given != expected:
            self.wrong.append(f"{what}: {given!r} instead of {expected!r}"[:400])


def questions(count: int) -> list[Question]:
    """Different texts, lengths, modes and dialects; greedy, so that each has one right answer."""
    draw = random.Random(0)
    out = []
    for i in range(count):
        a, b = draw.randrange(2, 60), draw.randrange(2, 60)
        text = draw.choice([f"What is {a} + {b}?", f"Write a Python function that adds {a} to x.", "Say hello. " * a])
        tokens = draw.choice([4, 16, 48])
        if i % 3 == 1:
            body = {"model": "minke", "input": text, "max_output_tokens": tokens, "temperature": 0}
            out.append(Question("/v1/responses", {**body, "reasoning": {"effort": "none"}}, _of_responses))
            continue
        body = {
            "model": "minke",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        if i % 3 == 2:
            thinking = {"type": draw.choice(["enabled", "disabled"])}
            tools = {"tools": [TOOL]} if draw.random() < 0.5 else {}
            out.append(Question("/v1/chat/completions", {**body, "thinking": thinking, **tools}, _of_chat))
        else:
            out.append(Question("/anthropic/v1/messages", {**body, "thinking": {"type": "disabled"}}, _of_anthropic))
    return out


def _of_chat(body: Any) -> str:
    message = body["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return json.dumps([message.get("reasoning_content"), message["content"], calls])


def _of_responses(body: Any) -> str:
    return json.dumps([part["text"] for item in body["output"] for part in item.get("content", [])])


def _of_anthropic(body: Any) -> str:
    return json.dumps([block.get("text") for block in body["content"]])


def _streamed(question: Question, text: str) -> str:
    """The answer that a stream adds up to, in the form of the whole one."""
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    if question.read is _of_responses:
        return question.read(events[-1]["response"])
    if question.read is _of_anthropic:
        texts: dict[int, str] = {}
        for event in events:
            if event["type"] == "content_block_start":
                texts[event["index"]] = event["content_block"].get("text", "")
            elif event["type"] == "content_block_delta":
                texts[event["index"]] += event["delta"].get("text", "")
        assert events[-1]["type"] == "message_stop"
        return json.dumps(list(texts.values()))
    assert text.rstrip().endswith("[DONE]"), text[-200:]
    message: dict[str, Any] = {"content": "", "reasoning_content": None}
    calls: dict[int, dict[str, str]] = {}
    for event in events:
        delta = event["choices"][0]["delta"]
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message[name] or "") + delta[name]
        for call in delta.get("tool_calls", []):
            own = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            for name, piece in call["function"].items():
                own[name] += piece
    return json.dumps([message["reasoning_content"], message["content"], list(calls.values())])


class Clients:
    """All clients against one server; `expected` by `Question.key`."""

    def __init__(self, url: str, asked: list[Question], expected: dict[str, str], tally: Tally) -> None:
        self.url, self.asked, self.expected, self.tally = url, asked, expected, tally

    async def run(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as http:
            await asyncio.gather(*(self._one(http, random.Random(seed), end) for seed in range(count)))

    async def _one(self, http: Any, draw: random.Random, end: float) -> None:
        ways = {"stream": 40, "whole": 12, "leave": 20, "slow": 8, "announced": 8, "sent": 1, "nonsense": 8}
        while time.monotonic() < end:
            way = draw.choices(list(ways), list(ways.values()))[0]
            question = draw.choice(self.asked)
            try:
                await getattr(self, f"_{way}")(http, question, draw)
                self.tally.done[way] += 1
            except Exception as error:  # whatever goes wrong on the wire is an answer that was not given
                self.tally.check(way, f"{type(error).__name__}: {error}", "no error")
            await asyncio.sleep(draw.random() * 0.2)

    async def _stream(self, http: Any, question: Question, draw: random.Random) -> None:
        async with http.stream("POST", question.path, json={**question.body, "stream": True}) as response:
            text = "".join([piece async for piece in response.aiter_text()])
        self.tally.check("stream", _streamed(question, text), self.expected[question.key()])

    async def _whole(self, http: Any, question: Question, draw: random.Random) -> None:
        response = await http.post(question.path, json=question.body)
        self.tally.check("whole", question.read(response.json()), self.expected[question.key()])

    async def _leave(self, http: Any, question: Question, draw: random.Random) -> None:
        async with http.stream("POST", question.path, json={**question.body, "stream": True}) as response:
            left = draw.randrange(6)
            async for _ in response.aiter_text():
                left -= 1
                if left < 0:
                    return

    async def _slow(self, http: Any, question: Question, draw: random.Random) -> None:
        """A client whose window is small and which sleeps between reads."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2048)
        try:
            body = json.dumps({**question.body, "stream": True}).encode()
            head = f"POST {question.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            got = b""
            while piece := await asyncio.wait_for(reader.read(400), 300):
                got += piece
                await asyncio.sleep(draw.random() * 0.05)
        finally:
            writer.close()
        head, _, rest = got.partition(b"\r\n\r\n")
        text = _dechunked(rest).decode() if b"chunked" in head.lower() else rest.decode()
        self.tally.check("slow", _streamed(question, text), self.expected[question.key()])

    async def _announced(self, http: Any, question: Question, draw: random.Random) -> None:
        headers = {"content-type": "application/json", "content-length": str(TOO_LARGE)}
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "127.0.0.1", **headers}.items())
            writer.write(f"POST {question.path} HTTP/1.1\r\n{lines}\r\n".encode() + b" " * 1000)
            status = await asyncio.wait_for(reader.readline(), 60)
        finally:
            writer.close()
        self.tally.check("announced", status.split()[1:2], [b"413"])

    async def _sent(self, http: Any, question: Question, draw: random.Random) -> None:
        async def body() -> Any:
            for _ in range(TOO_LARGE >> 20):
                yield b" " * (1 << 20)

        try:
            response = await http.post(question.path, content=body(), headers={"content-type": "application/json"})
        except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            return  # the server answered and closed before it had read all of it
        self.tally.check("sent", response.status_code, 413)

    async def _nonsense(self, http: Any, question: Question, draw: random.Random) -> None:
        content = draw.choice(
            [b"{", b"[]", b'{"model": "minke"}', draw.randbytes(200), b'{"model": "x", "messages": []}']
        )
        response = await http.post(question.path, content=content, headers={"content-type": "application/json"})
        self.tally.check("nonsense", (response.status_code, "error" in response.json()), (400, True))


def _dechunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        out, data = out + data[:length], data[length + 2 :]
    return out


@dataclass
class Seen:
    """What the server process holds."""

    resident_mib: float
    threads: int
    sockets: int


def look_at(pid: int) -> Seen:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = [os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()]
    sockets = sum(one.startswith("socket:") for one in descriptors)
    return Seen(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), sockets)


async def soak(url: str, pid: int, count: int, seconds: float) -> dict[str, Any]:
    """The whole trial against a running server."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        asked = questions(90)
        if (await http.post("/anthropic/v1/messages", json={})).status_code == 404:
            asked = [one for one in asked if one.read is not _of_anthropic]
        expected = {}
        for one in asked:
            response = await http.post(one.path, json=one.body)
            assert response.status_code == 200, response.text
            expected[one.key()] = one.read(response.json())
        before, tally, memory = look_at(pid), Tally(), []
        running = asyncio.ensure_future(Clients(url, asked, expected, tally).run(count, seconds))
        while not running.done():
            await asyncio.wait({running}, timeout=1)
            memory.append(look_at(pid).resident_mib)
        await running
        await asyncio.sleep(3)
        stats = (await http.get("/stats")).json()["minke"]
    left = {"running": stats["running"], "waiting": stats["waiting"], "state_bytes": sum(stats["state_bytes"].values())}
    after = look_at(pid)
    left |= {"sockets": max(0, after.sockets - before.sockets), "threads": max(0, after.threads - before.threads - 40)}
    fifth = max(memory[: len(memory) // 5 + 1])
    return {
        "tally": tally, "left": left, "settled_mib": fifth, "end_mib": memory[-1], "most_mib": max(memory),
        "threads": [before.threads, after.threads], "different": len(asked), "sampled": stats["sampled_tokens"],
    }  # fmt: skip


def serve(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rorqual", "serve", "minke", "--port", str(port), "--max-running", "32"]
    command += ["--log", "off", "--max-queue", "1000", "--cache-bytes", str(CACHE_BYTES)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="30 seconds")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=None, help="300, or 30 with --quick")
    args = parser.parse_args()
    seconds = args.seconds or (30.0 if args.quick else 300.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve(port)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", server)
        seen = asyncio.run(soak(f"http://127.0.0.1:{port}", server.pid, args.clients, seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    tally, left = seen.pop("tally"), seen.pop("left")
    case = f"{args.clients}-clients/minke/{seconds:.0f}s"
    config = {**seen, "done": dict(tally.done), "examples": tally.wrong[:5], "machine": measure.machine()}
    for name, unit, ours, peer, peer_name, more in (
        ("wrong", "answers", len(tally.wrong), tally.compared, "compared", config),
        ("left", "things", sum(left.values()), None, "none", left),
        ("memory", "MiB", seen["end_mib"], seen["settled_mib"], "largest in the first fifth of the time", config),
    ):
        line = {
            "name": f"soak.{name}", "case": case, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
            "ratio": None, "bound": 0 if name != "memory" else None, "bound_share": 0, "spread": {}, "config": more,
        }  # fmt: skip
        measure.print_line(line, as_json=args.json)
    return int(bool(tally.wrong) or any(left.values()))


def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("the server did not start; its messages stand above")


if __name__ == "__main__":
    sys.exit(main())
