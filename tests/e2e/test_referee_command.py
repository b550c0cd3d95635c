"""`rorqual referee` as a process: it starts, judges, records, and leaves at a signal. How its options refuse."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live_server import live
from mock_upstream import MockUpstream, calls, says

from rorqual.cli import main
from rorqual.journal import Event, replay_folder

TOOLS: list[Any] = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


def test_a_process_from_start_to_end(tmp_path: Path):
    policy = tmp_path / "policy.toml"
    policy.write_text('profile = "chat"\n[aliases]\nclock = "now"\n[[forbid]]\ntool = "rm*"\n')
    mock = MockUpstream([says("", calls=[calls("clock", "")])])
    with live(mock.app()) as upstream:  # type: ignore[arg-type]
        command = [
            sys.executable, "-m", "rorqual", "referee", "--upstream", f"{upstream}/v1", "--mode", "enforce", "--policy",
            str(policy), "--port", "0", "--json", "--journal", str(tmp_path / "journal"), "--log", "off",
        ]  # fmt: skip
        environment = {**os.environ, "RORQUAL_HOME": str(tmp_path), "RORQUAL_UPSTREAM_KEY": "sk-upstream-0123456789"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            about = json.loads(process.stdout.readline())
            assert about["mode"] == "enforce" and about["policy_id"].startswith("chat-")
            body = {"model": "m", "messages": [{"role": "user", "content": "What time is it?"}], "tools": TOOLS}
            answer = httpx2.post(f"{about['api']}/chat/completions", json=body, headers={"authorization": "Bearer x"})
            assert answer.headers["x-referee-verdict"] == "repaired"
            made = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
            assert made == {"name": "now", "arguments": "{}"}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert mock.headers[0]["authorization"] == "Bearer sk-upstream-0123456789"
    kinds = [one.kind for _, one in replay_folder(tmp_path / "journal") if isinstance(one, Event)]
    assert kinds == ["referee.verdict"]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "journal").rglob("*") if path.is_file())
    assert b"sk-upstream" not in stored


@pytest.mark.parametrize("arguments, told", [
    (["--upstream", "here"], "--upstream is 'here'"),
    (["--upstream", "http://a", "--mode", "enforce", "--stream", "annotate_after"], "before they are checked"),
    (["--upstream", "http://a", "--policy", "/nowhere.toml"], "cannot be read"),
    (["--upstream", "http://a", "--host", "0.0.0.0", "--no-journal", "--no-ledger"], "--no-auth"),
    (["--upstream", "http://a", "--api-key", "k", "--no-journal", "--no-ledger"], "RORQUAL_UPSTREAM_KEY"),
    (["--upstream", "http://a", "--journal", "x", "--no-journal"], "Leave one of them out"),
])  # fmt: skip
def test_options_that_cannot_be(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["referee", *arguments])
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_policy_with_a_field_nobody_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = tmp_path / "policy.toml"
    for text, told in (("mood = 1", "mood"), ("[[forbid]]\ntool = 'a'\nmatches = '('", "regular expression")):
        policy.write_text(text)
        with pytest.raises(SystemExit):
            main(["referee", "--upstream", "http://a", "--policy", str(policy)])
        assert told in capsys.readouterr().err
