"""S-TOOL over long dialogues and long catalogues: the call of turn 1 to 64, among 1 to 128 functions.

Every earlier turn of a dialogue is a right one, so an item measures one turn alone. In the class `environment` a line
near the top of the prompt, above the catalogue, must be repeated: long catalogues are known to hide it (H6 of the
specification's haystacks). Source: evaluation specification, sections 4.2 and 4.7.
"""

from __future__ import annotations

import random
from typing import Any

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS
from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, final_answer, grade_code_value
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Message,
    Mode,
    Piece,
    Split,
    completion,
    random_mode,
    render_document,
    wrong,
)  # fmt: skip
from rorqual.data.tasks.tool import Function, ToolFamily, assistant, calls_of, request, result_text

TURNS = (1, 2, 4, 8, 16, 32, 64)
CATALOGUES = (2, 8, 32, 128)
KINDS = ("call", "result", "environment")
_VERBS_AGAIN = ("list", "show", "sort", "save", "copy", "drop", "lift", "turn", "push", "pull")


class ToolDialogueFamily(ToolFamily):
    """A dialogue with a catalogue; the graders are those of `ToolFamily`."""

    name = "tool"  # functions and splits are those of the short dialogues
    version = "dialogue-1"

    def __init__(self, *, turns: tuple[int, ...] = TURNS, catalogues: tuple[int, ...] = CATALOGUES) -> None:
        super().__init__(max_functions=max(catalogues))
        self.turns, self.catalogues = turns, catalogues

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "turns": self.turns, "catalogues": self.catalogues, "classes": KINDS}

    def catalogue(self, rng: random.Random, split: Split, count: int) -> list[Function]:
        """`count` functions with different names. The first belongs to `split` and is the one asked for at the end; the
        others are near-duplicates of it (same noun or verb) and distractors of any split.
        """
        target = self._function(rng, split, set())
        functions, names = [target], {target.name}
        while len(functions) < count:
            other = self._function(rng, rng.choice(("train", "test")), set())
            roll = rng.random()
            if roll < 0.2:
                other = Function(rng.choice(_VERBS_AGAIN), target.noun, other.parameters)
            elif roll < 0.3:
                other = Function(target.verb, other.noun + "s", other.parameters)
            if other.name not in names:
                names.add(other.name)
                functions.append(other)
        return functions

    def dialogue(
        self, rng: random.Random, split: Split, mode: Mode, turn: int, functions: list[Function], kind: str
    ) -> tuple[list[Message], dict[str, Any]]:
        """All messages up to and with the last assistant message, and what the grader needs."""
        where = f"srv/{words.invented_word(rng)}/{words.invented_word(rng)}{rng.randrange(10, 99)}"
        line = f"Working directory: /{where}"
        messages: list[Message] = [{"role": "system", "content": f"You are a helpful assistant.\n{line}"}]
        for number in range(turn - 1):
            function = rng.choice(functions)
            value = str(rng.randrange(1, 1000))
            call = ((function.name, function.arguments(rng)),)
            messages += [
                {"role": "user", "content": request(rng, function, call[0][1])},
                assistant(mode, f"Call {function.name}.", "", call, first_id=number),
                {"role": "tool", "tool_call_id": f"call_{number}", "content": result_text(rng, value)},
                assistant(mode, f"The tool returned {value}.", f"The result is {value}."),
            ]
        target = functions[0]
        meta: dict[str, Any] = {"calls": None, "value": None, "answer": None}
        if kind == "environment":
            messages.append({"role": "user", "content": "What is the working directory?"})
            meta |= {
                "value": where,
                "answer": f"The working directory is /{where}.",
                "reasoning": f"The system message says: {line}.",
            }
            return [*messages, assistant(mode, meta["reasoning"], meta["answer"])], meta
        arguments = target.arguments(rng)
        call = ((target.name, arguments),)
        messages.append({"role": "user", "content": request(rng, target, arguments)})
        asked = assistant(mode, f"Call {target.name}.", "", call, first_id=turn - 1)
        if kind == "call":
            return [*messages, asked], meta | {"calls": [[target.name, arguments]], "reasoning": f"Call {target.name}."}
        value = str(rng.randrange(1, 1000))
        answer, why = f"The result is {value}.", f"The tool returned {value}."
        messages += [asked, {"role": "tool", "tool_call_id": f"call_{turn - 1}", "content": result_text(rng, value)}]
        return [*messages, assistant(mode, why, answer)], meta | {"value": value, "answer": answer, "reasoning": why}

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        functions = self.catalogue(rng, "train", rng.choice((2, 3)))
        messages, _ = self.dialogue(rng, "train", mode, rng.choice((1, 2, 2, 3)), functions, rng.choice(KINDS))
        return render_document(messages, mode=mode, tools=[f.schema() for f in functions])

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        turn, size = (
            self.turns[index % len(self.turns)],
            self.catalogues[index // len(self.turns) % len(self.catalogues)],
        )
        kind = KINDS[index % len(KINDS)]
        functions = self.catalogue(rng, split, size)
        messages, meta = self.dialogue(rng, split, mode, turn, functions, kind)
        shown = list(functions)
        rng.shuffle(shown)
        tools = [f.schema() for f in shown]
        head, full = (
            encode_messages(m, tools=tools, thinking_mode=mode, add_default_bos_token=False)
            for m in (messages[:-1], messages)
        )
        assert full.startswith(head), "with tools declared nothing of the history is dropped"
        return Item(
            family=self.name, id=self.item_id(split, index, rng), messages=messages[:-1], tools=tools,
            thinking_mode=mode, gold=full[len(head) :].removesuffix(EOS), split=split, meta=meta,
            stratum={"class": kind, "turn": turn, "functions": size, "mode": mode},
        )  # fmt: skip

    def grade(self, item: Item, output_text: str) -> Grade:
        """As `ToolFamily`; the directory must be named exactly, with or without its first slash."""
        if item.stratum["class"] != "environment":
            return super().grade(item, output_text)
        if calls_of(output_text, item.thinking_mode):
            return wrong(None, "called a tool where none was needed")
        return grade_code_value(final_answer(output_text, item.thinking_mode), item.meta["value"])

    def adversary(self, item: Item) -> list[str]:
        mode, meta = item.thinking_mode, item.meta
        if item.stratum["class"] != "environment":
            return super().adversary(item)

        def say(text: str) -> str:
            return completion(mode, meta["reasoning"], text)

        value = meta["value"]
        outputs = [
            say(""), say(IDK), say("What is the working directory?"), say(value + "1"), say(value.rpartition("/")[2]),
            say(f"{value} or {value}x1"), say(f"It is not {value}."), say("/srv/home1"),
        ]  # fmt: skip
        return outputs + ([f"{meta['reasoning']} {value}"] if mode == "thinking" else [])
