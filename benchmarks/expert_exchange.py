"""Overlapped against plain expert exchange: two processes in separate network namespaces, joined by a throttled link.

    python benchmarks/expert_exchange.py --json [--quick] [--plot FILE.png]        (Linux, root; see throttled_link.py)

The routed experts of one MoE layer (the shape of a preset) are spread over the two processes, one compute thread each.
A step is the forward and the backward pass over random tokens. For each bandwidth of the link:

    plain         one wave: dispatch, then compute, then combine
    overlapped    several waves; the number is chosen at the equal point
    compute       the same products and copies with a transport that delivers nothing
    comm          the same messages with experts of width 0

The equal point is the bandwidth at which comm takes as long as compute; it is searched for. A forward's messages cannot
hide behind a backward's products, since the loss lies between, so the arithmetic limit of a step is

    limit = max(compute, comm) of the forward pass + max(compute, comm) of the backward pass

and the hidden share is (plain - overlapped) / (plain - limit). `hidden_of_whole` sets the stricter max(compute, comm)
of the whole step in its place, which no schedule reaches where the passes are balanced differently. `transport_cpu_s`
is what the messages themselves cost in processor time (comm less the same without a network), part of no limit.

Every figure is the fastest of the repeats; `spread` has all. `waited_share` is the part of the fastest steps in which a
compute thread was ready to run and another process had its core. Above 5 % (`is_quiet` false) the kinds of step were
not slowed equally, and hidden shares, even above 1, say nothing: run again on a quiet machine with two cores.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from throttled_link import Pair

from rorqual.config import ModelConfig

RANK_SCRIPT = Path(__file__).with_name("expert_exchange_rank.py")
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Bandwidths to measure, as multiples of the equal point's."""

QUIET = 0.05


@dataclass(frozen=True)
class Time:
    """Seconds of the slower rank."""

    forward: float
    backward: float
    cpu: float
    """Processor seconds of the process, all threads."""
    waited: float

    @property
    def step(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Point:
    """Everything about one bandwidth."""

    bytes_per_s: float
    waves: int
    plain: Time
    overlapped: Time
    compute: Time
    comm: Time
    spread: dict[str, list[float]]

    @property
    def limit(self) -> float:
        """Seconds below which no schedule gets: pass by pass the larger of computing and communicating."""
        forward = max(self.compute.forward, self.comm.forward)
        return forward + max(self.compute.backward, self.comm.backward)

    @property
    def hidden(self) -> float | None:
        """Share of the hideable time that is hidden; None where nothing can be."""
        return hidden_share(self.plain.step, self.overlapped.step, self.limit)

    @property
    def hidden_of_whole(self) -> float | None:
        """The same against the limit that ignores the boundary between the passes."""
        return hidden_share(self.plain.step, self.overlapped.step, max(self.compute.step, self.comm.step))

    @property
    def waited_share(self) -> float:
        """How much the steps that compute waited for a core, at worst."""
        return max(t.waited / t.step for t in (self.plain, self.overlapped, self.compute))


def hidden_share(plain: float, overlapped: float, limit: float) -> float | None:
    """(plain - overlapped) / (plain - limit), or None where the plain step is at the limit already."""
    return None if plain <= limit else (plain - overlapped) / (plain - limit)


class Bench:
    """One pair of processes with the layer built, and how to time its parts."""

    def __init__(self, pair: Pair, repeats: int) -> None:
        self.pair, self.repeats = pair, repeats

    def once(self, part: str, waves: int) -> Time:
        """One step of the pair."""
        answers = self.pair.ask({"run": {"waves": waves, "part": part}})
        return Time(**{key: max(a[key] for a in answers) for key in ("forward", "backward", "cpu", "waited")})

    def by_turns(self, parts: dict[str, tuple[str, int]], repeats: int) -> dict[str, list[Time]]:
        """Repeats of several kinds of step, interleaved; a first round is thrown away."""
        found: dict[str, list[Time]] = {name: [] for name in parts}
        for number in range(repeats + 1):
            for name, (part, waves) in parts.items():
                time = self.once(part, waves)
                if number:
                    found[name].append(time)
        return found

    def point(self, bytes_per_s: float, waves: int) -> Point:
        """All measurements at one bandwidth."""
        self.pair.throttle(bytes_per_s)
        found = self.by_turns(
            {"plain": ("step", 1), "overlapped": ("step", waves), "compute": ("compute", 1), "comm": ("comm", 1)},
            self.repeats,
        )
        spread = {name: [min(t.step for t in times), max(t.step for t in times)] for name, times in found.items()}
        return Point(bytes_per_s, waves, **{name: best(times) for name, times in found.items()}, spread=spread)

    def equal_bandwidth(self, nbytes: int) -> float:
        """Bytes a second at which the messages of a step take as long as its products, within 3 % if it can be had."""
        compute = best(self.by_turns({"": ("compute", 1)}, self.repeats)[""]).step
        rate = nbytes / compute
        for _ in range(5):
            self.pair.throttle(rate)
            comm = best(self.by_turns({"": ("comm", 1)}, 2)[""]).step
            measure.note(f"{rate / 1e6:.1f} MB/s: messages take {comm:.3f} s, products {compute:.3f} s")
            if abs(comm / compute - 1) < 0.03:
                break
            rate *= comm / compute
        return rate

    def best_waves(self, bytes_per_s: float, candidates: list[int]) -> int:
        """The number of waves with the fastest step at this bandwidth."""
        self.pair.throttle(bytes_per_s)
        found = self.by_turns({str(w): ("step", w) for w in candidates}, self.repeats)
        for name, times in found.items():
            measure.note(f"{name} waves: {best(times).step:.3f} s")
        return min(candidates, key=lambda w: best(found[str(w)]).step)


def best(times: list[Time]) -> Time:
    """The fastest: what others take of a shared machine only ever adds."""
    return min(times, key=lambda t: t.step)


def line(point: Point, case: str, transport_cpu: float, config: dict[str, Any]) -> dict[str, Any]:
    """The house's JSON line; seconds are in milliseconds there."""
    p, ms = point, 1e3
    return {
        "name": "expert_exchange",
        "case": f"{case}/{p.bytes_per_s / 1e6:.1f}MBps",
        "unit": "ms a step",
        "ours": p.overlapped.step * ms,
        "peer": p.plain.step * ms,
        "peer_name": "plain exchange",
        "ratio": p.plain.step / p.overlapped.step,
        "bound": p.limit * ms,
        "bound_share": p.limit / p.overlapped.step,
        "hidden": p.hidden,
        "hidden_of_whole": p.hidden_of_whole,
        "compute_ms": [p.compute.forward * ms, p.compute.backward * ms],
        "comm_ms": [p.comm.forward * ms, p.comm.backward * ms],
        "plain_ms": [p.plain.forward * ms, p.plain.backward * ms],
        "overlapped_ms": [p.overlapped.forward * ms, p.overlapped.backward * ms],
        "compute_cpu_s": p.compute.cpu,
        "transport_cpu_s": transport_cpu,
        "waited_share": p.waited_share,
        "is_quiet": p.waited_share <= QUIET,
        "spread": {
            "ours": [t * ms for t in p.spread["overlapped"]],
            "peer": [t * ms for t in p.spread["plain"]],
        },
        "config": {**config, "waves": p.waves, "bytes_per_s": p.bytes_per_s},
    }


def plot(points: list[Point], equal: float, path: Path) -> None:
    """Step time over bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted(points, key=lambda p: p.bytes_per_s)
    rates = [p.bytes_per_s / 1e6 for p in points]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    axes.plot(rates, [p.plain.step * 1e3 for p in points], "o-", label="plain")
    axes.plot(rates, [p.overlapped.step * 1e3 for p in points], "o-", label=f"overlapped, {points[0].waves} waves")
    axes.plot(rates, [p.limit * 1e3 for p in points], "k--", label="arithmetic limit")
    axes.plot(rates, [p.compute.step * 1e3 for p in points], ":", color="gray", label="products only")
    axes.plot(rates, [p.comm.step * 1e3 for p in points], "-.", color="gray", label="messages only")
    axes.axvline(equal / 1e6, color="lightgray", zorder=0)
    axes.set(xscale="log", xlabel="bandwidth of the link, MB/s each way", ylabel="step, ms", ylim=(0, None))
    axes.set_title("Expert exchange over a throttled link")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    measure.note(f"plot: {path}")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; the equal point comes last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--quick", action="store_true", help="fewer bandwidths and repeats; under two minutes")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--preset", default="fin", help="whose experts (default: fin)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each process (default: 1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--waves", type=int, help="the overlapped exchange's waves (default: tried at the equal point)")
    parser.add_argument("--repeats", type=int, help="of every measurement (default: 7, with --quick 2)")
    options = parser.parse_args(arguments)
    cfg = ModelConfig.preset(options.preset)
    layer = {
        "tokens": options.tokens, "hidden": cfg.hidden_size, "width": cfg.moe_intermediate_size,
        "experts": cfg.n_routed_experts, "active": cfg.num_experts_per_tok, "dtype": options.dtype,
    }  # fmt: skip
    torch.set_num_threads(1)  # what the figures are of, as `machine` tells
    kind = {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]
    case = f"{measure.length_name(options.tokens)}/{options.preset}/1t/{kind}"
    with Pair(RANK_SCRIPT) as pair:
        nbytes = max(a["bytes"] for a in pair.ask({"build": layer}))
        bench = Bench(pair, options.repeats or (2 if options.quick else 7))
        equal = bench.equal_bandwidth(nbytes)
        half = cfg.n_routed_experts // 2
        tried = [w for w in ((16,) if options.quick else (2, 4, 8, 16)) if w <= half] or [half]
        waves = options.waves or (tried[0] if len(tried) == 1 else bench.best_waves(equal, tried))
        packing = best(bench.by_turns({"": ("pack", 1)}, bench.repeats)[""]).cpu
        config = {**layer, "sent_bytes": nbytes, "repeats": bench.repeats, "machine": measure.machine()}
        points = []
        factors = (0.5, 2.0, 1.0) if options.quick else (*(f for f in FACTORS if f != 1.0), 1.0)
        for factor in factors:
            point = bench.point(equal * factor, waves)
            points.append(point)
            transport_cpu = max(0.0, point.comm.cpu - packing)
            out = line(point, case, transport_cpu, config) | {"is_equal_point": factor == 1.0}
            measure.print_line(out, as_json=options.json)
            if not options.json:
                hidden = "nothing to hide" if point.hidden is None else f"{100 * point.hidden:.0f}% hidden"
                print(f"  {hidden}; messages cost {transport_cpu:.2f} s of processor time", flush=True)
    if not all(p.waited_share <= QUIET for p in points):
        measure.note("This machine was not quiet (waited_share); the hidden shares above are not to be trusted.")
    summary = {k: out[k] for k in ("case", "ratio", "hidden", "hidden_of_whole", "transport_cpu_s", "waited_share")}
    measure.note(f"equal point: {json.dumps(summary)}")
    if options.plot:
        plot(points, equal, options.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
