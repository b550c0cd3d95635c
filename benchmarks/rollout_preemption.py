"""Rollouts that are interrupted about once each: going on from the log, beside beginning again.

    python benchmarks/rollout_preemption.py
    python benchmarks/rollout_preemption.py --quick --json

lengths    many answers of a small policy, drawn undisturbed; interrupted at rate rho a token and gone on with, from the
           saved state or by reading their tokens once; and begun again with new draws, as without a log.
           ours, peer: mean length in tokens; `config` has the undisturbed mean, the mean that p(l) (1 - rho)^(l - 1)
           predicts for beginning again, and the distance of both histograms from p(l) and from that prediction.
learning   the same three in training: reward and mean length over the last quarter of the updates, every seed. The
           loss is that of the training specification, section 12.4, with one update a batch, where clip and masks do
           nothing.

rho is one over the undisturbed mean length, so that a rollout is interrupted once on average. Failures are drawn by the
rollout's id, the same in both ways.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, note, print_line

from rorqual.config import ModelConfig
from rorqual.engine import Engine, SamplingParams
from rorqual.model import Transformer
from rorqual.posttrain.rollout_log import RolloutLog
from rorqual.posttrain.rollouts import Prompt, Rollout, RolloutWorker, rollout_id
from rorqual.posttrain.rollouts_batch import stack
from rorqual.posttrain.scoring import token_logprobs
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer, train_tokenizer

MOST = 128
"""Tokens of an answer."""
GOOD = 40
"""Ids below this one are rewarded."""


def network(tokenizer: Tokenizer, seed: int) -> Transformer:
    """A tiny V4 whose answers end by themselves after some tens of tokens."""
    cfg = ModelConfig.from_dict(
        {
            "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 3, "compress_ratios": [0, 4, 8],
            "num_hash_layers": 1, "num_attention_heads": 4, "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 16,
            "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "n_routed_experts": 6, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4,
            "num_nextn_predict_layers": 0, "max_position_embeddings": 512,
        }
    )  # fmt: skip
    model = Transformer(cfg, seed=seed)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
        ids = torch.tensor([[derive(seed, "probe", row, at) % cfg.vocab_size for at in range(12)] for row in range(32)])
        hidden = model.final_hidden(model.forward_streams(ids))[:, -1]
        mean = hidden.mean(0)
        others = torch.logsumexp(hidden @ model.head.weight.T, -1).mean()
        wanted = float(others) - math.log(40)  # one token in about 40 is the end
        model.head.weight[tokenizer.eos_token_id] = mean * (wanted / float(hidden.mv(mean).mean()))
    return model


@dataclass(frozen=True)
class Failures:
    """Where the machine is taken away: after tokens that are drawn by the rollout's id, at rate `rate` a token."""

    rate: float
    seed: int = 0

    def after(self, id: str, number: int) -> int:
        """Tokens between failure number - 1 and `number` of a rollout, from 1."""
        draw = (derive(self.seed, "failure", id, number) >> 10) / 2**53
        return 1 + int(math.log1p(-draw) / math.log1p(-self.rate))


class Interrupted(RolloutWorker):
    """A worker that loses each rollout wherever it fails, and its state every second time."""

    failures = Failures(0.5)

    def _keep(self, run: Any, event: Any) -> None:
        super()._keep(run, event)
        if not hasattr(run, "fails_at"):
            run.num_failures, run.fails_at = 0, self.failures.after(run.id, 1)
        if len(run.drawn.ids) == run.fails_at:
            run.num_failures += 1
            run.fails_at += self.failures.after(run.id, run.num_failures + 1)
            self.preempt(run.id, keep_state=run.num_failures % 2 == 1)


Ways = dict[str, Callable[[Sequence[Prompt], int], list[Rollout]]]


def begin_again(
    engine: Engine, prompts: Sequence[Prompt], size: int, params: SamplingParams, failures: Failures, seed: int
) -> list[Rollout]:
    """Answers of a system without a log: what fails is drawn anew, until an attempt comes through."""
    done: dict[str, Rollout] = {}
    left = [(prompt, index) for prompt in prompts for index in range(size)]
    attempt = 0
    while left:
        attempt += 1
        worker = RolloutWorker(engine, seed=derive(seed, "attempt", attempt), in_flight=64)
        again = []
        by_length: dict[int, list[tuple[Prompt, int]]] = {}
        for prompt, index in left:
            at = min(failures.after(rollout_id(prompt.id, index), attempt), MOST)
            by_length.setdefault(at, []).append((prompt, index))
        for at, group in by_length.items():
            asked = [Prompt(rollout_id(prompt.id, index), prompt.ids) for prompt, index in group]
            made = {one.prompt_id: one for [one] in worker.generate(asked, 1, params.replace(max_tokens=at))}
            for prompt, index in group:
                id = rollout_id(prompt.id, index)
                one = made[id]
                if one.truncated and at < MOST:
                    again.append((prompt, index))
                else:
                    one.prompt_id, one.index = prompt.id, index
                    done[id] = one
        left = again
    return [done[rollout_id(prompt.id, index)] for prompt in prompts for index in range(size)]


class Draws:
    """One policy in an engine, and the three ways to draw its answers."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
        self.engine = Engine(model, tokenizer, max_running=64, max_queued=256, gap_s=None)
        self.params, self.seed = SamplingParams(max_tokens=MOST), seed

    def undisturbed(self, prompts: Sequence[Prompt], size: int) -> list[Rollout]:
        worker = RolloutWorker(self.engine, seed=self.seed, in_flight=64)
        return in_order(worker.generate(prompts, size, self.params))

    def gone_on_with(self, prompts: Sequence[Prompt], size: int, failures: Failures) -> tuple[list[Rollout], int]:
        """And how often the machine was taken away."""
        with tempfile.TemporaryDirectory() as folder, RolloutLog(Path(folder), sync=False) as log:
            worker = Interrupted(self.engine, seed=self.seed, log=log, in_flight=64)
            worker.failures = failures
            return in_order(worker.generate(prompts, size, self.params)), worker.preemptions

    def begun_again(self, prompts: Sequence[Prompt], size: int, failures: Failures) -> list[Rollout]:
        return begin_again(self.engine, prompts, size, self.params, failures, self.seed)


def in_order(groups: Iterator[list[Rollout]]) -> list[Rollout]:
    """Whatever order they became whole in."""
    return [one for group in sorted(groups, key=lambda group: group[0].group) for one in group]


def some_prompts(count: int, tag: str, vocab: int) -> list[Prompt]:
    """Ten random ids each."""
    return [Prompt(f"{tag}{n}", tuple(derive(n, tag, at) % vocab for at in range(10))) for n in range(count)]


# ------------------------------------------------------------------------------------------------------------- lengths


def distance(lengths: Sequence[int], weights: dict[int, float], bins: int = 16) -> tuple[float, float]:
    """Largest gap between the distribution functions, and between what each says of `bins` equal parts as chi squared
    over its degrees of freedom (about 1 where the lengths come from these weights).
    """
    total, values = sum(weights.values()), sorted(weights)
    cumulative, running = {}, 0.0
    for value in values:
        running += weights[value] / total
        cumulative[value] = running
    gap = max(abs(sum(one <= value for one in lengths) / len(lengths) - cumulative[value]) for value in values)
    edges = [next(value for value in values if cumulative[value] >= part / bins - 1e-12) for part in range(1, bins + 1)]
    chi, low, parts, before = 0.0, -1, 0, 0.0
    for edge in dict.fromkeys(edges):
        expected = len(lengths) * (cumulative[edge] - before)
        found = sum(low < one <= edge for one in lengths)
        chi, parts, low, before = chi + (found - expected) ** 2 / max(expected, 1e-9), parts + 1, edge, cumulative[edge]
    return gap, chi / max(1, parts - 1)


def measure_lengths(tokenizer: Tokenizer, count: int, as_json: bool) -> None:
    draws = Draws(network(tokenizer, 0), tokenizer, seed=1)
    prompts, size = some_prompts(count // 10, "length", tokenizer.vocab_size), 10
    with draws.engine:
        began = time.perf_counter()
        calm = draws.undisturbed(prompts, size)
        lengths = [len(one.answer) for one in calm]
        mean = statistics.fmean(lengths)
        note(f"undisturbed: {len(calm)} answers, mean {mean:.2f} tokens ({time.perf_counter() - began:.0f} s)")
        failures = Failures(1 / mean)
        resumed, preemptions = draws.gone_on_with(prompts, size, failures)
        same = sum(
            a.trajectory.ids == b.trajectory.ids and a.trajectory.logprobs == b.trajectory.logprobs
            for a, b in zip(calm, resumed, strict=True)
        )
        note(f"gone on with: {preemptions} interruptions, {same} of {len(calm)} the same to the last bit")
        again = [len(one.answer) for one in draws.begun_again(prompts, size, failures)]
    counts = {length: float(lengths.count(length)) for length in set(lengths)}
    tilted = {length: n * (1 - failures.rate) ** (length - 1) for length, n in counts.items()}
    predicted = sum(length * n for length, n in tilted.items()) / sum(tilted.values())
    error = statistics.stdev(again) / math.sqrt(len(again))
    ours = statistics.fmean(len(one.answer) for one in resumed)
    print_line(
        {
            "name": "rollout_preemption", "case": f"lengths/tiny/{torch.get_num_threads()}t/fp32", "unit": "tokens",
            "ours": ours, "peer": statistics.fmean(again), "peer_name": "beginning again",
            "ratio": ours / statistics.fmean(again), "bound": None, "bound_share": None,
            "spread": {"ours": [min(lengths), max(lengths)], "peer": [min(again), max(again)]},
            "config": {
                "answers": len(calm), "interruptions": preemptions, "identical": same, "undisturbed_mean": mean,
                "predicted_mean_begun_again": predicted, "standard_error": error, "rate": failures.rate,
                "truncated": sum(one.truncated for one in calm) / len(calm),
                "begun_again_from_prediction": distance(again, tilted),
                "begun_again_from_undisturbed": distance(again, counts), **machine(),
            },
        },
        as_json=as_json,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ learning


def reward(rollout: Rollout) -> float:
    """Rewarded ids, up to 16 of them: a longer answer has room for more."""
    return min(16, sum(token < GOOD for token in rollout.answer)) / 16


def update(model: Transformer, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], size: int) -> None:
    """One step of the group-relative objective: advantages without the standard deviation, mean over tokens."""
    rewards = torch.tensor([reward(one) for one in rollouts]).view(-1, size)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    batch = stack(rollouts)
    scores = token_logprobs(model, batch.ids, lengths=batch.lengths, wanted=batch.chosen)
    ratios = torch.exp(scores - batch.logprobs) * batch.chosen
    loss = -(advantages * ratios.sum(1) / batch.chosen.sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(tokenizer: Tokenizer, seed: int, way: str, updates: int, groups: int, size: int) -> dict[str, list[float]]:
    """Reward and mean length of the rollouts of each update."""
    model = network(tokenizer, seed)
    draws = Draws(network(tokenizer, seed), tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    failures = Failures(1 / 30, seed)
    curve: dict[str, list[float]] = {"reward": [], "length": []}
    with draws.engine:
        for step in range(updates):
            prompts = some_prompts(groups, f"step{step}/", tokenizer.vocab_size)
            if way == "undisturbed":
                rollouts = draws.undisturbed(prompts, size)
            elif way == "gone on with":
                rollouts, _ = draws.gone_on_with(prompts, size, failures)
            else:
                rollouts = draws.begun_again(prompts, size, failures)
            curve["reward"].append(statistics.fmean(map(reward, rollouts)))
            curve["length"].append(statistics.fmean(len(one.answer) for one in rollouts))
            update(model, optimizer, rollouts, size)
            draws.engine.load_weights(model.state_dict(), step + 1).result()
    return curve


def measure_learning(tokenizer: Tokenizer, seeds: int, updates: int, as_json: bool) -> None:
    groups, size, tail = 8, 8, max(1, updates // 4)
    curves: dict[str, list[dict[str, list[float]]]] = {}
    for way in ("undisturbed", "gone on with", "begun again"):
        for seed in range(seeds):
            began = time.perf_counter()
            curve = train(tokenizer, seed, way, updates, groups, size)
            curves.setdefault(way, []).append(curve)
            first, last = curve["reward"][0], statistics.fmean(curve["reward"][-tail:])
            begin, end = curve["length"][0], statistics.fmean(curve["length"][-tail:])
            took = time.perf_counter() - began
            note(
                f"{way}, seed {seed}: reward {first:.3f} -> {last:.3f}, length {begin:.1f} -> {end:.1f} ({took:.0f} s)"
            )
    same = sum(a == b for a, b in zip(curves["undisturbed"], curves["gone on with"], strict=True))
    for figure in ("reward", "length"):
        last = {way: [statistics.fmean(one[figure][-tail:]) for one in found] for way, found in curves.items()}
        ours, peer = statistics.fmean(last["gone on with"]), statistics.fmean(last["begun again"])
        print_line(
            {
                "name": "rollout_preemption", "case": f"{figure}/tiny/{torch.get_num_threads()}t/fp32",
                "unit": "tokens" if figure == "length" else figure, "ours": ours, "peer": peer,
                "peer_name": "beginning again", "ratio": ours / peer, "bound": None, "bound_share": None,
                "spread": {"ours": sorted(last["gone on with"]), "peer": sorted(last["begun again"])},
                "config": {
                    "undisturbed": last["undisturbed"], "curves_identical_to_undisturbed": f"{same} of {seeds}",
                    "updates": updates, "seeds": seeds, "rollouts_an_update": groups * size,
                    "curves": {way: [one[figure] for one in found] for way, found in curves.items()}, **machine(),
                },
            },
            as_json=as_json,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="1,000 answers, and one seed of 12 updates")
    parser.add_argument("--part", choices=("lengths", "learning"), help="only this one")
    parser.add_argument("--answers", type=int, help="of `lengths`")
    parser.add_argument("--seeds", type=int, help="of `learning`")
    parser.add_argument("--updates", type=int, help="of `learning`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["x"], 275)
    if options.part in (None, "lengths"):
        measure_lengths(tokenizer, options.answers or (1000 if options.quick else 6000), options.json)
    if options.part in (None, "learning"):
        seeds, updates = options.seeds or (1 if options.quick else 3), options.updates or (12 if options.quick else 40)
        measure_learning(tokenizer, seeds, updates, options.json)


if __name__ == "__main__":
    main()
