"""Why a request's prefix was, or was not, in the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Reason = Literal[
    "exact repeat", "whole prompt", "first token", "different token", "end of stored text", "below grain", "evicted",
    "window missing", "damaged on disk", "never stored", "not asked", "pool full",
]  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """What became of one prompt. Token counts add up: memory + disk + computed = prompt.

    reason: why no more was taken from the store; `text()` says it in a sentence.
    """

    prompt_tokens: int
    memory_tokens: int = 0
    """Tokens whose entries came from memory."""
    disk_tokens: int = 0
    """Tokens whose entries were read from disk."""
    computed_tokens: int = 0
    """Tokens that had to be computed because nothing was stored for them."""
    replayed_tokens: int = 0
    """Tokens that had stored entries and were run again for their windows."""
    restored_at: int = 0
    """Position of the window checkpoint the sequence went on from; 0 without one."""
    checkpoint: Literal["memory", "disk", "none"] = "none"
    reason: Reason = "never stored"
    differs_at: int | None = None
    """Position of the first token that differs from the nearest stored text."""
    stored_token: int | None = None
    asked_token: int | None = None
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not run: what `prompt_cache_hit_tokens` reports."""
        return self.memory_tokens + self.disk_tokens - self.replayed_tokens

    def to_dict(self) -> dict[str, Any]:
        """For response metadata."""
        return {**asdict(self), "cached_tokens": self.cached_tokens, "text": self.text()}

    def text(self) -> str:
        """In words."""
        found = self.memory_tokens + self.disk_tokens
        parts = [
            f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens came from the store "
            f"({self.memory_tokens} stored in memory, {self.disk_tokens} on disk)"
        ]
        if self.replayed_tokens:
            source = "no window checkpoint was there" if self.checkpoint == "none" else (
                f"the nearest window checkpoint stands at {self.restored_at}"
            )  # fmt: skip
            parts.append(f"{self.replayed_tokens} of the stored ones were run again because {source}")
        parts.append(_WHY[self.reason].format(at=self.differs_at, stored=self.stored_token, asked=self.asked_token,
                                              found=found))  # fmt: skip
        return "; ".join(parts) + "."


_WHY: dict[Reason, str] = {
    "exact repeat": "the very prompt was asked before, so its next-token scores were there too",
    "whole prompt": "all of the prompt but its last tokens was stored",
    "first token": "no stored text begins with this prompt's first token",
    "different token": "at position {at} the stored text goes on with token {stored}, this prompt with {asked}",
    "end of stored text": "the stored text ends at {found}",
    "below grain": "what matches further is less than a page of tokens",
    "evicted": "what followed was stored once and has been evicted since",
    "window missing": "a window would have cost more to restore than it saved",
    "damaged on disk": "what followed was damaged on disk and has been discarded",
    "never stored": "nothing like it was stored before",
    "not asked": "this request needs every position computed, so the store was not asked",
    "pool full": "the memory for pages was full",
}
