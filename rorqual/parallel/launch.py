"""Starting and joining the processes of a run.

Two ways lead into a run of several processes. `torchrun` starts them and says who is who in the environment; `joined`
takes part. Without it, `launch` starts them itself on this machine: a supervisor (the calling process) and N ranks,
which meet at a store that the supervisor keeps. When a rank ends early the supervisor ends the others and tells why;
when the supervisor is killed the ranks see their pipe close and end too, so nothing is left running.

On a CPU the ranks talk through gloo over the loopback device, on an accelerator through the backend that torch names
for it; tensors on the CPU always go through gloo.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from rorqual import log
from rorqual.errors import ConfigError, RorqualError
from rorqual.parallel.mesh import environment_world

logger = log.get(__name__)

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
_OWN_STORE = "RORQUAL_STORE"
"""Set in ranks that `launch` started: the supervisor keeps the store, so no rank serves it."""

_round = itertools.count()

SETTLE_SECONDS = 1.0
"""How long the supervisor waits, after a first failure, for other ranks to tell theirs: the cause may come second."""


@dataclass
class _Child:
    rank: int
    process: SpawnProcess
    pipe: Connection
    answer: tuple[bool, Any] | None = None
    """(True, result) or (False, exception), once it has come."""


def is_joined_from_outside() -> bool:
    """Whether somebody else (torchrun, or a supervisor) started this process as one rank of several."""
    return environment_world() > 1


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be part of the process group that the environment describes; nothing where there is one process.

    Raises: ConfigError when the environment is incomplete.
    """
    if environment_world() == 1:
        yield
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set, so the ranks cannot find "
            "each other. Start them with torchrun, or with `rorqual train --nproc`, or unset WORLD_SIZE."
        )
    backend = "gloo"
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    world, rank = environment_world(), int(os.environ["RANK"])
    store = None
    if os.environ.get(_OWN_STORE):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        server = dist.TCPStore(address, port, world, is_master=False, timeout=timedelta(minutes=5))
        store = dist.PrefixStore(str(next(_round)), server)  # a process may join again, once it has left
    dist.init_process_group(backend, store=store, rank=rank if store else -1, world_size=world if store else -1)
    yield  # after an error the group is left as it is: closing it would wait for ranks that may be gone
    dist.barrier()  # nobody closes connections that another rank still reads
    dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device of this rank: an accelerator named without index becomes the one of this rank's local number."""
    device = torch.device(name)
    if device.type == "cpu" or ":" in name or not is_joined_from_outside():
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def local_world() -> int:
    """Ranks on this machine, of the launch that this process is part of."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(environment_world())))


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> Any:
    """Run `function(*arguments)` as `processes` ranks on this machine; returns what rank 0 returns.

    `function` and its arguments must be picklable, and the calling script must be importable without side effects
    (`if __name__ == "__main__"`). Stop signals are passed on to the ranks. Raises: what a rank raised, where it is
    one of Rorqual's errors; RorqualError naming the rank when one failed otherwise or was killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[_Child] = []
    context = multiprocessing.get_context("spawn")
    try:
        with _passing_on_signals(children) as stopped:
            for rank in range(processes):
                here, there = context.Pipe()
                process = context.Process(target=_rank_main, args=(there, function, arguments), name=f"rank {rank}")
                with _environment(rank, processes, store.port):
                    process.start()
                there.close()
                children.append(_Child(rank, process, here))
            _supervise(children)
    except RorqualError:
        if any(c.process.exitcode == -signal.SIGTERM for c in children) and stopped:
            raise KeyboardInterrupt from None  # stopped before the ranks listened
        raise
    finally:
        _end(children)
    for child in children:
        if child.rank == 0 and child.answer is not None:
            return child.answer[1]
    raise AssertionError("rank 0 gave no answer")


def _supervise(children: list[_Child]) -> None:
    """Until all have answered. Raises what the first failure was, chosen so that the cause comes before its effects."""
    running = list(children)
    first_failure: float | None = None
    failures: list[tuple[_Child, Any]] = []
    while running:
        ready = wait([c.pipe for c in running] + [c.process.sentinel for c in running], timeout=0.2)
        for child in list(running):
            if child.pipe in ready:
                with contextlib.suppress(EOFError, OSError):
                    child.answer = child.pipe.recv()
            elif child.process.sentinel not in ready:
                continue
            running.remove(child)
            if child.answer is None or not child.answer[0]:
                failures.append((child, None if child.answer is None else child.answer[1]))
                first_failure = first_failure or time.monotonic()
        if first_failure is not None:
            has_died = any(error is None for _, error in failures)  # nothing that comes later can be the cause of that
            if has_died or not running or time.monotonic() - first_failure > SETTLE_SECONDS:
                raise _cause(failures, len(children))


def _cause(failures: list[tuple[_Child, Any]], processes: int) -> BaseException:
    """One of Rorqual's errors, else a rank that died without a word, else whatever came first: others see connections
    close when a rank ends, so theirs are effects.
    """
    for _, error in failures:
        if isinstance(error, RorqualError | KeyboardInterrupt):
            return error
    for child, error in failures:
        if error is None:
            child.process.join(timeout=5)
            code = child.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            return RorqualError(
                f"Training process {child.rank} of {processes} {how}. The others cannot go on without it and were "
                "ended. If memory ran out, use fewer processes or smaller micro-batches; continue with --resume."
            )
    child, error = failures[0]
    for note in getattr(error, "__notes__", ()):
        logger.error("Process %d of %d:\n%s", child.rank, processes, note)
    return RorqualError(
        f"Training process {child.rank} of {processes} failed: {error}. The others cannot go on without it and were "
        "ended. Continue with --resume, or with fewer processes."
    )


def _end(children: list[_Child]) -> None:
    """No rank outlives the supervisor's call."""
    for child in children:
        child.pipe.close()  # those that wait see it
    deadline = time.monotonic() + (10.0 if all(c.answer and c.answer[0] for c in children) else 0.0)
    for child in children:
        child.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if child.process.is_alive():
            child.process.kill()
    for child in children:
        child.process.join()


@contextlib.contextmanager
def _environment(rank: int, processes: int, port: int) -> Iterator[None]:
    """What torchrun would put into a rank's environment; taken over when the process starts."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": _loopback(), _OWN_STORE: 1}
    values = {name: str(value) for name, value in (here | there).items() if value is not None}
    before = {name: os.environ.get(name) for name in (*_NAMES, _OWN_STORE)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _loopback() -> str | None:
    """Name of the loopback device; without it gloo takes the address that the host's name resolves to."""
    try:
        names = [name for _, name in socket.if_nameindex()]
    except OSError:
        return None
    return next((name for name in names if name in ("lo", "lo0")), None)


@contextlib.contextmanager
def _passing_on_signals(children: list[_Child]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM of the supervisor become SIGTERM of every rank; they agree on when to stop."""
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        for child in children:
            if child.process.is_alive():
                child.process.terminate()

    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller keeps the signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, pass_on)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rank_main(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """A rank's life: run the function, answer, wait until the supervisor has heard it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in a terminal reaches the supervisor alone, which passes it on once
    is_over = threading.Event()

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()  # nothing is ever sent: this returns when the supervisor is gone or closes the pipe
        if not is_over.is_set():
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    answer: tuple[bool, Any]
    try:
        answer = (True, function(*arguments))
    except KeyboardInterrupt:
        answer = (False, KeyboardInterrupt())
    except Exception as error:  # whatever it is, the supervisor has to hear it
        answer = (False, _portable(error))
    is_over.set()
    with contextlib.suppress(BrokenPipeError, OSError):
        pipe.send(answer if os.environ["RANK"] == "0" or not answer[0] else (True, None))
    if not answer[0]:
        os._exit(1)  # at once: connections to ranks that are gone must not hold this one


def _portable(error: Exception) -> Exception:
    """The error itself where it is one of Rorqual's and survives the way, else one that tells the same, and where."""
    if isinstance(error, RorqualError):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                return error
        return RorqualError(str(error))
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)))
    return told
