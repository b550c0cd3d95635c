"""Rollouts in processes of their own, which kill themselves (SIGKILL) over a chosen token.

Processes are forked from a server that has everything imported, so that a kill costs milliseconds.
"""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout_models import flat, tiny_engine, tiny_policy, tiny_prompts, told

from rorqual.engine import SamplingParams
from rorqual.journal import Tokens
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import RolloutWorker

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rollout_process"])


@dataclass(frozen=True)
class Kill:
    """A process kills itself over its token number `after`, with that token `unwritten`, `written` or `durable`.

    What is written waits for a commit, which may come before the kill or not; only what is durable is sure to stay.
    """

    after: int
    last: Literal["unwritten", "written", "durable"]


class Doomed(RolloutWorker):
    """Dies as `kill` says."""

    kill: Kill | None = None
    taken = 0

    def _keep(self, run: Any, event: Any) -> None:
        self.taken += 1
        is_last = self.kill is not None and self.taken == self.kill.after
        if is_last and self.kill.last == "unwritten":
            os.kill(os.getpid(), signal.SIGKILL)
        super()._keep(run, event)
        if is_last:
            if self.kill.last == "durable":
                self.log.commit()
            os.kill(os.getpid(), signal.SIGKILL)


def durable_tokens(log: RolloutLog) -> int:
    """How many tokens a log that was just opened has."""
    return sum(len(record.ids) for _, record in log.journal.replay() if isinstance(record, Tokens))


def rollouts(folder: Path, sampling: SamplingParams, kill: Kill | None, keep: dict[str, bool]) -> None:
    """Make or go on with the rollouts of `folder`; the whole ones are pickled there."""
    with tiny_engine(tiny_policy(), max_running=3) as engine, RolloutLog(folder) as log:
        with open(folder / "found", "a") as file:
            file.write(f"{durable_tokens(log)}\n")
        worker = Doomed(engine, log=log, **keep)
        worker.kill = kill
        made = told(flat(worker.generate(tiny_prompts(3), 3, sampling)))
        sampled = engine.stats().sampled_tokens
    (folder / "made").write_bytes(pickle.dumps((made, sampled)))


@dataclass(frozen=True)
class Lives:
    """What became of processes one after the other: their exit codes, the tokens that each found durable when it began,
    and of the last the rollouts and how many tokens it drew itself."""

    codes: list[int | None]
    found: list[int]
    made: dict[str, Any]
    sampled: int


def run_until_whole(folder: Path, sampling: SamplingParams, kills: Sequence[Kill], keep: dict[str, bool]) -> Lives:
    """Processes that are killed as told, then one that is not."""
    codes = []
    for kill in [*kills, None]:
        process = SERVER.Process(target=rollouts, args=(folder, sampling, kill, keep))
        process.start()
        process.join()
        codes.append(process.exitcode)
        if (folder / "made").exists():
            break
    made, sampled = pickle.loads((folder / "made").read_bytes())
    return Lives(codes, [int(line) for line in (folder / "found").read_text().split()], made, sampled)
