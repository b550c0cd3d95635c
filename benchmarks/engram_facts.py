"""What a memory of token runs is worth for knowing, and for knowing what one knows: S-FACTS with Engram on and off.

    python benchmarks/engram_facts.py --out runs/engram-facts          two trainings side by side, then the table
    python benchmarks/engram_facts.py --out runs/engram-facts --json   one JSON object a figure

Two networks of equal parameters and equal forward FLOPs per token (`ablation_arms.py` fits them) are trained from
random weights on the same documents of S-FACTS in the same order: `experts`, which is Minke, and `engram`, which has
fewer experts and a memory. `off` is the second one with its memory switched off after training. Of each the suite
`facts` without any gate: ACC, HR_U, RET, AUROC and the classes, whose K-clean people were told of, never asked about.
Then facts are rewritten one at a time through the rows that belong to the person's name (`engram_edits.py`): does the
new value hold in other wordings, and what becomes of the neighbours. `memory` edits Engram's rows, `embedding` the rows
of the name's last two tokens in the input embedding.

A run that was stopped goes on where it was; a finished arm is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_arms import Settings, network, overrides
from engram_edits import Asker, study
from measure import note

from rorqual import load
from rorqual.data.tasks import World
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.statistics import wilson
from rorqual.evals.targets.loaded import LoadedTarget
from rorqual.model.engram import memories
from rorqual.planner import count_parameters, forward_flops
from rorqual.train import TrainConfig, train
from rorqual.train.recipe_file import validate

ARMS = {"experts": ("v4", "minke"), "engram": ("engram", "minke-engram")}
FACTS_CASES = {"experts": ("experts", False), "engram": ("engram", False), "engram, off": ("engram", True)}
EDIT_CASES = {
    "experts, embedding": ("experts", "embedding"),
    "engram, embedding": ("engram", "embedding"),
    "engram, memory": ("engram", "memory"),
}
TOKENIZER = Path(__file__).resolve().parents[1] / "rorqual" / "assets" / "minke"
SEED = 20_261_201
SEQ_LEN = 512
FIGURES = ("ACC", "HR_U", "RET", "AUROC", "OI")


def recipe(arm: str, args: argparse.Namespace) -> TrainConfig:
    """The training run of an arm."""
    name, preset = ARMS[arm]
    cfg = network(name, Settings(seq_len=SEQ_LEN))
    step = args.tokens_per_step
    steps = args.tokens // step
    return validate(
        {
            "model": {"preset": preset, "overrides": overrides(cfg, preset)},
            "data": {
                "sources": [],
                "tokenizer": str(TOKENIZER),
                "tasks": {"weight": 1.0, "families": {"facts": 1.0}, "world_size": args.world},
            },
            "optim": {"lr": 2e-3, "end_lr": 1e-4, "muon_dtype": "bf16", "weight_decay": 0.1},
            "schedule": {
                "total_tokens": steps * step,
                "tokens_per_step": step,
                "seq_lens": [(0.0, SEQ_LEN)],
                "warmup_steps": max(1, min(50, steps // 10)),
                "decay_from": 0.5,
            },
            "loss": {"mtp": 0.1, "mtp_end": 0.1, "bias_speed": 0.005},
            "stability": {"detect": False},
            "run": {
                "folder": str(Path(args.out) / f"{arm}-{args.seed}"),
                "seed": args.seed,
                "threads": 1,
                "dtype": args.dtype,
                "micro_batch_tokens": min(2048, step),
                "log_every": 10,
                "eval_every": 0,
                "keep_checkpoints": 1,
                "export_dtype": "fp32",
                "report": False,
            },
        }
    )


def model_folder(arm: str, args: argparse.Namespace) -> Path:
    """Where the arm's weights are exported."""
    return Path(args.out) / f"{arm}-{args.seed}" / "model"


def train_arm(arm: str, args: argparse.Namespace) -> None:
    """Train one arm, going on from its last checkpoint."""
    torch.set_num_threads(1)
    config = recipe(arm, args)
    train(config, resume=any((Path(config.run.folder) / "checkpoints").glob("step-*")))


def train_all(args: argparse.Namespace) -> None:
    """Train the arms that are not finished, each in a process of its own. Exits with the log's name if one fails."""
    started = {}
    for arm in ARMS:
        if (model_folder(arm, args) / "config.json").is_file():
            continue
        log = Path(args.out) / f"{arm}-{args.seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        note(f"training {arm}, {args.tokens:,} tokens; its log: {log}")
        command = [sys.executable, __file__, *sys.argv[1:], "--train-arm", arm]
        with log.open("a") as out:
            started[arm] = (subprocess.Popen(command, stdout=out, stderr=out), log)
    for arm, (process, log) in started.items():
        if process.wait():
            sys.exit(f"training {arm} failed with exit code {process.returncode}; read {log}, and run this again.")


def facts_figures(folder: Path, world: World, args: argparse.Namespace, *, is_off: bool) -> dict[str, Any]:
    """The headline figures of the suite `facts` and its classes."""
    target = LoadedTarget(str(folder))
    try:
        for memory in memories(target.engine.model):
            memory.is_off = is_off
        with tempfile.TemporaryDirectory() as rows:
            outcome = evaluate(RunSettings("facts", seed=SEED, items=args.items), target, world, Path(rows))
    finally:
        target.close()
    found = {name: (outcome.result["headline"][name], outcome.result["intervals"].get(name)) for name in FIGURES}
    for kind in sorted({str(row.item.stratum["class"]) for row in outcome.rows}):
        flags = [row.passed for row in outcome.rows if row.item.stratum["class"] == kind]
        found[kind] = _share(flags)
    forced = [row.passed for row in outcome.forced or () if row.item.stratum["class"] == "K-clean"]
    return found | {"K-clean, forced": _share(forced)}


def _share(flags: Sequence[bool]) -> tuple[float | None, list[float] | None]:
    interval = wilson(sum(flags), len(flags))
    return (None, None) if interval is None else (interval.value, [interval.low, interval.high])


def edit_figures(folder: Path, world: World, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """How often each check of the edits held, with what an edit took."""
    model, tokenizer = load(str(folder))
    held, edits = study(Asker(model.eval(), tokenizer), world, kind, count=args.edits, seed=args.seed)
    found: dict[str, Any] = {name: _share(flags) for name, flags in held.items()}
    for name in ("steps", "rows"):
        values = [getattr(edit, name) for edit in edits]
        found[f"{name} of an edit"] = (statistics.median(values) if values else None, None)
    return {"facts edited": (len(edits), None), **found}


def report(found: dict[str, dict[str, Any]], part: str, as_json: bool) -> None:
    """Figures by case, side by side or a line each."""
    if as_json:
        for case, figures in found.items():
            for figure, (value, interval) in figures.items():
                line = {"name": f"engram_facts.{part}", "case": case, "figure": figure, "value": value}
                print(json.dumps(line | {"interval": interval}), flush=True)
        return
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    print(f"{part:28}" + "".join(f"{case:>24}" for case in found))
    for name in names:
        cells = [_cell(*figures.get(name, (None, None))) for figures in found.values()]
        print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if not interval else f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/engram-facts", help="folder of the trainings")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="training tokens of an arm")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--world", default="town", choices=("tiny", "town", "small"), help="how many people there are")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the matrix products")
    parser.add_argument("--items", type=int, default=1100, help="questions put to a model")
    parser.add_argument("--edits", type=int, default=60, help="facts that are rewritten")
    parser.add_argument("--seed", type=int, default=1, help="of weights, data and edits")
    parser.add_argument("--only", default="facts,edits", help="what to measure of the trained arms, with a comma")
    parser.add_argument("--quick", action="store_true", help="24,576 tokens, 11 questions, 2 edits: does it run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train-arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - {"facts", "edits"}:
        parser.error(f"--only names {', '.join(sorted(unknown))}; there are facts and edits")
    if args.quick:
        args.tokens, args.tokens_per_step, args.items, args.edits, args.dtype = 24_576, 2048, 11, 2, "fp32"
    if args.train_arm:
        train_arm(args.train_arm, args)
        return
    train_all(args)
    world = World.build(size=args.world)
    sizes = {}
    for arm, (name, _) in ARMS.items():
        cfg = network(name, Settings(seq_len=SEQ_LEN))
        flops = forward_flops(cfg, SEQ_LEN).total
        sizes[arm] = {"parameters": (count_parameters(cfg).total, None), "FLOPs per token": (flops, None)}
    report(sizes, "size", args.json)
    if "facts" in args.only.split(","):
        found = {}
        for case, (arm, is_off) in FACTS_CASES.items():
            note(f"S-FACTS: {case}")
            found[case] = facts_figures(model_folder(arm, args), world, args, is_off=is_off)
        report(found, "facts", args.json)
    if "edits" in args.only.split(","):
        found = {}
        for case, (arm, kind) in EDIT_CASES.items():
            note(f"rewriting facts: {case}")
            found[case] = edit_figures(model_folder(arm, args), world, kind, args)
        report(found, "edits", args.json)


if __name__ == "__main__":
    main()
