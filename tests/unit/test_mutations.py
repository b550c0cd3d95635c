"""The lists of `scripts/mutate.py` hold: each change fits its file, and all of the specification's tests are there."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SPEC = {"C": 15, "L": 8, "K": 9, "D": 5, "S": 13, "P": 5}
"""The specification's list: C1 to C15 and so on."""
NAMED = re.compile(r"test_((?:[clkdsp]\d+_)+)")


def _mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    return module


mutate = _mutate()
MUTATIONS = mutate.load()


def named_tests() -> dict[str, set[str]]:
    """Every test that has ids of the specification in its name, as FILE::NAME, with those ids."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.stem == "test_conformance_ladder":  # the evaluation specification's L0 to L13, of the indexer
            continue
        text = path.read_text()
        if NAMED.search(text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and (match := NAMED.match(node.name)):
                    ids = set(match[1].strip("_").upper().split("_"))
                    found[f"{path.relative_to(ROOT).as_posix()}::{node.name}"] = ids
    return found


def test_every_change_fits_its_file_once_and_changes_it() -> None:
    wrong = {one.name: one.count(ROOT) for one in MUTATIONS if one.count(ROOT) != 1 or one.old == one.new}
    assert wrong == {}, "where the guarded line moved, change the entry in tests/mutations with it"
    assert [name for name, count in Counter(one.name for one in MUTATIONS).items() if count > 1] == []


def test_every_test_of_the_specification_has_a_change_that_it_must_notice() -> None:
    tests, guarded = named_tests(), {test.partition("[")[0] for one in MUTATIONS for test in one.tests}
    assert set().union(*tests.values()) == {f"{letter}{n}" for letter, most in SPEC.items() for n in range(1, most + 1)}
    assert sorted(set(tests) - guarded) == [], "without an entry in tests/mutations"
    assert sorted(guarded - set(tests)) == [], "no such tests"
    for one in MUTATIONS:
        ids = [tests[test.partition("[")[0]] for test in one.tests]
        assert set(one.spec) <= set().union(*ids) and all(set(one.spec) & of_one for of_one in ids), one.name


@pytest.mark.slow
def test_every_test_named_is_one_that_pytest_finds() -> None:
    tests = sorted({test for one in MUTATIONS for test in one.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *sorted({t.partition("::")[0] for t in tests})]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(set(tests) - set(found)) == []


@pytest.mark.slow
def test_a_change_that_no_test_notices_is_reported(tmp_path: Path) -> None:
    """The runner itself, over a tree of two lines: one guarded, one not, one text that is gone, one test that fails."""
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    (tmp_path / "adder.py").write_text("def add(a, b):\n    return a + b\n\n\ndef less(a, b):\n    return a - b\n")
    (tmp_path / "tests" / "test_adder.py").write_text(
        "import adder\n\n\ndef test_add():\n    assert adder.add(2, 3) == 5\n\n\ndef test_less():\n"
        "    assert adder.less(2, 0) == 2\n\n\ndef test_wrong():\n    assert adder.add(1, 1) == 3\n"
    )
    (tmp_path / "tests" / "support" / "outcomes.py").write_text((ROOT / "tests/support/outcomes.py").read_text())
    entries = [
        ("killed", "a + b", "a * b", "test_add"),
        ("survived", "a - b", "a + b", "test_less"),
        ("stale", "a / b", "a + b", "test_add"),
        ("broken", "a + b", "a ** b", "test_wrong"),
        ("unrunnable", "def add(a, b):", "def add(a, b", "test_add"),
    ]
    (tmp_path / "lists" / "all.toml").write_text(
        "".join(
            f'[[mutation]]\nname = "{name}"\nspec = ["X1"]\nwhy = "-"\nfile = "adder.py"\nold = "{old}"\n'
            f'new = "{new}"\nmodule = "tests/test_adder.py"\ntests = ["{test}"]\n'
            for name, old, new, test in entries
        )
    )
    options = ["--root", ".", "--lists", "lists", "--results", "results", "--json"]
    command = [sys.executable, str(ROOT / "scripts" / "mutate.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    verdicts = dict(re.findall(r'"name": "(\w+)".*?"verdict": "(\w+)"', done.stdout))
    assert verdicts == {name: name if name != "unrunnable" else "broken" for name, *_ in entries}
    assert (tmp_path / "adder.py").read_text().count("a + b") == 1, "the tree itself is untouched"
    again = subprocess.run([*command, "--only", "killed"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "as it is" not in again.stderr, "what was killed is not run again"
    assert subprocess.run([*command, "--only", "nothing"], cwd=tmp_path, capture_output=True).returncode == 2
