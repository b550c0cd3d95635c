"""Who works with whom: the ranks of a run arranged as pipeline stages x data replicas x context parts.

    rank = (pp_rank * dp + dp_rank) * cp + cp_rank        (context parts are neighbours, stages are farthest apart)

The (dp, cp) ranks of one stage, flattened, are its data ranks: every one of them computes gradients for that stage's
shared weights. Runs of `ep` consecutive data ranks form an expert group, which holds every expert of the stage once;
data rank i has the experts of place i modulo ep.

Groups come from torch's DeviceMesh. Losses are sums divided by counts of the whole step, so gradients are summed over
groups, never averaged.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rorqual.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This process's place among all of them. `Mesh.alone()` for one process, `Mesh.build` for several.

    A process that is alone has no groups (they are None); otherwise every group exists, be it of one rank.
    """

    dp: int = 1
    """Data replicas: each takes its own rows of a step."""
    cp: int = 1
    """Parts that one sequence is cut into."""
    pp: int = 1
    """Pipeline stages."""
    ep: int = 1
    """Ranks over which the experts of a stage are spread."""
    rank: int = 0
    world_group: dist.ProcessGroup | None = None
    cp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    """All (dp, cp) ranks of this stage: gradients of shared weights are summed over it."""
    ep_group: dist.ProcessGroup | None = None
    """Ranks that together hold all experts of this stage."""
    expert_data_group: dist.ProcessGroup | None = None
    """Ranks of this stage with the same experts as this one: their gradients are summed over it."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.cp * self.pp

    @property
    def is_alone(self) -> bool:
        """Whether this process is the only one."""
        return self.world == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what a run leaves but for the other ranks' checkpoint files."""
        return self.rank == 0

    @property
    def data(self) -> int:
        """Data ranks of a stage: dp * cp."""
        return self.dp * self.cp

    @property
    def data_rank(self) -> int:
        """Place among the data ranks of this stage."""
        return self.rank % self.data

    @property
    def dp_rank(self) -> int:
        """Which replica this is."""
        return self.data_rank // self.cp

    @property
    def cp_rank(self) -> int:
        """Which part of each sequence this rank has; 0 is the beginning."""
        return self.rank % self.cp

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage this is; 0 holds the embedding."""
        return self.rank // self.data

    @property
    def ep_rank(self) -> int:
        """Which slice of the experts this rank holds."""
        return self.data_rank % self.ep

    @classmethod
    def alone(cls) -> "Mesh":
        """One process, no groups."""
        return cls()

    @classmethod
    def build(cls, device: torch.device, *, dp: int = 0, cp: int = 1, pp: int = 1, ep: int = 1) -> "Mesh":
        """The mesh of this process in the initialised process group; every rank must call it with the same sizes.

        `dp` 0 means what the others leave. Raises: ConfigError when the sizes do not multiply up to the world's.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        dp = check_sizes(world, dp=dp, cp=cp, pp=pp, ep=ep)
        stages = init_device_mesh(device.type, (pp, dp, cp), mesh_dim_names=("pp", "dp", "cp"))
        data = init_device_mesh(device.type, (pp, dp * cp), mesh_dim_names=("pp", "data"))
        experts = init_device_mesh(device.type, (pp, dp * cp // ep, ep), mesh_dim_names=("pp", "expert_data", "ep"))
        return cls(
            dp, cp, pp, ep, rank, dist.group.WORLD,
            cp_group=stages.get_group("cp"),
            pp_group=stages.get_group("pp"),
            data_group=data.get_group("data"),
            ep_group=experts.get_group("ep"),
            expert_data_group=experts.get_group("expert_data"),
        )  # fmt: skip

    def describe(self) -> dict[str, int]:
        """The sizes, for `env.json`."""
        return {"world": self.world, "dp": self.dp, "cp": self.cp, "pp": self.pp, "ep": self.ep}


def check_sizes(world: int, *, dp: int, cp: int, pp: int, ep: int) -> int:
    """The number of data replicas that makes `world` processes. Raises: ConfigError when there is none."""
    sizes = f"parallel.cp = {cp} and parallel.pp = {pp}"
    if world % (cp * pp):
        raise ConfigError(
            f"The run has {world} processes, which {sizes} do not divide: every replica needs {cp * pp} of them. "
            f"Start a multiple of {cp * pp} processes (--nproc), or change [parallel]."
        )
    left = world // (cp * pp)
    if dp not in (0, left):
        raise ConfigError(
            f"parallel.dp = {dp} with {sizes} makes {dp * cp * pp} processes, but the run has {world}. "
            f"Set parallel.dp to {left}, or to 0 for what is left, or start {dp * cp * pp} processes (--nproc)."
        )
    if (left * cp) % ep:
        raise ConfigError(
            f"parallel.ep = {ep} does not divide the {left * cp} data ranks of a stage (dp {left} x cp {cp}), so the "
            "experts cannot be spread evenly over them. Choose a divisor of that number."
        )
    return left


def gather_objects(value: T, mesh: Mesh) -> list[T]:
    """`value` of every rank, by rank; a plain list of one when alone."""
    if mesh.is_alone:
        return [value]
    values: list[Any] = [None] * mesh.world
    dist.all_gather_object(values, value, group=mesh.world_group)
    return values


def sum_over(group: dist.ProcessGroup | None, values: Sequence[float] | Tensor) -> Tensor:
    """Sums over a group, in float64 and in rank order, so that every rank has the same bits.

    Shapes: values [N] -> float64 [N] on the CPU. Meant for a few figures; None is the group of this process alone.
    """
    own = torch.as_tensor(values, dtype=torch.float64).cpu()
    if group is None or dist.get_world_size(group) == 1:
        return own
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    total = every[0].clone()
    for other in every[1:]:
        total += other
    return total


def environment_world() -> int:
    """Processes of the launch that this one is part of (torchrun's environment); 1 outside of any."""
    return int(os.environ.get("WORLD_SIZE", "1"))
