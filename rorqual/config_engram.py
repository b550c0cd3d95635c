"""Settings of Engram, the memory that is looked up by hashes of the last tokens. V4 has none; it is off by default.

Source: Engram paper (arXiv 2601.07372) for the flavour `paper`; DeepSeek-V4.1-Flash report for the flavour `v41`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.errors import ConfigError

FLAVOURS = ("paper", "v41")
PLACEMENTS = ("device", "host")
MAX_ROWS = 1 << 40
"""Rows per head above which a table is a mistake (and primes would take long to find)."""


@dataclass(frozen=True)
class EngramConfig:
    """Which blocks have a memory, and how it is addressed and read. Checked against the network by `ModelConfig`."""

    layers: tuple[int, ...]
    """Blocks that have one, counted from 0 (paper: one very early, one in the middle)."""
    rows: int
    """Requested rows of each table; the real sizes are the next primes, each used once in the whole model."""
    orders: tuple[int, ...] = (2, 3)
    """Lengths of the token runs that are looked up."""
    heads: int = 8
    """Tables per order and layer, each with a hash of its own."""
    head_dim: int = 32
    """Channels of a row. All rows of a token side by side: len(orders) * heads * head_dim channels."""
    flavour: str = "paper"
    """`paper`: a short convolution follows the gate. `v41`: none, and no run of tokens reaches across a pad token."""
    kernel: int = 4
    """Taps of the convolution, `max(orders)` tokens apart (`paper` only)."""
    pad_token_id: int = 2
    """Stands for what is left of a document's beginning."""
    seed: int = 0
    """Decides the hash multipliers."""
    placement: str = "device"
    """Where the tables live: `device` (with the other weights) or `host` (main memory, fetched ahead of use)."""

    def __post_init__(self) -> None:
        for name in ("layers", "orders"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ConfigError(f"engram.{name} must be a list of integers, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        _check(self)

    @property
    def width(self) -> int:
        """Channels of all rows of one token."""
        return len(self.orders) * self.heads * self.head_dim

    @property
    def max_order(self) -> int:
        """The longest run of tokens that is looked up; also the distance between the convolution's taps."""
        return max(self.orders)

    @property
    def reach(self) -> int:
        """Tokens that the convolution looks back."""
        return (self.kernel - 1) * self.max_order if self.flavour == "paper" else 0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json` under `engram`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def read_engram(value: Any) -> EngramConfig | None:
    """The settings from an `engram` object of a file; None stays None. Raises ConfigError when they are impossible."""
    if value is None or isinstance(value, EngramConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"engram must be an object with layers and rows, or absent, got {value!r}.")
    known = {f.name for f in dataclasses.fields(EngramConfig)}
    unknown = sorted(set(value) - known)
    if unknown:
        raise ConfigError(
            f"engram has no setting {', '.join(unknown)}; it would be ignored and another memory built. "
            f"Settings: {', '.join(sorted(known))}."
        )
    missing = [name for name in ("layers", "rows") if name not in value]
    if missing:
        raise ConfigError(f"engram lacks {', '.join(missing)}, for which there is no safe default. Add it.")
    return EngramConfig(**value)


def check_engram(engram: EngramConfig, num_layers: int, vocab_size: int) -> None:
    """Raise ConfigError when a network with these layers and this vocabulary cannot have such a memory."""
    for layer in engram.layers:
        if layer >= num_layers:
            raise ConfigError(
                f"engram.layers names block {layer}, but num_hidden_layers={num_layers} (0 to {num_layers - 1}; "
                "MTP modules have none). Correct it."
            )
    if engram.pad_token_id >= vocab_size:
        raise ConfigError(
            f"engram.pad_token_id is {engram.pad_token_id}, outside the vocabulary of {vocab_size}; correct it."
        )


def _check(engram: EngramConfig) -> None:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    least = {"rows": 2, "heads": 1, "head_dim": 1, "kernel": 1, "pad_token_id": 0, "seed": 0}
    for name, lowest in least.items():
        value = getattr(engram, name)
        if not whole(value) or value < lowest:
            raise ConfigError(f"engram.{name} is {value!r}; it must be an integer of {lowest} or more.")
    if engram.rows > MAX_ROWS:
        raise ConfigError(f"engram.rows is {engram.rows}, more than {MAX_ROWS} rows a head; correct it.")
    for name, lowest in (("layers", 0), ("orders", 1)):
        values = getattr(engram, name)
        if not values or not all(whole(v) and v >= lowest for v in values) or list(values) != sorted(set(values)):
            raise ConfigError(
                f"engram.{name} is {list(values)}; give different integers of {lowest} or more in rising order."
            )
    if engram.max_order > 16:
        raise ConfigError(f"engram.orders reaches {engram.max_order}; runs of more than 16 tokens hardly ever repeat.")
    if engram.flavour not in FLAVOURS:
        raise ConfigError(f"engram.flavour is {engram.flavour!r}; use 'paper' or 'v41'.")
    if engram.placement not in PLACEMENTS:
        raise ConfigError(f"engram.placement is {engram.placement!r}; use 'device' or 'host'.")
