"""What the README and docs show is tried: commands parse, cheap ones run, Python runs, links lead somewhere.

A fenced block after a line `<!-- not run: why -->` is only read, not run.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from rorqual.cli import COMMANDS, build_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CHEAP = {"inspect", "doctor", "--help", "--version"}
FENCE = re.compile(r"(<!-- not run: [^\n]*-->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
PATH = re.compile(r"`((?:rorqual|tests|docs|benchmarks|recipes|scripts)/[\w./-]+\.\w+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    language: str
    text: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.splitlines()[0] if self.text else ''}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for marker, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in languages:
                found.append(Block(page, language, text, not marker))
    return found


def commands() -> list[tuple[Block, list[str]]]:
    """Every line `$ ...` of the console blocks, split into words, without comments and pipes."""
    found = []
    for block in blocks("console"):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            if line.startswith("$ "):
                found.append((block, shlex.split(line[2:].split(" | ")[0], comments=True)))
    return found


COMMANDS_SHOWN = commands()


def test_there_is_something_to_check() -> None:
    shown = [" ".join(words) for _, words in COMMANDS_SHOWN]
    assert "make up" in shown and "make test" in shown
    assert any(line.startswith("rorqual inspect") for line in shown)


@pytest.mark.parametrize(("block", "words"), COMMANDS_SHOWN, ids=[" ".join(words) for _, words in COMMANDS_SHOWN])
def test_command_shown_exists(block: Block, words: list[str]) -> None:
    while words and "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            assert "=" in word or word in targets, f"{block}: the Makefile has no target {word}"
    elif words[0] == "rorqual" and words[1] in COMMANDS:
        group: Any = typer.main.get_command(build_app([words[1]]))
        arguments = [word for word in words[2:] if word not in ("-h", "--help")]
        group.commands[words[1]].make_context(f"rorqual {words[1]}", arguments)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), f"{block}: no file {words[1]}"


CHEAP_LINES = {  # without those that name a file of the reader's
    shlex.join(words)
    for block, words in COMMANDS_SHOWN
    if block.is_run and words[0] == "rorqual" and words[1] in CHEAP and "/" not in " ".join(words)
}


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(CHEAP_LINES))
def test_cheap_command_runs(line: str, tmp_path: Path) -> None:
    run_in(tmp_path, [sys.executable, "-m", *shlex.split(line)])


PYTHON = [block for block in blocks("python") if block.is_run]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_shown_runs(block: Block, tmp_path: Path) -> None:
    run_in(tmp_path, [sys.executable, "-c", block.text])


def run_in(folder: Path, command: list[str]) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lost = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    lost += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert not lost, f"{page.name} points to what does not exist: {sorted(set(lost))}"


def test_the_command_line_page_is_current(tmp_path: Path) -> None:
    run_in(tmp_path, [sys.executable, str(ROOT / "docs" / "make_cli.py"), "--check"])
