"""The training run: from a config to a folder with a trained model, stoppable and resumable at every step.

One step: take the step's rows, split them into micro-batches, add up gradients, clip, update weights, move
router biases, write metrics. Everything a later step depends on is in the checkpoint, so a run that was
killed and resumed ends with the same bits as one that was not. Source of the recipe: V4 report, training
setup.
"""

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rorqual import log
from rorqual.config import ModelConfig
from rorqual.errors import RorqualError
from rorqual.parallel.launch import is_joined_from_outside, launch, local_device, local_world
from rorqual.parallel.mesh import Mesh
from rorqual.seeds import derive
from rorqual.train import build, checkpoints, losses, monitors, routing
from rorqual.train.checkpoints import Progress, Saved
from rorqual.train.config import TrainConfig
from rorqual.train.device import check_device
from rorqual.train.evaluate import HeldOut, continue_greedily, evaluate
from rorqual.train.executor import Executor
from rorqual.train.feed import Feed
from rorqual.train.microbatch import Numerics
from rorqual.train.process import prepare_process, restored_globals, stop_signals
from rorqual.train.qat import Qat
from rorqual.train.report import Metrics, ProgressLine, Unwritten, duration, environment, peak_memory_bytes
from rorqual.train.run_folder import write_recipe
from rorqual.train.run_plots import save_plot
from rorqual.train.run_report import Reporter
from rorqual.train.schedules import Schedule, Stage
from rorqual.train.stability import Event
from rorqual.train.stages import freeze_all_but_indexers, is_indexer
from rorqual.train.steering import Steering

logger = log.get(__name__)

FeedBuilder = Callable[[TrainConfig, ModelConfig, Path], Feed]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    model_folder: Path | None
    """The exported model; None when the run stopped early."""
    step: int
    tokens: int
    held_out: dict[str, dict[str, float | None]]
    """By group: `nats_per_token`, `bits_per_byte`."""
    finished: bool


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    progress: str = "quiet",
    build_feed: FeedBuilder | None = None,
) -> Result:
    """Run (or continue) the training that `config` describes.

    `progress` is `rich`, `json` or `quiet`. `build_feed` replaces the data of the config (for tests). With
    `allow_changes` a resumed run takes over settings that differ from the checkpoint's, giving up
    bit-equality. Raises: ConfigError when the folder already holds a run (without `resume`), holds none (with
    it), cannot be written, settings changed, or there is no such device; DataError for a corpus that cannot be
    read; CheckpointError when nothing in the folder can be resumed.
    """
    config = build.as_launched(config)
    check_device(config.run.device, config.run.processes)
    build.check_layout(config)
    arguments = (config, resume, allow_changes, progress, build_feed)
    if config.run.processes > 1 and not is_joined_from_outside():
        result: Result = launch(_train_here, arguments, config.run.processes)
        return result
    return _train_here(*arguments)


def _train_here(
    config: TrainConfig, resume: bool, allow_changes: bool, progress: str, build_feed: FeedBuilder | None
) -> Result:
    """This process's part in the run: all of it, or one rank's."""
    folder = Path(config.run.folder)
    device = local_device(config.run.device)
    with ExitStack() as stack:
        stack.enter_context(restored_globals())
        mesh = stack.enter_context(build.joined_mesh(config, device))
        saved, is_changed = build.open_together(folder, config, mesh, resume=resume, allow_changes=allow_changes)
        run = _Run(config, folder, saved, build_feed, stack, mesh, device)
        if is_changed and mesh.is_main:
            # only now: settings that could not be built must not take the place of those that were
            write_recipe(folder, config)
        mode = progress if mesh.is_main else "quiet"
        line = stack.enter_context(ProgressLine(mode, run.schedule.total_tokens))
        return run.go(line)


def build_schedule(config: TrainConfig) -> Schedule:
    """The schedules of a config."""
    s, o, w = config.schedule, config.optim, config.loss
    return Schedule(
        total_tokens=s.total_tokens,
        peak_lr=o.lr,
        end_lr=o.end_lr,
        warmup_steps=s.warmup_steps,
        decay_from=s.decay_from,
        dense_until=s.dense_until,
        mtp_weight=w.mtp,
        mtp_weight_end=w.mtp_end,
        bias_speed=w.bias_speed,
        bias_off_from=s.bias_off_from,
        seq_lens=tuple(s.seq_lens),
        tokens_per_step=s.tokens_per_step,
        ramp_until=s.ramp_until,
        ramp_from=s.ramp_from,
        index_warmup=s.index_warmup,
        index_warmup_lr=s.index_warmup_lr,
    )


def _corpus_feed(config: TrainConfig, cfg: ModelConfig, folder: Path, *, is_new: bool) -> Feed:
    from rorqual.train.corpus_feed import build_corpus_feed

    return build_corpus_feed(config, cfg, folder, is_new=is_new)


class _Run:
    """One sitting of a run: everything built, then `go`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        saved: Saved | None,
        build_feed: FeedBuilder | None,
        stack: ExitStack,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.config, self.folder, self.mesh = config, folder, mesh
        self.cfg = config.model.build()
        self.schedule = build_schedule(config)
        threads = config.run.threads or max(1, torch.get_num_threads() // local_world())
        dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
        self.numerics = Numerics(dtype, config.run.loss_chunk, threads)
        prepare_process(threads)
        torch.manual_seed(derive(config.run.seed, "torch"))
        make_feed = build_feed or partial(_corpus_feed, is_new=saved is None and mesh.is_main)
        self.feed = build.feed_in_turn(lambda: make_feed(config, self.cfg, folder), mesh)
        is_drawn = saved is None and not config.model.init_from
        self.model, shards = build.build_model(config, self.cfg, mesh, is_drawn=is_drawn)
        build.fill_model(self.model, shards, config, self.cfg, self.feed, saved)
        self.model.to(device)
        self.model.train()
        self.biases = routing.router_biases(self.model)
        self.executor = Executor(self.model, self.cfg, config, mesh, self.numerics, shards)
        self.progress = Progress()
        if saved is not None:
            self.progress = saved.progress
            self.executor.load_optimizer(saved.optimizer)
            self.feed.load_state_dict(saved.feed)
            torch.set_rng_state(saved.torch_rng)
        self.qat = Qat(self.model, config.qat, self.schedule.total_tokens)
        self.qat.follow(self.progress.tokens)
        self.steering = Steering(self, shards)
        if saved is not None:
            self.steering.load(saved)
        if mesh.is_main:
            here = environment(config.run.seed, config.run.device, threads, config.run.processes)
            with (folder / "env.json").open("a" if saved else "w", encoding="utf-8") as file:
                file.write(json.dumps({**here, "mesh": mesh.describe()}) + "\n")
        self.metrics = Metrics(folder / "metrics.jsonl", self.progress.step) if mesh.is_main else Unwritten()
        stack.callback(self.metrics.close)
        self.reporter = Reporter(folder, config.run.report and mesh.is_main)
        self.held_out: dict[str, HeldOut] = {}

    def go(self, line: ProgressLine) -> Result:
        """Train until the tokens are spent, `max_steps` is reached or a signal asks to stop."""
        run = self.config.run
        last_save = time.monotonic()
        began = time.perf_counter()
        before = self.progress.train_seconds
        line.say({"event": "start", "step": self.progress.step, "folder": str(self.folder)}, self._greeting())
        is_stopping = False
        with stop_signals() as stop:
            while self.progress.tokens < self.schedule.total_tokens and not is_stopping:
                if run.max_steps is not None and self.progress.step >= run.max_steps:
                    break
                record = self._step()
                self.progress = dataclasses.replace(self.progress, train_seconds=before + time.perf_counter() - began)
                events = self.steering.after_step(record)
                if record["step"] % run.log_every == 0 or events:
                    self.metrics.write({**record, **self.qat.record()})
                line.update(record, self._seconds_left(record))
                self._tell(events, record, line)
                if self.steering.rolled_back:
                    self._save()  # a restart must begin here
                    continue
                is_over = self.progress.tokens >= self.schedule.total_tokens
                if is_over or (run.eval_every and self.progress.step % run.eval_every == 0):
                    self._evaluate(line)
                is_due = self.mesh.is_main and time.monotonic() - last_save > run.checkpoint_every_s
                is_stopping, is_saving = self.executor.agree([bool(stop), is_due])
                if is_saving:
                    self._save()
                    last_save = time.monotonic()
            return self._finish(line, interrupted=is_stopping)

    def _tell(self, events: list[Event], record: dict[str, Any], line: ProgressLine) -> None:
        """Write and print what happened to the loss. Raises: RorqualError when the run cannot go on."""
        for event in events:
            self.metrics.write(event.record)
            line.say(event.record, event.text)
        if any(event.record["event"] == "lost" for event in events):
            raise RorqualError(
                f"The loss at step {record['step']} is {record['loss']}. Weights are no longer "
                f"usable, so nothing was saved after the last checkpoint in {self.folder / 'checkpoints'}. "
                "Lower optim.lr, and resume from there with --allow-changes."
            )

    def weights_replaced(self) -> None:
        """Forget what was derived from the weights before they were put back."""
        self.qat.weights_moved()

    def _greeting(self) -> str:
        total = self.executor.num_parameters
        done = f"continuing at step {self.progress.step}" if self.progress.step else "starting"
        return (
            f"{total / 1e6:.2f}M parameters, {self.schedule.total_tokens / 1e6:.1f}M tokens, "
            f"{self.schedule.total_steps():,} steps; {done} in {self.folder}"
        )

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        start = time.perf_counter()
        self.qat.follow(self.progress.tokens)
        rows, experts, age = self.steering.next_rows()
        step, tokens = self.progress.step, self.progress.tokens
        schedule, weights = self.schedule, self.config.loss
        num_rows, seq_len = rows.tokens.shape
        stage = schedule.stage(tokens)
        is_frozen = stage is Stage.INDEX_WARMUP
        lr = schedule.index_warmup_lr if is_frozen else schedule.lr(step, tokens)
        num_modules = self.cfg.num_nextn_predict_layers
        mtp_weight = schedule.mtp(tokens) if num_modules and not is_frozen else 0.0
        num_mtp_targets = [int((t != losses.IGNORE).sum()) for t in losses.mtp_targets(rows, num_modules)] or [0]
        is_logged = (step + 1) % self.config.run.log_every == 0
        whole_step = losses.LossWeights(
            mtp=mtp_weight,
            balance=weights.balance,
            index=weights.index,
            num_targets=int((rows.labels != losses.IGNORE).sum()),
            num_mtp_targets=num_mtp_targets[0],
            row_share=1.0,
            index_share=1.0,
            num_deeper_targets=tuple(num_mtp_targets[1:]),
            z=weights.z,
            watch=is_logged,
        )
        freeze_all_but_indexers(self.model, is_frozen)
        parts = self.executor.forward_backward(
            rows, self.rows_at_once(seq_len), whole_step, dense=stage is not Stage.SPARSE, experts=experts
        )
        forward_backward = time.perf_counter()
        norm = self.executor.update(lr, only=is_indexer if is_frozen else None, measure=is_logged)
        self.qat.weights_moved()
        counts = _sum_counts(parts)
        speed = 0.0 if is_frozen else schedule.bias(tokens)
        for name, bias in self.biases.items():
            if name in counts and speed > 0:
                routing.update_bias(bias, counts[name], speed)
        self.progress = dataclasses.replace(self.progress, step=step + 1, tokens=tokens + num_rows * seq_len)
        end = time.perf_counter()
        record = self._record(parts, counts, norm, lr, mtp_weight, stage, start, forward_backward, end, tokens)
        if age is not None:
            record["routing_age"] = age
        return record

    def rows_at_once(self, seq_len: int) -> int:
        return max(1, self.config.run.micro_batch_tokens // seq_len)

    def _record(
        self,
        parts: list[losses.LossParts],
        counts: dict[str, torch.Tensor],
        norm: float,
        lr: float,
        mtp_weight: float,
        stage: Stage,
        start: float,
        forward_backward: float,
        end: float,
        tokens_before: int,
    ) -> dict[str, Any]:
        lm, mtp = sum(p.lm for p in parts), sum(p.mtp for p in parts)
        balance, index = sum(p.balance for p in parts), sum(p.index for p in parts)
        weights = self.config.loss
        z_loss = sum(p.z_loss for p in parts)
        loss = lm + mtp_weight * mtp + weights.balance * balance + weights.index * index + weights.z * z_loss
        figures = monitors.merged(parts)
        health = monitors.health_record(figures)
        recalls = [value for p in parts for value in p.index_recall if math.isfinite(value)]
        load = {name: round(routing.max_violation(c), 4) for name, c in counts.items()}
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss if math.isfinite(norm) else norm,
            "lm": lm,
            "mtp": mtp,
            "balance": balance,
            "index": index,
            "index_recall": sum(recalls) / len(recalls) if recalls else None,
            "grad_norm": norm,
            "lr": lr,
            "mtp_weight": mtp_weight,
            "is_dense": stage is not Stage.SPARSE,
            "stage": str(stage),
            "max_violation": load,
            **monitors.head_record(figures),
            **({"health": health} if health else {}),
            **self.executor.measured,
            "tokens_per_s": (self.progress.tokens - tokens_before) / (end - start),
            "step_s": end - start,
            "optimizer_s": end - forward_backward,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _seconds_left(self, record: dict[str, Any]) -> float:
        return (
            (self.schedule.total_tokens - self.progress.tokens)
            * self.progress.train_seconds
            / max(self.progress.tokens, 1)
        )

    def _evaluate(self, line: ProgressLine) -> None:
        tokens = self.progress.tokens
        seq_len = self.schedule.seq_len(tokens)
        run = self.config.run
        self.held_out = evaluate(
            self.model,
            self.feed,
            num_tokens=run.eval_tokens,
            seq_len=seq_len,
            rows_at_once=self.rows_at_once(seq_len),
            dense=self.schedule.is_dense(tokens) and tokens < self.schedule.total_tokens,
            numerics=self.numerics,
            mesh=self.mesh,
            pipeline=self.executor.pipeline,
        )
        self._sample()
        if not self.held_out:
            return
        first = next(iter(self.held_out.values()))
        record = {
            "step": self.progress.step,
            "tokens": tokens,
            "held_out_loss": first.nats_per_token,
            "bits_per_byte": first.bits_per_byte,
            "held_out": _held_out_record(self.held_out),
        }
        self.metrics.write(record)
        line.say({"event": "eval", **record}, f"step {self.progress.step}: {_describe(self.held_out)}")
        self.reporter.write()

    def _sample(self) -> None:
        """Continue the prompts; every rank takes part where one alone cannot forward, and rank 0 writes."""
        prompts = self.config.run.sample_prompts
        if not prompts or not (self.mesh.is_main or self.executor.is_lockstep):
            return
        path = self.folder / "samples.txt" if self.mesh.is_main else Path(os.devnull)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"===== step {self.progress.step}\n")
            for prompt in prompts:
                start = self.feed.continuation(prompt)
                if start is None:
                    return
                length, eos = self.config.run.sample_tokens, self.cfg.eos_token_id
                pipeline = self.executor.pipeline
                out = continue_greedily(self.model, start.ids, length, eos, start.vocab_size, pipeline)
                file.write(f"--- {prompt}\n{start.decode(out)}\n")

    def _save(self) -> Path:
        return checkpoints.save_pieces(
            self.folder,
            self.executor.weight_pieces(),
            [*self.executor.optimizer_pieces(), *self.steering.pieces()],
            self.steering.feed_state(),
            self.progress,
            self.config.model_dump(mode="json"),
            keep=self.config.run.keep_checkpoints,
            mesh=self.mesh,
            stability=self.steering.state_dict(),
        )

    def _finish(self, line: ProgressLine, *, interrupted: bool) -> Result:
        saved = self._save()
        finished = self.progress.tokens >= self.schedule.total_tokens
        model_folder = None
        if self.mesh.is_main:
            save_plot(self.folder)
            model_folder = self._export(saved) if finished else None
        self.reporter.write(is_last=True)
        result = Result(
            self.folder,
            model_folder,
            self.progress.step,
            self.progress.tokens,
            _held_out_record(self.held_out),
            finished,
        )
        record = {"event": "end", **dataclasses.asdict(result), "checkpoint": str(saved)}
        line.say(json.loads(json.dumps(record, default=str)), self._farewell(result, saved, interrupted))
        return result

    def _farewell(self, result: Result, saved: Path, interrupted: bool) -> str:
        spent = duration(self.progress.train_seconds)
        if not result.finished:
            why = "Stopped" if interrupted else "Reached run.max_steps"
            again = f"rorqual train --resume --run-dir {shlex.quote(str(self.folder))}"
            return f"{why} at step {result.step}; saved {saved}. Continue: {again}"
        best = _describe(self.held_out) if self.held_out else "no held-out text"
        return (
            f"Trained {result.tokens / 1e6:.1f}M tokens in {spent}: {best}.\n"
            f"Model: {result.model_folder}. Try: rorqual chat {result.model_folder}"
        )

    def _export(self, saved: Path) -> Path:
        from rorqual.checkpoint import save_official

        model = self.model if self.mesh.is_alone else build.whole_model(self.cfg, checkpoints.read(saved))
        self.qat.of(model).follow(self.progress.tokens)
        folder = self.folder / "model"
        precision = self.config.run.export_dtype
        if precision == "fp4" or precision == "fp8":
            save_official(model, folder, experts=precision)
        else:
            save_official(model, folder, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        self.feed.save_artifacts(str(folder))
        return folder


def _sum_counts(parts: list[losses.LossParts]) -> dict[str, torch.Tensor]:
    """Tokens per expert over the whole step, by router."""
    totals: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, counts in part.router_counts.items():
            value = torch.tensor(counts, dtype=torch.float64)
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _held_out_record(results: dict[str, HeldOut]) -> dict[str, dict[str, float | None]]:
    return {name: {"nats_per_token": r.nats_per_token, "bits_per_byte": r.bits_per_byte} for name, r in results.items()}


def _describe(results: dict[str, HeldOut]) -> str:
    texts = []
    for name, r in results.items():
        bits = "" if r.bits_per_byte is None else f", {r.bits_per_byte:.3f} bits/byte"
        texts.append(f"held-out {name} {r.nats_per_token:.4f} nats/token{bits}")
    return "; ".join(texts)
