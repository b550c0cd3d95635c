"""What packed weights and packed memories cost in quality, and what they save: a line a choice, beside the exact model.

    python benchmarks/quantised_quality.py [--model minke] [--windows 24] [--json] [--quick]

Each choice reads the same held-out files (those that the bundled model's recipe set aside), their first 2,048 tokens
each, in one call; the first 128 tokens, which no indexer needs to choose for, count too.

    bits_per_byte    cross-entropy in bits per byte of text (`ours`); `peer` is the exact model's, `ratio` peer / ours
    top1_agreement   share of positions where the likeliest token is the exact model's
    index_recall     share of the entries picked by the exact model's indexers that are picked too, where they choose
    weight_bytes     of all parameters; state_bytes_per_token: entries and index keys of a long sequence
    step_ms          one token of one sequence after 2,048 tokens, median; by turns with the exact model's

`weights/...` keep matrices packed (`rorqual.load(weights=...)`), `cache/...` the memory (`load(cache=...)`), `all` is
the released combination of both. The model was trained without any of this rounding, so these are costs of rounding
afterwards; `qat.py` measures training with it.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import measure
import torch
from torch import Tensor

from rorqual import load
from rorqual.data import python_corpus
from rorqual.model import Segment, State, Trace, Transformer
from rorqual.model.cache_format import row_of
from rorqual.model.packed_weights import packed
from rorqual.tokenizer import Tokenizer

LENGTH = 2048
CHOICES: dict[str, dict[str, str]] = {
    "weights/bf16": {"weights": "bf16"}, "weights/int8": {"weights": "int8"}, "weights/fp8": {"weights": "fp8"},
    "weights/fp4": {"weights": "fp4"}, "weights/fp4-int8": {"weights": "fp4-int8"},
    "weights/fp4-bf16": {"weights": "fp4-bf16"}, "cache/fp4-keys": {"cache": "fp4-keys"}, "cache/fp8": {"cache": "fp8"},
    "all": {"weights": "fp4", "cache": "fp8"},
}  # fmt: skip


def windows(tokenizer: Tokenizer, count: int, held_out: float) -> list[Tensor]:
    """The first LENGTH tokens of `count` held-out files that have as many: int64 [1, LENGTH] each."""
    _, corpus = python_corpus(include_tests=True).split(held_out)
    out: list[Tensor] = []
    for document in corpus.documents:
        if len(document.text) > 2 * LENGTH:
            ids = tokenizer.encode(document.text)[:LENGTH]
            if len(ids) == LENGTH:
                out.append(torch.tensor([ids]))
        if len(out) == count:
            break
    return out


class Reading:
    """What a model makes of the windows."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, texts: list[Tensor]) -> None:
        lengths = torch.tensor(tokenizer.text_byte_lengths)
        self.best: list[Tensor] = []
        """Likeliest token ids, [LENGTH - 1] a window."""
        self.picks: list[dict[str, Tensor]] = []
        """Entries picked by each indexer, [LENGTH, k] a window."""
        nats = num_bytes = 0.0
        names = frozenset(f"layers.{spec.index}.attn.index_topk" for spec in model.cfg.layers if spec.has_indexer)
        for ids in texts:
            trace = Trace(capture=names)
            with torch.inference_mode():
                logits = model(ids, trace=trace)[0, :-1]
                nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            num_bytes += float(lengths[ids[0, 1:]].sum())
            self.best.append(logits.argmax(-1))
            self.picks.append({name: value[0] for name, value in trace.captured.items()})
        self.bits_per_byte = nats / math.log(2) / num_bytes

    def agreement(self, other: "Reading") -> float:
        """Share of positions with the same likeliest token."""
        return float((torch.cat(self.best) == torch.cat(other.best)).float().mean())

    def recall(self, other: "Reading", ratio: int, top_k: int) -> float:
        """Share of the picks of `other` that are here too, at queries that see more than `top_k` entries."""
        seen = (torch.arange(LENGTH) + 1) // ratio
        here = theirs = 0
        for mine, wanted in zip(self.picks, other.picks, strict=True):
            for name, picks in wanted.items():
                for a, b in zip(mine[name][seen > top_k].tolist(), picks[seen > top_k].tolist(), strict=True):
                    here, theirs = here + len({*a} & {*b} - {-1}), theirs + len({*b} - {-1})
        return here / max(1, theirs)


def step_seconds(models: list[tuple[Transformer, State]], repeats: int) -> list[float]:
    """Median seconds of a step of each, by turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(repeats):
            for (model, state), kept in zip(models, times, strict=True):
                begin = time.perf_counter()
                model.logits(model.final_hidden(model.step([Segment(state, torch.tensor([5]))])))
                kept.append(time.perf_counter() - begin)
    return [statistics.median(kept[2:]) for kept in times]


def weight_bytes(model: Transformer) -> int:
    """Of parameters and packed weights."""
    return sum(p.nbytes for p in model.parameters()) + sum(weight.nbytes for _, weight in packed(model))


def state_bytes_per_token(model: Transformer) -> float:
    """Of entries and index keys, without windows."""
    total = 0.0
    for spec in model.cfg.layers:
        for part in ("entries", "index_keys") if spec.has_indexer else ("entries",):
            width, kind = row_of(model.cfg, part, model.reference.dtype)
            total += width * kind.itemsize / spec.compress_ratio if spec.compress_ratio else 0
    return total


def lines(name: str, count: int, held_out: float, repeats: int) -> Iterator[dict[str, Any]]:
    exact, tokenizer = load(name, cache="exact")
    texts = windows(tokenizer, count, held_out)
    wanted, states = Reading(exact, tokenizer, texts), exact.new_state()
    ratio = min((spec.compress_ratio for spec in exact.cfg.layers if spec.has_indexer), default=1)
    with torch.inference_mode():
        exact(texts[0], state=states)
    for case, options in CHOICES.items():
        model, _ = load(name, **{"cache": "exact", **options})
        found, state = Reading(model, tokenizer, texts), model.new_state()
        with torch.inference_mode():
            model(texts[0], state=state)
        mine, theirs = step_seconds([(model, state), (exact, states)], repeats)
        yield {
            "name": "quantised_quality",
            "case": f"{name}/{case}/{torch.get_num_threads()}t",
            "unit": "bits per byte",
            "ours": found.bits_per_byte,
            "peer": wanted.bits_per_byte,
            "peer_name": "the exact model",
            "ratio": wanted.bits_per_byte / found.bits_per_byte,
            "config": {
                "top1_agreement": found.agreement(wanted),
                "index_recall": found.recall(wanted, ratio, exact.cfg.index_topk),
                "weight_bytes": weight_bytes(model), "exact_weight_bytes": weight_bytes(exact),
                "state_bytes_per_token": state_bytes_per_token(model),
                "exact_state_bytes_per_token": state_bytes_per_token(exact), "step_ms": 1e3 * mine,
                "exact_step_ms": 1e3 * theirs, "tokens": len(texts) * LENGTH, **measure.machine(),
            },
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minke", help="bundled name or model folder")
    parser.add_argument("--windows", type=int, default=24, help="held-out files to read")
    parser.add_argument("--held-out", type=float, default=0.02, help="share that the model's recipe set aside")
    parser.add_argument("--quick", action="store_true", help="3 files, one thread")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for threads in (1,) if options.quick else (1, 2):
        torch.set_num_threads(threads)
        count = 3 if options.quick else options.windows
        for line in lines(options.model, count, options.held_out, 12 if options.quick else 200):
            if options.json:
                measure.print_line(line, as_json=True)
                continue
            more = line["config"]
            print(
                f"{line['case']}: {line['ours']:.4f} bits/byte (exact {line['peer']:.4f}), same token "
                f"{more['top1_agreement']:.2%}, same entries {more['index_recall']:.2%}, weights "
                f"{more['weight_bytes'] / 1e6:.2f} MB of {more['exact_weight_bytes'] / 1e6:.2f}, state "
                f"{more['state_bytes_per_token']:.0f} bytes a token of {more['exact_state_bytes_per_token']:.0f}, step "
                f"{more['step_ms']:.2f} ms (exact {more['exact_step_ms']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
