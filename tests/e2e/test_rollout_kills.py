"""The log's drill: the sampler is killed with SIGKILL at any token, and what comes out is what would have come out."""

import random
import signal
from pathlib import Path

import pytest
from rollout_models import SAMPLING, flat, tiny_engine, tiny_prompts, told
from rollout_process import Kill, run_until_whole

from rorqual.posttrain.rollouts import RolloutWorker

pytestmark = pytest.mark.slow  # ten processes

KEEP = {"keep_masks": True, "keep_routing": True}
FILTERED = SAMPLING.replace(temperature=0.9, top_p=0.95)


@pytest.mark.parametrize(("sampling", "keep"), [(SAMPLING, {}), (FILTERED, KEEP)], ids=["plain", "masks and routing"])
def test_every_rollout_survives_kills_to_the_last_bit(tmp_path: Path, sampling: object, keep: dict[str, bool]) -> None:
    """Ids, log probabilities, masks and experts; and no token that was durable is drawn again."""
    with tiny_engine(max_running=3) as engine:
        whole = told(flat(RolloutWorker(engine, **keep).generate(tiny_prompts(3), 3, sampling)))  # type: ignore[arg-type]
        total = engine.stats().sampled_tokens
    draw = random.Random(str(keep))
    lasts = ("durable", "written", "unwritten", "durable")
    kills = [Kill(draw.randrange(2, total // 5), last) for last in lasts]  # too few for any process to reach the end
    lives = run_until_whole(tmp_path, sampling, kills, keep)  # type: ignore[arg-type]
    assert lives.codes == [-signal.SIGKILL] * 4 + [0]
    assert lives.made == whole
    for kill, before, after in zip(kills, lives.found, lives.found[1:], strict=False):
        assert before <= after <= before + kill.after
        if kill.last == "durable":
            assert after == before + kill.after, "what was durable is gone, or was drawn again"
    assert lives.sampled == total - lives.found[-1]
