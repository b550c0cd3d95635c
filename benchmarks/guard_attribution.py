"""Why needle items fail: each gets one label by causal tests, the first that fits.

Items are those of the needle family that Minke was trained for (`data/tasks/needle.py`, test split), at lengths where
it can answer at all. The deployed engine (bf16) answers greedily; each wrong item is run again:

    ENGINE       the reference (fp32, layer code) is right
    TIE          the deployed engine, asked again, says something else
    MODEL        wrong with every entry visible (DENSE), and with the needle's lines alone or in the window at the end
    COMPRESSION  wrong with DENSE, right when the needle's line stands raw in the window before the question
    BUDGET       right with DENSE, wrong with the k best entries by dense mass (ORACLE)
    SELECTOR     right with ORACLE, and with the trained choice and the needle's entries (PLUS)
    CONTEXT      wrong with PLUS, though DENSE is right
    DECODE       none of these

A line gives the counts, by length too, what each swap answers right among the failed items, and the answers that MINUS
turns wrong among the right ones, by layer (retrieval layers). Source: evaluation specification, 5.4 and 5.5.

    python benchmarks/guard_attribution.py --json --items 120
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from itertools import islice

import measure
import torch

import rorqual
from rorqual import Engine, SamplingParams
from rorqual.data.tasks.base import Item
from rorqual.data.tasks.needle import NeedleFamily
from rorqual.data.tasks.world import World
from rorqual.engine.swaps import Kind, continue_with

LENGTHS = (192, 320, 512)
MOST = 48
SWAPS: tuple[Kind, ...] = ("DENSE", "ORACLE", "PLUS", "MINUS", "RANDOM", "RECENT", "LEX")


def with_text(item: Item, text: str) -> Item:
    """The same question about another text."""
    question = str(item.messages[-1]["content"]).rsplit("\n\n", 1)[-1]
    return Item(**{**vars(item), "messages": [{"role": "user", "content": f"{text}\n\n{question}"}]})


def parts_of(item: Item) -> tuple[list[str], int]:
    """The text's lines, and which of them is the needle's last one."""
    text = str(item.messages[-1]["content"]).rsplit("\n\n", 1)[0]
    lines, at = text.split("\n"), 0
    for number, line in enumerate(lines):
        if at >= item.meta["needle_offset"]:
            return lines, number
        at += len(line) + 1
    return lines, len(lines) - 1


def short(item: Item) -> Item:
    """The needle's lines alone: fewer entries than the model may choose."""
    lines, _ = parts_of(item)
    return with_text(item, "\n".join(line for line in lines if item.meta["key"] in line))


def moved(item: Item) -> Item:
    """The needle's last line just before the question, raw in the window."""
    lines, number = parts_of(item)
    return with_text(item, "\n".join([*lines[:number], *lines[number + 1 :], lines[number]]))


class Judge:
    """Runs items on the models and grades what they say."""

    def __init__(self, family: NeedleFamily) -> None:
        self.family = family
        self.exact, self.tokenizer = rorqual.load("minke", dtype=torch.float32)
        self.deployed, _ = rorqual.load("minke", dtype=torch.bfloat16)
        self.engine = Engine(self.deployed, self.tokenizer)
        self.choices = min(self.deployed.cfg.vocab_size, self.tokenizer.vocab_size)

    def prompt(self, item: Item) -> list[int]:
        return list(self.tokenizer.encode(item.prompt_text()))

    def served(self, items: list[Item]) -> list[bool]:
        params = SamplingParams(temperature=0, max_tokens=MOST)
        done = self.engine.generate([self.prompt(item) for item in items], params)
        return [self.is_right(item, list(one.ids)) for item, one in zip(items, done, strict=True)]

    def is_right(self, item: Item, ids: list[int]) -> bool:
        return self.family.grade(item, self.tokenizer.decode(ids)).grade == "C"

    def by(self, item: Item, swap: Kind | None, *, exact: bool = False, layers: list[int] | None = None) -> bool:
        """Whether the layer code with a swap is right."""
        prompt, model = self.prompt(item), self.exact if exact else self.deployed
        found = continue_with(
            model, prompt, swap, MOST, self.tokenizer.eos_token_id, self.span(item, prompt), layers, self.choices
        )
        return self.is_right(item, found)

    def span(self, item: Item, prompt: list[int]) -> tuple[int, int]:
        """Tokens of the needle's last line."""
        lines, number = parts_of(item)
        whole = item.prompt_text()
        begin = whole.index(str(item.messages[-1]["content"])) + sum(len(line) + 1 for line in lines[:number])
        end, at, places = begin + len(lines[number]), 0, []
        for place, token in enumerate(prompt):
            size = len(self.tokenizer.decode([token]))
            if at + size > begin and at < end:
                places.append(place)
            at += size
        return (places[0], places[-1] + 1) if places else (0, 1)


def label(judge: Judge, item: Item, passes: dict[str, bool]) -> str:
    """The first that fits; `passes`: what swaps came to."""
    if judge.by(item, None, exact=True):
        return "ENGINE"
    if judge.served([item])[0]:
        return "TIE"
    if not passes["DENSE"]:
        return "COMPRESSION" if judge.served([short(item)])[0] and judge.served([moved(item)])[0] else "MODEL"
    if not passes["ORACLE"]:
        return "BUDGET"
    return "SELECTOR" if passes["PLUS"] else "CONTEXT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="24 items")
    parser.add_argument("--items", type=int, default=120)
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no more items are labelled")
    options = parser.parse_args()
    family = NeedleFamily(World.build(), lengths=LENGTHS)
    judge, began = Judge(family), time.perf_counter()
    asked = (one for one in family.items("test", 11) if one.stratum["task"] != "absent" and one.thinking_mode == "chat")
    items = list(islice(asked, 24 if options.quick else options.items))
    right = judge.served(items)
    failed = [item for item, is_right in zip(items, right, strict=True) if not is_right]
    labels, by_length, by_swap = Counter[str](), defaultdict[str, Counter[str]](Counter), Counter[str]()
    judged = 0
    for item in failed:
        if time.perf_counter() - began > options.within:
            break
        passes = {swap: judge.by(item, swap) for swap in SWAPS}
        name = label(judge, item, passes)
        labels[name] += 1
        by_length[str(item.stratum["length"])][name] += 1
        by_swap.update(swap for swap, passed in passes.items() if passed)
        judged += 1
        measure.note(f"{judged}/{len(failed)} {item.stratum['length']} {item.stratum['task']}: {name}")
    kept = [item for item, is_right in zip(items, right, strict=True) if is_right]
    layers = [spec.index for spec in judge.deployed.cfg.layers if spec.has_indexer]
    lost = {}
    for layer in layers:
        lost[str(layer)] = sum(not judge.by(item, "MINUS", layers=[layer]) for item in kept)
    lost["all"] = sum(not judge.by(item, "MINUS") for item in kept)
    judge.engine.close()
    line = {
        "name": "guard_attribution", "case": f"320/minke/{torch.get_num_threads()}t/bf16", "kind": "labels",
        "unit": "share of failed items with a label", "ours": sum(labels.values()) / max(1, judged), "peer": None,
        "peer_name": "none", "ratio": None, "bound": 1.0, "bound_share": None, "spread": {"ours": [], "peer": []},
        "config": {
            "items": len(items), "right": sum(right), "failed": len(failed), "labelled": judged, "labels": dict(labels),
            "by_length": {length: dict(by_length[length]) for length in sorted(by_length, key=int)},
            "right_with": {swap: by_swap[swap] for swap in SWAPS},
            "lost_by_minus": lost, "right_items": len(kept), **measure.machine(),
        },
    }  # fmt: skip
    if options.json:
        measure.print_line(line, as_json=True)
    else:
        print(f"{len(items)} items, {sum(right)} right; labels {dict(labels)}; right with {dict(by_swap)}")
        print(f"of {len(kept)} right ones MINUS loses {lost}")


if __name__ == "__main__":
    main()
