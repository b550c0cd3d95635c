"""Asks a target every item of a suite that is not answered yet, many at a time, and keeps each answer as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

from rorqual.data.tasks.base import Grade, Item
from rorqual.errors import ConfigError
from rorqual.evals.records import Gate, Grader, Policy, Record, RecordFile, Sampling, Usage
from rorqual.evals.suites.base import Suite
from rorqual.evals.targets.base import Answer, Prompt, Target, TransportError

Progress = Callable[[int, int], None]
"""Called with the items done and all of them."""


@dataclass(frozen=True)
class Pass:
    """One walk over the items. is_forced: with abstentions masked. guard: recorded with every item."""

    run_id: str
    seed: int
    sampling: Sampling
    is_forced: bool = False
    guard: bool | None = None


def run_pass(
    suite: Suite, items: Sequence[Item], target: Target, file: RecordFile, what: Pass, on_progress: Progress
) -> list[Record]:
    """Answer and grade what `file` has not yet; records in the order of the items.

    Raises: ConfigError when the file holds records of another run. After Ctrl-C the answers so far are kept.
    """
    for record in file.records:
        if record.run_id != what.run_id:
            raise ConfigError(
                f"{file.path} holds records of the run {record.run_id}, not of {what.run_id}. Mixing two runs would "
                "spoil both. Choose another --out."
            )
    done = {record.item_id: record for record in file.records}
    todo = [item for item in items if item.id not in done]
    on_progress(len(items) - len(todo), len(items))
    waiting: set[Future[Record]] = set()
    queue = iter(todo)
    finished = len(items) - len(todo)
    with ThreadPoolExecutor(target.parallel, thread_name_prefix="rorqual-eval") as pool:
        try:
            while True:
                # no more than are answered at a time are waiting, so that Ctrl-C ends soon
                while len(waiting) < 2 * target.parallel and (item := next(queue, None)) is not None:
                    waiting.add(pool.submit(partial(_one, suite, item, target, what)))
                if not waiting:
                    break
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    record = future.result()
                    file.append(record)
                    done[record.item_id] = record
                finished += len(ready)
                on_progress(finished, len(items))
        finally:
            for future in waiting:
                future.cancel()
    return [done[item.id] for item in items]


def _one(suite: Suite, item: Item, target: Target, what: Pass) -> Record:
    prompt = Prompt.of(item)
    answer: Answer | None = None
    try:
        answer, grade = suite.ask(item, prompt, target, what.sampling, is_forced=what.is_forced)
    except TransportError as error:
        grade = Grade("X", 0.0, None, f"transport: {error}")
    return _record(suite, item, target, what, answer, grade)


def _record(suite: Suite, item: Item, target: Target, what: Pass, answer: Answer | None, grade: Grade) -> Record:
    who, text = target.identity, "" if answer is None else answer.text
    reasoning = text.partition("</think>")[0] if item.thinking_mode == "thinking" and text else None
    return Record(
        run_id=what.run_id,
        suite=suite.name,
        suite_version=suite.version,
        generator_seed=what.seed,
        item_id=item.id,
        split=item.split,
        stratum=item.stratum,
        model_id=who.model_id,
        model_sha=who.model_sha,
        tokenizer_sha=who.tokenizer_sha,
        engine=who.engine,
        sampling=what.sampling,
        effort=item.effort or ("high" if item.thinking_mode == "thinking" else "none"),
        gate=Gate(),
        guard=Policy(on=bool(what.guard), policy_id="engine" if what.guard else None),
        referee=Policy(),
        prompt_sha="" if answer is None else answer.prompt_sha,
        prompt_tokens=0 if answer is None else answer.usage.prompt,
        output_text=text,
        finish_reason="error" if answer is None else answer.finish_reason,
        usage=Usage() if answer is None else answer.usage,
        t_first_ms=None if answer is None else answer.first_ms,
        t_total_ms=0.0 if answer is None else answer.total_ms,
        grade=grade.grade,
        score=grade.score,
        grader=Grader(name=f"rorqual.{suite.name}", version=suite.version),
        gold=item.gold,
        reasoning_text=reasoning,
        parsed_answer=grade.parsed,
        confidence=None if answer is None else answer.confidence,
        signals=None if answer is None else answer.signals or None,
        error=grade.reason if grade.grade == "X" else None,
    )
