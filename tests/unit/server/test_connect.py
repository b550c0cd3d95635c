"""Clients' configurations: written, unchanged the second time, put back byte for byte, later edits kept."""

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest

from rorqual.errors import ConfigError
from rorqual.server.connect import Client, Target, connect, undo

TARGET = Target("http://127.0.0.1:8100", "m", "sk-mine")
FILES = {
    "claude-code": [".claude/settings.json"],
    "opencode": [".config/opencode/opencode.json"],
    "cline": [".cline/data/globalState.json", ".cline/data/secrets.json"],
}
ROW = "src.vs.platform.reactivestorage.browser.reactiveStorageServiceImpl.persistentStorage.applicationUser"


@pytest.fixture(autouse=True)
def no_folders_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLAUDE_CONFIG_DIR", "XDG_CONFIG_HOME", "CLINE_DIR"):
        monkeypatch.delenv(name, raising=False)


def contents(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("client", FILES)
@pytest.mark.parametrize("existing", [None, '{\n    "mine": [1, 2],"env": {"A": "b"},\n "model": "other" }\n'])
def test_there_and_back(client: Client, existing: str | None, tmp_path: Path):
    home, records = tmp_path / "home", tmp_path / "records"
    home.mkdir()
    for name in FILES[client]:
        if existing is not None:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(existing)
            (home / name).chmod(0o640)
    before = contents(home)
    assert len(connect(client, TARGET, records, home).files) == len(FILES[client])
    written = contents(home)
    assert "127.0.0.1:8100" in written[FILES[client][0]].decode() and b"sk-mine" in b"".join(written.values())
    if existing is not None:
        assert json.loads(written[FILES[client][0]])["mine"] == [1, 2]
    modes = {(home / name).stat().st_mode & 0o777 for name in FILES[client]}
    assert modes == {0o600 if existing is None else 0o640}
    assert not connect(client, TARGET, records, home).files and contents(home) == written
    assert connect(client, Target("http://127.0.0.1:9", "n"), records, home).files
    undo(client, records, home)
    assert contents(home) == before
    with pytest.raises(ConfigError, match="nothing to undo"):
        undo(client, records, home)
    assert not [path for path in records.rglob("*") if path.is_file()]


@pytest.mark.parametrize("client", FILES)
def test_what_the_person_changed_since_stays(client: Client, tmp_path: Path):
    home, records = tmp_path / "home", tmp_path / "records"
    path = home / FILES[client][0]
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    connect(client, TARGET, records, home)
    value = json.loads(path.read_text())
    value["later"] = True
    path.write_text(json.dumps(value))
    undo(client, records, home)
    assert json.loads(path.read_text()) == {"mine": 1, "later": True}


@pytest.mark.parametrize("existing", [None, {"mine": 1}])
def test_what_was_written_between_two_connects_stays(existing: Any, tmp_path: Path):
    home, records = tmp_path / "home", tmp_path / "records"
    path = home / FILES["claude-code"][0]
    path.parent.mkdir(parents=True)
    if existing is not None:
        path.write_text(json.dumps(existing))
    connect("claude-code", TARGET, records, home)
    path.write_text(json.dumps({**json.loads(path.read_text()), "theme": "dark"}))
    for port in (9, 10):
        connect("claude-code", Target(f"http://127.0.0.1:{port}"), records, home)
    undo("claude-code", records, home)
    assert json.loads(path.read_text()) == {**(existing or {}), "theme": "dark"}


def test_two_folders_of_settings_are_put_back_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {"a": b'{"mine": "a"}', "b": b'{"mine": "b",\r\n "other": 1}\r\n'}
    for name, text in before.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_bytes(text)
        monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / name))
        connect("claude-code", TARGET, tmp_path / "records", tmp_path)
    undo("claude-code", tmp_path / "records", tmp_path)
    assert {name: (tmp_path / name / "settings.json").read_bytes() for name in before} == before


def test_a_later_choice_of_address_is_not_undone(tmp_path: Path):
    path = tmp_path / ".claude" / "settings.json"
    connect("claude-code", TARGET, tmp_path / "records", tmp_path)
    value = json.loads(path.read_text())
    value["env"]["ANTHROPIC_BASE_URL"] = "https://elsewhere"
    path.write_text(json.dumps(value))
    undo("claude-code", tmp_path / "records", tmp_path)
    assert json.loads(path.read_text()) == {"env": {"ANTHROPIC_BASE_URL": "https://elsewhere"}}


@pytest.mark.parametrize("text", ['// mine\n{"a": 1}', "[1]", '{"env": 3}'])
def test_a_file_that_cannot_be_merged_is_left_alone(text: str, tmp_path: Path):
    path = tmp_path / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match="Nothing was changed"):
        connect("claude-code", TARGET, tmp_path / "records", tmp_path)
    assert path.read_text() == text


def test_shapes(tmp_path: Path):
    for client in FILES:
        connect(client, TARGET, tmp_path / "records", tmp_path)  # type: ignore[arg-type]
    claude, opencode, state, secrets = (
        json.loads((tmp_path / name).read_text()) for names in FILES.values() for name in names
    )
    assert claude["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8100"  # it adds /v1/messages itself
    assert claude["env"]["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "m"
    provider = opencode["provider"]["rorqual"]
    assert provider["npm"] == "@ai-sdk/openai-compatible" and provider["models"] == {"m": {"name": "m"}}
    assert provider["options"] == {"baseURL": "http://127.0.0.1:8100/v1", "apiKey": "sk-mine"}
    assert opencode["model"] == "rorqual/m"
    assert state["actModeApiProvider"] == state["planModeApiProvider"] == "openai"
    assert state["actModeOpenAiModelId"] == state["planModeOpenAiModelId"] == "m"
    assert state["openAiBaseUrl"].endswith("/v1") and secrets == {"openAiApiKey": "sk-mine"}
    with pytest.raises(ConfigError, match="--model"):
        connect("cline", Target("http://a"), tmp_path / "records", tmp_path)


def test_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "linux")
    records = tmp_path / "records"
    with pytest.raises(ConfigError, match="has not been started"):
        connect("cursor", TARGET, records, tmp_path)
    path = tmp_path / ".config" / "Cursor" / "User" / "globalStorage" / "state.vscdb"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE ItemTable (key TEXT UNIQUE ON CONFLICT REPLACE, value BLOB)")
        database.execute("INSERT INTO ItemTable VALUES (?, ?)", (ROW, json.dumps({"mine": "ü", "useOpenAIKey": False})))

    def rows() -> dict[str, Any]:
        with closing(sqlite3.connect(path)) as database:
            return dict(database.execute("SELECT key, value FROM ItemTable"))

    before = rows()
    assert connect("cursor", TARGET, records, tmp_path).files
    state = json.loads(rows()[ROW])
    assert state == {"mine": "ü", "useOpenAIKey": True, "openAIBaseUrl": "http://127.0.0.1:8100/v1"}
    assert rows()["cursorAuth/openAIKey"] == "sk-mine"
    assert not connect("cursor", TARGET, records, tmp_path).files
    undo("cursor", records, tmp_path)
    assert {**rows(), ROW: json.loads(rows()[ROW])} == {**before, ROW: json.loads(before[ROW])}
    assert set(get_args(Client)) == {*FILES, "cursor"}


def test_a_file_that_cannot_be_read_any_more_is_left_and_the_others_are_undone(tmp_path: Path):
    home, records = tmp_path / "home", tmp_path / "records"
    connect("cline", TARGET, records, home)
    state, secrets = (home / name for name in FILES["cline"])
    was = state.read_bytes()
    state.write_bytes(was.replace(b"{", b'{"name": "caf\xe9",', 1))
    outcome = undo("cline", records, home)
    assert not secrets.exists() and outcome.files == (secrets,) and "cannot be read" in outcome.advice[0]
    assert state.read_bytes().count(b"\xe9") == 1
    state.write_bytes(was)
    assert undo("cline", records, home).files == (state,) and not state.exists()


def test_half_characters_and_odd_names_of_folders(tmp_path: Path):
    home, records = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "records"
    path = home / FILES["claude-code"][0]
    path.parent.mkdir(parents=True)
    path.write_text('{"half": "\\ud800"}')
    connect("claude-code", TARGET, records, home)
    assert json.loads(path.read_text())["half"] == "\ud800"
    undo("claude-code", records, home)
    assert path.read_text() == '{"half": "\\ud800"}'
