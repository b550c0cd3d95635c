"""S-NEEDLE: recall by length, depth and phase, against what a search program recalls."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rorqual.chat import encode_messages
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Grade, Item, Size, Split
from rorqual.data.tasks.needle import HAYSTACKS, TASKS, NeedleFamily, estimate_tokens
from rorqual.data.tasks.needle_multi import MAX_WORDS, MULTI_TASKS, MultiNeedleFamily
from rorqual.evals.context_metrics import area_over_log_length, cells, flatness, reliable_length
from rorqual.evals.economy import PriceVector
from rorqual.evals.records import Sampling
from rorqual.evals.statistics import bootstrap_mean
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, question_of, say, spent
from rorqual.evals.targets.base import Answer, Prompt, Target
from rorqual.seeds import derive

DEPTHS = 16
STRIDE = 4
"""Raw tokens of an entry (`m`): phases are told modulo it."""

LENGTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (128, 256, 512),
    "small": (256, 512, 1024, 2048, 4096),
    "full": (1024, 2048, 4096, 8192, 16384, 32768),
}
L_EFF_FLOOR = 0.8
_PLANTED = re.compile(r"The (\w+) of (\w+) is (?:now )?([\w-]+)\.")
_ASKED = re.compile(r"What (?:is|are) the \w+ of (.+)\?")


class NeedleSuite(Suite):
    """Cells of length x depth in a shuffled order, so that any number of items covers the grid evenly; every phase of
    needle and prompt modulo the entries' stride takes its turn where the tokenizer is known.
    """

    name = "needle"
    max_tokens = 128
    answer_words = MAX_WORDS  # of several values
    sizes = {"tiny": 24, "small": 320, "full": 3072}
    strata = ("task", "haystack", "value", "length", "depth", "phase_needle", "phase_prompt", "mode")

    def build_family(self) -> MultiNeedleFamily:
        count = self.setting.count_tokens or estimate_tokens
        self.lengths = self.setting.lengths or LENGTHS[self.setting.size]
        self.single = NeedleFamily(self.setting.world, lengths=self.lengths, count_tokens=count)
        return MultiNeedleFamily(self.setting.world, lengths=self.lengths, count_tokens=count)

    @property
    def version(self) -> str:
        return f"{self.single.version}+{self.family.version}"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "tasks": [*TASKS, *MULTI_TASKS], "depths": DEPTHS, "stride": STRIDE}

    def items(self, split: Split, seed: int, count: int | None = None) -> list[Item]:
        count = self.sizes[self.setting.size] if count is None else count
        grid = [(length, depth) for length in self.lengths for depth in range(DEPTHS)]
        order = random.Random(derive(seed, "needle-grid"))
        out: list[Item] = []
        while len(out) < count:
            order.shuffle(grid)
            out += [self._item(split, seed, len(out) + i, *cell) for i, cell in enumerate(grid[: count - len(out)])]
        return out

    def _item(self, split: Split, seed: int, index: int, length: int, depth: int) -> Item:
        rng = random.Random(derive(seed, "needle-suite", self.version, split, index))
        tasks = (*TASKS, *MULTI_TASKS)
        task, kind = tasks[index % len(tasks)], HAYSTACKS[index // len(tasks) % len(HAYSTACKS)]
        family = self.family if task in MULTI_TASKS else self.single
        assert isinstance(family, NeedleFamily)
        item = family.item(
            rng, split, index, mode=rng.choice(("chat", "thinking")), task=task, kind=kind, length=length,
            depth=depth / (DEPTHS - 1),
        )  # fmt: skip
        if self.setting.count_tokens is not None:
            item = in_phase(item, self.setting.count_tokens, index % STRIDE, index // STRIDE % STRIDE)
        return item

    def ask(
        self, item: Item, prompt: Prompt, target: Target, sampling: Sampling, *, is_forced: bool
    ) -> tuple[Answer, Grade]:
        """Also whether the indexers chose the needle's entries, where the target can tell."""
        answer, grade = super().ask(item, prompt, target, sampling, is_forced=is_forced)
        if isinstance(item.meta["value"], str):
            found = target.needle_signals(prompt, item.gold, item.meta["value"], item.meta["needle_offset"])
            answer = replace(answer, signals={**answer.signals, **found})
        return answer, grade

    def grade(self, item: Item, text: str) -> Grade:
        return (self.family if item.stratum["task"] in MULTI_TASKS else self.single).grade(item, text)

    def programs(self) -> dict[str, Program]:
        def planted(item: Item) -> list[tuple[str, str]]:
            text = str(item.messages[-1]["content"]).rpartition("\n\n")[0]
            return [(key, value) for _, key, value in _PLANTED.findall(text)]

        def search(item: Item, rng: random.Random) -> str:
            """What stands in the last lines about the keys that the question repeats."""
            asked = _ASKED.search(question_of(item))
            keys = re.findall(r"\w+", asked[1]) if asked else []
            pairs = planted(item)
            if item.stratum["task"] == "multi-value":
                return say(item, ", ".join(value for key, value in pairs if key in keys) or IDK)
            newest = dict(pairs)
            return say(item, ", ".join(newest[key] for key in keys if key in newest) or IDK)

        return {
            "random": lambda item, rng: say(item, rng.choice([value for _, value in planted(item)] or [IDK])),
            "recency": lambda item, rng: say(item, ([value for _, value in planted(item)] or [IDK])[-1]),
            "search": search,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        several = [r for r in rows if r.item.stratum["task"] in MULTI_TASKS]
        there = self.mapped(rows)
        by_length = cells((r.item.stratum["length"], r.passed) for r in there)
        phased = [r for r in there if "phase_needle" in r.item.stratum]
        phases = cells(((r.item.stratum["phase_needle"], r.item.stratum["phase_prompt"]), r.passed) for r in phased)
        reached = reliable_length(by_length, L_EFF_FLOOR)
        return {
            "EM": Figure.of_share(_last_value(r) == _gold_value(r) or r.passed for r in there),
            "STRICT": Figure.of_share(r.passed for r in there),
            "EM_MULTI": Figure.of_share(r.passed for r in several),
            "ABSTAIN": Figure.of_share(r.passed for r in rows if r.item.stratum["task"] == "absent"),
            f"L_EFF@{L_EFF_FLOOR}": Figure(None if reached is None else float(reached)),
            "AUC_LENGTH": Figure(area_over_log_length(by_length)),
            "DEPTH_FLATNESS": Figure(flatness(cells((r.item.stratum["depth"], r.passed) for r in there))),
            "PHASE_FLATNESS": Figure(flatness(phases)),
            "NBH": _mean(there, "nbh"),
            "NBH_FULL": _mean(there, "nbh_full"),
            "NBH_RANDOM": _mean(there, "nbh_random"),
            "NBH_RECENT": _mean(there, "nbh_recent"),
            "BYTES": _mean(there, "bytes_factor"),
            **spent(rows, price),
        }

    def mapped(self, rows: Sequence[Row]) -> list[Row]:
        """Those that one planted value answers: an absent key has no depth, and several values have several."""
        return [r for r in rows if r.item.stratum["task"] not in ("absent", *MULTI_TASKS)]

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
        """NBH beside the share of full scores."""
        out = super().cells(rows)
        for key, table in out.items():
            for value, cell in table.items():
                here = _mean([r for r in rows if str(r.item.stratum.get(key)) == value], "nbh")
                if here.value is not None:
                    cell["NBH"] = here.value
        return out


def _mean(rows: Sequence[Row], signal: str) -> Figure:
    """Mean of a signal over the items that have it, with a bootstrap interval."""
    interval = bootstrap_mean([r.signals[signal] for r in rows if signal in r.signals], seed=0)
    return Figure(None if interval is None else interval.value, interval)


def in_phase(item: Item, count_tokens: Callable[[str], int], needle: int, prompt: int) -> Item:
    """The item padded with plain words until its needle and its prompt lie in the wanted phases, which its stratum
    then tells (as reached: a word can be more than one token).
    """
    message = str(item.messages[-1]["content"])
    text, gap, question = message.rpartition("\n\n")
    offset = item.meta.get("needle_offset")

    def rendered(body: str) -> str:
        last = {"role": "user", "content": body + gap + question}
        return encode_messages([*item.messages[:-1], last], thinking_mode=item.thinking_mode)

    def pad(body: str, at: int, wanted: int, measure: Callable[[str], int]) -> str:
        """Put up to 8 words before character `at` until the measure is right."""
        for words in range(9):
            padded = body[:at] + " ".join(["and"] * words) + ("\n" if words else "") + body[at:]
            if measure(padded) % STRIDE == wanted:
                return padded
        return body

    before = 0
    if offset is not None:
        line = text[offset:].partition("\n")[0]

        def tokens_before(body: str) -> int:
            whole = rendered(body)
            return count_tokens(whole[: whole.rindex(line)])

        text = pad(text, 0, needle, tokens_before)
        before = tokens_before(text)
        offset = text.rindex(line)
    after = len(text) if offset is None else min(len(text), offset + len(line) + 1)
    text = pad(text, after, prompt, lambda body: count_tokens(rendered(body)))
    total = count_tokens(rendered(text))
    stratum = {
        **item.stratum,
        "phase_needle": before % STRIDE if offset is not None else None,
        "phase_prompt": total % STRIDE,
    }
    messages = [*item.messages[:-1], {"role": "user", "content": text + gap + question}]
    return replace(
        item,
        messages=messages,
        stratum=stratum,
        meta={**item.meta, "needle_offset": offset, "prompt_mod_128": total % 128},
    )


def _last_value(row: Row) -> str | None:
    """The last thing an answer names that could be a value: its last word."""
    words = re.findall(r"[\w-]+", row.answer.casefold())
    return words[-1] if words else None


def _gold_value(row: Row) -> str | None:
    value = row.item.meta["value"]
    return value.casefold() if isinstance(value, str) else None
