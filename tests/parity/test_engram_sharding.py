"""Engram tables spread over 2 and 4 processes: forward, gradients and updates are those of one process, bit for bit."""

import pytest
import torch
from engram_cases import ranks, single
from ranks import run_ranks

CASES = [  # placement, sparse gradients, announced step
    ("device", False, False),
    ("device", True, True),
    ("host", False, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_spread_tables_equal_one_process(world: int) -> None:
    found = run_ranks(ranks, world, CASES)
    for index, case in enumerate(CASES):
        expected = single(world, *case)
        for memory, whole in enumerate(expected["gradients"]):
            assert (whole != 0).any()
            parts = torch.cat([found[rank][index]["gradients"][memory] for rank in range(world)])
            assert torch.equal(parts, whole), f"{case}: gradient of memory {memory}"
        for rank in range(world):
            mine = found[rank][index]
            assert torch.equal(mine["streams"], expected["outputs"][rank]), f"{case}, rank {rank}"
            for ours, theirs in zip(mine["tables"], expected["tables"], strict=True):
                assert torch.equal(ours, theirs), f"{case}, rank {rank}: table after a step"
            assert mine["gap"] < 1e-5
