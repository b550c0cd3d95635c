"""Runs inside a sandbox, handed to a bare `python3 -I` on standard input: a warm interpreter, forked for each call.

It uses nothing but the standard library (of Python 3.8 or later), because it is sent in as text and no file of ours
lies inside. One line of JSON comes in for each call, one goes out. For each call: this process forks a keeper, which
becomes the subreaper of all below it and forks the worker; the worker runs the code, the keeper bounds its time and
output, ends whatever it left behind, and hands the outcome up. A call that is `keyed` runs once however often it comes
in: while it runs, its one report answers all, and afterwards the kept report does, until a line says to `forget` it.
"""

from __future__ import annotations

import base64
import collections  # noqa: F401 - what small programs import is loaded once, before the forks
import contextlib
import ctypes
import dataclasses  # noqa: F401
import datetime  # noqa: F401
import decimal  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import gc
import io  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import random
import re  # noqa: F401
import selectors
import signal
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import textwrap  # noqa: F401
import time
import traceback
import types
from typing import Any

MAX_VALUE = 4 << 20
KEPT = 16 << 20
"""Bytes of reports that wait for a client to come back for them; of the oldest beyond that only the name is kept."""
SUBREAPER = 36
LOOK_S = 0.05


def children_of(root: int) -> set[int]:
    """All descendants of a process, zombies left out."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    text = file.read()
                state, parent = text[text.rindex(b")") + 2 :].split()[:2]
                if state not in (b"Z", b"X"):
                    parents[int(name)] = int(parent)
    found, grew = {root}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return found - {root}


def end_tree(root: int) -> None:
    """Stop all below `root`, so that nothing forks away, then kill all."""
    for _ in range(200):
        below = children_of(root)
        if not below:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in children_of(root) | below if number == signal.SIGSTOP else children_of(root):
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


class Capped:
    """The first and the last half of a stream."""

    def __init__(self, limit: int) -> None:
        self.half, self.head, self.tail, self.lost = limit // 2, b"", bytearray(), 0

    def add(self, data: bytes) -> None:
        """Take bytes of the stream; what is neither of the first nor of the last half is only counted."""
        room = self.half - len(self.head)
        if room > 0:
            self.head, data = self.head + data[:room], data[room:]
        self.tail += data
        over = len(self.tail) - self.half
        if over > 0:
            del self.tail[:over]
            self.lost += over

    def fields(self, name: str) -> dict[str, Any]:
        """The kept bytes (base64) and the number of lost ones, as a report has them."""
        return {name: base64.b64encode(self.head + bytes(self.tail)).decode(), f"{name}_lost": self.lost}


def end_strays(keepers: set[int]) -> None:
    """Ends children that are no keeper's: what a worker that killed its keeper left."""
    for pid in children_of(os.getpid()):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
            if parent == os.getpid() and pid not in keepers:
                os.kill(pid, signal.SIGSTOP)
                end_tree(pid)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def work(task: dict[str, Any], result: int) -> None:
    """In the worker: run the code, and write what came of it to `result`."""
    outcome = {}
    try:
        random.seed()
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(task["source"], "<call>", "exec"), module.__dict__)
        value = None
        if task["entry"] is not None:
            function = getattr(module, task["entry"])
            value = function(*task["args"], **task["kwargs"])
        text = json.dumps(value)
        if len(text) > MAX_VALUE:
            raise ValueError(f"the result takes {len(text):,} characters as JSON; at most {MAX_VALUE:,} are carried")
        outcome = {"value": value}
    except BaseException as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        ours = [line for line in lines if 'File "<string>"' not in line]  # our own frames
        outcome = {"error": type(error).__name__, "message": str(error), "traceback": "".join(ours)[-100_000:]}
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    data = json.dumps(outcome).encode()
    while data:
        data = data[os.write(result, data) :]


def keep(task: dict[str, Any], upward: int) -> None:
    """In the keeper of one call: bounds the worker and reports."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    os.setsid()
    pipes = [os.pipe() for _ in range(3)]
    worker = os.fork()
    if worker == 0:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        result = os.dup2(pipes[2][1], 250)
        os.closerange(3, 250)
        os.set_inheritable(250, False)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        work(task, result)
        os._exit(0)
    start = time.monotonic()
    looked, paused = start, 0.0

    def woken(*_: object) -> None:
        """The sandbox was paused, and this process stopped with it: since it last looked at the clock, give or take."""
        nonlocal looked, paused
        now = time.monotonic()
        paused, looked = paused + max(0.0, now - looked - LOOK_S), now

    signal.signal(signal.SIGCONT, woken)
    out, err, value = Capped(task["max_output"]), Capped(task["max_output"]), Capped(2 * MAX_VALUE + (1 << 20))
    watched = selectors.DefaultSelector()
    for (reader, writer), sink in zip(pipes, (out, err, value)):  # noqa: B905 - strict= is newer than 3.8
        os.close(writer)
        os.set_blocking(reader, False)
        watched.register(reader, selectors.EVENT_READ, sink)
    timed_out = False
    status: int | None = None
    while True:
        looked = time.monotonic()
        left = None if task["timeout"] is None else start + paused + task["timeout"] - looked
        if left is not None and left <= 0:
            timed_out = True
            break
        for key, _ in watched.select(LOOK_S if left is None else min(left, LOOK_S)):
            data = os.read(key.fd, 65536)
            key.data.add(data) if data else watched.unregister(key.fd)
        if status is None:
            pid, code = os.waitpid(worker, os.WNOHANG)
            status = code if pid else None
        if status is not None or not watched.get_map():
            break
    end_tree(os.getpid())
    for key in list(watched.get_map().values()):  # what is in the pipes still counts
        with contextlib.suppress(BlockingIOError):
            while data := os.read(key.fd, 65536):
                key.data.add(data)
    if status is None:
        with contextlib.suppress(ChildProcessError):
            status = os.waitpid(worker, 0)[1]
    report = {"id": task["id"], "timed_out": timed_out, "paused_ms": paused * 1000}
    report["duration_ms"] = (time.monotonic() - start - paused) * 1000
    report.update(out.fields("stdout"), **err.fields("stderr"))
    try:
        report.update(json.loads(value.head + bytes(value.tail)))
    except ValueError:
        number = status & 127 if status is not None else 9
        why = (
            "it ran out of time" if timed_out else f"its process was ended by signal {number}" if number else "it left"
        )
        report.update(error="WorkerEnded", message=why, traceback="", signal=number)
    data = json.dumps(report).encode()
    while data:
        data = data[os.write(upward, data) :]
    os._exit(0)


class Reports:
    """Reports of keyed calls, by id, for a client that comes in a dead one's place."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def keep(self, task: str, report: bytes) -> None:
        """Keep one, at the cost of the oldest."""
        self._kept[task] = report
        size = sum(map(len, self._kept.values()))
        for name in list(self._kept):
            if size <= KEPT:
                return
            size -= len(self._kept[name])
            self._kept[name] = b""

    def find(self, task: str) -> bytes | None:
        """What is to be said of a call that was made already; None when it was not."""
        report = self._kept.get(task)
        return json.dumps({"id": task, "dropped": True}).encode() if report == b"" else report

    def forget(self, tasks: list[str]) -> None:
        """Their results are on record elsewhere."""
        for task in tasks:
            self._kept.pop(task, None)


def send(report: bytes) -> None:
    """Write a report's line."""
    report += b"\n"
    while report:
        report = report[os.write(1, report) :]


def serve() -> None:
    """Read calls, fork, and pass outcomes on, many at a time."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    watched = selectors.DefaultSelector()
    watched.register(0, selectors.EVENT_READ, None)
    line = bytearray()
    running: dict[int, tuple[dict[str, Any], bytearray, int]] = {}
    reports = Reports()
    while True:
        for key, _ in watched.select():
            data = os.read(key.fd, 1 << 18)
            if key.fd != 0:
                if data:
                    running[key.fd][1].extend(data)
                    continue
                watched.unregister(key.fd)
                os.close(key.fd)
                task, report, pid = running.pop(key.fd)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:  # what a call's keeper left to us when it ended
                        pass
                if not report:
                    end_strays({other for _, _, other in running.values()})
                lost = {"id": task["id"], "error": "WorkerEnded", "message": "it ended its keeper", "traceback": ""}
                said = bytes(report or json.dumps(lost).encode())
                if task["keyed"]:
                    reports.keep(task["id"], said)
                send(said)
                continue
            if not data:
                return
            line += data
            while b"\n" in line:
                text, _, line = line.partition(b"\n")
                try:
                    task = json.loads(text)
                except ValueError:  # what a client left that died in the middle of a line
                    continue
                if "forget" in task:
                    reports.forget(task["forget"])
                    continue
                earlier = reports.find(task["id"])
                if earlier is not None:
                    send(earlier)
                    continue
                if any(other["id"] == task["id"] for other, _, _ in running.values()):
                    continue
                reader, writer = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.close(reader)
                    try:
                        keep(task, writer)
                    finally:
                        os._exit(1)
                os.close(writer)
                about = {"id": task["id"], "keyed": task["keyed"]}
                running[reader] = (about, bytearray(), pid)
                watched.register(reader, selectors.EVENT_READ, None)


if __name__ == "__main__":
    os.write(1, b'{"id": ""}\n')
    serve()
