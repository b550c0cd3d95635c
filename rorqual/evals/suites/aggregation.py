"""S-AGG: exact answers that need the whole text."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from rorqual.data.tasks.aggregation import MAX_WORDS, AggregationFamily
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item, Size
from rorqual.data.tasks.needle import estimate_tokens
from rorqual.evals.context_metrics import area_over_log_length, cells
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

LENGTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (128, 256),
    "small": (256, 512, 1024, 2048),
    "full": (1024, 4096, 16384, 32768),
}
_COUNTED = re.compile(r"(?:bought a|saw a \w+|packed the|unpacked the) (\w+)\.")


class AggregationSuite(Suite):
    """Frequencies, counts, differences of lists and sums."""

    name = "aggregation"
    max_tokens = 320
    answer_words = MAX_WORDS  # of lists
    sizes = {"tiny": 16, "small": 240, "full": 2000}
    strata = ("kind", "length", "mode")

    def build_family(self) -> AggregationFamily:
        lengths = self.setting.lengths or LENGTHS[self.setting.size]
        return AggregationFamily(lengths=lengths, count_tokens=self.setting.count_tokens or estimate_tokens)

    def programs(self) -> dict[str, Program]:
        def found(item: Item) -> list[str]:
            text = str(item.messages[-1]["content"]).rpartition("\n\n")[0]
            if item.stratum["kind"] == "sum":
                return re.findall(r"paid (\d+)", text) or [IDK]
            return _COUNTED.findall(text) or [IDK]

        def count(item: Item, rng: random.Random) -> str:
            """Counts words without reading the question: right where the most frequent word is asked for."""
            if item.stratum["kind"] == "sum":
                return say(item, str(sum(int(n) for n in found(item) if n.isdigit())))
            if item.stratum["kind"] == "count":
                return say(item, str(len(found(item))))
            return say(item, Counter(found(item)).most_common(1)[0][0])

        return {
            "random": lambda item, rng: say(item, rng.choice(found(item))),
            "recency": lambda item, rng: say(item, found(item)[-1]),
            "count-all": count,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        by_kind = cells((r.item.stratum["kind"], r.passed) for r in rows)
        return {
            "EM": Figure.of_share(r.passed for r in rows),
            **{f"EM_{kind.upper().replace('-', '_')}": Figure(c.value, c) for kind, c in sorted(by_kind.items())},
            "AUC_LENGTH": Figure(area_over_log_length(cells((r.item.stratum["length"], r.passed) for r in rows))),
            **spent(rows, price),
        }
