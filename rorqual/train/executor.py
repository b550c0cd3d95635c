"""One optimizer step over all ranks: rows shared out, gradients summed, weights updated, everybody equal again.

Every rank reads the same rows and takes its own part. Losses are sums over positions divided by counts of the whole
step, so gradients are summed over ranks, never averaged, and the step is that of one process up to the order of
additions. Source: V4 report, training infrastructure; what is exchanged when stands in `parallel/`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.model import Transformer
from rorqual.model.engram import memories
from rorqual.ops.newton_schulz import FIVE_STEP, HYBRID
from rorqual.parallel.mesh import Mesh, gather_objects, sum_over
from rorqual.parallel.pipeline import Pipeline
from rorqual.parallel.stages import copies
from rorqual.parallel.zero import Owners, Range, Shard, merged
from rorqual.train import groups, losses
from rorqual.train.adamw import AdamW
from rorqual.train.anticipatory import route_only
from rorqual.train.config import TrainConfig
from rorqual.train.feed import Rows
from rorqual.train.groups import Assigned
from rorqual.train.microbatch import Numerics, accumulate, precision
from rorqual.train.monitors import norms_by_family
from rorqual.train.muon import Muon
from rorqual.train.pieces import Piece, Tensors, joined, whole
from rorqual.train.table_adam import TableAdam, gradient_values

SMALLEST_CUT = 1 << 12
"""AdamW's tensors below this many elements have one owner; larger ones are cut into a range for each rank."""

Experts = Mapping[str, Tensor]
"""Expert ids of one micro-batch by router, [B, S, A] (see `Trace.forced`)."""


class Executor:
    """A model's optimizers and its steps, on one rank or several.

    `shards` says which parameters are spread over ranks (`parallel/expert.py`, `parallel/engram.py`); all others are
    the same on all data ranks of a stage.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: ModelConfig,
        config: TrainConfig,
        mesh: Mesh,
        numerics: Numerics,
        shards: Mapping[str, Shard],
    ) -> None:
        self.model, self.mesh, self.numerics, self.shards = model, mesh, numerics, dict(shards)
        self.grad_clip = config.optim.grad_clip
        self.adam_lr_scale = config.optim.adam_lr_scale
        self.is_zero = config.parallel.zero and not mesh.is_alone
        o = config.optim
        self.assigned = groups.assign(model, cfg, matrix_optimizer=o.matrix_optimizer)
        tables = [a for a in self.assigned if a.role.kind == "table"]  # their gradients come summed over ranks
        self.copies = copies(model)
        copied = [a for a in self.assigned if a.name in self.copies]
        shared = [a for a in self.assigned if a.name not in self.shards and a not in tables and a not in copied]
        spread = [a for a in self.assigned if a.name in self.shards and a not in tables]
        self.owners = [_owners(shared, mesh.data_group, mesh.data)]
        if spread:
            self.owners.append(_owners(spread, mesh.expert_data_group, mesh.data // mesh.ep))
        self.num_counted = len(self.owners)  # those behind are another stage's too, which counts and writes them
        if copied:
            self.owners.append(_owners(copied, mesh.data_group, mesh.data))
        self.pipeline: Pipeline | None = None
        if mesh.pp > 1:
            self.pipeline = Pipeline(model, mesh, model.reference.device)
        self.owned: dict[str, list[tuple[int, int]]] = {}
        for owners in self.owners:
            for r in merged(owners.owned):
                self.owned.setdefault(r.name, []).append((r.start, r.stop))
        self.owned |= {a.name: [(0, a.parameter.numel())] for a in tables}
        limit = self.owned if self.is_zero else None
        self.muon = Muon(
            [a for a in self.assigned if a.role.kind == "muon"],
            momentum=o.muon_momentum,
            weight_decay=o.weight_decay,
            update_rms=o.muon_update_rms,
            steps=HYBRID if o.muon_steps == "hybrid" else FIVE_STEP,
            compute_dtype={"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[o.muon_dtype],
            owned=limit,
        )
        self.adamw = AdamW(
            [a for a in self.assigned if a.role.kind not in ("muon", "table")],
            betas=o.adam_betas,
            eps=o.adam_eps,
            bias_eps=o.adam_bias_eps,
            weight_decay=o.weight_decay,
            owned=limit,
        )
        self.measured: dict[str, Any] = {}
        """Norms of the last update that was asked to measure."""
        self.tables = TableAdam(tables, betas=o.adam_betas, eps=o.adam_eps, lr_scale=o.engram_lr_scale)
        for memory in memories(model):
            memory.is_sparse = memory.hash.num_rows > o.engram_sparse_above

    @property
    def is_lockstep(self) -> bool:
        """Whether no rank can forward alone, because ranks exchange tokens or rows of tables, or hold only some of the
        layers.
        """
        return self.mesh.ep > 1 or self.mesh.pp > 1 or any(memory.is_spread for memory in memories(self.model))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model. All ranks must ask."""
        names = [name for name, _ in self.model.named_parameters() if name not in self.copies]
        here = sum(math.prod(self._place(name)[0]) for name in names)
        return here if self.mesh.pp == 1 else int(sum_over(self.mesh.pp_group, [float(here)]).item())

    # ------------------------------------------------------------------ gradients

    def forward_backward(
        self,
        rows: Rows,
        rows_at_once: int,
        step: losses.LossWeights,
        *,
        dense: bool,
        experts: Sequence[Experts] | None = None,
    ) -> list[losses.LossParts]:
        """Gradients of this rank's share of the step's `rows`, `rows_at_once` at a time; the parts of all ranks.

        `step` has the weights and denominators of the whole step; the shares of each micro-batch are filled in here.
        Earlier gradients are dropped. Parts come by rank, one from each of several ranks and one from each micro-batch
        of a rank that is alone. `experts` are the ids that `route` noted for the same rows; without, routing is live.
        """
        batches, num_idle = self._share_of(rows, rows_at_once)
        queries = max(losses.num_index_queries(rows), 1)
        weights = []
        for index, batch in enumerate(batches):
            is_idle = index >= len(batches) - num_idle
            share = 0.0 if is_idle else batch.tokens.shape[0] / rows.tokens.shape[0]
            index_share = 0.0 if is_idle else losses.num_index_queries(batch) / queries
            watch = step.watch and index == 0  # one micro-batch shows enough
            weights.append(dataclasses.replace(step, row_share=share, index_share=index_share, watch=watch))
        if experts is not None:
            batches = [dataclasses.replace(b, experts=ids) for b, ids in zip(batches, experts, strict=True)]
        self.model.zero_grad(set_to_none=True)
        parts = accumulate(self.model, batches, weights, dense=dense, numerics=self.numerics, pipeline=self.pipeline)
        parts = parts[: len(parts) - num_idle]
        if self.mesh.is_alone:
            return parts
        every = gather_objects(_merge(parts) if parts else None, self.mesh)
        return [part for part in every if part is not None]

    def route(self, rows: Rows, rows_at_once: int, *, dense: bool) -> list[Experts]:
        """The experts that this rank's micro-batches of `rows` would use now; nothing is trained."""
        device = next(self.model.parameters()).device
        batches, _ = self._share_of(rows, rows_at_once)
        with precision(self.model, self.numerics.dtype):
            return [route_only(self.model, batch.to(device), dense=dense, pipeline=self.pipeline) for batch in batches]

    def _share_of(self, rows: Rows, rows_at_once: int) -> tuple[list[Rows], int]:
        """This rank's micro-batches, and how many at the end are idle ones."""
        count, dp = rows.tokens.shape[0], self.mesh.dp
        bounds = [count * r // dp for r in range(dp + 1)]
        begin, end = bounds[self.mesh.dp_rank], bounds[self.mesh.dp_rank + 1]
        most = max(bounds[r + 1] - bounds[r] for r in range(dp))
        if self.pipeline is not None:
            rows_at_once = -(-most // max(-(-most // rows_at_once), min(self.mesh.pp, most)))
        batches = [rows.part(i, min(i + rows_at_once, end)) for i in range(begin, end, rows_at_once)]
        num_idle = 0
        if self.is_lockstep:
            num_idle = -(-most // rows_at_once) - len(batches)
        if self.pipeline is not None:  # one shape for all
            batches += [rows.part(0, 0)] * num_idle
            return [batch.filled(rows_at_once) for batch in batches], num_idle
        return batches + [_idle_like(rows)] * num_idle, num_idle

    # ------------------------------------------------------------------ update

    @torch.no_grad()
    def update(self, lr: float, *, only: Callable[[str], bool] | None = None, measure: bool = False) -> float:
        """Sum gradients over ranks, clip, and step all optimizers; returns the gradient norm of the whole model.

        A norm that is not finite leaves the weights as they are, on every rank. `only` says by name which parameters
        move (all); others keep their weights and their optimizer state. With `measure`, `measured` has norms then.
        """
        for owners in self.owners:
            owners.reduce()
        counted, copied = self.owners[: self.num_counted], self.owners[self.num_counted :]
        gradients = [g for owners in counted for g in owners.owned_gradients()] + self.tables.gradients()
        norm = self._norm(gradients)
        gradients += [g for owners in copied for g in owners.owned_gradients()]
        self.measured = self._measure() if measure else {}
        if not math.isfinite(norm):
            return norm
        factor = torch.tensor(self.grad_clip / (norm + 1e-6)).clamp_(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        if not self.is_zero:
            for owners in self.owners:
                owners.share(gradients=True)
        squares = self.muon.step(lr, only=only, measure=measure)
        self.adamw.step(lr * self.adam_lr_scale, only=only)
        if only is None:
            self.tables.step(lr * self.adam_lr_scale)
        if self.is_zero:
            for owners in self.owners:
                owners.share()
        if measure:
            total, count = sum_over(self.mesh.world_group, squares).tolist()
            self.measured["muon_update_rms"] = math.sqrt(total / count) if count else None
        return norm

    def _measure(self) -> dict[str, Any]:
        """Norms of gradients (before clipping) and weights by family of parameters."""
        return {
            "grad_norms": norms_by_family(self._owned_parts(gradients=True), self.mesh),
            "weight_norms": norms_by_family(self._owned_parts(gradients=False), self.mesh),
        }

    def _owned_parts(self, *, gradients: bool) -> Iterator[tuple[str, Tensor]]:
        """What this rank owns of the weights, or of the gradients, by name of the parameter."""
        for a in self.assigned:
            tensor = gradient_values(a.parameter) if gradients else a.parameter.detach()
            if tensor is None or (a.role.kind == "table" and not gradients):  # reading a table would take its time
                continue
            if a.name in self.copies:  # another stage's
                continue
            if tensor.numel() != a.parameter.numel():  # the rows of a sparse gradient
                yield a.name, tensor
                continue
            for start, stop in self.owned.get(a.name, ()):
                is_whole = stop - start == tensor.numel()
                yield a.name, tensor if is_whole else tensor.reshape(-1)[start:stop]

    def _norm(self, gradients: list[Tensor]) -> float:
        """Every element of the model counts once: ranks give the squares of what they own."""
        own = torch.nn.utils.get_total_norm(gradients, foreach=True).item() if gradients else 0.0
        if self.mesh.is_alone:
            return own
        return math.sqrt(sum_over(self.mesh.world_group, [own * own]).item())

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags any rank has set; every rank gets the same answer."""
        if self.mesh.is_alone:
            return list(flags)
        return [count > 0 for count in sum_over(self.mesh.world_group, [float(flag) for flag in flags]).tolist()]

    # ------------------------------------------------------------------ checkpoints

    def weight_pieces(self) -> list[Piece]:
        """What this rank writes of the model: the parameters it owns, and on one data rank of a stage its buffers."""
        parameters = {a.name: a.parameter for a in self.assigned}
        pieces = []
        for name, tensor in self.model.state_dict().items():
            if name not in parameters:
                pieces += [whole(name, tensor)] if self.mesh.data_rank == 0 else []
            else:
                pieces += self._pieces(name, name, 0, tensor.detach().reshape(-1))
        return pieces

    def optimizer_pieces(self) -> list[Piece]:
        """What this rank writes of the optimizers' state."""
        pieces = [
            piece
            for name, start, values in self.muon.state_ranges()
            for piece in self._pieces(f"muon/{name}", name, start, values)
        ]
        for prefix, optimizer in (("adamw", self.adamw), ("tables", self.tables)):
            for key, start, values in optimizer.state_ranges():
                pieces += self._pieces(f"{prefix}/{key}", key.rpartition("#")[0], start, values)
        if self.tables.num_steps is not None:
            pieces.append(whole("tables/#step", self.tables.num_steps))
        steps = self.adamw.num_steps
        return joined(pieces if steps is None else [*pieces, whole("adamw/#step", steps)])

    def _pieces(self, stored: str, name: str, start: int, values: Tensor) -> Iterator[Piece]:
        """The parts of `values` (from element `start` of parameter `name`) that this rank owns, in one piece each."""
        shape, offset = self._place(name)
        owned = () if name in self.copies else self.owned.get(name, ())
        for first, last in groups.clip(start, start + values.numel(), owned):
            yield Piece(stored, shape, offset + first, values[first - start : last - start])

    def _place(self, name: str) -> tuple[tuple[int, ...], int]:
        """Shape of the whole parameter, and the element of it at which this rank's part begins."""
        if name in self.shards:
            return self.shards[name].shape, self.shards[name].start
        return tuple(self.model.get_parameter(name).shape), 0

    def load_optimizer(self, state: Tensors) -> None:
        """Take over what any number of ranks saved. Raises: CheckpointError when it is another model's."""
        steps = state.get("adamw/#step")
        self.muon.load_ranges(self._reader(state, "muon/", "Momentum", lambda key: key))
        if steps is not None:
            read = self._reader(state, "adamw/", "Moments", lambda key: key.rpartition("#")[0])
            self.adamw.load_ranges(read, steps)
        steps = state.get("tables/#step")
        if steps is not None:
            read = self._reader(state, "tables/", "Moments", lambda key: key.rpartition("#")[0])
            self.tables.load_ranges(read, steps)

    def _reader(
        self, state: Tensors, prefix: str, what: str, name_of: Callable[[str], str]
    ) -> Callable[[str, int, int], Tensor]:
        assigned = {a.name: a for a in self.assigned}

        def read(key: str, start: int, stop: int) -> Tensor:
            name = name_of(key)
            shape, offset = self._place(name)
            found = state.shape(prefix + key)
            if found != shape:
                raise groups.misfit(what, assigned[name], found)
            return state.read(prefix + key, offset + start, offset + stop)

        return read


def load_weights(model: Transformer, weights: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> None:
    """Fill a model (or this rank's part of one) from whole tensors by name.

    Raises: CheckpointError when names or shapes do not fit.
    """
    own = model.state_dict()

    def part_of(name: str) -> Tensor:
        shard = shards.get(name)
        shape = weights.shape(name) if isinstance(weights, Tensors) else tuple(weights[name].shape)
        if shard is None or shape != shard.shape:
            return weights[name]
        start, stop = shard.start, shard.start + own[name].numel()
        if isinstance(weights, Tensors):  # no more than this rank's part is read
            return weights.read(name, start, stop).view(own[name].shape)
        return weights[name].reshape(-1)[start:stop].view(own[name].shape)

    part = {name: part_of(name) for name in weights if name not in model.elsewhere}
    try:
        model.load_state_dict(part, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint does not fit this architecture: {error}. Resume with the config that wrote it."
        ) from error


def _owners(assigned: Sequence[Assigned], group: torch.distributed.ProcessGroup | None, ranks: int) -> Owners:
    """Ranges to be owned: every matrix of Muon's; AdamW's tensors as a range for each rank, small ones whole."""
    ranges = []
    for a in assigned:
        numel = a.parameter.numel()
        if a.role.kind == "muon":
            for first, count, n, m in groups.matrices(tuple(a.parameter.shape), a.role):
                starts = [first + i * n * m for i in range(count)]
                ranges += [Range(a.name, start, start + n * m, 4 * n * m) for start in starts]
        else:
            cuts = ranks if numel >= SMALLEST_CUT else 1
            bounds = [numel * i // cuts for i in range(cuts + 1)]
            ranges += [Range(a.name, i, j, 8 * (j - i)) for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
    return Owners({a.name: a.parameter for a in assigned}, ranges, group)


def _idle_like(rows: Rows) -> Rows:
    """One row of which nothing is learned, for a rank that has none left while others still exchange tokens."""
    first = rows.part(0, 1)
    return dataclasses.replace(first, labels=torch.full_like(first.labels, losses.IGNORE))


def _merge(parts: Sequence[losses.LossParts]) -> losses.LossParts:
    """Several micro-batches as one."""
    names = [field.name for field in dataclasses.fields(losses.LossParts)]
    return losses.LossParts(**{name: _added([getattr(part, name) for part in parts]) for name in names})


def _added(values: Sequence[Any]) -> Any:
    """Numbers added, lists joined, dictionaries by key: lists of numbers added, (sum, count, largest) merged."""
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _by_place([value[key] for value in values if key in value]) for key in keys}
    if isinstance(first, list):
        return [item for value in values for item in value]
    return sum(values)


def _by_place(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        sums, counts, largest = zip(*values, strict=True)
        return sum(sums), sum(counts), max(largest)
    return [sum(column) for column in zip(*values, strict=True)]
