"""Running the ablations: one process and one thread per run, several at once, each finished run a line of results.

A run lives in `OUT/runs/ARM-SEED-DIGEST`; its result is written there first (`result.json`) and then appended to
`OUT/results.jsonl`, so that an interrupted sitting loses at most the runs it was in the middle of. Checkpoints and
exported weights are removed once the result is written.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ablation_arms import Settings, arm_named, at_lr, depth_recipe, digest, network, recipe
from measure import note

from rorqual.config import ModelConfig
from rorqual.errors import RorqualError
from rorqual.planner import count_parameters, forward_flops
from rorqual.train.config import TrainConfig

DEPTH = {"depth-mhc": "mhc", "depth-plain": "plain", "depth-hc": "hc"}
NGRAM = "ngram"
"""Not a network: n-grams counted in the tokens that the base trains on, and scored on the same held-out text."""
NGRAM_ORDER = 5
CURVE_POINTS = 120
GRID_STEPS = 3
"""How often a search for the best learning rate may go beyond its grid when the best lies at the edge."""

Results = dict[str, dict[str, Any]]
"""Result lines by job key."""


@dataclass(frozen=True)
class Job:
    """One run to do."""

    arm: str
    seed: int
    tokens: int
    key: str
    """Folder name: arm, seed and digest of the settings."""


@cache
def make_job(arm: str, seed: int, settings: Settings) -> Job:
    """The job of an arm and a seed under these settings."""
    config = config_of(arm, seed, settings, Path("out"))
    return Job(arm, seed, config.schedule.total_tokens, f"{arm}-{seed}-{digest(config)}")


def config_of(arm: str, seed: int, settings: Settings, out: Path, key: str = "") -> TrainConfig:
    """The training config of a job that works in `out`."""
    folder, cache = out / "runs" / key, out / "cache"
    if arm in DEPTH:
        return depth_recipe(DEPTH[arm], seed, settings, folder, cache)
    return recipe(arm_named("v4" if arm == NGRAM else arm, settings), seed, settings, folder, cache)


# ---------------------------------------------------------------- one run, in a process of its own


def run_one(job: Job, settings: Settings, out: Path) -> dict[str, Any]:
    """Train or count one arm with one seed, continuing where an earlier sitting left a checkpoint; returns its result.

    A run whose loss is no longer finite has the result `failure` and no loss.
    """
    import torch

    from rorqual.train import train

    torch.set_num_threads(1)
    config = config_of(job.arm, job.seed, settings, out, job.key)
    folder = Path(config.run.folder)
    resume = any((folder / "checkpoints").glob("step-*"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    if job.arm == NGRAM:
        folder.mkdir(parents=True, exist_ok=True)
        return _finish(folder, _count(job, config))
    at_start = _probe_start(config, job.seed) if job.arm in DEPTH else None
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        result = train(config, resume=resume)
    except RorqualError as error:
        if "no longer usable" not in str(error):
            raise
        return _finish(folder, {"arm": job.arm, "seed": job.seed, "key": job.key, "failure": str(error)})
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "lm" in r]
    held_out = result.held_out or [r["held_out"] for r in records if "held_out" in r][-1]
    last = next(iter(held_out.values()))
    cfg = config.model.build()
    flops, count = forward_flops(cfg, settings.seq_len), count_parameters(cfg)
    line: dict[str, Any] = {
        "arm": job.arm,
        "seed": job.seed,
        "key": job.key,
        "tokens": result.tokens,
        "steps": result.step,
        "lr": config.optim.lr,
        "nats_per_token": last["nats_per_token"],
        "bits_per_byte": last["bits_per_byte"],
        "grad_norm_largest": max(r["grad_norm"] for r in steps),
        "flops_per_token": flops.total,
        "training_flops_per_token": flops.training,
        "parameters": count.total,
        "activated": count.activated,
        "expert_width": cfg.moe_intermediate_size,
        "experts": cfg.n_routed_experts,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "step_seconds": sum(r["step_s"] for r in steps),
        "tokens_per_s": result.tokens / sum(r["step_s"] for r in steps),
        "curve": _curve(steps),
    }
    if at_start is not None and result.model_folder is not None:
        line["depth"] = {"start": at_start, "end": _probe_end(result.model_folder, config)}
    return _finish(folder, line)


def _finish(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    """Write a run's result, whole or not at all, and drop its weights."""
    draft = folder / "result.draft"
    draft.write_text(json.dumps(line))
    draft.replace(folder / "result.json")
    for heavy in ("checkpoints", "model"):
        shutil.rmtree(folder / heavy, ignore_errors=True)
    return line


def _count(job: Job, config: TrainConfig) -> dict[str, Any]:
    """The result of the n-gram model."""
    from ngram import measure

    from rorqual.train.corpus_feed import build_corpus_feed

    began = time.perf_counter()
    cfg = config.model.build()
    found = measure(build_corpus_feed(config, cfg, Path(config.run.folder)), config, cfg.vocab_size, NGRAM_ORDER)
    by_order = next(iter(found["held_out"].values()))["by_order"]
    return {
        "arm": job.arm, "seed": job.seed, "key": job.key, "tokens": job.tokens, **by_order[NGRAM_ORDER],
        "by_order": {str(n): one["nats_per_token"] for n, one in by_order.items()}, "lr": 0.0, "flops_per_token": 0.0,
        "training_flops_per_token": 0.0, "parameters": 0, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _curve(steps: list[dict[str, Any]]) -> list[list[float]]:
    """Training loss as [tokens, mean of the steps since the point before], at most `CURVE_POINTS` of them."""
    size = max(1, -(-len(steps) // CURVE_POINTS))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [[part[-1]["tokens"], sum(r["lm"] for r in part) / len(part)] for part in parts]


def _probe_start(config: TrainConfig, seed: int) -> dict[str, Any]:
    from depth_study import probe

    from rorqual.model import Transformer
    from rorqual.seeds import derive

    return probe(Transformer(config.model.build(), derive(seed, "init")), _probe_rows(config))


def _probe_end(folder: Path, config: TrainConfig) -> dict[str, Any]:
    from depth_study import probe

    from rorqual.checkpoint import load_official

    return probe(load_official(folder), _probe_rows(config))


def _probe_rows(config: TrainConfig) -> Any:
    from rorqual.train.corpus_feed import build_corpus_feed

    feed = build_corpus_feed(config, config.model.build(), Path(config.run.folder))
    length = config.schedule.seq_lens[0][1]
    _, rows = next(iter(feed.held_out(8 * length, length)))
    return rows.part(0, 4)


# ---------------------------------------------------------------- what is to be done


def plan(chosen: Iterable[str], seeds: list[int], settings: Settings, results: Results) -> list[Job]:
    """The jobs that are still to do, as far as the results so far tell: the search for the best learning rates comes
    first and decides which of them runs with the other seeds.
    """
    wanted: dict[str, Job] = {}

    def want(arm: str, seed: int) -> None:
        job = make_job(arm, seed, settings)
        if job.key not in results:
            wanted.setdefault(job.key, job)

    for name in chosen:
        if name in ("muon", "adamw"):
            lrs = search(name, seeds[0], settings, results)
            for lr in lrs:
                want(at_lr(name, lr, settings).name, seeds[0])
            best = best_lr(name, seeds[0], settings, results)
            for seed in seeds[1:] if best is not None else []:
                want(at_lr(name, best, settings).name, seed)
    for seed in seeds:
        for name in chosen:
            if name not in ("muon", "adamw"):
                want(name, seed)
    return list(wanted.values())


def search(kind: str, seed: int, settings: Settings, results: Results) -> list[float]:
    """Learning rates to try: the grid, and beyond it while the best one lies at its edge."""
    lrs = sorted(settings.muon_lrs if kind == "muon" else settings.adamw_lrs)
    for _ in range(GRID_STEPS):
        losses = [_loss(kind, lr, seed, settings, results) for lr in lrs]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            break
        best = known.index(min(known))
        if best == 0:
            lrs.insert(0, lrs[0] / 2)
        elif best == len(lrs) - 1:
            lrs.append(lrs[-1] * 2)
        else:
            break
    return lrs


def best_lr(kind: str, seed: int, settings: Settings, results: Results) -> float | None:
    """The learning rate with the lowest held-out loss on the first seed; None while the search goes on."""
    tried = [(_loss(kind, lr, seed, settings, results), lr) for lr in search(kind, seed, settings, results)]
    losses = [(loss, lr) for loss, lr in tried if loss is not None]
    return min(losses)[1] if len(losses) == len(tried) else None


def _loss(kind: str, lr: float, seed: int, settings: Settings, results: Results) -> float | None:
    line = results.get(make_job(at_lr(kind, lr, settings).name, seed, settings).key)
    return None if line is None else line.get("nats_per_token", math.inf)


# ---------------------------------------------------------------- doing it


def read_results(out: Path) -> Results:
    """All finished runs of a folder, those included whose line was not appended before an interruption."""
    found: Results = {}
    path = out / "results.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        found[line["key"]] = line
    for result in sorted(out.glob("runs/*/result.json")):
        line = json.loads(result.read_text())
        if line["key"] not in found:
            _append(out, line)
            found[line["key"]] = line
    return found


def _append(out: Path, line: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_all(
    todo: Callable[[Results], list[Job]], out: Path, arguments: list[str], num_jobs: int, say_every_s: float = 30.0
) -> Results:
    """Work until `todo` has nothing left; returns all results. Raises: SystemExit when a run fails.

    `arguments` are this sitting's options, which every child process gets too.
    """
    results = read_results(out)
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    began, done_tokens, last_said = time.monotonic(), 0, -math.inf
    script = Path(__file__).with_name("ablations.py")
    try:
        while True:
            waiting = [job for job in todo(results) if job.key not in running]
            while waiting and len(running) < num_jobs:
                job = waiting.pop(0)
                running[job.key] = (job, _start(script, job, out, arguments))
            if time.monotonic() - last_said > say_every_s:
                last_said = time.monotonic()
                note(_status(out, results, running, waiting, done_tokens, last_said - began))
            if not running:
                return results
            time.sleep(0.1)
            for key, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                finished = out / "runs" / key / "result.json"
                if process.returncode or not finished.exists():
                    log = (out / "logs" / f"{key}.txt").read_text()[-2000:]
                    raise SystemExit(f"The run {key} failed with exit code {process.returncode}:\n{log}")
                results[key] = json.loads(finished.read_text())
                _append(out, results[key])
                done_tokens += job.tokens
                last_said = -math.inf
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(script: Path, job: Job, out: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    (out / "logs").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments, "--run", job.arm, "--run-seed", str(job.seed)]
    with (out / "logs" / f"{job.key}.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _status(
    out: Path, results: Results, running: dict[str, Any], waiting: list[Job], done_tokens: int, seconds: float
) -> str:
    """One line: what runs, what is left, and for how long at the speed so far."""
    part = 0
    for key in running:
        metrics = out / "runs" / key / "metrics.jsonl"
        lines = metrics.read_text().splitlines()[-2:] if metrics.exists() else []
        for text in reversed(lines):
            try:
                part += json.loads(text)["tokens"]
                break
            except (ValueError, KeyError):  # a line that is being written
                continue
    total = sum(job.tokens for job, _ in running.values()) + sum(job.tokens for job in waiting)
    speed = (done_tokens + part) / max(seconds, 1e-9)
    left = f"{(total - part) / speed / 60:.0f} min" if speed > 0 else "time unknown"
    names = ", ".join(f"{job.arm}/{job.seed}" for job, _ in running.values())
    return f"{len(results)} done, {len(running)} running ({names}), {len(waiting)} waiting; {left} left"


def describe(settings: Settings, names: Iterable[str]) -> list[str]:
    """One line per arm: expert width, FLOPs, parameters."""
    base = forward_flops(network("v4", settings), settings.seq_len)
    lines = []
    for name in names:
        cfg: ModelConfig = network(name, settings)
        flops, count = forward_flops(cfg, settings.seq_len), count_parameters(cfg)
        lines.append(
            f"{name:>16}: {flops.total / 1e6:.3f}M forward FLOPs a token ({flops.total / base.total - 1:+.2%}), "
            f"{flops.training / 1e6:.3f}M with MTP; {cfg.n_routed_experts} experts of {cfg.moe_intermediate_size}, "
            f"{count.total / 1e6:.2f}M parameters, {count.activated / 1e6:.2f}M active"
        )
    return lines
