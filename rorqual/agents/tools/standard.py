"""The tools every run has: shell, Python, files and documents, all of them commands inside the sandbox.

Each call is one command with the call's key, so a sandbox that outlived this process answers for it: a finished
command is replayed, a running one joined. The document tools run `toolkit/guest.py` there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rorqual.agents.errors import CallFailed
from rorqual.agents.toolkit import FOLDER, build_toolkit
from rorqual.agents.tools.base import Outcome, Policy, Tool, ToolContext, as_result, schema

DEFAULT_TIMEOUT_S = 60
MOST_TIMEOUT_S = 600
MOST_STDIN_BYTES = 200_000
"""What goes to a command together with its start; more would come in pieces, and a kill could cut it in two."""

_PATH = {"type": "string", "description": "Path in the sandbox; relative ones start at the working folder."}
_TIMEOUT = {
    "type": "integer",
    "description": f"Seconds it may take, {DEFAULT_TIMEOUT_S} unless given, {MOST_TIMEOUT_S} at most.",
}


def standard_tools() -> list[Tool]:
    """Shell, Python, files, PDF and spreadsheets."""
    return [
        Tool(
            "shell",
            "Run a command line with /bin/sh in the sandbox. There is no network. Nothing of a shell stays between "
            "calls but the files.",
            schema("command", command={"type": "string", "description": "The command line."}, timeout=_TIMEOUT),
            "rollback",
            _shell,
        ),
        Tool(
            "python",
            "Run a Python 3 program in the sandbox and see what it prints. Variables do not stay between calls, files "
            "do.",
            schema("code", code={"type": "string", "description": "The program."}, timeout=_TIMEOUT),
            "rollback",
            _python,
        ),
        _guest(
            "read_file",
            "Read a text file, or some lines of it.",
            schema(
                "path",
                path=_PATH,
                offset={"type": "integer", "description": "First line, from 1."},
                limit={"type": "integer", "description": "How many lines."},
            ),
        ),
        _guest(
            "write_file",
            "Write a text file; what was there is replaced.",
            schema("path content", path=_PATH, content={"type": "string", "description": "All of the text."}),
        ),
        _guest(
            "edit_file",
            "Replace a piece of text in a file. `old` must stand in it exactly once unless `all` is true.",
            schema(
                "path old new",
                path=_PATH,
                old={"type": "string", "description": "The text to replace."},
                new={"type": "string", "description": "What to put there."},
                all={"type": "boolean", "description": "Replace it everywhere."},
            ),
            "rollback",
        ),
        _guest(
            "list_files",
            "List files below a folder with their sizes.",
            schema(path=_PATH, depth={"type": "integer", "description": "How many levels of folders, 3 unless given."}),
        ),
        _guest(
            "pdf_to_text",
            "Read the text of PDFs. With `out` it goes into one .txt file each, which is better for long or many ones.",
            schema(
                "path",
                path={"type": "string", "description": "A PDF, a folder of them, or a pattern such as in/*.pdf."},
                out={"type": "string", "description": "Folder for the text files."},
            ),
        ),
        _guest(
            "write_spreadsheet",
            "Write an Excel file (.xlsx) with one sheet. Give the rows, or in rows_file a JSON file with the list.",
            schema(
                "path",
                path=_PATH,
                columns={"type": "array", "items": {"type": "string"}, "description": "Names for the first row."},
                rows={"type": "array", "description": "Lists of values, or objects by column name."},
                rows_file={"type": "string", "description": "A JSON file that holds such a list."},
                sheet={"type": "string", "description": "Name of the sheet."},
            ),
        ),
        _guest(
            "read_spreadsheet",
            "Show the rows of an Excel file.",
            schema(
                "path",
                path=_PATH,
                sheet={"type": "string", "description": "Which sheet; the first unless given."},
                limit={"type": "integer", "description": "Most rows to show."},
            ),
        ),
    ]


def _shell(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
    command = arguments["command"]
    return as_result(context.environment.command(context, command, timeout_s=_timeout(arguments)))


def _python(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
    code = arguments["code"].encode("utf-8", "replace")
    if len(code) > MOST_STDIN_BYTES:
        raise CallFailed(
            f"the program has {len(code):,} bytes, and {MOST_STDIN_BYTES:,} is the most; put it into files"
        )
    result = context.environment.command(context, ["python3", "-"], stdin=code, timeout_s=_timeout(arguments))
    return as_result(result)


def _guest(name: str, description: str, parameters: Mapping[str, Any], policy: Policy = "rerun") -> Tool:
    """A tool of the same name in the guest program."""

    def run(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
        environment = context.environment
        request = json.dumps(dict(arguments)).encode()
        argv = ["python3", build_toolkit().path, name]
        is_large = len(request) > MOST_STDIN_BYTES
        path = f"{FOLDER}/{context.key}.json"

        def prepare(sandbox: Any) -> None:
            environment.bring_toolkit(sandbox)
            if is_large and not sandbox.files.exists(path):
                sandbox.files.write(path, request)

        if is_large:
            argv.append(path)
        stdin = b"" if is_large else request
        return as_result(environment.command(context, argv, stdin=stdin, timeout_s=MOST_TIMEOUT_S, prepare=prepare))

    return Tool(name, description, parameters, policy, run)


def _timeout(arguments: Mapping[str, Any]) -> float:
    return min(max(arguments.get("timeout") or DEFAULT_TIMEOUT_S, 1), MOST_TIMEOUT_S)
