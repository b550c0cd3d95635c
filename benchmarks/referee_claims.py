"""How the referee does on claims whose faults are known (S-CLAIM): caught, false alarms, harm, and tokens spent.

    python benchmarks/referee_claims.py
    python benchmarks/referee_claims.py --quick --json

Right answers from numbered sources, and the same with one fault put in. First the words alone judge, and no model is
asked; then a judge over HTTP whose errors are drawn at known rates, so that what comes out can be held against what
two votes of three make of them: a fault that words suspect is caught at 1 - miss^2, another one at (1 - miss)^2, and a
right claim is an alarm at alarm^2. The judge is scripted: this measures the referee's procedure, not a judge's reading.

`caught`: any confirmed finding. `harm`: an answer that was right and goes out wrong. `VER`: tokens that judging and
repairing had written, over those of the answer. Source: the specification's 8.8, rows F2 to F4 (targets: 95 % caught,
2 % false alarms, harm 0.2 %, VER 0.15 at the median and 0.5 at the 95th percentile).
"""

import argparse
import asyncio
import random
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from claim_judge import ClaimJudge
from measure import note, print_line

from rorqual.data.tasks import World
from rorqual.data.tasks.base import completion
from rorqual.data.tasks.claim_faults import FAULTS, corrupt
from rorqual.data.tasks.claims import ClaimsFamily
from rorqual.referee import Answer, Asked, Evidence, Options, Policy, Referee, Verdict
from rorqual.referee.check_claims import read_claims
from rorqual.referee.judge_url import JudgeServer
from rorqual.referee.policy import BudgetBody

JUDGES = ((None, None), (0.0, 0.0), (0.05, 0.05), (0.1, 0.05), (0.2, 0.1), (0.3, 0.2))
CLAIM_FAULTS = ("unsupported", "contradicted")
CHECKS = ("citations", "claims")


class Bench:
    """One judge over all items. miss, alarm: None where no judge is asked."""

    def __init__(self, family: ClaimsFamily, miss: float | None, alarm: float | None, seed: int) -> None:
        self.family, self.miss, self.alarm, self.seed = family, miss, alarm, seed
        self.judge = ClaimJudge(lambda said: "supported", miss or 0.0, alarm or 0.0, seed=seed)
        self.caught: dict[str, Counter[bool]] = defaultdict(Counter)
        self.expected: dict[str, float] = defaultdict(float)
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.grades: dict[str, Counter[str]] = defaultdict(Counter)
        self.calls: Counter[str] = Counter()

    async def run(self, items: list[Any], server: JudgeServer | None) -> None:
        referee = Referee(judge=None if server is None else server.judge)
        for item in items:
            for fault in (*FAULTS, "clean"):
                await self.one(referee, server, item, fault)

    async def one(self, referee: Referee, server: JudgeServer | None, item: Any, fault: Any) -> None:
        draw = random.Random(f"{self.seed} {item.id} {fault}")
        text, place = corrupt(self.family, item, fault, draw)
        right, _ = corrupt(self.family, item, "clean", draw)
        lines = right.split("\n")
        self.judge.truth = lambda said: self.support(item, said)
        self.judge.right = lambda said: lines[min(place or 0, len(lines) - 1)]
        evidence = tuple(Evidence(str(fact.source), fact.sentence) for fact in self.family.facts_of(item))
        asked = Asked({"model": "m", "messages": list(item.messages)})
        budget = BudgetBody(max_rounds=2, token_ratio=0.5, wall_ms=60_000)
        options = Options("enforce", Policy(), CHECKS, budget, evidence)
        usage = {"prompt_tokens": len(asked.context) // 4, "completion_tokens": len(text) // 4}
        answer = Answer(text, finish="stop", usage=usage)
        ask = None if server is None else server.ask
        verdict = await referee.judge_answer(asked, answer, options, ask)  # type: ignore[arg-type]  # reads any mapping
        self.note(item, fault, text, asked, answer, evidence, verdict)

    def note(
        self, item: Any, fault: str, text: str, asked: Asked, answer: Answer, evidence: Any, verdict: Verdict
    ) -> None:
        codes = {one.code for one in verdict.findings} | {c for one in verdict.rounds_asked for c in one["codes"]}
        self.caught[fault][bool(codes - {"claim_suspected"})] += 1
        self.ratios[fault].append(verdict.spent.get("completion_tokens", 0) / (len(text) // 4))
        self.calls[fault] += (verdict.judging or {}).get("calls", 0)
        content = "" if verdict.answer is None else verdict.answer.content or ""
        before = self.family.grade(item, completion(item.thinking_mode, "", text)).grade
        after = self.family.grade(item, completion(item.thinking_mode, "", content)).grade
        self.grades[fault][f"{before}>{'A' if verdict.word == 'abstained' else after}"] += 1
        self.expected[fault] += self.predicted(item, asked, answer, evidence)

    def support(self, item: Any, said: str) -> str:
        claims = self.family.judge(item, said).claims
        return claims[0].support if claims else "not found"

    def predicted(self, item: Any, asked: Asked, answer: Answer, evidence: Any) -> float:
        """The chance that the claims of an answer are found against, by the votes."""
        if self.miss is None or self.alarm is None:
            return 0.0
        sheet, none = read_claims(asked, answer, evidence), 1.0
        for claim, reading in zip(sheet.claims, sheet.readings, strict=True):
            if reading.support == "supported":
                continue
            against = self.alarm if self.support(item, claim.said) == "supported" else 1 - self.miss
            votes = 1 - (1 - against) ** 2 if reading.is_suspected else against**2
            none *= 1 - (1.0 if reading.support == "contradicted" else votes)
        return 1 - none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="100 questions instead of 1,000")
    parser.add_argument("--questions", type=int, help="how many instead of 1,000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    family = ClaimsFamily(World.build())
    count = options.questions or (100 if options.quick else 1000)
    made = (family.make_item(random.Random(f"{options.seed} {i}"), "test", i) for i in range(6 * count // 5))
    items = [item for item in made if item.meta["attributes"]]
    for miss, alarm in JUDGES:
        bench = Bench(family, miss, alarm, options.seed)
        if miss is None:
            asyncio.run(bench.run(items, None))
        else:
            http = bench.judge.serve()
            server = JudgeServer(f"http://127.0.0.1:{http.server_address[1]}", "judge")
            asyncio.run(bench.run(items, server))
            server.close()
            http.shutdown()
        case = f"{len(items)}/{'words-alone' if miss is None else f'miss-{miss:g}-alarm-{alarm:g}'}/1t/-"
        note(case)
        tell(bench, case, options.json)


def tell(bench: Bench, case: str, as_json: bool) -> None:
    def line(name: str, unit: str, ours: float, **config: Any) -> None:
        empty = {"peer": None, "peer_name": "none", "ratio": None, "bound": None, "bound_share": None}
        told = {"name": name, "case": case, "unit": unit, "ours": ours, **empty}
        print_line({**told, "spread": {"ours": [], "peer": []}, "config": config}, as_json=as_json)

    def share(fault: str) -> float:
        return 100 * bench.caught[fault][True] / bench.caught[fault].total()

    def predicted(fault: str) -> float:
        return 100 * bench.expected[fault] / bench.caught[fault].total()

    by_fault = {fault: round(share(fault), 2) for fault in FAULTS}
    faults = statistics.mean(share(fault) for fault in CLAIM_FAULTS)
    expected = statistics.mean(predicted(fault) for fault in CLAIM_FAULTS)
    line("claims_catch", "% of claim faults", faults, predicted=round(expected, 2), by_fault=by_fault)
    line("claims_false_alarm", "% of clean answers", share("clean"), predicted=round(predicted("clean"), 2))
    clean = bench.grades["clean"]
    line("claims_harm", "% of right answers", 100 * clean["C>I"] / clean.total(), grades=dict(clean))
    repaired = bench.grades["contradicted"]
    cured = 100 * repaired["I>C"] / repaired.total()
    line("claims_repair", "% of contradicted, right after", cured, grades=dict(repaired))
    for name, kinds in (("clean", ("clean",)), ("all", (*FAULTS, "clean"))):
        ratios = sorted(ratio for kind in kinds for ratio in bench.ratios[kind])
        p95 = ratios[min(len(ratios) - 1, int(0.95 * len(ratios)))]
        calls = sum(bench.calls[kind] for kind in kinds) / len(ratios)
        line(f"claims_ver_{name}", "VER at p50", statistics.median(ratios), p95=round(p95, 3), calls=round(calls, 2))


if __name__ == "__main__":
    main()
