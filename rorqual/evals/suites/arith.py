"""S-ARITH: exact arithmetic of known least derivation length, and how many tokens are spent on it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rorqual.data.tasks.arith import ArithFamily
from rorqual.data.tasks.base import Item
from rorqual.evals.economy import PriceVector, output_tokens, overthinking
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

_NUMBER = re.compile(r"-?\d+")


class ArithSuite(Suite):
    """`d`, the number of steps of the shortest derivation, is the stratum to read results by."""

    name = "arith"
    max_tokens = 320
    sizes = {"tiny": 32, "small": 400, "full": 4000}
    strata: tuple[str, ...] = ("kind", "d", "digits", "beyond_training", "mode")

    def build_family(self) -> ArithFamily:
        return ArithFamily()

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
        return {
            "EM": Figure.of_share(_last_number(r) == str(r.item.meta.get("value")) for r in rows),
            "STRICT": Figure.of_share(r.passed for r in rows),
            "EM_BEYOND": Figure.of_share(r.passed for r in rows if r.item.stratum.get("beyond_training")),
            "OVT": Figure(overthinking(pairs)),
            **spent(rows, price),
        }


def _last_number(row: Row) -> str | None:
    found = _NUMBER.findall(row.answer)
    return found[-1] if found else None
