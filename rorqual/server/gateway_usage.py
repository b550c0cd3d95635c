"""What an answer that is passed on unread has used, so that it is charged like any other.

Usage is read in the words of each API and told in those of chat completions. Where an upstream tells none, or a client
leaves before it does, it is estimated: a token of prompt for every four bytes, and one of output for every event or for
every four bytes of a whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

BYTES_A_TOKEN: Final = 4


class Spent:
    """Reads the usage of one answer. num_bytes: of the request. writes: whether answers hold text that is generated."""

    def __init__(self, num_bytes: int, *, writes: bool = True) -> None:
        self._prompt, self._writes = num_bytes // BYTES_A_TOKEN, writes
        self._told: dict[str, Any] = {}
        self._events = self._bytes = 0

    def event(self, data: str) -> None:
        """An event of a stream."""
        self._events += data != "[DONE]"
        if '"usage"' in data:
            self._read(data)

    def whole(self, content: bytes) -> None:
        """A whole answer."""
        self._bytes = len(content)
        self._read(content)

    @property
    def usage(self) -> dict[str, Any]:
        """As it was told so far, or else estimated."""
        if self._told:
            return self._told
        written = max(self._events, self._bytes // BYTES_A_TOKEN) if self._writes else 0
        return estimate(self._prompt, written)

    def _read(self, text: str | bytes) -> None:
        try:
            found = usage_of(json.loads(text))
        except (ValueError, RecursionError):
            return
        for name, value in (found or {}).items():  # a later event tells more, never less
            before = self._told.get(name)
            self._told[name] = max(before, value) if isinstance(before, int) and isinstance(value, int) else value


def estimate(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A usage object that nobody told."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def usage_of(body: Any) -> dict[str, Any] | None:
    """The usage within a body or an event of any of the APIs, as chat completions count; None where there is none."""
    if not isinstance(body, Mapping):
        return None
    holders = (body, body.get("response"), body.get("message"))
    usage = next((one["usage"] for one in holders if isinstance(one, Mapping) and one.get("usage")), None)
    if not isinstance(usage, Mapping):
        return None
    if "prompt_tokens" in usage:
        return dict(usage)
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    given, written, read, made = (one if isinstance(one := usage.get(name), int) else 0 for name in names)
    details = usage.get("input_tokens_details")
    hit = details.get("cached_tokens") if isinstance(details, Mapping) else None
    if hit is None:  # Anthropic counts what the cache brought apart
        given, hit = given + read + made, read
    return {
        "prompt_tokens": given,
        "completion_tokens": written,
        "prompt_cache_hit_tokens": hit if isinstance(hit, int) else 0,
    }
