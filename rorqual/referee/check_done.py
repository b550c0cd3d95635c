"""A claim of completion needs evidence from after the last edit: a test, build or command that ran and succeeded.

Looks at the calls and results in the conversation. Only asked for by name (`checks: ["done", ...]`), since only an
agent's caller knows that the conversation is one about work to be verified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.reasons import Finding, failed

_CLAIM = re.compile(
    r"(?i)\b(?:(?:is|are|have been|has been|now)\s+(?:done|complete[d]?|finished|fixed|implemented|resolved|working)|"
    r"(?:all|every)\s+(?:the\s+)?tests?\s+(?:now\s+)?pass(?:es|ed)?|task\s+(?:is\s+)?complete[d]?|^\s*done\b|"
    r"successfully\s+(?:implemented|fixed|completed|finished|updated|resolved)|i(?:'ve| have)\s+(?:fixed|implemented|"
    r"completed|finished|resolved))"
)
_EDIT = re.compile(r"(?i)write|edit|patch|replace|insert|create_file|apply|delete|move|rename|save")
_EDIT_COMMAND = re.compile(
    r"(?i)\bsed\s+-i|\bpatch\b|\bgit\s+apply|(?<![0-9&])>{1,2}\s*[\w./]|\btee\s|\bmv\s|\brm\s|\bcp\s"
)
_VERIFY = re.compile(r"(?i)\btest|pytest|unittest|tox|jest|cargo (?:test|check|build)|go (?:test|build|vet)|make\b|mvn|"
                     r"gradle|npm (?:test|run)|lint|mypy|tsc|build|verify|check|compile|\brun_")  # fmt: skip
_FAILED = re.compile(
    r"(?i)\b[1-9]\d* (?:failed|errors?|failures?)\b|traceback \(most recent|\bFAILED\b|exit(?:ed)?[ _]?(?:code|status)?"
    r"[\"':= ]+[1-9]|\bassertionerror\b|\bcommand not found\b|\berror:"
)
_SUCCEEDED = re.compile(
    r"(?i)\b\d+ (?:tests? )?pass(?:ed|ing)?\b|\bok\b|exit(?:ed)?[ _]?(?:code|status)?[\"':= ]+0\b|"
    r"\bsuccess(?:ful(?:ly)?)?\b|\bno (?:issues|errors)\b|\bbuild succeeded\b|\b0 (?:failed|errors|failures)\b"
)


def check_done(asked: Asked, answer: Answer) -> list[Finding]:
    """A claim of completion without a successful check after the last edit."""
    if answer.calls or not _CLAIM.search(answer.content or ""):
        return []
    edited = verified = False
    names: dict[str, tuple[str, str]] = {}
    for message in asked.messages:
        made = message.get("tool_calls")
        for call in made if isinstance(made, list) else ():
            names[str(call.get("id") if isinstance(call, Mapping) else None)] = _call(call)
        if message.get("role") != "tool":
            continue
        name, arguments = names.get(str(message.get("tool_call_id")), ("", ""))
        if _EDIT.search(name) or _EDIT_COMMAND.search(arguments):
            edited, verified = True, False
        elif _VERIFY.search(name) or _VERIFY.search(arguments):
            text = _text(message.get("content"))
            verified = bool(_SUCCEEDED.search(text)) and not _FAILED.search(text)
    if verified or not (edited or names):
        return []
    needed = "the output of a test, build or check that was run after the last edit and succeeded (its exit code 0)"
    return [failed("done_without_evidence", f"it says that the work is done, and nothing shows it. Needed: {needed}")]


def _call(call: Any) -> tuple[str, str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    return str(function.get("name") or ""), str(function.get("arguments") or "")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
