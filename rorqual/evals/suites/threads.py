"""S-THREAD: what is left of a dialogue when a client changes or drops the reasoning of earlier turns.

A server can only put back what it answered itself, so RESTORED is measured beside the arm `dropped`: the first turn is
asked live, its answer is sent back without reasoning, and the server says for how many messages it put reasoning back.
A model loaded here restores nothing, so there the arm shows what dropping costs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from rorqual.data.tasks.base import Grade, Item
from rorqual.data.tasks.done import calls_text
from rorqual.data.tasks.threads import ARMS, ThreadsFamily
from rorqual.evals import metrics as m
from rorqual.evals.economy import PriceVector
from rorqual.evals.records import Sampling
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, spent
from rorqual.evals.targets.base import Answer, Prompt, Target, TransportError, message_of

_CHOSEN = re.compile(r"I choose the label (\w+)")


class ThreadsSuite(Suite):
    """The arms take turns, so each has as many items."""

    name = "threads"
    answer_words = None
    max_tokens = 256
    sizes = {"tiny": 12, "small": 192, "full": 1200}
    strata = ("arm", "turns")

    def build_family(self) -> ThreadsFamily:
        return ThreadsFamily()

    def ask(
        self, item: Item, prompt: Prompt, target: Target, sampling: Sampling, *, is_forced: bool
    ) -> tuple[Answer, Grade]:
        answer, grade = super().ask(item, prompt, target, sampling, is_forced=is_forced)
        if item.stratum["arm"] == "dropped" and not target.can_force:
            own = {name: value for name, value in answer.signals.items() if name != "restored"}
            answer = replace(answer, signals={**own, **self._restored(prompt, target, sampling)})
        return answer, grade

    def _restored(self, prompt: Prompt, target: Target, sampling: Sampling) -> dict[str, float]:
        """What the server says it restored of its own answer to the first turn; empty when it says nothing."""
        try:
            return self._restored_of(prompt, target, sampling)
        except TransportError:  # the item's own answer stands, and its figure is undefined
            return {}

    def _restored_of(self, prompt: Prompt, target: Target, sampling: Sampling) -> dict[str, float]:
        asked = list(prompt.messages[:1])
        said = message_of(target.answer(replace(prompt, messages=asked), sampling).text, prompt.mode, "call")
        said.pop("reasoning_content", None)
        calls = said.get("tool_calls") or []
        history = [*asked, said]
        history += [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in calls]
        if not calls:
            history.append({"role": "user", "content": "Go on."})
        told = target.answer(replace(prompt, messages=history), sampling).signals
        return {"restored": told["restored"]} if "restored" in told else {}

    def programs(self) -> dict[str, Program]:
        def name_of(item: Item) -> str:
            return next(t["function"]["name"] for t in item.tools or () if t["function"]["name"].startswith("set_"))

        def search(item: Item, rng: random.Random) -> str:
            """The label in any reasoning that came back."""
            text = " ".join(str(m.get("reasoning_content") or "") for m in item.messages)
            found = _CHOSEN.search(" ".join(text.split()))
            return calls_text("thinking", "", [(name_of(item), {"label": found[1] if found else "none"})])

        def last_word(item: Item, rng: random.Random) -> str:
            words = re.findall(r"[a-z]+", " ".join(str(m.get("content") or "") for m in item.messages))
            return calls_text("thinking", "", [(name_of(item), {"label": words[-1]})])

        return {"recency": last_word, "search": search, "always-abstain": abstain}

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        out: Figures = {}
        for arm in ARMS:
            here = [r for r in rows if r.item.stratum["arm"] == arm]
            out[f"ACC_{arm.upper().replace('-', '_')}"] = Figure.of_share(r.passed for r in here)
        dropped = [r for r in rows if r.item.stratum["arm"] == "dropped"]
        told = [r.signals["restored"] for r in dropped if "restored" in r.signals]
        out["RESTORED"] = Figure(sum(told) / len(told) if told else None)
        prompt = sum(r.usage.prompt for r in rows)
        out["CACHE_HIT"] = Figure(m.share(sum(r.usage.cached for r in rows), prompt))
        return out | spent(rows, price)
