"""A model larger than memory: V4-Flash's dimensions in four layers (16 GB of files) under a limit of 6 GiB.

    python benchmarks/streaming.py --json [--quick] [--folder FOLDER] [--limit 6GiB]

FOLDER gets the checkpoint of `synthetic_checkpoint.py` unless it is there; it stays there for the next run. The model
runs in a child process inside a control group whose memory, page cache included, is limited; without the right to make
one the figures are without a limit, and `config.limit_bytes` is null.

    prefill-cold    a prompt, with nothing in the expert cache
    prefill-warm    another one after it
    decode-cold     the first tokens one by one, with nothing in the expert cache
    decode-warm     tokens after the cache has filled
    decode-zipf     the same with token ids as frequent as words in text (1 / rank), which hash layers profit from

Token ids are drawn evenly but for the last case, and the router's weights are random, so nothing favours an expert: the
worst case for a cache. `ours` is tokens/s. `bound` is what the disk allows: the most that it gave in any half second
of probes before, between and after the cases (`disk_rates`), over the bytes that were read for a token. One processor
is left to the readers unless --threads says otherwise. `peer` is the same model loaded whole under the same limit; it
does not get there where the limit works.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import synthetic_checkpoint
import torch
from memory_limit import Limit

from rorqual import checkpoint
from rorqual.checkpoint.direct_io import DirectFiles, aligned, room
from rorqual.checkpoint.expert_cache import CacheStats
from rorqual.checkpoint.streaming import THREADS
from rorqual.config import ModelConfig
from rorqual.model import Transformer
from rorqual.sizes import parse_bytes

PEER = "the same model loaded whole"
WHOLE_S = 40
"""Seconds that it gets to load."""
EXPERT_BYTES = 13_369_344
"""Of one of V4-Flash's experts in FP4 with its scales."""


def tokens(config: ModelConfig, count: int, generator: torch.Generator, *, zipf: bool = False) -> torch.Tensor:
    """Ids [1, count]: all as likely, or as likely as 1 / (1 + id)."""
    if not zipf:
        return torch.randint(0, config.vocab_size, (1, count), generator=generator)
    weights = 1 / torch.arange(1.0, config.vocab_size + 1)
    return torch.multinomial(weights, count, replacement=True, generator=generator)[None]


def timed(model: Transformer, pieces: list[torch.Tensor], state: Any) -> dict[str, Any]:
    """Feed pieces of tokens; seconds of each, and what the cache did meanwhile."""
    before, seconds = model.expert_cache.stats(), []
    for piece in pieces:
        begin = time.perf_counter()
        logits = model(piece, state=state)
        seconds.append(time.perf_counter() - begin)
        if not bool(torch.isfinite(logits).all()):
            raise SystemExit("logits are not finite: this measures nothing")
    return {"tokens": sum(piece.shape[1] for piece in pieces), "seconds": seconds} | since(
        before, model.expert_cache.stats()
    )


def since(before: CacheStats, after: CacheStats) -> dict[str, Any]:
    names = ("hits", "prefetch_hits", "misses", "bytes_read", "waited_s")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


@torch.inference_mode()
def child(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What runs under the limit: one order of cases."""
    begin = time.perf_counter()
    memory = None if args.child == "whole" else parse_bytes(args.limit, "--limit")
    model = checkpoint.load_official(args.folder, weights="fp4", dtype=torch.bfloat16, memory=memory).eval()
    yield {"case": "load", "seconds": time.perf_counter() - begin, "resident_bytes": measure.process_bytes("VmRSS")}
    if args.child == "whole":
        return
    generator, config = torch.Generator().manual_seed(args.seed), model.cfg
    if args.child == "prefill":
        for case in ("prefill-cold", "prefill-warm"):
            yield {"case": case} | timed(model, [tokens(config, args.prompt, generator)], model.new_state())
    else:
        state = model.new_state()
        for case, zipf in (("decode-cold", False), ("warming", False), ("decode-warm", False), ("decode-zipf", True)):
            pieces = [tokens(config, 1, generator, zipf=zipf) for _ in range(args.decode)]
            if case == "decode-zipf":
                timed(model, [tokens(config, 1, generator, zipf=True) for _ in range(args.decode)], state)
            yield {"case": case} | timed(model, pieces, state)
    stats = model.expert_cache.stats()
    yield {
        "case": "end", "slots": stats.slots, "experts": stats.experts, "capacity_bytes": stats.capacity_bytes,
        "peak_rss_bytes": measure.process_bytes("VmHWM"),
    }  # fmt: skip


def run_child(args: argparse.Namespace, kind: str, limit: Limit | None) -> tuple[dict[str, dict[str, Any]], str]:
    """The lines of a child by case, and how it ended when that was not well."""
    command = [sys.executable, __file__, "--child", kind, "--folder", str(args.folder), "--limit", args.limit]
    command += [
        "--threads",
        str(args.threads),
        "--prompt",
        str(args.prompt),
        "--decode",
        str(args.decode),
        "--seed",
        str(args.seed),
    ]
    join = None if limit is None else limit.join
    wait_s = WHOLE_S if kind == "whole" else None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=join, check=False, timeout=wait_s)
    except subprocess.TimeoutExpired:  # the kernel reclaims pages of the mapped files for ever
        return {}, f"not loaded after {wait_s} s: it needs more memory than the limit allows"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    fault = "" if not done.returncode else f"ended with {done.returncode}"
    if done.returncode == -signal.SIGKILL:
        fault = "killed: it needs more memory than the limit allows"
    return {line["case"]: line for line in lines}, fault


def disk_rates(folder: Path, windows: int = 3) -> list[float]:
    """Bytes/s in windows of half a second, with pauses between them as the model makes them: pieces as large as an
    expert from random places, and one behind the other; read by one thread, and by as many as the cache has.
    """
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.stat().st_size > 2 * EXPERT_BYTES]
    rates = []
    for threads, is_random in itertools.product((1, THREADS), (True, False)):
        for _ in range(windows):
            time.sleep(0.3)
            rates.append(disk_rate(paths, threads, 0.5, is_random=is_random))
    return rates


def disk_rate(paths: list[Path], threads: int, seconds: float, *, is_random: bool) -> float:
    """Bytes/s of so many readers at once."""
    files, choose = DirectFiles(), random.Random(time.time_ns())
    path, counts = choose.choice(paths), list[int]()
    places = itertools.count(choose.randrange(path.stat().st_size), EXPERT_BYTES)
    buffers = [room(EXPERT_BYTES + 8192) for _ in range(threads)]
    begin = time.perf_counter()

    def read(buffer: torch.Tensor) -> None:
        while time.perf_counter() < begin + seconds:
            mine = choose.choice(paths) if is_random else path
            most = mine.stat().st_size - EXPERT_BYTES - 8192
            at = aligned(choose.randrange(most) if is_random else next(places) % most, 0)[0]
            files.read(mine, at, at + EXPERT_BYTES, buffer)
            counts.append(EXPERT_BYTES)

    readers = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(counts) / (time.perf_counter() - begin)


def drop_caches() -> bool:
    """Empty the page cache, where this process may."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def line_of(case: dict[str, Any], bandwidth: float, shared: dict[str, Any], fault: str) -> dict[str, Any]:
    """One measured case in the house format."""
    count, seconds = case["tokens"], sum(case["seconds"])
    per_token = case["bytes_read"] / count
    ours, bound = count / seconds, bandwidth / per_token if per_token else None
    wanted = case["hits"] + case["prefetch_hits"] + case["misses"]
    rates = [1 / one for one in case["seconds"]] if len(case["seconds"]) > 1 else [ours]
    found = {
        "tokens": count, "hit_rate": 1 - case["misses"] / wanted,
        "cached_rate": case["hits"] / wanted, "prefetched_rate": case["prefetch_hits"] / wanted,
        "bytes_read_per_token": per_token, "waited_share": case["waited_s"] / seconds,
        "read_bytes_per_s": case["bytes_read"] / seconds,
    }  # fmt: skip
    return {
        "name": "streaming", "case": f"{case['case']}/v4-flash-4-layers/{torch.get_num_threads()}t/bf16",
        "unit": "tokens/s", "ours": ours, "peer": None, "peer_name": PEER, "peer_failure": fault, "ratio": None,
        "bound": bound, "bound_share": None if bound is None else ours / bound,
        "spread": {"ours": [min(rates), statistics.median(rates), max(rates)], "peer": []},
        "config": {**found, **shared},
    }  # fmt: skip


def prepare(folder: Path) -> int:
    """Write the checkpoint unless it is there; bytes of its files."""
    if not (folder / "config.json").exists():
        measure.note(f"writing the checkpoint to {folder}")
        synthetic_checkpoint.write(folder, synthetic_checkpoint.flash_config())
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rorqual-flash-4-layers")
    parser.add_argument("--limit", default="6GiB")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--decode", type=int, default=48, help="tokens of a case of decoding")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", choices=("prefill", "decode", "whole"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        for line in child(args):
            print(json.dumps(line), flush=True)
        return
    if args.quick:
        args.prompt, args.decode = 128, 24
    file_bytes = prepare(args.folder)
    limit, why = Limit.make(parse_bytes(args.limit, "--limit"))
    if limit is None:
        measure.note(f"no memory limit: {why}")
    try:
        measure_all(args, limit, file_bytes)
    finally:
        if limit is not None:
            limit.remove()


def measure_all(args: argparse.Namespace, limit: Limit | None, file_bytes: int) -> None:
    """Run the children and print the lines."""
    dropped = drop_caches()
    rates = disk_rates(args.folder)
    fault = "not run without a limit, which it would exceed"
    if limit is not None:
        fault = run_child(args, "whole", limit)[1]
    for kind in ("decode", "prefill"):
        dropped = drop_caches() and dropped
        if limit is not None:
            limit.forget_peak()
        cases, broken = run_child(args, kind, limit)
        if broken:
            raise SystemExit(f"the {kind} child {broken}")
        rates += disk_rates(args.folder)
        end = cases.pop("end")
        shared = {
            "file_bytes": file_bytes, "limit_bytes": None if limit is None else limit.nbytes,
            "peak_bytes": None if limit is None else limit.peak(), "peak_rss_bytes": end["peak_rss_bytes"],
            "cache_bytes": end["capacity_bytes"], "cache_experts": end["slots"], "experts": end["experts"],
            "load_s": cases["load"]["seconds"], "disk_bytes_per_s": max(rates),
            "disk_median_bytes_per_s": statistics.median(rates), "page_cache_dropped": dropped, **measure.machine(),
        }  # fmt: skip
        for case in cases.values():
            if case["case"] not in ("load", "warming"):
                line = line_of(case, max(rates), shared, fault)
                measure.print_line(line, as_json=args.json)


if __name__ == "__main__":
    main()
