"""What every synthetic task family shares: items, grades, splits and the rendering of training documents.

A family makes two things from one generator: training documents (pieces of text, each with or without loss)
and graded items (a prompt, its exact answer, and wrong answers that a sound grader must refuse). Everything
is a pure function of a seed, so a result names its items by (family, version, split, seed) and nothing has
to be stored.

Splits are made by hashing the entity or the document an item is about, never the question: see `split_of`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.chat import encode_messages
from rorqual.chat.markers import BOS, THINK_END
from rorqual.data.conversations import pieces_of_rendered
from rorqual.errors import DataError
from rorqual.seeds import derive

Split = Literal["train", "cal", "test"]
Mode = Literal["chat", "thinking"]
Size = Literal["tiny", "small", "full"]
Piece = tuple[str, bool]
Message = dict[str, Any]

SPLITS: tuple[Split, ...] = ("train", "cal", "test")

# Written into every exported test item. A trainer must refuse a stream that contains it.
CANARY = "rorqual-test-item 6f1c0e54 do-not-train"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Minke, a helpful assistant.",
    "Be brief.",
    "You are Minke. Answer briefly.",
    "Answer the user. If you do not know, say so.",
)


@dataclass(frozen=True)
class Item:
    """One question with one right answer.

    `messages` end with the turn to be answered; for a completion task they are empty and `prompt` holds the
    text. `effort` is the chat format's word for how much to think (None: its usual). `gold` is a complete right
    output (what follows the assistant header, without the end-of-sentence mark). `stratum` says which cell of a
    result table the item counts in; `meta` is what the grader needs.
    """

    family: str
    id: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking_mode: Mode
    gold: str
    stratum: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    split: Split = "test"
    effort: str | None = None

    def prompt_text(self, *, bos: bool = True) -> str:
        """The exact text a model continues, with the BOS mark unless `bos` is false."""
        if self.prompt is not None:
            return (BOS if bos else "") + self.prompt
        return encode_messages(
            self.messages,
            tools=self.tools,
            thinking_mode=self.thinking_mode,
            reasoning_effort=self.effort,
            add_default_bos_token=bos,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form for files; test and calibration items carry the canary string."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.split != "train":
            record["canary"] = CANARY
        return record


@dataclass(frozen=True)
class Grade:
    """Outcome of grading one output: C correct, P partly, I incorrect, A abstained, X could not be decided.

    On a question that cannot be answered, abstaining is right: `grade` is then A with `score` 1.
    """

    grade: Literal["C", "P", "I", "A", "X"]
    score: float
    parsed: Any = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """True for a fully right output (the only thing a reward or an accuracy should count)."""
        return self.score >= 1.0


@dataclass(frozen=True)
class Turn:
    """A user request and its answer, with the reasoning a thinking model shows first."""

    user: str
    reasoning: str
    answer: str


def correct(parsed: Any) -> Grade:
    return Grade("C", 1.0, parsed)


def wrong(parsed: Any, reason: str) -> Grade:
    return Grade("I", 0.0, parsed, reason)


def split_of(family: str, key: str) -> Split:
    """The split that entity or document `key` belongs to: 85 % train, 5 % cal, 10 % test, by hash."""
    bucket = derive(0, "task-split", family, key) % 100
    return "test" if bucket < 10 else "cal" if bucket < 15 else "train"


def completion(mode: Mode, reasoning: str, answer: str) -> str:
    """The text an assistant writes after its header: reasoning and `</think>` in thinking mode, then the
    answer.
    """
    return f"{reasoning}{THINK_END}{answer}" if mode == "thinking" else answer


def render_document(
    messages: Sequence[Message], *, mode: Mode, tools: list[dict[str, Any]] | None = None
) -> list[Piece]:
    """Render a whole conversation (ending in an assistant message) as training pieces, without BOS."""
    text = encode_messages(list(messages), tools=tools, thinking_mode=mode, add_default_bos_token=False)
    return list(pieces_of_rendered(text))


def turns_to_messages(turns: Sequence[Turn], *, mode: Mode, system: str | None = None) -> list[Message]:
    """Messages of a finished conversation; reasoning is attached in thinking mode only."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        answer: Message = {"role": "assistant", "content": turn.answer}
        if mode == "thinking":
            answer["reasoning_content"] = turn.reasoning
        messages.append(answer)
    return messages


def maybe_system(rng: random.Random, share: float = 0.15) -> str | None:
    """Now and then a system prompt, because clients send them and a model must not be thrown by one."""
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < share else None


def random_mode(rng: random.Random) -> Mode:
    return "thinking" if rng.random() < 0.5 else "chat"


class TaskFamily(ABC):
    """A generator of training documents and graded items, with its grader."""

    name: str
    version: str
    abstains_in_reasoning: tuple[str, ...] = ()
    """Expressions for the places in a reasoning where a trained model decides to decline; masked in forced runs."""

    @abstractmethod
    def train_document(self, rng: random.Random) -> list[Piece]:
        """One training document as (text, is_loss) pieces: rendered chat without BOS, ending with EOS."""

    def document_at(self, rng: random.Random, index: int) -> list[Piece]:
        """The training document at place `index` of the stream; families that count exposures go by the place."""
        return self.train_document(rng)

    @abstractmethod
    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        """The `index`-th item of `split`; implementations walk through their strata by `index`."""

    @abstractmethod
    def grade(self, item: Item, output_text: str) -> Grade:
        """Judge a raw completion (the text after the prompt, with or without EOS). Deterministic, runs no
        model.
        """

    @abstractmethod
    def adversary(self, item: Item) -> list[str]:
        """Wrong raw completions of every kind that has fooled a grader; none may pass."""

    def spec(self) -> dict[str, Any]:
        """The parameters that, with a seed, define this family's items."""
        return {"name": self.name, "version": self.version}

    def items(self, split: Split, seed: int) -> Iterator[Item]:
        """An endless, reproducible stream of items; take as many as needed with `itertools.islice`.

        Item number i does not depend on the items before it. Raises: DataError for an unknown split.
        """
        if split not in SPLITS:
            raise DataError(
                f"task family {self.name!r} has no split {split!r}. "
                f"Items exist for {', '.join(SPLITS)} only. Pass one of these."
            )
        return self._stream(split, seed)

    def _stream(self, split: Split, seed: int) -> Iterator[Item]:
        index = 0
        while True:
            rng = random.Random(derive(seed, "task-items", self.name, self.version, split, index))
            item = self.make_item(rng, split, index)
            assert item.split == split
            yield item
            index += 1

    def chat_item(
        self,
        rng: random.Random,
        split: Split,
        index: int,
        mode: Mode,
        turn: Turn,
        stratum: dict[str, Any],
        meta: dict[str, Any],
        history: Sequence[Message] = (),
    ) -> Item:
        """The item that asks for the answer of `turn`, without tools; `history` are the messages before it."""
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=[*history, {"role": "user", "content": turn.user}],
            tools=None,
            thinking_mode=mode,
            gold=completion(mode, turn.reasoning, turn.answer),
            stratum=stratum,
            meta=meta,
            split=split,
        )

    def item_id(self, split: Split, index: int, rng: random.Random) -> str:
        return f"{self.name}-{self.version}-{split}-{index}-{rng.getrandbits(32):08x}"
