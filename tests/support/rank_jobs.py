"""What ranks do in the tests of meshes and launching; a module of its own so that spawned ranks can import it."""

import os
import signal
import time

import torch
import torch.distributed as dist

from rorqual.errors import ConfigError
from rorqual.parallel.launch import joined
from rorqual.parallel.mesh import Mesh, gather_objects, sum_over


def groups_of(sizes: dict[str, int]) -> list[dict[str, list[int]]]:
    """The members of every group of every rank, by rank, and a sum over the world."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        mesh = Mesh.build(torch.device("cpu"), **sizes)
        assert sum_over(mesh.world_group, [1.0, float(mesh.rank)]).tolist() == [4.0, 6.0]
        groups = {
            "cp": mesh.cp_group,
            "pp": mesh.pp_group,
            "data": mesh.data_group,
            "ep": mesh.ep_group,
            "expert_data": mesh.expert_data_group,
        }
        members = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
        return gather_objects(members, mesh)


def fail(how: str) -> None:
    """Rank 1 goes wrong; rank 0 waits for it."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        if dist.get_rank() == 1 and how == "refuse":
            raise ConfigError("Rank 1 refuses. It cannot. Do something else.")
        if dist.get_rank() == 1 and how == "break":
            raise ValueError("a mistake")
        if dist.get_rank() == 1 and how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
