"""The record of what was asked and decided, in a journal: every request with its verdict, and no secrets.

One `Event` of kind `referee.verdict` a request: who asked (the key's name), the model, digests of the conversation, the
checks that ran, what they found, actions, usage and times; `referee.failure` where no verdict was reached. Texts of the
conversation are kept only on request (`texts`). Headers are never kept, and what looks like a key or a password is
blotted out of everything that is.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any, Final

from rorqual import log
from rorqual.errors import JournalError
from rorqual.journal import Event, Journal
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.budget import RepairRates
from rorqual.referee.policy import Options
from rorqual.referee.verdict import Verdict

VERDICT: Final = "referee.verdict"
FAILURE: Final = "referee.failure"
HIDDEN: Final = "[hidden]"

logger = log.get(__name__)

_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|rk|pk)-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bxox[abeoprs]-[\w-]{10,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
    r"|(?i:(?<=bearer )[\w.~+/=-]{8,}|(?<=basic )[\w+/=]{12,})",
    re.DOTALL,
)
_NAMED = re.compile(
    r"(?i)((?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|private[_-]?key)[\"']?\s*[:=]\s*[\"']?)"
    r"([^\s\"',;}]{4,})"
)
_SECRET_KEY = re.compile(
    r"(?i)^(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|authorization)$"
)


def without_secrets(value: Any) -> Any:
    """A JSON value whose texts hold nothing that looks like a key or a password."""
    if isinstance(value, str):
        if len(value) < 8:
            return value
        return _NAMED.sub(rf"\1{HIDDEN}", _SECRET.sub(HIDDEN, value))
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(inner, str) and isinstance(key, str) and _SECRET_KEY.match(key)
            else without_secrets(inner)
            for key, inner in value.items()
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return value


class Audit:
    """Writes to a journal; without a folder it keeps nothing. texts: keep conversations and answers, too.

    Raises: JournalError when the journal cannot be opened, or another process writes it.
    """

    def __init__(self, folder: Path | None, *, texts: bool = False) -> None:
        self._journal = None if folder is None else Journal(folder)
        self._texts = texts

    def learn(self, rates: RepairRates) -> int:
        """Tell what rounds have cured so far; returns how many verdicts there are."""
        count = 0
        for _, record in () if self._journal is None else self._journal.replay():
            if isinstance(record, Event) and record.kind == VERDICT:
                count += 1
                for one in record.fields.get("rounds_asked", ()):
                    rates.note(one["codes"], one["left"])
        return count

    def verdict(
        self, asked: Asked, options: Options, verdict: Verdict, *, account: str, trace: str, duration_s: float,
        answer: Answer | None = None,
    ) -> None:  # fmt: skip
        """Append the record of a request that was judged. answer: the one given, where it is not the verdict's."""
        if self._journal is None:
            return
        told = verdict.to_dict()
        fields = self._about(asked, options, account, trace, duration_s)
        fields |= {name: told[name] for name in ("verdict", "p_correct", "rounds", "usage", "actions", "policy_id")}
        fields["ran"] = list(verdict.ran)
        fields["checks"] = [row for row in told["checks"] if row["reason_code"] is not None]
        if verdict.judging is not None:
            fields["judging"] = dict(verdict.judging)
        fields["rounds_asked"] = [dict(one) for one in verdict.rounds_asked]
        fields["tokens"] = None if verdict.usage is None else dict(verdict.usage)
        given = answer or verdict.answer
        if given is not None:
            fields["answer_sha"] = _digest(given.message())
        if self._texts and given is not None:
            fields["answer"] = json.dumps(without_secrets(given.message()))
        self._append(VERDICT, fields)

    def failure(
        self, asked: Asked, options: Options, why: str, status: int, *, account: str, trace: str, duration_s: float
    ) -> None:
        """Append the record of a request that came to no verdict."""
        fields = self._about(asked, options, account, trace, duration_s)
        self._append(FAILURE, {**fields, "status": status, "why": why})

    async def settled(self) -> None:
        """Return once all that was appended is on the disk; a journal that cannot be written is logged, once a call."""
        if self._journal is not None:
            try:
                await self._journal.acommit()
            except JournalError as error:
                logger.error("the referee's journal cannot be written: %s", error)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _about(self, asked: Asked, options: Options, account: str, trace: str, duration_s: float) -> dict[str, Any]:
        body = asked.body
        fields: dict[str, Any] = {
            "time": time.time(),
            "trace": trace,
            "account": account,
            "model": str(body.get("model")),
            "mode": options.mode,
            "profile": options.policy.profile.name,
            "stream": bool(body.get("stream")),
            "num_messages": len(asked.messages),
            "prompt_sha": _digest(body.get("messages")),
            "tools": list(asked.functions),
            "duration_s": duration_s,
        }
        if self._texts:
            fields["messages"] = json.dumps(without_secrets(body.get("messages")))
        return fields

    def _append(self, kind: str, fields: dict[str, Any]) -> None:
        if self._journal is None:
            return
        fields = without_secrets(fields)
        try:
            try:
                self._journal.append(Event(kind, fields))
            except JournalError:  # texts and numbers that JSON has and MessagePack has not
                self._journal.append(Event(kind, {"json": json.dumps(fields)}))
            self._journal.commit_soon()
        except JournalError as error:
            logger.error("a verdict could not be kept: %s", error)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
