"""GRPO against TRL's `GRPOTrainer` with transformers' V4: seconds of a step, and how the reward rises.

    python benchmarks/grpo.py --json [--quick] [--steps 30] [--seed 0]

Both sides start from the bundled Minke in fp32 (the peer's through our export; logits must agree before anything is
timed) and learn to add and subtract with reasoning: the same prompts in the same order, several answers to each, one
Python function that grades both. Steps run by turns in one process on one thread, so that a slow moment of the machine
hits both.

* `grpo.step`: seconds of a whole step, from prompts to moved weights, the median; by the clock and, in `cpu`, in
  processor time.
* `grpo.reward`: mean reward of the last third of the steps. Every step has new prompts, so it's no training error.
  `curves` has the reward, and the mean length of an answer, of every step.

Why this is fair: TRL computes the same objective (`loss_type="grpo"`, no scaling of rewards, no KL, no balance loss,
the same clip, one update a step), samples the same way (temperature 1, all tokens), has the same AdamW, and is spared
what would only slow it down here: gradient checkpointing, and padding of prompts (all have one length, since V4 in
transformers computes other numbers behind left padding). Ours runs with its defaults, which do more: the engine's
log-probabilities and experts are kept and replayed, and every token goes to a journal on disk. What differs besides:
TRL generates a static batch until its longest answer ends, and takes its own forward pass as the sampling policy.

TRL is needed for this alone: `pip install "rorqual[bench]"`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import torch
from peers import check_agreement

import rorqual
from rorqual.chat import encode_messages
from rorqual.data.tasks.arith import ArithFamily
from rorqual.data.tasks.base import Item, Split
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.grpo_config import GRPOConfig
from rorqual.posttrain.grpo_run import GRPORun
from rorqual.posttrain.stages import StageContext
from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

MINKE = Path(rorqual.__file__).parent / "assets" / "minke"
DIGITS = (2, 3)
GROUP, PROMPTS, WINDOW, RATE = 8, 4, 64, 1e-4
ADAM = OptimConfig(lr=RATE, warmup_steps=0, decay="constant")


# ---------------------------------------------------------------------- the task, for both sides


@cache
def tokenizer() -> Tokenizer:
    """Minke's."""
    return Tokenizer.from_folder(MINKE)


def _drawn(rng: random.Random, split: Split) -> tuple[Item, str]:
    """A sum or difference with its prompt."""
    family = ArithFamily()
    while True:
        item = family.make_item(rng, split, rng.randrange(1 << 20))
        stratum = item.stratum
        if item.thinking_mode == "thinking" and stratum["digits"] in DIGITS and stratum["kind"] in ("add", "subtract"):
            return item, encode_messages(item.messages, thinking_mode="thinking", add_default_bos_token=False)


@cache
def usual_length() -> int:
    """The most frequent number of tokens of a prompt."""
    rng = random.Random(0)
    return Counter(len(tokenizer().encode(_drawn(rng, "train")[1])) for _ in range(200)).most_common(1)[0][0]


@lru_cache(4096)
def item_of(number: int) -> Item:
    """The item of this number, always the same: its prompt has the usual length."""
    rng = random.Random(number)
    while True:
        item, prompt = _drawn(rng, "train")
        if len(tokenizer().encode(prompt)) == usual_length():
            return replace(item, prompt=prompt, messages=[], meta={**item.meta, "number": number})


def items(seed: int, split: str) -> Iterator[Item]:
    """A GRPO task: items endlessly."""
    rng = random.Random(f"{seed} {split}")
    while True:
        yield item_of(rng.getrandbits(40))


def right(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
    """The reward of both sides: 1 for the right number after the reasoning."""
    family = ArithFamily()
    texts = [tokenizer().decode(ids) for ids in completion_ids]
    return [float(family.grade(item_of(n), text).passed) for n, text in zip(number, texts, strict=True)]


# ---------------------------------------------------------------------- the two sides


@dataclass
class Curve:
    """What a side did, step after step."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)

    def took(self, watch: measure.Stopwatch) -> None:
        """A step, begun when `watch` was made."""
        rate = watch.rate(1.0)
        self.wall.append(1 / rate.wall)
        self.cpu.append(1 / rate.cpu)

    def last_third(self) -> float:
        rewards = self.reward[-max(len(self.reward) // 3, 1) :]
        return sum(rewards) / len(rewards)


def our_side(folder: Path, steps: int, seed: int) -> GRPORun:
    """A run of ours, to be stepped."""
    model, tok = rorqual.load(str(MINKE), dtype=torch.float32)
    config = GRPOConfig(
        optim=ADAM, steps=steps, group_size=GROUP, prompts_per_step=PROMPTS, beta=0.0, delta=None, eval_every=0,
        modes={"high": {"window": WINDOW}}, tasks=[{"source": "grpo:items", "rewards": [{"name": "grpo:right"}]}],
    )  # fmt: skip
    run = RunConfig(folder=str(folder), threads=1, seed=seed)
    return GRPORun(config, StageContext(model, tok, MINKE, run))


def peer_side(folder: Path, ours: GRPORun, curve: Curve, our_curve: Curve, steps: int, seed: int) -> Any:
    """TRL's trainer, which after each step of its own takes one of ours."""
    from datasets import Dataset
    from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig as PeerConfig
    from trl import GRPOTrainer

    rorqual.checkpoint.save_transformers(ours.model, folder / "peer")
    model = DeepseekV4ForCausalLM.from_pretrained(folder / "peer", dtype=torch.float32, attn_implementation="eager")
    tok = tokenizer()
    peer_tok = PreTrainedTokenizerFast(
        tokenizer_file=str(MINKE / "tokenizer.json"), bos_token=tok.decode([0]), eos_token=tok.decode([1])
    )
    model.generation_config.eos_token_id = tok.eos_token_id
    questions = [ours.stream.question(n) for n in range(steps * PROMPTS)]
    rows = [tok.encode(question.text) for question in questions]
    if [peer_tok(question.text)["input_ids"] for question in questions] != rows:
        raise SystemExit("The two sides read the prompts as different tokens; nothing to compare.")
    distance = check_agreement(ours.model, model, torch.tensor(rows[:PROMPTS]))
    measure.note(f"logits agree to {distance:.1e}; prompts of {usual_length()} tokens")

    class ByTurns(TrainerCallback):
        """Times the peer's steps, and ours between them."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.watch = measure.Stopwatch()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            curve.took(self.watch)
            watch = measure.Stopwatch()
            figures = ours.step()
            our_curve.took(watch)
            assert figures is not None
            our_curve.reward.append(figures["reward"])
            our_curve.length.append(figures["length"])

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "reward" in logs:
                curve.reward.append(logs["reward"])
                curve.length.append(logs["completions/mean_length"])
                at, mine, theirs = len(curve.wall), our_curve, curve
                measure.note(
                    f"step {at}: reward {mine.reward[-1]:.2f} and {theirs.reward[-1]:.2f}, "
                    f"{mine.wall[-1]:.1f} and {theirs.wall[-1]:.1f} s"
                )

    settings = PeerConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=GROUP * PROMPTS,
        gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=WINDOW, shuffle_dataset=False,
        temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="none",
        router_aux_loss_coef=0.0,  # no balance loss on our side either
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=ADAM.clip,
        adam_beta1=ADAM.adam_betas[0], adam_beta2=ADAM.adam_betas[1], adam_epsilon=ADAM.adam_eps, optim="adamw_torch",
        gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, seed=seed,
    )  # fmt: skip
    return GRPOTrainer(
        model=model, reward_funcs=right, args=settings, processing_class=peer_tok, callbacks=[ByTurns()],
        train_dataset=Dataset.from_list([{"prompt": q.text, "number": q.item.meta["number"]} for q in questions]),
    )  # fmt: skip


# ---------------------------------------------------------------------- lines


def lines(mine: Curve, theirs: Curve, steps: int) -> Iterator[dict[str, Any]]:
    """Both lines. The first step of each side, in which everything is made for the first time, isn't timed."""
    import transformers
    import trl

    case = f"{PROMPTS}x{GROUP}x{WINDOW}/minke/1/fp32"
    peer = f"TRL {trl.__version__}, transformers {transformers.__version__}"
    config = {"steps": steps, "lr": RATE, "prompt_tokens": usual_length(), **measure.machine()}
    ours_s, peer_s = measure.middle(mine.wall[1:]), measure.middle(theirs.wall[1:])
    cpu = {"ours": measure.middle(mine.cpu[1:]), "peer": measure.middle(theirs.cpu[1:])}
    common = {"case": case, "peer_name": peer, "bound": None, "bound_share": None, "config": config}
    yield {
        "name": "grpo.step", "unit": "s", "ours": ours_s, "peer": peer_s, "ratio": peer_s / ours_s,
        "cpu": {**cpu, "ratio": cpu["peer"] / cpu["ours"]}, "spread": measure.spread(mine.wall[1:], theirs.wall[1:]),
        **common,
    }  # fmt: skip
    ours, peers = mine.last_third(), theirs.last_third()
    yield {
        "name": "grpo.reward", "unit": "reward", "ours": ours, "peer": peers, "ratio": ours / peers if peers else None,
        "start": {"ours": mine.reward[0], "peer": theirs.reward[0]}, "spread": {},
        "curves": {
            "ours": {"reward": mine.reward, "length": mine.length},
            "peer": {"reward": theirs.reward, "length": theirs.length},
        },
        **common,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="three steps: that it runs, not what it shows")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = 3 if options.quick else options.steps
    torch.set_num_threads(1)
    mine, theirs = Curve(), Curve()
    with (
        tempfile.TemporaryDirectory() as name,
        our_side(Path(name) / "ours", steps, options.seed) as ours,
    ):
        peer_side(Path(name), ours, theirs, mine, steps, options.seed).train()
    for line in lines(mine, theirs, steps):
        measure.print_line(line, as_json=options.json)


if __name__ == "__main__":
    main()
