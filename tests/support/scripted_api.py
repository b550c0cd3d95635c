"""The HTTP API over a scripted model: what it answers, how to ask it, and checks that every answer has to pass."""

import json
from typing import Any

from starlette.testclient import TestClient

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="clock">\n'
    '<｜DSML｜parameter name="zone" string="true">UTC</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TOOLS: Any = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
PROMPTS: list[str] = []
"""Every prompt the model has read in this process."""


def reply(prompt: str) -> str:
    """What the model answers: a call of the clock where it is asked for one, a greeting otherwise."""
    PROMPTS.append(prompt)
    if "<｜fim▁end｜>" in prompt:
        return "    return a + b"
    answer = CALL if "call the clock" in prompt and "## Tools" in prompt else "Hello 🐋!"
    return f"Let me think.</think>{answer}" if prompt.endswith("<think>") else answer


def ask(client: TestClient, text: str = "Hi", **fields: Any) -> Any:
    """Post one question to the chat endpoint."""
    body = {"model": "minke", "messages": [{"role": "user", "content": text}], **fields}
    return client.post("/v1/chat/completions", json=body)


def chunks_of(response: Any) -> list[Any]:
    """The stream's events; checks that it is well-formed and closed."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response: Any, status: int = 400) -> Any:
    """The error of an answer; checks that it is one, with every field."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
