"""Runs the self-test on models and says what it found."""

from __future__ import annotations

import time
from collections.abc import Callable

from rorqual.engine.exactness import examine
from rorqual.engine.selftest import caches, engines, needle, residues
from rorqual.engine.selftest.report import Check, Progress, SubjectReport, digest
from rorqual.model import Transformer
from rorqual.model.packed_weights import packed

Step = tuple[str, str, Callable[[Check], None]]


def plan(model: Transformer, seed: int, *, is_small: bool, quick: bool) -> tuple[residues.Row, list[Step]]:
    """The row that is compared, and every check as (name, description, function).

    Where `is_small` every residue of 128 is tried (every third when `quick`); of other models every 11th (31st), which
    meets all residues of 4.
    """
    stride = (3 if quick else 1) if is_small else (31 if quick else 11)
    row = residues.new_row(model, seed, residues.BLOCK + 1, stride)
    steps: list[Step] = []
    for name, (about, run) in residues.CHECKS.items():
        steps.append((name, about, _on(row, run)))
    for name, about, run in caches.checks():
        if not quick or name in ("cache, memory, zero", "cache, disk, full"):
            steps.append((name, about, _on(row, run)))
    count, tokens = (40, 48) if is_small else (12, 16)
    count = count // 3 if quick else count

    def engine_run(check: Check) -> None:
        engines.schedules(model, check, count, tokens, seed)

    def draft_run(check: Check) -> None:
        engines.drafts(model, check, max(3, count // 3), tokens, seed)

    steps.append(("drafts", "with drafts that were verified, right and wrong ones", draft_run))
    steps.append(("engine", "greedy requests in changing company, with a disk cache and a restart", engine_run))
    if is_small and next(packed(model), None) is None:  # it is given weights of its own
        steps.append(
            ("needle", "a needle at every place of a block, found and read", lambda check: needle.needles(model, check))
        )
    return row, steps


def _on(row: residues.Row, run: Callable[[residues.Row, Check], None]) -> Callable[[Check], None]:
    return lambda check: run(row, check)


def examine_model(
    name: str, model: Transformer, seed: int, progress: Progress, *, is_small: bool, quick: bool
) -> SubjectReport:
    """Every check on one model."""
    row, steps = plan(model, seed, is_small=is_small, quick=quick)
    report = SubjectReport(name, examine(model), digest(row.logits))
    for number, (label, about, run) in enumerate(steps):
        progress(f"{name}: {label}", number, len(steps))
        check, began = Check(label, about), time.perf_counter()
        run(check)
        check.seconds = time.perf_counter() - began
        report.checks.append(check)
    return report
