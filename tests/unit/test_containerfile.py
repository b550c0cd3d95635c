"""The container file, read and not built: what it starts and asks for exists, and it does not run as root."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Containerfile").read_text().replace("\\\n", " ").splitlines()


def words_of(instruction: str) -> list[str]:
    """The JSON words of an instruction: ENTRYPOINT, CMD or HEALTHCHECK."""
    line = next(one for one in LINES if one.startswith(instruction))
    found: list[str] = json.loads(line[line.index("[") :])
    return found


def test_it_is_put_together_rightly():
    stages = [i for i, line in enumerate(LINES) if line.startswith("FROM")]
    last = LINES[stages[-1] :]
    assert len(stages) == 2 and any(re.fullmatch(r"USER \d+", line) and line != "USER 0" for line in last)
    build = "\n".join(LINES[: stages[-1]])
    assert "--index-url https://download.pytorch.org/whl/cpu" in build and (ROOT / "constraints-cpu.txt").is_file()
    extras = re.search(r"/source\[([a-z,]+)\]", build)
    assert extras is not None
    listed = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in listed for extra in extras.group(1).split(","))
    ignored = (ROOT / ".containerignore").read_text().split()
    assert not {"rorqual", "pyproject.toml", "README.md", "LICENSE", "constraints-cpu.txt"} & set(ignored)


@pytest.mark.slow
def test_its_entry_serves_and_its_check_passes(tmp_path: Path):
    """The very words of the file, on another port: with a key it serves, without one it ends and says why."""
    command = [sys.executable, "-m", *words_of("ENTRYPOINT"), *words_of("CMD")]
    command[command.index("8000")] = "0"
    bare = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2 and "key" in refused.stderr
    process = subprocess.Popen(
        [*command, "--json"], env={**bare, "RORQUAL_API_KEY": "a-key-of-some-length"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["url"].rpartition(":")[2]
        check = words_of("HEALTHCHECK")
        done = subprocess.run([sys.executable, *(word.replace("8000", port) for word in check[1:])], timeout=30)
        assert done.returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
