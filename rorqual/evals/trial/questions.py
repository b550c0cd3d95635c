"""The questions of a trial, one JSON object a line, and how an answer to one is graded: by strings and schemas alone.

    {"question": "What is the capital of Norway?", "answer": ["Oslo", "Oslo, Norway"]}
    {"question": "Who won?", "evidence": "The final was called off.", "unanswerable": true}
    {"question": "Oslo's weather as JSON.", "schema": {"type": "object", "required": ["city"]}}
    {"messages": [...], "tools": [...], "answer": {"name": "weather", "arguments": {"city": "Oslo"}}}

Graders: `data/tasks/answers.py` (abstention), `evals/public.py` (short answers). A model never judges another here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from rorqual.data.tasks.answers import is_abstention
from rorqual.data.tasks.base import Grade, correct, wrong
from rorqual.errors import ConfigError, RequestError
from rorqual.evals.public import grade_short
from rorqual.referee import Answer, Evidence
from rorqual.referee.json_text import NotJson, read_strictly
from rorqual.referee.schemas import schema_of

VERSION = "1"
SUITE = "trial"


class _EvidenceLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    text: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    id: str | None = None
    question: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    answer: Any = None
    evidence: str | list[str | _EvidenceLine] | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    unanswerable: StrictBool = False


@dataclass(frozen=True)
class Question:
    """One line. accepted: right answers, each a text, or JSON where a schema or a call is asked for."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    accepted: tuple[Any, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    schema: Any = None
    unanswerable: bool = False

    def body(self) -> dict[str, Any]:
        """The question's part of a chat request."""
        body: dict[str, Any] = {"messages": [dict(one) for one in self.messages]}
        if self.tools:
            body["tools"] = [dict(one) for one in self.tools]
        if self.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema}}
        return body

    @property
    def kind(self) -> str:
        """The row of the report it counts in."""
        if self.unanswerable:
            return "unanswerable"
        return "tool call" if self.wants_call else "answer" if self.schema is None else "schema"

    @property
    def wants_call(self) -> bool:
        return self.schema is None and bool(self.tools) and any(isinstance(one, dict) for one in self.accepted)

    @property
    def gold(self) -> str:
        return "(no answer)" if self.unanswerable else json.dumps(list(self.accepted), ensure_ascii=False)

    def grade(self, answer: Answer) -> Grade:
        """C: one of the accepted answers, or JSON that obeys the schema; A: it declines; I: anything else."""
        said = (answer.content or "").strip()
        if self.unanswerable:
            if not answer.calls and is_abstention(said):
                return Grade("A", 1.0)
            return wrong(said[:200], "answered a question that has no answer")
        if self.wants_call:
            return self._grade_call(answer)
        if is_abstention(said):
            return Grade("A", 0.0, None, "abstained on a question that has an answer")
        if self.schema is not None:
            return self._grade_json(said)
        graded = [grade_short(said, str(one)) for one in self.accepted]
        return next((one for one in graded if one.passed), graded[0])

    def _grade_call(self, answer: Answer) -> Grade:
        if not answer.calls and is_abstention(answer.content or ""):
            return Grade("A", 0.0, None, "abstained on a question that has an answer")
        if len(answer.calls) != 1:
            return wrong(None, f"{len(answer.calls)} calls, expected one")
        try:
            made = {"name": answer.calls[0].name, "arguments": read_strictly(answer.calls[0].arguments)}
        except NotJson as error:
            return wrong(answer.calls[0].arguments[:200], f"arguments that are no JSON ({error})")
        calls = [one for one in self.accepted if isinstance(one, dict)]
        wanted = [{"name": one["name"], "arguments": one.get("arguments", {})} for one in calls]
        return correct(made) if any(_same(made, one) for one in wanted) else wrong(made, "another call")

    def _grade_json(self, said: str) -> Grade:
        try:
            value = read_strictly(said)
        except NotJson as error:
            return wrong(said[:200], f"no JSON ({error})")
        if not schema_of(self.schema, "schema", closed=False).accepts(value):
            return wrong(value, "breaks the schema")
        if self.accepted and not any(_same(value, one) for one in self.accepted):
            return wrong(value, "another value")
        return correct(value)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a file."""

    path: Path
    questions: tuple[Question, ...] = field(repr=False)
    data: bytes = field(repr=False)

    @cached_property
    def sha(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:32]


def read_set(path: Path) -> QuestionSet:
    """The questions of a JSON Lines file; empty lines count as none. Raises: ConfigError with the line's number."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--set {path} cannot be read ({getattr(error, 'strerror', None) or error}). Give a UTF-8 file with one "
            "JSON object a line (docs/referee.md)."
        ) from None
    questions, lines = list[Question](), dict[str, int]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _question(line, number, f"line {number} of {path}")
        if found.id in lines:
            raise ConfigError(
                f"line {number} of {path} has the id {found.id!r} of line {lines[found.id]}, and results are kept by "
                "id. Give it another one, or leave both out."
            )
        lines[found.id] = number
        questions.append(found)
    if not questions:
        raise ConfigError(f"--set {path} holds no question. Write one JSON object a line (docs/referee.md).")
    return QuestionSet(path, tuple(questions), data)


def _question(text: str, number: int, where: str) -> Question:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error}). Write one object a line.") from None
    try:
        line = _Line.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "line"
        raise ConfigError(f"{where}: {at}: {first['msg']}. docs/referee.md has the fields.") from None
    problem = _problem(line)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")
    evidence = _evidence(line)
    messages = line.messages or [{"role": "user", "content": _asked(str(line.question), evidence)}]
    accepted = line.answer if isinstance(line.answer, list) else [] if line.answer is None else [line.answer]
    return Question(
        line.id or f"line-{number}", tuple(messages), tuple(line.tools or ()), tuple(accepted), evidence,
        line.schema_, line.unanswerable,
    )  # fmt: skip


def _problem(line: _Line) -> str | None:
    """What makes a line no question, and what to do."""
    if (line.question is None) == (line.messages is None):
        return "give either question or messages"
    if line.question is not None and not line.question.strip():
        return "question is empty. Write one"
    if line.unanswerable and (line.answer is not None or line.schema_ is not None):
        return "it is unanswerable and has an answer or a schema. Leave one of them out"
    if not line.unanswerable and line.schema_ is None and line.answer in (None, []):
        return "nothing says what is right. Give answer, schema, or unanswerable: true"
    if line.schema_ is not None:
        try:
            schema_of(line.schema_, "schema", closed=False)
        except RequestError as error:
            return error.message
        return None
    for one in line.answer if isinstance(line.answer, list) else [line.answer]:
        if isinstance(one, dict) and isinstance(one.get("name"), str) and line.tools:
            continue
        if not line.unanswerable and (isinstance(one, bool | dict | list) or one is None or not str(one).strip()):
            return (
                f"answer {one!r} is no text or number. Only with a schema, or as a call of tools, is it anything else"
            )
    return None


def _evidence(line: _Line) -> tuple[Evidence, ...]:
    given = [line.evidence] if isinstance(line.evidence, str) else line.evidence or []
    return tuple(
        Evidence(f"doc-{i}", one) if isinstance(one, str) else Evidence(one.id, one.text)
        for i, one in enumerate(given, 1)
    )


def _asked(question: str, evidence: tuple[Evidence, ...]) -> str:
    """The question as the user's message, its evidence before it."""
    return "\n\n".join([*(f"[{one.id}] {one.text}" for one in evidence), question])


def _same(one: Any, other: Any) -> bool:
    """Equal JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
