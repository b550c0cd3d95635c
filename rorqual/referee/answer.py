"""A chat completion as the checks see it: what was asked, and one answer, whichever server gave it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rorqual.errors import RequestError
from rorqual.referee.identifiers import Identifiers


@dataclass(frozen=True)
class Call:
    """A tool call. arguments: its text as the model wrote it."""

    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Answer:
    """One answer. finish: the finish reason. usage: of chat completions, as the server told it.

    raw: the message's other fields, which travel on unchanged. envelope: those of the completion around it.
    had_plain_arguments: arguments came as objects, not as their text. source: the message as it came.
    """

    content: str | None = None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    finish: str | None = None
    usage: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    envelope: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    had_plain_arguments: bool = False
    logprobs: Any = None  # whatever the server sent
    source: Mapping[str, Any] | None = None

    def with_calls(self, calls: Sequence[Call]) -> Answer:
        return replace(self, calls=tuple(calls))

    def within(self, envelope: Mapping[str, Any]) -> Answer:
        """The same answer in the completion it came in."""
        return replace(
            self, envelope={key: value for key, value in envelope.items() if key not in ("choices", "usage")}
        )

    @property
    def same(self) -> tuple[Any, ...]:
        """What makes two answers equal for those who ask."""
        return self.content or "", tuple((call.name, call.arguments) for call in self.calls), self.finish

    def message(self) -> dict[str, Any]:
        """As chat completions' assistant message; exactly as it came where nothing was changed."""
        if self.source is not None and _parts(self) and _parts(read_message(self.source, None)) == _parts(self):
            return dict(self.source)
        message: dict[str, Any] = {"role": "assistant", "content": self.content, **self.raw}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.refusal is not None:
            message["refusal"] = self.refusal
        if self.calls:
            message["tool_calls"] = [call_body(call) for call in self.calls]
        return message


def _parts(answer: Answer) -> tuple[Any, ...]:
    if answer.had_plain_arguments:
        return ()
    return answer.content, answer.reasoning, answer.calls, answer.refusal


def call_body(call: Call) -> dict[str, Any]:
    """A call as chat completions have it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


_KNOWN = {"role", "content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal"}


def read_answer(body: Any) -> Answer:  # Any: whatever JSON holds
    """The first choice of a chat completion. Raises: RequestError 502 when there is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        answer = read_message(message, choice.get("finish_reason"), body.get("usage"), choice.get("logprobs"))
        return answer.within(body)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestError(
            f"The upstream's answer is no chat completion ({type(error).__name__}: {error}). Look at what it "
            "sends, and check the address.",
            status=502,
            type="upstream_error",
            code="answer_malformed",
        ) from error


def read_message(message: Any, finish: Any, usage: Any = None, logprobs: Any = None) -> Answer:
    """An assistant message; calls of the older shape (`function_call`) are read as calls."""
    given = message.get("tool_calls")
    if not given and message.get("function_call"):
        given = [{"id": None, "type": "function", "function": message["function_call"]}]
    calls, plain = [], False
    for one in given or ():
        function = one.get("function") if isinstance(one, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        arguments = function.get("arguments")
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):  # some servers send the object itself
            arguments, plain = json.dumps(arguments, ensure_ascii=False), True
        name, call_id = function.get("name"), one.get("id") if isinstance(one, Mapping) else None
        call_id, name = (one if isinstance(one, str) else None for one in (call_id, name))
        calls.append(Call(whole_characters(call_id), whole_characters(name), whole_characters(arguments) or ""))
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    return Answer(
        content=whole_characters(_text(message.get("content"))),
        reasoning=whole_characters(reasoning if isinstance(reasoning, str) else None),
        calls=tuple(calls),
        finish=finish if isinstance(finish, str) else None,
        usage=usage if isinstance(usage, Mapping) else None,
        raw={key: value for key, value in message.items() if key not in _KNOWN},
        refusal=message.get("refusal"),
        had_plain_arguments=plain,
        logprobs=logprobs,
        source=message if _is_text(message) else None,
    )


def whole_characters(text: str | None) -> str | None:
    """The text with halves of surrogate pairs joined, and lone ones replaced: no protocol could carry them on."""
    if text is None or text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_text(message: Any) -> bool:
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(content: Any) -> str | None:
    """Text of a content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") or part.get("thinking") or "" for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return str(content)


@dataclass(frozen=True)
class Asked:
    """A chat request, read for the checks. body: the request without our own fields."""

    body: Mapping[str, Any]
    """As it goes to the upstream."""

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        messages = self.body.get("messages")
        return [one for one in messages if isinstance(one, Mapping)] if isinstance(messages, list) else []

    @cached_property
    def functions(self) -> dict[str, Mapping[str, Any]]:
        """The tools by name; those of other shapes are left out."""
        found: dict[str, Mapping[str, Any]] = {}
        tools = self.body.get("tools")
        for tool in tools if isinstance(tools, list) else ():
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                found[function["name"]] = function
        return found

    @property
    def may_call(self) -> bool:
        return bool(self.functions) and self.body.get("tool_choice") != "none"

    @cached_property
    def schema(self) -> tuple[bool, Any]:
        """Whether JSON was asked for, and the schema it must obey (None: any object)."""
        form = self.body.get("response_format")
        kind = form.get("type") if isinstance(form, Mapping) else None
        if kind == "json_object":
            return True, {"type": "object"}
        if kind == "json_schema" and isinstance(form, Mapping):
            inner = form.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            return True, schema if schema is not None else {}
        return False, None

    @cached_property
    def context(self) -> str:
        """Everything the model was shown, as one text: what an answer may copy from."""
        pieces: list[str] = []
        for message in self.messages:
            pieces += _strings(message.get("content"))
            pieces += _strings(message.get("tool_calls"))
        pieces += _strings(self.body.get("tools"))
        return "\n".join(pieces)

    @cached_property
    def identifiers(self) -> Identifiers:
        """Those of the context."""
        return Identifiers(self.context)

    @property
    def question(self) -> str:
        """The last thing a person said."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return _text(message.get("content")) or ""
        return ""


def _strings(value: Any) -> list[str]:
    """All texts within a JSON value, keys and numbers too."""
    out: list[str] = []
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            out.append(one)
        elif isinstance(one, Mapping):
            out += [str(key) for key in one]
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif one is not None and not isinstance(one, bool):
            out.append(str(one))
    out.reverse()
    return out
