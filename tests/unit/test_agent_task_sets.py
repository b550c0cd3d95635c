"""Reading task sets: what is followed, what is refused and why."""

import json
import subprocess
from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.evals.agent_tasks import read_tasks
from rorqual.evals.agent_tasks.dockerfile import read_dockerfile
from rorqual.evals.agent_tasks.pytest_output import outcomes
from rorqual.evals.agent_tasks.task import TaskFailed
from rorqual.evals.agent_tasks.terminal import LOGS, _reward


def test_a_dockerfile_is_followed_in_order(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "FROM early AS first\nRUN lost\nFROM python:3.13-slim  \n# note\nENV A=1 B='two words'\nENV OLD the rest\n"
        "WORKDIR /app\nRUN one && \\\n    # in between\n    two $A\nWORKDIR sub\nCOPY a.txt b.txt ./in/\n"
        'RUN ["echo", "x y"]\nCMD ["bash"]\n'
    )
    found = read_dockerfile(path)
    assert (found.base, found.cwd) == ("python:3.13-slim", "/app/sub")
    assert found.env == {"A": "1", "B": "two words", "OLD": "the rest"}
    assert [(one.name, one.words, one.cwd) for one in found.instructions] == [
        ("WORKDIR", (), "/app"),
        ("RUN", ("one &&      two $A",), "/app"),
        ("WORKDIR", (), "/app/sub"),
        ("COPY", ("a.txt", "b.txt", "./in/"), "/app/sub"),
        ("RUN", ("echo 'x y'",), "/app/sub"),
    ]


def test_a_dockerfile_adds_to_what_images_say(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM a\nENV PATH=/opt/bin:$PATH\nENV PATH=/first:${PATH}\nRUN [ -d /x ] || mkdir /x\n")
    found = read_dockerfile(path)
    assert found.env["PATH"] == "/first:/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert found.instructions[0].words == ("[ -d /x ] || mkdir /x",)


class Files:
    """A sandbox that has files alone."""

    def __init__(self, **texts: str) -> None:
        self.files, self.texts = self, {f"{LOGS}/{name}": text for name, text in texts.items()}
        self.written: dict[str, bytes] = {}

    def exists(self, path: str) -> bool:
        return path in self.texts

    def read(self, path: str) -> str:
        return self.texts[path]

    def write(self, path: str, data: bytes) -> None:
        self.written[path] = data


@pytest.mark.parametrize("source", ["/a.txt", "/*.txt", "a.txt"])
def test_a_copy_is_from_the_tasks_folder(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "Dockerfile").write_text(f"FROM a\nCOPY {source} /b.txt\n")
    sandbox = Files()
    read_dockerfile(tmp_path / "Dockerfile").build(sandbox, 1.0)
    assert sandbox.written == {"/b.txt": b"a"}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": "x", "b": 1}', '{"a": null}', '{"reward": 2}'])
def test_a_reward_that_is_none_fails_its_task_alone(text: str) -> None:
    with pytest.raises(TaskFailed, match="number from 0 to 1"):
        _reward(Files(**{"reward.json": text}), "t", "")
    assert _reward(Files(**{"reward.json": '{"a": 1, "b": 0.5}'}), "t", "") == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RUN x", "no FROM"),
        ("FROM a\nCOPY --from=b /x /y", "another image"),
        ("FROM a\nADD https://example.org/x /x", "another image"),
        ("FROM a\nONBUILD RUN x", "ONBUILD"),
        ("FROM a\nCOPY x", "where to"),
    ],
)
def test_what_needs_docker_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_dockerfile(tmp_path / "Dockerfile")


def test_the_last_word_on_each_test_counts() -> None:
    text = (
        "PASSED t.py::a\nFAILED t.py::b[x - y] - assert 1 == 2\nERROR t.py::c\nSKIPPED [1] t.py:3: no\nFAILED t.py::a"
    )
    assert outcomes(text) == {"t.py::a": "FAILED", "t.py::b[x - y]": "FAILED", "t.py::c": "ERROR"}


def test_sets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no task"):
        read_tasks(tmp_path)
    with pytest.raises(ConfigError, match="neither"):
        read_tasks(tmp_path / "nowhere")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instance_id": "a"}\nnonsense\n')
    with pytest.raises(ConfigError, match="--repos"):
        read_tasks(rows)
    with pytest.raises(ConfigError, match="rows.jsonl:2"):
        read_tasks(rows, repos=tmp_path)
    rows.write_text('{"instance_id": "a"}\n')
    with pytest.raises(ConfigError, match="lacks repo, base_commit"):
        read_tasks(rows, repos=tmp_path)
    with pytest.raises(ConfigError, match="no task 'b'"):
        read_tasks(rows, repos=tmp_path, only=["b"])


def test_an_instance_needs_its_clone(tmp_path: Path) -> None:
    row = dict.fromkeys(("base_commit", "problem_statement", "test_patch"), "x")
    row |= {"instance_id": "a__b-1", "repo": "a/b", "FAIL_TO_PASS": '["t::x"]', "PASS_TO_PASS": "[]"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="a__b"):
        read_tasks(tmp_path / "rows.jsonl", repos=tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path / "a__b")], check=True)
    [task] = read_tasks(tmp_path / "rows.jsonl", repos=tmp_path)
    assert task.id == "a__b-1" and "x" in task.instruction


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("base_commit", "--output=/tmp/elsewhere", "which is none"),
        ("repo", "..", "OWNER/NAME"),
        ("repo", "../..", "OWN"),
    ],
)
def test_an_instance_reaches_no_file_outside(tmp_path: Path, field: str, value: str, said: str) -> None:
    (tmp_path / "set" / "repos" / "a__b" / ".git").mkdir(parents=True)
    (tmp_path / "set" / ".git").mkdir()
    row = dict.fromkeys(("base_commit", "problem_statement", "test_patch"), "x")
    row |= {"instance_id": "a__b-1", "repo": "a/b", "FAIL_TO_PASS": '["t::x"]', "PASS_TO_PASS": "[]"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    assert len(read_tasks(rows, repos=tmp_path / "set" / "repos")) == 1
    rows.write_text(json.dumps(row | {field: value}))
    with pytest.raises(ConfigError, match=said):
        read_tasks(rows, repos=tmp_path / "set" / "repos")


def test_the_folder_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hello"
    for name in ("environment", "tests"):
        (folder / name).mkdir(parents=True)
    for name, text in {
        "task.toml": "",
        "instruction.md": "x",
        "environment/Dockerfile": "FROM a",
        "tests/test.sh": "",
    }.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    assert [task.id for task in read_tasks(Path(), only=["hello"])] == ["hello"]
