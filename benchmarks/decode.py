"""Decoding one sequence, greedily: tokens per second at contexts from 1K to 1M, against transformers where it can run.

Ours is what the engine runs for a request that is alone: `Transformer.next_scores`, whose likeliest token comes next.
The line `decode.engine` is the engine itself, from submitting a prompt to its token events, at one context.

* Up to 8K both sides read the same prompt first (not timed) and must then produce the same tokens from the same
  weights; the peer is called token by token with its own cache, without a generation wrapper.
* Beyond, prefilling would take longer than what is measured, and the peer cannot hold the scores. There our state is
  filled with random entries, keys and windows of the sizes that so many tokens leave: a step reads and computes as
  much whatever the values are, and nothing is said about what it answers.

Three ways to keep and search index keys are measured: `exact` keeps what is computed; `fp4-keys` packs index keys, of
which a step reads all, into FP4 (what that costs in quality: `quantised_quality.py`); `grouped` keeps them as they are
and searches them by groups (what it misses: `index_recall.py`). The line `decode.growth` is the step at 1M over the
step at 8K of the same way.

The line `decode.best` is our faster dtype against the peer's faster one at 8K.

The bound of a line is the measured rate of reading memory over the bytes that a step cannot do without: every matrix a
token is multiplied with, all index keys (a grouped search reads fewer, and is held to the same bound), all entries of
heavily compressed layers, picked entries and windows of the others. The rate is that of matrix-vector products over a
matrix of that size, so caches count for both.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import measure
import torch
from peers import CONFIG, PEER, activated_weights, build_pair
from torch import Tensor

import rorqual
from rorqual.engine.selftest.subject import IdsOnly
from rorqual.model import Segment, State, Transformer
from rorqual.model.cache_format import row_of
from rorqual.model.index_groups import search_index_by
from rorqual.model.quantised import keep_cache_as
from rorqual.ops.cache_codec import encode_entries, encode_index_keys

CONTEXTS = (1024, 8192, 32768, 262144, 1048576)
PEER_UP_TO = 8192
CHUNK = 2048
WAYS = ("exact", "fp4-keys", "grouped")
PARTS = ("entries", "index_keys")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def filled_state(model: Transformer, length: int) -> State:
    """A state as after `length` tokens, with random values in it."""
    draw, cfg = torch.Generator().manual_seed(length), model.cfg
    state = model.new_state()
    for layer, spec in zip(state.layers, model.cfg.layers, strict=True):
        if spec.compress_ratio:
            layer.make_room(length // spec.compress_ratio + 1024)
        for name, tensor in layer.tensors().items():
            if tensor.dtype != torch.uint8:
                tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float32))
                continue
            width = cfg.head_dim if name == "entries" else cfg.index_head_dim
            values = torch.randn((*tensor.shape[:-1], width), generator=draw)
            pack = partial(encode_entries, nope_dim=cfg.nope_head_dim) if name == "entries" else encode_index_keys
            tensor.copy_(pack(values))
    state.hold(torch.randint(0, model.cfg.vocab_size, (length,), generator=draw))
    state.floor = [length]
    return state


def read_state(model: Transformer, tokens: Tensor) -> State:
    """A state that has read tokens [1, S]."""
    state = model.new_state()
    for part in tokens.split(CHUNK, 1):
        model.forward_streams(part, state=state)
    return state


def state_bytes(model: Transformer, length: int) -> int:
    """Bytes of a sequence's memory that a step reads: windows, index keys, and entries as far as they are used."""
    cfg, dtype = model.cfg, model.reference.dtype
    entry, key = (width * kind.itemsize for width, kind in (row_of(cfg, part, dtype) for part in PARTS))
    total = 0
    for spec in cfg.layers:
        total += min(length, cfg.sliding_window) * cfg.head_dim * dtype.itemsize
        if spec.compress_ratio:
            entries = length // spec.compress_ratio
            total += (min(entries, cfg.index_topk) if spec.has_indexer else entries) * entry
            if spec.has_indexer and entries > cfg.index_topk:
                total += entries * key
    return total


def ours_step(model: Transformer, state: State) -> Callable[[int], int]:
    """A function from a token to the next one."""

    def step(token: int) -> int:
        return model.next_scores([Segment(state, [token])]).best[0]

    return step


def peer_step(peer: Any, tokens: Tensor) -> tuple[Callable[[int], int], int]:
    """The same for the peer after the prompt [1, S], and its first token."""
    cache = out = None
    for part in tokens.split(CHUNK, 1):
        out = peer(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    assert out is not None

    def step(token: int) -> int:
        return int(peer(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())

    return step, int(out.logits[0, -1].argmax())


def decoded(step: Callable[[int], int], count: int, place: dict[str, Any]) -> measure.Rate:
    """Take `count` steps from place["token"]; what they produce is added to place["tokens"]."""
    token, found = place["token"], place["tokens"]
    watch = measure.Stopwatch()
    for _ in range(count):
        token = step(token)
        found.append(token)
    rate = watch.rate(count)
    place["token"] = token
    return rate


def measure_context(
    ours: Transformer, peer: Any, name: str, length: int, dtype: str, way: str, count: int, repeats: int
) -> dict[str, Any]:
    """One line."""
    prompt = torch.randint(0, ours.cfg.vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
    failure = None
    a: list[measure.Rate] = []
    b: list[measure.Rate] = []
    if length <= PEER_UP_TO and peer is not None:
        theirs, first = peer_step(peer, prompt)
        mine = ours_step(ours, read_state(ours, prompt))
        places = [{"token": first, "tokens": []} for _ in range(2)]
        runs = [partial(decoded, step, count, place) for step, place in zip((mine, theirs), places, strict=True)]
        a, b = measure.interleaved(runs[0], runs[1], repeats)
        if places[0]["tokens"] != places[1]["tokens"] and dtype == "fp32":
            raise SystemExit("The two networks decoded different tokens; their speeds cannot be compared.")
    else:
        failure = f"not run: its scores are prompt x prompt, {length:,} tokens are beyond this machine"
        if peer is None:
            failure = "not run in this case"
        state = read_state(ours, prompt) if length <= PEER_UP_TO else filled_state(ours, length)
        mine, place = ours_step(ours, state), {"token": 5, "tokens": []}
        a = [decoded(mine, count, place) for _ in range(repeats + 1)][1:]
    touched = ours.reference.element_size() * activated_weights(ours, ours.cfg) + state_bytes(ours, length)
    bound = measure.weight_bytes_per_s(touched) / touched
    walls = [rate.wall for rate in a], [rate.wall for rate in b]
    mine_s, peer_s = measure.middle(walls[0]), measure.middle(walls[1]) if b else None
    return {
        "name": "decode",
        "case": f"{length_name(length)}/{name}/{torch.get_num_threads()}t/{dtype}/{way}",
        "unit": "tokens/s",
        "ours": mine_s,
        "peer": peer_s,
        "peer_name": PEER,
        "ratio": None if peer_s is None else mine_s / peer_s,
        "peer_failure": failure,
        "bound": bound,
        "bound_share": mine_s / bound,
        "spread": measure.spread(*walls),
        "config": {
            "batch": 1, "new_tokens": count, "repeats": len(a), "model": name, "step_ms": 1e3 / mine_s,
            "step_cpu_ms": 1e3 / measure.middle([rate.cpu for rate in a]),
            "bytes_per_step": touched, "state": "read" if length <= PEER_UP_TO else "random", **measure.machine(),
        },
    }  # fmt: skip


def measure_engine(model: Transformer, name: str, length: int, dtype: str, count: int, repeats: int) -> dict[str, Any]:
    """The line of the engine: tokens per second between the first and the last token event of a request."""
    prompt = torch.randint(0, model.cfg.vocab_size, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    walls: list[float] = []
    with rorqual.Engine(model, IdsOnly(model.cfg.vocab_size)) as engine:
        for _ in range(repeats + 1):
            times: list[float] = []

            def note(event: Any, times: list[float] = times) -> None:
                times.append(time.perf_counter())

            params = rorqual.SamplingParams(max_tokens=count, temperature=0.0)
            engine.submit(prompt, params, listener=note).result()
            walls.append((len(times) - 1) / (times[-1] - times[0]))
    walls = walls[1:]
    touched = model.reference.element_size() * activated_weights(model, model.cfg) + state_bytes(model, length)
    bound, mine = measure.weight_bytes_per_s(touched) / touched, measure.middle(walls)
    return {
        "name": "decode.engine",
        "case": f"{length_name(length)}/{name}/{torch.get_num_threads()}t/{dtype}",
        "unit": "tokens/s",
        "ours": mine,
        "peer": None,
        "peer_name": PEER,
        "ratio": None,
        "peer_failure": "not run: the case `decode` of the same length has it",
        "bound": bound,
        "bound_share": mine / bound,
        "spread": measure.spread(walls, []),
        "config": {"batch": 1, "new_tokens": count, "repeats": len(walls), "model": name, **measure.machine()},
    }


def growth(name: str, dtype: str, way: str, steps: dict[int, float], cpu: dict[int, float]) -> dict[str, Any]:
    """How much longer a step takes at 1M tokens than at 8K; `cpu`: by processor time."""
    short, long = steps[PEER_UP_TO], steps[CONTEXTS[-1]]
    return {
        "name": "decode.growth",
        "case": f"{name}/{torch.get_num_threads()}t/{dtype}/{way}",
        "unit": "times the step at 8K",
        "ours": long / short,
        "peer": None,
        "peer_name": PEER,
        "ratio": None,
        "peer_failure": "not run: it cannot hold 1M tokens here",
        "bound": 3.0,
        "bound_share": 3.0 * short / long,
        "config": {
            "step_ms": steps,
            "step_cpu_ms": cpu,
            "cpu_growth": cpu[CONTEXTS[-1]] / cpu[PEER_UP_TO],
            **measure.machine(),
        },
    }


def length_name(length: int) -> str:
    """`1048576` -> `1M`."""
    return "1M" if length == 1 << 20 else measure.length_name(length)


def models(dtype: str) -> Iterator[tuple[str, Transformer, Any]]:
    """Name, ours and the peer with the same weights, for both configurations."""
    small = rorqual.ModelConfig.from_dict(json.loads(CONFIG.read_text()))
    minke = rorqual.ModelConfig.preset("minke").replace(num_nextn_predict_layers=0)
    for name, config in (("small", small), ("minke", minke)):
        ours, peer = build_pair(config)
        yield name, ours.eval().to(DTYPES[dtype]), peer.eval().to(DTYPES[dtype])


def measure_way(
    ours: Transformer, peer: Any, name: str, dtype: str, way: str, repeats: int, *, as_json: bool
) -> dict[int, dict[str, Any]]:
    """The lines of one of `WAYS` by context, printed as they come; the last tells how a step grows."""
    keep_cache_as(ours, "exact" if way == "grouped" else way)
    search_index_by(ours, "grouped" if way == "grouped" else "exact")
    lines = {}
    for length in CONTEXTS if way == "exact" else CONTEXTS[1:]:
        count = 64 if length <= PEER_UP_TO else 32
        rival = peer if way == "exact" else None
        lines[length] = measure_context(ours, rival, name, length, dtype, way, count, repeats)
        measure.print_line(lines[length], as_json=as_json)
    steps = {length: line["config"]["step_ms"] for length, line in lines.items()}
    cpu = {length: line["config"]["step_cpu_ms"] for length, line in lines.items()}
    measure.print_line(growth(name, dtype, way, steps, cpu), as_json=as_json)
    return lines


def best_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Our faster dtype against the peer's faster one, at one context."""
    mine, theirs = (max(lines, key=lambda line: line[side]) for side in ("ours", "peer"))
    length, name, threads, dtype, _ = mine["case"].split("/")
    return mine | {
        "name": "decode.best",
        "case": f"{length}/{name}/{threads}/best",
        "peer": theirs["peer"],
        "ratio": mine["ours"] / theirs["peer"],
        "config": mine["config"] | {"ours_dtype": dtype, "peer_dtype": theirs["case"].split("/")[3]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat of each case, one thread")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to keep and search index keys")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads to measure with")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    for threads in options.threads or ((1,) if options.quick else (1, 2)):
        torch.set_num_threads(threads)
        shared: dict[str, list[dict[str, Any]]] = {}
        for dtype in DTYPES:
            for name, ours, peer in models(dtype):
                with torch.inference_mode():
                    for way in options.ways:
                        lines = measure_way(ours, peer, name, dtype, way, repeats, as_json=options.json)
                        if way == "exact":
                            shared.setdefault(name, []).append(lines[PEER_UP_TO])
                    if "exact" not in options.ways:
                        continue
                    keep_cache_as(ours, "exact")
                    search_index_by(ours, "exact")
                    line = measure_engine(ours, name, 8192, dtype, 128, repeats)
                    measure.print_line(line, as_json=options.json)
        for lines_of_name in shared.values():
            measure.print_line(best_of(lines_of_name), as_json=options.json)


if __name__ == "__main__":
    main()
