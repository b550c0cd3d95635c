"""The shape of an answer: why it ended, reasoning in its place, no control tokens, no calls written as text.

Runs before the other checks, since it may find the calls that they look at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from rorqual.chat import StreamParser, markers
from rorqual.referee.answer import Answer, Asked, Call
from rorqual.referee.json_text import NotJson, dump, read_leniently
from rorqual.referee.reasons import Finding, failed, repaired

FINISHES: Final = ("stop", "length", "tool_calls", "function_call", "content_filter")
INTERRUPTED: Final = ("insufficient_system_resource", "abort", "error")
"""Finish reasons of answers that the upstream itself cut short: rule 1, not a fault of the answer."""

_ASCII_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")
_CONTROL: Final = tuple(one for one in markers.MARKERS if one not in (markers.THINK_START, markers.THINK_END))
_DSML_OPEN = re.compile(r"<[｜|]{1,2}DSML[｜|]{1,2}tool_calls>")
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def check_format(asked: Asked, answer: Answer) -> tuple[Answer, list[Finding]]:
    """The answer with its parts in their places, and what was found."""
    found: list[Finding] = []
    answer = _reasoning(asked, answer, found)
    answer = _calls_as_text(asked, answer, found)
    answer = _control_tokens(asked, answer, found)
    answer = _finish(asked, answer, found)
    if answer.elsewhere:
        found.append(failed("not_judged", f"what it says in {', '.join(answer.elsewhere)} was not looked at"))
    elif not (answer.content or "").strip() and not answer.calls and not answer.refusal:
        full = bool((answer.reasoning or "").strip())
        if answer.finish != "content_filter":
            says = "it holds reasoning and no answer" if full else "it is empty"
            found.append(failed("empty_answer", f"{says}; give the answer itself"))
    return answer, found


def _reasoning(asked: Asked, answer: Answer, found: list[Finding]) -> Answer:
    content = answer.content or ""
    whole = _THINK.match(content)
    if whole is not None and markers.THINK_START not in asked.context:
        reasoning = "\n".join(filter(None, [answer.reasoning, whole[1].strip()]))
        found.append(
            repaired("thinking_in_content", "the reasoning at the beginning of the content was moved out of it")
        )
        return replace(answer, content=content[whole.end() :], reasoning=reasoning)
    if content.lstrip().startswith(markers.THINK_START) and markers.THINK_START not in asked.context:
        found.append(failed("thinking_unclosed", "the content begins with reasoning that does not end; close it"))
    elif markers.THINK_END in content and markers.THINK_END not in asked.context:
        before, _, after = content.partition(markers.THINK_END)
        if markers.THINK_START not in before and not answer.reasoning and after.strip():
            # a template that opens the reasoning itself leaves its end alone in the text
            found.append(
                repaired("thinking_in_content", "the reasoning before `</think>` was moved out of the content")
            )
            return replace(answer, content=after.lstrip(), reasoning=before.strip())
        found.append(failed("thinking_in_content", "the content holds reasoning between its sentences; leave it out"))
    return answer


def _calls_as_text(asked: Asked, answer: Answer, found: list[Finding]) -> Answer:
    """Calls the upstream's parser left in the content."""
    content = answer.content or ""
    if answer.calls or not asked.may_call or "<" not in content:
        return answer
    dsml, calls, rest = _DSML_OPEN.search(content), list[Call](), content
    if dsml is not None:
        parser = StreamParser("chat", list(asked.body.get("tools") or ()), accept_variants=True)
        parser.feed(content)
        parser.finish("stop")
        message = parser.result.message
        calls = [
            Call(one["id"], one["function"]["name"], one["function"]["arguments"]) for one in message["tool_calls"]
        ]
        rest = message["content"]
        if not calls:
            found.append(failed("calls_in_content", "a call stands in the content as markup that nobody can read"))
            return answer
    elif "<tool_call>" in content and "<tool_call>" not in asked.context:
        texts = _HERMES.findall(content)
        read = [_hermes(text, asked) for text in texts]
        if not read or any(one is None for one in read):
            found.append(failed("calls_in_content", "a call stands in the content as text; call the tool itself"))
            return answer
        calls, rest = [one for one in read if one is not None], _HERMES.sub("", content)
    if not calls:
        return answer
    found.append(repaired("calls_in_content", f"{len(calls)} calls written as text were taken out of the content"))
    is_legacy = asked.is_legacy and len(calls) == 1
    called = "function_call" if is_legacy else "tool_calls"
    finish = called if answer.finish in ("stop", None) else answer.finish
    return replace(answer, content=rest.strip() or None, calls=tuple(calls), finish=finish, is_legacy=is_legacy)


def _hermes(text: str, asked: Asked) -> Call | None:
    """`{"name": ..., "arguments": {...}}`."""
    try:
        value, _ = read_leniently(text)
    except NotJson:
        return None
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("name"), str)
        or set(value) - {"name", "arguments", "id"}
    ):
        return None
    arguments = value.get("arguments", {})
    return Call(None, value["name"], arguments if isinstance(arguments, str) else dump(arguments))


def _control_tokens(asked: Asked, answer: Answer, found: list[Finding]) -> Answer:
    content = answer.content or ""
    if "<" not in content:
        return answer
    stripped = _without_ends(content.rstrip(), asked)
    if stripped is not None:
        found.append(repaired("control_token", "an end token at the end of the content was removed"))
        answer, content = replace(answer, content=stripped), stripped
    for marker in _CONTROL:
        if marker in content and marker not in asked.context and marker != markers.DSML:
            at = content.index(marker)
            found.append(
                failed("control_token", f"the content holds the control token {marker}", span=(at, at + len(marker)))
            )
            break
    else:
        if markers.DSML in content and markers.DSML not in asked.context and not answer.calls:
            already = any(one.code == "calls_in_content" for one in found)
            if not already:
                at = content.index(markers.DSML)
                found.append(failed("control_token", "the content holds markup of calls", span=(at, at + 6)))
    return answer


def _without_ends(content: str, asked: Asked) -> str | None:
    """The content without end tokens behind it; None when there are none."""
    ends = (markers.EOS, *_ASCII_ENDS)
    text = content
    while True:
        end = next((one for one in ends if text.endswith(one) and one not in asked.context), None)
        if end is None:
            return None if text == content else text
        text = text[: -len(end)].rstrip()


def _finish(asked: Asked, answer: Answer, found: list[Finding]) -> Answer:
    finish = answer.finish
    if finish is None:
        found.append(failed("finish_missing", "the answer does not say why it ended, so it may be incomplete"))
    elif finish == "content_filter":
        found.append(failed("filtered", "the upstream filtered the answer"))
    elif finish == "length":
        wants_json = asked.schema[0]
        if answer.calls or wants_json:
            found.append(failed("truncated_call", "it was cut off at the token limit; answer shorter"))
        else:
            found.append(failed("truncated", "it was cut off at the token limit"))
    elif finish not in FINISHES:
        found.append(failed("finish_inconsistent", f"it ended with the unknown reason {finish!r}"))
    elif answer.calls and finish == "stop":
        called = "function_call" if asked.is_legacy and answer.is_legacy else "tool_calls"
        found.append(repaired("finish_inconsistent", f"finish_reason `stop` set to `{called}`, since there are calls"))
        return replace(answer, finish=called)
    elif not answer.calls and finish in ("tool_calls", "function_call"):
        if (answer.content or "").strip() and not _was_a_call(found):
            found.append(
                repaired("finish_inconsistent", "finish_reason `tool_calls` set to `stop`: there are no calls")
            )
            return replace(answer, finish="stop")
        found.append(failed("finish_inconsistent", "it says that it calls tools, and there are no calls"))
    elif finish == "function_call" and not (asked.is_legacy and answer.is_legacy):
        return replace(answer, finish="tool_calls")
    return answer


def _was_a_call(found: Sequence[Finding]) -> bool:
    return any(one.code == "calls_in_content" and one.status == "fail" for one in found)
