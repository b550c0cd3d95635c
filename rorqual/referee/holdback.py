"""Text that is sent while it is written, some tokens late: what was let go has passed the checks, and stays said.

Text is let go at the ends of sentences once `HOLD_TOKENS` more have come, and only while every sentence so far is
without a finding. From the first finding on everything is held until the whole answer was judged.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from rorqual.referee.answer import Answer, Asked
from rorqual.referee.check import check_answer
from rorqual.referee.policy import Options

HOLD_TOKENS: Final = 64
_CHARACTERS = 4  # of a token, about
_SENTENCE_END = re.compile(r"[.!?][\"'”)\]]*\s|\n")
_UNDECIDED = re.compile(r"<\s*(?:[｜|/]|tool_call|think)|```[^`]*\Z|\|[^\n]*\Z")
_SENTENCES = ("format", "copy", "arith", "citations")


class Holdback:
    """Feed it the content's deltas. `sent`: all that was let go."""

    def __init__(self, asked: Asked, options: Options, hold_tokens: int = HOLD_TOKENS) -> None:
        self._asked, self._hold = asked, _CHARACTERS * hold_tokens
        self._options = replace(options, checks=tuple(name for name in options.checks if name in _SENTENCES))
        self._held = ""
        self._is_stopped = asked.schema[0]  # JSON is judged as a whole
        self.sent = ""

    def feed(self, text: str) -> str:
        """Text that may go out now."""
        self._held += text
        if self._is_stopped or len(self._held) <= self._hold:
            return ""
        ends = [found.end() for found in _SENTENCE_END.finditer(self._held, 0, len(self._held) - self._hold)]
        if not ends:
            return ""
        piece = self._held[: ends[-1]]
        if _UNDECIDED.search(piece):
            self._is_stopped = not piece.rstrip().endswith("|") and "```" not in piece
            return ""
        found = check_answer(self._asked, Answer(piece, finish="stop"), self._options).findings
        if any(one.rejects or one.status == "repaired" for one in found):
            self._is_stopped = True
            return ""
        self._held = self._held[len(piece) :]
        self.sent += piece
        return piece
