"""How the referee's deterministic checks do on faults that are known: caught, cured, cured wrong, and false alarms.

    python benchmarks/referee_checks.py
    python benchmarks/referee_checks.py --quick --json

Random schemas with valid calls of them; each call goes through clean, and through every fault below. Nothing is asked
of a model. A fault is `caught` when the call does not go out as it was damaged; `cured` when what goes out is the very
call it was; `harmed` when something else goes out. A clean call that is not passed on byte for byte is a false alarm.
Latency is that of all default checks over one answer, in processor time.

Source: the specification's 8.8, rows F1, F3, F5 and F6 of its table (targets: 100% caught, 0.1% false alarms, harm
0.2%, 3 ms at p50 and 15 ms at p99).
"""

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from measure import note, print_line

from rorqual.referee import Answer, Asked, Call, Options, Policy
from rorqual.referee.check import check_answer

WORDS = (
    "harbour",
    "Oslo",
    "grey whale",
    "krill",
    "tide table",
    "north",
    "ü umlaut",
    "line\nbreak",
    'a "quote"',
    "x" * 40,
)
Made = tuple[dict[str, Any], dict[str, Any]]


def member(draw: random.Random, level: int) -> Made:
    """A schema and a value it takes."""
    kinds = ["string", "integer", "number", "boolean", "enum"] + (["array", "object"] if level < 2 else [])
    kind = draw.choice(kinds)
    if kind == "array":
        schema, value = member(draw, level + 1)
        return {"type": "array", "items": schema}, [value] * draw.randint(0, 3)  # type: ignore[return-value]
    if kind == "object":
        return arguments(draw, level + 1)
    simple: dict[str, Any] = {
        "string": ({"type": "string"}, draw.choice(WORDS)),
        "integer": ({"type": "integer", "minimum": 0, "maximum": 99}, draw.randint(0, 99)),
        "number": ({"type": "number"}, round(draw.uniform(-9, 9), 3)),
        "boolean": ({"type": "boolean"}, draw.random() < 0.5),
        "enum": ({"enum": ["celsius", "fahrenheit", "kelvin"]}, draw.choice(["celsius", "fahrenheit", "kelvin"])),
    }
    found: Made = simple[kind]
    return found


def arguments(draw: random.Random, level: int = 0) -> Made:
    names = draw.sample(["path", "user_id", "maxItems", "unit", "note", "limit"], draw.randint(1, 5))
    members = {name: member(draw, level) for name in names}
    schema = {"type": "object", "properties": {name: one for name, (one, _) in members.items()}, "required": names}
    return schema, {name: value for name, (_, value) in members.items()}


def leaves(value: Any, kind: type) -> list[tuple[Any, Any]]:
    """(holder, key) of all members of a kind."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if type(inner) is kind:
            found.append((value, key))
        found += leaves(inner, kind)
    return found


def changed(value: Any, kind: type, change: Callable[[Any], Any]) -> str | None:
    """The text with the first member of a kind changed; None where there is none."""
    value = json.loads(json.dumps(value))
    found = leaves(value, kind)
    if not found:
        return None
    holder, key = found[0]
    holder[key] = change(holder[key])
    return json.dumps(value)


def python_spelling(value: Any) -> str | None:
    text = json.dumps(value).replace(": true", ": True").replace(": false", ": False")
    return text if text != json.dumps(value) else None


def renamed(value: dict[str, Any]) -> str | None:
    if "user_id" not in value:
        return None
    return json.dumps({"userId" if key == "user_id" else key: inner for key, inner in value.items()})


FAULTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "trailing comma": lambda value: json.dumps(value)[:-1] + ",}",
    "missing bracket": lambda value: json.dumps(value)[:-1],
    "surplus bracket": lambda value: json.dumps(value) + "}",
    "code fence": lambda value: f"```json\n{json.dumps(value)}\n```",
    "Python literals": python_spelling,
    "stringified": lambda value: json.dumps(json.dumps(value)),
    "wrapped": lambda value: json.dumps({"arguments": value}),
    "number as text": lambda value: changed(value, int, str),
    "boolean as text": lambda value: changed(value, bool, lambda one: str(one).lower()),
    "key in another spelling": renamed,
    "cut in the middle": lambda value: json.dumps(value)[: len(json.dumps(value)) // 2],
    "text around it": lambda value: f"Calling it with {json.dumps(value)} now",
    "two objects": lambda value: json.dumps(value) * 2,
    "member missing": lambda value: json.dumps(dict(list(value.items())[1:])),
    "invented member": lambda value: json.dumps({**value, "mood": "calm"}),
    "number out of range": lambda value: changed(value, int, lambda one: one + 100),
    "word for a number": lambda value: changed(value, int, lambda one: "many"),
    "list for a text": lambda value: changed(value, str, lambda one: [one, one]),
}


def outcome(schema: dict[str, Any], text: str, value: Any) -> tuple[str, float]:
    """passed, cured, harmed or refused; and milliseconds."""
    tools = [{"type": "function", "function": {"name": "act", "parameters": schema}}]
    asked = Asked({"messages": [{"role": "user", "content": "Do it."}], "tools": tools})
    answer = Answer(calls=(Call("call_1", "act", text),), finish="tool_calls")
    began = time.thread_time()
    checked = check_answer(asked, answer, Options("enforce", Policy()))
    took = 1000 * (time.thread_time() - began)
    if checked.standing:
        return "refused", took
    if checked.answer == answer:
        return "passed", took
    return ("cured" if json.loads(checked.answer.calls[0].arguments) == value else "harmed"), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="500 calls instead of 10,000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, count = random.Random(options.seed), 500 if options.quick else 10_000
    clean: Counter[str] = Counter()
    faults: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    times: list[float] = []
    for number in range(count):
        schema, value = arguments(draw)
        kind, took = outcome(schema, json.dumps(value, ensure_ascii=draw.random() < 0.5), value)
        clean[kind] += 1
        times.append(took)
        for name, damage in FAULTS.items():
            text = damage(value)
            if text is not None:
                kind, took = outcome(schema, text, value)
                faults[name][kind] += 1
                times.append(took)
        if number % 1000 == 999:
            note(f"{number + 1:,} of {count:,}")

    def line(name: str, unit: str, ours: float, config: dict[str, Any]) -> None:
        empty = {"peer": None, "peer_name": "none", "ratio": None, "bound": None, "bound_share": None}
        case = f"{count}/calls/1t/-"
        spread = {"ours": [], "peer": []}
        told = {"name": name, "case": case, "unit": unit, "ours": ours, **empty, "spread": spread, "config": config}
        print_line(told, as_json=options.json)

    total = sum((one for one in faults.values()), Counter())
    damaged = sum(total.values())
    matrix = {name: dict(one) for name, one in faults.items()}
    line("referee_catch", "% of faults caught", 100 * (1 - total["passed"] / damaged), {"by_fault": matrix})
    line("referee_false_alarm", "% of clean calls", 100 * (1 - clean["passed"] / count), dict(clean))
    line("referee_harm", "% of faults changed to another call", 100 * total["harmed"] / damaged, {"faults": damaged})
    percentiles = statistics.quantiles(times, n=100)
    line("referee_check_ms", "ms at p50", percentiles[49], {"p99": percentiles[98], "answers": len(times)})


if __name__ == "__main__":
    main()
