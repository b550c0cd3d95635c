"""Between text and the token ids of a trajectory: the prompt, the model's turns, and what tools answered.

A trajectory is one growing list of ids in DeepSeek-V4's chat format. The model's own ids are kept as sampled; only
what the model is given is tokenised here, once, and its ids are what the journal keeps. Text from tools is encoded so
that nothing in it can become a control token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.chat import Event, Finished, StreamParser, markers, render_messages
from rorqual.chat.dsml import Call, call_parameters, write_calls
from rorqual.chat.prompt import PromptWriter
from rorqual.tokenizer import Tokenizer

SEPARATOR = "\n\n"
"""Between two results of one turn, as the chat format joins them."""


@dataclass(frozen=True)
class ToolRequest:
    """A call as the model wrote it. arguments: parsed; None when what it wrote is no JSON object."""

    name: str
    arguments: dict[str, Any] | None
    raw: str


@dataclass(frozen=True)
class Reply:
    """One finished turn of the model."""

    reasoning: str
    content: str
    calls: tuple[ToolRequest, ...]
    finish_reason: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, finished: Finished) -> Reply:
        """From what the chat parser found."""
        message = finished.message
        calls = tuple(_request(call["function"]) for call in message["tool_calls"])
        return cls(message["reasoning_content"], message["content"], calls, finished.finish_reason, finished.notes)


def _request(function: Mapping[str, Any]) -> ToolRequest:
    raw = function["arguments"].encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        arguments = json.loads(raw, parse_constant=_refuse)
        # half a character or an endless number: JSON can spell both, and no record can hold them
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        arguments = None
    return ToolRequest(function["name"], arguments if isinstance(arguments, dict) else None, raw)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@dataclass
class Dialogue:
    """How one trajectory is written and read. thinking: whether turns begin with reasoning."""

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]]
    thinking: bool = True

    @property
    def mode(self) -> str:
        """The chat format's word for it."""
        return "thinking" if self.thinking else "chat"

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the opening messages with the tools declared, up to where the model begins to write."""
        rendered = render_messages(messages, tools=self.tools or None, thinking_mode=self.mode)
        return self.tokenizer.encode_guarded(rendered.pieces())

    def observation_ids(self, results: Sequence[str]) -> list[int]:
        """Ids of the turn that gives the model its tools' results, up to where it writes again."""
        writer = PromptWriter()
        writer.fixed(markers.USER)
        for i, result in enumerate(results):
            writer.caller(SEPARATOR if i else "")
            for piece in (markers.RESULT_OPEN, plain(result), markers.RESULT_CLOSE):
                writer.caller(piece)
        writer.fixed(markers.ASSISTANT)
        writer.fixed(markers.THINK_START if self.thinking else markers.THINK_END)
        return self.tokenizer.encode_guarded(writer.finish("tool results").pieces())

    def reply_ids(
        self, reasoning: str, content: str, calls: Iterable[tuple[str, Any]], closed: bool = True
    ) -> list[int]:
        """Ids of a turn given as text, for models that send no ids; calls are (name, arguments), as text or object."""
        writer = PromptWriter()
        if self.thinking:
            writer.caller(plain(reasoning))
            writer.fixed(markers.THINK_END)
        writer.caller(plain(content))
        written = [
            Call("", name, call_parameters(args if isinstance(args, str) else json.dumps(args), f"call {name}"))
            for name, args in calls
        ]
        if written:
            write_calls(writer, written)
        if closed:
            writer.fixed(markers.EOS)
        return self.tokenizer.encode_guarded(writer.finish("reply").pieces())

    def reader(self) -> TurnReader:
        """A fresh reader for one turn of the model."""
        return TurnReader(self)


@dataclass
class TurnReader:
    """Reads one turn while its ids come, logged or new: feed every id once, in order."""

    dialogue: Dialogue
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was fed."""
        self.ids.clear()
        self._decoder = self.dialogue.tokenizer.stream_decoder()
        self._parser = StreamParser(self.dialogue.mode, self.dialogue.tools, make_id=lambda index: f"call_{index:02d}")

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """What these ids settle."""
        self.ids += ids
        return self._parser.feed("".join(self._decoder.push(one) for one in ids))

    @property
    def is_closed(self) -> bool:
        """Whether the model ended its turn."""
        return bool(self.ids) and self.ids[-1] == self.dialogue.tokenizer.eos_token_id

    def finish(self, reason: str | None = None) -> tuple[list[Event], Reply]:
        """End the turn; `reason` where the model did not end it itself ("length")."""
        events = [*self._parser.feed(self._decoder.flush()), *self._parser.finish(reason)]
        return events, Reply.of(self._parser.result)


def plain(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
