"""A rendered prompt: its text, and which stretches of it are markers the encoder wrote itself.

The format escapes nothing, so a user may type `<｜User｜>` and a naive tokeniser turns it into the control
token. `RenderedPrompt.pieces()` keeps the two apart: give the marker pieces their token ids directly and
tokenise the others with added tokens switched off. A text piece is never cut where callers' text meets fixed
text, because punctuation and the newlines after it share tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rorqual.chat.markers import MARKER_PATTERN
from rorqual.errors import RequestError


class Marker(str):
    """A marker inside callers' text that the encoder put there (the image placeholder)."""

    __slots__ = ()


class Reply(NamedTuple):
    """What an assistant message stands as: characters [start, stop) of the text, from behind its header to its end
    token (with it, unless the turn is open).
    """

    start: int
    stop: int
    message: int
    """Its place in the list of messages."""
    is_task: bool
    """Whether it answers a task's token (a title, a query), which a bare short text does."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Text of a prompt and the half-open, ascending ranges of it that hold the encoder's own markers."""

    text: str
    marker_spans: tuple[tuple[int, int], ...]
    replies: tuple[Reply, ...] = ()
    """The assistant messages in it, in order: what a model learns to write."""

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yield `(piece, is_marker)` in order; their concatenation is `text`, empty pieces are left out."""
        position = 0
        for start, end in self.marker_spans:
            if position < start:
                yield self.text[position:start], False
            yield self.text[start:end], True
            position = end
        if position < len(self.text):
            yield self.text[position:], False


@lru_cache(maxsize=256)
def _split_fixed(text: str) -> tuple[tuple[str, bool], ...]:
    """Split our own wording into `(piece, is_marker)`; the pattern's group makes every odd piece a marker."""
    return tuple((piece, i % 2 == 1) for i, piece in enumerate(MARKER_PATTERN.split(text)) if piece)


class PromptWriter:
    """Collects a prompt piece by piece and remembers which pieces are markers."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._replies: list[Reply] = []
        self._length = 0

    def _add(self, piece: str, is_marker: bool) -> None:
        end = self._length + len(piece)
        if is_marker:
            self._spans.append((self._length, end))
        self._pieces.append(piece)
        self._length = end

    def fixed(self, text: str) -> None:
        """Add wording of the format; markers in it count as markers."""
        for piece, is_marker in _split_fixed(text):
            self._add(piece, is_marker)

    def caller(self, text: str) -> None:
        """Add text from outside; whatever it looks like, it is text, unless it is a `Marker`."""
        self._add(text, isinstance(text, Marker))

    @property
    def length(self) -> int:
        """Characters so far."""
        return self._length

    def reply(self, start: int, message: int, is_task: bool) -> None:
        """Note that an assistant message reaches from `start` to here."""
        self._replies.append(Reply(start, self._length, message, is_task))

    def finish(self, param: str) -> RenderedPrompt:
        """Return the prompt. Raises: RequestError naming `param` when the text cannot be written as UTF-8."""
        text = "".join(self._pieces)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{param} holds the lone surrogate U+{ord(text[error.start]):04X} after "
                f"{text[max(0, error.start - 20) : error.start]!r}. It is half a character and cannot be "
                "written as UTF-8, so it cannot be tokenised. Send the whole character, or remove the half.",
                param=param,
            ) from None
        return RenderedPrompt(text, tuple(self._spans), tuple(self._replies))
