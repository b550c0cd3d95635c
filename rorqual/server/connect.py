"""Point a coding client at a server of ours by writing its own configuration, and undo it.

Formats, from the clients' documentation and public code: Claude Code's `settings.json` (`env`), opencode's
`opencode.json` (a provider on `@ai-sdk/openai-compatible`), Cline's `globalState.json` and `secrets.json` below
`~/.cline/data` (its command line; the VS Code extension of newer versions shares them), Cursor's `state.vscdb`.

Only the members named here are written. What stood there before is kept in a record beside our own data, with a copy of
each JSON file; `undo` puts files back byte for byte where nobody has written them since, or else takes back our members
alone. Connecting twice changes nothing the second time, and keeps the first record.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rorqual.errors import ConfigError

Client = Literal["claude-code", "opencode", "cline", "cursor"]

PLACEHOLDER: Final = "rorqual"
"""Sent as the key where none is asked for: clients insist on one."""

_CURSOR_ROW = "src.vs.platform.reactivestorage.browser.reactiveStorageServiceImpl.persistentStorage.applicationUser"
_CURSOR_KEY_ROW = "cursorAuth/openAIKey"
_ABSENT: Final = {"absent": True}

Pointer = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """Where to point a client. url: of the server, without `/v1`."""

    url: str
    model: str | None = None
    key: str = PLACEHOLDER


@dataclass(frozen=True)
class Outcome:
    """What was done. files: those that were written. advice: what is left to the person."""

    files: Sequence[Path]
    advice: Sequence[str] = ()


def connect(client: Client, target: Target, records: Path, home: Path | None = None) -> Outcome:
    """Write the client's configuration. records: folder of ours for what stood there before.

    Raises: ConfigError where a file is not what it should be; nothing was written then.
    """
    home = home or Path.home()
    if client == "cursor":
        return _connect_cursor(target, records, home)
    plans = {"claude-code": _claude_code, "opencode": _opencode, "cline": _cline}[client](target, home)
    record = _read_record(records, client)
    texts: dict[Path, str] = {}
    for path, members in plans.items():  # all are read before one is written
        was = _load(path)
        now = json.loads(json.dumps(was if was is not None else {}))
        for pointer, value in members.items():
            _set(now, pointer, value, path)
        if now != was:
            texts[path] = _dump(now)
        entry = record.setdefault(str(path), {"existed": was is not None, "before": {}, "written": {}})
        for pointer, value in members.items():
            name = json.dumps(pointer)
            entry["before"].setdefault(name, _get(was, pointer))
            entry["written"][name] = value
    for path, text in texts.items():
        entry = record[str(path)]
        copy = _copy_of(records, client, path)
        if "text" in entry:  # connected again: what the person wrote in between is in no copy
            entry["text"] = text if _holds(path, entry["text"]) else None
            continue
        if entry["existed"]:
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.copy2(path, copy)
        entry["text"] = text
    _write_record(records, client, record)  # before the files, so that whatever is written can be undone
    for path, text in texts.items():
        _write(path, text)
    return Outcome(tuple(texts), _ADVICE[client])


def undo(client: Client, records: Path, home: Path | None = None) -> Outcome:
    """Put back what stood there before `connect`. A file that cannot be read any more is left, and stays recorded.

    Raises: ConfigError when nothing was connected.
    """
    home = home or Path.home()
    record = _read_record(records, client)
    if not record:
        raise ConfigError(f"{client} was not connected from here, so there is nothing to undo.")
    if client == "cursor":
        return _undo_cursor(records, record)
    changed, left, advice = list[Path](), dict[str, Any](), list[str]()
    for name, entry in record.items():
        path = Path(name)
        if not path.exists():
            continue
        copy = _copy_of(records, client, path)
        if _holds(path, entry.get("text")):  # nobody has written it since
            if entry["existed"] and copy.exists():
                _write(path, copy.read_bytes())
            elif not entry["existed"]:
                path.unlink()
            changed.append(path)
            continue
        try:
            now = _load(path) or {}
        except ConfigError as error:  # the others are undone all the same
            left[name] = entry
            advice.append(f"{error} What was written there has to be taken out first; then undo once more.")
            continue
        was = json.loads(json.dumps(now))
        for name_of, value in entry["written"].items():
            pointer = tuple(json.loads(name_of))
            if _get(now, pointer) == value:  # a later choice of the person's stays
                _restore(now, pointer, entry["before"][name_of])
        if now != was:
            _write(path, _dump(now))
            changed.append(path)
    _forget(records, client, {name: entry for name, entry in record.items() if name not in left})
    if left:
        _write_record(records, client, left)
    return Outcome(tuple(changed), tuple(advice))


_ADVICE: Final[dict[str, tuple[str, ...]]] = {
    "claude-code": ("Start `claude` again; /status shows the address.",),
    "opencode": ("Start `opencode` again and choose the model with /models.",),
    "cline": ("Reload the editor's window, or start `cline` again.",),
}


def _claude_code(target: Target, home: Path) -> dict[Path, dict[Pointer, Any]]:
    folder = Path(os.environ.get("CLAUDE_CONFIG_DIR") or home / ".claude")
    members: dict[Pointer, Any] = {
        ("env", "ANTHROPIC_BASE_URL"): target.url,
        ("env", "ANTHROPIC_AUTH_TOKEN"): target.key,
    }
    if target.model is not None:
        for name in ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL"):
            members["env", f"ANTHROPIC_{name}"] = target.model
    return {folder / "settings.json": members}


def _opencode(target: Target, home: Path) -> dict[Path, dict[Pointer, Any]]:
    model = _needed(target.model, "opencode")
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "opencode"
    path = next((one for one in (folder / "opencode.jsonc", folder / "opencode.json") if one.exists()), None)
    members: dict[Pointer, Any] = {
        ("provider", "rorqual", "npm"): "@ai-sdk/openai-compatible",
        ("provider", "rorqual", "name"): "Rorqual",
        ("provider", "rorqual", "options", "baseURL"): f"{target.url}/v1",
        ("provider", "rorqual", "options", "apiKey"): target.key,
        ("provider", "rorqual", "models", model, "name"): model,
        ("model",): f"rorqual/{model}",
    }
    if path is None:
        members["$schema",] = "https://opencode.ai/config.json"
    return {path or folder / "opencode.json": members}


def _cline(target: Target, home: Path) -> dict[Path, dict[Pointer, Any]]:
    model = _needed(target.model, "cline")
    folder = Path(os.environ.get("CLINE_DIR") or home / ".cline") / "data"
    state: dict[Pointer, Any] = {("openAiBaseUrl",): f"{target.url}/v1"}
    for mode in ("act", "plan"):
        state[f"{mode}ModeApiProvider",] = "openai"
        state[f"{mode}ModeOpenAiModelId",] = model
    return {folder / "globalState.json": state, folder / "secrets.json": {("openAiApiKey",): target.key}}


def _needed(model: str | None, client: str) -> str:
    if model is None:
        raise ConfigError(f"{client} has to be told which model to ask for. Name it with --model.")
    return model


# ---------------------------------------------------------------- JSON files


def _load(path: Path) -> dict[str, Any] | None:
    """The file's object; None where there is no file. Raises: ConfigError when it is anything else."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as JSON ({error}), perhaps because it has comments, which would be lost. Nothing "
            "was changed. Add the settings by hand; docs/referee.md lists them."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds no JSON object, so it is not that client's configuration. Nothing was changed."
        )
    return value


def _dump(value: Any) -> str:
    """JSON for a file; half a surrogate pair, which UTF-8 cannot carry, makes all of it ASCII."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2) + "\n"
    return text


def _get(value: Any, pointer: Pointer) -> Any:
    for part in pointer:
        if not isinstance(value, Mapping) or part not in value:
            return dict(_ABSENT)
        value = value[part]
    return value


def _set(value: dict[str, Any], pointer: Pointer, new: Any, path: Path) -> None:
    for part in pointer[:-1]:
        value = value.setdefault(part, {})
        if not isinstance(value, dict):
            raise ConfigError(f"`{part}` in {path} is no object, so nothing can be put there. Nothing was changed.")
    value[pointer[-1]] = new


def _restore(value: dict[str, Any], pointer: Pointer, before: Any) -> None:
    """Put a member back, or take it and the objects that it leaves empty away."""
    if before != _ABSENT:
        _set(value, pointer, before, Path())
        return
    holders = [value]
    for part in pointer[:-1]:
        holders.append(holders[-1][part])
    for holder, part in zip(reversed(holders), reversed(pointer), strict=True):
        if part is pointer[-1] or holder[part] == {}:
            del holder[part]
        else:
            return


def _holds(path: Path, text: str | None) -> bool:
    return text is not None and path.exists() and path.read_bytes() == text.encode()


def _write(path: Path, content: str | bytes) -> None:
    """Replace a file at once, with its mode; a new one is its owner's alone, since it holds a key."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- the record


def _read_record(records: Path, client: str) -> dict[str, Any]:
    path = records / f"{client}.json"
    return {} if not path.exists() else dict(json.loads(path.read_text(encoding="utf-8")))


def _write_record(records: Path, client: str, record: Mapping[str, Any]) -> None:
    records.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(records / f"{client}.json", json.dumps(record, indent=2) + "\n")


def _copy_of(records: Path, client: str, path: Path) -> Path:
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]  # two folders may hold a file of one name
    return records / client / f"{mark}-{path.name}"


def _forget(records: Path, client: str, record: Mapping[str, Any]) -> None:
    for name in record:
        _copy_of(records, client, Path(name)).unlink(missing_ok=True)
    (records / f"{client}.json").unlink(missing_ok=True)


# ---------------------------------------------------------------- Cursor


def _cursor_database(home: Path) -> Path:
    if sys.platform == "darwin":
        folder = home / "Library" / "Application Support"
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    path = folder / "Cursor" / "User" / "globalStorage" / "state.vscdb"
    if not path.exists():
        raise ConfigError(
            f"{path} is not there, so Cursor has not been started on this machine. Start and quit it once."
        )
    return path


def _connect_cursor(target: Target, records: Path, home: Path) -> Outcome:
    path = _cursor_database(home)
    record = _read_record(records, "cursor")
    try:
        with closing(sqlite3.connect(path, timeout=2)) as database, database:
            blob = _row(database, _CURSOR_ROW)
            if blob is None:
                raise ConfigError(f"{path} has no settings of Cursor's yet. Start Cursor once, quit it, and try again.")
            state = json.loads(blob)
            key = _row(database, _CURSOR_KEY_ROW)
            if not record:
                before = {name: state.get(name, dict(_ABSENT)) for name in ("openAIBaseUrl", "useOpenAIKey")}
                record = {"database": str(path), "before": before, "key": key}
            new = {**state, "openAIBaseUrl": f"{target.url}/v1", "useOpenAIKey": True}
            record["written"] = {"openAIBaseUrl": new["openAIBaseUrl"], "useOpenAIKey": True, "key": target.key}
            if new == state and key == target.key:
                return Outcome(())
            _write_record(records, "cursor", record)
            _put(database, _CURSOR_ROW, json.dumps(new))
            _put(database, _CURSOR_KEY_ROW, target.key)
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be changed ({error}). Quit Cursor, which holds it, and try again.") from error
    advice = [
        "Cursor must have been closed meanwhile, or it writes its own settings over these.",
        "Cursor's servers call the address, so it has to be reachable from the internet; a loopback address is not.",
    ]
    return Outcome((path,), tuple(advice))


def _undo_cursor(records: Path, record: Mapping[str, Any]) -> Outcome:
    path = Path(record["database"])
    try:
        with closing(sqlite3.connect(path, timeout=2)) as database, database:
            state = json.loads(_row(database, _CURSOR_ROW) or "{}")
            for name, before in record["before"].items():
                if state.get(name) == record["written"][name]:
                    if before == _ABSENT:
                        del state[name]
                    else:
                        state[name] = before
            _put(database, _CURSOR_ROW, json.dumps(state))
            if _row(database, _CURSOR_KEY_ROW) == record["written"]["key"]:
                _put(database, _CURSOR_KEY_ROW, record["key"])
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be changed ({error}). Quit Cursor, which holds it, and try again.") from error
    _forget(records, "cursor", {})
    return Outcome((path,))


def _row(database: sqlite3.Connection, key: str) -> str | None:
    found = database.execute("SELECT value FROM ItemTable WHERE key = ?", (key,)).fetchone()
    if found is None:
        return None
    return found[0].decode() if isinstance(found[0], bytes) else str(found[0])


def _put(database: sqlite3.Connection, key: str, value: str | None) -> None:
    database.execute("DELETE FROM ItemTable WHERE key = ?", (key,))
    if value is not None:
        database.execute("INSERT INTO ItemTable (key, value) VALUES (?, ?)", (key, value))
