"""S-MRCR: reproduce the n-th of several replies that were asked for in the same words.

A dialogue of requests "write a FORM about TOPIC" with generated replies; 2, 4 or 8 requests share form and topic. The
last turn asks for one of those replies again, with a given string of 10 characters in front. Score: 0 without the
string at the start, else the similarity of the rest to the reply (difflib's ratio). Source: evaluation specification,
sections 3.3 and 4.4.
"""

from __future__ import annotations

import difflib
import random
import string
from typing import Any

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, final_answer
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Message,
    Piece,
    Split,
    TaskFamily,
    completion,
    random_mode,
    render_document,
    split_of,
)

FORMS = ("poem", "story", "letter", "speech", "riddle", "song", "report", "diary entry")
NEEDLES = (2, 4, 8)
LENGTHS = (384, 768, 1536)
BODY_SENTENCES = (3, 6)
PREFIX_LENGTH = 10
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_TOKENS_A_SENTENCE = 13


class MrcrFamily(TaskFamily):
    """Long dialogues of look-alike requests. lengths: of the dialogue, in estimated tokens."""

    name = "mrcr"
    version = "1"

    def __init__(self, *, lengths: tuple[int, ...] = LENGTHS, needles: tuple[int, ...] = NEEDLES) -> None:
        self.lengths, self.needles = lengths, needles

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "lengths": self.lengths, "needles": self.needles, "forms": FORMS}

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        messages, gold, _ = self.dialogue(rng, "train", 2, 160)
        last: Message = {"role": "assistant", "content": gold}
        if mode == "thinking":
            last["reasoning_content"] = "Found."
        return render_document([*messages, last], mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        needles = self.needles[index % len(self.needles)]
        length = self.lengths[index // len(self.needles) % len(self.lengths)]
        messages, gold, meta = self.dialogue(rng, split, needles, length)
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=messages,
            tools=None,
            thinking_mode=mode,
            gold=completion(mode, "Found.", gold),
            stratum={"needles": needles, "length": length, "asked": meta["asked"], "mode": mode},
            meta=meta,
            split=split,
        )

    def dialogue(
        self, rng: random.Random, split: Split, needles: int, length: int
    ) -> tuple[list[Message], str, dict[str, Any]]:
        """The messages with the final request, the right reply, and what the grader needs."""
        topic = _topic(rng, split)
        form = rng.choice(FORMS)
        requests = [(form, topic)] * needles
        size = _TOKENS_A_SENTENCE * sum(BODY_SENTENCES) // 2 + 12
        while len(requests) * size < length:
            other = (rng.choice(FORMS), rng.choice((topic, _topic(rng, split))))
            if other != (form, topic):
                requests.append(other)
        rng.shuffle(requests)
        messages: list[Message] = []
        replies: list[str] = []
        for asked_form, asked_topic in requests:
            body = _body(rng, asked_form, asked_topic)
            messages += [
                {"role": "user", "content": f"Write a {asked_form} about {asked_topic}."},
                {"role": "assistant", "content": body},
            ]
            if (asked_form, asked_topic) == (form, topic):
                replies.append(body)
        asked = rng.randrange(needles)
        prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=PREFIX_LENGTH))
        question = f"Prepend {prefix} to the {_ORDINALS[asked]} {form} about {topic}. Write nothing else."
        messages.append({"role": "user", "content": question})
        others = [reply for i, reply in enumerate(replies) if i != asked]
        return messages, prefix + replies[asked], {
            "prefix": prefix, "body": replies[asked], "others": others, "asked": asked + 1, "form": form,
            "topic": topic,
        }  # fmt: skip

    def grade(self, item: Item, output_text: str) -> Grade:
        """C for the exact reply; P for a similar one behind the string, scored by its ratio; I without the string."""
        answer = final_answer(output_text, item.thinking_mode)
        prefix, body = parts_of_score(item, output_text)
        if not prefix:
            return Grade("I", 0.0, answer[:80], f"does not begin with {item.meta['prefix']}")
        if answer == item.meta["prefix"] + item.meta["body"]:
            return Grade("C", 1.0, answer)
        # a ratio of 1 for unequal texts cannot be; the bound keeps a score of 1 for the exact reply all the same
        score = min(body, 1 - 1e-9)
        return Grade("P" if score >= 0.5 else "I", score, answer[:80], f"similarity {body:.3f}")

    def adversary(self, item: Item) -> list[str]:
        mode, prefix, body = item.thinking_mode, item.meta["prefix"], item.meta["body"]

        def say(text: str) -> str:
            return completion(mode, "Found.", text)

        outputs = [
            say(""), say(IDK), say(body), say(prefix), say(body + prefix), say("Here it is: " + prefix + body),
            say(prefix[:-1] + body), say(prefix + body[:-1]), say(prefix + " " + body),
            *(say(prefix + other) for other in item.meta["others"]),
        ]  # fmt: skip
        if mode == "thinking":
            outputs.append(prefix + body)
        return outputs


def parts_of_score(item: Item, output_text: str) -> tuple[bool, float]:
    """PREFIX (whether the answer begins with the string) and BODY (similarity of the rest, 0 to 1).

    The reasoning is taken off first. BODY is measured without the string too, so that both can be told.
    """
    answer = final_answer(output_text, item.thinking_mode)
    prefix = item.meta["prefix"]
    is_there = answer.startswith(prefix)
    rest = answer[len(prefix) :] if is_there else answer
    return is_there, difflib.SequenceMatcher(None, item.meta["body"], rest).ratio()


def _topic(rng: random.Random, split: Split) -> str:
    """What is written about; its hash decides the split."""
    while True:
        topic = f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}s"
        if split_of("mrcr", topic) == split:
            return topic


def _body(rng: random.Random, form: str, topic: str) -> str:
    """A reply of a few sentences; one holds a name that no other reply has."""
    name = words.invented_word(rng, 3).capitalize()
    sentences = [f"This {form} by {name} speaks of {topic}."]
    for _ in range(rng.randint(*BODY_SENTENCES) - 1):
        drawn = rng.choices(words.FILLER, k=rng.randint(6, 10))
        drawn[rng.randrange(len(drawn))] = rng.choice(words.NOUNS)
        sentences.append(" ".join(drawn).capitalize() + ".")
    head, rest = sentences[0], sentences[1:]
    rng.shuffle(rest)
    return " ".join([head, *rest])
