"""What another round may cost, and whether it is worth it.

A round is worth asking while q · loss > cost: q is how often rounds for that reason have helped so far, loss what a
wrong answer costs in right answers (the profile's loss ratio), and cost the tokens of the round, where a right answer
is worth `WORTH` times the tokens of the first one. Source: the stopping law of the specification, 8.5.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from rorqual.referee.policy import BudgetBody

WORTH: Final = 10.0
LEAST_TOKENS: Final = 1024
"""Tokens that any budget above 0 has: short answers are not worth rationing."""

_PRIOR_FIXED, _PRIOR_TRIED = 1.5, 2.0


class RepairRates:
    """How often asking again cured each reason. Thread-safe."""

    def __init__(self) -> None:
        self._tried: Counter[str] = Counter()
        self._fixed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, codes: Iterable[str], left: Iterable[str]) -> None:
        """A round was asked because of `codes`; `left` are those of its answer."""
        left = set(left)
        with self._lock:
            for code in set(codes):
                self._tried[code] += 1
                self._fixed[code] += code not in left

    def rate(self, code: str) -> float:
        """Of rounds for this reason, the share that cured it; 0.75 before any was asked."""
        return (self._fixed[code] + _PRIOR_FIXED) / (self._tried[code] + _PRIOR_TRIED)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {code: {"tried": self._tried[code], "fixed": self._fixed[code]} for code in sorted(self._tried)}


class Spending:
    """The budget of one request, from its first answer on."""

    def __init__(self, budget: BudgetBody, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._clock = budget, clock
        self._began: float | None = None
        self._generation = 0
        self.rounds = 0
        self.prompt_tokens = self.completion_tokens = self.new_tokens = 0

    def begin(self, usage: tuple[int, int]) -> None:
        """The first answer is there; usage: its prompt and completion tokens."""
        self._began, self._generation = self._clock(), max(1, sum(usage))

    @property
    def tokens(self) -> int:
        """All tokens of rounds."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def left_s(self) -> float:
        """Seconds that rounds may still take."""
        began = self._clock() if self._began is None else self._began
        return self._budget.wall_ms / 1000 - (self._clock() - began)

    def allows(self) -> str | None:
        """None while another round may be asked, else the bound that says no."""
        if self.rounds >= self._budget.max_rounds:
            return "max_rounds"
        most = self._budget.token_ratio * self._generation
        if self._budget.token_ratio == 0 or self.new_tokens >= max(most, LEAST_TOKENS):
            return "token_ratio"
        return "wall_ms" if self.left_s <= 0 else None

    def is_worth(self, rate: float, loss: float, expected_tokens: int) -> bool:
        """The stopping law."""
        return rate * loss > expected_tokens / self._generation / WORTH

    def judged(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A judge was asked; what it read is new, too."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.new_tokens += prompt_tokens + completion_tokens

    def allows_judging(self) -> bool:
        """Whether a judge may still be asked: of tokens and time, whatever the rounds."""
        if self._budget.token_ratio == 0:
            return False
        most = max(self._budget.token_ratio * self._generation, LEAST_TOKENS)
        return self.new_tokens < most and self.left_s > 0

    def spend(self, usage: tuple[int, int], first_prompt: int) -> None:
        """A round was answered. What its prompt has beyond the first one's is new; the rest the upstream has cached."""
        self.rounds += 1
        self.prompt_tokens += usage[0]
        self.completion_tokens += usage[1]
        self.new_tokens += usage[1] + max(0, usage[0] - first_prompt)


def add_usage(total: Mapping[str, Any] | None, more: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Usage objects added, member by member."""
    if not total or not more:
        one = total or more
        return dict(one) if one else None
    out = dict(total)
    for key, value in more.items():
        was = out.get(key)
        if isinstance(value, Mapping):
            out[key] = add_usage(was if isinstance(was, Mapping) else None, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[key] = (was if isinstance(was, int | float) else 0) + value
        elif was is None:
            out[key] = value
    return out
