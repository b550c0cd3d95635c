"""The lightning indexer at V4-Flash's dimensions: time per token of scoring 262,144 keys and choosing 512.

    python benchmarks/index_scan.py --json [--quick] [--entries 262144]

64 index heads of width 128; 262,144 keys are the compressed entries of 1,048,576 tokens in one layer. One line for keys
in fp32, bf16 and packed FP4 (68 bytes a key), with one thread and with two. The peer is torch: the product, relu, the
heads' weighted sum and `torch.topk`, eagerly, in fp32 for fp32 keys and in bf16 for the others (torch computes with no
FP4 keys on a processor, so its keys are the same numbers in bf16). Both sides run by turns.

`ours` and `peer` are tokens per second for one layer. Two limits are measured in the same run: reading the keys once
(their bytes over the measured bandwidth) and multiplying (2 x 64 x 128 x 262,144 operations over torch's best rate of a
matrix product in fp32, in bf16, or in 8-bit numbers for FP4 keys, which are multiplied as such); `bound` is the slower
of the two and `config` has both.

`queries` lines score several queries in one call, as prefill and verification do.
"""

import argparse
from collections.abc import Callable
from typing import Any

import measure
import torch
from measure import Rate, Stopwatch
from torch import Tensor

from rorqual.ops import cache_codec
from rorqual.ops.index_scan import IndexKeys, index_scan
from rorqual.ops.rounding import round_index_fp4

HEADS, WIDTH, TOP_K = 64, 128, 512


def eager(q: Tensor, weights: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """torch's way: scores of all keys for each query [R, J, K], then its top-k."""

    def run() -> Tensor:
        dots = (q.flatten(0, 1) @ keys.t()).relu_().view(len(q), HEADS, -1)
        return (weights.unsqueeze(1) @ dots).squeeze(1).topk(TOP_K, dim=-1).indices

    return run


def timed(run: Callable[[], Tensor], queries: int) -> Callable[[], Rate]:
    def step() -> Rate:
        watch = Stopwatch()
        run()
        return watch.rate(queries)

    return step


def line(
    form: str, queries: int, q: Tensor, weights: Tensor, keys: dict[str, Tensor], limits: dict[str, float], repeats: int
) -> dict[str, Any]:
    """One form of the keys against torch."""
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    rows, end = keys[form], torch.full((queries,), len(keys[form]))
    ours_q = q if form == "fp32" else q.bfloat16()
    ours = timed(lambda: index_scan(ours_q, weights, IndexKeys(rows, WIDTH), None, end, TOP_K), queries)
    peer_keys = keys["fp32" if form == "fp32" else "bf16"]
    peer = timed(eager(q.to(dtype), weights.to(dtype), peer_keys), queries)
    a, b = measure.interleaved(ours, peer, repeats)
    walls = [rate.wall for rate in a], [rate.wall for rate in b]
    cpus = [rate.cpu for rate in a], [rate.cpu for rate in b]
    mine, theirs = measure.middle(walls[0]), measure.middle(walls[1])
    memory = limits["bytes_per_s"] / rows.nbytes * queries
    matrix = limits[form] / (2 * HEADS * WIDTH * len(rows))
    bound = min(memory, matrix)
    length = measure.length_name(4 * len(rows)) if 4 * len(rows) < 2**20 else f"{4 * len(rows) // 2**20}M"
    return {
        "name": "index_scan" if queries == 1 else "index_scan.queries",
        "case": f"{length}/v4-flash-indexer/{torch.get_num_threads()}t/{form}",
        "unit": "tokens/s per layer",
        "ours": mine,
        "peer": theirs,
        "peer_name": f"torch eager {str(dtype).removeprefix('torch.')}, topk",
        "ratio": mine / theirs,
        "ratio_by_cpu_time": measure.middle(cpus[0]) / measure.middle(cpus[1]),
        "bound": bound,
        "bound_share": mine / bound,
        "spread": measure.spread(*walls),
        "config": {
            "heads": HEADS, "width": WIDTH, "entries": len(rows), "top_k": TOP_K, "queries": queries,
            "key_bytes": rows.nbytes // len(rows), "ms_per_token": 1e3 / mine, "repeats": len(a),
            "memory_bound_ms": 1e3 / memory, "matrix_bound_ms": 1e3 / matrix, **measure.machine(),
        },
    }  # fmt: skip


def limits_of_the_machine(num_bytes: int, seconds: float) -> dict[str, float]:
    """Bytes per second for a read as large as the keys, and operations per second of matrix products."""
    return {
        "bytes_per_s": measure.weight_bytes_per_s(num_bytes, seconds),
        "fp32": measure.matmul_flops_per_s(seconds=seconds),
        "bf16": measure.matmul_flops_per_s(seconds=seconds, dtype=torch.bfloat16),
        "fp4": measure.matmul_flops_per_s(seconds=seconds, dtype=torch.int8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--entries", type=int, default=262_144)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    repeats, seconds = (1, 0.5) if args.quick else (9, 2.0)
    torch.manual_seed(0)
    full = round_index_fp4(torch.randn(args.entries, WIDTH))
    keys = {"fp32": full, "bf16": full.bfloat16(), "fp4": cache_codec.encode_index_keys(full)}
    for threads in args.threads:
        torch.set_num_threads(threads)
        limits = limits_of_the_machine(keys["fp4"].nbytes, seconds)
        for queries in (1, 8):
            q = round_index_fp4(torch.randn(queries, HEADS, WIDTH))
            weights = torch.randn(queries, HEADS) * (WIDTH * HEADS) ** -0.5
            for form in keys:
                found = line(form, queries, q, weights, keys, limits, repeats if queries == 1 else max(1, repeats // 3))
                measure.print_line(found, as_json=args.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
