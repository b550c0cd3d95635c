"""The command line as a whole: quick help, exit codes, how errors read."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from rorqual import __version__, errors
from rorqual.cli import COMMANDS, app, build_app, main

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def plain_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RORQUAL_DEBUG", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), ANSI.sub("", captured.out), ANSI.sub("", captured.err)


def make_command(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Put a command in place of `doctor` that ends in `error`."""

    def doctor() -> None:
        raise error

    monkeypatch.setattr(app, "load", lambda name: doctor)


def test_help_lists_every_command_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"│ {name} ", out), name
        assert command.summary.split()[0] in out


def test_short_help_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-h", capsys=capsys)[1] == run("--help", capsys=capsys)[1]


def test_help_is_quick_and_needs_no_torch() -> None:
    code = """
import sys
from rorqual.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""

    def cpu_s() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(cpu_s() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(name, "-h", capsys=capsys)
    assert code == 0
    assert len(re.findall(rf"^\s+(?:\w+=\S+ )?(?:\S+ \| )?rorqual {name}\b", out, re.MULTILINE)) >= 2, "two examples"
    group: Any = typer.main.get_command(build_app([name]))
    for param in group.commands[name].params:
        assert param.help, f"{name}: {param.name} says nothing about itself"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys)[:2] == (0, f"rorqual {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inpsect"], "No such command 'inpsect'. Did you mean 'inspect'?"),
        (["doctor", "--jsn"], "No such option: --jsn"),
        (["up", "--port", "high"], "Invalid value for '--port'"),
    ],
)
def test_a_wrong_request_is_two(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.ConfigError("bad field"), 2),
        (errors.RequestError("bad request"), 2),
        (errors.RequestError("the model failed", status=500), 1),
        (errors.CheckpointError("no such tensor"), 1),
        (errors.MissingExtraError("no extra"), 1),
    ],
)
def test_an_error_is_one_clean_message(
    error: Exception, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_command(monkeypatch, error)
    code, out, err = run("doctor", capsys=capsys)
    assert (code, out, err) == (expected, "", f"{type(error).__name__}: {error}\n")


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    make_command(monkeypatch, errors.DataError("no text"))
    monkeypatch.setenv("RORQUAL_DEBUG", "1")
    with pytest.raises(errors.DataError, match="no text"):
        main(["doctor"])


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    make_command(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_doctor_reports_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("doctor", "--json", capsys=capsys)
    report = json.loads(out)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert code == (0 if report["healthy"] else 1)
    assert findings["python"]["status"] == "ok"
    assert {"torch", "threads", "native kernels", "bundled models", "extra serve", "extra plots"} <= set(findings)


def test_doctor_fails_when_something_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rorqual.cli.doctor.CORE", ("numpy", "no_such_package"))
    code, out, _ = run("doctor", capsys=capsys)
    assert code == 1
    assert "no_such_package not installed; run: make install" in " ".join(out.split())


def test_doctor_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _, out, _ = run("doctor", "--json", capsys=capsys)
    [finding] = [f for f in json.loads(out)["findings"] if f["name"] == "native kernels"]
    assert finding["status"] == "optional"
    assert "no C compiler" in finding["detail"] and "gcc" in finding["detail"]


def test_up_names_the_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("up", "--port", str(port), capsys=capsys)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}: another program listens there already" in err
    assert f"--port {port + 1}" in err and f"make up PORT={port + 1}" in err
