"""How much of a prompt a step reads while other requests decode, from what earlier steps took."""

from __future__ import annotations

from rorqual.engine.grain import GRAIN

_WEIGHT = 0.25
"""Of the newest step in the running means."""


class Pace:
    """Prompt tokens for the next step: as many as keep it within `gap_s` seconds, `chunk` at most.

    Whatever was measured, a step reads at least a page of `GRAIN` tokens, so that prompts move on; `chunk` where nobody
    decodes, where nothing was measured yet, and where `gap_s` is None.
    """

    def __init__(self, chunk: int, gap_s: float | None) -> None:
        self.chunk, self.gap_s = chunk, gap_s
        self._row_s: float | None = None
        self._token_s: float | None = None

    def __call__(self, decoding: int) -> int:
        """Most prompt tokens of a step in which so many requests decode."""
        if self.gap_s is None or not decoding or self._token_s is None:
            return self.chunk
        left = self.gap_s - decoding * (self._row_s or 0.0)
        count = int(max(0.0, left) / self._token_s) // GRAIN * GRAIN
        return min(self.chunk, max(GRAIN, count))

    def observe(self, prompt_tokens: int, decoding: int, seconds: float) -> None:
        """Learn from a step."""
        if not prompt_tokens and decoding:
            self._row_s = _mean(self._row_s, seconds / decoding)
        elif prompt_tokens >= min(GRAIN, self.chunk):  # the cost of a few says nothing of that of many
            rest = max(seconds - decoding * (self._row_s or 0.0), 0.1 * seconds)
            self._token_s = _mean(self._token_s, rest / prompt_tokens)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
