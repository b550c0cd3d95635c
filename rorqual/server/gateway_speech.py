"""What the gateway says to a client, in the words of the API that was asked; here those of chat completions.

An exchange works with deltas of chat completions, whatever its client speaks. A `Speech` spells them: whole, or piece
by piece (`begin`, `delta`..., `verdict`, `end`). The other APIs' are in `gateway_dialects.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from rorqual.errors import RequestError
from rorqual.referee import Answer, Verdict
from rorqual.server.errors import error_body
from rorqual.server.gateway_wire import UpstreamRefusal, encode
from rorqual.server.sse import DONE, KEEP_ALIVE, sse

Told = Mapping[str, Any] | None
"""The `referee` object of an answer; None where nothing is told of one."""


class Speech(Protocol):
    """One answer. Texts are lines of a stream, "" for none."""

    def whole(self, answer: Answer, usage: Mapping[str, Any] | None, told: Told) -> dict[str, Any]:
        """The body of an answer that is not streamed. usage: of chat completions."""

    def begin(self, answer: Answer | None, *, speaks_first: bool, usage: Mapping[str, Any] | None = None) -> str:
        """A stream opens. answer: where it is whole already. speaks_first: content comes before anything else."""

    def delta(self, delta: Mapping[str, Any], logprobs: Any = None) -> str:
        """More of the answer, as a delta of chat completions; a call comes as one."""

    def verdict(self, told: Mapping[str, Any]) -> str:
        """What was found, where the API has a place for it before the end."""

    def end(self, finish: str | None, usage: Mapping[str, Any] | None, told: Told, logprobs: Any = None) -> str:
        """The stream is whole."""

    def failed(self, error: RequestError, told: Told = None) -> str:
        """The stream came to nothing, within it."""

    def refusal(self, body: dict[str, Any]) -> dict[str, Any]:
        """An error body of chat completions, as this API has them."""

    def keep_alive(self) -> str:
        """A line that says nothing."""


class ChatSpeech:
    """Chat completions. body: the request."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._model = body.get("model")
        options = body.get("stream_options")
        self._wants_usage = isinstance(options, Mapping) and bool(options.get("include_usage"))
        self._around: dict[str, Any] = {}

    def whole(self, answer: Answer, usage: Mapping[str, Any] | None, told: Told) -> dict[str, Any]:
        choice = {"index": 0, "message": answer.message(), "logprobs": answer.logprobs, "finish_reason": answer.finish}
        body = {**self._envelope(answer, "chat.completion"), "choices": [choice]}
        if usage is not None:
            body["usage"] = dict(usage)
        return body if told is None else {**body, "referee": dict(told)}

    def begin(self, answer: Answer | None, *, speaks_first: bool, usage: Mapping[str, Any] | None = None) -> str:
        self._around = self._envelope(answer, "chat.completion.chunk")
        return self.delta({"role": "assistant", "content": "" if speaks_first else None})

    def delta(self, delta: Mapping[str, Any], logprobs: Any = None) -> str:
        return self._chunk(delta, logprobs)

    def verdict(self, told: Mapping[str, Any]) -> str:
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
        return "event: referee\n" + sse({**self._around, "choices": [choice], "referee": dict(told)})

    def end(self, finish: str | None, usage: Mapping[str, Any] | None, told: Told, logprobs: Any = None) -> str:
        last = self._chunk({}, logprobs, finish)
        if self._wants_usage and usage is not None:
            last += sse({**self._around, "choices": [], "usage": dict(usage)})
        return last + DONE

    def failed(self, error: RequestError, told: Told = None) -> str:
        return sse({**error_body(error), **({} if told is None else {"referee": told})})

    def refusal(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def keep_alive(self) -> str:
        return KEEP_ALIVE

    def _chunk(self, delta: Mapping[str, Any], logprobs: Any, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish}
        return sse({**self._around, "choices": [choice]})

    def _envelope(self, answer: Answer | None, kind: str) -> dict[str, Any]:
        """The members around the choices, those of the upstream where it sent any."""
        given = dict(answer.envelope) if answer is not None else {}
        given.pop("referee", None)
        own = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._model}
        return {**own, **given, "object": kind}


class Rejected(UpstreamRefusal):
    """An answer that did not pass, as a refusal with the verdict in its body and headers."""

    def __init__(self, verdict: Verdict, speech: Speech) -> None:
        error = verdict.error()
        body = encode({**speech.refusal(error_body(error)), "referee": verdict.to_dict()})
        RequestError.__init__(self, error.message, status=error.status, type=error.type, code=error.code)
        self.body, self.headers = body, {"content-type": "application/json", **verdict.headers()}
