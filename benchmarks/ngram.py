"""How far counting gets: an interpolated Kneser-Ney n-gram model over token ids, on the tokens a training run reads.

    python benchmarks/ngram.py --run runs/minke               the stream and the held-out text of a run, beside its loss
    python benchmarks/ngram.py --recipe recipes/minke.toml    those that a run would have
    python benchmarks/ngram.py --quick --json                 a small sample of the default recipe

The yardstick of the Engram ablation: a memory of token runs should beat a table of token runs. Modified Kneser-Ney
(Chen and Goodman 1999): three discounts per order from the counts of counts, lower orders by distinct left neighbours,
a uniform distribution below the unigrams. Runs of tokens do not cross documents; a document's beginning counts as
`order - 1` tokens of its own. Counted and scored are the targets of the training loss, no others.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import note

from rorqual.train import TrainConfig, load_config
from rorqual.train.corpus_feed import build_corpus_feed
from rorqual.train.feed import Feed, Rows
from rorqual.train.loop import build_schedule

IGNORE = -100
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Discounts = tuple[float, float, float]


@dataclass(frozen=True)
class Text:
    """Documents one behind the other, each after `order - 1` start marks; `is_target` says what is predicted."""

    tokens: Ints
    is_target: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Level:
    """Counts of one run length. A run is a context (the tokens before) and a token; contexts are runs one shorter."""

    keys: Ints
    """context * (V + 1) + token of every run that occurs, rising; its place here is the run's number."""
    counts: Floats
    """By run: occurrences (longest runs) or distinct left neighbours."""
    totals: Floats
    """By context: sum of its runs' counts."""
    released: Floats
    """By context: what the discounts take from its runs, for the shorter context to give out."""
    discounts: Discounts


class NGram:
    """A fitted model; `score` gives nats per target."""

    def __init__(self, vocab_size: int, levels: list[_Level]) -> None:
        self.vocab_size, self._levels = vocab_size, levels

    @property
    def order(self) -> int:
        """Longest run: a token and `order - 1` before it."""
        return len(self._levels)

    @classmethod
    def fit(cls, text: Text, vocab_size: int, order: int, discounts: Sequence[Discounts] | None = None) -> "NGram":
        """Count `text` (made with the same `order`); `discounts`, shortest run first, replace the estimated ones."""
        base = vocab_size + 1
        keys, numbers, contexts = [], [], [np.zeros_like(text.tokens)]
        for _ in range(order):
            key = contexts[-1] * base + text.tokens
            unique, number = np.unique(key, return_inverse=True)
            keys.append(unique)
            numbers.append(number.astype(np.int64))
            contexts.append(_before(numbers[-1]))
        where = np.flatnonzero(text.is_target)
        levels: list[_Level] = []
        for length in range(order, 0, -1):
            number = numbers[length - 1]
            counts = np.bincount(number[where], minlength=len(keys[length - 1])).astype(np.float64)
            own = _discounts(counts) if discounts is None else discounts[length - 1]
            taken = counts - _discounted(counts, own)
            context = keys[length - 1] // base
            size = 1 if length == 1 else len(keys[length - 2])
            totals = np.bincount(context, counts, minlength=size)
            released = np.bincount(context, taken, minlength=size)
            levels.insert(0, _Level(keys[length - 1], counts, totals, released, own))
            # A run one shorter counts once for each different run that it ends.
            where = where[np.unique(number[where], return_index=True)[1]]
        return cls(vocab_size, levels)

    def score(self, text: Text, order: int | None = None) -> Floats:
        """-log probability of each target of `text` in nats, from runs of at most `order` tokens."""
        base = self.vocab_size + 1
        context = np.zeros_like(text.tokens)
        p = np.full(len(text.tokens), 1.0 / self.vocab_size)
        for level in self._levels[:order]:
            number = _find(level.keys, np.where(context < 0, -1, context * base + text.tokens))
            counts = np.where(number < 0, 0.0, level.counts[number])
            total = np.where(context < 0, 0.0, level.totals[context])
            share = np.where(context < 0, 0.0, level.released[context])
            known = total > 0
            higher = (_discounted(counts, level.discounts) + share * p) / np.where(known, total, 1.0)
            p = np.where(known, higher, p)
            context = _before(number)
        return -np.log(p[text.is_target])


def _before(numbers: Ints) -> Ints:
    """Each place's context one longer: the run that ends just before it (the first place is a start mark)."""
    return np.concatenate([numbers[:1], numbers[:-1]])


def _find(keys: Ints, wanted: Ints) -> Ints:
    """The place of each key, -1 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _discounted(counts: Floats, discounts: Discounts) -> Floats:
    steps = np.array([0.0, *discounts])
    return counts - steps[np.minimum(counts, 3).astype(np.int64)]


def _discounts(counts: Floats) -> Discounts:
    """D1, D2 and D3+ from how many runs occur once, twice, three and four times; 0.75 each where those do not tell."""
    n = [float((counts == k).sum()) for k in range(1, 5)]
    if all(n):
        y = n[0] / (n[0] + 2 * n[1])
        found = (1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2])
        if all(0 < d <= k for k, d in enumerate(found, 1)):
            return found
    return (0.75, 0.75, 0.75)


# ---------------------------------------------------------------- text of a run


def as_text(documents: Iterable[tuple[Ints, npt.NDArray[np.bool_]]], vocab_size: int, order: int) -> Text:
    """Documents as (ids, which of them are targets) joined, each after its start marks (one more before the first)."""
    marks, no = np.full(order - 1, vocab_size, dtype=np.int64), np.zeros(order - 1, dtype=bool)
    tokens, targets = [marks[:1]], [no[:1]]
    if order == 1:
        tokens, targets = [np.array([vocab_size])], [np.array([False])]
    for ids, is_target in documents:
        tokens += [marks, ids.astype(np.int64)]
        targets += [no, is_target]
    return Text(np.concatenate(tokens), np.concatenate(targets))


def documents_of(rows: Rows) -> Iterator[tuple[Ints, npt.NDArray[np.bool_]]]:
    """The documents of packed rows; a token is a target where the label before it says so."""
    lengths = rows.lengths or (rows.tokens.shape[1],) * rows.tokens.shape[0]
    for row, length in enumerate(lengths):
        ids, labels = rows.tokens[row, :length].numpy(), rows.labels[row, :length].numpy()
        cuts = [0, length]
        if rows.segment_ids is not None:
            segments = rows.segment_ids[row, :length].numpy()
            cuts = [0, *(np.flatnonzero(segments[1:] != segments[:-1]) + 1).tolist(), length]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            is_target = np.concatenate([[False], labels[start : stop - 1] != IGNORE])
            assert (ids[start:stop][is_target] == labels[start : stop - 1][is_target[1:]]).all()
            if stop > start:
                yield ids[start:stop], is_target


def training_rows(feed: Feed, config: TrainConfig) -> Iterator[Rows]:
    """The rows that a run of `config` trains on, in its order."""
    schedule, tokens = build_schedule(config), 0
    while tokens < schedule.total_tokens:
        count, length = schedule.rows(tokens), schedule.seq_len(tokens)
        yield feed.next_rows(count, length)
        tokens += count * length


def measure(feed: Feed, config: TrainConfig, vocab_size: int, order: int) -> dict[str, Any]:
    """Held-out loss by group of every order up to `order`, fitted on the run's training rows."""
    stream = (document for rows in training_rows(feed, config) for document in documents_of(rows))
    text = as_text(stream, vocab_size, order)
    note(f"counting {int(text.is_target.sum()):,} targets")
    model = NGram.fit(text, vocab_size, order)
    lengths = feed.token_byte_lengths()
    length = build_schedule(config).seq_len(config.schedule.total_tokens)
    groups: dict[str, list[Rows]] = {}
    for name, rows in feed.held_out(config.run.eval_tokens, length):
        groups.setdefault(name, []).append(rows)
    out: dict[str, Any] = {}
    for name, parts in groups.items():
        held = as_text((document for rows in parts for document in documents_of(rows)), vocab_size, order)
        targets = held.tokens[held.is_target]
        num_bytes = 0 if lengths is None else int(lengths.numpy()[targets].sum())
        by_order = {}
        for n in range(1, order + 1):
            nats = float(model.score(held, n).sum())
            by_order[n] = {
                "nats_per_token": nats / max(len(targets), 1),
                "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
            }
        out[name] = {"targets": len(targets), "bytes": num_bytes, "by_order": by_order}
    return {"fitted_targets": int(text.is_target.sum()), "held_out": out}


def _last_evaluation(run: Path) -> dict[str, Any]:
    """A run's last held-out figures, by group."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next((line["held_out"] for line in reversed(lines) if "held_out" in line), {})


def main() -> None:
    """One line per group of held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run: its recipe, tokenizer and loss")
    parser.add_argument("--recipe", type=Path, action="append", default=[], help="TOML recipe, without a run")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="one setting of the recipe")
    parser.add_argument("--order", type=int, default=5, choices=range(1, 9), help="longest run of tokens")
    parser.add_argument("--quick", action="store_true", help="a few thousand tokens")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    args = parser.parse_args()
    settings = list(args.settings)
    if args.quick:
        settings += ["schedule.total_tokens=200000", "run.eval_tokens=8192", "data.tokenizer_sample_bytes=500000"]
    recipes = [args.run / "config.toml"] if args.run else args.recipe
    config = load_config(recipes, settings)
    cfg = config.model.build()
    with tempfile.TemporaryDirectory(prefix="rorqual-ngram-") as folder:
        feed = build_corpus_feed(config, cfg, args.run or Path(folder))
        found = measure(feed, config, feed.tokenizer.vocab_size, args.order)
    peers = _last_evaluation(args.run) if args.run else {}
    for name, group in found["held_out"].items():
        ours, first = (group["by_order"][n]["nats_per_token"] for n in (args.order, 1))
        peer = peers[name]["nats_per_token"] if name in peers else first
        line = {
            "name": f"ngram-{name}", "case": f"{args.order}-gram", "unit": "nats/token", "ours": ours, "peer": peer,
            "peer_name": f"the run {args.run}" if name in peers else "unigram", "ratio": peer / ours,
            "bound": None, "bound_share": None, "spread": None,
            "config": {"fitted_targets": found["fitted_targets"], **group},
        }  # fmt: skip
        if args.json:
            print(json.dumps(line), flush=True)
            continue
        print(f"{name}: {group['targets']:,} targets, fitted on {found['fitted_targets']:,}")
        for n, one in group["by_order"].items():
            bits = "" if one["bits_per_byte"] is None else f"  {one['bits_per_byte']:.4f} bits/byte"
            print(f"  {n}-gram  {one['nats_per_token']:.4f} nats/token{bits}")
        if name in peers:
            print(f"  {args.run}  {peer:.4f} nats/token")


if __name__ == "__main__":
    main()
