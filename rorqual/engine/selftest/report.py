"""What a self-test found: checks, cases compared, the first difference of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.exactness import Arithmetic

Progress = Callable[[str, int, int], None]
"""Called with the name of the check that begins, the checks done and how many there are."""


@dataclass
class Check:
    """One way of computing the same thing, compared with the plain one bit by bit."""

    name: str
    about: str
    cases: int = 0
    differences: int = 0
    first: str | None = None
    """Where the first difference was."""
    seconds: float = 0.0
    note: str | None = None
    """What the check did not do, or did besides."""

    @property
    def passed(self) -> bool:
        return not self.differences

    def same(self, found: Tensor, wanted: Tensor, where: str) -> None:
        """Count a comparison of logits: equal shape and equal bits."""
        self.cases += 1
        if found.shape == wanted.shape and torch.equal(found, wanted):
            return
        self.differences += 1
        if self.first is None:
            size = "another shape"
            if found.shape == wanted.shape:
                rows = (found != wanted).flatten(0, -2).any(-1).nonzero() if found.ndim > 1 else None
                place = "" if rows is None else f" in row {int(rows[0])} of {found.flatten(0, -2).shape[0]}"
                size = f"logits differ by up to {float((found - wanted).abs().max()):.2g}{place}"
            self.first = f"{where}: {size}"

    def same_ids(self, found: list[int], wanted: list[int], where: str) -> None:
        """Count a comparison of tokens."""
        self.cases += 1
        if found != wanted:
            self.differences += 1
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
            self.first = self.first or f"{where}: token {at} differs"

    def holds(self, condition: bool, where: str) -> None:
        """Count a condition."""
        self.cases += 1
        if not condition:
            self.differences += 1
            self.first = self.first or where


@dataclass
class SubjectReport:
    """What was found on one model."""

    model: str
    arithmetic: Arithmetic
    digest: str
    """Of the bits that the plain run gave."""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": self.model, "passed": self.passed, "digest": self.digest,
            "arithmetic": asdict(self.arithmetic),
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
        }  # fmt: skip


def digest(*parts: Tensor | list[int]) -> str:
    """16 hexadecimal digits of the bits of tensors and lists."""
    out = hashlib.blake2b(digest_size=8)
    for part in parts:
        tensor = torch.tensor(part) if isinstance(part, list) else part
        out.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
