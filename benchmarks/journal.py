"""The journal beside SQLite (WAL, synchronous FULL) in the same run: appending, its cost to a decoder, recovery.

    python benchmarks/journal.py
    python benchmarks/journal.py --quick --json

append     records per second and per CPU-second at batches of 1 to 4096 records a commit. Both sides begin with the
           same `Tokens` records of one token and store the same payload bytes. bound: the same bytes written and synced
           by bare system calls.
overhead   a decoder that spends one core on 1,000 tokens a second, one token a record, commits in the journal's thread:
           CPU time of the journal in percent of the decoder's. The peer does the same with a thread of its own.
recovery   ten million records of one token, by a process that vanishes: opening, and reading everything, each in a new
           process with its peak memory. bound: the checksum of the same bytes, at the speed of zlib.

CPU time is that of the process, all threads; what the kernel does in threads of its own is in neither side's.
"""

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from measure import Rate, Stopwatch, interleaved, machine, middle, note, print_line, process_bytes, spread

from rorqual.journal import Event, Journal, Tokens
from rorqual.journal.disk import Disk
from rorqual.journal.records import decode_tokens, encode_tokens

PEER = f"SQLite {sqlite3.sqlite_version} (WAL, synchronous=FULL)"
BATCHES = (1, 8, 64, 512, 4096)
TOKENS_PER_S = 1000
BLOCK = 5000
"""Records a commit when ten million are written."""

Batches = list[list[Tokens]]


def batches_of(size: int, number: int) -> Batches:
    """Batches of single-token records of 64 requests."""
    return [
        [Tokens(k % 64, turn, 3, ((turn * size + k) % 129_280,), (-0.5,)) for k in range(size)]
        for turn in range(number)
    ]


def append_ours(folder: Path, batches: Batches) -> Rate:
    """One commit a batch."""
    with Journal(folder) as journal:
        journal.append(Event("begin"))
        journal.commit()
        watch = Stopwatch()
        for batch in batches:
            if len(batch) == 1:
                journal.append(batch[0])
            else:
                journal.append_many(batch)
            journal.commit()
        return watch.rate(len(batches) * len(batches[0]))


def connect(path: Path) -> sqlite3.Connection:
    """The peer's database with its table."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE IF NOT EXISTS records (lsn INTEGER PRIMARY KEY, type INTEGER, payload BLOB)")
    return database


def append_peer(path: Path, batches: Batches) -> Rate:
    """One transaction a batch; payloads made as ours are."""
    with closing(connect(path)) as database:
        lsn, insert, kind = 1, "INSERT INTO records VALUES (?, ?, ?)", Tokens.TYPE
        watch = Stopwatch()
        for batch in batches:
            if len(batch) == 1:
                database.execute(insert, (lsn, kind, encode_tokens(batch[0])))
            else:
                database.execute("BEGIN")
                database.executemany(insert, [(n, kind, encode_tokens(record)) for n, record in enumerate(batch, lsn)])
                database.execute("COMMIT")
            lsn += len(batch)
        return watch.rate(len(batches) * len(batches[0]))


def append_bound(path: Path, batches: Batches) -> Rate:
    """The bytes of the frames, written and synced where zeros were: what no log can do without."""
    disk, size = Disk(), 52 * len(batches[0])
    descriptor = disk.create(path)
    disk.make_room(descriptor, 0, size * len(batches))
    data = os.urandom(size)
    watch = Stopwatch()
    for turn in range(len(batches)):
        disk.write(descriptor, data, turn * size, synced=True)
    rate = watch.rate(len(batches) * len(batches[0]))
    disk.close(descriptor)
    path.unlink()
    return rate


def measure_append(home: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """A line for the clock and one for the processor at each batch size."""
    turn = count()
    for size in BATCHES:
        note(f"append: batches of {size}")
        batches = batches_of(size, max(40, min(1500, 300_000 // size)))
        ours, peer = interleaved(
            lambda b=batches: append_ours(home / f"j{next(turn)}", b),  # type: ignore[misc]
            lambda b=batches: append_peer(home / f"d{next(turn)}", b),  # type: ignore[misc]
            repeats,
        )
        bounds = [append_bound(home / "bound", batches) for _ in range(repeats)]
        for unit, take in (("records/s", _wall), ("records/CPU-s", _cpu)):
            a, b, c = ([take(rate) for rate in rates] for rates in (ours, peer, bounds))
            config = {"payload_bytes": len(encode_tokens(batches[0][0])), "batch": size, "commits": len(batches)}
            case = f"append/batch-{size}/{'wall' if unit == 'records/s' else 'cpu'}"
            yield line(case, unit, a, b, middle(c), config)


def _wall(rate: Rate) -> float:
    return rate.wall


def _cpu(rate: Rate) -> float:
    return rate.cpu


def line(
    case: str, unit: str, ours: list[float], peer: list[float], bound: float | None, config: dict[str, Any]
) -> dict[str, Any]:
    """A finished measurement. Rates are better when larger, everything else when smaller."""
    a, b = middle(ours), middle(peer) if peer else None
    larger_is_better = unit.startswith("records/")
    ratio = None if b is None else (a / b if larger_is_better else b / a)
    share = None if not bound else (a / bound if larger_is_better else bound / a)
    return {
        "name": "journal",
        "case": case,
        "unit": unit,
        "ours": a,
        "peer": b,
        "peer_name": PEER,
        "ratio": ratio,
        "bound": bound,
        "bound_share": share,
        "spread": spread(ours, peer),
        "config": {**config, **machine()},
    }


class Decoder:
    """Spends one core so that it makes TOKENS_PER_S tokens: matrix-vector products over more bytes than caches hold."""

    def __init__(self) -> None:
        self._matrix = np.random.default_rng(1).random((512, 2048), dtype=np.float32)
        self._vector = np.ones(2048, dtype=np.float32)
        self._products_per_s = max(self._speed() for _ in range(3))

    def _speed(self) -> float:
        start = time.thread_time()
        self.work(1500)
        return 1500 / (time.thread_time() - start)

    def work(self, products: int) -> None:
        """So many products."""
        for _ in range(products):
            np.dot(self._matrix, self._vector)

    def run(self, tokens: int, streams: int, after_step: Callable[[int], None]) -> None:
        """Decode: each step gives one token to each stream."""
        products = max(1, round(self._products_per_s / TOKENS_PER_S * streams))
        for step in range(tokens // streams):
            self.work(products)
            after_step(step)


def measure_overhead(home: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Blocks of half a second with and without, by turns. `at_least`: see `Journal.commit_soon`."""
    decoder = Decoder()
    for streams, at_least in ((64, 1), (8, 1), (8, 16), (1, 16), (1, 1)):
        note(f"overhead: {streams} streams, a commit from {at_least} records on")
        ours, peer = [], []
        for turn in range(repeats):
            name = f"{streams}-{at_least}-{turn}"
            ours.append(overhead(decoder, streams, ours_after(home / f"o{name}", streams, at_least)))
            peer.append(overhead(decoder, streams, peer_after(home / f"p{name}", streams, at_least)))
        config = {"streams": streams, "at_least": at_least, "tokens_per_s": TOKENS_PER_S}
        config["wall_percent"] = {"ours": middle([o.wall for o in ours]), "peer": middle([p.wall for p in peer])}
        case = f"overhead/{streams}-streams/at-least-{at_least}"
        a, b = [o.cpu for o in ours], [p.cpu for p in peer]
        yield line(case, "% of decoding's CPU", a, b, None, config)


Sink = tuple[Callable[[int], None], Callable[[], None], Callable[[], None]]
"""What follows a step, what waits until all of it is durable, and the end."""


def overhead(decoder: Decoder, streams: int, sink: Sink, blocks: int = 4) -> Rate:
    """What the sink adds to decoding, in percent: of the wall, by blocks with and without it; of the CPU, directly.

    The CPU time is what the sink's calls take in this thread and all that other threads take: the difference of two
    runs would be more noise than figure on a busy machine.
    """
    after_step, settle, end = sink
    tokens = TOKENS_PER_S // 2 // streams * streams
    plain = logged = decoding = sunk = 0.0

    def measured(step: int) -> None:
        nonlocal sunk
        start = time.thread_time()
        after_step(step)
        sunk += time.thread_time() - start

    for block in range(2 * blocks):
        wall, everything, mine = time.perf_counter(), time.process_time(), time.thread_time()
        if block % 4 in (0, 3):  # so that drift hits both
            decoder.run(tokens, streams, lambda _: None)
            plain += time.perf_counter() - wall
            continue
        before = sunk
        decoder.run(tokens, streams, measured)
        mine = time.thread_time() - mine
        decoding += mine - (sunk - before)
        settle()
        sunk += time.process_time() - everything - mine
        logged += time.perf_counter() - wall
    end()
    return Rate(wall=100 * (logged / plain - 1), cpu=100 * sunk / decoding)


def ours_after(folder: Path, streams: int, at_least: int) -> Sink:
    """A record a token and a commit by the journal's thread."""
    journal = Journal(folder)

    def after_step(step: int) -> None:
        journal.append_many([Tokens(stream, step, 3, (step,), (-0.5,)) for stream in range(streams)])
        journal.commit_soon(at_least)

    return after_step, lambda: void(journal.commit()), journal.close


def peer_after(path: Path, streams: int, at_least: int) -> Sink:
    """The same with the peer: a thread of its own commits whatever is queued."""
    queue: SimpleQueue[list[Tokens] | None] = SimpleQueue()
    done: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        lsn = 1
        with closing(connect(path)) as database:
            while (batch := queue.get()) is not None:
                is_last = not batch
                while not is_last and not queue.empty():
                    more = queue.get() or []
                    is_last = not more
                    batch += more
                if batch:
                    rows = [(n, Tokens.TYPE, encode_tokens(record)) for n, record in enumerate(batch, lsn)]
                    database.execute("BEGIN")
                    database.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
                    database.execute("COMMIT")
                    lsn += len(rows)
                if is_last:
                    done.put(None)

    thread = Thread(target=run)
    thread.start()
    waiting: list[Tokens] = []

    def after_step(step: int) -> None:
        waiting.extend([Tokens(stream, step, 3, (step,), (-0.5,)) for stream in range(streams)])
        if len(waiting) >= at_least:
            queue.put(waiting.copy())
            waiting.clear()

    def settle() -> None:
        if waiting:
            queue.put(waiting.copy())
            waiting.clear()
        queue.put([])  # asks for an answer once all before it is committed
        done.get()

    def end() -> None:
        queue.put(None)
        thread.join()

    return after_step, settle, end


def void(_: object) -> None:
    """Nothing."""


def measure_recovery(home: Path, number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Writes once with each, then opens and reads in new processes, by turns."""
    for side in ("ours", "peer"):
        note(f"recovery: {number:,} records written by {side}")
        child("write", side, home, number)
    data = {part: {side: list[dict[str, float]]() for side in ("ours", "peer")} for part in ("open", "replay")}
    for turn in range(repeats):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            note(f"recovery: {side} read")
            for part, found in child("read", side, home, number).items():
                data[part][side].append(found)
    segments = sorted((home / "large-ours").glob("*.seg"))
    config: dict[str, Any] = {"records": number, "segment_mib": 64, "written_by": "a process that did not close"}
    config["file_bytes"] = {
        "ours": sum(path.stat().st_size for path in segments),
        "peer": sum(path.stat().st_size for path in home.glob("large-peer*")),
    }
    bounds = {"open": checksum_seconds(segments[-1:]), "replay": checksum_seconds(segments)}
    for part, sides in data.items():
        for unit, key, bound in (("s", "wall_s", bounds[part]), ("CPU-s", "cpu_s", None), ("MiB", "peak_mib", None)):
            ours, peer = ([found[key] for found in sides[side]] for side in ("ours", "peer"))
            yield line(f"recovery/{number // 10**6}M/{part}/{unit}", unit, ours, peer, bound, config)


def checksum_seconds(paths: list[Path]) -> float:
    """Seconds to read the files and take their checksum."""
    start = time.perf_counter()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                zlib.crc32(block)
    return time.perf_counter() - start


def child(what: str, side: str, home: Path, number: int) -> dict[str, dict[str, float]]:
    """Run a part in a process of its own; its measurements."""
    words = [sys.executable, __file__, "--child", what, side, str(home), str(number)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(run.stdout)
    return found


def in_child(what: str, side: str, home: Path, number: int) -> None:
    """`write` ends without closing anything; `read` prints what opening and reading took."""
    path = home / f"large-{side}"
    if what == "write":
        write_large(side, path, number)
        print("{}", flush=True)
        os._exit(0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, start, cpu = {}, time.perf_counter(), time.process_time()
    journal, database = (Journal(path), None) if side == "ours" else (None, connect(path))
    if database is not None:
        (last,) = database.execute("SELECT max(lsn) FROM records").fetchone()
    else:
        assert journal is not None
        last = journal.durable_lsn
    assert last == number, f"{last} of {number} records"
    found["open"] = figures(start, cpu, base)
    start, cpu, seen, total = time.perf_counter(), time.process_time(), 0, 0
    if journal is not None:
        for _, record in journal.replay():
            seen += 1
            total += record.ids[0] if isinstance(record, Tokens) else 0
    elif database is not None:
        for _, _, payload in database.execute("SELECT lsn, type, payload FROM records ORDER BY lsn"):
            seen += 1
            total += decode_tokens(payload).ids[0]
    assert seen == number and total == sum(n % 129_280 for n in range(number))
    found["replay"] = figures(start, cpu, base)
    print(json.dumps(found), flush=True)
    os._exit(0)  # as it was, for the next turn


def figures(start: float, cpu: float, base_kib: int) -> dict[str, float]:
    """Seconds since, by clock and processor, and by how much the memory has grown at most."""
    peak_mib = (process_bytes("VmHWM") // 1024 - base_kib) / 1024
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "peak_mib": peak_mib}


def write_large(side: str, path: Path, number: int) -> None:
    """`number` records, BLOCK a commit."""
    journal, database = (Journal(path), None) if side == "ours" else (None, connect(path))
    for start in range(0, number, BLOCK):
        block = [Tokens(n % 64, n // 64, 3, (n % 129_280,), (-0.5,)) for n in range(start, min(start + BLOCK, number))]
        if journal is not None:
            journal.append_many(block)
            journal.commit()
        elif database is not None:
            rows = [(n, Tokens.TYPE, encode_tokens(record)) for n, record in enumerate(block, start + 1)]
            database.execute("BEGIN")
            database.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
            database.execute("COMMIT")


def main() -> None:
    """Print a line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--only", choices=("append", "overhead", "recovery"), help="one of the three parts")
    parser.add_argument("--records", type=int, default=10_000_000, help="of recovery")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to measure; a temporary one otherwise")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, side, home, number = options.child
        in_child(what, side, Path(home), int(number))
    repeats = 1 if options.quick else 5
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="journal-") as name:
        home = Path(name)
        for part, lines in (
            ("append", measure_append(home, repeats)),
            ("overhead", measure_overhead(home, repeats)),
            ("recovery", measure_recovery(home, options.records, min(repeats, 3))),
        ):
            if options.only in (None, part):
                for found in lines:
                    print_line(found, as_json=options.json)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
