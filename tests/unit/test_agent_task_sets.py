"""Reading task sets: what is followed, what is refused and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.agents import RunSettings
from rorqual.errors import ConfigError
from rorqual.evals.agent_tasks import InvalidTask, read_tasks, run_tasks, summary
from rorqual.evals.agent_tasks.dockerfile import read_dockerfile
from rorqual.evals.agent_tasks.pytest_output import outcomes, was_collected
from rorqual.evals.agent_tasks.swe import SweTask
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


def test_variables_with_words_and_heredocs_and_mounts(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "FROM a\nARG V\nENV A=${V:-one}\nENV B=${A:+set} C=${V:+set} D=${X-${A}} E=\\$A\nWORKDIR ${DIR:-/app}\n"
        "RUN --mount=type=cache,target=/root/.cache --network=none pip install .\n"
        "RUN <<EOF\necho $A\n# kept\nEOF\nRUN python3 - <<'PY' && echo done\nprint('x')\nPY\n"
        'COPY <<EOF /etc/a.conf\nvalue=$A\nEOF\nCOPY --chmod=644 <<-"RAW" b.conf\n\tvalue=$A\n\tRAW\n'
        "RUN [ 1 -lt 2 ] && echo $((1<<2))\n"
    )
    found = read_dockerfile(path)
    assert (found.env, found.cwd) == ({"A": "one", "B": "set", "C": "", "D": "one", "E": "$A"}, "/app")
    assert [(one.name, one.words) for one in found.instructions[1:]] == [
        ("RUN", ("pip install .",)),
        ("RUN", ("echo $A\n# kept\n",)),
        ("RUN", ("python3 - <<'PY' && echo done\nprint('x')\nPY\n",)),
        ("WRITE", ("value=one\n", "/etc/a.conf")),
        ("WRITE", ("value=$A\n", "b.conf")),
        ("RUN", ("[ 1 -lt 2 ] && echo $((1<<2))",)),
    ]


def test_a_heredoc_is_run_as_docker_runs_it(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "FROM a\nRUN <<EOF\n#!/usr/bin/env python3\nprint(6 * 7)\nEOF\n"
        "RUN cat <<A - <<'B' /dev/fd/3 3<<C\na\nA\nb\nB\nc\nC\n"
    )
    script, several = (one.words[0] for one in read_dockerfile(path).instructions)
    assert subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True).stdout == "42\n"
    assert subprocess.run(["/bin/sh", "-c", several], capture_output=True, text=True).stdout == "b\nc\n"
    sandbox = Files()
    path.write_text("FROM a\nCOPY <<EOF /b.txt\nhere\nEOF\n")
    read_dockerfile(path).build(sandbox, 1.0)
    assert sandbox.written == {"/b.txt": b"here\n"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RUN <<EOF\necho", "heredoc EOF has no end"),
        ("COPY <<A <<B /x\nA\nB", "one heredoc"),
        ("ENV A=${B#x}", "form of variables"),
        ("RUN --mount=type=secret,id=k x", "--mount=type=secret"),
        ("RUN --mount=from=b,target=/x x", "--mount=from=b"),
        ("RUN --security=insecure x", "--security=insecure"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name_and_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM a\n{text}\n")
    with pytest.raises(ConfigError, match=said) as refused:
        read_dockerfile(tmp_path / "Dockerfile")
    assert "Dockerfile:2" in str(refused.value)


@pytest.mark.parametrize(
    ("files", "states", "ran"),
    [
        ({"test_a.py": "print('PASSED test_a.py::test_x')\nimport nothing_of_that_name\ndef test_x(): pass\n"},
         {"test_a.py": "ERROR"}, False),
        ({"test_a.py": "def test_x(): pass\n", "conftest.py": "print('PASSED test_a.py::test_x')\n1 / 0\n"},
         None, False),
        ({"test_a.py": "def test_x():\n    print('PASSED test_a.py::test_y')\ndef test_y(): assert 0\n"},
         {"test_a.py::test_x": "PASSED", "test_a.py::test_y": "FAILED"}, True),
        ({"test_a.py": "def test_x(): pass\n"}, {"test_a.py::test_x": "PASSED"}, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [(), ("-q",)])
def test_printed_lines_are_no_results(
    tmp_path: Path, files: dict[str, str], states: dict[str, str] | None, ran: bool, options: tuple[str, ...]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    command += options
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    text = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True, env=environment).stdout
    assert was_collected(text) is ran, text
    if states is not None:
        assert outcomes(text) == states, text


def test_one_malformed_task_does_not_stop_the_others(tmp_path: Path) -> None:
    def task(name: str, settings: str, file: str = "task.toml") -> None:
        for folder in ("environment", "tests"):
            (tmp_path / name / folder).mkdir(parents=True)
        texts = {file: settings, "instruction.md": "x", "environment/Dockerfile": "FROM a", "tests/test.sh": ""}
        for path, text in texts.items():
            (tmp_path / name / path).write_text(text)

    task("a", "[agent]\ntimeout_sec = 5\n")
    task("b", "[agent\n")
    task("c", "[agent]\ntimeout_sec = 'soon'\n")
    task("d", "instruction: [\n", "task.yaml")
    task("e", "agent = 3\n")
    found = read_tasks(tmp_path)
    whys = {one.id: one.why for one in found if isinstance(one, InvalidTask)}
    assert [one.id for one in found] == ["a", "b", "c", "d", "e"] and set(whys) == {"b", "c", "d", "e"}
    assert "malformed" in whys["b"] and "'soon'" in whys["c"] and "task.yaml" in whys["d"] and "table" in whys["e"]
    with pytest.raises(ConfigError, match="malformed"):
        read_tasks(tmp_path, only=["b"])
    done = run_tasks([one for one in found if one.id != "a"], RunSettings("-", model="m"), tmp_path / "out", parallel=2)
    assert [(one.task, one.score, one.ending) for one in done] == [(name, None, "invalid") for name in "bcde"]
    assert list(summary(done)["failed_to_run"]) == ["b", "c", "d", "e"]


def test_files_that_archives_leave_out_are_there(tmp_path: Path) -> None:
    clone = tmp_path / "a__b"
    clone.mkdir()
    (clone / ".gitattributes").write_text("secret.txt export-ignore\nversion.py export-subst\ntests export-ignore\n")
    (clone / "secret.txt").write_text("here")
    (clone / "version.py").write_text("'$Format:%H$'")
    (clone / "tests").mkdir()
    (clone / "tests" / "run.sh").write_text("#!/bin/sh\n")
    (clone / "tests" / "run.sh").chmod(0o755)
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (clone / "secret.txt").write_text("changed since")
    row = dict.fromkeys(("problem_statement", "test_patch"), "x")
    row |= {"instance_id": "a__b-1", "repo": "a/b", "base_commit": commit, "FAIL_TO_PASS": "[]", "PASS_TO_PASS": "[]"}
    task = SweTask(row, tmp_path)
    tree = tmp_path / "tree"
    tree.mkdir()
    task._check_out(tree, tmp_path / "index")
    assert (tree / "secret.txt").read_text() == "here" and "$Format" in (tree / "version.py").read_text()
    assert (tree / "tests" / "run.sh").stat().st_mode & 0o100
    assert not subprocess.run([*git, "diff", "--cached", "--stat"], capture_output=True).stdout, "the clone's own index"
    with pytest.raises(TaskFailed, match="no commit"):
        SweTask(row | {"base_commit": "0" * 40}, tmp_path)._check_out(tree, tmp_path / "index2")
