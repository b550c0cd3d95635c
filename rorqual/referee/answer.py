"""A chat completion as the checks see it: what was asked, and one answer, whichever server gave it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from rorqual.errors import RequestError
from rorqual.referee.identifiers import Identifiers

_OUTPUTS: Final = ("audio", "image", "images", "video")
TEXT_OF: Final = {"function": "arguments", "custom": "input"}
"""Kinds of calls, and what of each holds the text that the model wrote."""


@dataclass(frozen=True)
class Call:
    """A tool call. arguments: its text as the model wrote it. kind: `custom` for one that takes free text."""

    id: str | None
    name: str | None
    arguments: str
    kind: str = "function"


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
    deltas: tuple[Mapping[str, Any], ...] = ()
    """Of a stream, fields of its deltas that nobody here reads, as they came."""
    reasoning_name: str = "reasoning_content"
    """What the server calls the reasoning."""
    is_legacy: bool = False
    """Its call came as `function_call`, as requests with `functions` are answered."""
    source: Mapping[str, Any] | None = None

    def with_calls(self, calls: Sequence[Call]) -> Answer:
        return replace(self, calls=tuple(calls))

    def within(self, envelope: Mapping[str, Any]) -> Answer:
        """The same answer in the completion it came in."""
        return replace(
            self, envelope={key: value for key, value in envelope.items() if key not in ("choices", "usage")}
        )

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Fields besides content and calls that hold an answer."""
        names = (name for part in (self.raw, *self.deltas) for name, value in part.items() if value)
        return tuple(dict.fromkeys(name for name in names if name in _OUTPUTS))

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
            message[self.reasoning_name] = self.reasoning
        if self.refusal is not None:
            message["refusal"] = self.refusal
        if self.is_legacy and len(self.calls) == 1:
            message["function_call"] = call_body(self.calls[0])["function"]
        elif self.calls:
            message["tool_calls"] = [call_body(call) for call in self.calls]
        return message


def _parts(answer: Answer) -> tuple[Any, ...]:
    if answer.had_plain_arguments:
        return ()
    return answer.content, answer.reasoning, answer.calls, answer.refusal


def call_body(call: Call) -> dict[str, Any]:
    """A call as chat completions have it."""
    return {"id": call.id, "type": call.kind, call.kind: {"name": call.name, TEXT_OF[call.kind]: call.arguments}}


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
    is_legacy = not given and bool(message.get("function_call"))
    if is_legacy:
        given = [{"id": None, "type": "function", "function": message["function_call"]}]
    calls, plain = [], False
    for one in given or ():
        kind = "custom" if isinstance(one, Mapping) and one.get("type") == "custom" else "function"
        function = one.get(kind) if isinstance(one, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        arguments = function.get(TEXT_OF[kind])
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):  # some servers send the object itself
            arguments, plain = json.dumps(arguments, ensure_ascii=False), True
        name, call_id = function.get("name"), one.get("id") if isinstance(one, Mapping) else None
        call_id, name = (one if isinstance(one, str) else None for one in (call_id, name))
        calls.append(Call(whole_characters(call_id), whole_characters(name), whole_characters(arguments) or "", kind))
    reasoning, reasoning_name = message.get("reasoning_content"), "reasoning_content"
    if reasoning is None and message.get("reasoning") is not None:
        reasoning, reasoning_name = message["reasoning"], "reasoning"
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
        reasoning_name=reasoning_name,
        is_legacy=is_legacy,
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
        tools, older = self.body.get("tools"), self.body.get("functions")
        given = [one.get("function") for one in _mappings(tools)] or _mappings(older)
        for function in given:
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                found[function["name"]] = function
        return found

    @property
    def is_legacy(self) -> bool:
        """Whether tools are `functions`, so that a call is answered as `function_call`."""
        return bool(self.body.get("functions")) and not self.body.get("tools")

    @cached_property
    def custom(self) -> frozenset[str]:
        """Names of the tools that take free text."""
        inner = [one.get("custom") for one in _mappings(self.body.get("tools"))]
        return frozenset(one["name"] for one in inner if isinstance(one, Mapping) and isinstance(one.get("name"), str))

    @property
    def tool_choice(self) -> Any:
        """Which call is asked for; the older `function_call` is read as one."""
        choice = self.body.get("tool_choice", self.body.get("function_call"))
        if isinstance(choice, Mapping) and "name" in choice and "type" not in choice:
            return {"type": "function", "function": choice}
        return choice

    @cached_property
    def num_characters(self) -> int:
        """About how much there is to read, without reading it."""
        return sum(_length(one.get("content")) + _length(one.get("tool_calls")) for one in self.messages)

    @property
    def may_call(self) -> bool:
        return bool(self.functions) and self.tool_choice != "none"

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


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 0


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
