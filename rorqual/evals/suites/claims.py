"""S-CLAIM: what answers from given sources claim, cite and quote."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item
from rorqual.data.tasks.claim_faults import corrupt
from rorqual.data.tasks.claims import ClaimsFamily
from rorqual.evals import metrics as m
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent

_SOURCE = re.compile(r"^\[(\d+)\] (.*)$", re.MULTILINE)


class ClaimsSuite(Suite):
    """One to five claims an answer, and questions that the sources do not answer."""

    name = "claims"
    answer_words = None
    max_tokens = 400
    sizes = {"tiny": 12, "small": 240, "full": 2400}
    strata = ("claims", "people", "sources", "mode")
    family: ClaimsFamily

    def build_family(self) -> ClaimsFamily:
        return ClaimsFamily(self.setting.world)

    def programs(self) -> dict[str, Program]:
        def sources(item: Item) -> list[tuple[str, str]]:
            return _SOURCE.findall(str(item.messages[-1]["content"]))

        def quoted(pairs: Sequence[tuple[str, str]]) -> str:
            return "\n".join(f'{text} [{number}] "{text}"' for number, text in pairs) or IDK

        def search(item: Item, rng: random.Random) -> str:
            """Repeats every source that names the person asked about."""
            question = str(item.messages[-1]["content"]).rpartition("\n\n")[2]
            name = re.search(r" of (\w+ \w+)\?", question)
            return say(item, quoted([pair for pair in sources(item) if name and name[1] in pair[1]]))

        def contradicted(item: Item, rng: random.Random) -> str:
            """Right answers with a wrong value: what a fluent answerer without the sources looks like."""
            if not item.meta["attributes"]:
                return say(item, f"{item.meta['name']} works as a baker.")
            return say(item, corrupt(self.family, item, "contradicted", rng)[0])

        return {
            "random": lambda item, rng: say(item, quoted([rng.choice(sources(item))])),
            "recency": lambda item, rng: say(item, quoted(sources(item)[-1:])),
            "search": search,
            "always-answer": contradicted,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        wanted = [r for r in rows if r.item.meta["attributes"]]
        judged = [self.family.judge(r.item, r.answer) for r in wanted if r.grade != "A"]
        claims = [claim for one in judged for claim in one.claims]
        supported = [c for c in claims if c.support == "supported"]
        precision = Figure.of_share(c.support == "supported" for c in claims)
        found = sum(min(one.found, one.wanted) for one in judged)
        recall = m.share(found, sum(len(r.item.meta["attributes"]) for r in wanted))
        both = None if precision.value is None or recall is None else m.harmonic_mean(precision.value, recall)
        citations, quotes = sum(len(c.cited) for c in claims), sum(len(c.quotes) for c in claims)
        return {
            "CLAIM_P": precision,
            "CLAIM_R@K": Figure(recall),
            "CLAIM_F1@K": Figure(both),
            "CITE_P": Figure(m.share(sum(len(c.backing) for c in claims), citations)),
            "CITE_R": Figure.of_share(bool(c.backing) for c in supported),
            "QUOTE": Figure(m.share(sum(c.exact_quotes for c in claims), quotes)),
            "CONTRADICTED": Figure.of_share(c.support == "contradicted" for c in claims),
            "ACC": Figure.of_share(r.passed for r in wanted),
            "ABSTAIN": Figure.of_share(r.passed for r in rows if not r.item.meta["attributes"]),
            **spent(rows, price),
        }
