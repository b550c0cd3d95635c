"""Builds the C kernels with the system's compiler at first use and loads them.

The library lies in the user's cache folder, named by a hash of source, compiler, processor and torch, so it is rebuilt
when any of them changes. Without a compiler nothing breaks: the reference implementations run instead.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rorqual import log
from rorqual.folders import cache_folder
from rorqual.ops import registry

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fPIC",
    "-std=c11",
]
_logger = log.get(__name__)


def compiler() -> list[str] | None:
    """The C compiler that would be used, as a command: $CC (arguments allowed), else cc, gcc or clang from PATH."""
    named = os.environ.get("CC")
    for command in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()


def torch_openmp() -> Path | None:
    """torch's own OpenMP runtime: sharing it keeps one pool of threads in the process."""
    folder = Path(torch.__file__).parent / "lib"
    return next(iter(sorted(folder.glob("libgomp*.so*"))), None)


def _runtime(cc: list[str]) -> Path | None:
    """The OpenMP runtime for what `cc` compiles: torch's, which is gcc's; clang calls its own by other names."""
    version = subprocess.run([*cc, "--version"], capture_output=True, text=True, check=False)
    return None if "clang" in version.stdout.lower() else torch_openmp()


def _build(cc: list[str], target: Path) -> None:
    """Compile for this very processor, or for its family where the compiler does not know `native`.

    A processor named in $CC (`CC="cc -march=x86-64-v3"`) is the one compiled for.
    """
    if any(argument.startswith(("-march", "-mcpu")) for argument in cc):
        _compile(cc, FLAGS, target)
        return
    try:
        _compile(cc, [*FLAGS, "-march=native"], target)
    except subprocess.CalledProcessError:
        _compile(cc, FLAGS, target)


def _compile(cc: list[str], flags: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    runtime = _runtime(cc)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        library = Path(folder) / "kernels.so"
        openmp = ["-fopenmp"] if runtime else []
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        commands = [
            [*cc, *flags, *openmp, "-c", str(source), "-o", out] for source, out in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(partial(subprocess.run, check=True, capture_output=True), commands))
        # linked by hand: -fopenmp here would bring in a second OpenMP runtime beside torch's
        link = [*cc, "-shared", *objects, *([str(runtime)] if runtime else []), "-lm", "-o", str(library)]
        subprocess.run(link, check=True, capture_output=True)
        os.replace(library, target)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The kernels, built if need be; None (said once in the log) when they cannot be had."""
    if not registry.allows("native"):
        return None
    cc = compiler()
    if cc is None:
        _logger.info("No C compiler found (cc, gcc, clang): using the slower reference operations.")
        return None
    texts = [path.read_text() for path in (*SOURCES, *_HEADERS)]
    key = "\n".join([*texts, *cc, *FLAGS, _processor(), torch.__version__, str(_runtime(cc))])
    target = cache_folder() / f"kernels-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    try:
        if not target.exists():
            if _runtime(cc) is None:
                _logger.info("The native operations built by %s run on one thread; gcc's can share torch's.", cc[0])
            _build(cc, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (
            error.stderr.decode(errors="replace")[-500:] if isinstance(error, subprocess.CalledProcessError) else ""
        )
        _logger.warning(
            "The native operations could not be built or loaded (%s %s); using the reference ones.",
            error,
            detail,
        )
        return None


@lru_cache(maxsize=128)
def kernel(name: str, bf16: bool) -> tuple[Callable[..., None], tuple[torch.dtype | None, ...]]:
    """C function `name`, its argument types read from its prototype so that they stand in one place.

    Functions written for both element types (`types.h`) exist twice, and `bf16` chooses. Also returns the dtype that
    each argument must have, None for a number.
    """
    library = load()
    assert library is not None
    begin, text = _prototype(name)
    function = getattr(library, f"{name}_bf16" if bf16 and text is not None and f"NAME({name})" in text else name)
    function.restype = None
    arguments = text[begin : text.index(")", begin)].split(",")
    function.argtypes = [
        ctypes.c_void_p if "*" in argument
        else ctypes.c_long if "long" in argument
        else ctypes.c_int if "int" in argument
        else ctypes.c_float
        for argument in arguments
    ]  # fmt: skip
    element = torch.bfloat16 if bf16 else torch.float32
    return function, tuple(
        None if "*" not in argument
        else torch.int64 if "int64_t" in argument
        else torch.uint8 if "uint8_t" in argument
        else element if re.search(r"\bT\b", argument)
        else torch.float32
        for argument in arguments
    )  # fmt: skip


def _prototype(name: str) -> tuple[int, str]:
    """Where the arguments of C function `name` begin, and in which source."""
    for path in (*SOURCES, *_HEADERS):
        text = path.read_text()
        for head in (f"void {name}(", f"void NAME({name})("):
            if head in text:
                return text.index(head) + len(head), text
    raise KeyError(name)  # our own mistake


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Run kernel `name`: tensors as pointers (contiguous, of the dtype of the C prototype), numbers by value.

    The first tensor says which element type is meant.
    """
    bf16 = False
    for a in args:
        if isinstance(a, Tensor):
            bf16 = a.dtype is torch.bfloat16
            break
    function, dtypes = kernel(name, bf16)
    function(*[a if a.__class__ in _NUMBERS else address(name, a, d) for a, d in zip(args, dtypes, strict=True)])  # type: ignore[arg-type]


_NUMBERS = frozenset((int, float, type(None)))


def address(name: str, tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Of a tensor's first element, for kernel `name`. Raises TypeError unless it has the dtype that C reads there."""
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: a tensor of dtype {tensor.dtype} reached C, which reads {dtype} there")
    return tensor.data_ptr()


def usable(tensor: Tensor) -> bool:
    """Whether the native twins can work on tensors like this one: fp32 on the CPU, and the library is there."""
    return tensor.dtype is torch.float32 and _reachable(tensor)


def usable_typed(tensor: Tensor) -> bool:
    """As `usable`, for kernels written for both element types: fp32 or bf16."""
    return (tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16) and _reachable(tensor)


def infers(tensor: Tensor) -> bool:
    """As `usable_typed`, for kernels without a backward pass: no gradients are wanted."""
    return not torch.is_grad_enabled() and usable_typed(tensor)


def _reachable(tensor: Tensor) -> bool:
    return (
        tensor.is_cpu
        and not torch.is_autocast_enabled("cpu")  # products around the kernels would come out in bf16
        and registry.allows("native")
        and load() is not None
    )
