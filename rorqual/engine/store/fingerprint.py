"""What stored state depends on besides its tokens: configuration, weights, precision, arithmetic, format.

Entries made by other weights would be wrong, by other kernels merely not the same bits; neither may be mixed.
"""

from __future__ import annotations

import hashlib
import platform
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.store.checksum import checksum
from rorqual.model.packed_weights import packed
from rorqual.model.pages import tokens_per_page
from rorqual.model.state import fingerprint
from rorqual.ops import registry
from rorqual.ops.native import library

if TYPE_CHECKING:
    from rorqual.model import Transformer

FORMAT = 1
"""Version of the files' layout."""

WHOLE_BYTES = 1 << 30
"""Weights up to so many bytes are summed completely, larger ones at evenly spaced places of every tensor."""

_SAMPLE = 1 << 16


def store_fingerprint(model: Transformer, page_tokens: int | None = None) -> bytes:
    """16 bytes that say whose state this is."""
    size = tokens_per_page(model.cfg) if page_tokens is None else page_tokens
    like = model.reference
    digest = hashlib.blake2b(digest_size=16)
    for item in (FORMAT, fingerprint(model.cfg), size, like.dtype, model.compute_dtype, arithmetic()):
        digest.update(f"{item}\n".encode())
    state = model.state_dict()
    for name, weight in packed(model):
        state[f"{name} {weight.format} codes"] = weight.codes
        if weight.scale is not None:
            state[f"{name} {weight.format} scale"] = weight.scale
    whole = sum(t.nbytes for t in state.values()) <= WHOLE_BYTES
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_sum(tensor, whole).to_bytes(8, "little"))
    return digest.digest()


def arithmetic() -> str:
    """Names the kernels that compute, and the processor that they were built for."""
    built = library.load() if registry.allows("native") else None
    if built is not None:
        return str(built._name).rsplit("/", 1)[-1]
    return f"reference {torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _sum(tensor: Tensor, whole: bool) -> int:
    flat = tensor.detach().reshape(-1)
    if not whole and flat.numel() > 2 * _SAMPLE:
        step = flat.numel() // _SAMPLE
        flat = torch.cat([flat[::step], flat[-_SAMPLE:]])
    data = flat.contiguous().cpu().view(torch.uint8).numpy()
    padded = np.zeros(-(-len(data) // 8) * 8, dtype=np.uint8)
    padded[: len(data)] = data
    return checksum(padded.view(np.uint64))
