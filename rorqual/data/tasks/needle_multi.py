"""S-NEEDLE with several answers: the values of several keys, or all values of one key, in any order.

Source: evaluation specification, section 4.2 (multi-query, multi-value). An answer is right when the values it names
are exactly those that were asked for.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, candidates_in, code_values_in, final_answer, is_abstention, is_hedged
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    Turn,
    completion,
    correct,
    maybe_system,
    random_mode,
    render_document,
    turns_to_messages,
    wrong,
)
from rorqual.data.tasks.needle import HAYSTACKS, VALUE_KINDS, Haystack, Needle, NeedleFamily

MULTI_TASKS = ("multi-query", "multi-value")
MAX_WORDS = 60


class MultiNeedleFamily(NeedleFamily):
    """Two to four values in one answer."""

    name = "needle"  # keys and splits are those of the single needles
    version = "multi-1"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "tasks": MULTI_TASKS}

    def _several(
        self, rng: random.Random, split: Split, task: str, kind: str, length: int, depth: float | None
    ) -> tuple[Haystack, list[Needle]]:
        """A haystack and the needles whose values are asked for."""
        value_kind, count = rng.choice(VALUE_KINDS), rng.choice((2, 3))
        hay = self.haystack(
            rng, split, kind=kind, length=length, value_kind=value_kind, num_needles=count + 1, depth=depth
        )
        asked = list(hay.needles[:count])
        if task == "multi-value":
            # the same key for all: each line adds a value, none replaces one
            text, key = hay.text, asked[0].key
            same = [replace(needle, key=key) for needle in asked]
            for old, new in zip(asked, same, strict=True):
                text = text.replace(old.line(), new.line())
            hay = replace(hay, text=text)
            asked = same
        return hay, asked

    def _turn(self, hay: Haystack, asked: list[Needle], task: str) -> Turn:
        label = asked[0].label
        if task == "multi-value":
            values = _listed([n.value for n in asked])
            question = f"What are the {label}s of {asked[0].key}? Name all."
            answer = f"The {label}s of {asked[0].key} are {values}."
        else:
            question = f"What are the {label}s of {_listed([n.key for n in asked])}?"
            answer = " ".join(n.answer() for n in asked)
        reasoning = "The text says: " + " ".join(n.line() for n in asked)
        return Turn(f"{hay.text}\n\n{question}", reasoning, answer)

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode, task = random_mode(rng), rng.choice(MULTI_TASKS)
        hay, asked = self._several(rng, "train", task, rng.choice(HAYSTACKS), rng.choice(self.lengths), None)
        turn = self._turn(hay, asked, task)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        return self.item(
            rng, split, index, mode=random_mode(rng), task=MULTI_TASKS[index % 2], kind=rng.choice(HAYSTACKS),
            length=self.lengths[index % len(self.lengths)], depth=rng.randrange(16) / 15,
        )  # fmt: skip

    def item(
        self,
        rng: random.Random,
        split: Split,
        index: int,
        *,
        mode: Any,
        task: str,
        kind: str,
        length: int,
        depth: float,
    ) -> Item:
        hay, asked = self._several(rng, split, task, kind, length, depth)
        turn = self._turn(hay, asked, task)
        stratum = {
            "task": task, "haystack": kind, "value": hay.value_kind, "length": length, "depth": round(depth, 3),
            "mode": mode,
        }  # fmt: skip
        meta = {
            "value": [n.value for n in asked],
            "others": [hay.needles[-1].value],
            "reasoning": turn.reasoning,
            "needle_offset": hay.text.find(asked[0].line()),
            "tokens_estimate": hay.tokens,
        }
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """The set of values named equals the set asked for; P when some of them are named and nothing else."""
        answer, gold = final_answer(output_text, item.thinking_mode), sorted(item.meta["value"])
        if is_abstention(answer):
            return Grade("A", 0.0, None, "abstained on a known answer")
        is_word = item.stratum["value"] == "word"
        found = sorted(candidates_in(answer, words.NOUNS) if is_word else set(code_values_in(answer)))
        if len(answer.split()) > MAX_WORDS:
            return wrong(found, f"longer than {MAX_WORDS} words")
        if is_hedged(answer):
            return wrong(found, "hedged or negated")
        if found == gold:
            return correct(found)
        if found and set(found) < set(gold):
            return Grade("P", len(found) / len(gold) / 2, found, f"{len(found)} of {len(gold)} values")
        return wrong(found, f"expected {gold}")

    def adversary(self, item: Item) -> list[str]:
        mode, values, other = item.thinking_mode, item.meta["value"], item.meta["others"][0]
        question = str(item.messages[-1]["content"]).rsplit("\n", 1)[-1]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""), say(question), say(IDK), say(values[0]), say(" or ".join(values)), say("Not " + ", ".join(values)),
            say(", ".join([*values, other])), say(", ".join([*values[:-1], other])),
            say(str(item.messages[-1]["content"])),
        ]  # fmt: skip
        if mode == "thinking":
            outputs += [f"{', '.join(values)}", f"{', '.join(values)}</think>"]
        return outputs


def _listed(words_: list[str]) -> str:
    return ", ".join(words_[:-1]) + " and " + words_[-1]
