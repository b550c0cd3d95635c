"""Streamed experts as the fused step asks for them: it calls back at every layer, once its tokens are routed."""

import ctypes
import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rorqual.model.moe import MoE
from rorqual.ops.streamed_experts import StreamedExperts

_Fetch = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p))


class Fetcher:
    """The function `Fetch` of `ops/native/decode_step.c`, for the layers of one model. Any thread may run a step."""

    def __init__(self, layers: Sequence[StreamedExperts]) -> None:
        self._local = threading.local()
        # not a method of self: a circle of references would keep gigabytes until the collector comes by
        self._function = _Fetch(partial(_fetch, layers, self._local))
        address = ctypes.c_void_p.from_buffer_copy(self._function).value  # `ctypes.cast` makes a circle too
        assert address is not None
        self.address = address

    def begin(self) -> None:
        """Before a step of this thread."""
        self._local.groups = self._local.error = None

    def end(self) -> None:
        """After the step. Raises: what kept an expert from being read."""
        error, self._local.error = self._local.error, None
        if error is not None:
            raise error


def _fetch(
    layers: Sequence[StreamedExperts], local: threading.local, layer: int, bounds: "ctypes._Pointer[ctypes.c_int64]",
    out: "ctypes._Pointer[ctypes.c_void_p]",
) -> int:  # fmt: skip
    """One call of the step, from C."""
    if local.error is not None:
        return -1
    try:
        if local.groups is None:
            source = layers[layer]
            ends = bounds[: source.shape[0] + 1]
            local.groups = source.groups([e for e in range(source.shape[0]) if ends[e] < ends[e + 1]])
        places = next(local.groups, None)
        if places is None:
            local.groups = None
            return 0
        out[0] = places.data_ptr()
        return 1
    except BaseException as error:  # C cannot pass it on: `end` raises it
        local.groups, local.error = None, error
        return -1


def expect_experts(modules: Sequence[MoE], tokens: Tensor | Sequence[int]) -> None:
    """Where experts are streamed, have those read that the hash-routed layers among `modules` will want for these
    tokens: they are known before anything is computed.
    """
    for moe in modules:
        if moe.experts.streamed is not None and moe.gate.hash_routed:
            ids = torch.as_tensor(tokens).flatten()
            moe.experts.streamed.expect(moe.gate.tid2eid[ids].unique().tolist())
