"""S-MRCR: the n-th of look-alike replies, scored as PREFIX times BODY."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from rorqual.data.tasks.base import Item, Size
from rorqual.data.tasks.mrcr import MrcrFamily, parts_of_score
from rorqual.evals.economy import PriceVector
from rorqual.evals.statistics import bootstrap_mean
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

LENGTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (256, 384),
    "small": (512, 1024, 2048, 4096),
    "full": (4096, 8192, 16384, 32768),
}
_ASKED = re.compile(r"Prepend (\w+) to the (\w+) ([\w ]+) about ([\w ]+)\. Write")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_BOOTSTRAP_SEED = 0


class MrcrSuite(Suite):
    """The baseline `search` counts the requests and copies the reply: it shows what the text alone gives away."""

    name = "mrcr"
    answer_words = None
    max_tokens = 512
    sizes = {"tiny": 6, "small": 120, "full": 1200}
    strata: tuple[str, ...] = ("needles", "length", "asked", "mode")

    def build_family(self) -> MrcrFamily:
        needles = (2, 4) if self.setting.size == "tiny" else (2, 4, 8)
        return MrcrFamily(lengths=self.setting.lengths or LENGTHS[self.setting.size], needles=needles)

    def programs(self) -> dict[str, Program]:
        def replies(item: Item) -> tuple[str, int, list[str]]:
            """The string, the number asked for (from 0), and the replies to the requests of that form and topic."""
            asked = _ASKED.search(str(item.messages[-1]["content"]))
            assert asked is not None
            request = f"Write a {asked[3]} about {asked[4]}."
            pairs = zip(item.messages[::2], item.messages[1::2], strict=False)
            found = [str(reply["content"]) for user, reply in pairs if user["content"] == request]
            return asked[1], _ORDINALS.index(asked[2]), found

        def pick(item: Item, number: int | None) -> str:
            prefix, asked, found = replies(item)
            return say(item, prefix + found[asked if number is None else number])

        def by_chance(item: Item, rng: random.Random) -> str:
            return pick(item, rng.randrange(len(replies(item)[2])))

        return {
            "majority": lambda item, rng: pick(item, 0),
            "random": by_chance,
            "recency": lambda item, rng: pick(item, -1),
            "search": lambda item, rng: pick(item, None),
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        parts = [parts_of_score(r.item, r.text) for r in rows]
        scores, bodies = [prefix * body for prefix, body in parts], [body for _, body in parts]
        return {
            "MRCR": _mean(scores),
            "PREFIX": Figure.of_share(prefix for prefix, _ in parts),
            "BODY": _mean(bodies),
            "EM": Figure.of_share(r.passed for r in rows),
            **spent(rows, price),
        }

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
        """The mean score beside the share of exact replies."""
        out = super().cells(rows)
        for key, table in out.items():
            for value, cell in table.items():
                here = [
                    p * b
                    for r in rows
                    if str(r.item.stratum[key]) == value
                    for p, b in [parts_of_score(r.item, r.text)]
                ]
                cell["MRCR"] = sum(here) / len(here)
        return out


def _mean(values: Sequence[float]) -> Figure:
    interval = bootstrap_mean(values, seed=_BOOTSTRAP_SEED)
    return Figure(None if interval is None else interval.value, interval)
