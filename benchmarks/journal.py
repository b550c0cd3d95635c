"""The journal beside SQLite (WAL, synchronous FULL) in the same run: appending, its cost to a decoder, recovery.

    python benchmarks/journal.py
    python benchmarks/journal.py --quick --json

append     records per second and per CPU-second at batches of 1 to 4096 records a commit. Both sides begin with the
           same `Tokens` records of one token and store the same payload bytes. bound: the same bytes written and synced
           by bare system calls.
overhead   what a decoder of 1,000 tokens a second pays, in percent of its CPU time and of its time by the clock, by
           64, 8 and 1 streams and several ways to gather; see `journal_overhead`. bound: bare system calls in a thread.
recovery   ten million tokens in records of 1 and of 32, by a process that vanishes: opening, and reading everything,
           each in a new process with its peak memory. bound: the checksum of the same bytes, at the speed of zlib.

CPU time is that of the process, all threads; what the kernel does in threads of its own is in neither side's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from journal_overhead import BLOCK_TOKENS, POLICIES, TOKENS_PER_S, Decoder, overhead
from journal_sqlite import PEER, connect, insert
from measure import Rate, Stopwatch, interleaved, machine, middle, note, print_line, process_bytes, spread

from rorqual.journal import Event, Journal, Tokens
from rorqual.journal.disk import Disk
from rorqual.journal.tokens import decode_tokens, encode_tokens

BATCHES = (1, 8, 64, 512, 4096)
VOCABULARY = 129_280
BLOCK_RECORDS = 5000
"""A commit, when ten million tokens are written."""
RECORD_TOKENS = (1, 32)
"""Tokens a record there: a record a token, and what a stream of 1,000 tokens a second gathers in 32 ms."""

Batches = list[list[Tokens]]


@dataclass(frozen=True)
class Large:
    """So many records of so many tokens each, of 64 requests by turns."""

    folder: Path
    records: int
    tokens: int

    def record(self, number: int) -> Tokens:
        """Its token ids count on through the whole log."""
        first = number * self.tokens
        ids = tuple(n % VOCABULARY for n in range(first, first + self.tokens))
        return Tokens(number % 64, number // 64 * self.tokens, 3, ids, (-0.5,) * self.tokens)


def batches_of(size: int, number: int) -> Batches:
    """Batches of single-token records of 64 requests."""
    return [
        [Tokens(k % 64, turn, 3, ((turn * size + k) % VOCABULARY,), (-0.5,)) for k in range(size)]
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


def append_peer(path: Path, batches: Batches) -> Rate:
    """One transaction a batch; payloads made as ours are."""
    with closing(connect(path)) as database:
        lsn, statement, kind = 1, "INSERT INTO records VALUES (?, ?, ?)", Tokens.TYPE
        watch = Stopwatch()
        for batch in batches:
            if len(batch) == 1:
                database.execute(statement, (lsn, kind, encode_tokens(batch[0])))
            else:
                insert(database, [(n, kind, encode_tokens(record)) for n, record in enumerate(batch, lsn)])
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
    ratio = share = None
    if min(a, b or 0.0, bound or 0.0) >= 0 and a > 0:  # a small share of the wall time may come out below nothing
        ratio = None if not b else (a / b if larger_is_better else b / a)
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


def measure_overhead(home: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """A line for the processor and one for the clock under each policy."""
    decoder = Decoder()
    for policy in POLICIES:
        note(policy.name)
        folder = home / policy.name.replace("/", "-")
        folder.mkdir()
        shares = overhead(decoder, policy, folder, rounds)
        ours, peer, bound = shares["ours"], shares["peer"], shares["bound"]
        config: dict[str, Any] = {"tokens_per_s": TOKENS_PER_S, "rounds": rounds, "block_tokens": BLOCK_TOKENS}
        config["reached_tokens_per_s"] = middle(ours.tokens_per_s)  # less on a busy machine; a time then gathers fewer
        for unit, kind in (("% of decoding's CPU", "cpu"), ("% of decoding's time", "wall")):
            a, b, c = (getattr(side, kind) for side in (ours, peer, bound))
            config["quartiles"] = {"ours": quartiles(a), "peer": quartiles(b), "bound": quartiles(c)}
            yield line(f"{policy.name}/{kind}", unit, a, b, middle(c), config)


def quartiles(values: list[float]) -> list[float]:
    """The first and the third; of few values the smallest and the largest."""
    if len(values) < 4:
        return [min(values), max(values)]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def measure_recovery(home: Path, number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Writes once with each, then opens and reads in new processes, by turns; for both sizes of records."""
    for size in RECORD_TOKENS:
        folder = home / f"by-{size}"
        folder.mkdir()
        yield from _measure_recovery(Large(folder, number // size, size), repeats)
        shutil.rmtree(folder)


def _measure_recovery(large: Large, repeats: int) -> Iterator[dict[str, Any]]:
    tokens = large.records * large.tokens
    for side in ("ours", "peer"):
        note(f"recovery: {tokens:,} tokens, {large.tokens} a record, written by {side}")
        child("write", side, large)
    data = {part: {side: list[dict[str, float]]() for side in ("ours", "peer")} for part in ("open", "replay")}
    for turn in range(repeats):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            note(f"recovery: {side} read")
            for part, found in child("read", side, large).items():
                data[part][side].append(found)
    segments = sorted((large.folder / "ours").glob("*.seg"))
    config: dict[str, Any] = {"records": large.records, "tokens_a_record": large.tokens, "segment_mib": 64}
    config["written_by"] = "a process that did not close"
    config["file_bytes"] = {
        "ours": sum(path.stat().st_size for path in segments),
        "peer": sum(path.stat().st_size for path in large.folder.glob("peer*")),
    }
    bounds = {"open": checksum_seconds(segments[-1:]), "replay": checksum_seconds(segments)}
    for part, sides in data.items():
        for unit, key, bound in (("s", "wall_s", bounds[part]), ("CPU-s", "cpu_s", None), ("MiB", "peak_mib", None)):
            ours, peer = ([found[key] for found in sides[side]] for side in ("ours", "peer"))
            case = f"recovery/{tokens / 10**6:g}M-by-{large.tokens}/{part}/{unit}"
            yield line(case, unit, ours, peer, bound, config)


def checksum_seconds(paths: list[Path]) -> float:
    """Seconds to read the files and take their checksum."""
    start = time.perf_counter()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                zlib.crc32(block)
    return time.perf_counter() - start


def child(what: str, side: str, large: Large) -> dict[str, dict[str, float]]:
    """Run a part in a process of its own; its measurements."""
    words = [sys.executable, __file__, "--child", what, side]
    words += [str(large.folder), str(large.records), str(large.tokens)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(run.stdout)
    return found


def in_child(what: str, side: str, large: Large) -> None:
    """`write` ends without closing anything; `read` prints what opening and reading took."""
    path = large.folder / side
    if what == "write":
        write_large(side, path, large)
        print("{}", flush=True)
        os._exit(0)
    base = process_bytes("VmHWM")
    found, start, cpu = {}, time.perf_counter(), time.process_time()
    journal, database = (Journal(path), None) if side == "ours" else (None, connect(path))
    if database is not None:
        (last,) = database.execute("SELECT max(lsn) FROM records").fetchone()
    else:
        assert journal is not None
        last = journal.durable_lsn
    assert last == large.records, f"{last} of {large.records} records"
    found["open"] = figures(start, cpu, base)
    start, cpu, seen, total = time.perf_counter(), time.process_time(), 0, 0
    if journal is not None:
        for _, record in journal.replay():
            seen += 1
            total += sum(record.ids) if isinstance(record, Tokens) else 0
    elif database is not None:
        for _, _, payload in database.execute("SELECT lsn, type, payload FROM records ORDER BY lsn"):
            seen += 1
            total += sum(decode_tokens(payload).ids)
    assert seen == large.records and total == sum(n % VOCABULARY for n in range(seen * large.tokens))
    found["replay"] = figures(start, cpu, base)
    print(json.dumps(found), flush=True)
    os._exit(0)  # as it was, for the next turn


def figures(start: float, cpu: float, base_bytes: int) -> dict[str, float]:
    """Seconds since, by clock and processor, and by how much the memory has grown at most."""
    peak_mib = (process_bytes("VmHWM") - base_bytes) / 2**20
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "peak_mib": peak_mib}


def write_large(side: str, path: Path, large: Large) -> None:
    """All records, BLOCK_RECORDS a commit."""
    journal, database = (Journal(path), None) if side == "ours" else (None, connect(path))
    for start in range(0, large.records, BLOCK_RECORDS):
        block = [large.record(n) for n in range(start, min(start + BLOCK_RECORDS, large.records))]
        if journal is not None:
            journal.append_many(block)
            journal.commit()
        elif database is not None:
            insert(database, [(n, Tokens.TYPE, encode_tokens(record)) for n, record in enumerate(block, start + 1)])


def main() -> None:
    """Print a line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--only", choices=("append", "overhead", "recovery"), help="one of the three parts")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of recovery")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to measure; a temporary one otherwise")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, side, folder, records, tokens = options.child
        in_child(what, side, Large(Path(folder), int(records), int(tokens)))
    repeats = 1 if options.quick else 5
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="journal-") as name:
        home = Path(name)
        for part, lines in (
            ("append", measure_append(home, repeats)),
            ("overhead", measure_overhead(home, 5 * repeats)),
            ("recovery", measure_recovery(home, options.tokens, min(repeats, 3))),
        ):
            if options.only in (None, part):
                for found in lines:
                    print_line(found, as_json=options.json)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # the decoder's products run on one thread; read when numpy is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
