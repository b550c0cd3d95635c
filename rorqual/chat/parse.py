"""Completion to message: the text a model generated after the prompt, read as reasoning, content and tool
calls.

The strict form follows DeepSeek's published parser: it accepts exactly what a well-behaved model writes and
refuses the rest, which is what graders and training want. The tolerant form is one pass of `StreamParser`,
which is what a server wants. Nothing is trimmed in either.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rorqual.chat import markers
from rorqual.chat.encode import check_thinking_mode
from rorqual.chat.stream import StreamParser
from rorqual.errors import RequestError

_BLOCK_START = "\n\n" + markers.CALLS_OPEN.removesuffix(">")
_INVOKE_CLOSE = markers.INVOKE_CLOSE.removesuffix(">")
# The `<` of the closing tag is read with the value, as the published parser does.
_PARAMETER_CLOSE = markers.PARAMETER_CLOSE.removeprefix("<").removesuffix(">")

_NAME = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)<', re.DOTALL)


def parse_completion(
    text: str,
    thinking_mode: str = "thinking",
    strict: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    finish_reason: str | None = None,
    allow_calls: bool = True,
) -> dict[str, Any]:
    """Return the message in `text`: role, content, reasoning_content, tool_calls (without ids).

    text: everything generated after the prompt, EOS included; `thinking_mode` as in the prompt.
    strict: refuse what is not well-formed. Otherwise repair what engines agree on, and add `finish_reason`
        ("tool_calls", "stop", "length") and `notes` (what was repaired) to the result.
    tools, finish_reason, allow_calls: for the tolerant form only, as in `StreamParser` and
    `StreamParser.finish`.

    >>> parse_completion("Add.</think>4<｜end▁of▁sentence｜>")
    {'role': 'assistant', 'content': '4', 'reasoning_content': 'Add.', 'tool_calls': []}

    Raises: RequestError with code "malformed_completion" (strict only).
    """
    check_thinking_mode(thinking_mode)
    if strict:
        return _StrictParser(text).parse(thinking_mode == "thinking")
    parser = StreamParser(thinking_mode, tools, allow_calls=allow_calls, make_id=lambda index: "")
    parser.feed(text)
    parser.finish(finish_reason)
    result = parser.result
    message = {**result.message, "finish_reason": result.finish_reason, "notes": list(result.notes)}
    for call in message["tool_calls"]:
        del call["id"]
    return message


class _StrictParser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def parse(self, is_thinking: bool) -> dict[str, Any]:
        reasoning = ""
        if is_thinking:
            reasoning, stop = self._read_until(markers.THINK_END, _BLOCK_START)
            if stop != markers.THINK_END:
                self._refuse("reasoning is not closed by </think> before the end or a tool call")
        content, stop = self._read_until(markers.EOS, _BLOCK_START)
        if stop is None:
            self._refuse("content is not closed by the end-of-sentence token or a tool call")
        calls: list[dict[str, Any]] = []
        if stop == _BLOCK_START:
            calls = self._read_calls()
            if self._text.startswith(markers.EOS, self._position):
                self._position += len(markers.EOS)
        if self._position != len(self._text):
            self._refuse("there is text after the end of the reply")
        for name, value in (("reasoning", reasoning), ("content", content)):
            for marker in markers.FORBIDDEN_IN_REPLY:
                if marker in value:
                    self._refuse(f"{name} contains the control token {marker}")
        return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}

    def _read_calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        while True:
            between, stop = self._read_until(markers.INVOKE_OPEN, markers.CALLS_CLOSE)
            if stop is None:
                self._refuse("the tool_calls block is not closed")
            self._check_between(between)
            if stop == markers.CALLS_CLOSE:
                return calls
            calls.append(self._read_invoke())

    def _read_invoke(self) -> dict[str, Any]:
        header, stop = self._read_until(markers.PARAMETER_OPEN, _INVOKE_CLOSE)
        match = _NAME.fullmatch(header)
        if stop is None or match is None:
            self._refuse(f"an invoke tag reads {header[:60]!r} instead of ' name=\"NAME\">' and a newline")
        members: dict[str, str] = {}
        while stop == markers.PARAMETER_OPEN:
            raw, closed = self._read_until(_PARAMETER_CLOSE)
            parameter = _PARAMETER.fullmatch(raw)
            if closed is None or parameter is None:
                self._refuse(f"a parameter of {match[1]!r} is not closed, or its tag lacks name= or string=")
            key, is_string, value = parameter.groups()
            if key in members:
                self._refuse(f"parameter {key!r} of {match[1]!r} is given twice")
            members[key] = json.dumps(value, ensure_ascii=False) if is_string == "true" else value
            between, stop = self._read_until(markers.PARAMETER_OPEN, _INVOKE_CLOSE)
            if stop is None:
                self._refuse(f"the call of {match[1]!r} is not closed")
            self._check_between(between)
        joined = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in members.items())
        return {"type": "function", "function": {"name": match[1], "arguments": "{" + joined + "}"}}

    def _read_until(self, *stops: str) -> tuple[str, str | None]:
        """Read up to the first of `stops` and past it; with none of them, to the end."""
        start = self._position
        found = [(at, stop) for stop in stops if (at := self._text.find(stop, start)) >= 0]
        if not found:
            self._position = len(self._text)
            return self._text[start:], None
        at, stop = min(found)
        self._position = at + len(stop)
        return self._text[start:at], stop

    def _check_between(self, between: str) -> None:
        if between != ">\n":
            self._refuse(f"between tags of the tool_calls block stands {between[:60]!r} instead of '>' and a newline")

    def _refuse(self, what: str) -> NoReturn:
        raise RequestError(
            f"the completion is malformed near character {self._position} of {len(self._text)}: {what}. "
            "The strict form cannot tell what was meant. "
            "Generate again, or use strict=False to keep what can be kept.",
            param="text",
            code="malformed_completion",
        )
