"""A run of on-policy distillation: the student samples, the teachers read along, the student moves towards them.

    prompts -> engine (the student's own answers) -> each teacher's hidden states, cached -> updates, ordered by
    teacher, logits rebuilt through one head at a time -> new weights back into the engine

L = 1/N sum over the N compared ids of a mini-batch and over teachers of w_i KL(student || teacher_i). Every draw is a
function of the seed and of names (phase, prompt, answer), so a run that was killed goes on to the weights of one that
was not. Source: V4 report, on-policy distillation.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.checkpoint.load import locate
from rorqual.data.tasks import World
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import DataError
from rorqual.posttrain.distill import Term, reverse_kl
from rorqual.posttrain.distill_config import DistillConfig, TeacherSection
from rorqual.posttrain.distill_decision import Altered, Decision
from rorqual.posttrain.distill_figures import save_plot, sentence_of
from rorqual.posttrain.distill_prompts import PromptStream, TaskPrompt
from rorqual.posttrain.hidden_cache import HiddenCache, TeacherStates
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import Prompt, Rollout, RolloutWorker
from rorqual.posttrain.stages import Outcome, StageContext
from rorqual.posttrain.teachers import Heads, Sample, Teacher, batches_of, by_teacher, fill_cache, key_of
from rorqual.posttrain.trainer import Trainer
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer


def run_distill(config: DistillConfig, context: StageContext) -> Outcome:
    """Distil the teachers of `config` into `context.model`.

    Raises: ConfigError, CheckpointError or DataError for teachers or prompts that cannot be used.
    """
    with _Run(config, context) as run:
        return run.go()


def teachers_of(config: DistillConfig, context: StageContext) -> list[Teacher]:
    """The teachers of a recipe. Raises: CheckpointError for a model that is not there, DataError for bad decisions."""
    return [_teacher(section, context) for section in config.teachers]


def _teacher(section: TeacherSection, context: StageContext) -> Teacher:
    qat: Literal["fp8", "fp4"] | None
    asked = context.run.qat if section.qat == "run" else section.qat
    qat = None if asked == "none" or section.weights is not None else asked
    decide = None if section.decisions is None else decisions_of(section, context.tokenizer)
    return Teacher(
        section.name,
        locate(section.model),
        section.weight,
        tuple(section.domains),
        None if section.adapter is None else Path(section.adapter),
        section.weights,
        qat,
        torch.bfloat16 if context.run.dtype == "bf16" else torch.float32,
        decide,
    )


def decisions_of(section: TeacherSection, tokenizer: Tokenizer) -> Callable[[Sample], Decision | None]:
    """A gate's decisions by the prompt's id, from a file. Raises: DataError for lines that hold none."""
    assert section.decisions is not None
    path, found = Path(section.decisions), {}
    text = (*tokenizer.encode(section.decision_text), tokenizer.eos_token_id)
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                found[str(row["prompt"])] = Decision(float(row["probability"]), text, section.decision_slack)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no decisions of a gate ({error}). A line is {{prompt: id, probability: 0 to 1}}."
        ) from error
    return lambda sample: found.get(sample.prompt_id)


@dataclass
class _Tally:
    """Sums over a phase, by teacher."""

    kl: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, teacher: str, kl: Tensor) -> None:
        self.kl[teacher] = self.kl.get(teacher, 0.0) + float(kl.sum())
        self.tokens[teacher] = self.tokens.get(teacher, 0) + kl.numel()

    def means(self) -> dict[str, float]:
        return {name: self.kl[name] / self.tokens[name] for name in self.kl}


class _Run:
    """One sitting of a run: everything built, then `go`."""

    def __init__(self, config: DistillConfig, context: StageContext) -> None:
        self.config, self.context, self.model = config, context, context.model
        self.tokenizer, self.device = context.tokenizer, context.run.device
        seed = context.run.seed
        self.teachers = teachers_of(config, context)
        self.versions = {teacher.name: teacher.version() for teacher in self.teachers}
        self.prompts = PromptStream(
            config.prompts, derive(seed, "distill"), World.taught_to(context.base, config.world)
        )
        self.trainer = Trainer(
            self.model, config.optim, context.run, config.trainable or None, total_steps=config.total_updates
        )
        self.choices = min(self.model.cfg.vocab_size, int(self.tokenizer.vocab_size))
        self.engine = Engine(self.model, self.tokenizer, max_running=config.parallel)
        self.log = RolloutLog(context.folder / "rollouts") if config.keep_rollouts else None
        self.worker = RolloutWorker(self.engine, seed=derive(seed, "distill"), log=self.log)
        dtype = torch.bfloat16 if config.cache_dtype == "bf16" else torch.float32
        self.cache = HiddenCache(context.folder / "teacher_states", dtype)
        self.heads = Heads(lambda name: self._named(name).head(), self.device)
        self.phase = self.tokens = 0
        if context.resume:
            self._resume()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.close()
        self.heads.close()
        if self.log is not None:
            self.log.close()
        self.trainer.close()

    def _named(self, name: str) -> Teacher:
        return next(teacher for teacher in self.teachers if teacher.name == name)

    # ------------------------------------------------------------------ the loop

    def go(self) -> Outcome:
        """Phases until all are done or a signal asks to stop."""
        saved = time.monotonic()
        last: dict[str, Any] = {}
        self.context.line.say({"event": "start", "phase": self.phase, **self._facts()}, self._greeting())
        while self.phase < self.config.steps and not self.context.should_stop():
            began = time.perf_counter()
            samples = self._sample()
            if samples is None:
                break
            sampled = time.perf_counter()
            loaded = fill_cache(
                self.cache, self.teachers, self.versions, samples, batch_tokens=self.config.micro_batch_tokens,
                device=self.device, chunk=self.context.run.loss_chunk,
            )  # fmt: skip
            read = time.perf_counter()
            last = {**self._learn(samples), "teachers_loaded": len(loaded)}
            self.cache.forget({sample.id for sample in samples})
            self.phase += 1
            self.engine.change_weights(lambda: None, version=self.phase).result()
            ended = time.perf_counter()
            seconds = {"rollout_s": sampled - began, "teacher_s": read - sampled, "train_s": ended - read}
            self._report({**last, **seconds}, ended - began)
            if time.monotonic() - saved > 60 * self.context.run.checkpoint_minutes:
                self._save()
                saved = time.monotonic()
        self._save()
        save_plot(self.context.folder)
        finished = self.phase >= self.config.steps
        return Outcome(self.model, finished, {"kl": last.get("kl", {})})

    def _facts(self) -> dict[str, Any]:
        return {
            "teachers": [teacher.name for teacher in self.teachers],
            "trained": self.trainer.num_trained,
            "steps": self.config.steps,
        }

    def _greeting(self) -> str:
        facts = self._facts()
        return f"Distilling {', '.join(facts['teachers'])} into {facts['trained']:,} trained numbers"

    def _sample(self) -> list[Sample] | None:
        """The student's answers of this phase; None when a signal asked to stop meanwhile."""
        first = self.phase * self.config.prompts_per_step
        self.prompts.skip(first)
        taken = [self.prompts.take() for _ in range(self.config.prompts_per_step)]
        prompts = [
            Prompt(f"{self.phase}/{place}", tuple(self.tokenizer.encode(prompt.text)))
            for place, prompt in enumerate(taken)
        ]
        params = SamplingParams(temperature=self.config.temperature, max_tokens=self.config.max_tokens)
        self.model.eval()
        samples: dict[int, list[Sample]] = {}
        for group in self.worker.generate(prompts, self.config.answers, params):
            place = group[0].group
            samples[place] = [_sample_of(rollout, taken[place]) for rollout in group]
            if self.context.should_stop():
                return None
        return [sample for place in sorted(samples) for sample in samples[place]]

    # ------------------------------------------------------------------ learning

    def _learn(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """All updates of a phase, and its figures."""
        tally, updates = _Tally(), []
        self.model.train()
        loads = len(self.heads.loads)
        for number in range(self.config.minibatches):
            part = samples[number :: self.config.minibatches]
            updates.append(self.trainer.update(self._losses(part, tally)))
        self.heads.release()
        lengths = [sum(sample.mask) for sample in samples]
        self.tokens += sum(lengths)
        return {
            "loss": sum(update.loss for update in updates) / len(updates),
            "grad_norm": sum(update.grad_norm for update in updates) / len(updates),
            "lr": updates[-1].lr,
            "kl": tally.means(),
            "length": sum(lengths) / len(lengths),
            "truncated": sum(length >= self.config.max_tokens for length in lengths) / len(lengths),
            "tokens": self.tokens,
            "heads_loaded": len(self.heads.loads) - loads,
        }

    def _losses(self, samples: Sequence[Sample], tally: _Tally) -> Iterator[Callable[[], Tensor]]:
        """The micro-batches of one update, teacher after teacher, so that each head is brought in once."""
        compared = sum(len(sample.rows) for sample in samples)
        order = by_teacher(self.teachers, samples)
        for number, (teacher, mine) in enumerate(order):
            upcoming = order[number + 1][0].name if number + 1 < len(order) else None
            for part in batches_of(mine, self.config.micro_batch_tokens, lambda sample: sample.span[1]):
                yield partial(self._loss, teacher, part, compared, upcoming, tally)

    def _loss(
        self, teacher: Teacher, samples: list[Sample], compared: int, upcoming: str | None, tally: _Tally
    ) -> Tensor:
        """One teacher's share of the loss, of samples that are forwarded together."""
        device = self.model.reference.device
        lengths = [sample.span[1] for sample in samples]
        ids = torch.zeros(len(samples), max(lengths), dtype=torch.int64)
        where = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            ids[row, :length] = torch.tensor(sample.ids[:length])
            where[row, sample.rows] = True
        streams = self.model.forward_streams(ids.to(device), lengths=lengths)
        hidden = self.model.final_hidden(streams)[where.to(device)]
        kept, alteration = self._states(teacher, samples)
        term = Term(
            kept.to(device),
            self.heads.use(teacher.name, upcoming)[: self.choices],
            torch.full((len(hidden),), teacher.weight / compared, device=device),
            alteration,
        )
        found = reverse_kl(hidden, self.model.head.weight[: self.choices], [term], self.context.run.loss_chunk)
        tally.add(teacher.name, found.kl[0])
        return found.loss

    def _states(self, teacher: Teacher, samples: Sequence[Sample]) -> tuple[Tensor, Altered | None]:
        """The teacher's states at the compared rows, [R, D], and what a gate altered there."""
        found: list[TeacherStates] = []
        for sample in samples:
            kept = self.cache.get(key_of(sample, teacher.name, self.versions[teacher.name]))
            at = [row - sample.span[0] for row in sample.rows]
            share = torch.zeros(len(at)) if kept.share is None else kept.share[at]
            token = torch.full((len(at),), -1) if kept.token is None else kept.token[at]
            found.append(TeacherStates(kept.hidden[at], share, token))
        hidden = torch.cat([one.hidden for one in found])
        if teacher.decide is None:
            return hidden, None
        share = torch.cat([one.share for one in found if one.share is not None])
        token = torch.cat([one.token for one in found if one.token is not None])
        slack = next((d.slack for sample in samples if (d := teacher.decide(sample)) is not None), 1e-3)
        return hidden, Altered(share, token, slack)

    # ------------------------------------------------------------------ figures, checkpoints

    def _report(self, figures: dict[str, Any], seconds: float) -> None:
        record = {"step": self.trainer.step, "phase": self.phase, **figures}
        if self.phase % self.context.run.log_every == 0:
            self.trainer.log(self.trainer.step, **{k: v for k, v in record.items() if k != "step"})
        self.context.line.say(record, sentence_of(self.phase, self.config.steps, figures, seconds))

    def _save(self) -> None:
        self.trainer.save({"phase": self.phase, "tokens": self.tokens, "versions": self.versions}, self.tokens)

    def _resume(self) -> None:
        extra = self.trainer.resume()
        if extra is None:
            return
        self.phase, self.tokens = int(extra["phase"]), int(extra["tokens"])
        changed = [name for name, version in self.versions.items() if extra["versions"].get(name) != version]
        if changed:
            raise DataError(
                f"The teachers {', '.join(changed)} are not those that this run began with, so the continued run would "
                "not equal the uninterrupted one. Put them back, or start in another folder."
            )
        self.engine.change_weights(lambda: None, version=self.phase).result()


def _sample_of(rollout: Rollout, prompt: TaskPrompt) -> Sample:
    trajectory = rollout.trajectory
    return Sample(rollout.id, tuple(trajectory.ids), tuple(trajectory.mask), prompt.domain, prompt.id)
