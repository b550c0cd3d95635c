"""Training and decoding speed against transformers' `DeepseekV4ForCausalLM`: same weights, same tokens, same
run.

    python benchmarks/versus_transformers.py --json [--quick]

The network is `small.json`, fp32, one thread. The weights are drawn once, exported with `save_transformers`
and loaded by both; before anything is timed the logits of both must agree. The two run by turns.

* `train`: tokens per second of whole steps on a batch of random tokens: forward, mean cross-entropy over all
  positions, backward, and the same `torch.optim.AdamW(fused=True)` on the same parameters. No MTP (the peer
  has none), no recomputation, no other losses.
* `decode`: tokens per second of greedy decoding of one row after a prompt, each side with its own cache,
  called token by token without any generation wrapper on either side. Both must produce the same tokens. The
  prompt is not timed.

The bound of `train` is the best rate of an fp32 matrix product over the multiply-adds a step cannot do
without (three passes over the activated weights and the attention products). The bound of `decode` is the
best rate at which a matrix as large as the weights touched per token is read by matrix-vector products.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rorqual
from rorqual.model import Transformer, init_weights

PEER = "transformers"
CONFIG = Path(__file__).with_name("small.json")


def build_pair(config: rorqual.ModelConfig) -> tuple[Transformer, Any]:
    """Our network with drawn weights and the peer's with the same, through our export."""
    from transformers import DeepseekV4ForCausalLM

    torch.manual_seed(0)
    ours = Transformer(config)
    init_weights(ours, 0)
    with tempfile.TemporaryDirectory() as folder:
        rorqual.checkpoint.save_transformers(ours, folder)
        peer = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return ours, peer


def check_agreement(ours: Transformer, peer: Any, tokens: Tensor) -> float:
    """Largest relative distance of a row of logits; raises when it is not rounding."""
    with torch.no_grad():
        a, b = ours(tokens), peer(tokens, use_cache=False).logits
    worst = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
    if not worst < 1e-4:
        raise SystemExit(f"The two networks differ by {worst:.2e} of a row's norm before timing; nothing to compare.")
    return worst


def activated_weights(model: nn.Module, config: rorqual.ModelConfig) -> int:
    """Weights a token is multiplied with: all matrices but the embedding, and the chosen share of the routed
    experts.
    """
    share = config.num_experts_per_tok / config.n_routed_experts
    total = 0.0
    for name, p in model.named_parameters():
        if p.dim() >= 2 and name != "embed.weight" and not name.startswith("mtp.") and not name.endswith(".ape"):
            total += p.numel() * (share if ".ffn.experts." in name else 1.0)
    return int(total)


def attention_products(config: rorqual.ModelConfig, length: int) -> float:
    """Multiply-adds of scores and values per token, averaged over a row of `length` tokens."""
    total = 0.0
    for spec in config.layers:
        for t in range(length):
            keys = min(t + 1, config.sliding_window)
            if spec.compress_ratio:
                entries = (t + 1) // spec.compress_ratio
                keys += min(entries, config.index_topk) if spec.has_indexer else entries
                if spec.has_indexer:
                    total += entries * config.index_n_heads * config.index_head_dim / length
            total += 2 * keys * config.num_attention_heads * config.head_dim / length
    return total


def trainer(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], tokens: Tensor, steps: int
) -> Callable[[], measure.Rate]:
    """A function that takes `steps` training steps and returns its rate in tokens."""
    # The step is real but too small to move the weights: later lengths start from the same network.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def run() -> measure.Rate:
        watch = measure.Stopwatch()
        for _ in range(steps):
            logits = logits_of(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return watch.rate(steps * tokens[:, 1:].numel())

    return run


def measure_training(
    ours: Transformer, peer: Any, config: rorqual.ModelConfig, length: int, batch: int, repeats: int
) -> dict[str, Any]:
    """One line for training at this length."""
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    ours.train()
    peer.train()
    a, b = measure.interleaved(
        trainer(ours, ours, tokens, 2),
        trainer(peer, lambda x: peer(x, use_cache=False).logits, tokens, 2),
        repeats,
    )
    flops = 6.0 * (activated_weights(ours, config) + attention_products(config, length))
    bound = measure.matmul_flops_per_s() / flops
    return line("train", length, a, b, bound, {"batch": batch, "optimizer": "AdamW fused", "steps": 2})


def measure_decoding(
    ours: Transformer, peer: Any, config: rorqual.ModelConfig, prompt: int, count: int, repeats: int
) -> dict[str, Any]:
    """One line for greedy decoding after a prompt of this length."""
    tokens = torch.randint(0, config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(2))
    ours.eval()
    peer.eval()
    produced: dict[str, list[int]] = {}

    def ours_run() -> measure.Rate:
        with torch.inference_mode():
            state = ours.new_state()
            token = ours(tokens, state=state)[:, -1:].argmax(-1)
            found = []
            watch = measure.Stopwatch()
            for _ in range(count):
                token = ours(token, state=state)[:, -1:].argmax(-1)
                found.append(int(token))
            rate = watch.rate(count)
        produced["ours"] = found
        return rate

    def peer_run() -> measure.Rate:
        with torch.inference_mode():
            out = peer(tokens, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            found = []
            watch = measure.Stopwatch()
            for _ in range(count):
                out = peer(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                found.append(int(token))
            rate = watch.rate(count)
        produced["peer"] = found
        return rate

    a, b = measure.interleaved(ours_run, peer_run, repeats)
    if produced["ours"] != produced["peer"]:
        raise SystemExit("The two networks decoded different tokens; their speeds cannot be compared.")
    touched = 4 * activated_weights(ours, config)
    bound = measure.weight_bytes_per_s(touched) / touched
    details = {"batch": 1, "new_tokens": count, "weight_bytes_per_token": touched}
    return line("decode", prompt, a, b, bound, details)


def line(
    what: str,
    length: int,
    ours: list[measure.Rate],
    peer: list[measure.Rate],
    bound: float,
    details: dict[str, Any],
) -> dict[str, Any]:
    """The finished JSON object; rates by the clock, their ratio by processor time beside them."""
    walls = [rate.wall for rate in ours], [rate.wall for rate in peer]
    a, b = measure.middle(walls[0]), measure.middle(walls[1])
    cpu_ratio = measure.middle([rate.cpu for rate in ours]) / measure.middle([rate.cpu for rate in peer])
    return {
        "name": f"versus_transformers.{what}",
        "case": f"{measure.length_name(length)}/small/1t/fp32",
        "unit": "tokens/s",
        "ours": a,
        "peer": b,
        "peer_name": PEER,
        "ratio": a / b,
        "ratio_by_cpu_time": cpu_ratio,
        "bound": bound,
        "bound_share": a / bound,
        "spread": measure.spread(*walls),
        "config": {**details, "repeats": len(ours), "model": "small.json", **measure.machine()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat of each case")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats

    torch.set_num_threads(1)
    config = rorqual.ModelConfig.from_dict(json.loads(CONFIG.read_text()))
    ours, peer = build_pair(config)
    worst = check_agreement(ours, peer, torch.arange(300)[None] * 7 % config.vocab_size)
    measure.note(f"logits agree within {worst:.1e} of a row's norm; {activated_weights(ours, config):,} active weights")
    for length, batch in ((512, 4), (2048, 1)):
        measure.print_line(measure_training(ours, peer, config, length, batch, repeats), as_json=options.json)
    for prompt in (512, 2048):
        measure.print_line(measure_decoding(ours, peer, config, prompt, 64, repeats), as_json=options.json)


if __name__ == "__main__":
    main()
