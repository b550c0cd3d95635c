"""S-TOOL: choose a function, give it exactly the right arguments, and use what it returns.

A catalogue of generated functions with typed parameters stands in the system prompt in the model's own DSML
form; a request rendered by a small grammar names the values. Classes: one call, two calls at once, a call
followed by an answer from its result, an error to report, a missing argument to ask for, a request no
function fits, and bait (a string that looks like a number). Source: evaluation specification, section 4.7.
Left out: nested schemas (`tool_nested`), long dialogues and catalogues
(`tool_dialogue`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS, THINK_END
from rorqual.data.tasks import words
from rorqual.data.tasks.answers import (
    final_answer,
    grade_closed_set,
    grade_code_value,
    normalise,
    parse_message,
)
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Message,
    Mode,
    Piece,
    Split,
    TaskFamily,
    completion,
    correct,
    random_mode,
    render_document,
    split_of,
    wrong,
)

CLASSES = ("single", "result", "parallel", "bait", "error", "missing", "irrelevant")
_WEIGHTS = (6, 5, 2, 2, 1, 1, 2)
NO_TOOL = "I have no tool for that."
_VERBS = (
    *("get", "set", "find", "open", "close", "start", "stop"),
    *("add", "move", "send", "read", "count", "check", "make"),
)
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "string": ("name", "room", "city", "label", "owner"),
    "integer": ("level", "count", "size", "minutes"),
    "boolean": ("loud", "urgent", "locked"),
    "enum": ("colour", "speed", "mode"),
    "array": ("ids", "days"),
}
_ENUMS = {
    "colour": ("red", "green", "blue"),
    "speed": ("slow", "normal", "fast"),
    "mode": ("day", "night", "away"),
}
_REQUESTS = (
    "{act} with {values}.",
    "Please {act_lower} with {values}.",
    "{act}: {values}.",
    "Can you {act_lower} with {values}?",
)


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str

    def schema(self) -> dict[str, Any]:
        if self.kind == "enum":
            return {"type": "string", "enum": list(_ENUMS[self.name])}
        if self.kind == "array":
            return {"type": "array", "items": {"type": "integer"}}
        return {"type": self.kind}

    def draw(self, rng: random.Random, *, bait: bool = False) -> Any:
        """A random value; with `bait` a string parameter gets text that looks like a number or a literal."""
        if self.kind == "string":
            if bait:
                return rng.choice((f"{rng.randrange(100):04d}", "true", "null", str(rng.randrange(10, 999)), "[1, 2]"))
            return words.invented_word(rng) if rng.random() < 0.6 else rng.choice(words.NOUNS)
        if self.kind == "integer":
            return rng.randrange(1, 10 ** rng.randint(1, 3))
        if self.kind == "boolean":
            return rng.random() < 0.5
        if self.kind == "enum":
            return rng.choice(_ENUMS[self.name])
        return [rng.randrange(1, 30) for _ in range(rng.randint(1, 3))]


@dataclass(frozen=True)
class Function:
    """One generated tool: `set_lantern` sets the lantern."""

    verb: str
    noun: str
    parameters: tuple[Parameter, ...]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.noun}"

    @property
    def act(self) -> str:
        return f"{self.verb} the {self.noun}"

    def schema(self) -> dict[str, Any]:
        properties = {p.name: p.schema() for p in self.parameters}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": f"{self.act.capitalize()}.",
                "parameters": {"type": "object", "properties": properties, "required": list(properties)},
            },
        }

    def arguments(self, rng: random.Random, *, bait: bool = False) -> dict[str, Any]:
        return {p.name: p.draw(rng, bait=bait) for p in self.parameters}


@dataclass(frozen=True)
class Scene:
    """A whole dialogue with its class: what is asked, called, returned and finally answered."""

    kind: str
    functions: tuple[Function, ...]
    user: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    call_reasoning: str
    result: str | None = None
    result_value: str | None = None
    answer: str | None = None
    answer_reasoning: str = ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [f.schema() for f in self.functions]


class ToolFamily(TaskFamily):
    """Tool calls in DSML and answers from tool results."""

    name = "tool"
    version = "1"
    partition = "tool"  # families over the same functions share their partition
    classes: tuple[str, ...] = CLASSES
    weights: tuple[int, ...] = _WEIGHTS

    def __init__(self, *, max_functions: int = 2) -> None:
        self.max_functions = max_functions

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "classes": self.classes, "max_functions": self.max_functions}

    # -- generation --

    def _function(self, rng: random.Random, split: Split, taken: set[str], kinds: tuple[str, ...] = ()) -> Function:
        while True:
            verb, noun = rng.choice(_VERBS), rng.choice(words.NOUNS)
            if noun not in taken and split_of(self.partition, f"{verb}_{noun}") == split:
                break
        taken.add(noun)
        chosen = list(kinds)
        chosen += rng.choices(tuple(_PARAMETERS), (5, 4, 2, 2, 1), k=rng.choice((0, 1) if kinds else (1, 1, 2)))
        names: dict[str, str] = {}
        for kind in chosen:
            names.setdefault(rng.choice(_PARAMETERS[kind]), kind)
        return Function(verb, noun, tuple(Parameter(name, kind) for name, kind in names.items()))

    def scene(self, rng: random.Random, split: Split, kind: str) -> Scene:
        """A dialogue of class `kind` over functions of `split`."""
        taken: set[str] = set()
        target = self._function(rng, split, taken, ("string",) if kind == "bait" else ())
        functions = [target]
        fewest = 1 if kind == "parallel" else 0
        for _ in range(rng.randint(fewest, max(fewest, self.max_functions - 1))):
            functions.append(self._function(rng, split, taken))
        other = functions[-1]
        rng.shuffle(functions)
        catalogue = tuple(functions)
        if kind == "irrelevant":
            absent = self._function(rng, split, taken)
            user = request(rng, absent, absent.arguments(rng))
            reasoning = f"No tool can {absent.act}."
            return Scene(kind, catalogue, user, (), "", answer=NO_TOOL, answer_reasoning=reasoning)
        arguments = target.arguments(rng, bait=kind == "bait")
        if kind == "missing":
            lost = rng.choice(list(arguments))
            given = {k: v for k, v in arguments.items() if k != lost}
            return Scene(
                kind,
                catalogue,
                request(rng, target, given),
                (),
                "",
                answer=f"Which {lost} should I use?",
                answer_reasoning=f"{target.name} needs {lost}, which is missing.",
            )
        if kind == "parallel":
            second = other.arguments(rng)
            user = f"{request(rng, target, arguments)} Also {_plain(other, second)}."
            pair = ((target.name, arguments), (other.name, second))
            return Scene(kind, catalogue, user, pair, f"Two calls: {target.name}, then {other.name}.")
        calls = ((target.name, arguments),)
        user = request(rng, target, arguments)
        reasoning = f"Call {target.name}."
        if kind == "result":
            value = rng.choice((str(rng.randrange(1, 1000)), words.invented_word(rng), rng.choice(words.NOUNS)))
            answer, why = f"The result is {value}.", f"The tool returned {value}."
            return Scene(kind, catalogue, user, calls, reasoning, result_text(rng, value), value, answer, why)
        if kind == "error":
            code = rng.choice((400, 404, 408, 500, 503))
            answer, why = f"The tool failed with error {code}.", f"The tool returned error {code}."
            return Scene(kind, catalogue, user, calls, reasoning, f"error {code}", str(code), answer, why)
        return Scene(kind, catalogue, user, calls, reasoning)

    def messages(self, scene: Scene, mode: Mode) -> list[Message]:
        """The scene as a finished conversation (ends with the last assistant message)."""
        messages: list[Message] = [{"role": "user", "content": scene.user}]
        if scene.calls:
            messages.append(assistant(mode, scene.call_reasoning, "", scene.calls))
        if scene.result is not None:
            messages.append({"role": "tool", "tool_call_id": "call_0", "content": scene.result})
        if scene.answer is not None:
            messages.append(assistant(mode, scene.answer_reasoning, scene.answer))
        return messages

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        scene = self.scene(rng, "train", rng.choices(self.classes, self.weights)[0])
        return render_document(self.messages(scene, mode), mode=mode, tools=scene.tools)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        scene = self.scene(rng, split, self.classes[index % len(self.classes)])
        messages = self.messages(scene, mode)
        prompt = messages[:-1]
        head, full = (
            encode_messages(m, tools=scene.tools, thinking_mode=mode, add_default_bos_token=False)
            for m in (prompt, messages)
        )
        assert full.startswith(head), "with tools declared nothing of the history is dropped"
        is_call = scene.answer is None
        return Item(
            family=self.name,
            id=self.item_id(split, index, rng),
            messages=prompt,
            tools=scene.tools,
            thinking_mode=mode,
            gold=full[len(head) :].removesuffix(EOS),
            stratum={
                "class": scene.kind,
                "functions": len(scene.functions),
                "parameters": sum(len(a) for _, a in scene.calls),
                "mode": mode,
            },
            meta={
                "calls": [[name, arguments] for name, arguments in scene.calls] if is_call else None,
                "value": scene.result_value,
                "answer": scene.answer,
                "reasoning": scene.call_reasoning if is_call else scene.answer_reasoning,
            },
            split=split,
        )

    # -- grading --

    def grade(self, item: Item, output_text: str) -> Grade:
        """Calls: the same functions with the same arguments, types included, in any order. Answers: the
        exact value.

        P means the right functions with wrong arguments. Calls inside the reasoning do not count.
        """
        made = calls_of(output_text, item.thinking_mode)
        if item.meta["calls"] is not None:
            return grade_calls(made, item.meta["calls"])
        if made:
            return wrong(made, "called a tool where none was needed")
        answer = final_answer(output_text, item.thinking_mode)
        value, kind = item.meta["value"], item.stratum["class"]
        if value is None:
            text = normalise(answer)
            if text == normalise(item.meta["answer"]):
                return Grade("A", 1.0, answer) if kind == "irrelevant" else correct(answer)
            return wrong(answer, f"expected {item.meta['answer']!r}")
        if kind == "error" and not {"error", "failed", "failure"} & set(normalise(answer).split()):
            return wrong(answer, "does not report the failure")
        if any(ch.isdigit() for ch in value):
            return grade_code_value(answer, value)
        # The answer may repeat words of the request; the value must be the only new content word.
        invented = [w for w in normalise(answer).replace(".", " ").split() if w not in _ANSWER_WORDS]
        return grade_closed_set(answer, value, {value, *invented})

    def adversary(self, item: Item) -> list[str]:
        mode, meta = item.thinking_mode, item.meta
        question = str(item.messages[0]["content"])

        def say(text: str) -> str:
            return completion(mode, meta["reasoning"], text)

        outputs = [say(""), say(question), say("Done."), say(NO_TOOL + " " + question)]
        if mode == "thinking":
            outputs.append(item.gold.replace(THINK_END, ""))  # everything stays inside the reasoning
        if meta["calls"] is None:
            call = (
                render_calls(mode, meta["reasoning"], [[item.tools[0]["function"]["name"], {}]]) if item.tools else ""
            )
            outputs += [
                call,
                say(f"{meta['answer']} {meta['answer']} No."),
                say(f"It is not so. {meta['answer']}"),
            ]
            if meta["value"] is not None:
                value = meta["value"]
                outputs += [
                    say(f"The result is {value}9."),
                    say("The result is velmar or 7."),
                    say(f"{value} or other"),
                ]
            return outputs
        calls: list[list[Any]] = meta["calls"]
        name, arguments = calls[0]
        variants: list[list[list[Any]]] = [
            [[name + "_all", arguments], *calls[1:]],
            [[name, {**arguments, "extra": 1}], *calls[1:]],
            [*calls, [name, arguments]],
            [[name, {}], *calls[1:]],
        ]
        for key, value in arguments.items():
            for bad in _wrong_values(value):
                variants.append([[name, {**arguments, key: bad}], *calls[1:]])
        outputs += [render_calls(mode, meta["reasoning"], v) for v in variants]
        outputs += [say(json.dumps({"name": name, "arguments": arguments})), say(f"{name}({arguments})")]
        if len(calls) > 1:
            outputs.append(render_calls(mode, meta["reasoning"], calls[:1]))
        return outputs


_ANSWER_WORDS = frozenset(
    (
        "the",
        "result",
        "is",
        "of",
        "tool",
        "it",
        "returned",
        "value",
        "answer",
        "got",
        "a",
        "an",
        "was",
        "and",
        "says",
    )
)


def _plain(function: Function, arguments: dict[str, Any]) -> str:
    values = " and ".join(f"{key} {spoken(value)}" for key, value in arguments.items())
    return f"{function.act} with {values}" if values else function.act


def request(rng: random.Random, function: Function, arguments: dict[str, Any]) -> str:
    """What a user says to have `function` called with `arguments`."""
    values = " and ".join(f"{key} {spoken(value)}" for key, value in arguments.items())
    if not values:
        return f"{function.act.capitalize()}."
    return rng.choice(_REQUESTS).format(act=function.act.capitalize(), act_lower=function.act, values=values)


def spoken(value: Any) -> str:
    """Strings in double quotes, other values as JSON, so that the request fixes the type too."""
    return json.dumps(value)


def result_text(rng: random.Random, value: str) -> str:
    """What a tool returns that found `value`."""
    return rng.choice(("{v}", "result: {v}", '{{"result": "{v}"}}', "ok, {v}")).format(v=value)


def assistant(
    mode: Mode,
    reasoning: str,
    content: str,
    calls: tuple[tuple[str, dict[str, Any]], ...] = (),
    *,
    first_id: int = 0,
) -> Message:
    """An assistant message; its calls are `call_0`, `call_1` and so on, from `first_id`."""
    message: Message = {"role": "assistant", "content": content}
    if mode == "thinking":
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{first_id + i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
            for i, (n, a) in enumerate(calls)
        ]
    return message


def render_calls(mode: Mode, reasoning: str, calls: list[list[Any]]) -> str:
    """The completion text that makes `calls`."""
    user: Message = {"role": "user", "content": "x"}
    message = assistant(mode, reasoning, "", tuple((n, a) for n, a in calls))
    head, full = (
        encode_messages(m, thinking_mode=mode, add_default_bos_token=False) for m in ([user], [user, message])
    )
    return full[len(head) :].removesuffix(EOS)


def calls_of(
    output_text: str, mode: Mode, plain: Callable[[str, Any], Any] = lambda name, arguments: arguments
) -> list[tuple[str, str]]:
    """The calls outside the reasoning as (name, canonical arguments), these as `plain` gives them.

    The tolerant parser lets a call block end unfinished reasoning; here a missing `</think>` means no call.
    """
    if mode == "thinking" and THINK_END not in output_text.split("<｜DSML｜tool_calls", 1)[0]:
        return []
    calls: list[tuple[str, str]] = []
    for call in parse_message(output_text, mode).get("tool_calls") or []:
        function = call["function"]
        try:
            canonical = _canonical(plain(str(function["name"]), json.loads(function["arguments"])))
        except ValueError:
            canonical = "not JSON: " + str(function["arguments"])
        calls.append((str(function["name"]), canonical))
    return calls


def _canonical(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False)


def grade_calls(made: list[tuple[str, str]], gold: list[list[Any]]) -> Grade:
    expected = sorted((name, _canonical(arguments)) for name, arguments in gold)
    if not made:
        return wrong(made, "made no call")
    if sorted(made) == expected:
        return correct(made)
    if sorted(n for n, _ in made) == sorted(n for n, _ in expected):
        return Grade("P", 0.5, made, "right functions, wrong arguments")
    return wrong(made, f"expected {expected}")


def _wrong_values(value: Any) -> list[Any]:
    """Values that differ in content or only in type."""
    if isinstance(value, bool):
        return [not value, str(value).lower(), int(value)]
    if isinstance(value, int):
        return [value + 1, value * 10, str(value), [value]]
    if isinstance(value, list):
        return [[*value, 1], value[1:], json.dumps(value)]
    if isinstance(value, dict):
        return [{}, json.dumps(value), [value]]
    bad: list[Any] = [value + "s", value.upper() + "X", "", f'"{value}"']
    if value in ("true", "null") or value.isdigit() or value.startswith("["):
        bad.append(json.loads(value) if not value.startswith("0") else int(value))
    return bad
