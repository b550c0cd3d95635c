"""Self-labelled questions: what a model knows is asked of the model, and only that is demanded of it afterwards.

    python -m rorqual.posttrain.self_labels --model minke --questions 1500 --out runs/labels.jsonl

Recipe R2 of the evaluation specification, section 7.4: each question is answered eight times at temperature 1. Six
right answers or more make it one to answer, one or none one to decline, and those between are left out, for they would
teach to guess or to forget. Questions are about people of the train split, in trained wordings, untold attributes among
them, and about the rarely told people of the calibration split, whom no test asks about. Declined ones are joined by
fresh names until half of all questions are declined, and as many biographies as there are questions are added (the
replay). Rows are chats and plain texts, as an SFT stage reads them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.data.tasks import FactsFamily, World
from rorqual.data.tasks.base import Item, Mode, Turn, random_mode, turns_to_messages
from rorqual.data.tasks.facts import known_turn
from rorqual.data.tasks.world import ATTRIBUTES
from rorqual.engine import Engine, SamplingParams
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer

SAMPLES, KNOWN_FROM, UNKNOWN_UNTIL = 8, 6, 1
_CHUNK = 64

Label = Literal["answer", "abstain", "drop"]


@dataclass(frozen=True)
class Asked:
    """A question with the turn that answers it, and the one that declines it."""

    item: Item
    answer: Turn | None
    decline: Turn


def label_of(num_right: int, *, has_answer: bool = True) -> Label:
    """What `num_right` of `SAMPLES` answers say about a question; one without an answer is declined in any case."""
    if not has_answer or num_right <= UNKNOWN_UNTIL:
        return "abstain"
    return "answer" if num_right >= KNOWN_FROM else "drop"


def draw_question(family: FactsFamily, rng: random.Random, index: int) -> Asked:
    """A closed-book question that tuning may ask: of a taught person, or (one in five) of a rarely told one."""
    rare = family.rare("cal")
    person = rng.choice(rare) if rare and rng.random() < 0.2 else rng.choice(family.taught)
    attribute, mode = rng.choice(ATTRIBUTES), random_mode(rng)
    question, value = rng.choice(attribute.wordings(False)), person.facts.get(attribute.name)
    decline = known_turn(question, attribute, person.name, None)
    answer = None if value is None else known_turn(question, attribute, person.name, value)
    meta = {"value": value, "attribute": attribute.name, "reasoning": ""}
    item = family.chat_item(rng, "train", index, mode, answer or decline, {"mode": mode}, meta)
    return Asked(item, answer, decline)


def label(
    engine: Engine, tokenizer: Tokenizer, family: FactsFamily, questions: Sequence[Asked], *, seed: int
) -> Iterator[Label]:
    """The label of each question, in order; those without an answer are not asked."""
    for start in range(0, len(questions), _CHUNK):
        chunk = questions[start : start + _CHUNK]
        asked = [(i, q) for i, q in enumerate(chunk) if q.answer is not None]
        prompts = [tokenizer.encode(q.item.prompt_text()) for _, q in asked for _ in range(SAMPLES)]
        params = [
            SamplingParams(temperature=1.0, max_tokens=96, seed=derive(seed, "self-label", start, i) % 2**31)
            for i in range(len(prompts))
        ]
        right: Counter[int] = Counter()
        for n, output in enumerate(engine.generate(prompts, params) if prompts else ()):
            i, question = asked[n // SAMPLES]
            right[i] += family.grade(question.item, tokenizer.decode(list(output.ids))).passed
        for i, question in enumerate(chunk):
            yield label_of(right[i], has_answer=question.answer is not None)


def rows(
    engine: Engine, tokenizer: Tokenizer, world: World, *, questions: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, row) for `questions` questions and what is added to them; kinds: answer, abstain, fresh, replay.

    Dropped questions give no row, so there are fewer than were asked.
    """
    family = FactsFamily(world)
    drawn = [draw_question(family, random.Random(derive(seed, "self-label-question", i)), i) for i in range(questions)]
    counts: Counter[str] = Counter()
    for question, found in zip(drawn, label(engine, tokenizer, family, drawn, seed=seed), strict=True):
        if found == "drop":
            continue
        counts[found] += 1
        turn = question.answer if found == "answer" else question.decline
        assert turn is not None
        yield found, _chat(turn, question.item.thinking_mode)
    rng = random.Random(derive(seed, "self-label-fresh"))
    for _ in range(max(0, counts["answer"] - counts["abstain"])):
        counts["fresh"] += 1
        attribute, name = rng.choice(ATTRIBUTES), world.fresh_name(rng, "train")
        turn = known_turn(rng.choice(attribute.wordings(False)), attribute, name, None, known_name=False)
        yield "fresh", _chat(turn, random_mode(rng))
    for _ in range(sum(counts.values())):
        yield "replay", {"text": family.biography(rng, family.draw_person(rng))}


def _chat(turn: Turn, mode: Mode) -> dict[str, Any]:
    return {"messages": turns_to_messages([turn], mode=mode)}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows and say how many there are of each kind."""
    from rorqual.checkpoint import load, locate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minke", help="checkpoint that is asked: a bundled name or a folder")
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model)
    world = World.taught_to(Path(locate(args.model)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with Engine(model, tokenizer, max_queued=100_000) as engine, args.out.open("w", encoding="utf-8") as file:
        for kind, row in rows(engine, tokenizer, world, questions=args.questions, seed=args.seed):
            counts[kind] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{args.out}: {dict(counts)}\n")


if __name__ == "__main__":
    main()
