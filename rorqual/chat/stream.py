"""Generated text to events while it is generated: reasoning, content and tool calls, in pieces of any size.

Tolerant on purpose: a server must make something of whatever a model writes. For a well-formed reply the
joined events equal the strict parse. For the rest this follows what serving engines agree on: a call that was
cut off is dropped and never gets invented arguments, a block inside reasoning ends it, lone tags vanish, text
is kept. The events do not depend on where the text was cut. Control tokens never reach reasoning or content.

Left out: coercing text to a schema's type, and calls by names that no tool has (both returned as written).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from rorqual.chat.calls import CallBuilder, is_string_by_schema, make_call_id
from rorqual.chat.encode import check_thinking_mode
from rorqual.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from rorqual.chat.tags import Stops, tags
from rorqual.log import get

_log = get(__name__)

_SLICE = 4096  # longer input is fed in slices, so that the buffer and the work on it stay small
_MAX_HEADER = 4096  # a tag whose attributes are longer is broken
_TAG_MARGIN = 64  # longer than any terminator, so that a cut at the limit decides nothing
_STRAY_REST = re.compile(r"[^<>\n]{0,256}")
_ATTRIBUTES = r'(?:\s+\w+="[^"]*")*'
_INVOKE_HEADER = re.compile(r'\s*name="(?P<name>.*?)"' + _ATTRIBUTES, re.DOTALL)
_PARAMETER_HEADER = re.compile(
    r'\s*name="(?P<name>.*?)"(?:\s+string="(?P<string>true|false)")?' + _ATTRIBUTES, re.DOTALL
)


class _State(Enum):
    TEXT = auto()  # reasoning or content
    BLOCK = auto()  # between calls
    INVOKE_TAG = auto()
    INVOKE = auto()  # between parameters
    PARAMETER_TAG = auto()
    VALUE = auto()
    DONE = auto()


class StreamParser:
    """Reads one reply.

        parser = StreamParser("thinking", tools)
        for piece in pieces:
            events = parser.feed(piece)
        events = parser.finish()          # the last event is Finished; also kept as parser.result

    thinking_mode: as in the prompt; "thinking" starts inside the reasoning. A prompt that ends in an open
        assistant turn has closed its reasoning, so its continuation is read with "chat".
    tools: the request's tools, only to learn the type of a parameter whose tag does not tell.
    allow_calls: False when no tools were declared or none may be called; calls are then left out.
    accept_variants: also read tags with doubled or ASCII bars.
    make_id: gives a call's id for its index.

    Raises: RequestError for an unknown thinking mode; nothing for any text.
    """

    def __init__(
        self,
        thinking_mode: str = "thinking",
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        allow_calls: bool = True,
        accept_variants: bool = False,
        make_id: Callable[[int], str] = make_call_id,
    ) -> None:
        check_thinking_mode(thinking_mode)
        self._tools = tools
        self._allow_calls = allow_calls
        self._make_id = make_id
        self._tags = tags(accept_variants)
        self._steps: dict[_State, Callable[[bool], bool]] = {
            _State.TEXT: self._step_text,
            _State.BLOCK: self._step_block,
            _State.INVOKE_TAG: self._step_invoke_tag,
            _State.INVOKE: self._step_invoke,
            _State.PARAMETER_TAG: self._step_parameter_tag,
            _State.VALUE: self._step_value,
        }
        self._state = _State.TEXT
        self._in_reasoning = thinking_mode == "thinking"
        self._buffer = ""
        self._skip_bracket = False  # the ">" of the tag just read is still to come
        self._gap: list[str] = []  # white space around an opening tag, kept in case no call follows
        self._tail = ""  # the last characters sent of the reasoning or content
        self._is_seam = False  # the next text joins text from before some markup
        self._blank: list[str] = []  # white space after a block, sent only if text follows
        self._holds_blank = False
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._call: CallBuilder | None = None
        self._num_calls = 0
        self._complete: list[CallBuilder] = []
        self._events: list[Event] = []
        self._notes: list[str] = []
        self._saw_eos = False
        self._was_cut = False
        self._ends_with_block = False
        self._result: Finished | None = None

    @property
    def result(self) -> Finished:
        """The summary; available after `finish`."""
        assert self._result is not None, "finish() was not called"
        return self._result

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of text, cut anywhere; return the events it settles, adjacent deltas joined."""
        assert self._result is None, "the parser has finished"
        for start in range(0, len(text), _SLICE):
            self._buffer += text[start : start + _SLICE]
            self._run(is_final=False)
        return self._take_events()

    def finish(self, finish_reason: str | None = None) -> list[Event]:
        """End the text; return what was held back and `Finished`. A second call returns nothing.

        finish_reason: "stop" or "length" as the engine knows it, which matters when EOS is not part of the
        text, or the word for another end, which stays; None to tell from the text. A complete call makes it
        "tool_calls" either way.
        """
        if self._result is not None:
            return []
        self._run(is_final=True)
        if self._call is not None or self._state in (_State.INVOKE_TAG, _State.INVOKE, _State.BLOCK):
            self._was_cut = True
        if self._call is not None:
            self._end_call(is_closed=False)
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments()},
            }
            for call in self._complete
        ]
        message = {
            "role": "assistant",
            "content": "".join(self._content),
            "reasoning_content": "".join(self._reasoning),
            "tool_calls": calls,
        }
        if calls:
            reason = "tool_calls"
        elif self._was_cut and finish_reason in (None, "stop", "length"):
            reason = "length"
        else:
            reason = finish_reason or ("stop" if self._saw_eos or self._ends_with_block else "length")
        sampled = tuple(tuple(call.sampled) for call in self._complete)
        self._result = Finished(message, reason, tuple(sorted(self._notes)), sampled)
        return [*self._take_events(), self._result]

    # The machine: each step consumes some of the buffer and returns whether another step may do more.

    def _run(self, is_final: bool) -> None:
        while self._state is not _State.DONE:
            if self._skip_bracket and self._buffer:
                self._skip_bracket = False
                self._buffer = self._buffer.removeprefix(">")
            if not self._buffer or not self._steps[self._state](is_final):
                return
        if self._buffer:
            self._note("text after the end-of-sentence token was left out")
            self._buffer = ""

    def _step_text(self, is_final: bool) -> bool:
        stops = self._tags.text
        match = stops.pattern.search(self._buffer)
        if match is None:
            self._release(stops, self._send_text, is_final)
            return False
        kind, start, end = match.lastgroup, match.start(), match.end()
        if not is_final and len(self._buffer) - stops.held(self._buffer) < start:
            # A longer terminator that begins earlier may be arriving (newlines before a tag, a doubled bar).
            self._release(stops, self._send_text, is_final)
            return False
        if kind == "stray":
            rest = _STRAY_REST.match(self._buffer, end)
            assert rest is not None
            end = rest.end()
            if end == len(self._buffer):
                if not is_final:  # the tag may go on, or turn out to open a block
                    self._send_text(self._buffer[:start])
                    self._buffer = self._buffer[start:]
                    return False
                # An opening tag cut off by the end takes the newlines before it along.
                start = min(start, end - stops.held(self._buffer))
            elif self._buffer[end] == ">":
                end += 1
        elif kind in ("eos", "calls", "invoke") or (kind == "think_end" and self._in_reasoning):
            self._send_text(self._buffer[:start])
            self._buffer = self._buffer[end:]
            self._leave_text(kind, match[0])
            return True
        self._note(f"a stray {match[0].strip()} was left out")
        self._send_text(self._buffer[:start])
        self._buffer = self._buffer[end:]
        self._is_seam = True
        return True

    def _leave_text(self, kind: str, matched: str) -> None:
        if kind == "eos":
            self._saw_eos = True
            self._state = _State.DONE
        elif kind == "think_end":
            self._in_reasoning = False
            self._tail = ""
        else:
            self._gap = [matched[: len(matched) - len(matched.lstrip("\n"))]]
            self._state = _State.BLOCK
            if kind == "invoke":
                self._note("a call stood outside a tool_calls block")
                self._open_invoke()
            else:
                self._skip_bracket = True

    def _step_block(self, is_final: bool) -> bool:
        text = self._buffer.lstrip()
        self._gap.append(self._buffer[: len(self._buffer) - len(text)])
        self._buffer = text
        if not text:
            return False
        stops = self._tags.block
        match = stops.pattern.match(text)
        if match is None:
            if text in stops.prefixes:
                if is_final:
                    self._buffer = ""
                return False
            # Not a tag that belongs here: the block is over, or never was one; the text is not to be lost.
            self._note("a tool_calls block was not closed")
            self._buffer = "".join(self._gap) + text
            self._is_seam = True
            self._state = _State.TEXT
            return True
        self._buffer = text[match.end() :]
        if match.lastgroup == "invoke":
            self._open_invoke()
        else:
            self._close_block(saw_eos=match.lastgroup == "eos")
        return True

    def _step_invoke_tag(self, is_final: bool) -> bool:
        header = self._read_header()
        if header is None:
            return False
        match = _INVOKE_HEADER.fullmatch(header)
        self._state = _State.INVOKE
        if match is None:
            self._note("a call without a readable name was left out")
            self._call = CallBuilder(None, "", "")
            return True
        index = self._num_calls
        self._num_calls += 1
        self._call = CallBuilder(index, self._make_id(index), match["name"])
        self._emit(ToolCallStart(index, self._call.id, self._call.name))
        return True

    def _step_invoke(self, is_final: bool) -> bool:
        stops = self._tags.invoke
        match = stops.pattern.search(self._buffer)
        if match is None:
            self._release(stops, self._skip_text, is_final)
            return False
        self._skip_text(self._buffer[: match.start()])
        self._buffer = self._buffer[match.end() :]
        kind = match.lastgroup
        if kind == "parameter":
            self._state = _State.PARAMETER_TAG
        elif kind == "invoke_close":
            self._end_call(is_closed=True)
            self._skip_bracket = True
            self._gap = []
            self._state = _State.BLOCK
        elif kind == "eos":
            self._was_cut = True
            self._end_call(is_closed=False)
            self._close_block(saw_eos=True)
        else:
            # The next tag shows that nothing of this call was cut off, if it has any parameters.
            assert self._call is not None
            self._note("a call was not closed")
            self._end_call(is_closed=self._call.has_parameters)
            if kind == "invoke":
                self._open_invoke()
            else:
                self._close_block(saw_eos=False)
        return True

    def _step_parameter_tag(self, is_final: bool) -> bool:
        call = self._call
        assert call is not None
        header = self._read_header()
        if header is None:
            return False
        match = _PARAMETER_HEADER.fullmatch(header)
        if match is None:
            self._note("a call with an unreadable parameter was left out")
            call.is_broken = True
            self._state = _State.INVOKE
            return True
        key, flag = match["name"], match["string"]
        if flag is None:
            self._note(f"parameter {key!r} did not say whether it is text")
        is_string = flag == "true" if flag else is_string_by_schema(self._tools, call.name, key)
        self._send_arguments(call.open_value(key, is_string))
        self._state = _State.VALUE
        return True

    def _step_value(self, is_final: bool) -> bool:
        call = self._call
        assert call is not None
        stops = self._tags.value
        match = stops.pattern.search(self._buffer)
        if match is None:
            self._release(stops, lambda text: self._send_arguments(call.add_value(text)), is_final)
            return False
        self._send_arguments(call.add_value(self._buffer[: match.start()]))
        self._buffer = self._buffer[match.end() :]
        piece, is_json = call.close_value()
        self._send_arguments(piece)
        if not is_json:
            self._note("a value given as JSON is not JSON and was passed on as text")
        self._skip_bracket = True
        self._state = _State.INVOKE
        return True

    # What the steps are made of.

    def _release(self, stops: Stops, sink: Callable[[str], None], is_final: bool) -> None:
        """Pass on all of the buffer except the tail that may become a terminator."""
        end = len(self._buffer) - (0 if is_final else stops.held(self._buffer))
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        sink(text)

    def _send_text(self, text: str) -> None:
        if not text:
            return
        parts = self._reasoning if self._in_reasoning else self._content
        if self._holds_blank:
            self._blank.append(text)
            if text.isspace():
                return
            text, self._blank, self._holds_blank = "".join(self._blank), [], False
            self._ends_with_block = False
            self._note("text after the tool_calls block was added to the content")
        if self._is_seam and self._tags.forbidden.held(self._tail) and not text[0].isspace():
            text = "\n" + text  # or the two sides of what was left out could join to a marker
        self._is_seam = False
        parts.append(text)
        self._tail = (self._tail + text)[-self._tags.forbidden.longest_prefix :]
        self._emit(ReasoningDelta(text) if self._in_reasoning else ContentDelta(text))

    def _read_header(self) -> str | None:
        """Take a tag's attributes off the buffer; "" for a broken tag, None when more text is needed."""
        match = self._tags.header.search(self._buffer)
        end = match.start() if match else len(self._buffer)
        if match is None and end <= _MAX_HEADER + _TAG_MARGIN:
            return None
        if match is not None and match["end"] and end <= _MAX_HEADER:
            header = self._buffer[: end + 1]
            self._buffer = self._buffer[end + 2 :]
            return header
        self._buffer = self._buffer[min(end, _MAX_HEADER) :]
        return ""

    def _open_invoke(self) -> None:
        if self._in_reasoning:
            self._note("a call inside the reasoning ended it")
            self._in_reasoning = False
            self._tail = ""
        self._holds_blank = True
        self._is_seam = True
        self._ends_with_block = False
        self._state = _State.INVOKE_TAG

    def _close_block(self, saw_eos: bool) -> None:
        self._saw_eos |= saw_eos
        self._state = _State.DONE if saw_eos else _State.TEXT
        if self._in_reasoning:
            self._in_reasoning = False
            self._tail = ""
        self._gap = []
        self._holds_blank = self._is_seam = self._ends_with_block = True

    def _skip_text(self, text: str) -> None:
        assert self._call is not None
        if text.strip():
            self._call.has_text = True
            self._note("text between the tags of a call was left out")

    def _end_call(self, is_closed: bool) -> None:
        call = self._call
        assert call is not None
        self._call = None
        if call.index is None:
            return
        # A body that is not parameters would otherwise pass as a call without any.
        is_complete = is_closed and not call.is_broken and (call.has_parameters or not call.has_text)
        if not is_complete:
            self._note(f"an incomplete call of {call.name!r} was left out")
        elif not self._allow_calls:
            self._note(f"a call of {call.name!r} was left out, because no tools may be called")
        else:
            if call.has_duplicates:
                self._note("a repeated parameter keeps its last value")
            self._emit(ToolCallArguments(call.index, call.close()))
            self._complete.append(call)
        self._emit(ToolCallEnd(call.index, is_complete))

    def _send_arguments(self, piece: str) -> None:
        call = self._call
        assert call is not None
        if piece and not call.is_broken and call.index is not None:
            self._emit(ToolCallArguments(call.index, piece))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            _log.info("repaired a reply: %s", text)

    def _emit(self, event: Event) -> None:
        if not self._allow_calls and isinstance(event, (ToolCallStart, ToolCallArguments, ToolCallEnd)):
            return
        last = self._events[-1] if self._events else None
        if isinstance(event, (ReasoningDelta, ContentDelta)) and type(event) is type(last):
            assert isinstance(last, (ReasoningDelta, ContentDelta))
            self._events[-1] = replace(last, text=last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            self._events[-1] = replace(last, piece=last.piece + event.piece)
        else:
            self._events.append(event)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
