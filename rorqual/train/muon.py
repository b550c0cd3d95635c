"""Muon as V4 uses it: momentum, then the nearest isometry of the look-ahead gradient, scaled to an
AdamW-sized step.

For every matrix W [n, m] with gradient G and momentum M (zero at first):

    M <- mu M + G
    O <- newton_schulz(mu M + G) * sqrt(max(n, m)) * gamma
    W <- W (1 - lr decay) - lr O

An isometry has root-mean-square 1 / sqrt(max(n, m)), so every update has rms gamma = 0.18, about what AdamW
makes, and AdamW's learning rates and decay carry over. Source: V4 report, Algorithm 1. Left out: sharding
(`parallel/`).

Matrices of one shape share one momentum tensor [B, n, m] whatever layer they come from, so Newton–Schulz runs
as a few batched products instead of hundreds of small ones. Saved state is by parameter name and does not
depend on batching.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.ops.newton_schulz import HYBRID, Coefficients, newton_schulz
from rorqual.train.groups import Assigned, blocks

CHUNK_BYTES = 1 << 20
"""Newton–Schulz on a CPU takes this many bytes of matrices at a time, so that the iteration stays in a core's
cache.
"""


class _Bucket:
    """All matrices of one shape: views of their parameters and one stacked momentum [B, n, m]."""

    def __init__(self, owners: list[tuple[Assigned, int, Tensor]]) -> None:
        self.owners = owners  # (parameter, index of the block in it, view of the weight [b, n, m])
        first = owners[0][2]
        self.sizes = [weight.shape[0] for _, _, weight in owners]
        self.momentum = torch.zeros(sum(self.sizes), *first.shape[1:], dtype=torch.float32, device=first.device)

    def gradients(self) -> Tensor:
        """The gradients stacked as the momentum is, in float32; a parameter without one counts as zero."""
        parts = []
        for assigned, index, weight in self.owners:
            gradient = assigned.parameter.grad
            if gradient is None:
                parts.append(torch.zeros_like(weight, dtype=torch.float32))
            else:
                parts.append(blocks(gradient, assigned.role)[index].float())
        return torch.cat(parts)


class Muon:
    """The optimizer for matrices. `step(lr)` takes the learning rate; schedules live in `schedules.py`."""

    def __init__(
        self,
        parameters: Sequence[Assigned],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        nesterov: bool = True,
        steps: tuple[Coefficients, ...] = HYBRID,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.mu = momentum
        self.weight_decay = weight_decay
        self.update_rms = update_rms
        self.nesterov = nesterov
        self.steps = steps
        self.compute_dtype = compute_dtype
        grouped: dict[tuple[object, ...], list[tuple[Assigned, int, Tensor]]] = {}
        for assigned in self.parameters:
            for index, weight in enumerate(blocks(assigned.parameter.detach(), assigned.role)):
                key = (*weight.shape[1:], weight.device, weight.dtype)
                grouped.setdefault(key, []).append((assigned, index, weight))
        self._buckets = [_Bucket(owners) for owners in grouped.values()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update from the gradients now on the parameters; decay is scaled by `lr` too."""
        for bucket in self._buckets:
            gradients = bucket.gradients()
            bucket.momentum.mul_(self.mu).add_(gradients)
            direction = gradients.add_(bucket.momentum, alpha=self.mu) if self.nesterov else bucket.momentum
            updates = self._orthogonalise(direction)
            n, m = updates.shape[-2:]
            scale = -lr * self.update_rms * math.sqrt(max(n, m))
            for (_, _, weight), update in zip(bucket.owners, updates.split(bucket.sizes), strict=True):
                weight.mul_(1.0 - lr * self.weight_decay).add_(update, alpha=scale)

    def _orthogonalise(self, matrices: Tensor) -> Tensor:
        if matrices.is_cuda:
            return newton_schulz(matrices, self.steps, dtype=self.compute_dtype)
        per_chunk = max(1, CHUNK_BYTES // (4 * matrices.shape[1] * matrices.shape[2]))
        chunks = [newton_schulz(c, self.steps, dtype=self.compute_dtype) for c in matrices.split(per_chunk)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Momentum by parameter name, each in its parameter's shape (float32 copies)."""
        state = {a.name: torch.empty(a.parameter.shape, dtype=torch.float32) for a in self.parameters}
        for bucket in self._buckets:
            pieces = bucket.momentum.split(bucket.sizes)
            for (assigned, index, _), piece in zip(bucket.owners, pieces, strict=True):
                blocks(state[assigned.name], assigned.role)[index].copy_(piece)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over momentum saved by `state_dict`.

        Raises: CheckpointError when a parameter is missing or has another shape.
        """
        for assigned in self.parameters:
            saved = state.get(assigned.name)
            if saved is None or saved.shape != assigned.parameter.shape:
                found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise CheckpointError(
                    f"The optimizer state holds {found} for {assigned.name} "
                    f"{tuple(assigned.parameter.shape)}. "
                    "Momentum of another model cannot be used. Resume with the config that wrote the "
                    "checkpoint."
                )
        for bucket in self._buckets:
            pieces = bucket.momentum.split(bucket.sizes)
            for (assigned, index, _), piece in zip(bucket.owners, pieces, strict=True):
                piece.copy_(blocks(state[assigned.name], assigned.role)[index])
