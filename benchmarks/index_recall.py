"""What the grouped index search misses on a long text, and what it saves: a line a length, beside the exact search.

Both sides are the bundled model on the same Python files, one behind the other, up to the length. The text is read once
with the exact search. Its last tokens are read with either: from there on

    ours             share of the exact search's picks that the grouped search finds too, mean over layers and queries
    mass             of the attention mass that the exact picks of a layer catch, the share that the grouped ones do
    top1_agreement   share of positions with the same likeliest token
    bits_per_token   cross-entropy of the text's own tokens, with either
    step_ms          one more token, median; by turns

Then the text is read a second time with the grouped search throughout, as a server with `--index-search grouped` does:
`grouped.bits_per_token` and `top1_agreement` of its last tokens say what all approximations together come to, and
`prompt_tokens_per_s` has the rates of both readings.

    python benchmarks/index_recall.py --json
    python benchmarks/index_recall.py --quick
"""

import argparse
import math
import statistics
import time
from typing import Any

import measure
import torch
from torch import Tensor

import rorqual
from rorqual.data import python_corpus
from rorqual.model import Segment, State, Trace, Transformer
from rorqual.model.index_groups import search_index_by

LAST, PROBED = 1024, 64
"""Tokens at the end that are scored, and those of them whose picks and attention are looked at."""
CHUNK = 2048
STEPS = 24


def long_text(tokenizer: Any, length: int) -> Tensor:
    """The first `length` tokens of all Python files of the corpus, int64."""
    ids: list[int] = []
    for document in python_corpus(include_tests=True).documents:
        ids += tokenizer.encode(document.text)
        if len(ids) >= length:
            return torch.tensor(ids[:length])
    raise SystemExit(f"the corpus has {len(ids):,} tokens, and {length:,} are asked for; give smaller --lengths.")


def read(model: Transformer, state: State, ids: Tensor) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    for part in ids.split(CHUNK):
        model.step([Segment(state, part)])
    return len(ids) / (time.perf_counter() - began)


def in_search(model: Transformer, state: State, search: str) -> State:
    """A copy of a state that goes on with another search, which is not allowed to a user: a text is read by one."""
    search_index_by(model, search)
    copy = state.fork()
    copy.index_search = search
    return copy


def scored(model: Transformer, state: State, ids: Tensor) -> tuple[Tensor, float]:
    """The likeliest token behind each of `ids` but the last, and bits a token."""
    logits = model.logits(model.final_hidden(model.step([Segment(state, ids)])))[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    return logits.argmax(-1), float(loss) / math.log(2)


def looked_at(model: Transformer, state: State, ids: Tensor) -> tuple[dict[str, Tensor], list[float]]:
    """Each indexer's picks, and the share of its layer's attention mass that they catch."""
    trace = Trace(index_loss=True, capture={f"layers.{i}.attn.index_topk" for i in range(len(model.layers))})
    model.forward_streams(ids[None], state=state, trace=trace)
    return trace.captured, [float(recall) for recall in trace.index_recall]


def shared(mine: Tensor, theirs: Tensor) -> float:
    """Share of `theirs` [1, S, k] that stands in `mine` too."""
    return float((theirs[..., None] == mine[..., None, :]).any(-1).float().mean())


def step_ms(model: Transformer, states: dict[str, State]) -> dict[str, float]:
    """A token of either, by turns."""
    times: dict[str, list[float]] = {search: [] for search in states}
    for search, state in states.items():
        search_index_by(model, search)
        for _ in range(STEPS):
            began = time.perf_counter()
            model.next_scores([Segment(state, [17])])
            times[search].append(1e3 * (time.perf_counter() - began))
    return {search: statistics.median(values[4:]) for search, values in times.items()}


def measure_length(model: Transformer, ids: Tensor, dtype: str) -> dict[str, Any]:
    """One line."""
    length, config = len(ids), {}
    search_index_by(model, "exact")
    state, rates = model.new_state(), {}
    rates["exact"] = read(model, state, ids[: length - LAST])
    likeliest, bits, picks, masses, after = {}, {}, {}, {}, {}
    for search in ("exact", "grouped"):
        probe = in_search(model, state, search)
        picks[search], masses[search] = looked_at(model, probe, ids[length - LAST : length - LAST + PROBED])
        after[search] = in_search(model, state, search)
        likeliest[search], bits[search] = scored(model, after[search], ids[length - LAST :])
    config["step_ms"] = step_ms(model, after)
    search_index_by(model, "grouped")
    whole = model.new_state()
    rates["grouped"] = read(model, whole, ids[: length - LAST])
    likeliest["whole"], bits["whole"] = scored(model, whole, ids[length - LAST :])
    recalls = {name: shared(picks["grouped"][name], theirs) for name, theirs in picks["exact"].items()}
    config |= {
        "recall": recalls,
        "mass": [a / b for a, b in zip(masses["grouped"], masses["exact"], strict=True)],
        "mass_of_exact": masses["exact"],
        "top1_agreement": float((likeliest["grouped"] == likeliest["exact"]).float().mean()),
        "bits_per_token": {"exact": bits["exact"], "grouped": bits["grouped"]},
        "grouped": {
            "top1_agreement": float((likeliest["whole"] == likeliest["exact"]).float().mean()),
            "bits_per_token": bits["whole"],
        },
        "prompt_tokens_per_s": rates, "probed": PROBED, "scored": LAST - 1, **measure.machine(),
    }  # fmt: skip
    return {
        "name": "index_recall",
        "case": f"{measure.length_name(length)}/minke/{torch.get_num_threads()}t/{dtype}",
        "unit": "share of the exact picks",
        "ours": statistics.mean(recalls.values()),
        "peer": 1.0,
        "peer_name": "exact search",
        "ratio": config["step_ms"]["exact"] / config["step_ms"]["grouped"],
        "bound": None,
        "bound_share": None,
        "spread": {"ours": [min(recalls.values()), max(recalls.values())], "peer": [1.0, 1.0]},
        "config": config,
    }


def print_line(line: dict[str, Any], *, as_json: bool) -> None:
    """As `measure.print_line`, with what the picks mean."""
    if as_json:
        measure.print_line(line, as_json=True)
        return
    config = line["config"]
    bits = config["bits_per_token"]
    print(
        f"{line['case']}: {100 * line['ours']:.1f} % of the exact picks, {100 * min(config['mass']):.1f} % of their "
        f"attention mass and more; {100 * config['top1_agreement']:.1f} % the same likeliest tokens; "
        f"{bits['grouped']:.4f} bits a token for {bits['exact']:.4f} (all grouped: "
        f"{config['grouped']['bits_per_token']:.4f}); a step takes {config['step_ms']['grouped']:.2f} ms for "
        f"{config['step_ms']['exact']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="32K and 128K")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 15, 1 << 17, 1 << 19], help="tokens")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    lengths = [1 << 15, 1 << 17] if options.quick else options.lengths
    model, tokenizer = rorqual.load("minke", dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    text = long_text(tokenizer, max(lengths))
    with torch.inference_mode():
        for length in lengths:
            print_line(measure_length(model, text[:length], options.dtype), as_json=options.json)


if __name__ == "__main__":
    main()
