"""Speculative decoding, on and off by turns: seconds a token on code, chat, random text and sampling.

Drafts come from the text itself and from the MTP module. Greedy continuations of a model as small as this one soon
repeat themselves, which is much of what is gained on `code`; `config` says what part of the tokens came by drafts.

Both sides are the engine on the same bundled model in one process, one request at a time and by turns, and must give
the same tokens. On one thread both sides run on the same processor, in every second turn on another one: processors of
a virtual machine may differ in speed, and each engine's thread would stay on its own.

A line is one kind of prompt: `ours` is tokens per second between the first and the last token with speculation, `peer`
without, `ratio` how many times better on is than off (the middle of the turns' ratios; `spread` has the least and the
greatest). `config` has an interval that holds the middle of such turns in 95 of 100 runs, the mean accepted length
(tokens from a step with drafts), tokens a step over all steps, the ratio by processor time of this process (which a
busy machine disturbs less, and which on several threads counts their waiting for each other), drafted and accepted
tokens of a turn, a round's time without drafts, and what a further row and a draft cost in such rounds.

* `code`: beginnings of functions of Python files that training set aside, completed greedily
* `chat`: questions of the chat and code tasks' test items, answered greedily
* `code-t1`: the same beginnings, sampled at temperature 1
* `random`: prompts of random tokens, sampled at temperature 1: nothing here can be foretold

The model is measured in fp32, in bf16 and with packed weights (`fp4`: experts in MXFP4, the rest in FP8).

    python benchmarks/speculation.py --json
    python benchmarks/speculation.py --quick --threads 1

The target is at least 1.2 on code and never below 0.98.
"""

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch

import rorqual
from rorqual import Engine, SamplingParams
from rorqual.data import python_corpus
from rorqual.data.tasks import ChatFamily, CodeFamily
from rorqual.engine.stats import EngineStats

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32}, "bf16": {"dtype": torch.bfloat16},
    "fp4": {"dtype": torch.bfloat16, "weights": "fp4"},
}  # fmt: skip
HELD_OUT = 0.02
"""Share of the Python files that the recipe of Minke sets aside."""


@dataclass(frozen=True)
class Case:
    """Prompts of one kind, as token ids, and how they are continued."""

    name: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams


def code_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """The text before and with the first lines of functions in held-out files, 120 to 400 tokens of it."""
    _, held_out = python_corpus(include_tests=True).split(HELD_OUT)
    draw, out = random.Random(1), []
    for document in draw.sample(list(held_out.documents), len(held_out.documents)):
        starts = [i for i in range(len(document.text)) if document.text.startswith("\n    def ", i)]
        if len(out) < count and starts:
            end = document.text.find("\n", draw.choice(starts) + 5)
            ids = tokenizer.encode(document.text[max(0, end - 1200) : end + 1])
            if len(ids) >= 120:
                out.append(ids[-400:])
    return out


def chat_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Test items of two task families by turns."""
    families = [family.items("test", 3) for family in (ChatFamily(), CodeFamily())]
    return [tokenizer.encode(next(families[i % 2]).prompt_text()) for i in range(count)]


def cases(tokenizer: Any, count: int, tokens: int) -> list[Case]:
    """All kinds."""
    code, draw = code_prompts(tokenizer, count), random.Random(2)
    noise = [[draw.randrange(3, tokenizer.vocab_size) for _ in range(200)] for _ in range(count)]
    # texts go on to the limit, so that every turn has as much to do
    on = SamplingParams(temperature=0.0, max_tokens=tokens, suppress_token_ids=(tokenizer.eos_token_id,))
    return [
        Case("code", code, on),
        Case("chat", chat_prompts(tokenizer, 4 * count), SamplingParams(temperature=0.0, max_tokens=tokens)),
        Case("code-t1", code, on.replace(temperature=1.0, seed=5)),
        Case("random", noise, on.replace(temperature=1.0, seed=5)),
    ]


@dataclass
class Side:
    """What one engine did in a turn."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def run(self, engine: Engine, case: Case, prompt: Sequence[int]) -> tuple[int, ...]:
        """Answer one prompt; the clock runs from the first token to the last."""
        clock: list[float] = []

        def note(event: Any) -> None:
            if not clock or event.finish_reason is not None:
                clock.append(time.process_time())

        request = engine.submit(prompt, case.params, listener=note)
        out = request.result()
        self.seconds += out.timing.decode_s
        self.cpu_s += clock[-1] - clock[0]
        self.tokens += len(out.ids) - 1
        self.drafted += out.usage.drafted_tokens
        self.accepted += out.usage.accepted_tokens
        return out.ids


def share_a_processor(engines: Sequence[Engine], number: int) -> None:
    """Keep the threads of all engines on one processor, with its number chosen by that of the turn; Linux only."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        for engine in engines:
            os.sched_setaffinity(engine._thread.native_id or 0, {allowed[number // 2 % len(allowed)]})


def interval(values: Sequence[float]) -> list[float]:
    """Bounds of the middle of what sorted values were drawn from, at 95 %, whatever its distribution: two of them, by
    the binomial distribution; the least and the greatest where there are fewer than six values.
    """
    count, at, below = len(values), 0, 0.5 ** len(values)
    while at + 1 < (count + 1) // 2 and below + math.comb(count, at + 1) * 0.5**count <= 0.025:
        at += 1
        below += math.comb(count, at) * 0.5**count
    return [values[at], values[count - 1 - at]]


def turn(on: Engine, off: Engine, case: Case, number: int) -> tuple[Side, Side]:
    """All prompts once on both engines, prompt by prompt by turns, so that a machine's moods meet both."""
    with_drafts, without = Side(), Side()
    if torch.get_num_threads() == 1:
        share_a_processor((on, off), number)
    for i, prompt in enumerate(case.prompts):
        found = {}
        for is_on in (True, False) if (number + i) % 2 else (False, True):
            found[is_on] = (with_drafts if is_on else without).run(on if is_on else off, case, prompt)
        if found[True] != found[False]:
            raise SystemExit(f"{case.name}: speculation changed the output, which it must never do.")
    return with_drafts, without


def measure_case(on: Engine, off: Engine, case: Case, kind: str, repeats: int) -> dict[str, Any]:
    """One line; the first turn is thrown away."""
    turns = [turn(on, off, case, 0)]
    before = on.stats()
    turns += [turn(on, off, case, number) for number in range(1, repeats + 1)]
    after = on.stats()
    mine = [side.tokens / side.seconds for side, _ in turns[1:]]
    theirs = [side.tokens / side.seconds for _, side in turns[1:]]
    ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
    cpu_ratios = sorted(b.cpu_s / a.cpu_s for a, b in turns[1:])
    last = turns[-1][0]
    steps = last.tokens - last.accepted
    assert on.speculation is not None
    costs = on.speculation.policy.costs(1 if case.params.temperature == 0 else -1)
    return {
        "name": "speculation",
        "case": f"{case.name}/minke/{torch.get_num_threads()}t/{kind}",
        "unit": "tokens/s",
        "ours": measure.middle(mine),
        "peer": measure.middle(theirs),
        "peer_name": "without speculation",
        "ratio": measure.middle(ratios),
        "bound": None,
        "bound_share": None,
        "spread": {**measure.spread(mine, theirs), "ratio": [ratios[0], ratios[-1]]},
        "config": {
            "prompts": len(case.prompts), "tokens": last.tokens, "repeats": repeats, "steps": steps,
            "drafted": last.drafted, "accepted": last.accepted, "tokens_per_step": last.tokens / max(1, steps),
            "accepted_length": _accepted_length(before, after), "temperature": case.params.temperature,
            "ratio_interval": interval(ratios), "cpu_ratio_interval": interval(cpu_ratios),
            "cpu_ratio": measure.middle(cpu_ratios), "cpu_ratio_spread": [cpu_ratios[0], cpu_ratios[-1]],
            "round_ms": 1e3 * (costs.plain or 0.0), "row_rounds": costs.row,
            "first_row_rounds": costs.first_row, "draft_rounds": costs.drafts(1),
            **measure.machine(),
        },
    }  # fmt: skip


def _accepted_length(before: EngineStats, after: EngineStats) -> float:
    """Tokens from a step with drafts, between two looks at an engine."""
    verified = after.verifications - before.verifications
    return 1 + (after.accepted_tokens - before.accepted_tokens) / verified if verified else 1.0


def print_line(line: dict[str, Any], *, as_json: bool) -> None:
    """As `measure.print_line`, which has a limit of the machine to tell."""
    if as_json:
        measure.print_line(line, as_json=True)
        return
    config = line["config"]
    print(
        f"{line['case']}: {line['ours']:,.0f} tokens/s with speculation, {line['peer']:,.0f} without: "
        f"{line['ratio']:.2f} times; {config['accepted']} of {config['drafted']} drafts accepted in "
        f"{config['tokens']} tokens",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one counted pair of turns, few prompts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument("--repeats", type=int, default=15, help="counted pairs of turns")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of a kind")
    parser.add_argument("--tokens", type=int, default=160, help="most tokens to decode after each")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="of the weights")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="code, chat, code-t1, random")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.prompts, options.tokens = 1, 2, 80
    began = time.perf_counter()
    for threads, kind in itertools.product(options.threads, options.formats):
        torch.set_num_threads(threads)
        model, tokenizer = rorqual.load("minke", **FORMATS[kind])
        with Engine(model, tokenizer, speculate=True) as on, Engine(model, tokenizer) as off:
            for case in cases(tokenizer, options.prompts, options.tokens):
                if not options.only or case.name in options.only:
                    measure.note(f"{case.name}, {kind}, {threads} threads ({time.perf_counter() - began:.0f} s)")
                    print_line(measure_case(on, off, case, kind, options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
