"""An agent on tasks with hidden tests, in a real container: solved, not solved, killed and gone on with, cheated at."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rorqual.agents import RunHooks, RunSettings
from rorqual.agents.models.choose import BUNDLED
from rorqual.agents.models.script import ScriptBackend, load_script
from rorqual.agents.report import records_of
from rorqual.agents.runs import all_runs
from rorqual.errors import ConfigError, SandboxError
from rorqual.evals.agent_tasks import AgentTask, read_tasks, run_tasks, summary
from rorqual.journal.records import ToolCall
from rorqual.sandbox import Sandbox
from rorqual.tokenizer import Tokenizer

BUGGY = "def add(a, b):\n    return a - b\n"
TESTS = (
    "import calc\nfor name, got, due in (('adds', calc.add(2, 3), 5), ('zero', calc.add(4, 0), 4)):\n"
    "    print('PASSED' if got == due else 'FAILED', f'check.py::{name}')\n"
)
TEST_PATCH = (
    "diff --git a/check.py b/check.py\nnew file mode 100644\nindex 0000000..1111111\n--- /dev/null\n+++ b/check.py\n"
    f"@@ -0,0 +1,{TESTS.count(chr(10))} @@\n" + "".join(f"+{line}\n" for line in TESTS.splitlines())
)


PROGRAM = """
import sys
from pathlib import Path

from rorqual.agents import RunSettings
from rorqual.evals.agent_tasks import read_tasks, run_tasks

folder, script, out = sys.argv[1:]
[one] = run_tasks(read_tasks(Path(folder)), RunSettings("-", script=script), Path(out))
print(one.score)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    try:
        Sandbox.create().close()
    except SandboxError as error:
        pytest.skip(f"no container sandbox here: {error}")
    return tmp_path / "home"


def terminal_set(folder: Path) -> Path:
    """One task: a file must say what the environment says; the second test file must be seen by the judge alone."""
    task = folder / "set" / "greet"
    for part in ("environment/data", "tests"):
        (task / part).mkdir(parents=True)
    (task / "task.toml").write_text('version = "1.0"\n[verifier]\ntimeout_sec = 60\n')
    (task / "instruction.md").write_text("Write what $WORD holds into greeting.txt.\n")
    (task / "environment" / "Dockerfile").write_text(
        "FROM ubuntu:24.04\nENV WORD=ahoy\nWORKDIR /app\nCOPY data /app/data\nRUN echo built > /app/built\n"
    )
    (task / "environment" / "data" / "note").write_text("n")
    (task / "tests" / "test.sh").write_text(
        'mkdir -p /logs/verifier\ngrep -qx "$WORD" greeting.txt && test -f data/note -a -f built && r=1 || r=0\n'
        "test -f count && test $(wc -l < count) != 1 && r=0\n"
        "echo $r > /logs/verifier/reward.txt\n"
    )
    return folder / "set"


def swe_set(folder: Path) -> tuple[Path, Path]:
    repo = folder / "repos" / "ada__calc"
    repo.mkdir(parents=True)
    (repo / "calc.py").write_text(BUGGY)
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (repo / "calc.py").write_text(BUGGY.replace("-", "+"))
    subprocess.run([*git, "commit", "-qam", "the fix that nobody may see"], check=True)
    row = {
        "instance_id": "ada__calc-1", "repo": "ada/calc", "base_commit": head, "problem_statement": "add() subtracts.",
        "test_patch": TEST_PATCH, "FAIL_TO_PASS": '["check.py::adds"]', "PASS_TO_PASS": '["check.py::zero"]',
    }  # fmt: skip
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl", folder / "repos"


def script(path: Path, *commands: str) -> Path:
    calls: list[dict[str, Any]] = [
        {"reasoning": "I do it.", "calls": [{"name": "shell", "arguments": {"command": command}}]}
        for command in commands
    ]
    path.write_text(json.dumps({"replies": [*calls, {"reasoning": "Done.", "content": "I did it."}]}))
    return path


def hooks(path: Path) -> Any:
    def made(task: AgentTask) -> RunHooks:
        return RunHooks(backend=lambda settings, box: ScriptBackend(load_script(path), Tokenizer.from_folder(BUNDLED)))

    return made


SETTINGS = RunSettings("-", sandbox={"memory_mb": 512})


def test_terminal_bench(tmp_path: Path) -> None:
    found = read_tasks(terminal_set(tmp_path))
    right = script(tmp_path / "right.json", 'pwd; ls /tests; echo "$WORD" > greeting.txt')
    [good] = run_tasks(found, SETTINGS, tmp_path / "good", hooks=hooks(right))
    assert (good.score, good.ending, good.error) == (1.0, "done", "")
    wrong = script(
        tmp_path / "wrong.json",
        "echo else > greeting.txt",
        "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt",
    )
    [bad] = run_tasks(found, SETTINGS, tmp_path / "bad", hooks=hooks(wrong))
    assert bad.score == 0.0  # a reward that the agent wrote itself does not count
    assert summary([good, bad])["PASS"] == 0.5
    again = run_tasks(found, SETTINGS, tmp_path / "good", hooks=hooks(wrong))
    assert again == [good]  # a finished task is not done again
    with pytest.raises(ConfigError, match="other tasks or settings"):
        run_tasks(found, RunSettings("-", seed=1), tmp_path / "good")
    assert [info.id for info in Sandbox.list()] == []


def test_swe_bench(tmp_path: Path) -> None:
    rows, repos = swe_set(tmp_path)
    found = read_tasks(rows, repos=repos, test_command="python3 check.py")
    fix = script(
        tmp_path / "fix.json", "git log --format=%s; sed -i 's/a - b/a + b/' calc.py; echo 'print(1)' > check.py"
    )
    [good] = run_tasks(found, SETTINGS, tmp_path / "good", hooks=hooks(fix))
    assert good.score == 1.0, (good.error, good.details)
    assert "+    return a + b" in good.details["patch"]
    [row] = map(json.loads, (tmp_path / "good" / "predictions.jsonl").read_text().splitlines())
    assert row["instance_id"] == "ada__calc-1" and row["model_patch"] == good.details["patch"]
    cheat = script(
        tmp_path / "cheat.json",
        "git log --format=%s > /tmp/log; grep -c nobody /tmp/log; "
        'printf \'print("PASSED check.py::adds")\\nprint("PASSED check.py::zero")\\n\' > check.py; git add -A; '
        "git -c user.name=x -c user.email=x commit -qm mine",
    )
    [bad] = run_tasks(found, SETTINGS, tmp_path / "bad", hooks=hooks(cheat))
    assert bad.score == 0.0 and bad.details["failed"] == ["check.py::adds"]


def test_a_task_that_cannot_begin_is_no_failure_of_the_agent(tmp_path: Path) -> None:
    folder = terminal_set(tmp_path)
    file = folder / "greet" / "environment" / "Dockerfile"
    file.write_text(file.read_text() + "RUN echo no such thing >&2; exit 3\n")
    path = script(tmp_path / "x.json", "true")
    [one] = run_tasks(read_tasks(folder), SETTINGS, tmp_path / "out", hooks=hooks(path))
    assert one.score is None and "RUN ended with 3" in one.error and "no such thing" in one.error
    assert summary([one])["PASS"] is None
    assert Sandbox.list() == []  # what could not be filled is on no record, so nobody would end it later


def test_the_command_killed_and_run_again(tmp_path: Path) -> None:
    """Killed in the middle of the agent's command: the same command goes on, and the command ran once."""
    folder = terminal_set(tmp_path)
    replies = script(tmp_path / "r.json", 'echo ran >> /app/count; sleep 2; echo "$WORD" > greeting.txt; cat count')
    arguments = [str(folder), str(replies), str(tmp_path / "out")]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(isinstance(record, ToolCall) for run in all_runs() for record in records_of(run)):
            break
        time.sleep(0.05)
    time.sleep(1)  # it is within its command now
    first.send_signal(signal.SIGKILL)
    first.wait()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "1.0", ended.stderr
    [line] = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["score"] == 1.0
