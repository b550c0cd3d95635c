"""S-HOP: right answers by the number of steps, the spread of the lines, and length."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item, Size
from rorqual.data.tasks.hop import HopFamily
from rorqual.data.tasks.needle import estimate_tokens
from rorqual.evals.context_metrics import cells, flatness
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

LENGTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (128, 256),
    "small": (256, 512, 1024, 2048),
    "full": (1024, 4096, 16384, 32768),
}


class HopSuite(Suite):
    """Four kinds of questions over 1 to 8 steps."""

    name = "hop"
    max_tokens = 256
    sizes = {"tiny": 24, "small": 288, "full": 2016}
    strata = ("kind", "hops", "spread", "length", "mode")

    def build_family(self) -> HopFamily:
        lengths = self.setting.lengths or LENGTHS[self.setting.size]
        return HopFamily(lengths=lengths, count_tokens=self.setting.count_tokens or estimate_tokens)

    def programs(self) -> dict[str, Program]:
        def named(item: Item) -> list[str]:
            """Everything in the text that could be the answer, in order."""
            text = str(item.messages[-1]["content"]).rpartition("\n\n")[0]
            pattern = "|".join(rf"\b{re.escape(c)}\b" for c in item.meta["candidates"]) or r"\b\d{4}\b"
            return re.findall(pattern, text) or [IDK]

        def search(item: Item, rng: random.Random) -> str:
            """One step: what stands last in a line that holds a name of the question."""
            text, _, question = str(item.messages[-1]["content"]).rpartition("\n\n")
            names = re.findall(r"[A-Za-z]{4,}", question)
            lines = [line for line in text.split("\n") if any(name in line for name in names[-3:])]
            return say(item, re.findall(r"[\w-]+", lines[-1])[-1] if lines else IDK)

        return {
            "random": lambda item, rng: say(item, rng.choice(named(item))),
            "recency": lambda item, rng: say(item, named(item)[-1]),
            "search": search,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        by_hops = cells((r.item.stratum["hops"], r.passed) for r in rows)
        return {
            "EM": Figure.of_share(_last_word(r) == str(r.item.meta["value"]).casefold() for r in rows),
            "STRICT": Figure.of_share(r.passed for r in rows),
            **{f"EM@{hops}": Figure(cell.value, cell) for hops, cell in sorted(by_hops.items())},
            "SPREAD_FLATNESS": Figure(flatness(cells((r.item.stratum["spread"], r.passed) for r in rows))),
            **spent(rows, price),
        }


def _last_word(row: Row) -> str | None:
    found = re.findall(r"\w+", row.answer.casefold())
    value = str(row.item.meta["value"]).casefold()
    # an answer may end in the thing asked about, "Velmar has the red lantern of Tor": its subject counts too
    return value if found and value in (found[-1], found[0]) else (found[-1] if found else None)
