"""Writes `docs/cli.md` from the commands themselves:  python docs/make_cli.py   (--check only compares)."""

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from rorqual.cli import COMMANDS, build_app

TARGET = Path(__file__).with_name("cli.md")
INTRODUCTION = """# The command line

<!-- Written by docs/make_cli.py from the commands; change them there, then run `make docs`. -->

Exit codes: 0 fine, 1 the task failed, 2 the request was wrong. An error is one message on stderr;
`RORQUAL_DEBUG=1` shows where it came from. `-h` works everywhere.
"""


def cell(text: object) -> str:
    """Text that may stand in a table cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def default_of(param: Any) -> str:
    """How an option's default reads; nothing where there is none."""
    value = param.default
    if param.required:
        return "required"
    if value is None or value is False or value == () or callable(value):
        return ""
    return f"`{value}`"


def names_of(param: Any) -> str:
    """`--port`, `-p` for an option, `MODEL` for an argument."""
    if param.param_type_name == "argument":
        return f"`{(param.metavar or param.name).strip('[]').upper()}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def render_table(params: list[Any]) -> str:
    """The arguments and options of one command, grouped as in its help."""
    groups: dict[str, list[str]] = {}
    for param in params:
        if param.name == "help" or getattr(param, "hidden", False):
            continue
        title = "Arguments" if param.param_type_name == "argument" else (param.rich_help_panel or "Options")
        row = f"| {names_of(param)} | {cell(param.help or '')} | {cell(default_of(param))} |"
        groups.setdefault(title, []).append(row)
    tables = []
    for title, rows in groups.items():
        tables.append("\n".join([f"| {title} | Meaning | Default |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(tables)


def render_docstring(doc: str) -> str:
    """The sentence and further paragraphs as they are; example lines as a console block."""
    parts = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        lines = paragraph.splitlines()
        if lines[0].strip() == "\b":
            parts.append("\n".join(["```console", *(f"$ {line.strip()}" for line in lines[1:]), "```"]))
        else:
            parts.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(parts)


def render() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(build_app())
    parts = [INTRODUCTION]
    for name in COMMANDS:
        command = group.commands[name]
        parts += [f"## rorqual {name}\n", render_docstring(command.callback.__doc__ or "") + "\n"]
        parts.append(render_table(command.params) + "\n")
        for below, one in getattr(command, "commands", {}).items():
            parts += [f"### rorqual {name} {below}\n", render_docstring(one.callback.__doc__ or "") + "\n"]
            parts.append(render_table(one.params) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check fail when it is out of date."""
    text = render()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            sys.exit(f"{TARGET.name} is out of date; run: make docs")
    else:
        TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
