"""Tensors in pieces, and the plan of who owns what: nothing twice, nothing missing, loads even."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rorqual.errors import CheckpointError
from rorqual.parallel.zero import Range, merged, plan
from rorqual.train.pieces import Piece, Tensors, joined, whole


def write(path: Path, pieces: list[Piece]) -> Path:
    save_file({piece.key: piece.stored() for piece in pieces}, path)
    return path


def cut(name: str, tensor: torch.Tensor, places: list[int]) -> list[Piece]:
    flat, shape = tensor.reshape(-1), tuple(tensor.shape)
    bounds = [0, *places, flat.numel()]
    return [Piece(name, shape, a, flat[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_any_range_comes_back_from_any_cuts(tmp_path: Path) -> None:
    make = random.Random(1)
    tensor, other = torch.randn(3, 5, 7), torch.randn(4)
    for trial in range(20):
        pieces = cut("a.b", tensor, sorted(make.sample(range(1, 105), 4)))
        make.shuffle(pieces)
        files = [
            write(tmp_path / f"{trial}-0", pieces[:2]),
            write(tmp_path / f"{trial}-1", [*pieces[2:], whole("c", other)]),
        ]
        with Tensors(files, {"a.b": tensor.shape}) as tensors:
            assert set(tensors) == {"a.b", "c"} and tensors.shape("a.b") == (3, 5, 7) and tensors.shape("d") is None
            assert torch.equal(tensors["a.b"], tensor) and torch.equal(tensors["c"], other)
            start, stop = sorted(make.sample(range(106), 2))
            assert torch.equal(tensors.read("a.b", start, stop), tensor.reshape(-1)[start:stop])
            assert torch.equal(tensors.read("c", 1, 3), other[1:3])


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    pieces = cut("a", torch.randn(10, 10), [30, 60])
    with Tensors([write(tmp_path / "f", [pieces[0], pieces[2]])], {"a": (10, 10)}) as tensors:
        assert tensors.read("a", 60, 100).shape == (40,)
        with pytest.raises(CheckpointError, match="Elements 30 to 100 of a are in none of the checkpoint's files"):
            tensors["a"]


def test_neighbouring_pieces_are_joined() -> None:
    tensor = torch.randn(4, 6)
    pieces = cut("a", tensor, [6, 12, 18])
    together = joined([pieces[1], pieces[0], whole("b", tensor), pieces[3]])
    assert [(p.name, p.start, p.stop) for p in together] == [("a", 0, 12), ("a", 18, 24), ("b", 0, 24)]
    assert torch.equal(together[0].values, tensor.reshape(-1)[:12])


def test_the_plan_is_even_complete_and_the_same_every_time() -> None:
    make = random.Random(2)
    sizes = [make.choice([64, 64, 256, 1024]) for _ in range(200)]
    ranges = [Range("w", sum(sizes[:i]), sum(sizes[: i + 1]), 4 * size) for i, size in enumerate(sizes)]
    for ranks in (1, 2, 4, 7):
        owners = plan(ranges, ranks)
        assert owners == plan(ranges, ranks) and set(owners) == set(range(ranks))
        loads = [sum(r.cost for r, owner in zip(ranges, owners, strict=True) if owner == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) <= 4 * 1024
    assert [(r.start, r.stop) for r in merged(ranges)] == [(0, sum(sizes))]
    assert len(merged([ranges[0], ranges[2], ranges[3]])) == 2
