"""What a run needs of a target: an answer to a prompt, as the raw text behind the assistant's header, and its cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rorqual.data.tasks.answers import parse_message
from rorqual.data.tasks.base import Item, Message, Mode
from rorqual.evals.records import EngineOf, Sampling, Usage

Abstains = Callable[[str], int | None]
"""Where in a raw completion an abstention begins; None without one."""


class TransportError(Exception):
    """The target gave no answer that could be graded; the item becomes an X. status: of HTTP, where it refused."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for a reply; `text` instead where there are no messages (completion). effort: the chat
    format's word, None for its usual one.
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None
    mode: Mode
    text: str | None = None
    effort: str | None = None

    @staticmethod
    def of(item: Item) -> Prompt:
        return Prompt(item.messages, item.tools, item.thinking_mode, item.prompt, item.effort)


@dataclass(frozen=True)
class Answer:
    """A raw completion: reasoning and `</think>` in thinking mode, then content and calls as the model writes them.

    confidence: probability of the least likely token of the answer (reasoning excluded), where the target tells.
    prompt_sha: of the token ids, or of the messages where the ids are not known.
    """

    text: str
    finish_reason: str
    usage: Usage
    first_ms: float | None
    total_ms: float
    prompt_sha: str
    confidence: float | None = None
    signals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What a record says about who answered."""

    model_id: str
    model_sha: str
    tokenizer_sha: str
    engine: EngineOf


class Target(Protocol):
    """Thread-safe. `parallel`: how many questions it takes at a time. `can_force`: whether `force` works."""

    @property
    def identity(self) -> Identity: ...
    @property
    def parallel(self) -> int: ...
    @property
    def can_force(self) -> bool: ...
    @property
    def count_tokens(self) -> Callable[[str], int] | None:
        """Counts the tokens of a text as the model does; None where nobody here knows its tokenizer."""
        ...

    def answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        """The reply to `prompt`. Raises: TransportError."""
        ...

    def force(self, prompt: Prompt, sampling: Sampling, abstains: Abstains) -> Answer:
        """The reply with abstentions masked, so that something is answered. Raises: TransportError, ConfigError."""
        ...

    def needle_signals(self, prompt: Prompt, answer: str, value: str, offset: int) -> dict[str, float]:
        """Whether the queries that write `value` in `answer` chose the entries of its place in the last message, where
        it stands behind character `offset` (`selection.py`); empty where the target cannot tell.
        """
        ...

    def close(self) -> None: ...


def message_of(text: str, mode: Mode, call_ids: str) -> Message:
    """The assistant message that a raw completion is, as a client sends it back; calls get ids from `call_ids`."""
    said = parse_message(text, mode)
    message: Message = {"role": "assistant", "content": said.get("content") or ""}
    if said.get("reasoning_content"):
        message["reasoning_content"] = said["reasoning_content"]
    if calls := said.get("tool_calls"):
        message["tool_calls"] = [
            {"id": f"{call_ids}_{i}", "type": "function", "function": call["function"]} for i, call in enumerate(calls)
        ]
    return message


def sha(data: bytes) -> str:
    """The hash records name a prompt by."""
    return hashlib.sha256(data).hexdigest()[:32]


def token_signals(logprobs: Sequence[float]) -> dict[str, float]:
    """Signals s1 of an answer's tokens: mean and least log probability, nats; empty without tokens."""
    if not logprobs:
        return {}
    return {"mean_logprob": sum(logprobs) / len(logprobs), "min_logprob": min(logprobs)}
