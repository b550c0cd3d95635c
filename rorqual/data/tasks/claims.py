"""S-CLAIM: answers of one to five sentences from numbered sources, each claim cited and quoted.

The sources speak of invented people; the question asks for attributes of one of them. Each line of an answer makes one
claim, `Velmar Tor works as a baker. [3] "By trade Velmar Tor is a baker."`, and is judged by what it says of whom,
whether the cited source says it, and whether the quotation is that source word for word. `claim_faults.py` damages
right answers in labelled ways. Source: evaluation specification, section 4.8.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.data.tasks.answers import IDK, candidates_in, final_answer, is_abstention, is_hedged
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    correct,
    maybe_system,
    random_mode,
    render_document,
    turns_to_messages,
    wrong,
)
from rorqual.data.tasks.world import ATTRIBUTES, Attribute, World

Support = Literal["supported", "contradicted", "not found"]
MOST_CLAIMS = 5
_CITED = re.compile(r"\[(\d+)\]")
_QUOTED = re.compile(r'"([^"]*)"')
_BY_NAME = {a.name: a for a in ATTRIBUTES}


@dataclass(frozen=True)
class Fact:
    """What one source says. Sources are numbered from 1."""

    source: int
    name: str
    attribute: str
    value: str
    sentence: str


@dataclass(frozen=True)
class Claim:
    """What one line of an answer says, and how it is backed.

    attribute, value: None when it names no value that the sources' kinds of facts can have.
    """

    text: str
    name: str | None
    attribute: str | None
    value: str | None
    support: Support
    cited: tuple[int, ...]
    backing: tuple[int, ...]
    """The cited sources that do say it."""
    quotes: tuple[str, ...]
    exact_quotes: int
    """Quotations that are a cited source word for word."""


@dataclass(frozen=True)
class Judged:
    """All claims of an answer against its sources; `wanted` is how many the question asks for."""

    claims: tuple[Claim, ...]
    wanted: int
    found: int
    """Different wanted facts among the supported claims."""

    @property
    def supported(self) -> int:
        return sum(c.support == "supported" for c in self.claims)

    @property
    def precision(self) -> float | None:
        """Supported claims over claims made."""
        return self.supported / len(self.claims) if self.claims else None

    @property
    def recall(self) -> float | None:
        """Recall at K: min(supported / K, 1), with each wanted fact counted once, so that empty answers lose."""
        return min(self.found / self.wanted, 1.0) if self.wanted else None


class ClaimsFamily(TaskFamily):
    """Questions over a small closed corpus."""

    name = "claims"
    version = "1"
    abstains_in_reasoning = (r" do not say\b",)

    def __init__(self, world: World) -> None:
        self.world = world
        self._patterns = {attribute: _any_of(values) for attribute, values in world.values.items()}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), **self.world.to_dict(), "claims": MOST_CLAIMS}

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        turn, *_ = self.draw(rng, "train", rng.randint(1, 3), people=1, is_absent=rng.random() < 0.15)
        return render_document(turns_to_messages([turn], mode=mode, system=maybe_system(rng)), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode, wanted = random_mode(rng), index % (MOST_CLAIMS + 1)
        people = 2 + index // (MOST_CLAIMS + 1) % 3
        turn, facts, name, asked = self.draw(rng, split, wanted or 1, people, is_absent=not wanted)
        stratum = {"claims": wanted, "people": people, "sources": len(facts), "mode": mode}
        meta = {
            "name": name,
            "attributes": asked if wanted else [],
            "facts": [[f.source, f.name, f.attribute, f.value, f.sentence] for f in facts],
            "reasoning": turn.reasoning,
        }
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def draw(
        self, rng: random.Random, split: Split, wanted: int, people: int, *, is_absent: bool
    ) -> tuple[Turn, list[Fact], str, list[str]]:
        """Sources about `people` unknown people and a question for `wanted` attributes of one of them."""
        names = list(dict.fromkeys(self.world.fresh_name(rng, split) for _ in range(people)))
        asked = rng.sample([a.name for a in ATTRIBUTES], wanted)
        drawn: list[tuple[str, Attribute]] = []
        for i, name in enumerate(names):
            known = [a for a in ATTRIBUTES if (a.name in asked) != is_absent] if i == 0 else rng.sample(ATTRIBUTES, 3)
            drawn += [(name, attribute) for attribute in known]
        rng.shuffle(drawn)
        facts = []
        for number, (name, attribute) in enumerate(drawn, 1):
            value = rng.choice(self.world.values[attribute.name])
            sentence = rng.choice(attribute.statements).format(name=name, value=value)
            facts.append(Fact(number, name, attribute.name, value, sentence))
        listed = _joined([_BY_NAME[a].note for a in asked])
        question = f'What is the {listed} of {names[0]}? One line for each, with [source] and "quotation".'
        text = "\n".join(f"[{f.source}] {f.sentence}" for f in facts)
        by_attribute = {f.attribute: f for f in facts if f.name == names[0]}
        if is_absent:
            why = f"The sources do not say the {listed} of {names[0]}."
            return Turn(f"{text}\n\n{question}", why, IDK), facts, names[0], asked
        lines = [claim_line(by_attribute[a]) for a in asked]
        why = "Sources " + _joined([str(by_attribute[a].source) for a in asked]) + "."
        return Turn(f"{text}\n\n{question}", why, "\n".join(lines)), facts, names[0], asked

    def facts_of(self, item: Item) -> list[Fact]:
        """The sources of an item."""
        return [Fact(*fact) for fact in item.meta["facts"]]

    def judge(self, item: Item, answer: str) -> Judged:
        """What an answer claims, line by line. Reasoning must be taken off before."""
        facts = self.facts_of(item)
        claims = tuple(self._claim(line, facts) for line in answer.split("\n") if line.strip())
        right = {c.attribute for c in claims if c.support == "supported" and c.name == item.meta["name"]}
        return Judged(claims, len(item.meta["attributes"]), len(right & set(item.meta["attributes"])))

    def _claim(self, line: str, facts: Sequence[Fact]) -> Claim:
        cited = tuple(int(n) for n in _CITED.findall(line))
        quotes = tuple(_QUOTED.findall(line))
        said = _QUOTED.sub("", _CITED.sub("", line)).strip(" -*\t")
        by_source = {f.source: f for f in facts}
        exact = sum(any(n in by_source and by_source[n].sentence == q for n in cited) for q in quotes)
        names = candidates_in(said, {f.name for f in facts})
        name = next((f.name for f in facts if names == {f.name.casefold()}), None)
        values = self._values(said)
        attribute, value = values[0] if len(values) == 1 else (None, None)
        same = [f for f in facts if f.name == name and f.attribute == attribute]
        support: Support = "not found"
        if same and not is_hedged(said):
            support = "supported" if any(f.value == value for f in same) else "contradicted"
        backing = tuple(f.source for f in same if f.value == value and f.source in cited)
        return Claim(said, name, attribute, value, support, cited, backing, quotes, exact)

    def _values(self, said: str) -> list[tuple[str, str]]:
        """The values of the world that a sentence names, with their attributes."""
        found = []
        for attribute, pattern in self._patterns.items():
            hits = {hit.casefold() for hit in pattern.findall(said)}
            found += [(attribute, value) for value in self.world.values[attribute] if value.casefold() in hits]
        return found

    def grade(self, item: Item, output_text: str) -> Grade:
        """C when every wanted fact is claimed once, nothing else is, and each line cites and quotes its source; P when
        the claims are right but a citation or quotation is not; I for any claim that is not supported.
        """
        answer = final_answer(output_text, item.thinking_mode)
        wanted = item.meta["attributes"]
        if is_abstention(answer) and not self._values(answer):
            return Grade("A", 0.0 if wanted else 1.0, None, "abstained on a known answer" if wanted else "")
        judged = self.judge(item, answer)
        parsed = [[c.name, c.attribute, c.value, c.support, list(c.cited)] for c in judged.claims]
        if not wanted:
            return wrong(parsed, "answered a question that the sources do not answer")
        if not judged.claims or judged.supported < len(judged.claims):
            return wrong(parsed, f"{judged.supported} of {len(judged.claims)} claims are supported")
        if judged.found < len(wanted) or len(judged.claims) > len(wanted):
            score = judged.found / len(wanted) / 2
            return Grade("P", score, parsed, f"{judged.found} of {len(wanted)} wanted facts")
        for claim in judged.claims:
            if claim.backing != claim.cited or not claim.cited:
                return Grade("P", 0.5, parsed, f"cites {list(claim.cited)}")
            if not claim.quotes or claim.exact_quotes < len(claim.quotes):
                return Grade("P", 0.5, parsed, "a quotation is missing or not word for word")
        return correct(parsed)

    def adversary(self, item: Item) -> list[str]:
        from rorqual.data.tasks.claim_faults import FAULTS, corrupt

        mode, rng = item.thinking_mode, random.Random(item.id)

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        right = final_answer(item.gold, mode)
        outputs = [say(""), say(str(item.messages[-1]["content"])), say("They are well known."), say("[1]")]
        if item.meta["attributes"]:
            outputs += [say(IDK), *(say(corrupt(self, item, fault, rng)[0]) for fault in FAULTS)]
            outputs += [right] if mode == "thinking" else []
        else:
            facts = self.facts_of(item)
            outputs += [say(claim_line(facts[0])), say(f"{IDK} Perhaps {facts[0].value}.")]
        return outputs


def claim_line(fact: Fact, *, cited: int | None = None, quote: str | None = None, value: str | None = None) -> str:
    """The line that claims a fact: the sentence, its source, its quotation; parts can be put wrong."""
    sentence = _BY_NAME[fact.attribute].answer.format(name=fact.name, value=value or fact.value)
    return f'{sentence} [{fact.source if cited is None else cited}] "{fact.sentence if quote is None else quote}"'


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _any_of(values: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the values as whole words, the longest of those that begin alike."""
    longest_first = "|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<![\w'-])(?:{longest_first})(?![\w'-])", re.IGNORECASE)
