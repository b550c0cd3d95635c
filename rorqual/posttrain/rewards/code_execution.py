"""Runs functions that a model wrote: each call in a fresh process of a sandbox, compared outside of it.

The value comes back as Python literal text and is read without evaluating anything, so the types of lists, tuples and
numbers inside it are kept and nothing that the code defines takes part in the comparison.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Sequence
from typing import Any

from rorqual.data.tasks.base import Grade, correct, wrong
from rorqual.data.tasks.interpreter import same_value
from rorqual.errors import SandboxError
from rorqual.sandbox import Sandbox

CALL_S = 5.0
ENTRY = "_rorqual_call"
HARNESS = """

def _rorqual_call(name, arguments):
    return repr(globals()[name](*arguments))
"""


class CodeRunner:
    """One sandbox for a whole run. Thread-safe. Raises: SandboxError where no sandbox of the kind can be made."""

    def __init__(self, kind: str = "function") -> None:
        self.kind = kind
        self._sandbox = Sandbox.create(kind)  # type: ignore[arg-type]  # checked there, with the kinds named
        self._lock = threading.Lock()

    def grade(self, source: str, name: str, tests: Sequence[Sequence[Any]]) -> Grade:
        """C when every test `[arguments, expected]` gives its value, types included; X when the sandbox fails."""
        for arguments, expected in tests:
            try:
                with self._lock:
                    result = self._sandbox.call(source + HARNESS, ENTRY, [name, arguments], timeout=CALL_S)
            except SandboxError as error:
                return Grade("X", 0.0, source, f"sandbox: {error}")
            if result.timed_out:
                return wrong(source, f"{name}{tuple(arguments)} ran longer than {CALL_S:g} s")
            if not result.ok:
                return wrong(source, f"{name}{tuple(arguments)} raised {result.error}: {result.message}")
            try:
                value = ast.literal_eval(str(result.value))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return wrong(source, f"{name}{tuple(arguments)} gave {str(result.value)[:80]}, which is no plain value")
            if not same_value(value, expected):
                return wrong(source, f"{name}{tuple(arguments)} gave {value!r}, expected {expected!r}")
        return correct(source)

    def close(self) -> None:
        self._sandbox.close()
