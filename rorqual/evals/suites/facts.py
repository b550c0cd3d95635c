"""S-FACTS: knowledge and abstention on a checkpoint's world, gate-free and forced."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item, Split
from rorqual.data.tasks.facts_premise import PremiseFactsFamily
from rorqual.evals import metrics as m
from rorqual.evals.economy import PriceVector
from rorqual.evals.statistics import wilson
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, counts, interval_dict, say, spent

RETAINED = ("K-clean", "K-graded")
"""Classes whose people appear in no abstention tuning: retention is told of these alone (specification 4.1, rule 1)."""

PREVALENCES = (0.13, 0.43, 0.80)
LOSSES = (1, 3, 9)
ANNOUNCED = (0.5, 0.75, 0.9)
_CLAUSES: dict[str, str | None] = {
    "plain": None,
    "clause": "If you are not sure of an answer, say that you do not know.",
    **{
        str(t): (
            f"Answer only if you are more than {100 * t:.0f} percent sure. A right answer earns 1 point, a wrong one "
            f"costs {m.loss_of_confidence(t):.0f}, and saying that you do not know earns 0."
        )
        for t in ANNOUNCED
    },
}
"""What the system message announces, by variant (specification 4.1)."""


class FactsSuite(Suite):
    """Items walk through the classes, so K and U classes are equally frequent."""

    name = "facts"
    wants_forced = True
    max_tokens = 160
    sizes = {"tiny": 66, "small": 880, "full": 22_000}
    strata: tuple[str, ...] = ("class", "wording", "attribute", "mode")
    confidence_ids = (
        "AUROC", "AUROC_MEAN", "AURC", "E-AURC", "COV@1", "COV@2", "COV@5", "RET@HR1", "RET@HR5", "HR_REAL@1",
        "HR_REAL@5", "ECE", "BRIER", "LOGLOSS",
    )  # fmt: skip

    def build_family(self) -> PremiseFactsFamily:
        return PremiseFactsFamily(self.setting.world)

    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        """With the option `announce`, each item's system message is one of five, in turns that cover all classes."""
        items = super().items(split, seed, count)
        if not self.setting.options.get("announce"):
            return items
        return [_announced(item, tuple(_CLAUSES)[index % len(_CLAUSES)]) for index, item in enumerate(items)]

    def programs(self) -> dict[str, Program]:
        world = self.setting.world
        common = {
            name: Counter(p.facts[name] for p in world.people if name in p.facts).most_common(1)[0][0]
            for name in world.values
        }

        def values(item: Item) -> Sequence[str]:
            return world.values[item.meta["attribute"]]

        def mentioned(item: Item) -> list[str]:
            text = str(item.messages[-1]["content"])
            return sorted((v for v in values(item) if v in text), key=text.rfind)

        def search(item: Item, rng: random.Random) -> str:
            """The value in a sentence of the prompt that names the person asked about."""
            text, _, question = str(item.messages[-1]["content"]).rpartition("\n\n")
            names = [n for n in _names(text) if n in question]
            hits = [v for s in text.split(". ") for v in values(item) if v in s and any(n in s for n in names)]
            return say(item, hits[-1] if hits else IDK)

        return {
            "majority": lambda item, rng: say(item, common[item.meta["attribute"]]),
            "random": lambda item, rng: say(item, rng.choice(values(item))),
            "recency": lambda item, rng: say(item, (mentioned(item) or [IDK])[-1]),
            "search": search,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        all_counts, unknown = counts(rows), counts(r for r in rows if not _is_known(r.item))
        known = counts(r for r in rows if _is_known(r.item))
        out: Figures = {
            "ACC": _share(m.accuracy(all_counts), all_counts.C, all_counts.n),
            "OI": Figure(m.omniscience_index(all_counts)),
            "HR": _share(m.hallucination_rate(all_counts), all_counts.I, all_counts.I + all_counts.P + all_counts.A),
            "HR_U": _share(m.answered_share(unknown), unknown.C + unknown.P + unknown.I, unknown.n),
            "CGA": Figure(m.correct_given_attempted(all_counts)),
            "F1": Figure(m.f1_of_attempts(all_counts)),
        }
        for loss in LOSSES:
            out[f"U_{loss}"] = Figure(m.utility(all_counts, loss))
        for prevalence in PREVALENCES:
            mixed = m.at_prevalence(known, unknown, prevalence)
            out[f"OI@{100 * prevalence:.0f}"] = Figure(None if mixed is None else m.omniscience_index(mixed))
        for t in ANNOUNCED if self.setting.options.get("announce") else ():
            told = counts(r for r in rows if r.item.stratum["announced"] == str(t))
            out[f"U@{t}"] = Figure(m.utility(told, m.loss_of_confidence(t)))
            out[f"ANSWERED@{t}"] = _share(m.answered_share(told), told.C + told.P + told.I, told.n)
        out |= self._against_forced(rows, forced)
        out |= self.confidence(forced if forced is not None else [r for r in rows if r.grade != "A"])
        return out | spent(rows, price)

    def _against_forced(self, rows: Sequence[Row], forced: Sequence[Row] | None) -> Figures:
        if forced is None:
            return {"RET": Figure(None), "OVER": Figure(None), "RESCUE": Figure(None)}
        by_id = {r.item.id: r for r in forced}
        pairs = [(by_id[r.item.id].grade, r.grade, r.item) for r in rows if r.item.id in by_id]
        clean = [(f, g) for f, g, item in pairs if item.stratum["class"] in RETAINED]
        right = [g == "C" for f, g in clean if f == "C"]
        kept = Figure.of_share(right)
        saved = Figure.of_share(g == "A" for f, g, _ in pairs if f == "I")
        return {"RET": kept, "OVER": Figure(None if kept.value is None else 1 - kept.value), "RESCUE": saved}

    def confidence(self, rows: Sequence[Row]) -> Figures:
        """Quality of the answers' confidence; on the forced run, where every item has an answer."""
        scored = [r for r in rows if r.confidence is not None]
        s, y = [r.confidence or 0.0 for r in scored], [r.grade == "C" for r in scored]
        out = {
            "AUROC": Figure(m.auroc(s, y)),
            "AURC": Figure(m.aurc(s, y)),
            "E-AURC": Figure(m.excess_aurc(s, y)),
            "ECE": Figure(m.expected_calibration_error(s, y)),
            "BRIER": Figure(m.brier(s, y)),
            "LOGLOSS": Figure(m.log_loss(s, y)),
        }
        for percent in (1, 2, 5):
            out[f"COV@{percent}"] = Figure(m.coverage_at_risk(s, y, percent / 100))
        halves = [_half(r.item) for r in scored]
        kept = [r.item.stratum["class"] in RETAINED for r in scored]
        for percent in (1, 5):
            point = m.crossed_retention_at_hr(s, y, halves, percent / 100, kept)
            out[f"RET@HR{percent}"] = Figure(None if point is None else point.ret)
            out[f"HR_REAL@{percent}"] = Figure(None if point is None else point.hr)
        if all("mean_logprob" in r.signals for r in scored):
            out["AUROC_MEAN"] = Figure(m.auroc([r.signals["mean_logprob"] for r in scored], y))
        return out

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
        """Besides the usual ones, ACC, HR, OI or HR_U of each class."""
        out = super().cells(rows)
        if self.setting.options.get("announce"):
            kinds = dict.fromkeys(r.item.stratum["announced"] for r in rows)
            out["announced"] = {
                kind: interval_dict(figure.interval, len(here))
                for kind in kinds
                for here in [[r.passed for r in rows if r.item.stratum["announced"] == kind]]
                for figure in [Figure.of_share(here)]
                if figure.interval is not None
            }
        for name, cell in out["class"].items():
            c = counts(r for r in rows if r.item.stratum["class"] == name)
            if name.startswith("K"):
                cell |= {"ACC": m.accuracy(c), "HR": m.hallucination_rate(c), "OI": m.omniscience_index(c)}
            else:
                cell |= {"HR_U": m.answered_share(c)}
        return out


def _announced(item: Item, variant: str) -> Item:
    """The item under one of `_CLAUSES`."""
    clause = _CLAUSES[variant]
    first = [] if clause is None else [{"role": "system", "content": clause}]
    return replace(item, messages=[*first, *item.messages], stratum={**item.stratum, "announced": variant})


def _is_known(item: Item) -> bool:
    return str(item.stratum["class"]).startswith("K")


def _half(item: Item) -> bool:
    """One of two halves, by the person asked about, so that no person's items are in both."""
    question = str(item.messages[-1]["content"]).rpartition("\n\n")[2]
    name = (_names(question) or [item.id])[-1]
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def _share(value: float | None, part: float, whole: float) -> Figure:
    return Figure(value, None if value is None else wilson(part, whole))


def _names(text: str) -> list[str]:
    """Two capitalised words in a row: how people are named."""
    words = text.replace(",", " ").replace(".", " ").split()
    return [f"{a} {b}" for a, b in zip(words, words[1:], strict=False) if a[:1].isupper() and b[:1].isupper()]
