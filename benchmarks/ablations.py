"""Is each ingredient worth it? V4's parts switched off one by one at Minke size, at equal tokens and forward FLOPs.

    python benchmarks/ablations.py --out runs/ablations --jobs 2    everything, 3 seeds; run it again to resume
    python benchmarks/ablations.py --out runs/ablations --list      the arms, with their FLOPs
    python benchmarks/ablations.py --out runs/ablations --docs      docs/ablations.md and its figures from OUT
    python benchmarks/ablations.py --quick                          a smoke run of a minute

Every run goes through `rorqual.train.train` in a process of one thread. All arms of a seed read the same rows in the
same order and start from the same values where they share parameters. A finished run is one JSON line of
OUT/results.jsonl and is not repeated. A difference counts beyond two pooled standard deviations of single runs.

Arms: `muon` and `adamw` (each searched over a grid of learning rates on the first seed, then run with the others at its
best; `adamw@0.001` is one of them), v4, plain, hc, full-attention, no-hash, no-mtp, no-mtp-wide, engram, ngram
(counting, no network), qat-fp4, and depth-mhc, depth-plain, depth-hc (a 61-layer narrow network).
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

from ablation_arms import STUDIES, Settings, arms
from ablation_report import depth_table, figures, render, tables
from ablation_runs import (
    DEPTH,
    NGRAM,
    Job,
    Results,
    config_of,
    describe,
    make_job,
    plan,
    read_results,
    run_all,
    run_one,
)
from measure import machine, note

ROOT = Path(__file__).parents[1]
QUICK = Settings(
    tokens=2048, tokens_per_step=512, seq_len=64, eval_tokens=1024, micro_batch_tokens=512, muon_lrs=(2e-3,),
    adamw_lrs=(2e-3,), depth_layers=6, depth_tokens=1024, is_quick=True,
)  # fmt: skip
QUICK_ARMS = ("v4", "plain", "hc")
QUICK_ONCE = ("adamw@0.002", NGRAM, "depth-hc")
"""With the first seed only."""


def available(settings: Settings) -> list[str]:
    """Every arm that can run here; of the two optimisers the names, not their learning rates."""
    found = arms(settings)
    return ["muon", "adamw", *found, NGRAM, *DEPTH]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of runs and results")
    parser.add_argument("--arms", nargs="+", default=None, help="arms to run (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds (0 1 2)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="tokens per run")
    parser.add_argument("--tokens-per-step", type=int, default=Settings.tokens_per_step, help="tokens per step")
    parser.add_argument("--depth-tokens", type=int, default=Settings.depth_tokens, help="tokens per depth run")
    parser.add_argument("--eval-tokens", type=int, default=Settings.eval_tokens, help="held-out tokens")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="learning rate outside the search")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=Settings.dtype, help="precision of products")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--list", action="store_true", help="print the arms with their FLOPs and stop")
    parser.add_argument("--docs", action="store_true", help="only write docs/ablations.md and its figures")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps: does it work at all?")
    parser.add_argument("--json", action="store_true", help="print the comparisons as JSON lines")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)  # a child process: this arm
    parser.add_argument("--run-seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _is_at_lr(name: str) -> bool:
    """Whether an arm is one optimiser at one learning rate, such as `adamw@0.001`."""
    return re.fullmatch(r"(muon|adamw)@\d+(\.\d+)?(e-?\d+)?", name) is not None


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options say; `--quick` has its own."""
    if args.quick:
        return QUICK
    names = ("tokens", "tokens_per_step", "depth_tokens", "eval_tokens", "lr", "dtype")
    return Settings(**{name: getattr(args, name) for name in names})


def main() -> None:
    """The command."""
    args = parse()
    settings = settings_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        out: Path = args.out or (Path(scratch) if args.quick or args.list else ROOT / "runs" / "ablations")
        out.mkdir(parents=True, exist_ok=True)
        if args.run:
            run_one(make_job(args.run, args.run_seed, settings), settings, out)
            return
        if args.docs:
            _write_docs(out)
            return
        known = available(settings)
        chosen = args.arms or (list(QUICK_ARMS) if args.quick else known)
        unknown = sorted({name for name in chosen if not _is_at_lr(name)} - set(known))
        if unknown:
            raise SystemExit(f"There is no arm {', '.join(unknown)} here. The arms are {', '.join(known)}.")
        for line in describe(settings, [name for name in chosen if name not in (*DEPTH, NGRAM, "muon", "adamw")]):
            note(line)
        if args.list:
            return
        once = list(QUICK_ONCE) if args.quick and not args.arms else []
        _work(args, settings, out, chosen, once, args.seeds or ([0, 1] if args.quick else [0, 1, 2]))


def _work(
    args: argparse.Namespace, settings: Settings, out: Path, chosen: list[str], once: list[str], seeds: list[int]
) -> None:
    """Run what is missing (the arms of `once` with the first seed only), then print and draw."""

    def todo(done: Results) -> list[Job]:
        return [*plan(chosen, seeds, settings, done), *plan(once, seeds[:1], settings, done)]

    about = {"settings": dataclasses.asdict(settings), "seeds": seeds, "arms": chosen, "machine": machine()}
    (out / "about.json").write_text(json.dumps(about, indent=1))
    if todo(read_results(out)):
        _prepare(settings, out, seeds[0])
    passed = ["--out", str(out), *(["--quick"] if args.quick else [])]
    for name in ("tokens", "tokens_per_step", "depth_tokens", "eval_tokens", "lr", "dtype"):
        passed += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    results = run_all(todo, out, passed, args.jobs)
    _show(results, settings, seeds, as_json=args.json)
    figures(results, settings, seeds, out / "figures", "ablation")
    note(f"Figures: {out / 'figures'}. Results: {out / 'results.jsonl'}.")


def _prepare(settings: Settings, out: Path, seed: int) -> None:
    """Tokenise the corpus once, before several runs want it at the same time."""
    from rorqual.train.corpus_feed import build_corpus_feed

    config = config_of("v4", seed, settings, out, "prepare")
    build_corpus_feed(config, config.model.build(), out / "cache")


def _show(results: Results, settings: Settings, seeds: list[int], *, as_json: bool) -> None:
    for table in tables(results, settings, seeds):
        if as_json:
            for line in table.as_lines():
                print(json.dumps(line), flush=True)
        else:
            print(table.as_text(), flush=True)
    if not as_json:
        print(depth_table(results, settings, seeds), flush=True)


def _write_docs(out: Path) -> None:
    """The page and its figures from a finished (or unfinished) folder."""
    about = json.loads((out / "about.json").read_text())
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items()}
    settings, results = Settings(**values), read_results(out)
    figures(results, settings, about["seeds"], ROOT / "docs" / "img", "ablation")
    (ROOT / "docs" / "ablations.md").write_text(render(results, settings, about["seeds"], about["machine"]))
    note(f"Wrote docs/ablations.md from {len(results)} runs of {len(STUDIES)} studies.")


if __name__ == "__main__":
    sys.exit(main())
