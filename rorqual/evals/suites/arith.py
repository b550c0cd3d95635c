"""S-ARITH: exact arithmetic of known least derivation length, and how many tokens are spent on it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import chain, islice
from statistics import median
from typing import Any

from rorqual.data.tasks.arith import ArithFamily
from rorqual.data.tasks.arith_limits import UNSOLVABLE, ArithLimitsFamily
from rorqual.data.tasks.base import Grade, Item, Split
from rorqual.evals.economy import PriceVector, output_tokens, overthinking
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

_NUMBER = re.compile(r"-?\d+")
_LIMITS = ArithLimitsFamily()


class ArithSuite(Suite):
    """`d`, the number of steps of the shortest derivation, is the stratum to read results by. Every second question is
    one at the limits: without an answer, or of the same form with one.
    """

    name = "arith"
    max_tokens = 320
    sizes = {"tiny": 60, "small": 800, "full": 8000}
    strata: tuple[str, ...] = ("kind", "d", "digits", "beyond_training", "mode")

    def build_family(self) -> ArithFamily:
        return ArithFamily()

    @property
    def version(self) -> str:
        return "+".join((self.family.version, *(family.version for family in self.others())))

    def others(self) -> list[ArithLimitsFamily]:
        """Families whose items stand between those of the first."""
        return [_LIMITS]

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "others": [family.spec() for family in self.others()]}

    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        count = self.sizes[self.setting.size] if count is None else count
        kinds = (family.items(split, seed) for family in (self.family, *self.others()))
        return list(islice(chain.from_iterable(zip(*kinds, strict=False)), count))

    def grade(self, item: Item, text: str) -> Grade:
        return (_LIMITS if item.family == _LIMITS.name else self.family).grade(item, text)

    def programs(self) -> dict[str, Program]:
        def numbers(item: Item) -> list[str]:
            return _NUMBER.findall(str(item.messages[-1]["content"])) or ["0"]

        def guess(item: Item, rng: random.Random) -> str:
            """A number with as many digits as the longest in the question."""
            width = max(len(n.lstrip("-")) for n in numbers(item))
            return say(item, str(rng.randrange(10 ** (width - 1) if width > 1 else 0, 10**width)))

        return {
            "majority": lambda item, rng: say(item, "0"),
            "random": guess,
            "recency": lambda item, rng: say(item, numbers(item)[-1]),
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        count = self.setting.count_tokens
        solved = [r for r in rows if r.passed and r.usage.completion]
        # the gold output holds the shortest derivation; one token more ends it
        pairs = [] if count is None else [(output_tokens(r.usage), count(r.item.gold) + 1) for r in solved]
        known = [r for r in rows if r.item.stratum["kind"] not in UNSOLVABLE]
        limits = [r for r in rows if r.item.family == _LIMITS.name]
        out = {
            "EM": Figure.of_share(_last_number(r) == str(r.item.meta.get("value")) for r in known),
            "STRICT": Figure.of_share(r.passed for r in rows),
            "EM_BEYOND": Figure.of_share(r.passed for r in rows if r.item.stratum.get("beyond_training")),
            "OVT": Figure(overthinking(pairs)),
        }
        return out | (_at_limits(limits) if limits else {}) | spent(rows, price)


def _at_limits(rows: Sequence[Row]) -> Figures:
    """HR_U: answered although there is no answer; beside it OVER, declined although there is one, and EM_LIMITS of
    those. TOKENS_IMPOSSIBLE: median tokens of the former over the latter's (row T5 of the specification).
    """
    hopeless = [r for r in rows if r.item.stratum["kind"] in UNSOLVABLE]
    solvable = [r for r in rows if r.item.stratum["kind"] not in UNSOLVABLE]
    spent_on = [[output_tokens(r.usage) for r in part] for part in (hopeless, solvable)]
    is_known = all(spent_on) and median(spent_on[1]) > 0
    return {
        "HR_U": Figure.of_share(r.grade != "A" for r in hopeless),
        "OVER": Figure.of_share(r.grade == "A" for r in solvable),
        "EM_LIMITS": Figure.of_share(r.passed for r in solvable),
        "TOKENS_IMPOSSIBLE": Figure(median(spent_on[0]) / median(spent_on[1]) if is_known else None),
    }


def _last_number(row: Row) -> str | None:
    found = _NUMBER.findall(row.answer)
    return found[-1] if found else None
