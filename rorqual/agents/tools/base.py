"""What every tool is: shown to the model by name and schema, run with a key, and honest about being run again.

A tool's function gets checked arguments and a `ToolContext`, and returns an `Outcome` or raises `CallFailed`.
Source: docs/agents.md for the three policies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rorqual.agents.errors import CallFailed
from rorqual.errors import ConfigError
from rorqual.sandbox.spec import CommandResult

if TYPE_CHECKING:
    from rorqual.agents.environment import Environment

Policy = Literal["rerun", "rollback", "external"]
"""When a call began and its outcome is unknown: `rerun` it (running twice is as good as once); `rollback` the sandbox
to a state before it and run it then; `external`: it reaches outside, so never run it again."""

MAX_SHOWN_BYTES = 28_000
"""Most bytes of a result that the model is shown and the journal keeps inline."""

TRUNCATED, TIMED_OUT, OUT_OF_MEMORY, REFUSED = 1, 2, 4, 8
"""Bits of `Outcome.flags`."""

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended. output: what the model is shown. digest: over all there was, to compare a re-run with."""

    output: str
    exit_code: int | None = 0
    flags: int = 0
    digest: bytes = b""
    replayed: bool = False

    @classmethod
    def text(cls, text: str, *, flags: int = 0, exit_code: int | None = 0, replayed: bool = False) -> Outcome:
        """An outcome that is its text, cut in the middle when it is too long."""
        digest = hashlib.sha256(f"{exit_code}|{text}".encode("utf-8", "surrogatepass")).digest()
        output, was_cut = cut(text)
        return cls(output, exit_code, flags | (TRUNCATED if was_cut else 0), digest, replayed)

    @classmethod
    def refusal(cls, reason: str) -> Outcome:
        """A call that did not happen."""
        return cls.text(f"error: {reason}", flags=REFUSED, exit_code=None)


@dataclass(frozen=True)
class ToolContext:
    """What a call is run with.

    key: its idempotency key, 32 hex digits. index: its number in the trajectory. when_s: the time of the call as
    recorded, in seconds since 1970. outbox: folder of external effects. is_resumed: an earlier process began it.
    """

    key: str
    index: int
    policy: Policy
    environment: Environment
    outbox: Path
    when_s: float = 0.0
    is_resumed: bool = False


@dataclass(frozen=True)
class Tool:
    """One tool. parameters: JSON Schema of an object.

    external_token: an external tool that may be asked again with the same key, since the other side (or its courier)
    recognises it. needs_time: `ToolContext.when_s` is recorded before the call. outside: it leaves the sandbox alone,
    so it has nothing to do again in one that was restored (true of external tools anyway).
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    policy: Policy
    run: Callable[[Mapping[str, Any], ToolContext], Outcome]
    external_token: bool = False
    needs_time: bool = False
    outside: bool = False

    def schema(self) -> dict[str, Any]:
        """As a request's `tools` list has it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class ToolBox:
    """The tools of a run, by name. Raises: ConfigError when two have one name."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ConfigError(f"two tools are called {tool.name!r}, so a call could mean either. Rename one.")
            self._tools[tool.name] = tool

    def schemas(self) -> list[dict[str, Any]]:
        """All of them, as the model is shown them."""
        return [tool.schema() for tool in self._tools.values()]

    def get(self, name: str) -> Tool:
        """Raises: CallFailed for a name that no tool has."""
        if name not in self._tools:
            raise CallFailed(f"there is no tool {name!r}; there are {', '.join(self._tools)}")
        return self._tools[name]


def check_arguments(tool: Tool, arguments: Mapping[str, Any] | None, raw: str = "") -> None:
    """Raises: CallFailed saying what does not fit the tool's schema (names, presence and kinds; not deeper)."""
    if arguments is None:
        raise CallFailed(f"the arguments of {tool.name} are no JSON object: {raw[:200]}")
    properties = tool.parameters.get("properties") or {}
    missing = [name for name in tool.parameters.get("required") or () if name not in arguments]
    if missing:
        raise CallFailed(f"{tool.name} needs {', '.join(missing)}")
    if tool.parameters.get("additionalProperties") is False:
        unknown = [name for name in arguments if name not in properties]
        if unknown:
            raise CallFailed(f"{tool.name} takes no {', '.join(unknown)}; it takes {', '.join(properties)}")
    for name, value in arguments.items():
        kind = (properties.get(name) or {}).get("type")
        wanted = _TYPES.get(kind) if isinstance(kind, str) else None
        is_bool = isinstance(value, bool) and kind != "boolean"
        if wanted is not None and (is_bool or not isinstance(value, wanted)):
            raise CallFailed(f"{name} of {tool.name} must be of type {kind}, and is {type(value).__name__}")


def schema(required: str = "", **properties: Mapping[str, Any]) -> dict[str, Any]:
    """A closed object schema; `required` names what must be given, separated by spaces."""
    return {
        "type": "object",
        "properties": {name: dict(value) for name, value in properties.items()},
        "required": required.split(),
        "additionalProperties": False,
    }


def as_result(result: CommandResult) -> Outcome:
    """A command's outcome as the model is shown it: what it wrote, and how it ended where that says something."""
    flags = 0
    notes = []
    if result.timed_out:
        flags |= TIMED_OUT
        notes.append("it was stopped at its time limit")
    if result.oom_killed:
        flags |= OUT_OF_MEMORY
        notes.append("it ran out of memory and was killed")
    left_out = sum(result.truncated_bytes.values())
    if left_out:
        flags |= TRUNCATED
        notes.append(f"{left_out:,} bytes of output were left out of the middle")
    if result.exit_code != 0:
        notes.append(f"exit code {result.exit_code}")
    parts = [result.stdout.rstrip("\n")]
    if result.stderr.strip():
        parts.append(f"[stderr]\n{result.stderr.rstrip()}")
    if notes:
        parts.append(f"[{'; '.join(notes)}]")
    output, was_cut = cut("\n".join(part for part in parts if part) or "(no output)")
    everything = hashlib.sha256(
        b"%d|%d|" % (result.exit_code, len(result.stdout_bytes)) + result.stdout_bytes + result.stderr_bytes
    )
    flags |= TRUNCATED if was_cut else 0
    return Outcome(output, result.exit_code, flags, everything.digest(), result.replayed)


def cut(text: str) -> tuple[str, bool]:
    """Text of at most MAX_SHOWN_BYTES: its head and its tail, and a line that says what lies between."""
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_SHOWN_BYTES:
        return data.decode("utf-8"), False
    half = MAX_SHOWN_BYTES // 2
    head, tail = data[:half].decode("utf-8", "ignore"), data[-half:].decode("utf-8", "ignore")
    return f"{head}\n... ({len(data) - 2 * half:,} bytes left out) ...\n{tail}", True
