"""How near this machine comes to the planner's bounds: the planner held against something that runs.

    python benchmarks/plan_bounds.py --json [--quick]

A preset too large for most caches (`fin`, random weights, bf16) decodes 1 and 4 sequences and reads a prompt.
`bound` is what `rorqual plan` computes for a chip with the bandwidth and the bf16 rate measured in the same run, in the
same cache format; `ours` is tokens per second. A share above 1 would prove the bound wrong. There is no peer.
"""

import argparse
from collections.abc import Callable
from typing import Any

import measure
import torch
from measure import Stopwatch

from rorqual.config import ModelConfig
from rorqual.model import State, Transformer
from rorqual.planner import V4, inventory, own_rows
from rorqual.planner.bounds import Bound, decode_bound, prefill_bound
from rorqual.planner.hardware import Chip, Machine

PRESET, CONTEXT, PROMPT = "fin", 256, 1024
BATCHES = (1, 4)


def this_machine() -> Machine:
    """A chip with the rates that this processor reaches with the threads torch may use."""
    big = torch.ones(1 << 28)
    rates = []
    for _ in range(7):
        watch = Stopwatch()
        big.sum()
        rates.append(watch.rate(big.nbytes).wall)
    bf16 = measure.matmul_flops_per_s(2048, 3.0, torch.bfloat16)
    return Machine(Chip(name="this", kind="cpu", memory=1e9, bandwidth=max(rates), bf16=bf16, source="measured now"), 1)


def build() -> Transformer:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Transformer(ModelConfig.preset(PRESET)).eval()
    finally:
        torch.set_default_dtype(before)


def decode_rate(model: Transformer, batch: int, steps: int) -> list[float]:
    """Tokens per second of single steps, every token another, so that sequences choose different experts."""
    ids = torch.randint(3, model.cfg.vocab_size, (batch, CONTEXT + steps))
    state: State = model.new_state(batch)
    rates = []
    with torch.inference_mode():
        model(ids[:, :CONTEXT], state=state)
        for step in range(CONTEXT, CONTEXT + steps):
            watch = Stopwatch()
            model(ids[:, step : step + 1], state=state)
            rates.append(watch.rate(batch).wall)
    return rates[2:]


def prefill_rate(model: Transformer, repeats: int) -> list[float]:
    rates = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            ids = torch.randint(3, model.cfg.vocab_size, (1, PROMPT))
            watch = Stopwatch()
            model.forward_streams(ids, state=model.new_state(1))
            rates.append(watch.rate(PROMPT).wall)
    return rates[1:]


def line(case: str, length: int, rates: list[float], bound: Bound, machine: Machine) -> dict[str, Any]:
    ours, chip = measure.middle(rates), machine.chip
    return {
        "name": f"plan-{case}",
        "case": f"{measure.length_name(length)}/{PRESET}/{torch.get_num_threads()}t/bf16",
        "unit": "tok/s", "ours": ours, "peer": None, "peer_name": "none", "ratio": None,
        "bound": bound.tokens_per_s, "bound_share": ours / bound.tokens_per_s, "spread": measure.spread(rates, []),
        "config": {
            "binding": bound.binding, "seconds_by_resource": bound.seconds_by_resource, "bandwidth": chip.bandwidth,
            "bf16_flops_per_s": chip.bf16, "repeats": len(rates), **measure.machine(),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measured speed beside the planner's bounds.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    machine, model = this_machine(), build()
    network = V4(model.cfg, PRESET, inventory(model.cfg, "bf16"), own_rows(model.cfg))
    runs: list[tuple[str, int, Callable[[], list[float]], Bound]] = [
        (f"decode-{batch}", CONTEXT, lambda batch=batch: decode_rate(model, batch, 12 if args.quick else 40),
         decode_bound(network, machine, CONTEXT, batch))
        for batch in BATCHES
    ]  # fmt: skip
    runs.append(
        (
            "prefill",
            PROMPT,
            lambda: prefill_rate(model, 1 if args.quick else 5),
            prefill_bound(network, machine, PROMPT),
        )
    )
    for case, length, run, bound in runs:
        measure.print_line(line(case, length, run(), bound, machine), as_json=args.json)


if __name__ == "__main__":
    main()
