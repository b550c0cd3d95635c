"""Builds the C kernels with the system's compiler at first use and loads them.

The library lies in the user's cache folder, named by a hash of source, compiler, processor and torch, so it is rebuilt
when any of them changes. Without a compiler nothing breaks: the reference implementations run instead.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rorqual import log

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd -fPIC -std=c11".split()
_logger = log.get(__name__)


def cache_folder() -> Path:
    """Where built libraries lie: $XDG_CACHE_HOME/rorqual or ~/.cache/rorqual."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rorqual"


def compiler() -> str | None:
    """The C compiler that would be used: $CC, else cc, gcc or clang from PATH."""
    named = os.environ.get("CC")
    return next((found for name in ([named] if named else ["cc", "gcc", "clang"]) if (found := shutil.which(name))), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()


def _torch_openmp() -> Path | None:
    """torch's own OpenMP runtime: sharing it keeps one pool of threads in the process."""
    folder = Path(torch.__file__).parent / "lib"
    return next(iter(sorted(folder.glob("libgomp*.so*"))), None)


def _build(cc: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    runtime = _torch_openmp()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, objects, library = _SOURCE, Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        openmp = ["-fopenmp"] if runtime else []
        subprocess.run([cc, *_FLAGS, *openmp, "-c", str(source), "-o", str(objects)], check=True, capture_output=True)
        link = [cc, "-shared", str(objects), *([str(runtime)] if runtime else []), "-lm", "-o", str(library)]
        subprocess.run(link, check=True, capture_output=True)
        os.replace(library, target)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The kernels, built if need be; None (said once in the log) when they cannot be had."""
    if os.environ.get("RORQUAL_OPS") == "reference":
        return None
    cc = compiler()
    if cc is None:
        _logger.info("No C compiler found (cc, gcc, clang): using the slower reference operations.")
        return None
    key = "\n".join([_SOURCE.read_text(), cc, *_FLAGS, _processor(), torch.__version__, str(_torch_openmp())])
    target = cache_folder() / f"kernels-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    try:
        if not target.exists():
            _build(cc, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode(errors="replace")[-500:] if isinstance(error, subprocess.CalledProcessError) else ""
        _logger.warning("The native operations could not be built or loaded (%s %s); using the reference ones.", error, detail)
        return None


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Run kernel `name`: tensors as pointers (contiguous fp32), ints as long or int by the C prototype, floats as float."""
    library = load()
    assert library is not None
    function = getattr(library, name)
    if function.argtypes is None:
        function.argtypes, function.restype = _prototype(name), None
    function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in args])


@lru_cache(maxsize=64)
def _prototype(name: str) -> list[type]:
    """Argument types of a kernel, read from its C prototype so that they stand in one place."""
    text = _SOURCE.read_text()
    begin = text.index(f"void {name}(") + len(f"void {name}(")
    kinds: list[type] = []
    for argument in text[begin : text.index(")", begin)].split(","):
        kinds.append(
            ctypes.c_void_p if "*" in argument
            else ctypes.c_long if "long" in argument
            else ctypes.c_int if "int" in argument
            else ctypes.c_float
        )  # fmt: skip
    return kinds


def usable(tensor: Tensor) -> bool:
    """Whether the native twins can work on tensors like this one: fp32 on the CPU, and the library is there."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and load() is not None
