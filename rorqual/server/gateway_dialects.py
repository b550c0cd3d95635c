"""Anthropic's Messages and OpenAI's Responses through the gateway: judged as chat completions, answered in their words.

Requests are translated as the server translates them, so that the upstream needs chat completions alone. Answers are
fed to the same writers. What the writers of our own answers never meet is put right here: a call without an id gets
one, and a call that an API has no form for (arguments that are no object, in Anthropic's) is told in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.referee import Answer, Call
from rorqual.referee.answer import call_body
from rorqual.server.anthropic import body as messages_body
from rorqual.server.anthropic.convert import SENT_AS as MESSAGES_SENT_AS
from rorqual.server.anthropic.convert import to_chat as messages_to_chat
from rorqual.server.anthropic.schema import MessagesRequest
from rorqual.server.anthropic.writer import parse_arguments
from rorqual.server.errors import error_body, for_anthropic
from rorqual.server.gateway_speech import Speech, Told
from rorqual.server.pieces import Piece
from rorqual.server.responses.body import ResponseBody
from rorqual.server.responses.convert import INPUT
from rorqual.server.responses.convert import SENT_AS as RESPONSES_SENT_AS
from rorqual.server.responses.convert import to_chat as responses_to_chat
from rorqual.server.responses.schema import ResponsesRequest
from rorqual.server.schema import ChatRequest
from rorqual.server.sse import KEEP_ALIVE


class MessagesSpeech:
    """Anthropic's Messages."""

    def __init__(self, request: MessagesRequest) -> None:
        self._body = messages_body.MessageBody(request, request.model)
        self._events, self._dropped, self._has_begun = _Events(json_only=True), False, False

    def whole(self, answer: Answer, usage: Mapping[str, Any] | None, told: Told) -> dict[str, Any]:
        for delta in deltas_of(answer):
            for _ in self._read(delta, None):
                pass
        for event in self._events.end(answer.finish):
            for _ in self._body.read(event):
                pass
        return self._body.whole(self._events.finish, None, usage or {}, _beside(told))

    def begin(self, answer: Answer | None, *, speaks_first: bool, usage: Mapping[str, Any] | None = None) -> str:
        self._has_begun = True
        return "".join(map(messages_body.line, self._body.begin(usage or {})))

    def delta(self, delta: Mapping[str, Any], logprobs: Any = None) -> str:
        return "".join(map(messages_body.line, self._read(delta, logprobs)))

    def verdict(self, told: Mapping[str, Any]) -> str:
        return ""  # beside the last event: clients read no events of other names

    def end(self, finish: str | None, usage: Mapping[str, Any] | None, told: Told, logprobs: Any = None) -> str:
        last = [made for event in self._events.end(finish) for made in self._body.read(event)]
        last += self._body.end(self._events.finish, None, usage or {}, _beside(told))
        return "".join(map(messages_body.line, last))

    def failed(self, error: RequestError, told: Told = None) -> str:
        return messages_body.line({**self.refusal(error_body(error)), **_beside(told)})

    def refusal(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, **for_anthropic(body)}

    def keep_alive(self) -> str:
        return messages_body.line({"type": "ping"}) if self._has_begun else KEEP_ALIVE

    def _read(self, delta: Mapping[str, Any], logprobs: Any) -> Iterator[dict[str, Any]]:
        for piece in self._events.read(delta, logprobs):
            yield from self._body.read(piece.event)


class ResponsesSpeech:
    """OpenAI's Responses."""

    def __init__(self, body: ResponseBody, custom: frozenset[str]) -> None:
        self._body, self._events = body, _Events(custom)

    def whole(self, answer: Answer, usage: Mapping[str, Any] | None, told: Told) -> dict[str, Any]:
        logprobs = answer.logprobs
        for delta in deltas_of(answer):
            for _ in self._read(delta, logprobs if delta.get("content") else None):
                pass
        for event in self._events.end(answer.finish):
            for _ in self._body.read(Piece(event, None)):
                pass
        return self._body.whole(self._events.finish, usage or {}, _beside(told))

    def begin(self, answer: Answer | None, *, speaks_first: bool, usage: Mapping[str, Any] | None = None) -> str:
        return "".join(map(self._body.line, self._body.begin()))

    def delta(self, delta: Mapping[str, Any], logprobs: Any = None) -> str:
        return "".join(map(self._body.line, self._read(delta, logprobs)))

    def verdict(self, told: Mapping[str, Any]) -> str:
        return ""  # within the last event's object: clients read no events of other names

    def end(self, finish: str | None, usage: Mapping[str, Any] | None, told: Told, logprobs: Any = None) -> str:
        pieces = [Piece(event, _entries(logprobs)) for event in self._events.end(finish)]
        last = [made for piece in pieces for made in self._body.read(piece)]
        last += self._body.end(self._events.finish, usage or {}, _beside(told))
        return "".join(map(self._body.line, last))

    def failed(self, error: RequestError, told: Told = None) -> str:
        code = "server_error" if error.status >= 500 else str(error.code or error.type)
        return self._body.line(self._body.failed(error.message, code, **_beside(told)))

    def refusal(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def keep_alive(self) -> str:
        return KEEP_ALIVE

    def _read(self, delta: Mapping[str, Any], logprobs: Any) -> Iterator[dict[str, Any]]:
        for piece in self._events.read(delta, logprobs):
            yield from self._body.read(piece)


def read_messages(given: Mapping[str, Any], keeps_reasoning: bool) -> tuple[dict[str, Any], Speech]:
    """An Anthropic request as a chat request, and how it is answered. Raises: RequestError, ValidationError."""
    request = MessagesRequest.model_validate(given)
    asked = _plain(messages_to_chat(request, keeps_reasoning))
    if request.tool_choice is not None and request.tool_choice.disable_parallel_tool_use:
        asked["parallel_tool_calls"] = False
    return asked, MessagesSpeech(request)


def read_responses(given: Mapping[str, Any], keeps_reasoning: bool) -> tuple[dict[str, Any], Speech]:
    """A Responses request as a chat request, and how it is answered. Raises: RequestError, ValidationError."""
    request = ResponsesRequest.model_validate(given)
    converted = responses_to_chat(request)
    asked = _plain(converted.body)
    if request.parallel_tool_calls is not None and asked.get("tools"):
        asked["parallel_tool_calls"] = request.parallel_tool_calls
    return asked, ResponsesSpeech(ResponseBody(request, converted, request.model), converted.custom)


@dataclass(frozen=True)
class Dialect:
    """An API that is translated. read: its request as a chat request, and its answers' words.

    sent_as: fields of the chat request that it calls otherwise.
    """

    read: Callable[[Mapping[str, Any], bool], tuple[dict[str, Any], Speech]]
    sent_as: Mapping[str, str]


MESSAGES: Final = Dialect(read_messages, MESSAGES_SENT_AS)
RESPONSES: Final = Dialect(read_responses, RESPONSES_SENT_AS)


def deltas_of(answer: Answer) -> Iterator[dict[str, Any]]:
    """A whole answer as the deltas that make it, a call in one."""
    if answer.reasoning:
        yield {"reasoning_content": answer.reasoning}
    if answer.content:
        yield {"content": answer.content}
    if answer.refusal:
        yield {"refusal": answer.refusal}
    if answer.is_legacy and len(answer.calls) == 1:
        yield {"function_call": call_body(answer.calls[0])["function"]}
        return
    for index, call in enumerate(answer.calls):
        yield {"tool_calls": [{"index": index, **call_body(call)}]}


class _Events:
    """Deltas of chat completions as the events that writers are fed.

    custom: tools that take free text. json_only: a call's arguments have to be a JSON object.
    """

    def __init__(self, custom: Sequence[str] | frozenset[str] = (), *, json_only: bool = False) -> None:
        self._custom, self._json_only = custom, json_only
        self._calls = 0
        self.finish = "stop"

    def read(self, delta: Mapping[str, Any], logprobs: Any) -> Iterator[Piece]:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning:
            yield Piece(chat.ReasoningDelta(str(reasoning)), None)
        text = str(delta.get("content") or "") + str(delta.get("refusal") or "")
        if text:
            yield Piece(chat.ContentDelta(text), _entries(logprobs))
        older = delta.get("function_call")
        for one in delta.get("tool_calls") or ([{"function": older}] if older else ()):
            function = one.get("function") or {}
            for event in self._call(Call(one.get("id"), function.get("name"), function.get("arguments") or "")):
                yield Piece(event, None)

    def end(self, finish: str | None) -> Iterator[chat.Event]:
        """The last event; afterwards `finish` is the reason as it holds of what was sent."""
        self.finish = finish or "stop"
        if self.finish in ("tool_calls", "function_call") and not self._calls:
            self.finish = "stop"
        yield chat.Finished({}, self.finish)

    def _call(self, call: Call) -> Iterator[chat.Event]:
        arguments = call.arguments if call.arguments.strip() else "{}"
        if call.name is None or (self._json_only and not _is_object(arguments)):
            yield chat.ContentDelta(
                f"[A call of the tool {call.name!r} is left out, because this API has no form for it. "
                f"Its arguments: {arguments}]"
            )
            return
        if call.name in self._custom:
            arguments = json.dumps({INPUT: _free_text(arguments)}, ensure_ascii=False)
        index, self._calls = self._calls, self._calls + 1
        yield chat.ToolCallStart(index, call.id or chat.make_call_id(index), call.name)
        yield chat.ToolCallArguments(index, arguments)
        yield chat.ToolCallEnd(index, True)


def _free_text(arguments: str) -> str:
    """What a custom tool is given; arguments that are not its one parameter are the text themselves."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(parse_arguments(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _entries(logprobs: Any) -> dict[str, Any] | None:
    entries = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    return {"content": list(entries)} if entries else None


def _beside(told: Told) -> dict[str, Any]:
    return {} if told is None else {"referee": dict(told)}


def _plain(body: ChatRequest) -> dict[str, Any]:
    """A chat request as JSON has it, without the fields that say nothing."""
    plain: dict[str, Any] = body.model_dump(exclude_none=True, by_alias=True)
    for message in plain["messages"]:
        message.setdefault("content", None)
    return plain
