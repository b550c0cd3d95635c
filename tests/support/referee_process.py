"""`rorqual referee` as a process of its own, in front of an upstream."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def referee_process(upstream: str, home: Path, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Start it; gives its address and the process, which is killed (SIGKILL) at the end."""
    command = [
        sys.executable, "-m", "rorqual", "referee", "--upstream", upstream, "--port", "0", "--json", "--log", "off",
        "--no-journal", "--no-ledger", *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RORQUAL_HOME": str(home)}
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process
    finally:
        process.kill()
        process.wait(30)
