"""Calibrated abstention over a model that was never taught to abstain: the figures of docs/abstention.md.

    rorqual train --recipe recipes/studies/facts.toml --run-dir runs/facts
    python benchmarks/referee_facts.py --model runs/facts/model --out runs/facts/abstention

Every question of the cal and the test people is answered (nobody declines: the model cannot), all signals are taken,
the calibrator is fitted on `cal`, every threshold too, and `test` is only reported. Rows A1 to A6, A9 and A10 of the
evaluation specification, each beside a bare threshold on the first token's probability, on the answer's mean log
probability, and on each single signal. Intervals are of a bootstrap over entities. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import referee_report as report
import torch
from referee_batches import Batches
from referee_items import exam, other_wordings, statement

from rorqual import load
from rorqual.data.tasks import Census, CensusFamily
from rorqual.referee.confidence import measure
from rorqual.seeds import derive

PARAPHRASES = 2


def observe(model_folder: Path, split: str, share: float, seed: int, samples: int) -> list[dict[str, Any]]:
    """One record per question of `split`: what it is, whether the forced answer is right, and its signals."""
    model, tokenizer = load(model_folder)
    family = CensusFamily(Census.from_dict(json.loads((model_folder / "world.json").read_text())))
    batches = Batches(model, tokenizer)
    items = exam(family, split, seed, share=share)  # type: ignore[arg-type]
    asked = [str(item.messages[-1]["content"]) for item in items]
    seen = batches.answer(asked, [item.meta["name"] for item in items])
    wordings = [other_wordings(item, PARAPHRASES) for item in items]
    scored = [batches.score([words[k] for words in wordings], [one.answer for one in seen]) for k in range(PARAPHRASES)]
    stated = batches.read([statement(item, one.answer) for item, one in zip(items, seen, strict=True)])
    # samples cost most and are only compared: for one entity in ten
    chosen = [i for i, item in enumerate(items) if samples and derive(seed, "sampled", item.meta["entity"]) % 10 == 0]
    found = batches.samples([asked[i] for i in chosen], samples, seed) if chosen else []
    drawn = dict(zip(chosen, found, strict=True))
    records = []
    for i, (item, one) in enumerate(zip(items, seen, strict=True)):
        others = [scored[k][i] for k in range(PARAPHRASES)]
        whole = [
            replace(
                one,
                other_logprobs=tuple(mean for mean, _, _ in others[:k]),
                other_answers=tuple(one.answer if same else "" for _, same, _ in others[:k]),
                other_questions=tuple(read for _, _, read in others[:k]),
                statement_tokens=stated[i],
                samples=tuple(drawn[i]) if i in drawn else None,
            )
            for k in (1, PARAPHRASES)
        ]
        first = one.answer_tokens[0].logprob if one.answer_tokens else -30.0
        records.append(
            {
                **item.stratum,
                "entity": item.meta["entity"],
                "near": item.meta["near"],
                "question": asked[i],
                "answer": one.answer,
                "gold": item.meta["value"],
                "right": family.grade(item, one.answer).passed,
                "max_prob": first,
                "signals": {1: measure(whole[0]), PARAPHRASES: measure(whole[1])},
            }
        )
    return records


def collected(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The records of cal and test, from the files of an earlier run if there are any."""
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("cal", "test"):
        path = args.out / f"{split}.jsonl"
        if not path.exists():
            began = time.time()
            records = observe(args.model, split, args.share, args.seed, args.samples)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            took = round(time.time() - began)
            print(
                json.dumps({"row": "observed", "split": split, "questions": len(records), "seconds": took}), flush=True
            )
        yield [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/facts/model"), help="model folder of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/facts/abstention"), help="folder of signals and figures")
    parser.add_argument("--share", type=float, default=1.0, help="part of the people to ask about")
    parser.add_argument("--samples", type=int, default=5, help="samples for semantic entropy, of one entity in ten")
    parser.add_argument("--paraphrases", type=int, choices=(1, PARAPHRASES), default=1, help="calls of a closer look")
    parser.add_argument("--seed", type=int, default=7, help="seed of the questions")
    parser.add_argument("--repeats", type=int, default=300, help="bootstrap draws")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cal, test = collected(args)
    for row in report.rows(cal, test, paraphrases=args.paraphrases, repeats=args.repeats, plots=args.out):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
