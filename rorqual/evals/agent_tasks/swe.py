"""SWE-bench's instances: a repository at a commit, an issue, and tests that must pass once it is solved.

A row of the data set (JSON Lines with its field names) and a folder of clones, OWNER__NAME each. The repository goes in
as one commit, so the log holds no later fix to read off. Judged as the benchmark does: the files of the test patch are
put back and patched, then every test of FAIL_TO_PASS and PASS_TO_PASS must pass. Only tests that pytest names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.evals.agent_tasks.pytest_output import broke_off, outcomes, was_collected
from rorqual.evals.agent_tasks.task import AgentTask, Judged, TaskFailed, make_folder

PLACE = "/testbed"
FIELDS = ("instance_id", "repo", "base_commit", "problem_statement", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS")
TEST_COMMAND = "python3 -m pytest -q -rA -p no:cacheprovider {tests}"
_AS = "-c user.name=rorqual -c user.email=rorqual@localhost"


class SweTask(AgentTask):
    """One instance. repos: folder of clones. Raises: ConfigError for a row without its fields, or a clone not there."""

    cwd = PLACE

    def __init__(
        self, row: dict[str, Any], repos: Path, test_command: str = TEST_COMMAND, test_s: float = 1800
    ) -> None:
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ConfigError(f"the instance {row.get('instance_id', '?')} lacks {', '.join(missing)}.")
        self.id, self.env, self._row = str(row["instance_id"]), {}, row
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*", str(row["repo"])):
            raise ConfigError(f"{self.id} names the repository {row['repo']!r}. Give OWNER/NAME.")
        if str(row["base_commit"]).startswith("-"):  # git would take it for an option, and one of them writes files
            raise ConfigError(f"{self.id} has the base_commit {row['base_commit']!r}, which is none.")
        self._clone = repos / str(row["repo"]).replace("/", "__")
        if not (self._clone / ".git").exists() and not (self._clone / "HEAD").exists():
            raise ConfigError(f"{self.id} needs a clone of {row['repo']} at {self._clone}.")
        self._must_pass = [*_names(row["FAIL_TO_PASS"]), *_names(row["PASS_TO_PASS"])]
        self._test_command, self._test_s = test_command, test_s
        self.instruction = (
            f"The repository in {PLACE} has the issue below. Change its code so that the issue is solved, and check "
            f"it. Tests for it exist and will be run; do not edit tests.\n\n{row['problem_statement']}"
        )

    def prepare(self, sandbox: Any) -> None:
        make_folder(sandbox, PLACE)
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch, "tree")
            tree.mkdir()
            self._check_out(tree, Path(scratch, "index"))
            sandbox.files.upload(tree, PLACE)
        _run(sandbox, f"git init -q && git add -A && git {_AS} commit -qm base")

    def _check_out(self, tree: Path, index: Path) -> None:
        """The commit's files, all of them: `git archive` would leave out what `export-ignore` names."""
        git = ["git", "-C", str(self._clone), "-c", "core.hooksPath=/dev/null", "--work-tree", str(tree)]
        environment = {**os.environ, "GIT_INDEX_FILE": str(index)}
        for words in (["read-tree", f"{self._row['base_commit']}^{{tree}}"], ["checkout-index", "-a", "-f"]):
            ran = subprocess.run([*git, *words], env=environment, capture_output=True)
            if ran.returncode:
                says = ran.stderr.decode(errors="replace")[-300:]
                raise TaskFailed(f"{self._clone} has no commit {self._row['base_commit']} that can be read: {says}")

    def judge(self, sandbox: Any) -> Judged:
        _run(sandbox, "git add -A -- . ':!out' ':!.rorqual'")
        patch = _run(sandbox, f"git diff --cached --binary {_base(sandbox)}").stdout
        touched = re.findall(r"^diff --git a/(\S+) b/(\S+)$", self._row["test_patch"], re.MULTILINE)
        for old, new in touched:
            name = shlex.quote(new)
            _run(sandbox, f"git checkout -q {_base(sandbox)} -- {shlex.quote(old)} 2>/dev/null || rm -f {name}")
        applied = sandbox.commands.run("git apply -", cwd=PLACE, stdin=self._row["test_patch"].encode(), timeout=60)
        if applied.exit_code != 0:
            raise TaskFailed(f"the test patch of {self.id} does not apply: {applied.stderr[-300:]}")
        files = sorted({name.split("::")[0] for name in self._must_pass})
        command = self._test_command.replace("{tests}", shlex.join(files))
        ran = sandbox.commands.run(command, cwd=PLACE, timeout=self._test_s)
        # a command of the user's own prints such lines as it likes; ours ends with pytest's last line
        is_whole = was_collected(ran.stdout) if self._test_command == TEST_COMMAND else not broke_off(ran.stdout)
        states = outcomes(ran.stdout) if is_whole else {}
        failed = [name for name in self._must_pass if states.get(name) not in ("PASSED", "XFAIL")]
        tail = f"{ran.stdout}\n{ran.stderr}".strip()[-20_000:]
        return Judged(float(not failed), {"patch": patch, "failed": failed, "exit_code": ran.exit_code, "output": tail})


def _base(sandbox: Any) -> str:
    """The commit that the agent began from, whatever it committed since."""
    return str(_run(sandbox, "git rev-list --max-parents=0 HEAD | tail -1").stdout.strip())


def _names(value: Any) -> list[str]:
    """The list, which the data set keeps as JSON text."""
    return [str(name) for name in (json.loads(value) if isinstance(value, str) else value)]


def _run(sandbox: Any, command: str) -> Any:
    ran = sandbox.commands.run(command, cwd=PLACE, timeout=600)
    if ran.exit_code != 0:
        raise TaskFailed(f"`{command}` ended with {ran.exit_code} in the sandbox: {ran.stderr.strip()[-300:]}")
    return ran
