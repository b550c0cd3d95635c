"""Rollouts over two Ray nodes on this machine: the same as from one engine, also when a node is killed half-way."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_models import SAMPLING, flat, tiny_engine, tiny_policy, tiny_prompts, told

from rorqual.posttrain.rollouts import RolloutWorker
from rorqual.posttrain.rollouts_cluster import ClusterRollouts

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'rorqual[cluster]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray cluster of two nodes; all of it is ended afterwards."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # nodes import what tests share
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        small = {"num_cpus": 1, "object_store_memory": 80 << 20}
        own = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
        (own / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", str(own))
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        try:
            cluster.add_node(**small)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            yield tmp_path_factory.mktemp("rollouts")
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(own, ignore_errors=True)


def test_nodes_make_what_one_engine_makes_and_a_lost_one_changes_nothing(folder: Path) -> None:
    prompts = tiny_prompts(6)
    with tiny_engine() as engine:
        alone = told(flat(RolloutWorker(engine, keep_masks=True, keep_routing=True).generate(prompts, 3, SAMPLING)))
    with ClusterRollouts(
        tiny_engine, folder=folder, groups_a_node=2, keep_masks=True, keep_routing=True,
        reward=lambda prompt, one: float(prompt.data),
    ) as cluster:  # fmt: skip
        assert len(cluster.actors) == 2
        first = next(iter(cluster.actors.values()))
        pid = ray.get(first.__ray_call__.remote(lambda node: os.getpid()))
        groups = cluster.generate(prompts, 3, SAMPLING)
        made = [next(groups)]
        os.kill(pid, signal.SIGKILL)
        made += list(groups)
        assert told(flat(made)) == alone
        assert [group[0].reward for group in made] == [float(group[0].group) for group in made]
        assert sorted(group[0].group for group in made) == list(range(6))


def test_new_weights_reach_every_node(folder: Path) -> None:
    other = tiny_policy(seed=2)
    with tiny_engine(other) as engine:
        expected = {one.id: one.answer for one in flat(RolloutWorker(engine).generate(tiny_prompts(4), 2, SAMPLING))}
    with ClusterRollouts(tiny_engine, folder=folder / "weights", groups_a_node=1) as cluster:
        cluster.update_weights(other.state_dict(), 3)
        made = flat(cluster.generate(tiny_prompts(4), 2, SAMPLING))
    assert {one.id: one.answer for one in made} == expected
    assert {version for one in made for version in one.versions} == {-1, 3}
