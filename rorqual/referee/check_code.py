"""Code in an answer, compiled and run against the tests given: in a sandbox, never here.

What does not compile, and what fails a test or an example of the conversation, rejects the answer; the first failing
case is told. A block that is visibly a piece of something (`...`, an indented line first) is not held to compile. Code
without tests is compiled and not run. The code shares its process with the harness, so code that is written to deceive
it could: this finds mistakes, not malice. Source: the specification, 8.3, check `code`.
"""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

from rorqual import log
from rorqual.errors import RorqualError, SandboxError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.code_blocks import Block, Example, python_blocks, wanted_of
from rorqual.referee.reasons import Finding, failed
from rorqual.sandbox import Sandbox

RUN_S: Final = 10.0
logger = log.get(__name__)

_HARNESS = '''
def check(blocks, setup, sources, calls):
    """Compile every block; then run the blocks, the tests, and the calls. Stops at the first fault."""
    import traceback

    def told(error, name):
        lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == name]
        return {"error": type(error).__name__, "message": str(error)[:300], "line": lines[-1] if lines else None}

    for number, code in enumerate(blocks):
        try:
            compile(code, "answer", "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            return {"stage": "compile", "block": number, "error": type(error).__name__,
                    "message": str(getattr(error, "msg", error))[:300], "line": line}
    if not setup:
        return {"stage": "done", "values": []}
    space = {"__name__": "answer"}
    try:
        for code in setup:
            exec(compile(code, "answer", "exec"), space)
    except BaseException as error:
        return {"stage": "load", **told(error, "answer")}
    for number, code in enumerate(sources):
        try:
            exec(compile(code, "test", "exec"), space)
        except BaseException as error:
            found = told(error, "test")
            lines = code.splitlines()
            at = found["line"]
            case = lines[at - 1].strip()[:300] if at and at <= len(lines) else ""
            return {"stage": "test", "case": case, **found}
    values = []
    for call in calls:
        try:
            values.append({"value": repr(eval(call, space))[:10000]})
        except BaseException as error:
            values.append({"stage": "call", **told(error, "answer")})
            break
    return {"stage": "done", "values": values}
'''


class Ran(Protocol):
    """What a run came to; `rorqual.sandbox`'s FunctionResult is one."""

    @property
    def ok(self) -> bool: ...
    @property
    def value(self) -> Any: ...
    @property
    def timed_out(self) -> bool: ...
    @property
    def error(self) -> str | None: ...
    @property
    def message(self) -> str: ...


class CodeRunner(Protocol):
    """Runs a function of a source text somewhere safe."""

    def run(self, source: str, entry: str, args: Sequence[Any], timeout_s: float) -> Ran:
        """What the function gave. Raises: SandboxError where nothing can be run."""
        ...


class SandboxRunner:
    """Sandboxes of one kind, `parallel` at most, made when they are needed. Thread-safe; `close` ends them."""

    def __init__(self, kind: str = "function", parallel: int = 2, memory_mb: int = 256) -> None:
        self.kind, self._memory_mb = kind, memory_mb
        self._free = threading.Semaphore(parallel)
        self._idle: list[Sandbox] = []
        self._lock = threading.Lock()

    def run(self, source: str, entry: str, args: Sequence[Any], timeout_s: float) -> Ran:
        """Raises: SandboxError where no sandbox of the kind can be made or used."""
        with self._free:
            with self._lock:
                sandbox = self._idle.pop() if self._idle else None
            if sandbox is not None:
                try:
                    return self._call(sandbox, source, entry, args, timeout_s)
                except SandboxError:  # it idled away; a new one is made
                    _end(sandbox)
            sandbox = Sandbox.create(self.kind, memory_mb=self._memory_mb)  # type: ignore[arg-type]  # checked there
            try:
                return self._call(sandbox, source, entry, args, timeout_s)
            except BaseException:
                _end(sandbox)
                raise

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for sandbox in idle:
            _end(sandbox)

    def _call(self, sandbox: Sandbox, source: str, entry: str, args: Sequence[Any], timeout_s: float) -> Ran:
        result = sandbox.call(source, entry, list(args), timeout=timeout_s)
        with self._lock:
            self._idle.append(sandbox)
        return result


def _end(sandbox: Sandbox) -> None:
    with contextlib.suppress(RorqualError):
        sandbox.close()


def check_code(
    asked: Asked, answer: Answer, tests: str | None, runner: CodeRunner, *, run_s: float = RUN_S
) -> list[Finding]:
    """What is wrong with the Python of the content, by what comes first. Blocks while it runs: call it in a thread.

    tests: Python that must run through behind the code, besides those of the question. run_s: time for all of it.
    """
    if answer.calls or asked.schema[0] or not answer.content:
        return []
    blocks, others = python_blocks(answer.content)
    if not blocks:
        unknown = [one for one in others if one and tests]
        return [_not_run(f"tests were given, and the answer has no Python but {', '.join(unknown)}")] if unknown else []
    wanted = wanted_of(asked.question, tests)
    whole = [one for one in blocks if not one.has_gaps]
    examples = [one for one in wanted.examples if any(_defines(block.code, one.name) for block in whole)]
    has_tests = bool(wanted.sources or examples)
    setup = [one.code for one in whole] if has_tests else []
    args = [[one.code for one in whole], setup, list(wanted.sources), [one.call for one in examples]]
    try:
        ran = runner.run(_HARNESS, "check", args, run_s)
    except SandboxError as error:
        logger.warning("code was not run: %s", error)
        return [_not_run(f"the sandbox could not run it ({error})")]
    if ran.timed_out:
        says = f"the code, with its tests, ran longer than {run_s:g} s"
        return [failed("code_fails", says, span=whole[0].span if whole else None)]
    if not ran.ok:
        says = f"the code ended the process that ran it ({ran.error}: {ran.message[:200]})"
        return [failed("code_fails", says, span=whole[0].span)] if has_tests else [_not_run(says)]
    return _read(ran.value, whole, examples)


def _read(found: Any, whole: Sequence[Block], examples: Sequence[Example]) -> list[Finding]:
    """Findings of what the harness told."""
    stage, where = found["stage"], f" in line {found['line']}" if found.get("line") else ""
    said = f"{found.get('error')}: {found.get('message')}{where}"
    if stage == "compile":
        return [failed("code_broken", f"the code does not compile: {said}", span=whole[found["block"]].span)]
    last = whole[-1].span if whole else None
    if stage == "load":
        if found["error"] in ("ModuleNotFoundError", "ImportError", "EOFError", "FileNotFoundError"):
            return [_not_run(f"it needs what the sandbox does not have ({said})")]
        return [failed("code_fails", f"the code fails before any test: {said}", span=last)]
    if stage == "test":
        case = f" at `{found['case']}`" if found["case"] else ""
        return [failed("code_fails", f"a test fails{case}: {said}", span=last)]
    for example, one in zip(examples, found["values"], strict=False):
        if "value" not in one:
            return [failed("code_fails", f"`{example.call}` raises {one['error']}: {one['message']}", span=last)]
        if not _equal(one["value"], example.value):
            says = f"`{example.call}` gives {one['value'][:200]}, not {example.value!r}"
            return [failed("code_fails", says, span=last)]
    return []


def _equal(text: str, expected: Any) -> bool:
    """Whether a value, as its repr, is the one expected; compared here, where the code has no say."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text.strip() == str(expected)
    return bool(value == expected) and isinstance(value, bool) == isinstance(expected, bool)


def _defines(code: str, name: str) -> bool:
    return f"def {name}(" in code or f"class {name}" in code or f"{name} =" in code


def _not_run(says: str) -> Finding:
    return failed("code_not_run", says)
