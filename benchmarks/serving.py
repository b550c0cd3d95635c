"""Many streaming clients at once: the engine against itself one at a time, and against transformers' generation.

    python benchmarks/serving.py --json [--quick]

64 clients send a prompt each at the same moment, 8 of every length from 32 to 2,048 tokens, and each wants 64 tokens,
chosen greedily. The network is `small.json` in fp32 with drawn weights, the same on both sides through our export.

* `serving.throughput`: generated tokens per second of the whole burst.
* `serving.decoding`: the same of as many clients with prompts of 32 tokens that want 128 tokens each, so that steps of
  many rows, and not the reading of prompts, take the time.
* `serving.first_token`, `serving.between_tokens`: seconds from the burst to a client's first token, and between its
  tokens, the median and the 99th percentile over all clients (`p50`, `p99` of the case).

Ours is an `Engine` with room for all clients; every client is a thread that iterates over its request. Peers:

* `one at a time`: the same engine with `max_running=1`;
* `transformers, equal lengths`: `generate` on static batches without padding, one batch a length, shortest first, since
  with left padding its V4 produces other tokens (`padded_rows_unchanged` says how many rows came out as alone).
  Where a row differs from ours, `differences` has the first token that does, how far apart the two choices' scores are
  in either network there, and how far the two networks' scores are apart by rounding;
* `transformers, padded`: left-padded batches of 16 clients as they come (more would need tens of gigabytes for its
  scores), timed all the same;
* `transformers, continuous batching`: `generate_batch`, or what it answers.

The bound of the throughput is the best rate of an fp32 matrix product over the multiply-adds that all tokens need. That
of a first token is the time this rate needs for the prompts of half (p50) or nearly all (p99) of the clients; that of
the time between tokens is a step with one token of every client and no prompt.
"""

import argparse
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import measure
import peers
import torch
from torch import Tensor

import rorqual
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.selftest.subject import IdsOnly
from rorqual.model import Transformer

SHORT, SHORT_NEW = 32, 128
LENGTHS = (32, 64, 128, 256, 512, 768, 1024, 2048)
CHUNK = 512
PADDED_ROWS = 16


@dataclass
class Burst:
    """What a side made of one burst: tokens and their times in seconds since its beginning, client by client."""

    ids: list[list[int]]
    times: list[list[float]]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.ids)) / max(times[-1] for times in self.times)

    @property
    def first(self) -> list[float]:
        return [times[0] for times in self.times]

    @property
    def gaps(self) -> list[float]:
        return [b - a for times in self.times for a, b in zip(times, times[1:], strict=False)]


@dataclass
class Side:
    """A way to serve a burst, and what it came to in each repeat."""

    name: str
    run: Callable[[Sequence[Tensor]], Burst]
    bursts: list[Burst] = field(default_factory=list)
    failure: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def serve(model: Transformer, prompts: Sequence[Tensor], count: int, max_running: int) -> Burst:
    """A burst through an engine, every client a thread."""
    ids: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    params = SamplingParams(temperature=0, max_tokens=count)
    tokenizer, room = IdsOnly(model.cfg.vocab_size), len(prompts) + 1
    with Engine(model, tokenizer, max_running=max_running, max_queued=room, chunk=CHUNK) as engine:
        began = time.perf_counter()
        requests = [engine.submit(prompt.tolist(), params) for prompt in prompts]

        def client(number: int) -> None:
            for event in requests[number]:
                if event.id is not None:
                    ids[number].append(event.id)
                    times[number].append(time.perf_counter() - began)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Burst(ids, times)


class Clock:
    """A logits processor that notes when each step's scores were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


def generated(peer: Any, rows: Sequence[Tensor], count: int) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of rows left-padded to one length, and the time of each step."""
    from transformers import GenerationConfig, LogitsProcessorList

    longest, clock = max(map(len, rows)), Clock()
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True)
    with torch.inference_mode():
        out = peer.generate(
            tokens, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([clock])
        )
    return out[:, longest:].tolist(), clock.times


def batches(prompts: Sequence[Tensor], is_padded: bool) -> Iterator[list[int]]:
    """Numbers of the prompts that one static batch takes: some as they come, or all of a length, shortest first."""
    if is_padded:
        numbers = list(range(len(prompts)))
        yield from (numbers[lo : lo + PADDED_ROWS] for lo in range(0, len(numbers), PADDED_ROWS))
        return
    for length in sorted({len(prompt) for prompt in prompts}):
        yield [number for number, prompt in enumerate(prompts) if len(prompt) == length]


def generate(peer: Any, prompts: Sequence[Tensor], count: int, is_padded: bool) -> Burst:
    """A burst through the peer's static batches, one after the other."""
    ids: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    began = time.perf_counter()
    for numbers in batches(prompts, is_padded):
        found, at = generated(peer, [prompts[number] for number in numbers], count)
        for number, row in zip(numbers, found, strict=True):
            ids[number], times[number] = row, [t - began for t in at]
    return Burst(ids, times)


def continuous(peer: Any, prompts: Sequence[Tensor], count: int) -> Burst:
    """A burst through the peer's continuous batching, which tells no times."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    began = time.perf_counter()
    try:
        out = peer.generate_batch([prompt.tolist() for prompt in prompts], generation_config=settings)
    finally:
        peer.set_attn_implementation("eager")  # as it was loaded; the attempt leaves another one behind
    end = time.perf_counter() - began
    ids = [list(one.generated_tokens) for _, one in sorted(out.items())]
    if not all(ids):
        raise RuntimeError(f"generate_batch returned no tokens for {sum(not row for row in ids)} prompts")
    return Burst(ids, [[end] * len(row) for row in ids])


def same_rows(a: Burst, b: Burst) -> int:
    """Clients that got the same tokens from both."""
    return sum(x == y for x, y in zip(a.ids, b.ids, strict=True))


@torch.inference_mode()
def differences(
    model: Transformer, peer: Any, prompts: Sequence[Tensor], ours: Burst, theirs: Burst
) -> list[dict[str, Any]]:
    """Where clients got other tokens from the peer: the first such token, and what both networks, each reading the text
    up to there anew, say of the two choices. A choice that rounding explains has a margin below the networks' distance.
    """
    out = []
    for prompt, mine, other in zip(prompts, ours.ids, theirs.ids, strict=True):
        if mine == other:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        text = torch.cat([prompt, torch.tensor(mine[:at], dtype=torch.int64)])[None]
        scores, peers_scores = model(text)[0, -1].double(), peer(text, use_cache=False).logits[0, -1].double()
        out.append(
            {
                "prompt_tokens": len(prompt), "at": at, "ours": mine[at], "peer": other[at],
                "our_margin": float(scores[mine[at]] - scores[other[at]]),
                "peer_margin": float(peers_scores[other[at]] - peers_scores[mine[at]]),
                "scores_differ_by": float((scores - peers_scores).abs().max()),
                "scores_spread": float(scores.std()),
            }
        )  # fmt: skip
    return out


def run_all(sides: list[Side], prompts: Sequence[Tensor], repeats: int) -> None:
    """Bursts of all sides by turns, so that a slow moment of the machine hits each; a small one first as warm-up."""
    for number in range(-1, repeats):
        for side in sides[number % len(sides) :] + sides[: number % len(sides)] if number >= 0 else sides:
            if side.failure:
                continue
            try:
                burst = side.run(prompts if number >= 0 else prompts[:2])
            except Exception as error:
                side.failure = f"{type(error).__name__}: {error}"
                measure.note(f"{side.name} did not run: {side.failure}")
                continue
            if number >= 0:
                side.bursts.append(burst)
                measure.note(f"{side.name}: {burst.tokens_per_s:,.1f} tokens/s")


def report(
    what: str,
    case: str,
    unit: str,
    ours: Side,
    peer: Side,
    value: Callable[[Burst], float],
    bound: float,
    config: dict[str, Any],
) -> dict[str, Any]:
    """One line; for seconds less is better, so that the ratio is the peer's over ours."""
    mine, theirs = [value(burst) for burst in ours.bursts], [value(burst) for burst in peer.bursts]
    a, b = measure.middle(mine), measure.middle(theirs) if theirs else None
    is_rate = unit == "tokens/s"
    return {
        "name": f"serving.{what}",
        "case": case,
        "unit": unit,
        "ours": a,
        "peer": b,
        "peer_name": peer.name,
        "peer_failure": peer.failure or None,
        "ratio": None if b is None else (a / b if is_rate else b / a),
        "bound": bound,
        "bound_share": a / bound if is_rate else bound / a,
        "spread": measure.spread(mine, theirs),
        "config": config,
    }


def macs(config: rorqual.ModelConfig, weights: int, length: int) -> float:
    """Multiply-adds of a text of so many tokens."""
    return length * (weights + peers.attention_products(config, length))


def best_rate(
    config: rorqual.ModelConfig, weights: int, lengths: Sequence[int], count: int, macs_per_s: float
) -> float:  # fmt: skip
    """Generated tokens a second where only these multiply-adds take time."""
    return len(lengths) * count * macs_per_s / sum(macs(config, weights, length + count - 1) for length in lengths)


def decoding_lines(
    ours: Transformer, peer: Any, config: rorqual.ModelConfig, clients: int, repeats: int, count: int
) -> Iterator[dict[str, Any]]:
    """Short prompts, so that nearly all is decoding."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, config.vocab_size, (SHORT,), generator=draw) for _ in range(clients)]
    sides = [
        Side("ours", lambda rows: serve(ours, rows, count, len(rows))),
        Side("one at a time", lambda rows: serve(ours, rows, count, 1)),
        Side("transformers, equal lengths", lambda rows: generate(peer, rows, count, False)),
    ]
    run_all(sides, prompts, repeats)
    weights = peers.activated_weights(ours, config)
    rate = best_rate(config, weights, [SHORT] * clients, count, measure.matmul_flops_per_s() / 2)
    mine, alone, equal = (side.bursts[-1] for side in sides)
    facts = {
        "clients": clients, "prompt_tokens": SHORT, "new_tokens": count, "rows_as_alone": same_rows(mine, alone),
        "rows_as_transformers": same_rows(mine, equal), "differences": differences(ours, peer, prompts, mine, equal),
        "repeats": repeats, "model": "small.json", **measure.machine(),
    }  # fmt: skip
    case = f"short/small/{torch.get_num_threads()}t/fp32"
    for side in sides[1:]:
        yield report("decoding", case, "tokens/s", sides[0], side, lambda burst: burst.tokens_per_s, rate, facts)


def lines(
    config: rorqual.ModelConfig, sides: Sequence[Side], prompts: Sequence[Tensor], weights: int, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """All lines: ours against each peer."""
    ours, count = sides[0], facts["new_tokens"]
    macs_per_s = measure.matmul_flops_per_s() / 2
    lengths = sorted(len(prompt) for prompt in prompts)
    costs = [macs(config, weights, length) for length in lengths]
    step = sum(cost / length for cost, length in zip(costs, lengths, strict=True)) / macs_per_s
    case = f"mixed/small/{torch.get_num_threads()}t/fp32"
    for peer in sides[1:]:
        rate = best_rate(config, weights, lengths, count, macs_per_s)
        yield report("throughput", case, "tokens/s", ours, peer, lambda burst: burst.tokens_per_s, rate, facts)
        if "continuous" in peer.name:
            continue  # it tells no times
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            read = sum(costs[: math.ceil(share * len(costs))]) / macs_per_s

            def first(burst: Burst, share: float = share) -> float:
                return percentile(burst.first, share)

            def gap(burst: Burst, share: float = share) -> float:
                return percentile(burst.gaps, share)

            yield report("first_token", f"{case}/{name}", "s", ours, peer, first, read, facts)
            yield report("between_tokens", f"{case}/{name}", "s", ours, peer, gap, step, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat, shorter prompts and answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    repeats, count = (1, 32) if options.quick else (options.repeats, 64)
    lengths = LENGTHS[:5] if options.quick else LENGTHS

    torch.set_num_threads(1)
    config = rorqual.ModelConfig.from_dict(json.loads(peers.CONFIG.read_text()))
    ours, peer = peers.build_pair(config)
    ours.eval()
    peer.eval()
    worst = peers.check_agreement(ours, peer, torch.arange(300)[None] * 7 % config.vocab_size)
    measure.note(f"logits agree within {worst:.1e} of a row's norm")
    draw = torch.Generator().manual_seed(3)
    sizes = [lengths[i % len(lengths)] for i in range(options.clients)]
    prompts = [torch.randint(0, config.vocab_size, (size,), generator=draw) for size in sizes]
    for threads in options.threads:
        torch.set_num_threads(threads)
        sides = [
            Side("ours", lambda rows: serve(ours, rows, count, len(rows))),
            Side("one at a time", lambda rows: serve(ours, rows, count, 1)),
            Side("transformers, equal lengths", lambda rows: generate(peer, rows, count, False)),
            Side("transformers, padded", lambda rows: generate(peer, rows, count, True)),
            Side("transformers, continuous batching", lambda rows: continuous(peer, rows, count)),
        ]
        run_all(sides, prompts, repeats)
        mine, alone, equal, padded = (side.bursts[-1] for side in sides[:4])
        facts = {
            "clients": len(prompts), "prompt_tokens": sorted(set(sizes)), "new_tokens": count, "chunk": CHUNK,
            "rows_as_alone": same_rows(mine, alone), "rows_as_transformers": same_rows(mine, equal),
            "padded_rows_unchanged": same_rows(padded, equal),
            "differences": differences(ours, peer, prompts, mine, equal), "repeats": repeats, "model": "small.json",
            **measure.machine(),
        }  # fmt: skip
        weights = peers.activated_weights(ours, config)
        for line in lines(config, sides, prompts, weights, facts):
            show(line, as_json=options.json)
        short = decoding_lines(ours, peer, config, options.clients, repeats, SHORT_NEW // (4 if options.quick else 1))
        for line in short:
            show(line, as_json=options.json)


def show(line: dict[str, Any], *, as_json: bool) -> None:
    """As `measure.print_line`, which rounds to whole numbers: seconds are shown as milliseconds to people."""
    if not as_json and line["unit"] == "s":
        scaled = {key: 1000 * line[key] for key in ("ours", "peer") if line[key] is not None}
        line = {**line, **scaled, "unit": "ms"}
    measure.print_line(line, as_json=as_json)


if __name__ == "__main__":
    main()
