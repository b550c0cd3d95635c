"""A trial: every question is asked once, and judged as it came and as it leaves the referee.

The first upstream call of a question is what a client without a referee would have got (the bare arm); the referee
judges that same answer and asks again where its rules say so (the referee arm). So both arms are of the same questions
and the same first answers: what differs between them is the referee's doing and no luck of sampling, and a trial
costs no more than the traffic through a referee does.

Folder: `config.json`, `env.json`, `bare.jsonl` and `referee.jsonl` (a record each a question), `result.json`,
`report.html`. A trial that was killed goes on where it stopped, with the same settings and folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rorqual.data.tasks.base import Grade
from rorqual.errors import ConfigError, RequestError
from rorqual.evals.economy import PriceVector
from rorqual.evals.records import Gate, Grader, Policy, Record, RecordFile, Sampling, Usage
from rorqual.evals.run import keep_settings, save_result
from rorqual.evals.targets.base import TransportError, sha, token_signals
from rorqual.evals.targets.server import ServerTarget, usage_of
from rorqual.evals.trial.figures import summarise
from rorqual.evals.trial.questions import SUITE, VERSION, Question, QuestionSet
from rorqual.referee import Answer, Asked, Options, Referee, Retriever, Verdict, read_answer
from rorqual.referee.budget import RepairRates
from rorqual.referee.check_code import CodeRunner
from rorqual.referee.confidence import CalibratedConfidence
from rorqual.referee.judge_url import JudgeServer

BARE, REFEREE = "bare", "referee"
Progress = Callable[[str, int, int], None]
_WITHHELD = ("abstained", "rejected")


@dataclass(frozen=True)
class TrialSettings:
    """What was asked. options: how the referee judges. fallbacks, constrain: as the gateway's.

    confidence: makes one for each question, since each has an event loop of its own; confidence_id: names it.
    """

    options: Options
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=1024))
    price: PriceVector = PriceVector()
    fallbacks: tuple[str, ...] = ()
    constrain: bool = True
    confidence: Callable[[], CalibratedConfidence] | None = None
    confidence_id: str | None = None
    judge: JudgeServer | None = None
    code: CodeRunner | None = None
    retriever: Retriever | None = None
    sources: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.options.mode, "policy_id": self.options.policy.id, "checks": list(self.options.checks),
            "budget": self.options.budget.model_dump(), "sampling": self.sampling.model_dump(),
            "price": asdict(self.price), "fallbacks": list(self.fallbacks), "constrain": self.constrain,
            "confidence_id": self.confidence_id,
            "judge": None if self.judge is None else f"{self.judge.model} of {self.judge.url}", "sources": self.sources,
        }  # fmt: skip


def run_trial(
    settings: TrialSettings,
    asked: QuestionSet,
    target: ServerTarget,
    folder: Path,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The result, also kept in `folder`; a trial that the folder holds is finished. Raises: ConfigError, DataError."""
    began = time.monotonic()
    run_id = _prepare(folder, settings, asked, target)
    trial = _Trial(settings, target, run_id)
    with ExitStack() as stack:
        files = {arm: stack.enter_context(RecordFile(folder / f"{arm}.jsonl")) for arm in (BARE, REFEREE)}
        for file in files.values():
            if any(record.run_id != run_id for record in file.records):
                raise ConfigError(f"{file.path} holds records of another run. Choose another --out.")
        _ask_all(trial, asked.questions, files, on_progress)
        # of a question that was asked twice because of a kill in its middle, the last pair counts
        arms = {arm: {record.item_id: record for record in file.records} for arm, file in files.items()}
    bare, after = ([arms[arm][one.id] for one in asked.questions] for arm in (BARE, REFEREE))
    result = summarise(asked.questions, bare, after, settings.price)
    result |= {
        "run_id": run_id, "set": str(asked.path), "set_sha": asked.sha, "model": target.identity.model_id,
        "upstream": target.identity.engine.name.removeprefix("server "), "settings": settings.to_dict(),
        "folder": str(folder), "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip
    save_result(folder, result)
    return result


def _ask_all(
    trial: _Trial, questions: tuple[Question, ...], files: Mapping[str, RecordFile], on_progress: Progress
) -> None:
    """Ask what is not answered yet, many at a time; after Ctrl-C the answers so far are kept."""
    done = {record.item_id for record in files[REFEREE].records} & {record.item_id for record in files[BARE].records}
    queue = iter([one for one in questions if one.id not in done])
    finished, waiting = len(done), set[Future[tuple[Record, Record]]]()
    on_progress("asking", finished, len(questions))
    with ThreadPoolExecutor(trial.target.parallel, thread_name_prefix="rorqual-trial") as pool:
        try:
            while True:
                while len(waiting) < 2 * trial.target.parallel and (one := next(queue, None)) is not None:
                    waiting.add(pool.submit(trial.ask, one))
                if not waiting:
                    return
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    bare, after = future.result()
                    files[BARE].append(bare)
                    files[REFEREE].append(after)
                finished += len(ready)
                on_progress("asking", finished, len(questions))
        finally:
            for future in waiting:
                future.cancel()


class _Calls:
    """The upstream calls of one question. first: its answer, or why there is none."""

    def __init__(self, trial: _Trial) -> None:
        self._trial = trial
        self.first: Answer | TransportError | None = None
        self.first_ms = 0.0
        self.usage: list[Usage] = []
        self.began = time.perf_counter()

    async def ask(self, body: dict[str, Any]) -> Answer:
        """As the referee asks. Raises: RequestError."""
        try:
            answer = await asyncio.to_thread(self._trial.send, body)
        except TransportError as error:
            self._note(error)
            raise RequestError(str(error), status=error.status or 502, type="upstream_error") from error
        self._note(answer)
        return answer

    def _note(self, outcome: Answer | TransportError) -> None:
        refused = isinstance(self.first, TransportError) and self.first.status in (400, 422)
        if refused:  # asked again in a form that the endpoint takes, and that answer is its first
            self.usage.clear()
        if self.first is None or refused:
            self.first, self.first_ms = outcome, 1000 * (time.perf_counter() - self.began)
        self.usage.append(usage_of(outcome.usage or {}) if isinstance(outcome, Answer) else Usage())


@dataclass
class _Trial:
    """What all questions share. Questions run in threads, each with a loop of its own."""

    settings: TrialSettings
    target: ServerTarget
    run_id: str
    takes_schema: bool = True
    rates: RepairRates = field(default_factory=RepairRates)

    def ask(self, question: Question) -> tuple[Record, Record]:
        """The records of both arms."""
        return asyncio.run(self._ask(question))

    async def _ask(self, question: Question) -> tuple[Record, Record]:
        sampling = self.settings.sampling
        body = {"model": self.target.identity.model_id, **question.body()}
        body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        options = self.settings.options
        if question.evidence:
            checks = tuple(dict.fromkeys([*options.checks, "citations"]))
            options = replace(options, evidence=question.evidence, checks=checks)
        calls, verdict, failure = _Calls(self), None, "no answer came"
        sure = None if self.settings.confidence is None else self.settings.confidence()
        judge = Referee(
            confidence=sure, fallbacks=self.settings.fallbacks, constrain=self.settings.constrain, rates=self.rates,
            judge=None if self.settings.judge is None else self.settings.judge.judge, code=self.settings.code,
            retriever=self.settings.retriever,
        )  # fmt: skip
        try:
            verdict = await judge.judge(Asked(body), options, calls.ask)
        except RequestError as error:
            failure = error.message
        finally:
            if sure is not None:
                await sure.source.close()
        total_ms = 1000 * (time.perf_counter() - calls.began)
        prompt_sha = sha(json.dumps([body["messages"], body.get("tools")], sort_keys=True).encode())
        make = _Recorder(self, question, prompt_sha)
        return make.bare(calls), make.after(calls, verdict, failure, total_ms)

    def send(self, body: dict[str, Any]) -> Answer:
        """One upstream call. Raises: TransportError.

        An endpoint that takes no schema is asked for any JSON; the schema stays what the answer is held to.
        """
        if not self.takes_schema:
            body = _without_schema(body)
        try:
            return _read(self.target.post(body))
        except TransportError as error:
            lenient = _without_schema(body)
            if error.status not in (400, 422) or "response_format" not in str(error) or lenient == body:
                raise
            self.takes_schema = False
            return _read(self.target.post(lenient))


def _read(reply: dict[str, Any]) -> Answer:
    try:
        return read_answer(reply)
    except RequestError as error:
        raise TransportError(error.message) from None


def _without_schema(body: dict[str, Any]) -> dict[str, Any]:
    is_schema = (body.get("response_format") or {}).get("type") == "json_schema"
    return {**body, "response_format": {"type": "json_object"}} if is_schema else body


@dataclass(frozen=True)
class _Recorder:
    """Writes down what both arms gave for one question."""

    trial: _Trial
    question: Question
    prompt_sha: str

    def bare(self, calls: _Calls) -> Record:
        if not isinstance(calls.first, Answer):
            grade = Grade("X", 0.0, None, f"transport: {calls.first or 'no call was made'}")
            return self._record(None, grade, Usage(), calls.first_ms, Policy())
        return self._record(calls.first, self._grade(calls.first), calls.usage[0], calls.first_ms, Policy())

    def after(self, calls: _Calls, verdict: Verdict | None, failure: str, total_ms: float) -> Record:
        options = self.trial.settings.options
        policy = Policy(on=True, policy_id=options.policy.id)
        first, further = (calls.usage or [Usage()])[0], calls.usage[1:]
        own = self.trial.settings.judge is None  # then its calls are among these
        beside = {} if own or verdict is None else verdict.judging or {}
        usage = first.model_copy(
            update={
                "referee_prompt": sum(one.prompt for one in further) + beside.get("prompt_tokens", 0),
                "referee_completion": sum(one.completion for one in further) + beside.get("completion_tokens", 0),
            }
        )
        if verdict is None:
            grade = Grade("X", 0.0, None, f"transport: {failure}")
            return self._record(None, grade, usage, total_ms, policy)
        asked_for = [code for one in verdict.rounds_asked for code in one["codes"]]  # cured since, perhaps
        codes = sorted({*asked_for, *(one.code for one in verdict.findings)})
        signals = {"rounds": float(verdict.rounds), f"verdict.{verdict.word}": 1.0} | {f"code.{c}": 1.0 for c in codes}
        return self._record(verdict.answer, self._judged(verdict), usage, total_ms, policy, signals)

    def _judged(self, verdict: Verdict) -> Grade:
        """The grade of what went out; an answer that was withheld is an abstention, not a wrong answer."""
        if verdict.word in _WITHHELD or verdict.answer is None:
            return Grade("A", float(self.question.unanswerable), None, "withheld by the referee")
        grade = self._grade(verdict.answer)
        if verdict.word == "blocked" and not grade.passed:
            return Grade("A", float(self.question.unanswerable), None, "blocked by the referee")
        return grade

    def _grade(self, answer: Answer) -> Grade:
        """An answer that our own limit of tokens cut off is undecided, as in every suite."""
        grade = self.question.grade(answer)
        if answer.finish == "length" and grade.grade == "I":
            return Grade("X", 0.0, None, "cut off: length")
        return grade

    def _record(
        self, answer: Answer | None, grade: Grade, usage: Usage, ms: float, referee: Policy,
        signals: Mapping[str, float] | None = None,
    ) -> Record:  # fmt: skip
        who, question = self.trial.target.identity, self.question
        found = dict(signals or {})
        if answer is not None:
            found |= token_signals(_logprobs(answer))
        return Record(
            run_id=self.trial.run_id, suite=SUITE, suite_version=VERSION, generator_seed=0, item_id=question.id,
            split="test", stratum={"kind": question.kind}, model_id=who.model_id, model_sha=who.model_sha,
            tokenizer_sha=who.tokenizer_sha, engine=who.engine, sampling=self.trial.settings.sampling,
            effort="not told", gate=Gate(), guard=Policy(), referee=referee, prompt_sha=self.prompt_sha,
            prompt_tokens=usage.prompt, output_text="" if answer is None else _said(answer),
            finish_reason="error" if answer is None else answer.finish or "not told", usage=usage, t_first_ms=None,
            t_total_ms=ms, grade=grade.grade, score=grade.score, grader=Grader(name="rorqual.trial", version=VERSION),
            gold=question.gold, reasoning_text=None if answer is None else answer.reasoning,
            parsed_answer=grade.parsed, signals=found or None, error=grade.reason if grade.grade == "X" else None,
        )  # fmt: skip


def _said(answer: Answer) -> str:
    """Content and calls as one text."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
    return "\n".join(filter(None, [answer.content, json.dumps(calls, ensure_ascii=False) if calls else ""]))


def _logprobs(answer: Answer) -> list[float]:
    try:
        return [float(one["logprob"]) for one in (answer.logprobs or {}).get("content") or ()]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _prepare(folder: Path, settings: TrialSettings, asked: QuestionSet, target: ServerTarget) -> str:
    """Make the folder, or see that it holds this very trial; returns the run's id. Raises: ConfigError."""
    who = target.identity
    told = {"suite": SUITE, "version": VERSION, "set_sha": asked.sha, "model": who.model_id, "target": who.engine.name}
    told = json.loads(json.dumps(told | settings.to_dict()))
    keep_settings(folder, told)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
