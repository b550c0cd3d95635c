"""Rows of data sets as what is to be learned: conversations, prompts with completions, plain texts.

Read are chat JSONL and the column names that TRL's data sets use: `messages` (or `conversations` with `from` and
`value`), `prompt` with `completion` (texts or messages), `text`; beside them `tools`, `chat_template_kwargs`,
`thinking_mode` and `reasoning_effort`. Rows come one after the other, so a file may be larger than memory. Every fault
names file and line. Left out: preference data, which says which of two answers is better, not what to write.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.chat import resolve_effort
from rorqual.data.tasks import CANARY
from rorqual.errors import DataError, MissingExtraError, RequestError

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet")
_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
"""Speakers of `conversations` by the roles they stand for; others have their own name."""
_PREFERENCES = {
    frozenset({"chosen"}): "chosen and rejected answers",
    frozenset({"rejected"}): "chosen and rejected answers",
    frozenset({"completion", "label"}): "answers with a verdict",
    frozenset({"completions", "labels"}): "steps with verdicts",
}
_PICTURES = ("image", "images", "videos")
_MODE_KEYS = ("thinking", "enable_thinking")


@dataclass(frozen=True)
class Conversation:
    """Messages, and how they are to be rendered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    thinking_mode: str | None = None
    """`chat`, `thinking`, or None: by whether there is any reasoning."""
    reasoning_effort: str | None = None
    """The encoder's word (`high`, `max`)."""
    drop_thinking: bool = True
    num_given: int = 0
    """So many messages at the start are a prompt, of which nothing is learned."""
    source: str = ""


@dataclass(frozen=True)
class PlainText:
    """Text without roles: `completion` is learned, `prompt` is not."""

    completion: str
    prompt: str | None = None
    source: str = ""


@dataclass
class ReadReport:
    """What was met while reading."""

    rows: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    """The first few."""


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file or folder with their places (`chat.jsonl:12`), one at a time.

    A folder is one that the `datasets` library saved, or its files of known kinds in the order of their names.
    Raises: DataError for what is absent, of another kind or damaged; MissingExtraError where a library is missing.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            yield from _saved_dataset(path)
            return
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file, so there is nothing to learn from.")
        for file in files:
            yield from read_rows(file)
        return
    reader = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} is no {', '.join(SUFFIXES)} file and no folder of those, so it is not known how to read it. "
            "Write one JSON object a line into a .jsonl file."
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}. Check the path and the file's encoding (UTF-8).") from error


def read_samples(
    rows: Iterable[tuple[str, Row]],
    *,
    revision: str = "2026-04",
    skip_bad: bool = False,
    report: ReadReport | None = None,
) -> Iterator[Conversation | PlainText]:
    """What each row is to teach. Raises: DataError for a row that cannot be used, unless `skip_bad` counts it only."""
    report = ReadReport() if report is None else report
    for source, row in rows:
        report.rows += 1
        try:
            yield sample_of(row, source, revision)
        except DataError as error:
            note_fault(report, error, skip_bad)


def note_fault(report: ReadReport, error: DataError, skip_bad: bool) -> None:
    """Count a row that cannot be used, or raise its error."""
    if not skip_bad:
        raise error
    report.skipped += 1
    if len(report.faults) < 10:
        report.faults.append(str(error))


def sample_of(row: Row, source: str, revision: str = "2026-04") -> Conversation | PlainText:
    """What one row is to teach. Raises: DataError naming `source` and what to do."""
    if not isinstance(row, Mapping):
        raise _fault(
            source, f"holds a {type(row).__name__}, not a row", 'Write an object, such as {"messages": [...]}.'
        )
    columns = {name for name, value in row.items() if value is not None}
    if "canary" in columns or CANARY in str(row):
        raise _fault(source, "is a test item (it carries the canary)", "Do not train on the items of an evaluation.")
    for names, what in _PREFERENCES.items():
        if names <= columns:
            raise _fault(
                source,
                f"has the columns {', '.join(sorted(columns))}: {what}, which is preference data. SFT learns to write "
                "one answer and would not see the others",
                "Make rows of `messages` from the good answers, or train with rewards (kind = grpo).",
            )
    seen = sorted(name for name in _PICTURES if row.get(name))
    if seen:
        raise _fault(
            source, f"has the column {seen[0]}, but nothing of a picture is learned here", "Use rows of text alone."
        )
    if "messages" in columns or "conversations" in columns:
        spoken = row["messages"] if "messages" in columns else row["conversations"]
        return _conversation(row, _messages(spoken, source), 0, source, revision)
    if {"prompt", "completion"} <= columns:
        return _prompted(row, source, revision)
    if "text" in columns:
        return PlainText(_text(row["text"], "text", source), source=source)
    if "prompt" in columns:
        raise _fault(source, "has a prompt and no completion, so there is nothing to learn", "Add `completion`.")
    raise _fault(
        source,
        f"has the columns {', '.join(sorted(columns)) or '(none)'}, none of which says what to learn",
        "Use `messages`, `prompt` with `completion`, or `text`.",
    )


def _prompted(row: Row, source: str, revision: str) -> Conversation | PlainText:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(completion, prompt, source)
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, source)
    if isinstance(completion, str):
        written = [{"role": "assistant", "content": completion}]
    else:
        written = _messages(completion, source)
    return _conversation(row, [*given, *written], len(given), source, revision)


def _conversation(row: Row, messages: list[dict[str, Any]], num_given: int, source: str, revision: str) -> Conversation:
    tools = _parsed(row.get("tools"), "tools", source)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _fault(
            source, "has tools that are no list of objects", 'Write [{"type": "function", "function": {...}}].'
        )
    if row.get("functions"):
        raise _fault(source, "has functions, the shape before tools", "Write them as tools.")
    functions = [_without_nulls(tool if "function" in tool else {"function": tool}) for tool in tools or []]
    mode, effort, drops = _rendering(row, source, revision)
    return Conversation(messages, functions or None, mode, effort, drops, num_given, source)


def _rendering(row: Row, source: str, revision: str) -> tuple[str | None, str | None, bool]:
    """(thinking mode or None, effort word, whether old reasoning is dropped) that a row asks for."""
    asked = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs", source) or {}
    if not isinstance(asked, Mapping):
        raise _fault(source, "has chat_template_kwargs that are no object", 'Write {"enable_thinking": true}.')
    known = ("thinking_mode", "reasoning_effort", "drop_thinking", *_MODE_KEYS)
    unknown = [name for name, value in asked.items() if name not in known and value is not None]
    if unknown:
        raise _fault(
            source,
            f"asks the chat template for {', '.join(unknown)}, which this format does not have",
            f"Known are {', '.join(known)}.",
        )
    mode = row.get("thinking_mode") or asked.get("thinking_mode")
    for name in _MODE_KEYS:
        if isinstance(asked.get(name), bool):
            mode = "thinking" if asked[name] else "chat"
    if mode not in (None, "chat", "thinking"):
        raise _fault(source, f"has the thinking mode {mode!r}", "Use thinking or chat.")
    drops = asked.get("drop_thinking") is not False
    word = row.get("reasoning_effort") or asked.get("reasoning_effort")
    if word is None:
        return mode, None, drops
    if not isinstance(word, str):
        raise _fault(source, f"has the reasoning effort {word!r}", "Use a word, such as high or max.")
    try:
        meant, effort = resolve_effort(word, revision)
    except RequestError as error:
        raise DataError(f"{source}: {error}") from error
    return mode or meant, effort if (mode or meant) == "thinking" else None, drops


def _messages(value: Any, source: str) -> list[dict[str, Any]]:
    value = _parsed(value, "messages", source)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise _fault(source, "has messages that are no list of objects", 'Write [{"role": ..., "content": ...}, ...].')
    return [_message(message, source) for message in value]


def _message(message: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A message in the shape the encoder reads: columns without a value left out, arguments as JSON text."""
    out = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "role" not in out and "from" in out:
        speaker = out.pop("from")
        out["role"] = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        out["content"] = out.pop("value", None)
    for name in ("thinking", "reasoning"):
        if isinstance(out.get(name), str):
            out.setdefault("reasoning_content", out.pop(name))
    if out.get("function_call"):
        raise _fault(source, "has a function_call, the shape before tool_calls", "Write it as tool_calls.")
    calls = _parsed(out.get("tool_calls"), "tool_calls", source) if out.get("tool_calls") else None
    if calls:
        if not isinstance(calls, list):
            raise _fault(source, "has tool_calls that are no list", 'Write [{"function": {...}}].')
        out["tool_calls"] = [_call(call, source) for call in calls]
    elif out.get("role") == "assistant" and out.get("content") is None and not out.get("reasoning_content"):
        raise _fault(source, "has an assistant message that says nothing", 'Give it content; "" means an empty answer.')
    return out


def _call(call: Any, source: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else call
    if isinstance(call, Mapping) and function is None:
        function = {name: call[name] for name in ("name", "arguments") if name in call}
    if not isinstance(function, Mapping):
        raise _fault(
            source, "has a tool call that is no object", 'Write {"function": {"name": ..., "arguments": ...}}.'
        )
    function = dict(function)
    if isinstance(function.get("arguments"), Mapping):
        function["arguments"] = json.dumps(_without_nulls(function["arguments"]), ensure_ascii=False)
    out = {"type": "function", "function": function}
    return {**out, "id": call["id"]} if call.get("id") is not None else out


def _without_nulls(value: Any) -> Any:
    """Columnar files give every object the keys of all; those without a value are no part of it."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, name: str, source: str) -> Any:
    """A column that may hold its JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise _fault(source, f"has a column {name} of text that is no JSON ({error})", "Correct it.") from error


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str) or not value:
        raise _fault(source, f"has a column {name} without text", "Give it some, or leave the row out.")
    return value


def _fault(source: str, what: str, fix: str) -> DataError:
    return DataError(f"{source} {what}. {fix}")


# ---------------------------------------------------------------------- files


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            if CANARY in line:
                raise _fault(place, "is a test item (it carries the canary)", "Do not train on evaluation items.")
            try:
                row = json.loads(line)
            except ValueError as error:
                row = _Broken(error)
            yield place, row


class _Broken(dict[str, Any]):
    """A line that is no JSON, which only becomes an error where rows are judged: it may be one to skip."""

    def __init__(self, error: ValueError) -> None:
        super().__init__({f"(no JSON: {error})": True})


def _json_list(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}). For one object a line the name must end in .jsonl.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows. Wrap its rows in [ ].")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}: row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError(
            f'{path} needs pyarrow, which is not installed. Install it with: pip install "rorqual[data]", or convert '
            "the file to .jsonl."
        ) from error
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}: row {number}", row
    except ArrowInvalid as error:
        raise DataError(f"{path} is no readable parquet file ({error}). Fetch it again.") from error


def _saved_dataset(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise MissingExtraError(
            f"{path} was saved by the `datasets` library, which is not installed. Install it with: "
            'pip install "rorqual[data]", or export the rows with to_json into a .jsonl file.'
        ) from error
    loaded = load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        raise DataError(
            f"{path} holds several splits ({', '.join(loaded)}), and it is not said which to learn from. Name the "
            "folder of one, such as " + str(path / next(iter(loaded), "train")) + "."
        )
    for number, row in enumerate(loaded, 1):
        yield f"{path.name}: row {number}", row
