"""Cross-entropy of an output head, with its gradients formed in the same pass, never holding all logits.

Logits are the largest tensor of a training step: rows x vocabulary. Here only a chunk of them exists at a time.
R rows, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import fused, usable_typed

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_weight: float) -> Parts:
    """Loss [R] and log of the softmax's denominator [R] of every row, and the gradients of
    sum(loss + z_weight log_norm^2): of hidden [R, D] and of weight [V, D], all fp32.

    Shapes: hidden [R, D] and weight [V, D] of one dtype, in which the three matrix products are done; labels int64 [R].
    Sums and softmax are fp32. `chunk` rows of logits exist at a time.
    """
    rows = hidden.shape[0]
    loss, log_norm = torch.empty(rows, device=hidden.device), torch.empty(rows, device=hidden.device)
    dhidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
    for lo in range(0, rows, chunk):
        hi = min(lo + chunk, rows)
        part, index = hidden[lo:hi], labels[lo:hi].unsqueeze(1)
        logits = (part @ weight.T).float()
        norm = torch.logsumexp(logits, dim=1, keepdim=True)
        log_norm[lo:hi] = norm.squeeze(1)
        loss[lo:hi] = (norm - logits.gather(1, index)).squeeze(1)
        logits.sub_(norm).exp_()
        if z_weight:  # the gradient of z^2 is 2 z softmax
            logits.mul_(1 + 2 * z_weight * norm)
        logits.scatter_add_(1, index, torch.full_like(norm, -1.0))
        gradient = logits.to(hidden.dtype)
        dhidden[lo:hi] = gradient @ weight
        dweight += gradient.T @ part
    return loss, log_norm, dhidden, dweight


def _native(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_weight: float) -> Parts:
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return cross_entropy_reference(hidden, weight, labels, chunk, z_weight)
    return fused.cross_entropy(hidden, weight, labels, z_weight)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_weight: float = 0.0) -> Parts:
    """`cross_entropy_reference`, by the fastest implementation at hand."""
    return registry.pick("cross_entropy", hidden)(hidden, weight, labels, chunk, z_weight)


registry.register("cross_entropy", "reference", cross_entropy_reference)
registry.register("cross_entropy", "native", _native, usable_typed)
