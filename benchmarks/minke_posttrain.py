"""What post-training must show of Minke, measured for any number of checkpoints side by side.

    python benchmarks/minke_posttrain.py base=minke tuned=runs/minke-posttrain/model
    python benchmarks/minke_posttrain.py tuned=runs/posttrain/model --only effort,needle --items 400 --json

Every question is a test item (its people, keys, expressions, functions and phrases are of the test split) drawn from a
seed that no recipe uses; decoding is greedy. Shares have Wilson's 95 % interval.

* `facts`: HR_U, the share of unanswerable questions that are answered (by class too), and RET, of the questions about
  people no tuning touched that the model answers rightly with abstentions masked, the share it still answers rightly.
  No gate, no referee.
* `effort`: operands of 1 to 8 digits without thinking, with it, and at effort max: right answers, tokens, tokens per
  solved task; `hard` is the hardest quarter.
* `needle`: one value in a text of `--length` tokens by 16 depths; the worst depth is a figure of its own.
* `tool`: calls with the right function and arguments; `single` holds the classes single and bait.
* `agent`: the desk task (PDFs, paragraphs, spreadsheet, mail) end to end in a container, unassisted. Needs the extras
  `agents` and `test`, and a machine that can run containers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rorqual import SamplingParams
from rorqual.checkpoint import locate
from rorqual.data.tasks import NeedleFamily, ToolFamily, World
from rorqual.data.tasks.base import Item, TaskFamily
from rorqual.data.tasks.needle import HAYSTACKS
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.statistics import Interval, wilson
from rorqual.evals.targets.loaded import LoadedTarget
from rorqual.evals.worlds import world_of
from rorqual.seeds import derive

SEED = 20_261_201
"""No recipe draws from it: recipes have small seeds, and training draws from the train split besides."""
DEPTHS = 16
ADDRESS = "ada@example.org"


@dataclass(frozen=True)
class Line:
    """A figure of one checkpoint. target: what must be reached, with its sign: `>=0.95`, `<=0.05`, or "" for none."""

    name: str
    value: float | None
    target: str = ""
    interval: Interval | None = None
    n: int = 0

    @property
    def met(self) -> bool | None:
        if not self.target or self.value is None:
            return None
        bound = float(self.target[2:])
        return self.value >= bound if self.target.startswith(">=") else self.value <= bound

    @staticmethod
    def share(name: str, flags: Sequence[bool], target: str = "") -> Line:
        interval = wilson(sum(flags), len(flags))
        return Line(name, None if interval is None else interval.value, target, interval, len(flags))


@dataclass
class Setup:
    """What is measured how."""

    target: LoadedTarget
    model: str
    world: World
    args: argparse.Namespace


def facts(setup: Setup) -> list[Line]:
    settings = RunSettings("facts", seed=setup.args.seed, items=8 * setup.args.items)
    with tempfile.TemporaryDirectory() as folder:
        outcome = evaluate(settings, setup.target, setup.world, Path(folder))
    head, bounds = outcome.result["headline"], outcome.result["intervals"]
    targets = {"HR_U": "<=0.05", "RET": ">=0.98"}
    lines = [
        Line(name, head[name], targets.get(name, ""), _interval(head[name], bounds.get(name)), len(outcome.rows))
        for name in ("HR_U", "RET", "ACC", "OI", "AUROC")
    ]
    by_class = defaultdict(list)
    for row in outcome.rows:
        by_class[str(row.item.stratum["class"])].append(row.passed)
    return lines + [Line.share(name, flags) for name, flags in sorted(by_class.items())]


def effort(setup: Setup) -> list[Line]:
    settings = RunSettings("effort", seed=setup.args.seed, items=6 * setup.args.items)
    with tempfile.TemporaryDirectory() as folder:
        outcome = evaluate(settings, setup.target, setup.world, Path(folder))
    head, bounds = outcome.result["headline"], outcome.result["intervals"]
    lines = []
    for name in ("none", "high", "max"):
        for figure in (f"ACC_{name}", f"ACC_HARD_{name}", f"TOKENS_{name}", f"TPS_{name}"):
            target = ">=0.95" if figure in ("ACC_high", "ACC_max") else ""
            lines.append(Line(figure, head[figure], target, _interval(head[figure], bounds.get(figure))))
    return [*lines, _ordered(head, "TOKENS"), _ordered(head, "ACC_HARD")]


def _ordered(head: dict[str, Any], name: str) -> Line:
    """1 when the figure rises from none over high to max."""
    found = [head[f"{name}_{effort}"] for effort in ("none", "high", "max")]
    rises = None not in found and found[0] < found[1] < found[2]
    return Line(f"{name} none < high < max", float(rises), ">=1")


def _interval(value: float | None, bounds: Sequence[float] | None) -> Interval | None:
    return None if value is None or bounds is None else Interval(value, *bounds)


def needle(setup: Setup) -> list[Line]:
    args = setup.args
    family = NeedleFamily(setup.world, lengths=(args.length,), count_tokens=setup.target.count_tokens)
    items = []
    for index in range(max(1, args.items // 8) * DEPTHS):
        rng = random.Random(derive(args.seed, "needle", index))
        kind, depth = HAYSTACKS[index // DEPTHS % len(HAYSTACKS)], index % DEPTHS / (DEPTHS - 1)
        mode = ("chat", "thinking")[index // DEPTHS // len(HAYSTACKS) % 2]
        items.append(
            family.item(rng, "test", index, mode=mode, task="single", kind=kind, length=args.length, depth=depth)
        )
    by_depth: dict[float, list[bool]] = defaultdict(list)
    for item, passed in zip(items, _answered(setup, family, items, 96), strict=True):
        by_depth[item.stratum["depth"]].append(passed)
    lines = [Line.share(f"EM {args.length}", [flag for flags in by_depth.values() for flag in flags], ">=0.98")]
    worst = min(by_depth, key=lambda depth: sum(by_depth[depth]) / len(by_depth[depth]))
    lines.append(Line.share("EM worst depth", by_depth[worst], ">=0.98"))
    return lines + [Line.share(f"EM depth {depth:.2f}", flags) for depth, flags in sorted(by_depth.items())]


def tool(setup: Setup) -> list[Line]:
    family = ToolFamily()
    items = list(islice(family.items("test", setup.args.seed), 7 * setup.args.items))
    by_class: dict[str, list[bool]] = defaultdict(list)
    for item, passed in zip(items, _answered(setup, family, items, 192), strict=True):
        kind = item.stratum["class"]
        by_class["single" if kind == "bait" else kind].append(passed)
    return [Line.share(name, flags, ">=0.98" if name == "single" else "") for name, flags in sorted(by_class.items())]


def _answered(setup: Setup, family: TaskFamily, items: Sequence[Item], max_tokens: int) -> Iterator[bool]:
    """Greedy answers, graded, in the order of the items; a few at a time, so that long prompts need little memory."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    tokenizer = setup.target.tokenizer
    for start in range(0, len(items), 8):
        chunk = items[start : start + 8]
        prompts = [tokenizer.encode(item.prompt_text()) for item in chunk]
        for item, output in zip(chunk, setup.target.engine.generate(prompts, params), strict=True):
            yield family.grade(item, tokenizer.decode(list(output.ids))).passed


def agent(setup: Setup) -> list[Line]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    from mail_server import mail_server

    from rorqual.agents import RunSettings as AgentSettings
    from rorqual.agents import create_run, run_agent
    from rorqual.agents.practice import draw_task, grade
    from rorqual.errors import RorqualError

    flags = []
    with tempfile.TemporaryDirectory() as folder, mail_server() as server:
        os.environ["RORQUAL_HOME"] = folder
        for index in range(setup.args.agent):
            task = draw_task("test", setup.args.seed, index)
            files = task.write(Path(folder) / f"pdfs-{index}")
            settings = AgentSettings(
                task.text, model=setup.model, temperature=0.0, files=str(files), out=f"{folder}/out-{index}",
                smtp=server.address, mail_to=(ADDRESS,), max_turns=12, turn_tokens=512, total_tokens=8192,
            )  # fmt: skip
            server.inbox.clear()
            try:
                run_agent(create_run(settings, f"desk-{index}"))
            except RorqualError as error:
                print(f"desk task {index}: {error}", file=sys.stderr)
            flags.append(grade(task, server.inbox, ADDRESS))
    return [Line.share("solved end to end", flags, ">=0.90")]


PARTS: dict[str, Callable[[Setup], list[Line]]] = {
    "facts": facts,
    "effort": effort,
    "needle": needle,
    "tool": tool,
    "agent": agent,
}


def table(found: dict[str, dict[str, list[Line]]]) -> str:
    """One row a figure, one column a checkpoint."""
    names = list(found)
    rows = [["figure", "target", *names]]
    for part in PARTS:
        lines = {name: {line.name: line for line in parts.get(part, ())} for name, parts in found.items()}
        for figure in dict.fromkeys(key for by_name in lines.values() for key in by_name):
            here = [by_name.get(figure) for by_name in lines.values()]
            target = next((line.target for line in here if line is not None), "")
            rows.append([f"{part}: {figure}", target, *[_cell(line) for line in here]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(line: Line | None) -> str:
    if line is None or line.value is None:
        return "-"
    text = f"{line.value:.3f}"
    if line.interval is not None:
        text += f" ({line.interval.low:.3f}-{line.interval.high:.3f})"
    return text + ("" if line.met is None else " met" if line.met else " MISSED")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="checkpoints: bundled names or folders")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas between them")
    parser.add_argument("--items", type=int, default=200, help="items of a class (or of a kind and effort)")
    parser.add_argument("--agent", type=int, default=40, help="desk tasks")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a needle's text")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the items")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (0: as it likes)")
    parser.add_argument("--quick", action="store_true", help="16 items, 4 desk tasks")
    parser.add_argument("--json", action="store_true", help="one JSON object a figure instead of the table")
    args = parser.parse_args()
    if args.quick:
        args.items, args.agent = 16, 4
    if args.threads:
        torch.set_num_threads(args.threads)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: dict[str, dict[str, list[Line]]] = {}
    for spec in args.models:
        name, _, model = spec.rpartition("=")
        world = world_of(Path(locate(model))) or World.build()
        target = LoadedTarget(model)
        try:
            for part in parts:
                began = time.time()
                lines = PARTS[part](Setup(target, model, world, args))
                found.setdefault(name or model, {})[part] = lines
                for line in lines if args.json else ():
                    record = {"name": f"minke_posttrain.{part}", "model": model, "figure": line.name}
                    bounds = None if line.interval is None else [line.interval.low, line.interval.high]
                    record |= {"value": line.value, "interval": bounds, "n": line.n, "target": line.target}
                    print(json.dumps(record | {"met": line.met, "seconds": time.time() - began}), flush=True)
        finally:
            target.close()
    if not args.json:
        print(table(found))


if __name__ == "__main__":
    main()
