"""Supervised fine-tuning: next-token cross-entropy on what the assistant wrote, and on nothing else.

    loss = CE(learned tokens) + w_mtp CE_mtp + w_balance sum of balance losses + w_index sum of index losses

The loss is pre-training's (`train/losses.py`) with means over the learned tokens of the whole step. Every row and every
step is a function of seed and number, so a killed run goes on bit for bit. Source: V4 report, specialists; the
format's rules are `masking.py`'s.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rorqual.checkpoint.safetensors_io import save_tensors
from rorqual.errors import ConfigError
from rorqual.posttrain.config import StageConfig
from rorqual.posttrain.example_store import ExampleStore
from rorqual.posttrain.packing import TooLong, micro_batches, plan_epoch
from rorqual.posttrain.sft_data import DataSource, prepare, split
from rorqual.posttrain.stages import Outcome, StageContext
from rorqual.posttrain.trainer import Trainer, Update
from rorqual.train import losses, routing
from rorqual.train.feed import Rows
from rorqual.train.microbatch import precision
from rorqual.train.report import peak_memory_bytes
from rorqual.train.run_plots import save_plot

BEST = "best.safetensors"


class SFTConfig(StageConfig):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = Field(default="sft", description="Algorithm: supervised fine-tuning.")
    data: list[DataSource] = Field(description="Where examples come from.")
    validation: list[DataSource] = Field(default=[], description="Examples that are measured and never learned.")
    validation_share: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the examples held out where no validation data is named."
    )
    revision: Literal["2026-04", "2026-07"] = Field(
        default="2026-04", description="Prompt format of the model's checkpoint family."
    )
    seq_len: int = Field(default=2048, ge=8, description="Tokens a row holds.")
    tokens_per_step: int = Field(default=16_384, gt=0, description="Tokens of a step: rows of seq_len.")
    micro_batch_tokens: int = Field(default=8192, gt=0, description="Tokens forwarded at once.")
    epochs: int = Field(default=1, ge=1, description="How often all examples are learned.")
    max_steps: int | None = Field(default=None, ge=1, description="End after so many steps.")
    packing: bool = Field(default=True, description="Several examples in a row, none of which sees another.")
    too_long: TooLong = Field(
        default="drop",
        description="Examples longer than a row: drop, trim (behind the last answer that is whole), refuse.",
    )
    bad_rows: Literal["refuse", "skip"] = Field(default="refuse", description="Rows that cannot be used.")
    mtp: float = Field(default=0.0, ge=0, description="Weight of the multi-token-prediction loss.")
    balance: float = Field(default=1e-4, ge=0, description="Weight of the sequence-wise balance loss.")
    index: float = Field(default=1.0, ge=0, description="Weight of the indexers' own loss; at 0 they stay as they are.")
    bias_speed: float = Field(default=0.0, ge=0, description="Step of the router biases; 0 leaves them.")
    trainable: list[str] = Field(
        default=[], description="Names of parameters to train, * for any text; empty for all of them."
    )
    eval_every: int = Field(default=0, ge=0, description="Steps between validations; 0: at the end of each epoch.")
    patience: int | None = Field(
        default=None, ge=1, description="Validations without a better one after which training ends early."
    )

    @model_validator(mode="after")
    def _is_possible(self) -> "SFTConfig":
        if not self.data:
            raise ValueError("data is empty, so there is nothing to learn")
        if self.patience is not None and not self.has_validation:
            raise ValueError("patience needs validation data or a validation_share")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out."""
        return bool(self.validation) or self.validation_share > 0


@dataclass
class _Position:
    """Where a run stands; all of it is in the checkpoint."""

    tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    num_worse: int = 0
    """Validations since the best."""


def run_sft(config: SFTConfig, context: StageContext) -> Outcome:
    """Train `context.model` on the examples of `config`; the best model by validation, or without one the last."""
    return _Sft(config, context).go()


class _Sft:
    def __init__(self, config: SFTConfig, context: StageContext) -> None:
        self.config, self.context, self.model = config, context, context.model
        self.tokenizer = context.tokenizer
        self.tokenizer.check_fits(self.model.cfg.vocab_size)
        self.seed = context.run.seed
        self.store = self._prepare("data", config.data)
        self.learned, held_out = split(self.store, 0 if config.validation else config.validation_share, self.seed)
        self.validation = (self.store, held_out)
        if config.validation:
            other = self._prepare("validation", config.validation)
            self.validation = (other, list(range(len(other))))
        self.rows_per_step = max(1, config.tokens_per_step // config.seq_len)
        self.epoch_ends = self._epoch_ends()
        self.total_steps = min(self.epoch_ends[-1], config.max_steps or self.epoch_ends[-1])
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.trainer = Trainer(
            self.model, config.optim, context.run, config.trainable or None, total_steps=self.total_steps
        )
        self.at = _Position()

    def _prepare(self, name: str, sources: Sequence[DataSource]) -> ExampleStore:
        c = self.config
        return prepare(
            self.context.folder / name, sources, self.tokenizer, seq_len=c.seq_len, too_long=c.too_long,
            skip_bad=c.bad_rows == "skip", revision=c.revision, seed=self.seed,
        )  # fmt: skip

    # ------------------------------------------------------------------ order

    def _plan(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            plan = plan_epoch(
                self.store.lengths.tolist(), self.learned, self.config.seq_len, seed=self.seed, epoch=epoch,
                packed=self.config.packing,
            )  # fmt: skip
            self._epoch = (epoch, plan)
        return self._epoch[1]

    def _epoch_ends(self) -> list[int]:
        """Steps done after each epoch."""
        self._epoch = (-1, [])
        ends, step = [], 0
        for epoch in range(self.config.epochs):
            step += -(-len(self._plan(epoch)) // self.rows_per_step)
            ends.append(step)
        return ends

    def _rows_of(self, step: int) -> list[list[int]]:
        """Examples of each row of a step."""
        epoch = next(number for number, end in enumerate(self.epoch_ends) if step < end)
        first = (step - (self.epoch_ends[epoch - 1] if epoch else 0)) * self.rows_per_step
        return self._plan(epoch)[first : first + self.rows_per_step]

    # ------------------------------------------------------------------ the run

    def go(self) -> Outcome:
        """Train to the end, to an early end, or until a signal asks to stop."""
        line, run = self.context.line, self.context.run
        with self.trainer as trainer:
            if self.context.resume:
                self._resume()
            line.expect(self._num_tokens())
            line.say({"event": "start", "step": trainer.step, **self._facts()}, self._greeting())
            last_save = time.monotonic()
            while trainer.step < self.total_steps and not self._is_over() and not self.context.should_stop():
                self._step()
                if self._is_evaluation_due():
                    self._evaluate()
                if time.monotonic() - last_save > 60 * run.checkpoint_minutes:
                    self._save()
                    last_save = time.monotonic()
            self._save()
            finished = trainer.step >= self.total_steps or self._is_over()
            save_plot(self.context.folder)
            if finished and self.at.best_step:
                self._take_best()
            return Outcome(self.model, finished, self._figures())

    def _step(self) -> None:
        started = time.perf_counter()
        trainer, config = self.trainer, self.config
        rows = self._rows_of(trainer.step)
        batches = [
            batch.to(self.model.reference.device)
            for batch in micro_batches(self.store, rows, config.micro_batch_tokens, self.tokenizer.pad_token_id)
        ]
        parts: list[losses.LossParts] = []
        self.model.train()
        weights = self._weights(batches)
        update = trainer.update(
            partial(self._loss, batch, weight, parts) for batch, weight in zip(batches, weights, strict=True)
        )
        self._move_biases(parts)
        tokens = sum(sum(batch.lengths or (batch.tokens.numel(),)) for batch in batches)
        self.at.tokens += tokens
        record = self._record(update, parts, weights[0].num_targets, tokens / (time.perf_counter() - started))
        if trainer.step % self.context.run.log_every == 0:
            trainer.log(**record)
        left = (self.total_steps - trainer.step) * (time.perf_counter() - started)
        self.context.line.update(record, left)

    def _loss(self, rows: Rows, weights: losses.LossWeights, parts: list[losses.LossParts]) -> Tensor:
        loss, part = losses.compute(
            self.model, rows, weights, dense=False, chunk=self.context.run.loss_chunk, dtype=self.trainer.dtype
        )
        parts.append(part)
        return loss

    def _weights(self, batches: Sequence[Rows]) -> list[losses.LossWeights]:
        """The loss's weights for each micro-batch, with the denominators of the whole step."""
        depth = self.model.cfg.num_nextn_predict_layers if self.config.mtp else 0
        targets = [[int((t != losses.IGNORE).sum()) for t in losses.mtp_targets(b, depth)] for b in batches]
        mtp = [sum(column) for column in zip(*targets, strict=True)] or [0]
        num_rows = sum(batch.tokens.shape[0] for batch in batches)
        queries = [losses.num_index_queries(batch) for batch in batches]
        return [
            losses.LossWeights(
                mtp=self.config.mtp if depth else 0.0,
                balance=self.config.balance,
                index=self.config.index,
                num_targets=sum(int((b.labels != losses.IGNORE).sum()) for b in batches),
                num_mtp_targets=mtp[0],
                row_share=batch.tokens.shape[0] / num_rows,
                index_share=count / max(sum(queries), 1),
                num_deeper_targets=tuple(mtp[1:]),
            )
            for batch, count in zip(batches, queries, strict=True)
        ]

    @torch.no_grad()
    def _move_biases(self, parts: Sequence[losses.LossParts]) -> None:
        if not self.config.bias_speed:
            return
        for name, bias in routing.router_biases(self.model).items():
            counts = [torch.tensor(part.router_counts[name]) for part in parts if name in part.router_counts]
            if counts:
                routing.update_bias(bias, torch.stack(counts).sum(0), self.config.bias_speed)

    def _record(
        self, update: Update, parts: Sequence[losses.LossParts], learned: int, tokens_per_s: float
    ) -> dict[str, Any]:
        return {
            "step": self.trainer.step,
            "tokens": self.at.tokens,
            "learned_tokens": learned,
            "loss": update.loss,
            "lm": sum(p.lm for p in parts),
            "mtp": sum(p.mtp for p in parts),
            "balance": sum(p.balance for p in parts),
            "index": sum(p.index for p in parts),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "tokens_per_s": tokens_per_s,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    # ------------------------------------------------------------------ validation

    def _is_evaluation_due(self) -> bool:
        step = self.trainer.step
        if not self.config.has_validation:
            return False
        if step == self.total_steps or (not self.config.eval_every and step in self.epoch_ends):
            return True
        return bool(self.config.eval_every) and step % self.config.eval_every == 0

    def _is_over(self) -> bool:
        return self.config.patience is not None and self.at.num_worse >= self.config.patience

    def _evaluate(self) -> None:
        loss = self._held_out_loss()
        step = self.trainer.step
        if loss < self.at.best_loss:
            self.at.best_loss, self.at.best_step, self.at.num_worse = loss, step, 0
            self._keep_best()
        else:
            self.at.num_worse += 1
        record: dict[str, Any] = {
            "step": step,
            "tokens": self.at.tokens,
            "held_out_loss": loss,
            "best_step": self.at.best_step,
        }
        self.trainer.log(**record)
        better = "the best so far" if self.at.best_step == step else f"best {self.at.best_loss:.4f}"
        self.context.line.say({"event": "eval", **record}, f"step {step}: validation {loss:.4f} nats/token, {better}")

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean cross-entropy of the held-out learned tokens, in nats."""
        store, numbers = self.validation
        rows = plan_epoch(store.lengths.tolist(), numbers, self.config.seq_len, seed=self.seed, epoch=0, packed=True)
        total, count = 0.0, 0
        self.model.eval()
        with precision(self.model, self.trainer.dtype):
            for batch in micro_batches(store, rows, self.config.micro_batch_tokens, self.tokenizer.pad_token_id):
                batch = batch.to(self.model.reference.device)
                streams = self.model.forward_streams(batch.tokens, segment_ids=batch.segment_ids, lengths=batch.lengths)
                total += float(
                    losses.cross_entropy_sum(
                        self.model.final_hidden(streams), self.model.head.weight, batch.labels,
                        chunk=self.context.run.loss_chunk, dtype=self.trainer.dtype,
                    )
                )  # fmt: skip
                count += int((batch.labels != losses.IGNORE).sum())
        return total / max(count, 1)

    def _keep_best(self) -> None:
        draft = self.context.folder / f"{BEST}.draft"
        save_tensors({name: tensor.detach().cpu() for name, tensor in self.trainer.moving().items()}, draft)
        draft.replace(self.context.folder / BEST)

    def _take_best(self) -> None:
        if self.at.best_step == self.trainer.step:
            return
        from safetensors.torch import load_file

        best = load_file(self.context.folder / BEST)
        with torch.no_grad():
            for name, tensor in self.trainer.moving().items():
                tensor.copy_(best[name])
        self.trainer.weights_moved()

    # ------------------------------------------------------------------ going on

    def _save(self) -> None:
        at = self.at
        best = at.best_loss if math.isfinite(at.best_loss) else None
        extra = {"best_loss": best, "best_step": at.best_step, "num_worse": at.num_worse, "origin": self._origin()}
        self.trainer.save(extra, at.tokens)

    def _resume(self) -> None:
        extra = self.trainer.resume()
        if extra is None:
            return
        if extra["origin"] != self._origin():
            raise ConfigError(
                f"The data is not what it was when {self.context.folder} began, so the continued run would not equal "
                "the uninterrupted one. Put the files back, or start in another folder."
            )
        best = math.inf if extra["best_loss"] is None else extra["best_loss"]
        self.at = _Position(self.trainer.tokens, best, extra["best_step"], extra["num_worse"])

    def _origin(self) -> list[str]:
        return [self.store.facts["origin"], self.validation[0].facts["origin"]]

    # ------------------------------------------------------------------ words

    def _num_tokens(self) -> int:
        """Tokens of all steps, about."""
        once = int(self.store.lengths[self.learned].sum())
        return round(once * self.config.epochs * self.total_steps / self.epoch_ends[-1])

    def _facts(self) -> dict[str, Any]:
        facts = {key: self.store.facts[key] for key in ("read", "fit")}
        return {"examples": len(self.learned), "held_out": len(self.validation[1]), "steps": self.total_steps, **facts}

    def _greeting(self) -> str:
        fitted = self.store.facts["fit"]
        is_cut = fitted["dropped"] or fitted["trimmed"]
        lost = f"; {fitted['dropped']} left out as too long, {fitted['trimmed']} cut" if is_cut else ""
        return (
            f"{self.trainer.num_trained / 1e6:.2f}M trained parameters, {len(self.learned):,} examples with "
            f"{fitted['learned_tokens']:,} learned of {fitted['tokens']:,} tokens{lost}; {len(self.validation[1]):,} "
            f"held out; step {self.trainer.step} of {self.total_steps:,}"
        )

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"step": self.trainer.step, "tokens": self.at.tokens, **self._facts()}
        if self.at.best_step:
            figures |= {"best_step": self.at.best_step, "held_out_loss": self.at.best_loss}
        return figures
