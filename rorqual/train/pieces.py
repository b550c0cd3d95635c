"""Tensors on disk in pieces: every rank writes ranges of what it owns, any number of ranks reads any range.

A piece is a range of a tensor's elements in row-major order, stored flat under `NAME[START:STOP]`; a tensor that was
not cut is stored under its own name in its own shape. Names and element numbers are those of the whole model, so they
do not depend on how many ranks there were.
"""

import bisect
import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from torch import Tensor

from rorqual.errors import CheckpointError

_CUT = re.compile(r"(.+)\[(\d+):(\d+)\]")


@dataclass(frozen=True)
class Piece:
    """Elements from `start` of the tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    """Flat, as many elements as this piece has."""

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing else of this tensor."""
        return self.values.numel() == math.prod(self.shape)

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.values.numel()

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name if self.is_whole else f"{self.name}[{self.start}:{self.stop}]"

    def stored(self) -> Tensor:
        """The tensor that goes into the file."""
        return (self.values.view(self.shape) if self.is_whole else self.values).detach().cpu().contiguous()


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor in one piece."""
    return Piece(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces that follow each other in one tensor as one; by name in the order of first appearance."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    out = []
    for group in by_name.values():
        run: list[Piece] = []
        for piece in sorted(group, key=lambda piece: piece.start):
            if run and run[-1].stop != piece.start:
                out.append(_one(run))
                run = []
            run.append(piece)
        out.append(_one(run))
    return out


def _one(run: list[Piece]) -> Piece:
    first = run[0]
    return first if len(run) == 1 else Piece(first.name, first.shape, first.start, torch.cat([p.values for p in run]))


class Tensors(Mapping[str, Tensor]):
    """The tensors of several files, whole or in pieces, read when asked for.

    `shapes` are those of the tensors that were cut. Raises (on opening and reading): CheckpointError for files that
    cannot be read or pieces that are missing.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {k: tuple(v) for k, v in (shapes or {}).items()}
        self._places: dict[str, list[tuple[int, int, Any, str]]] = {}
        self._stack = contextlib.ExitStack()
        for path in files:
            handle = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                self._add(handle, key)
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])

    def _add(self, handle: Any, key: str) -> None:
        cut = _CUT.fullmatch(key)
        if cut is not None and cut[1] in self._shapes:
            name, start, stop = cut[1], int(cut[2]), int(cut[3])
        else:
            shape = tuple(handle.get_slice(key).get_shape())
            name, start, stop = key, 0, math.prod(shape)
            self._shapes[name] = shape
        self._places.setdefault(name, []).append((start, stop, handle, key))

    def pop(self, name: str) -> Tensor:
        """The whole tensor, which is not among these any more. Raises: KeyError."""
        value = self[name].clone()
        del self._places[name]
        return value

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, or None where there is none of that name."""
        return self._shapes[name] if name in self._places else None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor, flat. Raises: CheckpointError when some are in no file."""
        places = self._places.get(name, [])
        out: Tensor | None = None
        at = start
        index = max(0, bisect.bisect_right(places, start, key=lambda place: place[0]) - 1)
        while at < stop and index < len(places):
            first, last, handle, key = places[index]
            index += 1
            if first > at or last <= at:
                continue
            upto = min(last, stop)
            if len(self._shapes[name]) != 1 and (first, last) == (0, math.prod(self._shapes[name])):
                values = handle.get_tensor(key).reshape(-1)[at:upto]
            else:
                values = handle.get_slice(key)[at - first : upto - first]
            if (at, upto) == (start, stop):
                return values
            if out is None:
                out = torch.empty(stop - start, dtype=values.dtype)
            out[at - start : upto - start] = values
            at = upto
        if at < stop or out is None:
            raise CheckpointError(
                f"Elements {at:,} to {stop:,} of {name} are in none of the checkpoint's files: it is damaged. "
                "Continue from an earlier checkpoint."
            )
        return out

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        if name not in self._places:
            raise KeyError(name)
        shape = self._shapes[name]
        if not shape or 0 in shape:
            return next(h.get_tensor(key) for *_, h, key in self._places[name])
        return self.read(name, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Release the files."""
        self._stack.close()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
