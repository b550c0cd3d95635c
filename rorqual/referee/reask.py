"""Asking a model again: the conversation as it was, what was wrong, and nothing else that is new.

Reasoning and tool results stay. The rejected answer is not repeated as one: calls that are no JSON break templates, and
a broken answer in the history is an example. Where a schema takes it, calls are asked for under it (`strict`), so that
an upstream with constrained decoding cannot break it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.chat import check_strict_schema
from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.check_copy import excerpts
from rorqual.referee.policy import Evidence
from rorqual.referee.reasons import Finding

_MOST_REASONS = 12


def ask_again(
    asked: Asked,
    answer: Answer,
    findings: Sequence[Finding],
    *,
    model: str | None = None,
    constrain: bool = True,
    evidence: Sequence[Evidence] = (),
    thinks: bool = False,
) -> dict[str, Any]:
    """The body of the next round. model: another one. thinks: the upstream wants reasoning on assistant messages."""
    faults = [one for one in findings if one.rejects]
    lines = [f"- {one.says}." for one in faults[:_MOST_REASONS]]
    parts = []
    if lines:
        parts.append("Your last answer was not accepted:\n" + "\n".join(lines))
    found = excerpts(asked.context, [one.candidate for one in faults if one.check == "copy" and one.candidate])
    if found:
        parts.append("From the conversation:\n" + found)
    if evidence:
        parts.append("\n".join(f"[{one.id}] {one.text}" for one in evidence))
    asks = asked.question.strip()
    if (found or evidence) and asks:
        parts.append(f"The question was: {asks}")
    parts.append(
        "Answer again, with this corrected." if lines else "Answer from these sources, or say what is missing."
    )
    messages = list(asked.body.get("messages") or ())
    if answer.reasoning and thinks:
        messages.append({"role": "assistant", "content": "", "reasoning_content": answer.reasoning})
    messages.append({"role": "user", "content": "\n\n".join(parts)})
    body: dict[str, Any] = {**asked.body, "messages": messages}
    if model is not None:
        body["model"] = model
    if constrain:
        body = constrained(body, {one.call for one in faults if one.check == "tool"} != set())
    return body


def constrained(body: Mapping[str, Any], about_calls: bool) -> dict[str, Any]:
    """The body with `strict` on functions whose schema the strict mode takes, where calls are at fault."""
    out = dict(body)
    tools = body.get("tools")
    if not about_calls or not isinstance(tools, list):
        return out
    out["tools"] = [_strict(tool) for tool in tools]
    return out


def _strict(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or function.get("strict") is not None or "parameters" not in function:
        return tool
    try:
        check_strict_schema(function["parameters"], "parameters")
    except RequestError:
        return tool
    return {**tool, "function": {**function, "strict": True}}
