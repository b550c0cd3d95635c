"""The native operations on processors with narrower vectors than this one's: built for them, held to the references."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.ops.native import compiler

TESTS = Path(__file__).parents[1] / "unit" / "test_native_ops.py"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")
@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_built_for_another_processor(processor: str, tmp_path: Path) -> None:
    """The baseline has neither AVX nor fused multiply-add, and v3 has AVX2 but no bf16 products."""
    command = [*(compiler() or []), f"-march={processor}"]
    environment = {**os.environ, "CC": " ".join(command), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(TESTS)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
    assert list((tmp_path / "rorqual").glob("kernels-*.so"))
