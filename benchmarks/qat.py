"""What quantisation-aware training costs and what it saves: loss at equal tokens, seconds per step.

    python benchmarks/qat.py --json [--quick] [--seeds 2] [--steps 300]

A small network is trained on some packages of the standard library, once for each arm and seed, on the same rows in
the same order. An arm's `ours` is the loss (nats per token on held-out files) of its model as it would be served: with
stored weights and rounded activations for the quantised arms.

    none            fp32 weights; the peer of all other lines
    none, then fp4  the same model, rounded after training
    fp8, fp4        quantisation-aware from the first step
    fp4 late        quantisation-aware for the last quarter
    fp4 inputs      inputs of matrices in FP8 too

`step_s` is processor time per step (with its share of start and end), so that other work on the machine counts little;
`rounding_s` is that of rounding all weights once, as every step does whatever its number of micro-batches. `ratio` is
the peer's loss over the arm's, so below 1 is worse.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import note

from rorqual.checkpoint import load_official
from rorqual.model import Transformer, quantised
from rorqual.parallel.mesh import Mesh
from rorqual.train import TrainConfig, load_config, train
from rorqual.train.corpus_feed import build_corpus_feed
from rorqual.train.evaluate import evaluate
from rorqual.train.microbatch import Numerics

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
ARMS: dict[str, list[str]] = {
    "none": [],
    "fp8": ["qat.mode=fp8"],
    "fp4": ["qat.mode=fp4"],
    "fp4 late": ["qat.mode=fp4", "qat.start=0.75"],
    "fp4 inputs": ["qat.mode=fp4", "qat.activations=true"],
}
EVAL_TOKENS, STEP, SEQ_LEN = 8192, 2048, 128


def recipe(arm: str, seed: int, steps: int, folder: Path, cache: Path) -> TrainConfig:
    """The run of an arm: a network of about 2 M parameters, of which two thirds are experts."""
    library = Path(json.__file__).parents[1]
    sources = ", ".join(f'{{kind="path", path="{library / name}"}}' for name in PACKAGES)
    return load_config(
        settings=[
            "model.overrides={hidden_size=128, num_hidden_layers=4, compress_ratios=[0, 4, 16, 4, 0], vocab_size=1024, "
            "num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=64, o_lora_rank=32, o_groups=2, "
            "n_routed_experts=8, moe_intermediate_size=96, sliding_window=32, index_topk=16, index_n_heads=4, "
            "index_head_dim=32, num_hash_layers=1}",
            f"data.sources=[{sources}]",
            f'data.cache="{cache}"',
            "data.held_out=0.1",
            f"schedule={{total_tokens={steps * STEP}, tokens_per_step={STEP}, seq_lens=[[0.0, {SEQ_LEN}]]}}",
            "schedule.warmup_steps=20",
            f"run={{seed={seed}, threads=1, micro_batch_tokens=512, log_every=1, eval_every=0, export_dtype='fp32'}}",
            f"run.eval_tokens={EVAL_TOKENS}",
            "run.report=false",
            f'run.folder="{folder}"',
            *ARMS[arm],
        ]
    )


def held_out_loss(model: Transformer, config: TrainConfig) -> float:
    """Nats per held-out token of all packages together."""
    feed = build_corpus_feed(config, model.cfg, Path(config.run.folder), is_new=False)
    numerics = Numerics(torch.float32, config.run.loss_chunk, 1)
    sizes = {"num_tokens": EVAL_TOKENS, "seq_len": SEQ_LEN, "rows_at_once": 4}
    found = evaluate(model, feed, **sizes, dense=False, numerics=numerics, mesh=Mesh.alone()).values()
    return sum(part.nats for part in found) / sum(part.tokens for part in found)


def rounding_seconds(model: Transformer, mode: quantised.ExpertFormat) -> float:
    """Median time of rounding every weight of `model` once."""
    quantised.quantise(model, mode)
    times = []
    for _ in range(9):
        quantised.forget(model)
        start = time.process_time()
        quantised.used_values(model)
        times.append(time.process_time() - start)
    return statistics.median(times)


def run_arm(arm: str, seed: int, steps: int, work: Path) -> dict[str, dict[str, Any]]:
    """Train one arm; its figures, and for `none` those of rounding it afterwards, by case."""
    config = recipe(arm, seed, steps, work / f"{arm.replace(' ', '-')}-{seed}", work / "cache")
    note(f"training {arm!r}, seed {seed}")
    start = time.process_time()
    result = train(config)
    spent = time.process_time() - start
    assert result.model_folder is not None
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "step_s" in record]
    model = load_official(result.model_folder)
    figures: dict[str, Any] = {
        "loss": held_out_loss(model, config),
        "step_s": spent / result.step,
        "rounding_s": 0.0,
        "error": records[-1].get("quantisation_error", {}),
    }
    if config.qat.mode != "none":
        return {arm: {**figures, "rounding_s": rounding_seconds(model, config.qat.mode)}}
    quantised.quantise(model, "fp4")
    quantised.round_activations(model, "v4")
    after = {**figures, "loss": held_out_loss(model, config), "error": quantised.quantisation_error(model)}
    return {arm: figures, "none, then fp4": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it works, not how well")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 6) if options.quick else (options.seeds, options.steps)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="rorqual-qat-") as work:
        train(recipe("none", 0, 1, Path(work) / "warm-up", Path(work) / "cache"))  # tokens are prepared, code is built
        for seed in range(seeds):
            for arm in ARMS:
                for case, figures in run_arm(arm, seed, steps, Path(work)).items():
                    found.setdefault(case, []).append(figures)
    peer = statistics.mean(figures["loss"] for figures in found["none"])
    for case, runs in found.items():
        losses = [figures["loss"] for figures in runs]
        line = {
            "name": "qat",
            "case": case,
            "unit": "nats/token",
            "ours": statistics.mean(losses),
            "peer": peer,
            "peer_name": "none",
            "ratio": peer / statistics.mean(losses),
            "spread": [min(losses), max(losses)],
            "step_s": statistics.median(figures["step_s"] for figures in runs),
            "rounding_s": statistics.median(figures["rounding_s"] for figures in runs),
            "quantisation_error": runs[-1]["error"],
            "config": {"seeds": seeds, "steps": steps, "tokens": steps * STEP},
        }
        if options.json:
            print(json.dumps(line), flush=True)
        else:
            print(
                f"{case}: {line['ours']:.4f} nats/token ({min(losses):.4f} to {max(losses):.4f}), "
                f"step {line['step_s']:.3f} s, rounding {1e3 * line['rounding_s']:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
