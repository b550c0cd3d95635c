"""Time to the first token of a long prompt: cold, warm in memory, and warm from disk after a restart.

    python benchmarks/prefix_cache.py --json [--quick] [--length 102400]

A prompt of random tokens goes to an `Engine` over Minke's architecture with drawn weights (speed does not depend on
them), with a `PrefixCache` that writes to a folder. Then:

* `warm-memory`: the same prompt again; `warm-memory/new-question`: its last 16 tokens are others, so the window is
  restored from the page before; `warm-memory/next-question`: others once more, from the checkpoint taken where the
  question begins.
* `warm-disk`, `warm-disk/new-question`: the same two after a restart: another cache over the same folder, whose files
  the system has been told to forget, in a process that has the weights.

The peer of all is the cold run, `ratio` says how many times faster the warm one is. What comes out is compared:
the first 8 tokens must be those of the cold run, or of an engine without a cache for the new question.

The bound is two decode steps at this context (the median of the very requests) and the bytes that have to move over
the rate at which they can: of memory for a checkpoint and the ids; of the disk for pages, which is the best that plain
sequential reads of as many bytes reach, in blocks of 128 KiB to 8 MiB, from a file forgotten just before like ours.

* `bytes/minke`, `bytes/v4-flash`, `bytes/v4-flash-bf16`: bytes a token on disk, against the configuration's formula
  (the peer). For V4-Flash that is 21 x (584 + 68) / 4 + 20 x 584 / 128 = 3,514 in the layout of its own cache, and in
  bf16 21 x 1,280 / 4 + 20 x 1,024 / 128 = 6,880; the rest is a record's header and its token ids.
* `policy/zero`, `policy/periodic`, `policy/full`: a question in the middle of a stored text: time to the first token
  against none stored, and in `config` the bytes a token on disk and the tokens that were run again.
* `disk-read/v4-flash`, `disk-write/v4-flash`: GiB/s of pages of V4-Flash's size from disk into the page pool, checksums
  and all, against a plain read or write of as many bytes, and the share of it that is reached.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch

import rorqual
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.prefix_cache import PrefixCache, Windows
from rorqual.engine.selftest.subject import IdsOnly
from rorqual.engine.store import DiskStore
from rorqual.engine.store.tree import chain_key
from rorqual.model import Transformer
from rorqual.model.pages import PAGE_TOKENS, PagePool
from rorqual.model.window_checkpoint import checkpoint_bytes

QUESTION, CHECKED, CHUNK, POLICY_LENGTH = 16, 8, 2048, 16_384
GIB = 1 << 30
CASES = (
    "warm-memory", "warm-memory/new-question", "warm-memory/next-question", "warm-disk", "warm-disk/new-question"
)  # fmt: skip


@dataclass
class Answer:
    """Seconds to the first token, and between the next ones; the tokens; what the cache said."""

    first_s: float
    step_s: float
    ids: list[int]
    cache: Any


def ask(engine: Engine, prompt: list[int], num_new: int = CHECKED) -> Answer:
    """One request, timed from its submission."""
    began = time.perf_counter()
    request = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=num_new))
    times, ids = [], []
    for event in request:
        times.append(time.perf_counter() - began)
        ids.append(-1 if event.id is None else event.id)
    # by the engine's clock: a client that is woken late sees several tokens at once
    step_s = request.timing.decode_s / max(1, len(ids) - 1)
    return Answer(times[0], step_s, ids, request.cache)


@contextmanager
def serving(model: Transformer, folder: Path | None, length: int, windows: Windows = "zero") -> Iterator[Engine]:
    """An engine with a prefix cache in `folder` (without one: no cache), closed with all its files afterwards."""
    cache = None
    if folder is not None:
        cache = PrefixCache(model, folder=folder, memory_bytes=2 * GIB, running_tokens=4 * length, windows=windows)
    with Engine(model, IdsOnly(model.cfg.vocab_size), chunk=CHUNK, prefix_cache=cache) as engine:
        yield engine
    if cache is not None:
        cache.close()


def forget_files(folder: Path) -> None:
    """Ask the system to drop its copies of the files, so that reading them reads the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def disk_bytes_per_s(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Rates of a plain sequential write (with fdatasync) and read of a file that the system has forgotten."""
    path, block = folder / "plain", os.urandom(8 << 20)
    num_bytes = max(num_bytes, 64 << 20)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    began = time.perf_counter()
    for _ in range(num_bytes // len(block)):
        os.write(fd, block)
    os.fdatasync(fd)
    written = num_bytes // len(block) * len(block) / (time.perf_counter() - began)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(8 << 20)
    began, at = time.perf_counter(), 0
    while got := os.preadv(fd, [buffer], at):
        at += got
    read = at / (time.perf_counter() - began)
    os.close(fd)
    path.unlink()
    return written, read


def read_bytes_per_s(folder: Path, num_bytes: int) -> float:
    """The best rate of plain sequential reads of so many bytes from a file that the system has forgotten."""
    path = folder / "plain"
    path.write_bytes(os.urandom(num_bytes))
    best = float("inf")
    for block in (128 << 10, 512 << 10, 1 << 20, 8 << 20):
        forget_files(folder)
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(block)
            began = time.perf_counter()
            while file.readinto(buffer):
                pass
            best = min(best, time.perf_counter() - began)
    path.unlink()
    return num_bytes / best


def memory_bytes_per_s() -> float:
    """Rate of copying memory."""
    a, b = torch.empty(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a.copy_(b)
        best = min(best, time.perf_counter() - began)
    return b.nbytes / best


def first_token_lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The warm cases, each against the cold run."""
    model = Transformer(rorqual.ModelConfig.preset("minke"), seed=0).eval()
    repeats = 1 if args.quick else 3
    draw = torch.Generator().manual_seed(0)
    runs: dict[str, list[Answer]] = {case: [] for case in CASES}
    colds: list[Answer] = []
    disk_rate = 0.0
    for number in range(repeats):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        ids = torch.randint(3, 250, (args.length + 2 * QUESTION,), generator=draw).tolist()
        document = ids[: args.length - QUESTION]
        prompt, other, third = (document + ids[i : i + QUESTION] for i in range(len(document), len(ids), QUESTION))
        with serving(model, folder, args.length) as engine:
            ask(engine, ids[:300])  # kernels are loaded, threads started
            colds.append(ask(engine, prompt))
            measure.note(f"{number}: cold {colds[-1].first_s:.2f} s")
            runs["warm-memory"].append(ask(engine, prompt))
            runs["warm-memory/new-question"].append(ask(engine, other))
            runs["warm-memory/next-question"].append(ask(engine, third))
            assert engine.prefix_cache is not None
            engine.prefix_cache.flush()
        for case, asked in (("warm-disk", prompt), ("warm-disk/new-question", other)):
            kept = Path(tempfile.mkdtemp(dir=args.folder))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            if asked is other:  # what this very question left behind would make it an exact repeat
                drop_points(kept)
            with serving(model, kept, args.length) as engine:
                ask(engine, ids[:300])
                # only now: memory that the system gives back to the reads was in use just before, as in the plain ones
                forget_files(kept)
                runs[case].append(ask(engine, asked))
            disk_rate = max(disk_rate, read_bytes_per_s(kept, runs[case][-1].cache.bytes_read))
            shutil.rmtree(kept)
        shutil.rmtree(folder)
        check(model, args.length, colds[-1], {case: runs[case][-1] for case in CASES}, other if number == 0 else None)
    step_s = measure.middle([answer.step_s for answers in runs.values() for answer in answers])
    memory_rate = memory_bytes_per_s()
    for case, answers in runs.items():
        from_disk = case.startswith("warm-disk")
        checkpoint = checkpoint_bytes(model.cfg, torch.float32, args.length, PAGE_TOKENS)
        moved = max(answer.cache.bytes_read for answer in answers) if from_disk else checkpoint + 4 * args.length
        rate = disk_rate if from_disk else memory_rate
        bound = 2 * step_s + moved / rate
        firsts, cold = [answer.first_s for answer in answers], [answer.first_s for answer in colds]
        ours, peer = measure.middle(firsts), measure.middle(cold)
        yield line(
            "prefix_cache.first_token", case, "ms", 1e3 * ours, 1e3 * peer, "cold", peer / ours, 1e3 * bound,
            bound / ours, {k: [1e3 * x for x in v] for k, v in measure.spread(firsts, cold).items()},
            {
                "length": args.length, "model": "minke", "dtype": "fp32", "decode_step_ms": 1e3 * step_s,
                "bytes_moved": moved, "bytes_per_s": rate, "explanation": answers[-1].cache.to_dict(),
            },
        )  # fmt: skip


def policy_lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A question in the middle of a stored text under each policy: seconds, tokens that are run again, bytes stored."""
    model = Transformer(rorqual.ModelConfig.preset("minke"), seed=0).eval()
    length = min(args.length, POLICY_LENGTH)
    ids = torch.randint(3, 250, (length + QUESTION,), generator=torch.Generator().manual_seed(1)).tolist()
    text, asked = ids[:length], [*ids[: length // 2], *ids[length:]]
    with serving(model, None, length) as engine:
        ask(engine, ids[:300])
        cold = ask(engine, asked)
    policies: tuple[Windows, ...] = ("zero", "periodic", "full")
    for windows in policies:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        with serving(model, folder, length, windows) as engine:
            ask(engine, ids[:300])
            ask(engine, text)
            cache = engine.prefix_cache
            assert cache is not None and cache.disk is not None
            cache.flush()
            stored = cache.disk.nbytes / length
            answer = ask(engine, asked)
        shutil.rmtree(folder)
        if answer.ids != cold.ids:
            raise SystemExit(f"Policy {windows} gave {answer.ids}, the cold run {cold.ids}: the cache is not exact.")
        bound = 2 * max(cold.step_s, answer.step_s)
        yield line(
            "prefix_cache.policy", f"policy/{windows}", "ms", 1e3 * answer.first_s, 1e3 * cold.first_s, "cold",
            cold.first_s / answer.first_s, 1e3 * bound, bound / answer.first_s, {},
            {"length": length, "disk_bytes_a_token": stored, "explanation": answer.cache.to_dict()},
        )  # fmt: skip


def drop_points(folder: Path) -> None:
    """Delete the checkpoints: a question after the document then restores the window by running tokens again."""
    for path in folder.rglob("*.points"):
        path.unlink()


def check(
    model: Transformer, length: int, cold: Answer, warm: dict[str, Answer], other: list[int] | None
) -> None:  # fmt: skip
    """The same tokens as without a cache. `other`: the new question, where the cold answer to it is wanted too."""
    for case in ("warm-memory", "warm-disk"):
        if warm[case].ids != cold.ids:
            raise SystemExit(f"{case} gave {warm[case].ids}, the cold run {cold.ids}: the cache is not exact.")
    if warm["warm-memory/new-question"].ids != warm["warm-disk/new-question"].ids:
        raise SystemExit("The new question got different tokens from memory and from disk: the cache is not exact.")
    if other is not None:
        with serving(model, None, length) as engine:
            truth = ask(engine, other).ids
        if warm["warm-memory/new-question"].ids != truth:
            raise SystemExit("The new question got other tokens than without a cache: the cache is not exact.")


def storage_lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes a token, and rates of reading and writing pages of V4-Flash's size."""
    for preset, dtype, count in (
        ("minke", torch.float32, 800),
        ("v4-flash-bf16", torch.bfloat16, 100),
        ("v4-flash", torch.bfloat16, 300 if args.quick else 600),
    ):
        cfg = rorqual.ModelConfig.preset(preset.removesuffix("-bf16"))
        cfg = cfg.replace(cache_format="exact") if preset.endswith("-bf16") else cfg
        pool = PagePool(cfg, torch.empty(0, dtype=dtype), count * 128)
        pages = pool.take(count)
        pool.write(pages, torch.randint(0, 256, (count, pool.page_bytes), dtype=torch.uint8))
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        store = DiskStore(folder, b"benchmark-16byte", 16 * GIB)
        keys, key = [], b"root"
        began = time.perf_counter()
        for number, page in enumerate(pages):
            block = torch.full((128,), number, dtype=torch.int32).numpy().tobytes()
            parent, key = key, chain_key(key, block)
            keys.append((key, block))
            while not store.put_page(parent, key, block, 128 * number, pool.read([page])[0]):
                time.sleep(0.001)  # the queue is full
        store.flush()
        write_s, on_disk = time.perf_counter() - began, store.nbytes
        store.close()
        size = "index keys and entries of every layer"
        yield line(
            "prefix_cache.bytes", f"bytes/{preset}", "bytes a token", on_disk / (128 * count), pool.page_bytes / 128,
            "formula", pool.page_bytes * count / on_disk, pool.page_bytes / 128, pool.page_bytes * count / on_disk, {},
            {"dtype": str(dtype), "holds": size, "tokens": 128 * count},
        )  # fmt: skip
        if preset == "v4-flash":
            yield from rate_lines(folder, pool, pages, keys, write_s, 1 if args.quick else 3)
        shutil.rmtree(folder)


def rate_lines(
    folder: Path, pool: PagePool, pages: list[int], keys: list[tuple[bytes, bytes]], write_s: float, repeats: int
) -> Iterator[dict[str, Any]]:
    """Reading into the pool, by turns with a plain read."""
    num_bytes = len(pages) * pool.page_bytes
    ours, plain_read, plain_write = [], [], []
    for _ in range(repeats):
        written, read = disk_bytes_per_s(folder, num_bytes)
        plain_write.append(written / GIB)
        plain_read.append(read / GIB)
        forget_files(folder)
        began = time.perf_counter()
        store = DiskStore(folder, b"benchmark-16byte", 16 * GIB)
        found = [one for one in (store.find_page(*key) for key in keys) if one is not None]
        done = store.read_pages(found, lambda first, content: pool.write(pages[first : first + len(content)], content))
        assert done == len(pages)
        ours.append(num_bytes / (time.perf_counter() - began) / GIB)
        store.close()
    config = {"bytes": num_bytes, "page_bytes": pool.page_bytes}
    for case, mine, plain in (
        ("disk-read/v4-flash", ours, plain_read), ("disk-write/v4-flash", [num_bytes / write_s / GIB], plain_write)
    ):  # fmt: skip
        a, b = measure.middle(mine), measure.middle(plain)
        yield line(
            "prefix_cache.io", case, "GiB/s", a, b, "plain file", a / b, b, a / b, measure.spread(mine, plain), config
        )


def line(
    name: str, case: str, unit: str, ours: float, peer: float, peer_name: str, ratio: float, bound: float,
    bound_share: float, spread: dict[str, list[float]], config: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One measurement as `measure.print_line` takes it."""
    return {
        "name": name, "case": case, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio,
        "bound": bound, "bound_share": bound_share, "spread": spread, "config": {**config, **measure.machine()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--length", type=int, default=102_400, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where the disk cache is put (default: the system's temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for one in (*storage_lines(args), *policy_lines(args), *first_token_lines(args)):
        measure.print_line(one, as_json=args.json)


if __name__ == "__main__":
    main()
