"""One record for each item of a run, in JSON Lines: whole or absent, whatever kills the process.

Source: evaluation specification, section 2.1. A line is written by one call and ends in a newline; a last line without
one is what a killed writer left, and is cut off when the file is opened again. One process writes a file at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rorqual.errors import ConfigError, DataError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineOf(_Part):
    """What computed the answer. flags: its settings, the level of determinism (`D0`, `D1`, `D2`) among them."""

    name: str
    version: str
    flags: dict[str, Any]


class Sampling(_Part):
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256


class Gate(_Part):
    """Whether the model's answers passed a gate, and which threshold it used."""

    on: bool = False
    threshold_id: str | None = None


class Policy(_Part):
    """Whether the guard or the referee was on, and with which policy."""

    on: bool = False
    policy_id: str | None = None


class Usage(_Part):
    """Tokens. `completion` includes reasoning; `cached` is part of `prompt`."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    referee_prompt: int = 0
    referee_completion: int = 0


class Grader(_Part):
    name: str
    version: str


class Record(_Part):
    """One item, what was answered, and how it was graded. Fields with a default may be absent from the file."""

    run_id: str
    suite: str
    suite_version: str
    generator_seed: int
    item_id: str
    split: str
    stratum: dict[str, Any]
    model_id: str
    model_sha: str
    tokenizer_sha: str
    engine: EngineOf
    sampling: Sampling
    effort: str
    gate: Gate
    guard: Policy
    referee: Policy
    prompt_sha: str
    prompt_tokens: int
    output_text: str
    finish_reason: str
    usage: Usage
    t_first_ms: float | None
    t_total_ms: float
    grade: Literal["C", "P", "I", "A", "X"]
    score: float
    grader: Grader
    gold: str
    reasoning_text: str | None = None
    parsed_answer: Any = None
    confidence: float | None = None
    signals: dict[str, float] | None = None
    diag_ref: str | None = None
    error: str | None = None

    def line(self) -> bytes:
        """The record as a line of the file; what may be absent and is not known is left out."""
        data = self.model_dump()
        for name, field in type(self).model_fields.items():
            if not field.is_required() and data[name] is None:
                del data[name]
        import json

        return json.dumps(data, ensure_ascii=False, default=str).encode() + b"\n"


class RecordFile:
    """The records of a run, appended to by any thread of one process.

    Raises: ConfigError when another process writes it or it cannot be written; DataError for a damaged line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror or error}), so no result can be kept. Choose another --out."
            ) from None
        try:
            self._own()
            self.records = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: Record) -> None:
        """Write one record. It survives the end of this process from here on, and a power cut after `close`."""
        data = memoryview(record.line())
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]
            self.records.append(record)

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _own(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two writers are not told from each other there
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.path} is being written by another process, and two runs would mix in it. Wait for that one, or "
                "choose another --out."
            ) from None

    def _recover(self) -> list[Record]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._fd, whole)
        return list(_parse(self.path, data[:whole]))


def read_records(path: Path) -> list[Record]:
    """The whole records of a file that somebody may still be writing. Raises: DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}), so there are no results. Check the folder of the run."
        ) from None
    return list(_parse(path, data[: data.rfind(b"\n") + 1]))


def _parse(path: Path, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield Record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"line {number} of {path} is no record ({'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}), "
                "so the run cannot be trusted. Start it again in another folder."
            ) from None
