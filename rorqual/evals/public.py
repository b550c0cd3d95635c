"""Public question sets from files that the user has: AA-Omniscience-Public, SimpleQA, OpenAI-MRCR.

Nothing is downloaded. Questions with short answers are judged by strings, exactly and without a model; the leaderboards
of these sets use model judges, so figures made here stand in no column beside theirs. Formats (CSV or JSON Lines), as
other public loaders of these sets read them:

    AA-Omniscience-Public   question_id, domain, topic, question, answer     (600 of 6,000 questions; Apache-2.0)
    SimpleQA                metadata, problem, answer                        (MIT)
    OpenAI-MRCR             prompt (messages as JSON text), answer, random_string_to_prepend, n_needles, ...

Left out: RULER's files and model-graded sets.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rorqual.data.tasks.answers import IDK, final_answer, is_abstention, is_hedged, normalise
from rorqual.data.tasks.base import Grade, Item, Piece, Split, TaskFamily, completion, correct, wrong
from rorqual.errors import ConfigError
from rorqual.seeds import derive

MOST_WORDS = 60


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or JSON Lines file. Raises: ConfigError for a file that is neither or is empty."""
    csv.field_size_limit(1 << 30)
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"--set {path} cannot be read as CSV or JSON Lines ({error}). Give a .csv or .jsonl file of a set."
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--set {path} holds no rows, so there is nothing to ask. Check the file.")
    return rows


class PublicQuestions(TaskFamily):
    """Questions with short answers from AA-Omniscience-Public or SimpleQA. Raises: ConfigError for other columns."""

    version = "1"

    def __init__(self, path: Path) -> None:
        self.rows = read_rows(path)
        columns = set(self.rows[0])
        if {"question", "answer", "domain", "topic"} <= columns:
            self.name, self._question = "aa-omniscience-public", "question"
        elif {"problem", "answer"} <= columns:
            self.name, self._question = "simpleqa", "problem"
        else:
            raise ConfigError(
                f"--set {path} has the columns {', '.join(sorted(map(str, columns)))}. The suite facts reads "
                "AA-Omniscience-Public (question, answer, domain, topic) and SimpleQA (problem, answer)."
            )

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "rows": len(self.rows), "judge": "strings"}

    def train_document(self, rng: random.Random) -> list[Piece]:
        raise ConfigError("A public test set is no training data.")

    def items(self, split: Split, seed: int) -> Iterator[Item]:
        """All rows once, in an order drawn from the seed."""
        order = list(range(len(self.rows)))
        random.Random(derive(seed, "public-order", self.name)).shuffle(order)
        return (self.make_item(random.Random(0), split, index) for index in order)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        row = self.rows[index]
        stratum = {"class": "K-public", "domain": str(row.get("domain") or "-"), "topic": str(row.get("topic") or "-")}
        gold = str(row["answer"]).strip()
        return Item(
            family=self.name, id=f"{self.name}-{row.get('question_id') or index}", tools=None, thinking_mode="thinking",
            messages=[{"role": "user", "content": str(row[self._question])}], gold=completion("thinking", "", gold),
            stratum=stratum, meta={"value": gold}, split=split,
        )  # fmt: skip

    def grade(self, item: Item, output_text: str) -> Grade:
        """C: the answer is the gold text, or a short, unhedged sentence with it as whole words; A: it declines."""
        return grade_short(final_answer(output_text, item.thinking_mode), str(item.meta["value"]))

    def adversary(self, item: Item) -> list[str]:
        gold = str(item.meta["value"])

        def say(text: str) -> str:
            return completion("thinking", "", text)

        question = str(item.messages[-1]["content"])
        return [say(""), say(IDK), say(f"not {gold}"), say(f"{gold}9"), say(f"{gold} or another"), say(question), gold]


class PublicMrcr(TaskFamily):
    """Dialogues of OpenAI-MRCR. Raises: ConfigError for other columns or a prompt that is no list of messages."""

    name = "openai-mrcr"
    version = "1"

    def __init__(self, path: Path) -> None:
        self.rows = read_rows(path)
        wanted = {"prompt", "answer", "random_string_to_prepend", "n_needles"}
        if not wanted <= set(self.rows[0]):
            raise ConfigError(
                f"--set {path} has the columns {', '.join(sorted(map(str, self.rows[0])))}. The suite mrcr reads those "
                f"of OpenAI-MRCR: {', '.join(sorted(wanted))}."
            )

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "rows": len(self.rows)}

    def train_document(self, rng: random.Random) -> list[Piece]:
        raise ConfigError("A public test set is no training data.")

    def items(self, split: Split, seed: int) -> Iterator[Item]:
        order = list(range(len(self.rows)))
        random.Random(derive(seed, "public-order", self.name)).shuffle(order)
        return (self.make_item(random.Random(0), split, index) for index in order)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        row = self.rows[index]
        messages, prefix, answer = _messages(row, index), str(row["random_string_to_prepend"]), str(row["answer"])
        characters = sum(len(message["content"]) for message in messages)
        return Item(
            family=self.name, id=f"{self.name}-{index}", messages=messages, tools=None, thinking_mode="thinking",
            gold=completion("thinking", "", answer), split=split,
            stratum={"needles": int(row["n_needles"]), "length": 1 << max(0, characters // 4).bit_length()},
            meta={"prefix": prefix, "body": answer.removeprefix(prefix)},
        )  # fmt: skip

    def grade(self, item: Item, output_text: str) -> Grade:
        """As S-MRCR: C for the exact reply, else the similarity behind the string as score."""
        from rorqual.data.tasks.mrcr import MrcrFamily

        return MrcrFamily().grade(item, output_text)

    def adversary(self, item: Item) -> list[str]:
        body = item.meta["body"]
        return [completion("thinking", "", text) for text in ("", body, IDK, item.meta["prefix"], f"Here: {body}")]


def grade_short(answer: str, gold: str) -> Grade:
    """C: `answer` is the gold text, or a short, unhedged sentence with it as whole words; A: it declines."""
    if is_abstention(answer):
        return Grade("A", 0.0, None, "abstained")
    text, wanted = _plain(answer), _plain(gold)
    if text == wanted:
        return correct(answer)
    if len(answer.split()) > MOST_WORDS or not wanted:
        return wrong(answer[:200], f"longer than {MOST_WORDS} words")
    if f" {wanted} " in f" {text} " and not is_hedged(answer):
        return correct(answer)
    return wrong(answer[:200], f"expected {gold}")


def _messages(row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
        return [{"role": str(message["role"]), "content": str(message["content"])} for message in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"prompt of row {index} of the set is no list of messages ({error}). Check the file."
        ) from None


def _plain(text: str) -> str:
    """For comparing: lower case, words and numbers only, thousands separators and articles taken out."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", normalise(text))
    words = re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*", text)
    return " ".join(word for word in words if word not in ("the", "a", "an"))
