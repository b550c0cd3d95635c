"""What a caller may ask of generation, checked once, before any model step.

Limits follow DeepSeek's public API (temperature 0 to 2, top_p above 0, 16 stop strings, 20 top log
probabilities); `top_k`, `min_p`, `seed` and `stop_token_ids` are additions. Every refusal is a `RequestError`
that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.grammar import Grammar
from rorqual.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MOST_PINS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature: 0 chooses the most likely token (lowest id among equals); otherwise logits are divided by it.
    top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    top_k: keep this many most likely tokens; `None` keeps all.
    min_p: keep tokens at least this fraction as likely as the best one; 0 keeps all.
    seed: the same seed, prompt and weights give the same output; `None` draws a fresh seed.
    max_tokens: most tokens to generate, the end token included; `None` means up to the context limit.
    stop: strings (or one string) that end the output where they begin; they are not part of it. The names of
        control tokens are no text and never match; use `stop_token_ids` for those.
    stop_token_ids: ids that end the output besides the tokenizer's end token; recorded, not part of its text.
    suppress_token_ids: ids that are never chosen.
    logprobs: report each chosen token's log probability under the model itself (no temperature, no filters).
    top_logprobs: how many of the likeliest tokens to report beside it (needs `logprobs`).
    prompt_logprobs: also report them for the prompt's own tokens.
    grammar: what the output must be; tokens it does not allow are never chosen (`grammar.py`).
    guard: the retrieval guard of this request (`guard.py`): `off`, `default`, or names of sources; `None` as the engine
        has it.
    pin: spans [begin, end) of prompt tokens that a guard with the source `pinned` always shows.
    record: report for training what each token was drawn from (`recording.py`): its log probability there, with
        temperature, filters and suppressed ids, and the ids that could have been chosen.
    routing: report the experts that learned routers chose for the tokens read; the layer code then runs the steps.

    Raises: RequestError naming the first field that is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    suppress_token_ids: Sequence[int] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    guard: str | None = None
    pin: Sequence[tuple[int, int]] = ()
    record: bool = False
    routing: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature <= 2:
            raise _range_error("temperature", self.temperature, "[0, 2]")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _range_error("top_p", self.top_p, "(0, 1.0]")
        if self.top_k is not None and (not _is_int(self.top_k) or self.top_k < 1):
            raise _range_error("top_k", self.top_k, "1 and above; leave it out to keep all tokens")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise _range_error("min_p", self.min_p, "[0, 1]")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed <= MAX_SEED):
            raise _range_error("seed", self.seed, "[0, 2^63 - 1]")
        if self.max_tokens is not None and (not _is_int(self.max_tokens) or self.max_tokens < 1):
            raise _range_error("max_tokens", self.max_tokens, "1 and above")
        self._check_stops()
        self._check_guard()
        if not _is_int(self.top_logprobs) or not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise _range_error("top_logprobs", self.top_logprobs, f"[0, {MAX_TOP_LOGPROBS}].")
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise RequestError(
                "Invalid top_logprobs and logprobs value, logprobs must be set to true if top_logprobs is used.",
                param="top_logprobs",
            )

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise RequestError(f"Invalid stop value {stop!r}: expected a string or a list of strings.", param="stop")
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"Stop string array too long: {len(stop)}. At most {MAX_STOP_STRINGS} stop strings are "
                "supported; send fewer.",
                param="stop",
            )
        if "" in stop:
            raise RequestError(
                "Invalid stop value: an empty stop string would end every output at once. Remove it.",
                param="stop",
            )
        if self.record and self.grammar is not None:
            raise RequestError(
                "record was asked for with a grammar, whose masks are not recorded, so training would score the tokens "
                "under another distribution than they were drawn from. Leave one of the two out.",
                param="record",
            )
        object.__setattr__(self, "stop", tuple(stop))
        for name in ("stop_token_ids", "suppress_token_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, Sequence) or not all(_is_int(i) and i >= 0 for i in ids):
                raise RequestError(
                    f"Invalid {name} value {ids!r}: expected a list of token ids (integers from 0).",
                    param=name,
                )
            object.__setattr__(self, name, tuple(ids))

    def _check_guard(self) -> None:
        if self.guard is not None and not isinstance(self.guard, str):
            raise RequestError(
                f"Invalid guard value {self.guard!r}: expected off, default, or names of sources.", param="guard"
            )
        pins = [tuple(pin) for pin in self.pin]
        if len(pins) > MOST_PINS or any(
            len(pin) != 2 or not all(map(_is_int, pin)) or not 0 <= pin[0] < pin[1] <= MAX_SEED for pin in pins
        ):
            raise RequestError(
                f"Invalid pin value: expected up to {MOST_PINS} spans [begin, end] of prompt tokens, each from 0 and "
                "not empty.",
                param="pin",
            )
        object.__setattr__(self, "pin", tuple(pins))

    @cached_property
    def suppressed(self) -> frozenset[int]:
        """`suppress_token_ids` to look one up."""
        return frozenset(self.suppress_token_ids)

    @cached_property
    def suppress_index(self) -> Tensor:
        """`suppress_token_ids` as an index [N], made once for all steps of a request."""
        return torch.tensor(self.suppress_token_ids, dtype=torch.int64)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again (`Any`: fields differ in type)."""
        return replace(self, **changes)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _range_error(name: str, value: object, valid: str) -> RequestError:
    return RequestError(
        f"Invalid {name} value, the valid range of {name} is {valid}"
        + (f" (got {value!r})" if not valid.endswith(".") else f" (got {value!r})."),
        param=name,
    )
