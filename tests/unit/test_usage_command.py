"""`rorqual keys` and `rorqual usage` over a ledger, and the options of `serve` that make its operations."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rorqual.cli import main
from rorqual.cli.operating import build_operations, certificate, open_ledger
from rorqual.errors import ConfigError
from rorqual.ledger import Asked, Ledger, Limits, Used
from rorqual.ledger import keys as stored
from rorqual.money import PICOS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out = run(capsys, *words, "--json")
    assert code == 0, out
    return json.loads(out)


def test_a_key_from_its_making_to_its_end(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rorqual keys add NAME" in run(capsys, "keys")[1]
    code, secret = run(capsys, "keys", "add", "ada", "--budget", "5", "--limit", "10")
    assert code == 0 and secret.startswith("sk-") and len(secret.split()) == 1
    made = run_json(capsys, "keys", "add", "bob", "--tokens-per-minute", "900")
    assert run_json(capsys, "keys", "top-up", "ada", "2.50")["balance"] == "7.50"
    ledger = Ledger(home / "ledger.sqlite")
    key, other = stored.find(ledger.database, secret.strip()), stored.find(ledger.database, made["key"])
    assert key is not None and other is not None
    assert (key.granted, key.topped_up, key.limits) == (5 * PICOS, PICOS * 5 // 2, Limits(running=10))
    assert (other.name, other.balance, other.limits) == ("bob", None, Limits(tokens_per_minute=900))
    assert run(capsys, "keys", "revoke", "ada")[1] == "ada is revoked\n"
    assert stored.find(ledger.database, secret.strip()) is None
    listed = run_json(capsys, "keys", "list")
    assert [(key["name"], key["balance"], bool(key["revoked"])) for key in listed] == [
        ("ada", "7.50", True),
        ("bob", None, False),
    ]
    table = run(capsys, "keys", "list")[1]
    assert "7.50 USD" in table and "running 10" in table and "revoked" in table and "no budget" in table
    assert secret.strip() not in table and secret.strip()[-4:] in table
    ledger.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("add", "rorqual keys add NAME"),
        ("list ada", "rorqual keys list"),
        ("top-up ada", "rorqual keys top-up NAME AMOUNT"),
        ("revoke ada 5", "rorqual keys revoke NAME"),
        ("top-up ada much", "no key named"),
        ("add ada --budget much", "'much' is no amount"),
        ("revoke eve", "no key named 'eve'"),
        ("revoke eve --limit 3", "belong to a new key"),
    ],
)
def test_wrong_words_are_told_the_right_ones(
    home: Path, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    code, out = run(capsys, "keys", *words.split())
    assert code == 2 and (says in out or "is no amount" in out), out


def test_usage_by_any_group(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nothing was asked yet" in run(capsys, "usage")[1]
    ledger = Ledger(home / "ledger.sqlite")
    for days, account, cost in ((10, "ada", 1), (1, "ada", 20), (0, "", 300)):
        asked = Asked(account, "", "minke", "/v1/responses", "trace", 7, 0)
        used = Used(200, "stop", 7, 3, 4, 1500, 5, cost * PICOS, cost * PICOS, 1.0)
        ledger.record(asked, time.time() - days * 86_400, used)
    ledger.close()
    assert [row["cost"] for row in run_json(capsys, "usage", "--by", "key")["rows"]] == ["300.00", "21.00"]
    found = run_json(capsys, "usage", "--since", "3d")
    assert found["total"]["cost"] == "320.00" and found["total"]["requests"] == 2
    assert [set(row) >= {"day", "key", "model"} for row in found["rows"]] == [True, True]
    assert run_json(capsys, "usage", "--since", "2020-01-01")["total"]["completion_tokens"] == 4500
    table = run(capsys, "usage", "--by", "model,endpoint")[1]
    assert "/v1/responses" in table and "4,500" in table and "321.00" in table and "cost USD" in table
    assert "all" in table
    for words, says in (("--by colour", "colour"), ("--since soon", "no day and no time ago")):
        code, out = run(capsys, "usage", *words.split())
        assert code == 2 and says in out


def test_options_become_operations(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("ada sk-ada\n")
    made = build_operations(
        api_keys=["sk-one", "sk-two"], key_file=path, limit=3, price_as="deepseek-v4-pro", allow_origin=["*"],
        max_body_bytes=99,
    )  # fmt: skip
    names = [made.accounts.gatekeeper.identify(f"Bearer {key}", None).account for key in ("sk-one", "sk-two", "sk-ada")]
    assert names == ["api-key", "api-key-2", "ada"]
    assert (made.max_body_bytes, made.allowed_origins) == (99, ["*"]) and (home / "ledger.sqlite").exists()
    made.close()
    assert build_operations(no_ledger=True).accounts.ledger is None
    with pytest.raises(ConfigError, match="--no-ledger"):
        build_operations(ledger=path, no_ledger=True)
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        certificate(None, path)
    with pytest.raises(ConfigError, match="does not load"):
        certificate(path, None)


def test_a_folder_that_takes_no_ledger_is_only_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "file"))
    assert open_ledger(None) is None and "No usage is kept" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be used"):  # one that was asked for
        open_ledger(tmp_path / "file" / "ledger.sqlite")
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path))
    (tmp_path / "ledger.sqlite").write_text("damaged: " * 200)  # its keys would not be asked for
    with pytest.raises(ConfigError, match="cannot be used"):
        open_ledger(None)
