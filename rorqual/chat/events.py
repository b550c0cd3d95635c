"""What a stream of generated text turns into: small immutable events, and one summary at the end."""

from dataclasses import dataclass
from typing import Any

Parameters = tuple[tuple[str, str, bool], ...]
"""A call's parameters as they stand in the markup: (key, text, is_string) in order."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call whose name is complete; its arguments follow. Calls count from 0 over the whole message."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments; the pieces of a complete call join to a JSON object."""

    index: int
    piece: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is over. Not `complete`: it was cut off or broken and is no part of the final message."""

    index: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event.

    message: role, content, reasoning_content, tool_calls (id, type, function) with complete calls only.
    finish_reason: "tool_calls", "stop" or "length".
    notes: what was repaired or left out, in words; empty for a well-formed reply.
    sampled: of each call of the message, its parameters as they were written: (key, text, is_string). With them as a
        call's `sampled_parameters` the encoder writes the very text again, which the JSON of `arguments` cannot
        promise: a client may order and spell it otherwise.
    """

    message: dict[str, Any]
    finish_reason: str
    notes: tuple[str, ...] = ()
    sampled: tuple[Parameters, ...] = ()


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finished
