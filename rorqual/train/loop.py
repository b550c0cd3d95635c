"""The training run: from a config to a folder with a trained model, stoppable and resumable at every step.

One step: take the step's rows, split them into micro-batches, add up gradients, clip, update weights, move
router biases, write metrics. Everything a later step depends on is in the checkpoint, so a run that was
killed and resumed ends with the same bits as one that was not. Source of the recipe: V4 report, training
setup.
"""

import dataclasses
import json
import math
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
from rorqual.errors import CheckpointError, RorqualError
from rorqual.ops.newton_schulz import FIVE_STEP, HYBRID
from rorqual.seeds import derive
from rorqual.train import checkpoints, groups, losses, routing
from rorqual.train.adamw import AdamW
from rorqual.train.checkpoints import Progress, Saved
from rorqual.train.config import TrainConfig
from rorqual.train.device import check_device
from rorqual.train.evaluate import HeldOut, continue_greedily, evaluate
from rorqual.train.feed import Feed, Rows
from rorqual.train.muon import Muon
from rorqual.train.process import restored_globals, stop_signals
from rorqual.train.report import Metrics, ProgressLine, duration, environment, peak_memory_bytes, save_plot
from rorqual.train.run_folder import open_folder, write_recipe
from rorqual.train.schedules import Schedule
from rorqual.train.workers import Numerics, Pool, prepare_process

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
    check_device(config.run.device, config.run.processes)
    folder = Path(config.run.folder)
    saved, is_changed = open_folder(folder, config, resume=resume, allow_changes=allow_changes)
    with ExitStack() as stack:
        run = _Run(config, folder, saved, build_feed or partial(_corpus_feed, is_new=saved is None), stack)
        if is_changed:  # only now: settings that could not be built must not take the place of those that were
            write_recipe(folder, config)
        line = stack.enter_context(ProgressLine(progress, run.schedule.total_tokens))
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
        build_feed: FeedBuilder,
        stack: ExitStack,
    ) -> None:
        from rorqual.model import Transformer

        self.config, self.folder = config, folder
        self.cfg = config.model.build()
        self.schedule = build_schedule(config)
        threads = config.run.threads or max(1, (torch.get_num_threads()) // config.run.processes)
        dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
        self.numerics = Numerics(dtype, config.run.loss_chunk, threads)
        stack.enter_context(restored_globals())
        prepare_process(threads)
        torch.manual_seed(derive(config.run.seed, "torch"))
        self.feed = build_feed(config, self.cfg, folder)
        self.model = Transformer(self.cfg, derive(config.run.seed, "init"))
        if saved is None:
            if config.model.init_from:
                self._take_weights(config.model.init_from)
            else:
                routing.install_hash_tables(self.model, self.feed.token_counts(), config.run.seed)
        else:
            self._load(saved.weights)
        self.model.to(config.run.device)
        self.model.train()
        # A pool with workers moves the weights into shared memory, so the optimizers (which hold views) come after it.
        self.pool = Pool(self.model, self.cfg, config.run.processes - 1, self.numerics)
        stack.callback(self.pool.close)
        self.biases = routing.router_biases(self.model)
        self._build_optimizers()
        self.progress = Progress()
        if saved is not None:
            self.progress = saved.progress
            self.muon.load_state_dict(_under("muon/", saved.optimizer))
            self.adamw.load_state_dict(_under("adamw/", saved.optimizer))
            self.feed.load_state_dict(saved.feed)
            torch.set_rng_state(saved.torch_rng)
        environment_record = environment(config.run.seed, config.run.device, threads, config.run.processes)
        with (folder / "env.json").open("a" if saved else "w", encoding="utf-8") as file:
            file.write(json.dumps(environment_record) + "\n")
        self.metrics = Metrics(folder / "metrics.jsonl", self.progress.step)
        stack.callback(self.metrics.close)
        self.held_out: dict[str, HeldOut] = {}

    def _build_optimizers(self) -> None:
        o = self.config.optim
        assigned = groups.assign(self.model, self.cfg)
        self.muon = Muon(
            [a for a in assigned if a.role.kind == "muon"],
            momentum=o.muon_momentum,
            weight_decay=o.weight_decay,
            update_rms=o.muon_update_rms,
            steps=HYBRID if o.muon_steps == "hybrid" else FIVE_STEP,
        )
        self.adamw = AdamW(
            [a for a in assigned if a.role.kind != "muon"],
            betas=o.adam_betas,
            eps=o.adam_eps,
            bias_eps=o.adam_bias_eps,
            weight_decay=o.weight_decay,
        )

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        try:
            self.model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"The checkpoint does not fit this architecture: {error}. Resume with the config that wrote it."
            ) from error

    def _take_weights(self, folder: str) -> None:
        from rorqual.checkpoint import load_official

        source = load_official(folder, dtype=torch.float32)
        if source.cfg.replace(torch_dtype=self.cfg.torch_dtype, extra=self.cfg.extra) != self.cfg:
            logger.warning("%s has another config than this run; its weights must still fit.", folder)
        self._load(source.state_dict())

    def go(self, line: ProgressLine) -> Result:
        """Train until the tokens are spent, `max_steps` is reached or a signal asks to stop."""
        run = self.config.run
        last_save = time.monotonic()
        began = time.perf_counter()
        before = self.progress.train_seconds
        line.say({"event": "start", "step": self.progress.step, "folder": str(self.folder)}, self._greeting())
        with stop_signals() as stop:
            while self.progress.tokens < self.schedule.total_tokens and not stop:
                if run.max_steps is not None and self.progress.step >= run.max_steps:
                    break
                record = self._step()
                self.progress = dataclasses.replace(self.progress, train_seconds=before + time.perf_counter() - began)
                if not math.isfinite(record["loss"]):
                    raise RorqualError(
                        f"The loss at step {record['step']} is {record['loss']}. Weights are no longer "
                        f"usable, so nothing was saved after the last checkpoint in {self.folder / 'checkpoints'}. "
                        "Lower optim.lr, and resume from there with --allow-changes."
                    )
                if record["step"] % run.log_every == 0:
                    self.metrics.write(record)
                line.update(record, self._seconds_left(record))
                is_over = self.progress.tokens >= self.schedule.total_tokens
                if is_over or (run.eval_every and self.progress.step % run.eval_every == 0):
                    self._evaluate(line)
                if time.monotonic() - last_save > run.checkpoint_every_s:
                    self._save()
                    last_save = time.monotonic()
            return self._finish(line, interrupted=bool(stop))

    def _greeting(self) -> str:
        total = sum(p.numel() for p in self.model.parameters())
        done = f"continuing at step {self.progress.step}" if self.progress.step else "starting"
        return (
            f"{total / 1e6:.2f}M parameters, {self.schedule.total_tokens / 1e6:.1f}M tokens, "
            f"{self.schedule.total_steps():,} steps; {done} in {self.folder}"
        )

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        start = time.perf_counter()
        step, tokens = self.progress.step, self.progress.tokens
        schedule, weights = self.schedule, self.config.loss
        seq_len, num_rows = schedule.seq_len(tokens), schedule.rows(tokens)
        lr, dense = schedule.lr(step, tokens), schedule.is_dense(tokens)
        mtp_weight = schedule.mtp(tokens) if self.cfg.num_nextn_predict_layers else 0.0
        batches, num_targets, num_mtp_targets = self._micro_batches(num_rows, seq_len)
        index_queries = [losses.num_index_queries(batch) for batch in batches]
        loss_weights = [
            losses.LossWeights(
                mtp=mtp_weight,
                balance=weights.balance,
                index=weights.index,
                num_targets=num_targets,
                num_mtp_targets=num_mtp_targets,
                row_share=batch.tokens.shape[0] / num_rows,
                index_share=queries / max(sum(index_queries), 1),
            )
            for batch, queries in zip(batches, index_queries, strict=True)
        ]
        self.model.zero_grad(set_to_none=True)
        parts = self.pool.accumulate(batches, loss_weights, dense=dense)
        forward_backward = time.perf_counter()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip, foreach=True)
        if math.isfinite(norm.item()):  # otherwise the loop stops with an error; weights stay as they are
            self.muon.step(lr)
            self.adamw.step(lr * self.config.optim.adam_lr_scale)
        counts = _sum_counts(parts)
        speed = schedule.bias(tokens)
        for name, bias in self.biases.items():
            if name in counts and speed > 0:
                routing.update_bias(bias, counts[name], speed)
        self.progress = dataclasses.replace(self.progress, step=step + 1, tokens=tokens + num_rows * seq_len)
        end = time.perf_counter()
        return self._record(parts, counts, norm.item(), lr, mtp_weight, dense, start, forward_backward, end, tokens)

    def _micro_batches(self, num_rows: int, seq_len: int) -> tuple[list[Rows], int, int]:
        rows = self.feed.next_rows(num_rows, seq_len)
        num_targets = int((rows.labels != losses.IGNORE).sum())
        num_mtp_targets = int((losses.mtp_labels(rows.labels, rows.segment_ids) != losses.IGNORE).sum())
        at_once = max(1, self.config.run.micro_batch_tokens // seq_len)
        batches = [rows.part(i, i + at_once) for i in range(0, num_rows, at_once)]
        return batches, num_targets, num_mtp_targets

    def _record(
        self,
        parts: list[losses.LossParts],
        counts: dict[str, torch.Tensor],
        norm: float,
        lr: float,
        mtp_weight: float,
        dense: bool,
        start: float,
        forward_backward: float,
        end: float,
        tokens_before: int,
    ) -> dict[str, Any]:
        lm, mtp = sum(p.lm for p in parts), sum(p.mtp for p in parts)
        balance, index = sum(p.balance for p in parts), sum(p.index for p in parts)
        weights = self.config.loss
        loss = lm + mtp_weight * mtp + weights.balance * balance + weights.index * index
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
            "is_dense": dense,
            "max_violation": load,
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
            rows_at_once=max(1, run.micro_batch_tokens // seq_len),
            dense=self.schedule.is_dense(tokens) and tokens < self.schedule.total_tokens,
            numerics=self.numerics,
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

    def _sample(self) -> None:
        prompts = self.config.run.sample_prompts
        if not prompts:
            return
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"===== step {self.progress.step}\n")
            for prompt in prompts:
                start = self.feed.continuation(prompt)
                if start is None:
                    return
                length, eos = self.config.run.sample_tokens, self.cfg.eos_token_id
                out = continue_greedily(self.model, start.ids, length, eos, start.vocab_size)
                file.write(f"--- {prompt}\n{start.decode(out)}\n")

    def _save(self) -> Path:
        optimizer = {
            **{f"muon/{k}": v for k, v in self.muon.state_dict().items()},
            **{f"adamw/{k}": v for k, v in self.adamw.state_dict().items()},
        }
        return checkpoints.save(
            self.folder,
            self.model,
            optimizer,
            self.feed.state_dict(),
            self.progress,
            self.config.model_dump(mode="json"),
            keep=self.config.run.keep_checkpoints,
        )

    def _finish(self, line: ProgressLine, *, interrupted: bool) -> Result:
        saved = self._save()
        finished = self.progress.tokens >= self.schedule.total_tokens
        save_plot(self.folder / "metrics.jsonl", self.folder / "plots" / "loss.png")
        model_folder = self._export() if finished else None
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

    def _export(self) -> Path:
        from rorqual.checkpoint import save_official

        folder = self.folder / "model"
        dtype = torch.bfloat16 if self.config.run.export_dtype == "bf16" else torch.float32
        save_official(self.model, folder, dtype=dtype)
        self.feed.save_artifacts(str(folder))
        return folder


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
