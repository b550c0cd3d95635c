"""Refusals before anything runs: prompts and limits that could never be served."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.params import SamplingParams
from rorqual.engine.scheduler import Scheduler
from rorqual.errors import ConfigError, RequestError


def as_array(tokens: Sequence[int]) -> NDArray[np.int32] | None:
    """A prompt's ids as int32 [n]; None for what does not fit, which `check_request` then refuses by name."""
    if isinstance(tokens, tuple):  # half of numpy's time, which first finds out what a hundred thousand objects are
        packed = bytearray(4 * len(tokens))
        try:
            struct.pack_into(f"{len(tokens)}i", packed, 0, *tokens)
        except (TypeError, struct.error):
            return None
        return np.frombuffer(packed, dtype=np.int32) if tokens else None
    try:
        found = np.asarray(tokens)
        wide = found.astype(np.int64) if found.dtype.kind in "iu" else np.zeros(0, np.int64)
    except (OverflowError, TypeError, ValueError):
        return None
    fits = wide.ndim == 1 and wide.size and -(1 << 31) <= wide.min() <= wide.max() < 1 << 31
    return wide.astype(np.int32) if fits else None


def check_request(
    tokens: Sequence[int] | NDArray[np.int32],
    params: SamplingParams,
    num_choices: int,
    context_limit: int,
    scheduler: Scheduler,
    guard: Any = None,
) -> int:
    """The number of tokens the request may generate.

    num_choices: ids of the vocabulary. context_limit: most tokens of prompt and output.
    Raises: RequestError naming the field, for what cannot run even if it were alone.
    """
    if len(tokens) == 0:
        raise RequestError(
            "The prompt has no tokens, and the model needs at least one to start from. "
            "Send some text, or the begin-of-sentence token alone.",
            param="prompt",
        )
    for name, ids in (
        ("prompt", tokens),
        ("stop_token_ids", params.stop_token_ids),
        ("suppress_token_ids", params.suppress_token_ids),
    ):
        if isinstance(ids, np.ndarray) and 0 <= ids.min() <= ids.max() < num_choices:
            continue  # a long prompt, looked at as a whole
        wrong = next((i for i in ids if not isinstance(i, (int, np.integer)) or isinstance(i, bool)), None)
        if wrong is not None:
            raise RequestError(
                f"Invalid {name}: {wrong!r} is no token id. Expected a list of whole numbers; encode text with this "
                "model's own tokenizer.",
                param=name,
            )
        bad = next((i for i in ids if not 0 <= i < num_choices), None)
        if bad is not None:
            raise RequestError(
                f"Token id {bad} in {name} is outside the vocabulary of {num_choices} tokens. "
                "Encode the text with this model's own tokenizer.",
                param=name,
            )
    if len(params.suppress_token_ids) >= num_choices and len(set(params.suppress_token_ids)) == num_choices:
        raise RequestError(
            f"suppress_token_ids names all {num_choices} tokens, so none could be chosen. Leave some out.",
            param="suppress_token_ids",
        )
    room = context_limit - len(tokens)
    max_tokens = params.max_tokens if params.max_tokens is not None else max(room, 1)
    if max_tokens > room:
        raise RequestError(
            f"This model's maximum context length is {context_limit} tokens. However, you requested "
            f"{len(tokens) + max_tokens} tokens ({len(tokens)} in the messages, {max_tokens} in the "
            "completion). Please reduce the length of the messages or completion.",
            param="max_tokens" if len(tokens) < context_limit else "messages",
            code="context_length_exceeded",
        )
    if scheduler.fits(len(tokens) + max_tokens, guard):
        return max_tokens
    return _what_fits(len(tokens), params.max_tokens, max_tokens, scheduler, guard)


def _what_fits(num_tokens: int, asked: int | None, room: int, scheduler: Scheduler, guard: Any) -> int:
    """Without `asked`, as many tokens as the memory for states can hold. Raises: RequestError when that is none."""
    if asked is None:
        fitting = bisect.bisect_left(range(1, room + 1), True, key=lambda n: not scheduler.fits(num_tokens + n, guard))
        if fitting:
            return fitting
    wanted = asked or 1
    needs = scheduler.cost(num_tokens + wanted) + scheduler.cost.of_guard(guard, num_tokens + wanted)
    raise RequestError(
        f"This engine keeps at most {scheduler.max_bytes:,} bytes of states, and a request of {num_tokens + wanted} "
        f"tokens ({num_tokens} in the messages, {wanted} in the completion) needs "
        f"{needs:,}. Please reduce the length of the messages or completion, or raise "
        "max_state_bytes.",
        param="max_tokens" if scheduler.fits(num_tokens + 1, guard) else "messages",
        code="context_length_exceeded",
    )


def check_limits(context_limit: int | None, gap_s: float | None, **counts: int) -> None:
    """Raises: ConfigError for an engine's limits that are no whole numbers, or that would let nothing run."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, but it counts requests or tokens. Give a whole number.")
    if context_limit is not None and context_limit < 2:
        raise ConfigError(
            f"context_limit is {context_limit}, and a request has at least one token of prompt and one of output. Set "
            "it to 2 or more, or leave it out for all that the model can read."
        )
    if gap_s is not None and not gap_s > 0:
        raise ConfigError(
            f"gap_s is {gap_s}, but it is how long a step may take while others decode. Give seconds above 0, or None "
            "for steps of any length."
        )


def check_priority(priority: int) -> None:
    """Raises: RequestError for a priority that does not order."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise RequestError(
            f"Invalid priority value {priority!r}: expected a whole number, higher for what goes first.",
            param="priority",
        )


def check_timeout(timeout_s: float | None) -> None:
    """Raises: RequestError for a deadline that has passed already."""
    if timeout_s is not None and not timeout_s > 0:
        raise RequestError(
            f"timeout_s is {timeout_s}, so the request would end before it began. Give seconds above 0.",
            param="timeout_s",
        )
