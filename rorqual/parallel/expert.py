"""Expert parallelism on a built model: each rank keeps its slice of every stack of experts and exchanges tokens.

The slice is contiguous: rank r of R holds experts r E/R to (r + 1) E/R - 1 of the parameters `...experts.w1`, `w2` and
`w3`, so a rank's part is one range of the whole tensor, and checkpoints know it by that range.
"""

import torch
from torch import nn

from rorqual.errors import ConfigError
from rorqual.model.moe import Experts, MoE
from rorqual.parallel.exchange import ExpertExchange
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.zero import Shard


def check_experts(num_experts: int, mesh_ep: int, waves: int) -> None:
    """Raises: ConfigError when experts cannot be spread evenly over `mesh_ep` ranks, or into so many waves."""
    if num_experts % mesh_ep:
        raise ConfigError(
            f"parallel.ep = {mesh_ep} does not divide the model's {num_experts} experts, so ranks would hold different "
            f"numbers of them. Choose a divisor of {num_experts}."
        )
    if waves > num_experts // mesh_ep:
        raise ConfigError(
            f"parallel.waves = {waves}, but each rank holds {num_experts // mesh_ep} of the {num_experts} experts. "
            f"Choose at most {num_experts // mesh_ep} waves, or a smaller parallel.ep."
        )


@torch.no_grad()
def spread_experts(model: nn.Module, mesh: Mesh, *, waves: int = 1) -> dict[str, Shard]:
    """Cut every stack of experts down to this rank's and install the exchange; returns what the cut parameters are.

    Does nothing where `mesh.ep` is 1. Values of this rank's experts stay (a stack that was never written to takes no
    memory for the others). Raises: ConfigError when the experts cannot be spread evenly.
    """
    shards: dict[str, Shard] = {}
    if mesh.ep == 1:
        return shards
    assert mesh.ep_group is not None
    exchange = ExpertExchange(mesh.ep_group, waves=waves)
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.exchange = exchange
        if not isinstance(module, Experts):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            check_experts(parameter.shape[0], mesh.ep, waves)
            here = parameter.shape[0] // mesh.ep
            first = mesh.ep_rank * here
            shards[f"{name}.{leaf}"] = Shard(tuple(parameter.shape), first * parameter[0].numel())
            parameter.data = parameter.data[first : first + here].clone()
    return shards
