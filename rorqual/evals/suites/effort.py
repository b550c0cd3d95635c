"""S-ARITH at three efforts: what more thinking costs and brings, on operands of 1 to 8 digits."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.data.tasks.arith_columns import EFFORTS, ColumnArithFamily
from rorqual.data.tasks.arith_limits import ArithLimitsFamily
from rorqual.evals.economy import PriceVector, output_tokens, spearman, tokens_per_solved
from rorqual.evals.suites.arith import ArithSuite
from rorqual.evals.suites.base import Figure, Figures, Row

HARD_DIGITS = 7
"""Operands from this length on are the hardest quarter: two of the eight lengths, asked equally often."""


class EffortSuite(ArithSuite):
    """Questions of `arith` without thinking, with it, and at effort max, in turns."""

    name = "effort"
    max_tokens = 640
    sizes = {"tiny": 48, "small": 480, "full": 4800}
    strata = ("effort", "kind", "digits", "mode")

    def build_family(self) -> ColumnArithFamily:
        return ColumnArithFamily()

    def others(self) -> list[ArithLimitsFamily]:
        return []  # efforts are compared on questions that differ in nothing else

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        out = super().figures(rows, forced, price)
        for effort in EFFORTS:
            here = [row for row in rows if row.item.stratum["effort"] == effort]
            tokens = [output_tokens(row.usage) for row in here]
            out |= {
                f"ACC_{effort}": Figure.of_share(row.passed for row in here),
                f"ACC_HARD_{effort}": Figure.of_share(row.passed for row in here if is_hard(row)),
                f"TOKENS_{effort}": Figure(sum(tokens) / len(tokens) if tokens else None),
                f"TPS_{effort}": Figure(tokens_per_solved(here)),
            }
        efforts = [EFFORTS.index(row.item.stratum["effort"]) for row in rows]
        out["MONO_TOKENS"] = Figure(spearman(efforts, [output_tokens(row.usage) for row in rows]))
        out["MONO_ACC"] = Figure(spearman(efforts, [float(row.passed) for row in rows]))
        return out


def is_hard(row: Row) -> bool:
    """Whether the row's question belongs to the hardest quarter; a chain counts by its operations."""
    stratum = row.item.stratum
    size = stratum["d"] if stratum["kind"] == "chain" else stratum["digits"]
    return bool(size >= HARD_DIGITS)
