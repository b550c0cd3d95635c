"""S-THREAD: a value that stands only in an earlier reasoning is needed later.

A dialogue with tools, in thinking mode: while it calls one tool, the assistant settles on a value in its reasoning and
says it nowhere else; later the user asks to use that value. Arms differ in what a client sent back of that reasoning:
kept; dropped; reordered (moved to another assistant message); re-tokenised (the same words, other white space and other
spelling of the arguments). Source: evaluation specification, section 4.9.
"""

from __future__ import annotations

import json
import random
from typing import Any

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS
from rorqual.data.tasks import words
from rorqual.data.tasks.base import Grade, Item, Message, Piece, Split, completion, render_document, split_of
from rorqual.data.tasks.tool import NO_TOOL, Function, Parameter, ToolFamily, assistant, request, result_text

ARMS = ("kept", "dropped", "reordered", "re-tokenised")
TURNS = (1, 2, 4)


class ThreadsFamily(ToolFamily):
    """Dialogues whose last call needs what only a reasoning says; graded as calls."""

    name = "threads"
    version = "1"

    def __init__(self, *, turns: tuple[int, ...] = TURNS) -> None:
        super().__init__()
        self.turns = turns

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "arms": ARMS, "turns": self.turns}

    def dialogue(
        self, rng: random.Random, split: Split, between: int
    ) -> tuple[list[Message], list[dict[str, Any]], list[list[Any]]]:
        """Messages with all reasoning, ending in the call that is asked for; the tools; and that call.

        between: user turns between the one whose reasoning holds the value and the one that needs it.
        """
        noun = self._noun(rng, split)
        check = Function("check", noun, (Parameter("name", "string"),))
        store = Function("set", noun, (Parameter("label", "string"),))
        value = words.invented_word(rng, 3)
        first = {"name": words.invented_word(rng)}
        messages: list[Message] = [
            {
                "role": "user",
                "content": f"{request(rng, check, first)} Choose a label for later, but do not tell it yet.",
            },
            assistant("thinking", f"I choose the label {value}. Call {check.name}.", "", ((check.name, first),)),
            {"role": "tool", "tool_call_id": "call_0", "content": result_text(rng, str(rng.randrange(1, 1000)))},
            assistant("thinking", "The tool returned it.", "Done. I have chosen a label."),
        ]
        for number in range(1, between + 1):
            other = {"name": words.invented_word(rng)}
            found = str(rng.randrange(1, 1000))
            messages += [
                {"role": "user", "content": request(rng, check, other)},
                assistant("thinking", f"Call {check.name}.", "", ((check.name, other),), first_id=number),
                {"role": "tool", "tool_call_id": f"call_{number}", "content": result_text(rng, found)},
                assistant("thinking", f"The tool returned {found}.", f"The result is {found}."),
            ]
        calls: list[list[Any]] = [[store.name, {"label": value}]]
        messages += [
            {"role": "user", "content": f"Now set the {noun} with the label that you chose."},
            assistant(
                "thinking",
                f"I chose {value}. Call {store.name}.",
                "",
                ((store.name, {"label": value}),),
                first_id=between + 1,
            ),
        ]
        tools = [check.schema(), store.schema()]
        rng.shuffle(tools)
        return messages, tools, calls

    def _noun(self, rng: random.Random, split: Split) -> str:
        while True:
            noun = rng.choice(words.NOUNS)
            if split_of(self.name, noun) == split:
                return noun

    def train_document(self, rng: random.Random) -> list[Piece]:
        messages, tools, _ = self.dialogue(rng, "train", rng.choice((0, 0, 1)))
        return render_document(messages, mode="thinking", tools=tools)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        arm, between = ARMS[index % len(ARMS)], self.turns[index // len(ARMS) % len(self.turns)] - 1
        messages, tools, calls = self.dialogue(rng, split, between)
        head, full = (
            encode_messages(m, tools=tools, thinking_mode="thinking", add_default_bos_token=False)
            for m in (messages[:-1], messages)
        )
        assert full.startswith(head), "with tools declared nothing of the history is dropped"
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=sent_back(messages[:-1], arm),
            tools=tools,
            thinking_mode="thinking",
            gold=full[len(head) :].removesuffix(EOS),
            stratum={"arm": arm, "turns": between + 1, "class": "thread"},
            meta={"calls": calls, "value": None, "answer": None, "reasoning": str(messages[-1]["reasoning_content"])},
            split=split,
        )

    def grade(self, item: Item, output_text: str) -> Grade:
        """As `ToolFamily`: the one call with the value chosen before. Asking for the value is an abstention."""
        grade = super().grade(item, output_text)
        if grade.grade == "I" and grade.reason == "made no call" and "?" in output_text.rpartition("</think>")[2]:
            return Grade("A", 0.0, None, "asked for the value")
        return grade

    def adversary(self, item: Item) -> list[str]:
        return [
            *super().adversary(item),
            completion("thinking", "", "Which label?"),
            completion("thinking", "", NO_TOOL),
        ]


def sent_back(messages: list[Message], arm: str) -> list[Message]:
    """The history as a client of this arm returns it; the messages themselves are not changed."""
    out = [dict(message) for message in messages]
    answers = [m for m in out if m["role"] == "assistant"]
    if arm == "dropped":
        for message in answers:
            message.pop("reasoning_content", None)
    elif arm == "reordered":
        moved = [m.get("reasoning_content", "") for m in answers]
        for message, reasoning in zip(answers, moved[1:] + moved[:1], strict=True):
            message["reasoning_content"] = reasoning
    elif arm == "re-tokenised":
        for message in answers:
            message["reasoning_content"] = "  ".join(str(message.get("reasoning_content", "")).split()) + "\n"
            if "tool_calls" in message:
                message["tool_calls"] = [_respelt(call) for call in message["tool_calls"]]
    return out


def _respelt(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with other white space in its arguments."""
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(json.loads(function["arguments"]), indent=1)}}
