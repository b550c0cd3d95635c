"""From token events to the pieces of an answer; streams and whole answers are made of the same pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rorqual import chat
from rorqual.engine import FinishReason, Request, TokenEvent, Usage
from rorqual.server.pieces import Piece
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import END_THINK

IMPOSSIBLE = -9999.0  # what the API reports for a log probability that is minus infinity


class ReplyReader:
    """Feed it the engine's events in order; then `finished` holds the whole answer.

    opens_reasoning: whether the reply begins inside the reasoning; in thinking mode unless its prompt has closed it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: bool,
        tools: Sequence[dict[str, Any]],
        *,
        logprobs: bool,
        opens_reasoning: bool | None = None,
    ) -> None:
        opens = thinking if opens_reasoning is None else opens_reasoning
        self._tokenizer = tokenizer
        self.thinking = thinking
        self._parser = chat.StreamParser("thinking" if opens else "chat", list(tools) or None, allow_calls=bool(tools))
        self._end_think = tokenizer.token_id(END_THINK)
        self._in_reasoning = opens
        self._wants_logprobs = logprobs
        self._pending: dict[str, list[dict[str, Any]]] = self._no_logprobs()
        self._all_logprobs: dict[str, list[dict[str, Any]]] = self._no_logprobs()
        self.reasoning_tokens = 0

    @property
    def finished(self) -> chat.Finished:
        """The whole answer, once the last event has been read."""
        return self._parser.result

    def read(self, event: TokenEvent) -> Iterator[Piece]:
        """Pieces that this event settles; the last one of the last event holds `chat.Finished`."""
        was_reasoning = self._in_reasoning
        events = self._parser.feed(event.text)
        if event.id == self._end_think or any(not isinstance(e, chat.ReasoningDelta) for e in events):
            self._in_reasoning = False
        if event.id is not None:
            self._count(event, was_reasoning)
        else:
            self._count_text(events, was_reasoning)
        if event.finish_reason is not None:
            events += self._parser.finish(api_reason(event.finish_reason))
        for parsed in events:
            is_sent = not isinstance(parsed, chat.ToolCallEnd)  # no dialect has a place for logprobs there
            yield Piece(parsed, self._take_logprobs() if is_sent else None)

    def whole_logprobs(self) -> dict[str, Any] | None:
        """Log probabilities of the whole answer."""
        return self._all_logprobs if self._wants_logprobs else None

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The usage object, reasoning counted by token."""
        return usage_body(usage, self.reasoning_tokens if self.thinking else None)

    def _count(self, event: TokenEvent, was_reasoning: bool) -> None:
        self.reasoning_tokens += was_reasoning
        if self._wants_logprobs:
            kind = "reasoning_content" if was_reasoning else "content"
            entry = self._logprob_entry(event)
            self._pending[kind].append(entry)
            self._all_logprobs[kind].append(entry)

    def _count_text(self, events: Sequence[chat.Event], was_reasoning: bool) -> None:
        """Reasoning from another server, which tells text only: its tokens as they are written here, and its end."""
        for event in events:
            if isinstance(event, chat.ReasoningDelta):
                self.reasoning_tokens += len(self._tokenizer.encode(event.text, allow_special=False))
        self.reasoning_tokens += was_reasoning and not self._in_reasoning

    def _no_logprobs(self) -> dict[str, list[dict[str, Any]]]:
        return {"content": [], "reasoning_content": []} if self.thinking else {"content": []}

    def _take_logprobs(self) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        taken, self._pending = self._pending, self._no_logprobs()
        return taken

    def _logprob_entry(self, event: TokenEvent) -> dict[str, Any]:
        assert event.id is not None
        return {
            **token_logprob(self._tokenizer, event.id, event.logprob),
            "top_logprobs": [token_logprob(self._tokenizer, *pair) for pair in event.top_logprobs],
        }


def api_reason(reason: FinishReason | None) -> Literal["stop", "length", "insufficient_system_resource"]:
    """The engine's finish reason in the API's words: an answer cut off by its deadline is one cut short.

    A cancelled one is only ever read when the server itself cancelled it, to go away.
    """
    if reason == "cancelled":
        return "insufficient_system_resource"
    return "length" if reason in ("length", "timeout") else "stop"


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    """One entry of a log-probability list; control tokens have doubled bars, as on the hosted API."""
    raw = tokenizer.token_bytes(token)
    text = raw.decode("utf-8", "replace")
    is_control = len(text) > 1 and "｜" in text and tokenizer.has_token(text)
    return {
        "token": text.replace("｜", "｜｜") if is_control else text,
        "logprob": max(logprob, IMPOSSIBLE) if logprob is not None else IMPOSSIBLE,
        "bytes": None if is_control else list(raw),
    }


def exactness_body(request: Request) -> dict[str, Any] | None:
    """What is promised about the bits of a finished answer, and what was done for it."""
    return None if request.exactness is None else request.exactness.to_dict()


def usage_body(usage: Usage, reasoning_tokens: int | None) -> dict[str, Any]:
    """Usage as the API reports it; hits and misses add up to the prompt."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
    details: dict[str, int] = {}
    if reasoning_tokens is not None:
        details["reasoning_tokens"] = reasoning_tokens
    if usage.drafted_tokens:  # by the server itself
        details["accepted_prediction_tokens"] = usage.accepted_tokens
        details["rejected_prediction_tokens"] = usage.drafted_tokens - usage.accepted_tokens
    if details:
        body["completion_tokens_details"] = details
    return body
