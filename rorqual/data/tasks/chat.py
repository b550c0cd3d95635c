"""The `chat` family: greetings, questions about the model itself, a little common knowledge, and short
dialogues.

It makes the bundled model a sensible partner: it says what it is, what it can do, and that it does not know
the real world. Splits are by document: the exact words of a request belong to one split, as do names and
repeated texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import MAX_ANSWER_WORDS, final_answer, grade_closed_set, normalise
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Message,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    correct,
    maybe_system,
    random_mode,
    render_document,
    split_of,
    turns_to_messages,
    wrong,
)
from rorqual.data.tasks.talk import INTENTS, TABLES, Intent

TurnMaker = Callable[[random.Random], Turn]
_ENDINGS = ("", ".", "!", "?")
_NAME_ASKS = (
    "My name is {n}.",
    "I am {n}.",
    "I'm {n}.",
    "Hello, I am {n}.",
    "Hi, my name is {n}.",
    "Call me {n}.",
)
_NAME_RECALLS = (
    "What is my name?",
    "What's my name?",
    "Do you know my name?",
    "Who am I?",
    "Tell me my name.",
)
_REPEATS = ("Say {t}.", "Repeat: {t}", "Please say {t}.", "Repeat after me: {t}", "Write {t}.")
KINDS = ("intent", "table", "name", "repeat")


class ChatFamily(TaskFamily):
    """Small talk and self-description, graded by closed rules."""

    name = "chat"
    version = "1"

    def __init__(self, *, model_name: str = "Minke", other_turns: tuple[TurnMaker, ...] = ()) -> None:
        """`other_turns` make training turns of other families, mixed into some of the dialogues."""
        self.model_name = model_name
        self.other_turns = other_turns

    def spec(self) -> dict[str, Any]:
        return {
            **super().spec(),
            "kinds": KINDS,
            "model_name": self.model_name,
            "intents": [i.name for i in INTENTS],
        }

    def _fill(self, text: str) -> str:
        return text.replace("{model}", self.model_name)

    # -- turns --

    def _wording(self, rng: random.Random, text: str) -> str:
        """The request as people type it: sometimes without a capital or with another ending."""
        text = self._fill(text)
        if rng.random() < 0.2:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.25:
            bare = text.rstrip(".!?")
            text = bare + (rng.choice(("", "?")) if text.endswith("?") else rng.choice(_ENDINGS[:3]))
        if rng.random() < 0.1:
            text = rng.choice(("Please: ", "Hey, ", "So, ", "OK. ")) + text
        return text

    def intent_turn(self, rng: random.Random, split: Split, intent: Intent) -> Turn:
        while True:
            user = self._wording(rng, rng.choice(intent.asks))
            if split_of(self.name, user) == split:
                return Turn(user, intent.reasoning, self._fill(rng.choice(intent.replies)))

    def table_turn(self, rng: random.Random, split: Split) -> tuple[Turn, str, str]:
        """A question of one of the tables; returns the turn, the table and what is asked about."""
        while True:
            table = rng.choice(tuple(TABLES))
            asks, answers = TABLES[table]
            query = rng.choice(tuple(answers))
            user = self._wording(rng, rng.choice(asks).format(q=query))
            if split_of(self.name, user) == split:
                answer = answers[query]
                return Turn(user, f"{query}: {answer}.", answer[0].upper() + answer[1:] + "."), table, query

    def name_turns(self, rng: random.Random, split: Split) -> tuple[list[Turn], str]:
        """Somebody says a name and later asks for it."""
        while True:
            name = words.invented_word(rng, rng.choice((1, 2, 2, 3))).capitalize()
            if len(name) > 2 and split_of(self.name, name) == split:
                break
        first = Turn(
            rng.choice(_NAME_ASKS).format(n=name),
            f"The user is called {name}.",
            f"Hello {name}! How can I help you?",
        )
        recall = Turn(rng.choice(_NAME_RECALLS), f"The user is called {name}.", f"Your name is {name}.")
        return [first, recall], name

    def repeat_turn(self, rng: random.Random, split: Split) -> tuple[Turn, str]:
        while True:
            text = " ".join(rng.choices((*words.NOUNS, *words.COLOURS, *words.FILLER), k=rng.randint(1, 5)))
            if split_of(self.name, text) == split:
                return Turn(rng.choice(_REPEATS).format(t=text), "I repeat it.", text), text

    def train_turns(self, rng: random.Random) -> list[Turn]:
        roll = rng.random()
        if roll < 0.60:
            return [self.intent_turn(rng, "train", rng.choice(INTENTS))]
        if roll < 0.80:
            return [self.table_turn(rng, "train")[0]]
        if roll < 0.92:
            return self.name_turns(rng, "train")[0]
        return [self.repeat_turn(rng, "train")[0]]

    def train_document(self, rng: random.Random) -> list[Piece]:
        """A dialogue of one to four turns; one in four has a turn of another family in it."""
        mode = random_mode(rng)
        turns: list[Turn] = []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            turns += self.train_turns(rng)
        if self.other_turns and rng.random() < 0.25:
            turns.insert(rng.randint(0, len(turns)), rng.choice(self.other_turns)(rng))
        return render_document(turns_to_messages(turns, mode=mode, system=maybe_system(rng)), mode=mode)

    # -- items --

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        kind = ("intent", "intent", "intent", "table", "name", "repeat")[index % 6]
        label, value, query = kind, "", ""
        history: list[Turn] = []
        if kind == "intent":
            intent = INTENTS[(index // 6 * 3 + index % 6) % len(INTENTS)]
            turn, label = self.intent_turn(rng, split, intent), intent.name
        elif kind == "table":
            turn, label, query = self.table_turn(rng, split)
            value = TABLES[label][1][query]
        elif kind == "name":
            turns, value = self.name_turns(rng, split)
            history, turn = turns[:-1], turns[-1]
        else:
            turn, value = self.repeat_turn(rng, split)
        messages: list[Message] = turns_to_messages(history, mode=mode)
        stratum = {"kind": kind, "label": label, "mode": mode}
        meta = {"value": value, "reasoning": turn.reasoning, "answer": turn.answer, "query": query}
        return self.chat_item(rng, split, index, mode, turn, stratum, meta, messages)

    def grade(self, item: Item, output_text: str) -> Grade:
        """Intents by required and forbidden words; tables, names and repeats by their exact value."""
        answer = final_answer(output_text, item.thinking_mode)
        kind, label, value = item.stratum["kind"], item.stratum["label"], item.meta["value"]
        if kind == "intent":
            if normalise(answer) in normalise(str(item.messages[-1]["content"])):
                return wrong(answer, "only repeats the request")
            return self._grade_intent(answer, next(i for i in INTENTS if i.name == label))
        if kind == "table":
            # Repeating what was asked about is no second candidate.
            return grade_closed_set(answer, value, set(TABLES[label][1].values()) - {item.meta["query"]})
        if kind == "repeat":
            return correct(answer) if normalise(answer) == value else wrong(answer, f"expected {value!r}")
        text = normalise(answer)
        if text in (value.casefold(), f"your name is {value.casefold()}", f"you are {value.casefold()}"):
            return correct(value)
        return wrong(answer, f"expected {value}")

    def _grade_intent(self, answer: str, intent: Intent) -> Grade:
        text = normalise(answer)
        if len(text.split()) > MAX_ANSWER_WORDS + 10:
            return wrong(answer, "far too long")
        for group in intent.needs:
            if not any(_has(text, self._fill(word).casefold()) for word in group):
                return wrong(answer, f"lacks any of {group}")
        for word in intent.forbids:
            if _has(text, word):
                return wrong(answer, f"says {word!r}")
        return correct(answer)

    def adversary(self, item: Item) -> list[str]:
        mode, answer, value = item.thinking_mode, item.meta["answer"], item.meta["value"]

        def say(text: str) -> str:
            return completion(mode, item.meta["reasoning"], text)

        outputs = [
            say(""),
            say(str(item.messages[-1]["content"])) if item.stratum["kind"] != "repeat" else say(""),
        ]
        outputs += [
            say("I am ChatGPT, made by OpenAI."),
            say("The answer is 42."),
            say(" ".join([answer] * 50)),
        ]
        if mode == "thinking":
            outputs += [answer, f"{item.meta['reasoning']} {answer}</think>"]
        if item.stratum["kind"] == "intent":
            return outputs
        if item.stratum["kind"] == "table":
            other = next(v for v in TABLES[item.stratum["label"]][1].values() if v != value)
            return [*outputs, say(other), say(f"{value} or {other}"), say(f"Not {value}."), say(f"un{value}")]
        return [*outputs, say(f"{value}x"), say(f"x{value}"), say(f"{value} or velmar"), say(f"not {value}")]

    def questions(self) -> Iterator[str]:
        """Every wording of every intent as written, for demonstrations."""
        for intent in INTENTS:
            yield from (self._fill(ask) for ask in intent.asks)


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(phrase)}(?![\w])", text) is not None
