"""Chips and what they can do at most: `hardware.toml`, or a table of the user's own.

Figures are the makers' peaks, which no program reaches; what follows from them are bounds, not forecasts.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rorqual.errors import ConfigError
from rorqual.planner.work import NumberFormat

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MACHINE = re.compile(r"(?:([0-9]{1,9})\s*[xX*]\s*)?([a-zA-Z][\w.-]*)")


class Chip(BaseModel):
    """One row of the table; units as in `hardware.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    memory: Positive
    bandwidth: Positive
    bf16: Positive
    fp8: Positive | None = None
    fp4: Positive | None = None
    link: Positive | None = None
    usd_per_hour: Positive | None = None
    price_source: str = ""
    source: str
    estimated: tuple[str, ...] = ()

    def rate(self, number: NumberFormat) -> float:
        """FLOP/s of products in a format, at the next wider one's rate where the chip has not got it."""
        narrow = {"fp4": (self.fp4, self.fp8), "fp8": (self.fp8,), "bf16": ()}[number]
        return next((rate for rate in narrow if rate is not None), self.bf16)


@dataclass(frozen=True)
class Machine:
    """So many chips of one kind, joined by their links."""

    chip: Chip
    count: int

    @property
    def label(self) -> str:
        """`8 x NVIDIA H200 SXM`."""
        return f"{self.count} x {self.chip.name}"


Table = dict[str, Chip]


@cache
def load_hardware(path: Path | None = None) -> Table:
    """Chips by their short names, from `hardware.toml` unless another table is given.

    Raises: ConfigError saying what in the file is wrong.
    """
    path = Path(__file__).with_name("hardware.toml") if path is None else path
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
        return {key: Chip.model_validate(row) for key, row in rows.items()}
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"{path} is no table of hardware ({reason}), so nothing can be planned with it. Write it like "
        "rorqual/planner/hardware.toml."
    )


def find_machine(text: str, table: Table | None = None) -> Machine:
    """`8xH200` -> eight of them. Raises: ConfigError for a chip that is not in the table, or several without links."""
    table = load_hardware() if table is None else table
    found = _MACHINE.fullmatch(text.strip())
    chip = table.get(found.group(2).lower()) if found else None
    if found is None or chip is None:
        raise ConfigError(
            f"there is no hardware {text!r} in the table. Write a number and a name, such as 8xH200, of: "
            f"{', '.join(table)}. For other chips give a table of your own with --hardware-table."
        )
    count = int(found.group(1) or 1)
    if count < 1:
        raise ConfigError(
            f"{text!r} is no machine: there must be at least one chip. Write for example 1x{found.group(2)}."
        )
    if count > 1 and chip.link is None:
        raise ConfigError(
            f"{chip.name} has no figure for its links, so {count} of them cannot be planned for. Plan for one, or add "
            "`link` in a table of your own."
        )
    return Machine(chip, count)
