"""The code of an answer, and what the conversation says it must do: blocks, tests, examples.

Tests are the request's own (`referee.tests`), blocks of the last question that assert something, doctest examples
(`>>> f(2)` and its value below) and examples in words: `f(2) -> 4`, `f(2) == 4`, `f(2) returns 4`, `f(2) gives 4`.
Examples are read as literals here and run nowhere but in the sandbox.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any, Final

MOST_BLOCKS: Final = 20
MOST_TESTS: Final = 50
_BLOCK = re.compile(r"^(?P<fence>```+|~~~+)[ \t]*(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.M | re.S)
_PYTHON = frozenset(("python", "py", "python3"))
_TALK = re.compile(r"^\s*(?:>>>|\$ |In \[\d+\]:)", re.MULTILINE)
_GAP = re.compile(r"^\s*(?:\.\.\.|…|#\s*\.\.\.\s*)", re.MULTILINE)
_DOCTEST = re.compile(r"^[ \t]*>>> (?P<call>[^\n]{1,500})\n[ \t]*(?P<value>(?!>>>)[^\n]{1,500})$", re.MULTILINE)
_EXAMPLE = re.compile(
    r"(?<![\w.])(?P<call>[A-Za-z_]\w{0,60}\([^\n]{0,300}?\))`?[ \t]*"
    r"(?:->|=>|→|==|should (?:return|be|give)|must (?:return|be|give)|returns|gives|is)[ \t]*`?"
    r"(?P<value>[-\w\"'\[\](){},.: ]{1,200})"
)
_ASSERT_LINE = re.compile(r"^[ \t]*assert\s+\w+\([^\n]*$", re.MULTILINE)
_ASSERT = re.compile(r"^\s*assert\b", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of Python. span: of its code in the content."""

    code: str
    span: tuple[int, int]
    has_gaps: bool


@dataclass(frozen=True)
class Example:
    """A call and the literal it must give."""

    call: str
    literal: str

    @property
    def value(self) -> Any:
        return ast.literal_eval(self.literal)

    @property
    def name(self) -> str:
        return self.call.partition("(")[0]


@dataclass(frozen=True)
class Tests:
    """What code is held to: sources that must run through, and examples."""

    sources: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()


def python_blocks(content: str) -> tuple[list[Block], list[str]]:
    """The Python of an answer, and the languages of the other blocks. A fence without a language is no Python."""
    blocks, others = list[Block](), list[str]()
    for match in _BLOCK.finditer(content):
        language = match["info"].strip().split(" ")[0].lower().strip("{}.")
        code = match["code"]
        if language not in _PYTHON:
            others.append(language)
        elif not _TALK.search(code) and code.strip() and len(blocks) < MOST_BLOCKS:
            is_cut = code.startswith((" ", "\t"))
            blocks.append(Block(code, match.span("code"), is_cut or _GAP.search(code) is not None))
    return blocks, others


def wanted_of(question: str, given: str | None) -> Tests:
    """What the question and the request ask of code."""
    sources = [given] if given else []
    for match in _BLOCK.finditer(question):
        if _ASSERT.search(match["code"]) and len(sources) < MOST_TESTS:
            sources.append(match["code"])
    outside = _BLOCK.sub(lambda found: found[0] if ">>>" in found[0] else "", question)
    bare = [line.strip() for line in outside.splitlines() if _ASSERT_LINE.match(line)]
    sources += [line for line in bare if _parses(line)][:MOST_TESTS]
    outside = _ASSERT_LINE.sub("", outside)
    examples = list[Example]()
    for pattern in (_DOCTEST, _EXAMPLE):
        for match in pattern.finditer(outside):
            if len(examples) >= MOST_TESTS:
                break
            if (example := _example(match["call"], match["value"])) is not None:
                examples.append(example)
    return Tests(tuple(sources), tuple(dict.fromkeys(examples)))


def _example(call: str, value: str) -> Example | None:
    """The example, where the call has literal arguments and a literal begins the value."""
    try:
        tree = ast.parse(call.strip().strip("`"), mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            return None
        for argument in (*tree.args, *(one.value for one in tree.keywords)):
            ast.literal_eval(argument)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    for text in _beginnings(value.strip().strip("`").strip()):
        try:
            return Example(ast.unparse(tree), repr(ast.literal_eval(text)))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
    return None


def _beginnings(text: str) -> list[str]:
    """The value and what may follow it in a sentence: all of it, without what ends one, the first literal."""
    found = [text.rstrip(".,;: "), text]
    closing = {"[": "]", "(": ")", "{": "}", '"': '"', "'": "'"}.get(text[:1])
    if closing:
        found += [text[: at + 1] for at in range(len(text) - 1, 0, -1) if text[at] == closing]
    else:
        found.append(text.split(" ")[0].rstrip(".,;:)`"))
    return found


def _parses(line: str) -> bool:
    try:
        ast.parse(line)
        return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
