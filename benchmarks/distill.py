"""Specialists, and four ways to one model: merged weights (two), mixed training and on-policy distillation.

One small base is trained from nothing on three task families; from it one specialist a family. Then, from this base:

    averaged          mean of the specialists' weights               no training
    task arithmetic   base + scale x sum of their changes            no training; scale chosen on calibration items
    mixed             training on all families at once               as long as specialists and student together took
    student           on-policy distillation from the specialists    (processor time)

Scores are shares of held-out items (entities and sentences never trained on) answered right, greedily. Everything is
made in --folder and kept there, so a run that was stopped goes on.

    python benchmarks/distill.py --folder runs/distill
    python benchmarks/distill.py --folder runs/distill --json --quick
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measure import note, print_line

from rorqual.checkpoint import ASSETS, load_model, save_official
from rorqual.config import ModelConfig
from rorqual.data.tasks import Item, families
from rorqual.engine import Engine, SamplingParams
from rorqual.model import Transformer
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.distill_config import DistillConfig
from rorqual.posttrain.distill_run import run_distill
from rorqual.posttrain.merge import average, task_arithmetic
from rorqual.posttrain.scoring import token_logprobs
from rorqual.posttrain.stages import StageContext
from rorqual.posttrain.trainer import Trainer
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "compress_ratios": [0, 4, 16], "num_nextn_predict_layers": 0,
    "num_hash_layers": 1, "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32,
    "o_lora_rank": 32, "n_routed_experts": 4, "moe_intermediate_size": 64, "hc_mult": 2, "sliding_window": 32,
    "index_topk": 512,
}  # fmt: skip
"""Over the preset `minke`: three layers, one of each kind; no text here is long enough for the indexer to choose."""

DOMAINS = ("arith", "code", "chat")
WHERE: dict[str, dict[str, list[Any]]] = {
    "arith": {"kind": ["add", "subtract"], "digits": [1, 2]},
    "code": {},
    "chat": {},
}
"""The part of each family that so small a model can learn in minutes; arithmetic with thinking."""
MICRO_TOKENS, MOST_ANSWER = 4096, 80


def wanted(domain: str, item: Item) -> bool:
    """Whether an item belongs to the part of its family that is asked here."""
    if domain == "arith" and item.thinking_mode != "thinking":
        return False
    return all(item.stratum[name] in values for name, values in WHERE[domain].items())


def items_of(domain: str, split: str, seed: int) -> Iterator[Item]:
    """An endless stream of one domain's items."""
    return (item for item in families()[domain].items(split, seed) if wanted(domain, item))  # type: ignore[arg-type]


# ---------------------------------------------------------------- supervised training


def example_of(item: Item, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of prompt and answer, and how many of them are the prompt's."""
    prompt = tokenizer.encode(item.prompt_text())
    return [*prompt, *tokenizer.encode(item.gold), tokenizer.eos_token_id], len(prompt)


def batches(
    domains: Sequence[str], tokenizer: Tokenizer, seed: int, per_step: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Steps of `per_step` examples, the domains in equal parts."""
    streams = [items_of(domain, "train", derive(seed, "train", domain)) for domain in domains]
    while True:
        yield [example_of(next(streams[i % len(streams)]), tokenizer) for i in range(per_step)]


def losses_of(model: Transformer, examples: list[tuple[list[int], int]]) -> Iterator[Callable[[], torch.Tensor]]:
    """Mean cross-entropy of the answers, a micro-batch of like lengths at a time."""
    total = sum(len(ids) - prompt for ids, prompt in examples)
    left = sorted(examples, key=lambda example: len(example[0]))
    while left:
        count = max(1, MICRO_TOKENS // len(left[-1][0]))
        part, left = left[-count:], left[:-count]

        def loss(part: list[tuple[list[int], int]] = part) -> torch.Tensor:
            longest = max(len(ids) for ids, _ in part)
            rows = torch.zeros(len(part), longest, dtype=torch.int64)
            learned = torch.zeros(len(part), longest - 1, dtype=torch.bool)
            for row, (ids, prompt) in enumerate(part):
                rows[row, : len(ids)] = torch.tensor(ids)
                learned[row, prompt - 1 : len(ids) - 1] = True
            scores = token_logprobs(model, rows, lengths=[len(ids) for ids, _ in part], wanted=learned)
            return -scores.sum() / total

        yield loss


def supervise(
    name: str, model: Transformer, domains: Sequence[str], seconds: float, lr: float, args: argparse.Namespace
) -> tuple[Transformer, float]:
    """Train for so many seconds of processor time, unless that was done; the model and the seconds."""
    folder = Path(args.folder) / name
    if (folder / "done.json").is_file():
        return load_model(folder), json.loads((folder / "done.json").read_text())["seconds"]
    tokenizer = Tokenizer.from_folder(ASSETS / "minke")
    spent, step = 0.0, 0
    optim = OptimConfig(kind="muon", lr=lr, warmup_steps=20, decay="constant")
    run = RunConfig(folder=str(folder), seed=args.seed, threads=1, dtype="fp32")
    model.train()
    with Trainer(model, optim, run) as trainer:
        for examples in batches(domains, tokenizer, derive(args.seed, name), args.examples):
            began = time.process_time()
            if spent > 0.7 * seconds:  # the last third at a falling rate
                left = max(1 - spent / seconds, 0.0) / 0.3
                trainer.optim = optim.model_copy(update={"lr": lr * (0.1 + 0.9 * left)})
            update = trainer.update(losses_of(model, examples))
            spent += time.process_time() - began
            step += 1
            trainer.log(step, loss=update.loss, grad_norm=update.grad_norm, seconds=spent)
            if step % 20 == 0:
                note(f"{name}: step {step}, loss {update.loss:.3f}, {spent:.0f} of {seconds:.0f} s")
            if spent >= seconds:
                break
    save_official(model.eval(), folder, dtype=torch.float32)
    (folder / "done.json").write_text(json.dumps({"seconds": spent, "steps": step}))
    return model, spent


# ---------------------------------------------------------------- scores


def score(model: Transformer, split: str, count: int, seed: int) -> dict[str, float]:
    """Share of `count` items of each domain answered right, greedily."""
    tokenizer, out = Tokenizer.from_folder(ASSETS / "minke"), {}
    with Engine(model.eval(), tokenizer, max_running=32) as engine:
        for domain in DOMAINS:
            items = list(islice(items_of(domain, split, derive(seed, "score", domain)), count))
            prompts = [tokenizer.encode(item.prompt_text()) for item in items]
            found = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=MOST_ANSWER))
            family = families()[domain]
            out[domain] = sum(family.grade(i, c.text).passed for i, c in zip(items, found, strict=True)) / count
    return out


# ---------------------------------------------------------------- the four ways


def distil(args: argparse.Namespace) -> tuple[Transformer, float, int]:
    """The student: from the base, by on-policy distillation; also processor seconds and sampled tokens."""
    folder, out = Path(args.folder), Path(args.folder) / "student"
    sources = [
        {"domain": domain, "source": domain, "mode": "thinking" if domain == "arith" else "any", "where": WHERE[domain]}
        for domain in DOMAINS
    ]
    teachers = [{"name": domain, "model": str(folder / domain), "domains": [domain]} for domain in DOMAINS]
    optim = OptimConfig(kind="muon", lr=args.lr / 2, warmup_steps=5, decay="cosine")
    config = DistillConfig.model_validate(
        {
            "prompts": sources, "teachers": teachers, "steps": args.phases, "prompts_per_step": args.examples,
            "max_tokens": MOST_ANSWER, "keep_rollouts": False, "cache_dtype": "fp32", "optim": optim,
        }
    )  # fmt: skip
    run = RunConfig(folder=str(out), seed=args.seed, threads=1, checkpoint_minutes=2)
    tokenizer = Tokenizer.from_folder(ASSETS / "minke")
    context = StageContext(
        load_model(folder / "base"), tokenizer, folder / "base", run, resume=bool(list(out.glob("checkpoints/*")))
    )
    began = time.process_time()
    outcome = run_distill(config, context)
    save_official(outcome.model.eval(), out, dtype=torch.float32)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return outcome.model, time.process_time() - began, records[-1]["tokens"]


def best_scale(base: Transformer, states: list[Any], args: argparse.Namespace) -> tuple[float, Transformer]:
    """Task arithmetic at the scale that answers most calibration items."""
    found: list[tuple[float, float, Transformer]] = []
    for scale in (0.3, 0.5, 0.7, 1.0):
        merged = Transformer(base.cfg, seed=None)
        merged.load_state_dict(task_arithmetic(base.state_dict(), states, scale))
        found.append((sum(score(merged, "cal", args.items // 4, args.seed).values()), scale, merged))
    _, scale, merged = max(found, key=lambda one: one[0])
    return scale, merged


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, once: figures of a part that was done before are read."""
    if not path.is_file():
        path.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table: name, scores by domain, processor seconds, and how the model came about."""
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.preset("minke").replace(**SHAPE)
    rows: list[dict[str, Any]] = []

    def row(name: str, make: Callable[[], tuple[Transformer, float, dict[str, Any]]]) -> dict[str, Any]:
        def figures() -> dict[str, Any]:
            model, seconds, more = make()
            return {"name": name, "seconds": seconds, **more, "score": score(model, "test", args.items, args.seed)}

        rows.append(kept(folder / f"row-{name}.json", figures))
        note(f"{name}: {rows[-1]}")
        return rows[-1]

    def trained(name: str, start: Callable[[], Transformer], domains: Sequence[str], seconds: float, lr: float) -> None:
        row(name, lambda: (*supervise(name, start(), domains, seconds, lr, args), {}))

    def base() -> Transformer:
        return load_model(folder / "base")

    trained("base", lambda: Transformer(config, seed=args.seed), DOMAINS, args.base_seconds, args.lr)
    for domain in DOMAINS:
        trained(domain, base, [domain], args.specialist_seconds, args.lr / 2)
    states = [load_model(folder / domain).state_dict() for domain in DOMAINS]

    def averaged() -> tuple[Transformer, float, dict[str, Any]]:
        merged = Transformer(config, seed=None)
        merged.load_state_dict(average(states))
        return merged, 0.0, {}

    def added() -> tuple[Transformer, float, dict[str, Any]]:
        scale, merged = best_scale(base(), states, args)
        return merged, 0.0, {"scale": scale}

    def student() -> tuple[Transformer, float, dict[str, Any]]:
        model, seconds, tokens = distil(args)
        return model, seconds, {"tokens": tokens}

    row("averaged", averaged)
    row("task-arithmetic", added)
    distilled = row("student", student)
    spent = distilled["seconds"] + sum(one["seconds"] for one in rows if one["name"] in DOMAINS)
    trained("mixed", base, DOMAINS, spent, args.lr / 2)
    return rows


def lines(rows: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a domain and way: the share of the specialist's score that it keeps."""
    by_name = {row["name"]: row for row in rows}
    for name in ("base", "averaged", "task-arithmetic", "mixed", "student"):
        for domain in DOMAINS:
            ours, peer = by_name[name]["score"][domain], by_name[domain]["score"][domain]
            yield {
                "name": "distill", "case": f"{name}/{domain}", "unit": "share right", "ours": ours, "peer": peer,
                "peer_name": f"specialist {domain}", "ratio": ours / peer if peer else None, "bound": None,
                "bound_share": None, "spread": None,
                "config": {"seconds": by_name[name]["seconds"], "items": args.items, "seed": args.seed},
            }  # fmt: skip


def main() -> None:
    """Train, distil and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/distill", help="where models and figures are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=200, help="held-out items of each domain")
    parser.add_argument("--examples", type=int, default=48, help="examples of a supervised step, prompts of a phase")
    parser.add_argument("--base-seconds", type=float, default=200, help="processor seconds of the base's training")
    parser.add_argument("--specialist-seconds", type=float, default=90, help="the same of each specialist's")
    parser.add_argument("--phases", type=int, default=400, help="phases of the distillation")
    parser.add_argument("--lr", type=float, default=4e-3, help="the base's learning rate; half of it afterwards")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a fifth of the training, a quarter of the items")
    args = parser.parse_args()
    if args.quick:
        args.base_seconds, args.specialist_seconds, args.phases = 40, 25, 100
        args.items = args.items // 4
    torch.set_num_threads(1)
    for line in lines(study(args), args):
        print_line(line, as_json=args.json)


if __name__ == "__main__":
    main()
