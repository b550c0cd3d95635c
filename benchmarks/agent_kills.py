"""Kills runs of an agent with SIGKILL at random moments, resumes them, and compares with a run that nobody killed.

    python benchmarks/agent_kills.py --kills 200            # container sandboxes; --kind microvm or vm for others
    python benchmarks/agent_kills.py --kills 8 --quick

The runs are the two examples of `recipes/agents`, each a process of its own that prints every token once it is durable.
What must hold at the end of every run, however often it was killed: the same files; exactly one mail; every command
with effects ran once; no printed token is missing or another; the trajectory's ids are those of the run in peace.
Needs the extras `agents` and `test`. One JSON object at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from agent_documents import budget_folder, harbour_folder  # noqa: E402
from mail_server import MailServer, mail_server  # noqa: E402

from rorqual.agents.report import records_of  # noqa: E402
from rorqual.agents.runs import RunFolder  # noqa: E402
from rorqual.journal.records import Tokens, ToolResult  # noqa: E402
from rorqual.sandbox import Sandbox  # noqa: E402
from rorqual.sandbox.errors import Gone  # noqa: E402
from rorqual.sandbox.home import all_homes  # noqa: E402
from rorqual.sandbox.processes import alive  # noqa: E402

NAME = "run"
MOST_STARTS = 60
"""Of one run; more means that it makes no headway."""


@dataclass(frozen=True)
class Example:
    """One of the two tasks. once: lines that its commands append, each once."""

    name: str
    options: tuple[str, ...]
    mails: int
    once: tuple[str, ...]


@dataclass
class Finding:
    """A finished run, as it is compared. wrong: what was not as it must be."""

    files: dict[str, str]
    ids: list[int]
    mails: int
    kills: int = 0
    starts: int = 0
    answered: int = 0
    """Calls whose command the sandbox had run, or was running, when the resumed agent asked again."""
    restores: int = 0
    """Times that the sandbox was taken back because a call's outcome was lost."""
    wrong: list[str] = field(default_factory=list)


def examples(folder: Path) -> list[Example]:
    """The two examples, their PDFs written into `folder`."""
    recipes = ROOT / "recipes" / "agents"
    budget, harbour = budget_folder(folder / "budget"), harbour_folder(folder / "harbour")
    return [
        Example(
            "budget",
            ("--script", str(recipes / "budget" / "replies.json"), "--files", str(budget)),
            1,
            ("searched", "sent"),
        ),
        Example(
            "report",
            (
                *("--script", str(recipes / "report" / "replies.json"), "--files", str(harbour)),
                *("--skills", str(recipes / "report" / "skills")),
            ),
            0,
            (),
        ),
    ]


@dataclass
class Run:
    """One run in a home of its own."""

    example: Example
    home: Path
    server: MailServer
    kind: str
    pace_s: float
    kills: int = 0
    sandbox_kills: int = 0
    starts: int = 0

    def start(self) -> subprocess.Popen[bytes]:
        """A process that begins the run, or goes on with it."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        command = [
            *(sys.executable, "-m", "rorqual", "agent", "run", f"Do the task {self.example.name}.", "--resume"),
            *("--name", NAME, "--kind", self.kind, "--pace", str(self.pace_s), "--json", *self.example.options),
            *("--smtp", self.server.address, "--mail-to", "ada@example.org"),
        ]
        environment = {**os.environ, "RORQUAL_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        with self.printed.open("ab") as out, (self.home / "stderr").open("ab") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)

    @property
    def printed(self) -> Path:
        return self.home / "printed"

    def until_done(self) -> None:
        """Let it end in peace. Raises: RuntimeError with what it said when it does not."""
        process = self.start()
        if process.wait(timeout=600) != 0:
            raise RuntimeError(f"{self.home}: {(self.home / 'stderr').read_text()[-2000:]}")

    def killed_after(self, seconds: float, *, with_sandbox: bool = False) -> bool:
        """Start it and kill it after so many seconds, its sandbox too if asked; False when it was done before."""
        process = self.start()
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.kills += 1
            if with_sandbox:
                self.kill_sandbox()
            return True
        if code != 0:
            raise RuntimeError(f"{self.home}: {(self.home / 'stderr').read_text()[-2000:]}")
        return False

    def kill_sandbox(self) -> None:
        """End the sandbox's processes, as a lack of memory or a crash might."""
        for place in all_homes(self.home):
            with contextlib.suppress(Gone, ValueError, KeyError, TypeError):
                running = place.read().running
                for one in running.processes if running is not None else ():
                    if alive(one):
                        os.kill(one.pid, signal.SIGKILL)
                        self.sandbox_kills += 1

    def finding(self) -> Finding:
        """What came of it, and what of that is wrong whatever the others say."""
        folder = self.home / "agents" / NAME
        out = folder / "out"
        files = {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        ids, wrong = self._ids(folder)
        wrong += self._acknowledged(ids)
        wrong += [f"sandbox {info.id} is left" for info in Sandbox.list(home=self.home)]
        if len(self.server.inbox) != self.example.mails:
            wrong.append(f"{len(self.server.inbox)} mails, {self.example.mails} expected")
        steps = (out / "steps.log").read_text().split() if (out / "steps.log").exists() else []
        if tuple(steps) != self.example.once:
            wrong.append(f"the commands left {steps}, {self.example.once} expected")
        printed = self.printed.read_text(errors="replace")
        answered = printed.count('"replayed": true, "live": true')
        restores = printed.count("restoring the sandbox")
        return Finding(files, ids, len(self.server.inbox), self.kills, self.starts, answered, restores, wrong)

    def _ids(self, folder: Path) -> tuple[list[int], list[str]]:
        ids: list[int] = []
        results: list[int] = []
        for record in records_of(RunFolder(folder)):
            if isinstance(record, Tokens):
                ids += record.ids
            elif isinstance(record, ToolResult):
                ids += record.observation_ids
                results.append(record.call_index)
        twice = [] if results == list(range(len(results))) else [f"results of calls {results}"]
        return ids, twice

    def _acknowledged(self, ids: list[int]) -> list[str]:
        """Every token that any process printed must be in the journal at its place."""
        wrong, start = [], 0
        first = b'{"event": '
        for piece in self.printed.read_bytes().split(first)[1:]:  # the line of a killed process may lack its end
            try:
                event = json.loads(first + piece)
            except json.JSONDecodeError:
                continue  # cut off by a kill, so nobody was told
            if event["event"] == "prompt":
                start = len(event["ids"])
            elif event["event"] == "tokens":
                at = event["position"] - start
                if ids[at : at + len(event["ids"])] != event["ids"]:
                    wrong.append(f"tokens acknowledged at {event['position']} are not on record")
        return wrong


@contextlib.contextmanager
def new_run(example: Example, home: Path, kind: str, pace_s: float) -> Iterator[Run]:
    """A run and its own mail server; no sandbox of it outlives the block."""
    with mail_server() as server:
        try:
            yield Run(example, home, server, kind, pace_s)
        finally:
            # a process killed while it made a sandbox leaves one that a later sweep of that home would take
            for place in (home / "sandboxes").glob("[!.]*"):
                Sandbox.end(place.name, home=home)


def compare(peace: Finding, killed: Finding) -> list[str]:
    """What differs."""
    wrong = list(killed.wrong)
    if killed.files != peace.files:
        wrong.append(f"files {sorted(set(killed.files.items()) ^ set(peace.files.items()))}")
    if killed.ids != peace.ids:
        wrong.append("other token ids")
    return wrong


def study(
    kills: int,
    kind: str,
    seed: int,
    folder: Path,
    pace_s: float,
    sandbox_share: float = 0.0,
    tell: Any = lambda text: None,
) -> dict[str, Any]:
    """Kill so often, over as many runs as that takes, and compare every one. sandbox_share: of kills of both."""
    chance = random.Random(seed)
    done, wrong, num_runs, starts, answered, restores = 0, [], 0, 0, 0, 0
    sandbox_kills = 0
    cases = examples(folder / "documents")
    peace, times = {}, {}
    for example in cases:
        with new_run(example, folder / f"peace-{example.name}", kind, pace_s) as run:
            began = time.monotonic()
            run.until_done()
            times[example.name] = time.monotonic() - began
            peace[example.name] = run.finding()
            wrong += [f"in peace, {example.name}: {text}" for text in peace[example.name].wrong]
    began = time.monotonic()
    while done < kills:
        example = cases[num_runs % len(cases)]
        with new_run(example, folder / f"killed-{num_runs}", kind, pace_s) as run:
            while done + run.kills < kills and run.starts < MOST_STARTS:
                with_sandbox = chance.random() < sandbox_share
                if not run.killed_after(chance.uniform(0.0, 0.6) * times[example.name], with_sandbox=with_sandbox):
                    break
            run.until_done()
            found = run.finding()
            wrong += [f"{run.home.name} ({example.name}): {text}" for text in compare(peace[example.name], found)]
            done, starts, num_runs = done + run.kills, starts + run.starts, num_runs + 1
            answered, restores = answered + found.answered, restores + found.restores
            sandbox_kills += run.sandbox_kills > 0
        tell(f"{num_runs} runs, {done} kills, {len(wrong)} wrong")
    return {
        "name": "agent-kills", "case": kind, "kills": done, "runs": num_runs, "starts": starts,
        "answered_by_sandbox": answered, "restores": restores,
        "runs_whose_sandbox_was_killed": sandbox_kills, "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1), "config": {"seed": seed, "pace_s": pace_s},
    }  # fmt: skip


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kind", default="container")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.001, help="seconds between two tokens")
    parser.add_argument("--sandbox-share", type=float, default=0.0, help="share of kills that take the sandbox along")
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which then stay")
    parser.add_argument("--json", action="store_true", help="only the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rorqual-kills-") as scratch:
        folder = options.keep or Path(scratch)
        result = study(
            8 if options.quick else options.kills, options.kind, options.seed, folder, options.pace,
            options.sandbox_share,
            (lambda text: None) if options.json else (lambda text: print(text, file=sys.stderr, flush=True)),
        )  # fmt: skip
    print(json.dumps(result))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
