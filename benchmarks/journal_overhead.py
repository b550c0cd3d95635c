"""What a journal costs a decoder of 1,000 tokens a second; a part of `journal.py`.

The decoder spends one core. After each of its steps every stream has a token more, and a sink takes it: nothing, our
journal, the peer, or a thread that only makes the system calls (the bound). The four decode by turns, block by block,
so a slow moment of the machine hits all of them; a round's shares are taken against that round's block without a sink.

All three commit in a thread of their own and at the same moments: after every so many steps, or within so many
seconds of the first token that waits. A commit stores a record a stream, of all its tokens since the commit before.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
from journal_sqlite import connect, insert

from rorqual.journal import Journal, Tokens
from rorqual.journal.disk import Disk
from rorqual.journal.tokens import encode_tokens

TOKENS_PER_S = 1000
BLOCK_TOKENS = 512

Token = tuple[int, int, int, float]
"""Stream, position, id, log-probability."""


@dataclass(frozen=True)
class Policy:
    """When to commit: after every so many steps, or within so many seconds."""

    streams: int
    every: int = 1
    within_s: float | None = None

    @property
    def name(self) -> str:
        """Of the case."""
        when = f"every-{self.every * self.streams}" if self.within_s is None else f"within-{1000 * self.within_s:.0f}ms"
        return f"overhead/{self.streams}-streams/{when}"


POLICIES = (
    Policy(64),
    Policy(8),
    Policy(8, every=4),
    Policy(8, within_s=0.032),
    Policy(1, every=16),
    Policy(1, every=32),
    Policy(1, within_s=0.032),
    Policy(1),
)


class Decoder:
    """Spends one core so that it makes TOKENS_PER_S tokens: matrix-vector products over more bytes than caches hold."""

    def __init__(self) -> None:
        self._matrix = np.random.default_rng(1).random((512, 2048), dtype=np.float32)
        self._vector = np.ones(2048, dtype=np.float32)
        self._products_per_s = max(self._speed() for _ in range(3))

    def _speed(self) -> float:
        start = time.thread_time()
        self._work(1500)
        return 1500 / (time.thread_time() - start)

    def _work(self, products: int) -> None:
        for _ in range(products):
            np.dot(self._matrix, self._vector)

    def run(self, streams: int, after_step: Callable[[], None]) -> None:
        """A block: each step gives one token to each stream."""
        products = max(1, round(self._products_per_s / TOKENS_PER_S * streams))
        for _ in range(BLOCK_TOKENS // streams):
            self._work(products)
            after_step()


class Plain:
    """No journal. Also what the others have in common."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.step = policy, 0

    def after_step(self) -> None:
        """Take a token of each stream."""

    def settle(self) -> None:
        """Return once all tokens are durable."""

    def close(self) -> None:
        """The end."""


class Ours(Plain):
    """`Journal.append_token` and `commit_soon`."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        super().__init__(policy)
        self.journal = Journal(folder)

    def after_step(self) -> None:
        """Take a token of each stream."""
        step, append = self.step, self.journal.append_token
        for stream in range(self.policy.streams):
            append(stream, step, 3, step, -0.5)
        self.step = step + 1
        if self.policy.within_s is not None:
            self.journal.commit_soon(within_s=self.policy.within_s)
        elif self.step % self.policy.every == 0:
            self.journal.commit_soon()

    def settle(self) -> None:
        """Return once all tokens are durable."""
        self.journal.commit()

    def close(self) -> None:
        """The end. All of it must be there."""
        found = sum(len(record.ids) for _, record in self.journal.replay() if isinstance(record, Tokens))
        assert found == self.step * self.policy.streams
        self.journal.close()


class Threaded(Plain):
    """Hands tokens to a thread, which calls `store` with those of a commit."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._queue: SimpleQueue[list[Token] | str] = SimpleQueue()
        self._settled: SimpleQueue[None] = SimpleQueue()
        self._waiting: list[Token] = []
        self._thread = Thread(target=self._run)
        self._thread.start()

    def after_step(self) -> None:
        """Take a token of each stream."""
        step = self.step
        self._waiting += [(stream, step, step, -0.5) for stream in range(self.policy.streams)]
        self.step = step + 1
        if self.policy.within_s is not None or self.step % self.policy.every == 0:
            self._hand_over()

    def _hand_over(self) -> None:
        self._queue.put(self._waiting)
        self._waiting = []

    def settle(self) -> None:
        """Return once all tokens are durable."""
        self._hand_over()
        self._queue.put("settle")
        self._settled.get()

    def close(self) -> None:
        """The end."""
        self._queue.put("end")
        self._thread.join()

    def _run(self) -> None:
        tokens: list[Token] = []
        due: float | None = None
        self.open()
        while True:
            try:
                message = self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                message = "due"
            if isinstance(message, list):
                tokens += message
                if self.policy.within_s is None:
                    if not self._queue.empty():
                        continue
                elif due is None:
                    due = time.monotonic() + self.policy.within_s
                    continue
                elif time.monotonic() < due:
                    continue
            due = None
            if tokens:
                self.store(tokens)
                tokens = []
            if message == "settle":
                self._settled.put(None)
            if message == "end":
                return self.shut()

    def open(self) -> None:
        """Called in the thread."""

    def store(self, tokens: list[Token]) -> None:
        """Make them durable."""

    def shut(self) -> None:
        """Called in the thread."""


class Peer(Threaded):
    """A row a stream, one transaction a commit."""

    def __init__(self, policy: Policy, path: Path) -> None:
        self._path, self._lsn = path, count(1)
        super().__init__(policy)

    def open(self) -> None:
        """Called in the thread."""
        self._database = connect(self._path)

    def store(self, tokens: list[Token]) -> None:
        """Make them durable."""
        streams: dict[int, tuple[int, list[int], list[float]]] = {}
        for stream, position, token, logprob in tokens:
            if stream in streams:
                _, ids, logprobs = streams[stream]
                ids.append(token)
                logprobs.append(logprob)
            else:
                streams[stream] = (position, [token], [logprob])
        rows = [
            (next(self._lsn), Tokens.TYPE, encode_tokens(Tokens(stream, first, 3, tuple(ids), tuple(logprobs))))
            for stream, (first, ids, logprobs) in streams.items()
        ]
        insert(self._database, rows)

    def shut(self) -> None:
        """Called in the thread."""
        self._database.close()


class Bound(Threaded):
    """The bytes of our frames, written and synced where zeros were: what no log can do without."""

    def __init__(self, policy: Policy, path: Path) -> None:
        self._disk = Disk()
        self._descriptor, self._offset = self._disk.create(path), 0
        self._disk.make_room(self._descriptor, 0, 1 << 20)
        super().__init__(policy)

    def store(self, tokens: list[Token]) -> None:
        """Make them durable."""
        data = bytes(44 * self.policy.streams + 8 * len(tokens))
        if self._offset + len(data) > 1 << 20:
            self._offset = 0
        self._disk.write(self._descriptor, data, self._offset, synced=True)
        self._offset += len(data)

    def shut(self) -> None:
        """Called in the thread."""
        self._disk.close(self._descriptor)


@dataclass(frozen=True)
class Block:
    """What a block took, in seconds. cpu_s: of all threads, without what the decoder itself spent."""

    wall_s: float
    decoding_s: float
    cpu_s: float


def block(decoder: Decoder, sink: Plain) -> Block:
    """Decode a block. Waiting for its last commit counts as CPU time, but not as decoding's wall time."""
    sunk = 0.0

    def measured() -> None:
        nonlocal sunk
        start = time.thread_time()
        sink.after_step()
        sunk += time.thread_time() - start

    everything, mine, wall = time.process_time(), time.thread_time(), time.perf_counter()
    decoder.run(sink.policy.streams, measured)
    wall, decoding = time.perf_counter() - wall, time.thread_time() - mine - sunk
    sink.settle()
    return Block(wall, decoding, time.process_time() - everything - decoding)


@dataclass
class Shares:
    """Percent of decoding's CPU time and of its wall time, and tokens a second by the clock, one of each a round."""

    cpu: list[float]
    wall: list[float]
    tokens_per_s: list[float]


def overhead(decoder: Decoder, policy: Policy, home: Path, rounds: int) -> dict[str, Shares]:
    """The shares of `ours`, `peer` and `bound` under a policy. The first round only warms up."""
    sinks = {
        "plain": Plain(policy),
        "ours": Ours(policy, home / "ours"),
        "peer": Peer(policy, home / "peer"),
        "bound": Bound(policy, home / "bound"),
    }
    names = list(sinks)
    shares = {name: Shares([], [], []) for name in names[1:]}
    for turn in range(rounds + 1):
        order = names[turn % 4 :] + names[: turn % 4]
        found = {name: block(decoder, sinks[name]) for name in (order if turn % 2 else order[::-1])}
        plain = found["plain"]
        for name, share in shares.items():
            if turn:
                one = found[name]
                share.cpu.append(100 * (one.cpu_s / one.decoding_s - plain.cpu_s / plain.decoding_s))
                share.wall.append(100 * (one.wall_s / plain.wall_s - 1))
                share.tokens_per_s.append(BLOCK_TOKENS / one.wall_s)
    for sink in sinks.values():
        sink.close()
    return shares
