"""The gate's second try: only for a few end-to-end tests, never for what broke as a whole, and never in silence."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
from session_report import report_if_asked as pytest_configure
"""
FLAKY = """
from pathlib import Path
def test_flaky():
    first = not Path("seen").exists()
    Path("seen").touch()
    assert not first
def test_steady(): pass
"""
SKIPS = FLAKY.replace("    assert not first", "    if not first: pytest.skip()\n    assert False").replace(
    "from pathlib", "import pytest\nfrom pathlib"
)
WRONG = "def test_wrong(): assert False\n"
CRASH = "import os\ndef test_crash():\n    os._exit(9)\n"


def gate(folder: Path, **files: str) -> tuple[int, str, str]:
    """Exit code, output and notes for a project of these files."""
    (folder / "tests/e2e").mkdir(parents=True)
    (folder / "tests/unit").mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "Makefile").write_text(f"test:\n\t{shlex.quote(sys.executable)} -m pytest -q -n 2\n")
    for name, text in files.items():
        (folder / "tests" / f"{name.replace('__', '/test_')}.py").write_text(text)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist"}  # others take seconds
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/ci_tests.py", "test", "notes"],
        cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip
    notes = folder / "notes"
    return result.returncode, result.stdout, notes.read_text() if notes.exists() else ""


def test_what_passes_only_alone_passes_and_is_named(tmp_path: Path) -> None:
    code, output, notes = gate(tmp_path, e2e__a=FLAKY)
    assert code == 0, output
    assert notes == "passed only when run again alone: tests/e2e/test_a.py::test_flaky: look at it\n"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"e2e__a": WRONG, "e2e__b": FLAKY}, "so did the second try"),
        ({"unit__a": FLAKY}, "only tests below tests/e2e/ are run again, and not tests/unit/test_a.py::test_flaky"),
        ({"e2e__a": FLAKY, "e2e__b": "import nothing_of_this_name"}, "collecting tests/e2e/test_b.py"),
        ({"e2e__a": FLAKY, "e2e__b": CRASH}, "the process of tests/e2e/test_b.py::test_crash"),
        ({"e2e__a": "".join(WRONG.replace("wrong", f"w{n}") for n in range(6))}, "6 tests failed, and 5 at most"),
        ({"e2e__a": SKIPS}, "so did the second try"),
    ],
    ids=["failed again", "elsewhere", "collection", "crash", "many", "skipped at the second try"],
)
def test_what_may_not_pass_at_a_second_try_fails(tmp_path: Path, files: dict[str, str], said: str) -> None:
    code, output, notes = gate(tmp_path, **files)
    assert code != 0 and said in output and notes == ""


def test_what_passes_is_run_once(tmp_path: Path) -> None:
    code, output, notes = gate(tmp_path, e2e__a="def test_right(): pass\n")
    assert (code, notes) == (0, "") and output.count("1 passed") == 1
