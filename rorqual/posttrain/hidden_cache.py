"""Teachers' last hidden states on disk: what enters a teacher's head, of the places where a student is compared.

Source: V4 report, on-policy distillation: logits of many teachers over a large vocabulary cannot be stored, hidden
states can (D numbers a token in place of V), and the head rebuilds the logits from them. What is kept is exactly the
tensor that enters the head's product, after the collapse of the streams and the final norm, in bf16 unless asked
otherwise. One safetensors file a batch and teacher, mapped into memory when read.

T places of a span, D hidden.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from rorqual.checkpoint.safetensors_io import read_header, save_tensors, temporary
from rorqual.errors import CheckpointError


class StateKey(NamedTuple):
    """Whose states, of what."""

    trajectory: str
    start: int
    stop: int
    """Places [start, stop) of the trajectory."""
    teacher: str
    version: str
    """Of the teacher's weights: other weights have other states."""


@dataclass(frozen=True)
class TeacherStates:
    """A teacher at the places of a span."""

    hidden: Tensor
    """[T, D], what enters the head."""
    share: Tensor | None = None
    """fp32 [T]: the weight of what a decision puts in the teacher's place (see `distill_decision.py`)."""
    token: Tensor | None = None
    """int64 [T]: the id that the decision puts next."""


class HiddenCache:
    """States by key, in a folder. Reopening finds what is there; damaged files are left out and made again."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self._place: dict[StateKey, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*/*.safetensors")):
            try:
                names = {info.name for info in read_header(path)}
            except CheckpointError:
                path.unlink(missing_ok=True)
                continue
            for name in names:
                key, part = _read_name(name)
                if part == "hidden":
                    self._place[key] = path

    def __contains__(self, key: StateKey) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in set(self._place.values()))

    def put(self, states: Mapping[StateKey, TeacherStates]) -> None:
        """Keep states of one teacher, all or none of them. Raises: CheckpointError when the disk refuses."""
        if not states:
            return
        first = next(iter(states))
        tensors: dict[str, Tensor] = {}
        for key, value in states.items():
            assert (key.teacher, key.version) == (first.teacher, first.version), "a file is one teacher's"
            parts = {"hidden": value.hidden.to(self.dtype), "share": value.share, "token": value.token}
            tensors |= {
                _name(key, part): tensor.detach().cpu().contiguous().clone()
                for part, tensor in parts.items()
                if tensor is not None
            }
        folder = self.folder / _digest(first.teacher, first.version)
        path = folder / f"{_digest(*tensors)}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside = temporary(path)
            save_tensors(tensors, beside)
            beside.replace(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"cannot keep hidden states of {first.teacher} in {folder}: {error}. Free space there, or choose "
                "another run folder."
            ) from error
        self._open.pop(path, None)
        self._place |= dict.fromkeys(states, path)

    def get(self, key: StateKey) -> TeacherStates:
        """States of a key, mapped from the file. Raises: KeyError for one that is not there."""
        path = self._place[key]
        if path not in self._open:
            self._open[path] = safetensors.safe_open(path, framework="pt")
        file = self._open[path]
        names = set(file.keys())

        def read(part: str) -> Tensor | None:
            name = _name(key, part)
            return file.get_tensor(name) if name in names else None

        hidden = read("hidden")
        assert hidden is not None
        return TeacherStates(hidden, read("share"), read("token"))

    def forget(self, trajectories: Collection[str]) -> None:
        """Drop states of trajectories; files go once nothing in them is wanted."""
        gone = set(trajectories)
        for key in [key for key in self._place if key.trajectory in gone]:
            path = self._place.pop(key)
            if path not in self._place.values():
                self._open.pop(path, None)
                path.unlink(missing_ok=True)


def _name(key: StateKey, part: str) -> str:
    return json.dumps([*key, part])


def _read_name(name: str) -> tuple[StateKey, str]:
    *key, part = json.loads(name)
    return StateKey(*key), part


def _digest(*words: str) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=12).hexdigest()
