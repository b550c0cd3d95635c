"""Attention really is sparse: no tensor of S x S exists in prefill or training, and memory grows as S.

A dispatch mode looks at every tensor any operation makes. Sizes are those of the storage, so that an
expanded view of a small tensor does not count as a large one. Buffers inside a compiled kernel cannot be seen
this way; the peak memory of the whole process is measured by `benchmarks/prefill_memory.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import build, config, some_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rorqual.model import Transformer
from rorqual.ops import index_loss, sparse_attention


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor made while it is on, in elements, and the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                if min(tensor.numel(), held) > self.elements:
                    self.elements, self.operation = min(tensor.numel(), held), f"{func} {tuple(tensor.shape)}"
        return out


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Collects what autograd keeps for the backward pass; each storage counts once."""
    seen: dict[int, tuple[Tensor, int]] = {}
    total = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no address is used twice
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Blocks of 128 as in the bundled models; the heads and the width are small against S."""
    return build(
        config(
            compress_ratios=[0, 4, 128, 4],
            index_n_heads=4,
            index_topk=8,
            sliding_window=16,
            num_attention_heads=4,
            max_position_embeddings=65536,
        )
    )


def prefill(model: Transformer, length: int) -> LargestTensor:
    """One call with a state."""
    watch = LargestTensor()
    with torch.no_grad(), watch:
        model(some_tokens(model, 1, length), state=model.new_state())
    return watch


def train(model: Transformer, length: int) -> LargestTensor:
    """One forward and backward pass."""
    tokens = some_tokens(model, 1, length)
    watch = LargestTensor()
    with watch:
        logits = model(tokens)
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    model.zero_grad()
    return watch


def test_prefill_makes_no_square(model: Transformer) -> None:
    """Nor S x S/4 x heads, which for four index heads is the same number."""
    length = 8192
    found = prefill(model, length)
    assert found.elements < length * length, f"{found.operation} holds {found.elements} elements"


def test_training_makes_no_square(model: Transformer) -> None:
    """Forward and backward."""
    length = 4096
    found = train(model, length)
    assert found.elements < length * length, f"{found.operation} holds {found.elements} elements"


def test_the_largest_tensor_grows_linearly(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens, at most about twice the largest tensor.

    Scores are made in blocks of a fixed size, which hides everything smaller; here the blocks are small.
    """
    for module in (sparse_attention, index_loss):
        monkeypatch.setattr(module, "BLOCK_BUDGET", 1 << 17)
    for run in (prefill, train):
        small, large = run(model, 1024), run(model, 2048)
        assert large.elements <= 2.1 * small.elements, f"{run.__name__}: {small.operation}, {large.operation}"


def test_what_the_backward_pass_keeps_grows_linearly(model: Transformer) -> None:
    """The bytes saved by autograd, whole model."""
    kept = []
    for length in (1024, 2048):
        with saved_bytes() as total:
            loss = model(some_tokens(model, 1, length)).square().mean()
        loss.backward()
        kept.append(total[0])
    model.zero_grad()
    assert kept[1] <= 2.1 * kept[0], f"bytes kept for backward: {kept}"
