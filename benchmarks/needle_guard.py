"""Needles in long texts: how often a query is shown the entry that holds the answer, without and with the guard.

A haystack with many needles is read once for each policy; then for each needle the state is forked, its question is
read and the beginning of its answer, up to the token before the value. For that last query the entries that hold the
value (`Transformer.cover`) are looked for among what each CSA layer attends to. A value with all its tokens in the
sliding window is read there, which counts as a hit for every policy and is told (`in_window`). NBH needs no right
answer: it asks whether the value could be read at all. Kinds of lines:

    nbh        of a length and policy: share of probes with a hit in any CSA layer (`ours`; `peer` the trained choice),
               per layer, NBH_full, by depth and by phase, Wilson intervals, random and recency choices beside them, and
               a chi-square test whether misses are spread evenly over depth and over phase
    decode     a token with the guard over one without, by turns, and the bytes factor of a CSA layer

Policies: trained (no guard), default (the guard as served), and with --ablate a smaller k (16 and 8), noise on the
scores (a tenth and a half of their standard deviation), and single sources; --keys fp4-keys has the text read with FP4
keys. Probes: `literal` questions repeat the key; `paraphrased` ones spell it in other tokens and use other words.

Minke's CSA layers are all taken: their union is the headline, and each is shown. `docs/guard.md` has the figures.

    python benchmarks/needle_guard.py --json > guard.jsonl
    python benchmarks/needle_guard.py --quick --json
    python benchmarks/needle_guard.py --plot guard.jsonl docs/img
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from guard_plots import draw_all
from guard_stats import chi_square, wilson

import rorqual
from rorqual.chat import encode_messages
from rorqual.data.tasks.needle import HAYSTACKS, Needle, NeedleFamily
from rorqual.data.tasks.world import World
from rorqual.engine.guard import DEFAULT, roles_of, rules_of
from rorqual.model import Segment, State, Trace, Transformer
from rorqual.model.guard import Guard, bytes_factor
from rorqual.ops.index_scan import IndexKeys, scan_scores

LENGTHS = {1 << 10: (64, 12), 1 << 12: (20, 40), 1 << 14: (8, 96), 1 << 16: (4, 192), 1 << 18: (2, 320)}
"""Of each length: haystacks, and needles in each."""
QUICK = {1 << 10: (6, 12), 1 << 12: (3, 40), 1 << 14: (2, 96)}
DEPTHS = 16
CHUNK = 2048
STEPS = 60


@dataclass(frozen=True)
class Probe:
    """A question about a haystack: what is read before the queried token, and the tokens that hold the value."""

    ids: list[int]
    begin: int
    end: int


@dataclass
class Text:
    """A haystack as a chat's first tokens, and its probes."""

    kind: str
    ids: list[int]
    probes: list[Probe]


def make_text(
    rng: random.Random, tokenizer: Any, family: NeedleFamily, kind: str, length: int, count: int, overlap: str
) -> Text:
    """About `length` tokens with `count` needles at random depths, in the form of a chat turn that Minke was taught."""
    opening, _ = encode_messages([{"role": "user", "content": "\0"}], thinking_mode="chat").split("\0")
    label, used = rng.choice(("code", "secret", "key", "password")), set[str]()
    keys = family._keys(rng, "test", count)
    used.update(keys)
    needles = [Needle(key, str(rng.randrange(1000, 1_000_000)), label) for key in keys]
    make = family._line_maker(rng, kind, "test", label, "number", used)
    planted = [tokenizer.encode(needle_line(one, overlap) + "\n") for one in needles]
    lines: list[list[int]] = []
    total = sum(map(len, planted)) + len(tokenizer.encode(opening))
    while total < length:
        lines.append(tokenizer.encode(make() + "\n"))
        total += len(lines[-1])
    places = sorted((rng.random(), i) for i in range(count))
    ids, spans, at = tokenizer.encode(opening), {}, 0
    for depth, i in places:
        stop = round(depth * len(lines))
        for line in lines[at:stop]:
            ids += line
        at = stop
        value = tokenizer.encode(needles[i].value)
        begin = next(j for j in range(len(planted[i])) if planted[i][j : j + len(value)] == value)
        spans[i] = len(ids) + begin, len(ids) + begin + len(value)
        ids += planted[i]
    for line in lines[at:]:
        ids += line
    probes = [Probe(tokenizer.encode(question(one, overlap)), *spans[i]) for i, one in enumerate(needles)]
    return Text(kind, ids, probes)


def needle_line(needle: Needle, overlap: str) -> str:
    """Literal: `The code of velmar is 4711.` Paraphrased: in words that the question will not repeat."""
    return needle.line() if overlap == "literal" else f"Whoever asks for {needle.key} should type {needle.value}."


def question(needle: Needle, overlap: str) -> str:
    """The end of the turn, and the answer up to its value. Paraphrased: the key spelt in capitals with hyphens, whose
    tokens are others, and other words.
    """
    _, closing = encode_messages([{"role": "user", "content": "\0"}], thinking_mode="chat").split("\0")
    if overlap == "literal":
        return f"\n{needle.question()}{closing}The {needle.label} of {needle.key} is "
    key = "-".join(needle.key.upper())
    return f"\nWhich number belongs to {key}?{closing}To {key} belongs "


def guard_of(model: Transformer, tokenizer: Any, sources: tuple[str, ...]) -> Guard | None:
    return (
        Guard(model.cfg, rules_of(model.cfg, sources), roles_of(tokenizer, model.cfg.vocab_size)) if sources else None
    )


def read(model: Transformer, ids: list[int], guard: Guard | None) -> State:
    state = model.new_state(1)
    state.guard_by(guard)
    for at in range(0, len(ids), CHUNK):
        model.step([Segment(state, ids[at : at + CHUNK])])
    return state


@dataclass(frozen=True)
class Policy:
    """A choice to look at. `k` and `noise` are applied to the query's scores; the text is read with the model's k."""

    name: str
    sources: tuple[str, ...] = ()
    k: int | None = None
    noise: float = 0.0


PLAIN = (Policy("trained"), Policy("default", DEFAULT))
ABLATED = (
    *(Policy(f"k={k}", k=k) for k in (16, 8)), *(Policy(f"noise={noise}", noise=noise) for noise in (0.1, 0.5)),
    Policy("guard,k=8", DEFAULT, k=8), Policy("guard,noise=0.5", DEFAULT, noise=0.5),
    Policy("anchors", ("anchors",)), Policy("lexical", ("lexical",)), Policy("extra", ("extra",)),
)  # fmt: skip


def looked_at(
    model: Transformer, state: State, probe: Probe, policies: list[Policy], rng: torch.Generator
) -> list[Any]:
    """What each CSA layer attends to at the probe's last token under each policy, as tensors by layer; and how many
    entries it sees.

    The scores are those of one pass with the state's own guard; another k or noise is applied to them.
    """
    mine = state.fork()
    layers = [spec.index for spec in model.cfg.layers if spec.has_indexer]
    model.step([Segment(mine, probe.ids[:-1])])
    names = [
        f"layers.{i}.attn.{what}" for i in layers for what in ("index_q", "index_weights", "index_used", "index_topk")
    ]
    trace = Trace(capture=names)
    model.forward_streams(torch.tensor([probe.ids[-1:]]), state=mine, trace=trace)
    seen = mine.lengths[0] // 4
    out = []
    for policy in policies:
        by_layer = {}
        for i in layers:
            used = trace.captured[f"layers.{i}.attn.index_used"][0, 0]
            if policy.k or policy.noise:
                own = trace.captured[f"layers.{i}.attn.index_topk"][0, 0]
                more = used[~torch.isin(used, own)] if policy.sources else used[:0]
                used = torch.cat([again(model, mine, trace, i, seen, policy, rng), more])
            by_layer[i] = used[used >= 0]
        out.append(by_layer)
    return [out, seen]


def again(
    model: Transformer, state: State, trace: Trace, layer: int, seen: int, policy: Policy, rng: torch.Generator
) -> torch.Tensor:
    """The choice with another k, or with noise on the scores."""
    q, weights = (trace.captured[f"layers.{layer}.attn.{what}"][0] for what in ("index_q", "index_weights"))
    keys = state.layers[layer].index_keys
    assert isinstance(keys, torch.Tensor)
    scores = scan_scores(q, weights.float(), IndexKeys(keys[0], model.cfg.index_head_dim), seen)[0]
    scores = scores + policy.noise * scores.std() * torch.randn(scores.shape, generator=rng)
    k = min(policy.k or model.cfg.index_topk, seen)
    return torch.sort(scores, descending=True, stable=True).indices[:k]


@dataclass
class Tally:
    """Probes of one length and policy."""

    hits: list[bool]
    full: list[bool]
    by_layer: dict[int, list[bool]]
    depths: list[int]
    phases: list[int]
    kinds: list[str]
    random_chance: list[float]
    recent: list[bool]
    added: list[int]
    in_window: list[bool]


def empty(layers: list[int]) -> Tally:
    return Tally([], [], {i: [] for i in layers}, [], [], [], [], [], [], [])


def probe_text(
    model: Transformer,
    text: Text,
    state: State,
    policies: list[Policy],
    tallies: dict[str, Tally],
    rng: torch.Generator,
) -> None:
    length = len(text.ids)
    for probe in text.probes:
        found, seen = looked_at(model, state, probe, policies, rng)
        for policy, by_layer in zip(policies, found, strict=True):
            tally = tallies[policy.name]
            layer_hits, layer_full = {}, {}
            is_near = length + len(probe.ids) - probe.begin <= model.cfg.sliding_window
            tally.in_window.append(is_near)
            for i, used in by_layer.items():
                first, last = model.cover(i, probe.begin, probe.end, seen * 4)
                held = (used >= first) & (used < last)
                layer_hits[i] = is_near or bool(held.any())
                layer_full[i] = is_near or int(held.sum()) == last - first
                tally.by_layer[i].append(layer_hits[i])
            k = policy.k or model.cfg.index_topk
            tally.hits.append(any(layer_hits.values()))
            tally.full.append(any(layer_full.values()))
            tally.depths.append(min(DEPTHS - 1, probe.begin * DEPTHS // length))
            tally.phases.append(probe.begin % 4 * 4 + (length + len(probe.ids)) % 4)
            tally.kinds.append(text.kind)
            rho = min(1.0, k / seen)
            tally.random_chance.append(1 - (1 - rho) ** (last - first))
            tally.recent.append(last > seen - k)
            tally.added.append(max(len(used) for used in by_layer.values()) - min(k, seen))


def line_of(
    length: int, policy: str, overlap: str, tally: Tally, trained: Tally, model: Transformer, dtype: str
) -> Any:
    count, hits = len(tally.hits), sum(tally.hits)
    low, high = wilson(hits, count)
    depth = {d: [h for h, at in zip(tally.hits, tally.depths, strict=True) if at == d] for d in range(DEPTHS)}
    phase = {p: [h for h, at in zip(tally.hits, tally.phases, strict=True) if at == p] for p in range(16)}
    kinds = {k: [h for h, at in zip(tally.hits, tally.kinds, strict=True) if at == k] for k in sorted(set(tally.kinds))}
    added = statistics.fmean(tally.added)
    return {
        "name": "needle_guard", "case": f"{measure.length_name(length)}/minke/{torch.get_num_threads()}t/{dtype}",
        "kind": "nbh", "policy": policy, "overlap": overlap, "unit": "share of needles with an entry read",
        "ours": hits / count, "peer": statistics.fmean(trained.hits), "peer_name": "trained choice of k",
        "ratio": (hits / count) / max(1e-9, statistics.fmean(trained.hits)), "bound": 1.0, "bound_share": hits / count,
        "spread": {"ours": [low, high], "peer": [*wilson(sum(trained.hits), count)]},
        "config": {
            "probes": count, "misses": count - hits, "in_window": sum(tally.in_window),
            "rho": model.cfg.index_topk / (length / 4),
            "nbh_full": statistics.fmean(tally.full),
            "by_layer": {str(i): statistics.fmean(found) for i, found in tally.by_layer.items()},
            "by_depth": {str(d): [sum(found), len(found)] for d, found in depth.items()},
            "by_phase": {str(p): [sum(found), len(found)] for p, found in phase.items()},
            "by_haystack": {kind: [sum(found), len(found)] for kind, found in kinds.items()},
            "uniform_over_depth": chi_square([*depth.values()]), "uniform_over_phase": chi_square([*phase.values()]),
            "random": statistics.fmean(tally.random_chance), "recency": statistics.fmean(tally.recent),
            "entries_added": added, "bytes_factor": bytes_factor(model.cfg, length, added), **measure.machine(),
        },
    }  # fmt: skip


def measure_length(
    model: Transformer,
    tokenizer: Any,
    length: int,
    haystacks: int,
    needles: int,
    overlap: str,
    ablate: bool,
    options: Any,
) -> None:
    rng, noise = random.Random(f"{options.seed}/{length}/{overlap}"), torch.Generator().manual_seed(options.seed)
    family = NeedleFamily(World.build(), count_tokens=lambda text: len(tokenizer.encode(text)))
    policies = [one for one in (*PLAIN, *(ABLATED if ablate else ())) if one.name in (options.policies or [one.name])]
    layers = [spec.index for spec in model.cfg.layers if spec.has_indexer]
    tallies = {policy.name: empty(layers) for policy in policies}
    for number in range(haystacks):
        began = time.perf_counter()
        text = make_text(rng, tokenizer, family, HAYSTACKS[number % len(HAYSTACKS)], length, needles, overlap)
        for sources in dict.fromkeys(policy.sources for policy in policies):
            mine = [policy for policy in policies if policy.sources == sources]
            probe_text(model, text, read(model, text.ids, guard_of(model, tokenizer, sources)), mine, tallies, noise)
        measure.note(f"{length} {overlap} haystack {number + 1}/{haystacks}: {time.perf_counter() - began:.0f} s")
    for policy in policies:
        print_line(
            line_of(
                length, policy.name, overlap, tallies[policy.name], tallies[policies[0].name], model, options.dtype
            ),
            as_json=options.json,
        )


def decode_line(model: Transformer, tokenizer: Any, length: int, options: Any) -> Any:
    """A token with the guard and one without, by turns."""
    rng = random.Random(length)
    family = NeedleFamily(World.build(), count_tokens=lambda text: len(tokenizer.encode(text)))
    ids = make_text(rng, tokenizer, family, "zipf", length, 4, "literal").ids
    states = {"off": read(model, ids, None), "on": read(model, ids, guard_of(model, tokenizer, DEFAULT))}
    times: dict[str, list[float]] = {"off": [], "on": []}
    ratios = []
    for step in range(STEPS + 10):
        pair = {}
        for name in ("off", "on") if step % 2 else ("on", "off"):
            began = time.perf_counter()
            model.next_scores([Segment(states[name], [ids[step]])])
            pair[name] = time.perf_counter() - began
        if step >= 10:
            ratios.append(pair["on"] / pair["off"])
            for name, seconds in pair.items():
                times[name].append(1e3 * seconds)
    guard = states["on"].guard
    assert guard is not None
    on, off = statistics.median(times["on"]), statistics.median(times["off"])
    added = guard.added / max(1, guard.queries)
    return {
        "name": "needle_guard",
        "case": f"{measure.length_name(length)}/minke/{torch.get_num_threads()}t/{options.dtype}",
        "kind": "decode", "policy": "default", "overlap": "", "unit": "ms a token", "ours": on, "peer": off,
        "peer_name": "without the guard", "ratio": off / on, "bound": None, "bound_share": None,
        "spread": {"ours": [min(times["on"]), max(times["on"])], "peer": [min(times["off"]), max(times["off"])]},
        "config": {
            "cost": on / off, "median_of_ratios": statistics.median(ratios), "steps": STEPS, "entries_added": added,
            "bytes_factor": bytes_factor(model.cfg, length, added), **measure.machine(),
        },
    }  # fmt: skip


def print_line(line: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        measure.print_line(line, as_json=True)
    elif line["kind"] == "decode":
        config = line["config"]
        told = f"{line['case']}: {line['ours']:.3f} ms a token with the guard, {line['peer']:.3f} without: "
        print(f"{told}{config['cost']:.2f} times; bytes {config['bytes_factor']:.2f}", flush=True)
    else:
        config = line["config"]
        layers = ", ".join(f"layer {i} {100 * share:.1f}" for i, share in config["by_layer"].items())
        told = f"{line['case']} {line['overlap']} {line['policy']}: {100 * line['ours']:.2f} % of {config['probes']} "
        even = [f"{what} p = {config[f'uniform_over_{what}']['p']:.2g}" for what in ("depth", "phase")]
        print(f"{told}({layers}); random {100 * config['random']:.1f}; even misses: {', '.join(even)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few probes, up to 16K")
    parser.add_argument("--lengths", type=int, nargs="+", default=[*LENGTHS], help="tokens, of those known")
    parser.add_argument("--only", choices=("literal", "paraphrased", "decode"), nargs="+", help="instead of all")
    parser.add_argument("--ablate", action="store_true", help="also smaller k, noise and single sources, up to 16K")
    parser.add_argument("--keys", choices=("exact", "fp4-keys"), default="exact", help="how index keys are kept")
    parser.add_argument("--policies", nargs="+", help="instead of all; the first stands as the peer")
    parser.add_argument("--haystacks", type=int, nargs=2, metavar=("NUMBER", "NEEDLES"), help="instead of those known")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("LINES", "FOLDER"), help="draw figures of earlier lines")
    options = parser.parse_args()
    if options.plot:
        lines = [json.loads(text) for text in options.plot[0].read_text().splitlines()]
        draw_all(lines, options.plot[1])
        return
    sizes = QUICK if options.quick else {length: LENGTHS[length] for length in options.lengths}
    if options.haystacks:
        sizes = {length: tuple(options.haystacks) for length in sizes}
    model, tokenizer = rorqual.load("minke", dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    if options.keys != "exact":
        from rorqual.model.quantised import keep_cache_as

        keep_cache_as(model, options.keys)
    wanted = options.only or ("literal", "paraphrased", "decode")
    with torch.inference_mode():
        for length, (haystacks, needles) in sizes.items():
            for overlap in ("literal", "paraphrased"):
                if overlap in wanted:
                    count = haystacks if overlap == "literal" else max(1, haystacks // 2)
                    ablate = options.ablate and overlap == "literal" and length <= 1 << 14
                    measure_length(model, tokenizer, length, count, needles, overlap, ablate, options)
            if "decode" in wanted:
                print_line(decode_line(model, tokenizer, length, options), as_json=options.json)


if __name__ == "__main__":
    main()
