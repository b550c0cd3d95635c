"""The native operations on other processors: built for narrower vectors, and with matrix tiles emulated."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.ops.native import compiler

UNIT = Path(__file__).parents[1] / "unit"
TESTS = [UNIT / f"test_{name}.py" for name in ("native_ops", "inference_ops", "cache_codec", "index_scan", "matvec")]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")
@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_built_for_another_processor(processor: str, tmp_path: Path) -> None:
    """The baseline has neither AVX nor fused multiply-add, and v3 has AVX2 but no bf16 products."""
    command = [*(compiler() or []), f"-march={processor}"]
    environment = {**os.environ, "CC": shlex.join(command), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *map(str, TESTS)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
    assert list((tmp_path / "rorqual").glob("kernels-*.so"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang on this machine")
def test_built_by_clang(tmp_path: Path) -> None:
    """A machine may have clang alone; what it makes cannot use gcc's OpenMP, and loads all the same."""
    environment = {**os.environ, "CC": "clang", "XDG_CACHE_HOME": str(tmp_path)}
    code = "from rorqual.ops.native import load; assert load() is not None"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    test = str(UNIT / "test_inference_ops.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-3000:]


EMULATION = Path(__file__).parents[1] / "support" / "emulated_tiles.h"
RUN_AND_COUNT = """
import ctypes, sys, pytest
from rorqual.ops.native import load
code = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", sys.argv[1]])
print("tile products:", ctypes.c_long.in_dll(load(), "emulated_products").value)
sys.exit(code)
"""


def has_bf16_products() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16_products(), reason="needs AVX-512 with bf16 products")
@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
def test_index_scan_with_emulated_matrix_tiles(tmp_path: Path) -> None:
    """What is written for AMX gives the same scores and picks, its tile instructions replaced by plain C."""
    command = [*(compiler() or []), "-include", str(EMULATION)]
    environment = {**os.environ, "CC": shlex.join(command), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RUN_AND_COUNT, str(UNIT / "test_index_scan.py")],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    products = int(run.stdout.rsplit("tile products:", 1)[1])
    assert products > 1000 and " passed" in run.stdout and "skipped" not in run.stdout
