"""An OpenAI-style endpoint that answers as a test says, whole and streamed, and remembers what it was asked.

Answers are given one after the other; the last one is given again. `strict`: refuse a tool turn whose assistant message
has no `reasoning_content`, or whose calls are not spelled as they were given, as strict hosts do.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120,
         "prompt_tokens_details": {"cached_tokens": 10}}  # fmt: skip


def says(content: str | None = None, *, reasoning: str | None = None, calls: Sequence[dict[str, Any]] = (),
         finish: str | None = None) -> dict[str, Any]:  # fmt: skip
    """A choice of an answer."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return {"message": message, "finish_reason": finish or ("tool_calls" if calls else "stop")}


def calls(name: str, arguments: str, id: str | None = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass
class MockUpstream:
    """answers: choices, or (status, body) refusals. breaks_after: cut streams off after so many events.

    delay_s: before an answer. pause_s: before each event.
    """

    answers: list[Any]
    strict: bool = False
    breaks_after: int | None = None
    delay_s: float = 0.0
    pause_s: float = 0.0
    piece: int = 3
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when a stream ended, whole or not."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    given: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    """By call id: the reasoning and the arguments' text as they were given."""

    def app(self) -> Starlette:
        return Starlette(routes=[
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.echo, methods=["POST"]),
            Route("/v1/models", self.models),
        ])  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "mock"}]})

    async def echo(self, request: Request) -> Response:
        body = await request.json()
        return JSONResponse(
            {"object": "text_completion", "choices": [{"text": body["prompt"], "finish_reason": "stop"}]}
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        refusal = self.refusal(body) if self.strict else None
        if refusal is not None:
            error = {
                "message": refusal,
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_request_error",
            }
            return JSONResponse({"error": error}, 400)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            return JSONResponse(answer[1], answer[0], {"retry-after": "7"})
        for call in answer["message"].get("tool_calls", ()):
            self.given[str(call["id"])] = answer["message"].get("reasoning_content"), call["function"]["arguments"]
        if body.get("stream"):
            wants_usage = (body.get("stream_options") or {}).get("include_usage")
            return StreamingResponse(self.lines(answer, wants_usage), media_type="text/event-stream")
        around = {
            "id": "up-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "system_fingerprint": "f",
        }
        body = {**around, "choices": [{"index": 0, **answer}], "usage": USAGE}
        return Response(json.dumps(body), media_type="application/json")  # escaped, so halves of characters too

    def refusal(self, body: dict[str, Any]) -> str | None:
        """What a strict host says of the history."""
        for message in body["messages"]:
            if message["role"] != "assistant" or not message.get("tool_calls"):
                continue
            if message.get("reasoning_content") is None:
                return "The `reasoning_content` in the thinking mode must be passed back to the API."
            for call in message["tool_calls"]:
                reasoning, arguments = self.given.get(call["id"], (None, call["function"]["arguments"]))
                if call["function"]["arguments"] != arguments:
                    return f"tool call {call['id']} was changed"
                if reasoning is not None and message["reasoning_content"] not in (reasoning, ""):
                    return "the reasoning was changed"
        return None

    async def lines(self, answer: dict[str, Any], wants_usage: bool) -> AsyncIterator[bytes]:
        try:
            async for line in self.events(answer, wants_usage):
                yield line
        finally:
            self.ended.set()

    async def events(self, answer: dict[str, Any], wants_usage: bool) -> AsyncIterator[bytes]:
        events = [*self.deltas(answer["message"]), ({}, answer["finish_reason"])]
        for number, (delta, finish) in enumerate(events):
            if number == self.breaks_after:
                raise ConnectionError("the mock breaks off")
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield self.event({"choices": [choice]})
            await asyncio.sleep(self.pause_s)
        if wants_usage:
            yield self.event({"choices": [], "usage": USAGE})
        yield b"data: [DONE]\n\n"

    def deltas(self, message: dict[str, Any]) -> list[tuple[dict[str, Any], None]]:
        out: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for name in ("reasoning_content", "content"):
            text = message.get(name) or ""
            out += [{name: text[at : at + self.piece]} for at in range(0, len(text), self.piece)]
        for index, call in enumerate(message.get("tool_calls", ())):
            function = call["function"]
            out.append({"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]})
            text = function["arguments"]
            for at in range(0, len(text), self.piece):
                out.append({"tool_calls": [{"index": index, "function": {"arguments": text[at : at + self.piece]}}]})
        return [(delta, None) for delta in out]

    @staticmethod
    def event(body: dict[str, Any]) -> bytes:
        body = {"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **body}
        return f"data: {json.dumps(body)}\n\n".encode()
