"""Which parameter is trained by which optimizer, and what counts as one matrix.

Source: V4 report, optimizer section: AdamW for the embedding, the head, norm weights and the static parts of
the hyper-connections; Muon for every other matrix. A parameter often stores several logically independent
matrices one above the other (the three maps of a hyper-connection, output groups, the two halves of an
overlapping compressor, experts). Newton–Schulz must see each alone: run over a stack it equalises the stack,
and a part with small gradients gets almost no update.

The report leaves three tensors open. Sinks, hyper-connection bases and scales are not decayed (they are
biases), and the compressor's positional bias `ape`, a matrix of a few rows, goes to AdamW undecayed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError

Kind = Literal["muon", "decayed", "bias", "table"]

Owned = Mapping[str, Sequence[tuple[int, int]]]
"""Elements of each parameter (flattened) that an optimizer works on; a name that is absent has none."""


@dataclass(frozen=True)
class Role:
    """How one parameter is trained.

    `kind` is `muon`, `decayed` (AdamW with weight decay: embedding, head, norms), `bias` (AdamW without) or `table` (an
    Engram table: Adam at a higher rate without decay, see `table_adam.py`).
    For Muon, `row_splits` gives the rows of each independent matrix of a 2-D parameter, top to bottom; a 3-D
    parameter is a stack of matrices along its first axis and has no splits.
    """

    kind: Kind
    row_splits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Assigned:
    """A parameter with its name and role."""

    name: str
    parameter: nn.Parameter
    role: Role


def role_of(name: str, shape: tuple[int, ...], cfg: ModelConfig) -> Role:
    """The role of the parameter called `name` (official checkpoint names, experts stacked as [E, rows,
    columns]).
    """
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf in ("embed", "head") or len(shape) < 2 and leaf.endswith("norm"):
        return Role("decayed")
    if len(shape) < 2 or leaf == "ape":
        return Role("bias")
    if len(shape) == 3:
        return Role("muon")
    rows = shape[0]
    if ".engram." in name:
        if leaf == "proj":  # a key projection per stream, and the value's
            return Role("muon", (cfg.hidden_size,) * (cfg.hc_mult + 1))
        return Role("table" if leaf == "table" else "bias")
    if leaf in ("hc_attn_fn", "hc_ffn_fn"):
        n = cfg.hc_mult
        return Role("muon", (1, 1, n) if cfg.residual == "hc" else (n, n, n * n))
    if leaf == "wo_a":
        return Role("muon", (rows // cfg.o_groups,) * cfg.o_groups)
    if leaf in ("wkv", "wgate") and ".compressor." in name and is_overlapping(name, cfg):
        return Role("muon", (rows // 2, rows // 2))
    return Role("muon", (rows,))


def is_overlapping(name: str, cfg: ModelConfig) -> bool:
    """Whether the compressor that owns parameter `name` is the overlapping kind (its weights hold two
    halves).
    """
    if ".indexer." in name:
        return True
    part, index = name.split(".")[:2]
    specs = cfg.layers if part == "layers" else cfg.mtp_layers
    return specs[int(index)].overlap


def assign(model: nn.Module, cfg: ModelConfig, *, matrix_optimizer: str = "muon") -> list[Assigned]:
    """Every trainable parameter of `model` exactly once, in the model's own order.

    With `matrix_optimizer` "adamw" there is nothing for Muon: its matrices go to AdamW with weight decay.
    """

    def role(name: str, parameter: nn.Parameter) -> Role:
        found = role_of(name, tuple(parameter.shape), cfg)
        return Role("decayed") if found.kind == "muon" and matrix_optimizer == "adamw" else found

    return [Assigned(n, p, role(n, p)) for n, p in model.named_parameters() if p.requires_grad]


def blocks(tensor: Tensor, role: Role) -> list[Tensor]:
    """The independent matrices of a Muon parameter as views, each [B, rows, columns] (B > 1 for stacked
    experts).
    """
    if tensor.dim() == 3:
        return [tensor]
    return [block.unsqueeze(0) for block in tensor.split(list(role.row_splits))]


def matrices(shape: tuple[int, ...], role: Role) -> list[tuple[int, int, int, int]]:
    """What `blocks` cuts, as places in the flattened parameter: (first element, matrices, rows, columns) of each."""
    if len(shape) == 3:
        return [(0, *shape)]
    starts = [sum(role.row_splits[:i]) * shape[1] for i in range(len(role.row_splits))]
    return [(start, 1, rows, shape[1]) for start, rows in zip(starts, role.row_splits, strict=True)]


def clip(start: int, stop: int, ranges: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """What of `start` to `stop` lies in `ranges` (None: everything)."""
    if ranges is None:
        return [(start, stop)]
    return [(max(start, a), min(stop, b)) for a, b in ranges if max(start, a) < min(stop, b)]


def check_saved(what: str, assigned: Assigned, saved: Tensor | None) -> None:
    """Raises: CheckpointError unless `saved`, optimizer state named by `what`, has its parameter's shape."""
    if saved is None or saved.shape != assigned.parameter.shape:
        raise misfit(what, assigned, None if saved is None else tuple(saved.shape))


def misfit(what: str, assigned: Assigned, found: tuple[int, ...] | None) -> CheckpointError:
    """The error for optimizer state that is another model's."""
    held = "nothing" if found is None else f"shape {found}"
    return CheckpointError(
        f"The optimizer state holds {held} for {assigned.name} {tuple(assigned.parameter.shape)}. {what} of another "
        "model cannot be used. Resume with the config that wrote the checkpoint."
    )
