"""The OpenMP threads that stand beside a thread of ours, and what becomes of them when it has nothing to do.

GCC's runtime gives every thread that runs something in parallel workers of its own, and keeps them. Between two
parallel pieces of work they wait by spinning for up to 3 ms, so that the next piece begins at once; but while the
process has more such threads than processors, for about a microsecond only. Then every piece has to wake them, and a
decode step has dozens of pieces: on two processors a step of 16 rows took twice as long as on one thread, only because
the thread that loaded the model still had a worker. So threads that will not compute for a while give theirs back.

Source: libgomp, `gomp_managed_threads` and `gomp_throttled_spin_count_var`; OpenMP 5.0, section 3.2.44.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

from rorqual.ops.native.library import torch_openmp

_SOFT = 1
"""`omp_pause_soft`: the number of threads that was set stays."""


def release() -> bool:
    """Ends the workers of the calling thread; its next parallel piece starts new ones, which takes 0.1 ms or more.

    Whether that was possible: False under another runtime than torch's libgomp, or within a parallel piece.
    """
    pause = _pause()
    return pause is not None and pause(_SOFT) == 0


@lru_cache(maxsize=1)
def _pause() -> Callable[[int], int] | None:
    path = torch_openmp()
    if path is None:
        return None
    try:
        function = ctypes.CDLL(str(path)).omp_pause_resource_all
    except (OSError, AttributeError):  # before GCC 9
        return None
    function.restype, function.argtypes = ctypes.c_int, [ctypes.c_int]
    return function
