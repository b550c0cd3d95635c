"""Rollouts in processes of their own, which kill themselves (SIGKILL) after a chosen number of tokens.

Processes are forked from a server that has everything imported, so that a kill costs milliseconds.
"""

import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

from rollout_models import flat, tiny_engine, tiny_policy, tiny_prompts, told

from rorqual.engine import SamplingParams
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import RolloutWorker

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rollout_process"])


class Doomed(RolloutWorker):
    """Dies once it has taken `left` tokens; before or after the last of them is in the log, by turns."""

    left: int | None = None

    def _keep(self, run: Any, event: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and self.left % 2:
                os.kill(os.getpid(), signal.SIGKILL)
        super()._keep(run, event)
        if self.left is not None and self.left <= 0:
            if self.log is not None and len(run.drawn.ids) % 2:
                self.log.commit()  # or what was gathered is lost
            os.kill(os.getpid(), signal.SIGKILL)


def rollouts(folder: Path, sampling: SamplingParams, kill_after: int | None, keep: dict[str, bool]) -> None:
    """Make or go on with the rollouts of `folder`; the whole ones are pickled there."""
    with tiny_engine(tiny_policy(), max_running=3) as engine, RolloutLog(folder) as log:
        worker = Doomed(engine, log=log, **keep)
        worker.left = kill_after
        made = told(flat(worker.generate(tiny_prompts(3), 3, sampling)))
        sampled = engine.stats().sampled_tokens
    (folder / "made").write_bytes(pickle.dumps((made, sampled)))


def run_until_whole(folder: Path, sampling: SamplingParams, kills: list[int], keep: dict[str, bool]) -> Any:
    """Processes that are killed after so many tokens each, then one that is not: rollouts, its tokens, exit codes."""
    codes = []
    for kill_after in [*kills, None]:
        process = SERVER.Process(target=rollouts, args=(folder, sampling, kill_after, keep))
        process.start()
        process.join()
        codes.append(process.exitcode)
        if (folder / "made").exists():
            break
    made, sampled = pickle.loads((folder / "made").read_bytes())
    return made, sampled, codes
