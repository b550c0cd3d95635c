"""Weight-only products at V4-Flash's expert size against torch in bf16 and the machine's bandwidth.

    python benchmarks/matvec.py --json [--quick]

`matvec` lines multiply 1, 4, 8 and 64 rows of bf16 activations with expert matrices [2048, 4096] in FP4, FP8, INT8 and
bf16. Twelve different matrices are used in turn, so that none is found in cache where the caches are smaller than
that; the peer is `torch.nn.functional.linear` on the same number of bf16 matrices (it takes no weights of 4 or 8 bits
at that speed). `experts` lines run the routed part of an MoE layer for 1, 8 and 64 tokens: 6 of 32 experts of
2048 x 4096 with SwiGLU, in FP4, against torch on bf16 experts, one after the other.

`ours` and `peer` are GB/s of the bf16 form, so that equal work counts equally; `bound` is the same for reading the
packed bytes at the measured bandwidth (few rows), or computing at torch's best rate of a bf16 product, whichever is
slower.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
from measure import Rate, Stopwatch
from torch import Tensor
from torch.nn import functional

from rorqual.ops.matvec import packed_linear
from rorqual.ops.packed_experts import packed_experts
from rorqual.ops.packed_weight import PackedFormat, PackedWeight, pack
from rorqual.ops.swiglu import swiglu

OUT, IN, COPIES = 2048, 4096, 12
EXPERTS, ACTIVE, LIMIT = 32, 6, 10.0


def timed(run: Callable[[], Any], work: float) -> Callable[[], Rate]:
    def step() -> Rate:
        watch = Stopwatch()
        run()
        return watch.rate(work)

    return step


def compare(
    name: str, case: str, ours: Callable[[], Any], peer: Callable[[], Any], peer_name: str, work: float, bound: float,
    repeats: int, config: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One line; `work` is bytes of bf16 weights a call stands for, `bound` in the same unit per second."""
    a, b = measure.interleaved(timed(ours, work / 1e9), timed(peer, work / 1e9), repeats)
    walls = [rate.wall for rate in a], [rate.wall for rate in b]
    mine, theirs = measure.middle(walls[0]), measure.middle(walls[1])
    by_cpu = measure.middle([rate.cpu for rate in a]) / measure.middle([rate.cpu for rate in b])
    return {
        "name": name, "case": f"{case}/{torch.get_num_threads()}t", "unit": "GB/s of bf16 weights", "ours": mine,
        "peer": theirs, "peer_name": peer_name, "ratio": mine / theirs, "ratio_by_cpu_time": by_cpu,
        "bound": bound / 1e9, "bound_share": mine / (bound / 1e9), "spread": measure.spread(*walls),
        "config": {**config, "us_per_call": work / mine / 1e3, "repeats": len(a), **measure.machine()},
    }  # fmt: skip


def best_possible(work: float, packed_bytes: float, flops: float, limits: dict[str, float]) -> float:
    """bf16 bytes per second when packed bytes are read and `flops` are computed at the machine's rates."""
    return work / max(packed_bytes / limits["bytes_per_s"], flops / limits["flops_per_s"])


def matvec_lines(limits: dict[str, float], repeats: int, row_counts: list[int]) -> Iterator[dict[str, Any]]:
    """Single matrices."""
    numbers = [torch.randn(OUT, IN) * IN**-0.5 for _ in range(COPIES)]
    halves = [w.bfloat16() for w in numbers]
    kinds: tuple[PackedFormat, ...] = ("fp4", "fp8", "int8", "bf16")
    for kind in kinds:
        packed = [pack(w, kind) for w in numbers]
        for rows in row_counts:
            x = torch.randn(rows, IN).bfloat16()
            work = 2.0 * OUT * IN * COPIES
            flops = 2.0 * rows * OUT * IN * COPIES
            bound = best_possible(work, packed[0].nbytes * COPIES, flops, limits)
            yield compare(
                "matvec", f"{rows}/expert-{OUT}x{IN}/{kind}", lambda p=packed, x=x: [packed_linear(x, w) for w in p],
                lambda x=x: [functional.linear(x, w) for w in halves], "torch linear bf16", work, bound, repeats,
                {"rows": rows, "out": OUT, "in": IN, "matrices": COPIES, "packed_bytes": packed[0].nbytes},
            )  # fmt: skip


def torch_experts(x: Tensor, chosen: Tensor, gates: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Routed experts in bf16: rows of one expert together, experts one after the other."""
    y = torch.zeros(x.shape)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        rows = x[token]
        hidden = (
            swiglu(functional.linear(rows, w1[e]), functional.linear(rows, w3[e]), LIMIT) * gates[token, slot, None]
        )
        y.index_add_(0, token, functional.linear(hidden.bfloat16(), w2[e]).float())
    return y


def expert_lines(limits: dict[str, float], repeats: int, row_counts: list[int]) -> Iterator[dict[str, Any]]:
    """The routed part of an MoE layer; every call chooses other experts."""
    halves: list[Tensor] = []
    packed: list[PackedWeight] = []
    for shape in ((OUT, IN), (OUT, IN), (IN, OUT)):
        stack = torch.stack([torch.randn(*shape).mul_(shape[1] ** -0.5).bfloat16() for _ in range(EXPERTS)])
        halves.append(stack)
        parts = [pack(w, "fp4") for w in stack]
        codes, scales = (
            torch.stack([p.codes for p in parts]),
            torch.stack([p.scale for p in parts if p.scale is not None]),
        )
        packed.append(PackedWeight("fp4", codes, scales, tuple(stack.shape)))
    for rows in row_counts:
        x = torch.randn(rows, IN).bfloat16()
        choices = [torch.stack([torch.randperm(EXPERTS)[:ACTIVE] for _ in range(rows)]) for _ in range(8)]
        gates = torch.rand(rows, ACTIVE)
        used = sum(len(c.unique()) for c in choices) / len(choices)
        work = 2.0 * 3 * OUT * IN * used
        bound = best_possible(
            work, sum(p.nbytes for p in packed) / EXPERTS * used, 6.0 * OUT * IN * rows * ACTIVE, limits
        )
        ours_next, peer_next = itertools.cycle(choices), itertools.cycle(choices)
        yield compare(
            "matvec.experts", f"{rows}/6-of-{EXPERTS}-experts/fp4",
            lambda x=x, n=ours_next, g=gates: packed_experts(x, next(n), g, packed[0], packed[1], packed[2], LIMIT),
            lambda x=x, n=peer_next, g=gates: torch_experts(x, next(n), g, halves[0], halves[1], halves[2]),
            "torch linear bf16, expert by expert", work, bound, repeats,
            {"rows": rows, "experts": EXPERTS, "active": ACTIVE, "used": used, "inner": OUT, "hidden": IN},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    repeats, seconds = (1, 0.5) if args.quick else (9, 2.0)
    torch.manual_seed(0)
    for threads in args.threads:
        torch.set_num_threads(threads)
        limits = {
            "bytes_per_s": measure.weight_bytes_per_s(2 * OUT * IN * COPIES, seconds),
            "flops_per_s": measure.matmul_flops_per_s(seconds=seconds, dtype=torch.bfloat16),
        }
        for found in itertools.chain(
            matvec_lines(limits, repeats, [1, 4, 8, 64]), expert_lines(limits, repeats, [1, 8, 64])
        ):
            measure.print_line(found, as_json=args.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
