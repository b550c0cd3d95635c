"""What watching a run and anticipatory routing cost: CPU seconds of one Minke step on one thread, with and without.

    python benchmarks/stability_cost.py

Prints one JSON line. CPU seconds, not wall-clock time, so that other work on the machine does not count; of several
repeats the least is taken.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from rorqual.model import Transformer
from rorqual.parallel.mesh import Mesh
from rorqual.train import load_config, losses, snapshots
from rorqual.train.checkpoints import Progress
from rorqual.train.executor import Executor
from rorqual.train.feed import Rows
from rorqual.train.microbatch import Numerics


def cpu_seconds(action: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of several repeats."""
    spent = []
    for _ in range(repeats):
        before = time.process_time()
        action()
        spent.append(time.process_time() - before)
    return min(spent)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="minke")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens in a step, forwarded four at once")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(settings=[f"model.preset={options.preset}"])
    cfg = config.model.build()
    model = Transformer(cfg, 0).train()
    executor = Executor(model, cfg, config, Mesh.alone(), Numerics(torch.float32, 1024, 1), {})
    tokens = torch.randint(0, cfg.vocab_size, (options.rows, 512), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    rows = Rows(tokens, labels, (torch.arange(512) // 100).expand(options.rows, 512).contiguous())
    step = losses.LossWeights(0.3, 1e-4, 1.0, options.rows * 511, options.rows * 506, 1.0, 1.0)
    optimizers = {"muon": executor.muon, "adamw": executor.adamw, "tables": executor.tables}

    def gradients(**changes: Any) -> None:
        experts = changes.pop("experts", None)
        executor.forward_backward(rows, 4, dataclasses.replace(step, **changes), dense=False, experts=experts)

    gradients()
    executor.update(1e-3)  # the optimizers make their state
    ids = executor.route(rows, 4, dense=False)
    spent = {
        "gradients": cpu_seconds(gradients, options.repeats),
        "gradients_watched": cpu_seconds(lambda: gradients(watch=True), options.repeats),
        "gradients_forced": cpu_seconds(lambda: gradients(experts=ids), options.repeats),
        "route_only": cpu_seconds(lambda: executor.route(rows, 4, dense=False), options.repeats),
        "update": cpu_seconds(lambda: executor.update(1e-3), options.repeats),
        "update_measured": cpu_seconds(lambda: executor.update(1e-3, measure=True), options.repeats),
        "snapshot": cpu_seconds(lambda: snapshots.take(model, optimizers, {}, Progress()), options.repeats),
    }
    whole = spent["gradients"] + spent["update"]
    watched = spent["gradients_watched"] + spent["update_measured"] - whole
    active = spent["route_only"] + spent["gradients_forced"] - spent["gradients"]
    shares = {"logged_step_overhead": watched / whole, "active_step_overhead": active / whole}
    record = {"preset": options.preset, "tokens": tokens.numel(), "cpu_s": spent, **shares}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
