"""A GRPO run: rollouts, rewards, advantages, updates, and the new weights back into the engine.

    prompts -> engine -> rewards -> advantages -> training forward (experts and supports replayed) -> update -> engine

The engine and the trainer share one model: between two phases the engine rests, the trainer moves the weights, and the
engine is told so. With `max_staleness` the engine has a copy and draws the next phases meanwhile (`grpo_ahead`).
A judging actor thus sees the weights that the phase began with. Every draw is a function of the seed and of names
(phase, prompt, answer), so a run that was killed goes on from its last checkpoint to the weights of one that was not;
drawn ahead, that holds for the phases that were trained on. Source: training specification, sections 12.4 and 13.4.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rorqual import log
from rorqual.checkpoint.safetensors_io import save_tensors
from rorqual.engine import Engine, SamplingParams
from rorqual.posttrain import grpo
from rorqual.posttrain.grpo_ahead import Ahead
from rorqual.posttrain.grpo_batch import micro_batches
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_eval import Evaluation
from rorqual.posttrain.grpo_figures import Tally, answer_figures, line_of, save_plot, sentence_of
from rorqual.posttrain.grpo_judging import Judging
from rorqual.posttrain.grpo_rewards import Graders
from rorqual.posttrain.grpo_tasks import Question, TaskStream, families_of
from rorqual.posttrain.rewards.base import Answer, Score
from rorqual.posttrain.rewards.judge_models import EngineJudge
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import Prompt, Rollout, RolloutWorker
from rorqual.posttrain.rollouts_batch import stack
from rorqual.posttrain.scoring import token_logprobs, token_scores
from rorqual.posttrain.stages import Outcome, StageContext
from rorqual.posttrain.trainer import Trainer
from rorqual.seeds import derive

logger = log.get(__name__)


def run_grpo(config: GRPOConfig, context: StageContext) -> Outcome:
    """Train `context.model` by `config`. Raises: ConfigError, DataError for tasks or rewards that cannot be used."""
    with GRPORun(config, context) as run:
        return run.go()


@dataclass
class _Phase:
    """The answers of one rollout phase, group after group."""

    questions: list[Question] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, question: Question, rollouts: Sequence[Rollout], answers: list[Answer], scores: list[Score]) -> None:
        self.groups += [len(self.questions)] * len(rollouts)
        self.questions.append(question)
        self.rollouts += rollouts
        self.answers += answers
        self.scores += scores


class GRPORun:
    """One sitting of a run: everything built, then `go`; or `step` by `step`, for who wants to do more in between.

    Use as a context manager, or call `close`.
    """

    def __init__(self, config: GRPOConfig, context: StageContext) -> None:
        self.config, self.context, self.model = config, context, context.model
        self.model.train()
        seed = context.run.seed
        known = families_of(config, context.base)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if config.beta else None
        self.trainer = Trainer(
            self.model, config.optim, context.run, config.trainable or None, total_steps=config.total_updates
        )
        self.tokenizer = context.tokenizer
        self.is_ahead = config.max_staleness is not None
        drawing = copy.deepcopy(self.model).requires_grad_(False) if self.is_ahead else self.model
        self.engine = Engine(drawing, self.tokenizer, max_running=config.sampling.parallel)
        self.log = RolloutLog(context.folder / "rollouts") if config.keep_rollouts else None
        self.worker = RolloutWorker(
            self.engine,
            seed=derive(seed, "grpo"),
            log=self.log,
            keep_masks=config.keep_sampling_mask,
            keep_routing=config.keep_routing,
        )
        self.stream = TaskStream(config, known, seed)
        self.graders = Graders(config, known, EngineJudge(self.engine))
        self.judging = Judging(config.judging, config.modes, seed)
        self.evaluation = Evaluation(config, self.engine, self.stream, self.graders)
        self.phase, self.reference_file = 0, ""
        self._ahead: Ahead | None = None
        self._is_due = False  # a checkpoint, because the reference is new
        if context.resume:
            self._resume()

    def __enter__(self) -> GRPORun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and close all files."""
        if self._ahead is not None:
            self._ahead.close()
        self.engine.close()
        self.graders.close()
        if self.log is not None:
            self.log.close()
        self.trainer.close()

    # ------------------------------------------------------------------ the loop

    def go(self) -> Outcome:
        """Phases until all are done, retention drops too far, or a signal asks to stop."""
        saved = time.monotonic()
        if self.phase == 0:
            self._evaluate()
        is_over = False
        self.context.line.expect(self.config.steps)
        while self.phase < self.config.steps and not is_over and not self.context.should_stop():
            figures = self.step()
            if figures is None:
                break
            self._report(figures)
            if self.config.eval_every and self.phase % self.config.eval_every == 0:
                is_over = self._evaluate()
            if self._is_due or time.monotonic() - saved > 60 * self.context.run.checkpoint_minutes:
                self._save()
                saved = time.monotonic()
        is_finished = is_over or self.phase >= self.config.steps
        if is_finished and not is_over and self.config.eval_every and self.phase % self.config.eval_every:
            self._evaluate()
        self._save()
        save_plot(self.context.folder)
        return Outcome(self.model, is_finished, self.evaluation.last)

    def step(self) -> dict[str, Any] | None:
        """One phase, from prompts to weights that the engine has: its figures; None when a signal broke it off."""
        began = time.perf_counter()
        phase = self._roll_out()
        if phase is None:
            return None
        rolled = time.perf_counter()
        figures = self._learn(phase)
        self.judging.take(phase.questions, phase.answers, phase.scores, phase.groups)
        self.phase += 1
        self._is_due = self._refresh_reference()
        self._publish()
        if self._ahead is not None:
            figures.update(self._ahead.figures())
        return {**figures, "rollout_s": rolled - began, "train_s": time.perf_counter() - rolled}

    def _publish(self) -> None:
        """The weights of this moment are what the engine draws with from its next token on."""
        if self._ahead is not None:
            self._ahead.publish(self.model.state_dict(), self.phase)
        elif self.is_ahead:
            self.engine.load_weights(self.model.state_dict(), self.phase).result()
        else:
            self.engine.change_weights(lambda: None, version=self.phase).result()

    def _roll_out(self) -> _Phase | None:
        """The answers of this phase with their scores; None when a signal asked to stop meanwhile."""
        if self.is_ahead:
            return self._take_ahead()
        questions = self._questions(self.phase)
        done: dict[int, tuple[list[Rollout], list[Answer], list[Score]]] = {}
        for mode in dict.fromkeys(question.mode for question in questions):
            places = [place for place, question in enumerate(questions) if question.mode == mode]
            prompts = [self._prompt(self.phase, place, questions[place]) for place in places]
            groups = self.worker.generate(prompts, self.config.group_size, self._sampling(questions[places[0]].window))
            for group in groups:
                place = places[group[0].group]
                answers = [self._answer(questions[place], rollout) for rollout in group]
                done[place] = group, answers, self.graders.score(questions[place], answers)
                if self.context.should_stop():
                    return None
        phase = _Phase()
        for place, question in enumerate(questions):
            phase.add(question, *done[place])
        return phase

    def _take_ahead(self) -> _Phase | None:
        """As `_roll_out`, from what was drawn meanwhile."""
        if self._ahead is None:
            self._ahead = Ahead(
                self.worker, self.config, self.phase, self._questions, self._prompt, self._sampling
            )  # fmt: skip
        taken = self._ahead.phase(self.context.should_stop)
        if taken is None:
            return None
        phase = _Phase()
        for question, group in taken:
            answers = [self._answer(question, rollout) for rollout in group]
            phase.add(question, group, answers, self.graders.score(question, answers))
            if self.context.should_stop():
                return None
        return phase

    def _questions(self, phase: int) -> list[Question]:
        per_step = self.config.prompts_per_step
        judgements = self.judging.questions(phase, per_step)
        first = phase * per_step
        return [*(self.stream.question(first + i) for i in range(per_step - len(judgements))), *judgements]

    def _prompt(self, phase: int, place: int, question: Question) -> Prompt:
        return Prompt(f"{phase}/{place}", tuple(self.tokenizer.encode(question.text)), question)

    def _sampling(self, window: int) -> SamplingParams:
        s = self.config.sampling
        return SamplingParams(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_tokens=window)

    def _answer(self, question: Question, rollout: Rollout) -> Answer:
        return Answer(
            item=question.item,
            text=self.tokenizer.decode(rollout.answer),
            ids=tuple(rollout.answer),
            num_tokens=len(rollout.answer),
            finish="length" if rollout.truncated else "stop",
            mode=question.mode,
            window=question.window,
            seed=derive(self.context.run.seed, "reward", rollout.id),
        )

    # ------------------------------------------------------------------ learning

    def _learn(self, phase: _Phase) -> dict[str, Any]:
        """All updates of a phase; figures of its answers, and of the updates."""
        c = self.config
        groups = torch.tensor(phase.groups)
        rewards = torch.tensor([float("nan") if s.value is None else s.value for s in phase.scores])
        is_abstention = torch.tensor([bool(s.is_abstention) for s in phase.scores])
        is_correct = torch.tensor([bool(s.is_correct) for s in phase.scores])
        advantages = grpo.advantages(rewards, groups, scale=c.scale)
        if c.kappa:
            advantages = grpo.shift_abstentions(advantages, groups, is_abstention, is_correct, c.kappa)
        tally = Tally()
        for epoch in range(c.epochs):
            for part in _minibatches(
                len(phase.questions), c.minibatches, derive(self.context.run.seed, "order", self.phase, epoch)
            ):
                places = [i for i, group in enumerate(phase.groups) if group in part]
                tally.begin()
                tally.updates.append(self.trainer.update(self._losses(phase, advantages, places, tally)))
        return {**answer_figures(phase.answers, phase.scores, advantages), **tally.figures()}

    def _losses(
        self, phase: _Phase, advantages: Tensor, places: Sequence[int], tally: Tally
    ) -> Iterable[Callable[[], Tensor]]:
        """-1/N sum J_i of the answers at `places`, a micro-batch at a time.

        Answers that nothing moves (no advantage and no KL) are in N, but need no forward pass.
        """
        moved = [i for i in places if self.config.beta or float(advantages[i])]
        lengths = [len(phase.rollouts[i].trajectory) for i in moved]
        for rows in micro_batches(lengths, self.config.micro_batch_tokens):
            if self._ahead is not None:
                self._ahead.check()
            chosen = [moved[row] for row in rows]
            rollouts = [phase.rollouts[i] for i in chosen]
            yield partial(self._loss, rollouts, advantages[chosen], len(places), tally)

    def _loss(self, rollouts: Sequence[Rollout], advantages: Tensor, count: int, tally: Tally) -> Tensor:
        c, device = self.config, self.model.reference.device
        batch = stack(rollouts)
        ids, chosen = batch.ids.to(device), batch.chosen.to(device)
        routing = batch.routing and {name: experts.to(device) for name, experts in batch.routing.items()}
        how: dict[str, Any] = {
            "temperature": c.sampling.temperature, "lengths": batch.lengths, "wanted": chosen,
            "sampling_mask": None if batch.sampling_mask is None else batch.sampling_mask.to(device),
            "chunk": self.context.run.loss_chunk,
        }  # fmt: skip
        ref = None
        if self.reference is not None:
            with torch.no_grad():
                ref = token_logprobs(self.reference, ids, **how)
        scores = token_scores(self.model, ids, routing=routing, **how)
        found = grpo.objective(
            scores.logprobs, batch.logprobs.to(device), advantages.to(device), chosen,
            ref_NT=ref, epsilon=c.epsilon, delta=c.delta, beta=c.beta,
        )  # fmt: skip
        tally.add(found, float(scores.entropies[chosen].sum()), len(rollouts))
        return -found.per_response_N.sum() / count

    def _refresh_reference(self) -> bool:
        """Every so many phases the policy becomes its own reference, which is kept in a file of its own.

        Whether it did, so that a checkpoint is due; files that kept checkpoints may name stay.
        """
        every = self.config.refresh_reference_every
        if self.reference is None or not every or self.phase % every:
            return False
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.reference.load_state_dict(weights)
        folder = self.context.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.reference_file = f"reference-{self.phase:08d}.safetensors"
        save_tensors(weights, folder / self.reference_file)
        for old in sorted(folder.glob("reference-*.safetensors"))[: -self.context.run.keep_checkpoints - 1]:
            old.unlink()
        return True

    # ------------------------------------------------------------------ figures, checkpoints

    def _evaluate(self) -> bool:
        """Answer the held-out items; whether the run is to stop because known facts are forgotten."""
        if not self.config.eval_every:
            return False
        figures = self.evaluation.run(self.phase)
        self.trainer.log(self.trainer.step, event="eval", phase=self.phase, **figures)
        self.context.line.say({"event": "eval", "phase": self.phase, **figures}, sentence_of(self.phase, figures))
        if not self.evaluation.is_retention_lost:
            return False
        logger.warning(
            "Retention fell from its start by more than %g, so the run ends at phase %d.",
            self.config.stop_at_retention_drop, self.phase,
        )  # fmt: skip
        return True

    def _report(self, figures: dict[str, Any]) -> None:
        record = {"step": self.trainer.step, "phase": self.phase, "version": self.phase, **figures}
        if self.phase % self.context.run.log_every == 0:
            self.trainer.log(**record)
            self.context.line.say(record, line_of(self.phase, self.config.steps, figures))
        seconds = figures["rollout_s"] + figures["train_s"]
        shown = {"step": self.phase, "tokens": self.phase, "lm": figures["loss"]}
        left = (self.config.steps - self.phase) * seconds
        if self.context.line.mode == "rich":
            self.context.line.update({**shown, "tokens_per_s": figures["tokens"] / seconds}, left)

    def _save(self) -> None:
        self.trainer.save(
            {
                "phase": self.phase,
                "reference": self.reference_file,
                "judging": self.judging.state_dict(),
                "evaluation": self.evaluation.state_dict(),
            }
        )

    def _resume(self) -> None:
        extra = self.trainer.resume()
        if extra is None:
            return
        self.phase, self.reference_file = int(extra["phase"]), str(extra["reference"])
        self.judging.load_state_dict(extra["judging"])
        self.evaluation.load_state_dict(extra["evaluation"])
        if self.reference is not None and self.reference_file:
            self.reference.load_state_dict(load_file(self.context.folder / self.reference_file))
        self._publish()


def _minibatches(count: int, parts: int, seed: int) -> list[set[int]]:
    """Prompts 0 to `count` - 1 in `parts` sets of about one size, shuffled unless there is one part."""
    order = list(range(count))
    if parts > 1:
        random.Random(seed).shuffle(order)
    return [set(order[part::parts]) for part in range(parts)]
