"""The C operations compile, without a word, for processors and by compilers that are not this machine's.

Compiled only: what they compute is tested where they can run. Each case needs its compiler and is skipped without it
(`apt install clang gcc-aarch64-linux-gnu`).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from rorqual.ops.native import library

COMMANDS = [
    ["gcc", "-march=x86-64-v4"],  # AVX-512 without bf16 products
    ["gcc", "-march=sapphirerapids"],  # AMX
    ["clang", "--target=x86_64-linux-gnu", "-march=x86-64"],  # no AVX
    ["clang", "--target=x86_64-linux-gnu", "-march=x86-64-v3"],  # AVX2
    ["clang", "--target=x86_64-linux-gnu", "-march=sapphirerapids"],
    ["aarch64-linux-gnu-gcc", "-march=armv8-a"],
    ["clang", "--target=aarch64-linux-gnu"],
]
"""`tests/e2e/test_native_portability.py` builds and runs what gcc makes for a processor without AVX and with AVX2."""

WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Werror"]
"""-Wpsabi is about passing wide vectors between functions, which here are all inlined."""


def accepts(command: list[str]) -> bool:
    """Whether the compiler is there, knows the processor and has its C library's headers."""
    if shutil.which(command[0]) is None:
        return False
    text = "#include <math.h>\n#include <stdint.h>\nint main(void) { return 0; }\n"
    run = subprocess.run([*command, "-xc", "-c", "-", "-o", "/dev/null"], input=text, text=True, capture_output=True)
    return run.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_compiles(command: list[str]) -> None:
    if not accepts(command):
        pytest.skip(f"no {' '.join(command)} on this machine")
    for source in library.SOURCES:
        run = subprocess.run(
            [*command, *library.FLAGS, *WARNINGS, "-O1", "-c", str(source), "-o", "/dev/null"],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{source.name}: {run.stderr[-2000:]}"


@pytest.mark.parametrize("command", COMMANDS[-2:], ids=" ".join)
def test_one_file_compiles_for_neon(command: list[str]) -> None:
    """The quick share of the above, with the flags of a real build."""
    if not accepts(command):
        pytest.skip(f"no {' '.join(command)} on this machine")
    source = Path(library.__file__).parent / "linear.c"
    run = subprocess.run([*command, *library.FLAGS, *WARNINGS, "-S", str(source), "-o", "-"], capture_output=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert b"fmla" in run.stdout, "vector multiply-adds of NEON"
