"""Whether greedy tokens depend on anything but weights and prompt: 10,000 requests under random schedules.

    python benchmarks/exactness.py --json [--quick]

A small random network with every kind of layer, whose output head has its rows in pairs that differ in the sixth digit
(`rorqual.engine.selftest.subject`): rounding alone decides between them, so another order of additions anywhere soon
gives another text. Each finished greedy request of 64 to 80 tokens is compared, token by token, with the continuation
that the plain model gives alone, one sequence at a time, its prompt in one call. Cancelled requests are compared as far
as they came.

The requests come in lives of an engine. Each life draws how many requests share a step, how large chunks are, how much
memory states get (so that some lose theirs and begin again), policy and size of the prefix cache, and drafts: none, the
MTP module's as far as they pay, or the plain model's own text with a quarter of it wrong, verified in every step. Its
prompts share beginnings of all lengths, and some come twice. Some requests are cancelled. A life ends quietly, or while
requests run (they come again in the next), and then either with everything written or with a copy of the cache's folder
as it was at that moment, records half written included. The next life has the folder.

* `exactness.tokens`: differing tokens of all, `ours`. The peer is a control that must differ: the same, with the C
  operations off, so that torch's products and the reference operations run (`control_requests` of them).
* Exit code 1 when a token of ours differs, or when none of the control's does (then the comparison proves nothing).

`--resume FILE` notes each life there and goes on from it after an interruption.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of tiny products would only spin

import measure
import torch

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.selftest.subject import IdsOnly, high_entropy, plain_ids, small_config
from rorqual.errors import RequestError
from rorqual.model import Transformer
from rorqual.ops import registry

PER_LIFE, LIVES_OF_A_FOLDER = 100, 5
SHORTEST, LONGEST = 64, 80
VOCAB = 256


@dataclass
class Count:
    """What was compared, and what happened meanwhile."""

    requests: int = 0
    tokens: int = 0
    differing_requests: int = 0
    differing_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    hits: int = 0
    cancelled: int = 0
    interrupted: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    most_in_a_step: int = 0
    first_difference: str = ""

    def add(self, other: "Count") -> None:
        """Take in a life."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if name == "first_difference":
                setattr(self, name, mine or value)
            else:
                setattr(self, name, max(mine, value) if name == "most_in_a_step" else mine + value)

    def compare(self, request: Request, truth: list[int], where: str) -> None:
        """One finished or cancelled request."""
        ids = [event.id for event in request.events if event.id is not None]
        self.tokens += len(ids)
        self.prompt_tokens += len(request.prompt_ids)
        wrong = sum(a != b for a, b in zip(ids, truth, strict=False))
        self.differing_tokens += wrong
        self.differing_requests += wrong > 0
        if request.cancelled:
            self.cancelled += 1
        else:
            assert len(ids) == len(truth)
            self.requests += 1
        if request.cache is not None:
            self.hits += request.cache.cached_tokens > 0
            self.cached_tokens += request.cache.cached_tokens
            self.disk_tokens += request.cache.disk_tokens
        self.drafted_tokens += request.drafted
        self.accepted_tokens += request.accepted
        self.most_in_a_step = max(self.most_in_a_step, 1 + request.batched_with)
        if wrong and not self.first_difference:
            at = next(i for i, (a, b) in enumerate(zip(ids, truth, strict=False)) if a != b)
            self.first_difference = (
                f"{where}: token {at} after a prompt of {len(request.prompt_ids)} is {ids[at]} instead of {truth[at]}"
            )


@dataclass
class House:
    """A cache folder and the texts asked for while it exists; a new one every few lives."""

    seed: int
    folder: Path
    left: list[tuple[list[int], int]] = field(default_factory=list)
    """Prompts and lengths that an interrupted life left undone."""

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.stems = [[draw.randrange(VOCAB) for _ in range(draw.choice([40, 150, 290]))] for _ in range(3)]
        self.asked: list[list[int]] = []

    def prompts(self, draw: random.Random) -> Iterator[tuple[list[int], int]]:
        """Prompts with shared beginnings, and how many tokens each wants."""
        yield from self.left
        self.left = []
        while True:
            if self.asked and draw.random() < 0.15:
                prompt = draw.choice(self.asked)
            else:
                stem = draw.choice(self.stems)
                cut = draw.choice([0, 0, draw.randrange(len(stem)), 32 * draw.randrange(len(stem) // 32), len(stem)])
                prompt = stem[:cut] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 25))]
                self.asked.append(prompt)
            yield prompt, draw.randint(SHORTEST, LONGEST)


def engine_options(draw: random.Random) -> dict[str, Any]:
    """How this life's engine is set up."""
    running = 1 if draw.random() < 0.05 else draw.choice([3, 8, 16, 24])
    options: dict[str, Any] = {
        "max_running": running, "max_queued": draw.choice([2, 8, 32]),
        "chunk": 5 if draw.random() < 0.05 else draw.choice([32, 64, 128, 200, 512]),
    }  # fmt: skip
    if draw.random() < 0.3:
        options["step_tokens"] = running + draw.randint(8, 100)
    if draw.random() < 0.4:
        options["max_state_bytes"] = draw.choice([1_000_000, 4_000_000])
    return options


def cache_options(draw: random.Random) -> dict[str, Any]:
    """How this life's prefix cache is set up."""
    return {
        "memory_bytes": draw.choice([0, 300_000, 8 << 20]), "running_tokens": 16 * 640,
        "windows": draw.choice(["full", "periodic", "zero"]), "ends": draw.random() < 0.7,
        "disk_bytes": draw.choice([2 << 20, 64 << 20]),
    }  # fmt: skip


class Truths:
    """What the plain model says behind each prompt, and drafts of it, of which a quarter are wrong."""

    def __init__(self, model: Transformer, draw: random.Random) -> None:
        self._model, self._draw = model, draw
        self._known: dict[tuple[int, ...], list[int]] = {}

    def of(self, prompt: Sequence[int], length: int) -> list[int]:
        """`length` tokens."""
        prompt = tuple(prompt)
        if len(self._known.get(prompt, ())) < length:
            self._known[prompt] = plain_ids(self._model, prompt, length)
        return self._known[prompt][:length]

    def draft(self, known: Sequence[int], most: int) -> list[int]:
        """At most so many tokens behind a prompt and what has been answered so far."""
        for prompt, truth in self._known.items():
            if tuple(known[: len(prompt)]) == prompt and len(known) > len(prompt):
                ahead = truth[len(known) - len(prompt) :][: self._draw.randint(0, most)]
                return [self._draw.randrange(VOCAB) if self._draw.random() < 0.25 else token for token in ahead]
        return []


def live(model: Transformer, house: House, number: int, wanted: int) -> Count:
    """One life of an engine: `wanted` requests begun, those that it finishes compared."""
    draw, count = random.Random(1000 * house.seed + number), Count()
    torch.set_num_threads(1)
    truths, prompts = Truths(model, random.Random(draw.random())), house.prompts(draw)
    asked = [next(prompts) for _ in range(wanted)]
    speculate: Any = draw.choice([False, True, truths.draft, truths.draft])
    for prompt, length in asked if callable(speculate) else ():
        truths.of(prompt, length)
    torch.set_num_threads(2 if draw.random() < 0.1 else 1)
    cache = None if draw.random() < 0.1 else PrefixCache(model, folder=house.folder, **cache_options(draw))
    dies, in_flight, done = draw.random() < 0.5, [], []
    options = engine_options(draw)
    with Engine(model, IdsOnly(VOCAB), prefix_cache=cache, speculate=speculate, **options) as engine:
        for prompt, length in asked:
            greedy = SamplingParams(temperature=0, max_tokens=length)
            request = engine.submit(prompt, greedy, priority=draw.choice([0, 0, 0, 1, -1]), wait=True)
            in_flight.append(request)
            if draw.random() < 0.05:
                draw.choice(in_flight).cancel()
        if not dies:
            for request in in_flight:
                request.result(600)
        engine.close()
        stats = engine.stats()
    for request in in_flight:
        if request.error is None:
            done.append(request)
        else:
            assert isinstance(request.error, RequestError) and request.error.status == 503, request.error
            count.interrupted += 1
            house.left.append((list(request.prompt_ids), request.max_tokens))
    if cache is not None:
        leave(cache, house, politely=draw.random() < 0.5)
    count.preemptions, count.steps = stats.preemptions, stats.rounds
    torch.set_num_threads(1)
    for request in done:
        truth = truths.of(request.prompt_ids, request.max_tokens)
        count.compare(request, truth, f"house {house.seed}, life {number}")
    return count


def leave(cache: PrefixCache, house: House, politely: bool) -> None:
    """End a cache: with everything written, or with its folder as it is at this moment."""
    if politely:
        cache.close()
        return
    image = Path(tempfile.mkdtemp(dir=house.folder.parent))
    for path in sorted(path for path in house.folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):  # an index gets its name meanwhile
            target = image / path.relative_to(house.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    cache.close()
    shutil.rmtree(house.folder)
    house.folder = image


def run(model: Transformer, wanted: int, resume: Path | None, name: str) -> Count:
    """Lives until `wanted` requests have been compared."""
    total, number, began = Count(), 0, time.monotonic()
    for line in resume.read_text().splitlines() if resume is not None and resume.exists() else ():
        total.add(Count(**json.loads(line)))
        number += LIVES_OF_A_FOLDER
    with tempfile.TemporaryDirectory() as folder:
        while total.requests < wanted:
            house, of_house = House(number, Path(tempfile.mkdtemp(dir=folder))), Count()
            for life in range(LIVES_OF_A_FOLDER):
                need = wanted - total.requests - of_house.requests
                if need > 0:
                    of_house.add(live(model, house, life, min(PER_LIFE, need + 2)))
            total.add(of_house)
            number += LIVES_OF_A_FOLDER
            if resume is not None:
                with resume.open("a") as file:
                    file.write(json.dumps(asdict(of_house)) + "\n")
            measure.note(
                f"{name}: {total.requests} of {wanted} requests, {total.tokens} tokens, {total.differing_tokens} differ"
                f" ({time.monotonic() - began:.0f} s)"
            )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="500 requests, 24 for the control")
    parser.add_argument("--requests", type=int, help="finished requests to compare (10,000)")
    parser.add_argument("--control-requests", type=int, help="of the control (100)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--resume", type=Path, help="where lives are noted, and gone on from")
    args = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = high_entropy(small_config(vocab_size=VOCAB), args.seed, dtype)
    wanted = args.requests or (500 if args.quick else 10_000)
    began, cpu = time.monotonic(), time.process_time()
    ours = run(model, wanted, args.resume, "native")
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
    with registry.only("reference"):
        control = run(model, args.control_requests or (24 if args.quick else 100), None, "control")
    config = {
        "requests": ours.requests, "control_requests": control.requests, "seconds": seconds, "cpu_seconds": cpu_s,
        "ours": asdict(ours), "control": asdict(control), **measure.machine(),
    }  # fmt: skip
    line = {
        "name": "exactness.tokens", "case": f"{ours.requests}/random/{args.dtype}", "unit": "differing tokens",
        "ours": ours.differing_tokens, "peer": control.differing_tokens, "peer_name": "control (C operations off)",
        "ratio": None, "bound": 0, "bound_share": float(not ours.differing_tokens), "spread": {}, "config": config,
    }  # fmt: skip
    measure.print_line(line, as_json=args.json)
    if ours.differing_tokens:
        sys.exit(f"{ours.differing_tokens} tokens differ; the first: {ours.first_difference}")
    if not control.differing_tokens:
        sys.exit("The control does not differ either, so on this machine these figures prove nothing.")


if __name__ == "__main__":
    main()
