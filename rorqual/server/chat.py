"""POST /chat/completions, streamed and whole, in the order of chunks DeepSeek's API sends.

Unlike the hosted service, temperature and top_p are honoured in thinking mode. Stop strings end the output
wherever they come, in the reasoning too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual import chat
from rorqual.errors import RequestError
from rorqual.server import turn as turns
from rorqual.server.schema import ChatRequest
from rorqual.server.served import Envelope
from rorqual.server.service import Service
from rorqual.server.sse import DONE, KEEP_ALIVE, sse, sse_error, whole_answer
from rorqual.server.streams import EventStream
from rorqual.server.turn import Turn


async def answer(body: ChatRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    turn = await turns.start(body, service, http)
    if body.stream:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_lines(turn, wants_usage, service.keep_alive_s), turn.stream.request)
    return await whole_answer(_body(turn, http), service.keep_alive_s)


async def _body(turn: Turn, http: HttpRequest) -> dict[str, Any]:
    finished = await turn.whole(http)
    choice = {
        "message": _message(finished, turn.reader.thinking),
        "logprobs": turn.reader.whole_logprobs(),
        "finish_reason": finished.finish_reason,
    }
    envelope = Envelope("chat.completion", turn.asked, turn.id)
    return envelope.body(choice, usage=turn.usage(), **turn.beside())


async def _lines(turn: Turn, wants_usage: bool, keep_alive_s: float) -> AsyncIterator[str]:
    """The whole stream: role, deltas, one last chunk with the finish reason and the usage, `[DONE]`."""
    envelope, thinking = Envelope("chat.completion.chunk", turn.asked, turn.id), turn.reader.thinking
    between = {"usage": None} if wants_usage else {}

    def line(delta: dict[str, Any], logprobs: Any, reason: str | None, **more: Any) -> str:
        return sse(envelope.body({"delta": delta, "logprobs": logprobs, "finish_reason": reason}, **more))

    opening = {"content": None, "reasoning_content": ""} if thinking else {"content": ""}
    yield line({"role": "assistant", **opening}, None, None, **between)
    try:
        async for pieces in turn.pieces(keep_alive_s):
            if not pieces:
                yield KEEP_ALIVE
            for piece in pieces:
                delta = _delta(piece.event, thinking)
                if isinstance(piece.event, chat.Finished):
                    more = {"usage": turn.usage(), **turn.beside()}
                    yield line(delta or {}, piece.logprobs, piece.event.finish_reason, **more) + DONE
                elif delta is not None:
                    yield line(delta, piece.logprobs, None, **between)
    except RequestError as error:
        yield sse_error(error)


def _delta(event: chat.Event, thinking: bool) -> dict[str, Any] | None:
    """The event as a chunk's `delta`; None for what has no place in one."""
    beside: dict[str, Any] = {"reasoning_content": None} if thinking else {}
    if isinstance(event, chat.ReasoningDelta):
        return {"content": None, "reasoning_content": event.text}
    if isinstance(event, chat.ContentDelta):
        return {"content": event.text, **beside}
    if isinstance(event, chat.ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
    if isinstance(event, chat.ToolCallArguments):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.piece}}]}
    return {"content": "", **beside} if isinstance(event, chat.Finished) else None


def _message(finished: chat.Finished, thinking: bool) -> dict[str, Any]:
    """The reply as the API's message: `reasoning_content` with thinking only, `tool_calls` where there are any."""
    message = {"role": "assistant", "content": finished.message["content"]}
    if thinking:
        message["reasoning_content"] = finished.message["reasoning_content"]
    if finished.message["tool_calls"]:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(finished.message["tool_calls"])]
    return message
