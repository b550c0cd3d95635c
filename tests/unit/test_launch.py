"""Meshes and launching: who is in which group, and what the caller hears when a rank fails."""

import itertools
import sys
import time

import pytest
from rank_jobs import fail, groups_of

from rorqual.errors import ConfigError, RorqualError
from rorqual.parallel.launch import launch
from rorqual.parallel.mesh import Mesh, check_sizes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")


def expected_groups(mesh: Mesh) -> dict[str, list[int]]:
    """By the definition in `Mesh`: ranks that differ in one coordinate only."""
    ranks = [Mesh(mesh.dp, mesh.cp, mesh.pp, mesh.ep, rank) for rank in range(mesh.world)]
    stage = [other for other in ranks if other.pp_rank == mesh.pp_rank]
    return {
        "cp": [o.rank for o in stage if o.dp_rank == mesh.dp_rank],
        "pp": [o.rank for o in ranks if o.data_rank == mesh.data_rank],
        "data": [o.rank for o in stage],
        "ep": [o.rank for o in stage if o.data_rank // mesh.ep == mesh.data_rank // mesh.ep],
        "expert_data": [o.rank for o in stage if o.ep_rank == mesh.ep_rank],
    }


def test_coordinates_name_every_rank_once() -> None:
    for dp, cp, pp in itertools.product((1, 2, 3), repeat=3):
        ranks = [Mesh(dp, cp, pp, 1, rank) for rank in range(dp * cp * pp)]
        places = {(m.pp_rank, m.dp_rank, m.cp_rank) for m in ranks}
        assert places == set(itertools.product(range(pp), range(dp), range(cp)))
        assert all(m.rank == (m.pp_rank * dp + m.dp_rank) * cp + m.cp_rank for m in ranks)
    assert Mesh.alone().is_alone and Mesh.alone().is_main and Mesh.alone().data_group is None


@pytest.mark.slow
def test_groups_are_those_of_the_coordinates() -> None:
    sizes = {"dp": 2, "cp": 1, "pp": 2, "ep": 2}
    found = launch(groups_of, (sizes,), 4)
    for rank, groups in enumerate(found):
        assert groups == expected_groups(Mesh(**sizes, rank=rank)), f"rank {rank}"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("refuse", ConfigError, r"^Rank 1 refuses. It cannot. Do something else.$"),
        pytest.param(
            *("break", RorqualError, r"Training process 1 of 2 failed: ValueError: a mistake.*--resume"),
            marks=pytest.mark.slow,
        ),
        ("die", RorqualError, r"Training process 1 of 2 was killed by signal 9.*--resume"),
    ],
)
def test_a_failing_rank_ends_all_and_is_named(how: str, kind: type[Exception], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(kind, match=message):
        launch(fail, (how,), 2)
    assert time.monotonic() - began < 50, "rank 0 was waited for"


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (
            4,
            {"dp": 0, "cp": 3, "pp": 1, "ep": 1},
            "4 processes, which parallel.cp = 3 and parallel.pp = 1 do not divide",
        ),
        (4, {"dp": 3, "cp": 1, "pp": 1, "ep": 1}, "makes 3 processes, but the run has 4.*parallel.dp to 4, or to 0"),
        (4, {"dp": 0, "cp": 1, "pp": 2, "ep": 4}, "parallel.ep = 4 does not divide the 2 data ranks of a stage"),
    ],
)
def test_sizes_that_do_not_multiply_up_are_refused(world: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(world, **sizes)
    assert check_sizes(8, dp=0, cp=2, pp=2, ep=4) == 2
