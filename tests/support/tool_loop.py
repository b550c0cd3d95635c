"""A conversation of five turns with tools, the same for every client: four calls, each after some reasoning, and an
answer. The model is a script; what it is shown is checked against `chat.encode_messages`, so nothing may be lost. Every
other call is written as no client would spell it from its JSON, and must be shown again to the letter.
"""

import json
import re
from typing import Any

from rorqual import chat

PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS},
}
CITIES = ("Lima", "Oslo", "Köln 🐋", 'Xi"an')
QUESTION = "Where is it warmest?"
ANSWER = "Lima, by far."
PROMPTS: list[str] = []
"""Every beginning of an assistant turn the model has read in this process."""


def weather(city: str, days: int) -> str:
    """The tool: what it says of a city."""
    return f"{city}: {len(city)} degrees for {days} days"


def thought(turn: int) -> str:
    return f"Step {turn}: look further."


def arguments(turn: int) -> dict[str, Any]:
    return {"city": CITIES[turn], "days": turn + 1}


def sampled(turn: int) -> list[tuple[str, str, bool]]:
    """The parameters of a call as the model writes them."""
    own = arguments(turn)
    if turn % 2:
        return [("days", f" {own['days']}", False), ("city", json.dumps(own["city"]), False)]
    return [("city", own["city"], True), ("days", str(own["days"]), False)]


def reply(prompt: str) -> str:
    """The model: the next call, or the answer once all cities are known."""
    if PROMPTS[-1:] != [prompt]:  # it is asked for every token
        PROMPTS.append(prompt)
    turn = len(re.findall("<tool_result>", prompt.rpartition(QUESTION)[2]))
    reasoning = f"{thought(turn)}</think>" if prompt.endswith("<think>") else ""
    if turn == len(CITIES):
        return reasoning + ANSWER
    parameters = "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(is_string).lower()}">{text}</｜DSML｜parameter>\n'
        for key, text, is_string in sampled(turn)
    )
    return (
        f'{reasoning}Looking.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n{parameters}'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


def shown(turn: int, *, system: str | None = None, tool: Any = TOOL, keeps_reasoning: bool = True) -> str:
    """The prompt of turn 0 to 4 as the model must see it."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": QUESTION})
    for done in range(turn):
        function = {"name": "weather", "arguments": json.dumps(arguments(done), ensure_ascii=False)}
        messages.append(
            {
                "role": "assistant",
                "content": "Looking.",
                "reasoning_content": thought(done) if keeps_reasoning else "",
                "tool_calls": [
                    {"id": f"c{done}", "type": "function", "function": function, "sampled_parameters": sampled(done)}
                ],
            }
        )
        messages.append({"role": "tool", "tool_call_id": f"c{done}", "content": weather(**arguments(done))})
    return chat.encode_messages(messages, [tool], "thinking", "high")


def check_prompts(**how: Any) -> None:
    """The model has just read the prompts of the five turns; the last one tells what it was shown of all others."""
    assert PROMPTS[-1] == shown(4, **how)
    for turn in range(4):
        assert shown(turn, **how) in PROMPTS, f"turn {turn}"
    PROMPTS.clear()
