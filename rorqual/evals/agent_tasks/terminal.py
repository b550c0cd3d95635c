"""Terminal-Bench's tasks: folders with an instruction, an environment and tests that come in after the agent is done.

Two forms. Version 2 (Harbor): `task.toml`, `instruction.md`, `environment/Dockerfile`, `tests/test.sh`, which writes a
number to `/logs/verifier/reward.txt` (or names and numbers to `reward.json`). Version 1: `task.yaml`, `Dockerfile`,
`run-tests.sh` and `tests/`, judged by whether every test that pytest names passed.
Sources: the formats' public documentation.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError, MissingExtraError
from rorqual.evals.agent_tasks.dockerfile import read_dockerfile
from rorqual.evals.agent_tasks.pytest_output import outcomes, was_collected
from rorqual.evals.agent_tasks.task import AgentTask, Judged, TaskFailed, administer, make_folder, put_in

TESTS, LOGS = "/tests", "/logs/verifier"


class TerminalTask(AgentTask):
    """A folder of either version. Raises: ConfigError for one that lacks something or cannot be followed."""

    def __init__(self, folder: Path) -> None:
        self.id = folder.name
        self._folder = folder
        self._is_first = not (folder / "task.toml").is_file()
        settings = _first(folder) if self._is_first else _second(folder)
        self.instruction, self.agent_s, self._test_s, self._build_s = settings
        place = folder if self._is_first else folder / "environment"
        if not (place / "Dockerfile").is_file():
            raise ConfigError(f"{place} has no Dockerfile. Tasks of several containers need Docker.")
        self._dockerfile = read_dockerfile(place / "Dockerfile")
        self.env = dict(self._dockerfile.env)
        self.cwd = self._dockerfile.cwd if self._dockerfile.cwd != "/" else "/app"
        script = folder / "run-tests.sh" if self._is_first else folder / "tests" / "test.sh"
        if not script.is_file():
            raise ConfigError(f"{script} is missing, so nothing could judge the task.")
        self._script = script

    @property
    def base(self) -> str:
        """The image that its Dockerfile starts from."""
        return self._dockerfile.base

    def prepare(self, sandbox: Any) -> None:
        make_folder(sandbox, self.cwd)
        self._dockerfile.build(sandbox, self._build_s)

    def judge(self, sandbox: Any) -> Judged:
        administer(sandbox, f"rm -rf {TESTS} {LOGS}")  # whatever the agent put there is no test
        if (self._folder / "tests").is_dir():
            put_in(sandbox, self._folder / "tests", TESTS)
        if self._is_first:
            put_in(sandbox, self._script, f"{TESTS}/run-tests.sh")
        make_folder(sandbox, LOGS)
        env = {**self.env, "TEST_DIR": TESTS}
        name = "run-tests.sh" if self._is_first else "test.sh"
        ran = administer(sandbox, f"bash {TESTS}/{name}", cwd=self.cwd, timeout_s=self._test_s, env=env)
        output = f"{ran.stdout}\n{ran.stderr}".strip()[-20_000:]
        details = {"exit_code": ran.exit_code, "output": output}
        if self._is_first:
            found = outcomes(ran.stdout)
            if not found:
                raise TaskFailed(f"the tests of {self.id} named no result: {output[-500:]}")
            if not was_collected(ran.stdout):  # such lines may be printed by anything
                return Judged(0.0, {**details, "tests": found, "failed": "pytest did not run to its end"})
            passed = sum(state == "PASSED" for state in found.values())
            return Judged(float(passed == len(found)), {**details, "tests": found})
        return Judged(_reward(sandbox, self.id, output), details)


def _reward(sandbox: Any, name: str, output: str) -> float:
    text = ""
    try:
        if sandbox.files.exists(f"{LOGS}/reward.txt"):
            text = sandbox.files.read(f"{LOGS}/reward.txt").strip()
        elif sandbox.files.exists(f"{LOGS}/reward.json"):
            text = sandbox.files.read(f"{LOGS}/reward.json")
            named = json.loads(text)
            text = str(named.get("reward", min(named.values(), default="")))
        else:
            raise TaskFailed(f"the tests of {name} wrote no reward: {output[-500:]}")
        reward = float(text)
    except (ValueError, TypeError, AttributeError, RecursionError):  # whatever tests, or an agent, may write there
        reward = math.nan
    if not 0.0 <= reward <= 1.0:
        raise TaskFailed(f"the tests of {name} wrote {text[:40]!r} as reward; a number from 0 to 1 was due.")
    return reward


def _second(folder: Path) -> tuple[str, float | None, float, float]:
    settings = _parsed(folder / "task.toml", tomllib.loads)
    file = folder / "instruction.md"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: a task needs words for the agent.")
    where = folder / "task.toml"
    return (
        _text(file).strip(),
        _seconds(settings, where, None, "agent", "timeout_sec"),
        _seconds(settings, where, 600.0, "verifier", "timeout_sec") or 600.0,
        _seconds(settings, where, 600.0, "environment", "build_timeout_sec") or 600.0,
    )


def _first(folder: Path) -> tuple[str, float | None, float, float]:
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("tasks of Terminal-Bench's first version are YAML. Install PyYAML.") from None
    settings = _parsed(folder / "task.yaml", yaml.safe_load)
    if not isinstance(settings, dict) or not settings.get("instruction"):
        raise ConfigError(f"{folder / 'task.yaml'} has no instruction.")
    where = folder / "task.yaml"
    agent_s = _seconds(settings, where, None, "max_agent_timeout_sec")
    test_s = _seconds(settings, where, 600.0, "max_test_timeout_sec") or 600.0
    return str(settings["instruction"]).strip(), agent_s, test_s, 600.0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _parsed(path: Path, read: Callable[[str], Any]) -> Any:
    """The file's content. Raises: ConfigError for one that is no TOML or YAML."""
    text = _text(path)
    try:
        return read(text)
    except Exception as error:  # YAML's own tree of errors, and what its values raise (dates out of range)
        raise ConfigError(f"{path} is malformed: {' '.join(str(error).split())[:300]}.") from error


def _seconds(settings: Any, where: Path, usual: float | None, *names: str) -> float | None:
    """A time of the settings. Raises: ConfigError for what is no positive number."""
    value = settings
    for name in names:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: what holds {name} is no table.")
        value = value.get(name, {} if name is not names[-1] else None)
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {'.'.join(names)} is {value!r}, and a number of seconds was due.")
    return float(value)
