"""Training speed on one core: tokens per second against transformers' V4 and against a dense Llama-style transformer.

    python benchmarks/train_speed.py --json [--quick] [--nanochat FOLDER]

Whole steps are timed: forward, mean next-token cross-entropy, backward, and the same `torch.optim.AdamW(fused=True)`,
on one thread. Sides run by turns. No MTP, no recomputation, no other losses on either side.

* `train_speed.transformers`: `DeepseekV4ForCausalLM` with the same weights. Before anything is timed the logits of both
  must agree (fp32), and ours in bf16 must give the same loss within 1 %.
* `train_speed.dense`: `LlamaForCausalLM` with the same width, depth, heads and vocabulary, its SwiGLU as wide as makes
  its matrices hold as many weights as ours activates per token.
* `train_speed.nanochat`: nanochat's GPT from a checkout, likewise sized, where one is given.

Lines that end in `fp32` compare fp32 with fp32. Lines that end in `bf16` compare ours (fp32 weights, bf16 activations
and products) with the fastest of what the peer offers, named in the line: fp32, bf16 autocast, or bf16 weights.

The bound is the best rate of a matrix product in that precision over the multiply-adds that our step cannot do without
(three passes over the activated weights and the attention products).
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from peers import CONFIG, activated_weights, attention_products, build_pair, check_agreement
from torch import Tensor, nn

import rorqual
from rorqual.model import Transformer
from rorqual.train.losses import cross_entropy_sum

Step = Callable[[], measure.Rate]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stepper(model: nn.Module, loss_of: Callable[[], Tensor], num_tokens: int, steps: int) -> Step:
    """A function that takes `steps` training steps and returns its rate in tokens."""
    # The step is real but too small to move the weights: every case starts from the same network.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def run() -> measure.Rate:
        watch = measure.Stopwatch()
        for _ in range(steps):
            loss_of().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return watch.rate(steps * num_tokens)

    return run


def our_loss(model: Transformer, tokens: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Our mean cross-entropy in this precision."""

    def loss() -> Tensor:
        model.compute_dtype = None if dtype == torch.float32 else dtype
        hidden = model.final_hidden(model.forward_streams(tokens[:, :-1]))
        return cross_entropy_sum(hidden, model.head.weight, tokens[:, 1:], dtype=dtype) / tokens[:, 1:].numel()

    return loss


def peer_loss(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, autocast: bool) -> Callable[[], Tensor]:
    """A peer's mean cross-entropy."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            logits = logits_of(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def peer_steps(
    build: Callable[[torch.dtype], tuple[nn.Module, Callable[[Tensor], Tensor]]], tokens: Tensor, steps: int,
    own_bf16: str = "bf16 weights",
) -> dict[str, Step]:  # fmt: skip
    """The ways a peer can be run, by name. Ways that it refuses are left out with a note."""
    ways: dict[str, Step] = {}
    for name, dtype, autocast in (
        ("fp32", torch.float32, False),
        ("bf16 autocast", torch.float32, True),
        (own_bf16, torch.bfloat16, False),
    ):
        try:
            model, logits_of = build(dtype)
            model.train()
            step = stepper(model, peer_loss(logits_of, tokens, autocast), tokens[:, 1:].numel(), steps)
            step()
            ways[name] = step
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            measure.note(f"the peer does not run with {name}: {str(error).splitlines()[0]}")
    return ways


def lines(
    name: str, peer_name: str, case: str, ours: dict[str, Step], ways: dict[str, Step], bounds: dict[str, float],
    repeats: int, details: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """One line a precision."""
    found = []
    for dtype, step in ours.items():
        if dtype == "fp32":
            way = "fp32"
        else:
            tried = {name: run().wall for name, run in ways.items()}
            way = max(tried, key=lambda key: tried[key])
        a, b = measure.interleaved(step, ways[way], repeats)
        walls = [rate.wall for rate in a], [rate.wall for rate in b]
        cpus = [rate.cpu for rate in a], [rate.cpu for rate in b]
        mine, theirs = measure.middle(walls[0]), measure.middle(walls[1])
        found.append(
            {
                "name": f"train_speed.{name}",
                "case": f"{case}/1t/{dtype}",
                "unit": "tokens/s per core",
                "ours": mine,
                "peer": theirs,
                "peer_name": f"{peer_name} ({way})",
                "ratio": mine / theirs,
                "ratio_by_cpu_time": measure.middle(cpus[0]) / measure.middle(cpus[1]),
                "bound": bounds[dtype],
                "bound_share": mine / bounds[dtype],
                "bound_share_by_cpu_time": measure.middle(cpus[0]) / bounds[dtype],
                "spread": measure.spread(*walls),
                "config": {**details, "repeats": len(a), "optimizer": "AdamW fused", **measure.machine()},
            }
        )
    return found


def dense_width(weights: int, config: rorqual.ModelConfig) -> int:
    """Width of a dense model's SwiGLU that makes its matrices hold `weights` (embedding not counted)."""
    d, layers = config.hidden_size, config.num_hidden_layers
    return (weights - config.vocab_size * d - layers * 4 * d * d) // (layers * 3 * d)


def build_llama(
    config: rorqual.ModelConfig, width: int, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """transformers' Llama of our width and depth, full attention by torch's fused kernel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=width,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=1 << 15,
        ),
        attn_implementation="sdpa",
        dtype=dtype,
    )
    return model, lambda tokens: model(tokens, use_cache=False).logits


def build_nanochat(
    folder: Path, config: rorqual.ModelConfig, width: int, length: int, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """nanochat's GPT of our depth and `width`. In bf16 it is what it calls so: fp32 weights, bf16 embeddings and
    activations; it reads that from the environment when it is imported.
    """
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")
    for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        gpt = importlib.import_module("nanochat.gpt")
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    heads = config.num_attention_heads
    shape = gpt.GPTConfig(
        sequence_len=length, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers, n_head=heads,
        n_kv_head=heads, n_embd=width,
    )  # fmt: skip
    model = gpt.GPT(shape)
    model.init_weights()
    return model, model


def nanochat_width(weights: int, config: rorqual.ModelConfig) -> int:
    """Width at which nanochat's matrices hold at least `weights` (embeddings not counted), heads of even width."""
    d = config.num_attention_heads * 8
    while config.vocab_size * d + config.num_hidden_layers * 12 * d * d < weights:
        d += config.num_attention_heads * 2
    return d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat of each case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nanochat", type=Path, help="folder of a nanochat checkout to measure as well")
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json of the network (default: small.json)")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats

    torch.set_num_threads(1)
    config = rorqual.ModelConfig.from_dict(json.loads(options.config.read_text()))
    name = options.config.stem
    ours, peer = build_pair(config)
    weights, width = activated_weights(ours, config), 0
    worst = check_agreement(ours, peer, torch.arange(300)[None] * 7 % config.vocab_size)
    width = dense_width(weights, config)
    measure.note(f"logits agree within {worst:.1e} of a row's norm; {weights:,} active weights, dense width {width}")
    del peer
    ours.train()
    ceilings = {dtype: measure.matmul_flops_per_s(dtype=DTYPES[dtype]) for dtype in DTYPES}
    measure.note("best matrix product: " + ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in ceilings.items()))

    def build_v4(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        model = build_pair(config)[1].to(dtype)
        return model, lambda tokens: model(tokens, use_cache=False).logits

    for length, batch in ((512, 4), (2048, 1), (8192, 1)):
        tokens = torch.randint(0, config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(1))
        losses = {key: our_loss(ours, tokens, dtype) for key, dtype in DTYPES.items()}
        exact, rounded = (float(losses[key]().detach()) for key in DTYPES)
        if not abs(rounded / exact - 1) < 0.01:
            raise SystemExit(
                f"Ours gives loss {exact:.4f} in fp32 and {rounded:.4f} in bf16; there is nothing to time."
            )
        flops = 6.0 * (weights + attention_products(config, length))
        bounds = {key: ceiling / flops for key, ceiling in ceilings.items()}
        mine = {key: stepper(ours, loss, batch * length, 2) for key, loss in losses.items()}
        case = f"{measure.length_name(length)}/{name}"
        details = {"batch": batch, "model": options.config.name, "flops_per_token": flops, "active_weights": weights}
        peers: list[tuple[str, str, Any, dict[str, Any]]] = [
            ("dense", "Llama, transformers", lambda dtype: build_llama(config, width, dtype), {"dense_width": width})
        ]
        if length <= 2048:  # beyond, the peer's score tensor alone takes minutes and gigabytes
            peers.insert(0, ("transformers", "DeepseekV4, transformers", build_v4, {}))
        if options.nanochat:
            d = nanochat_width(weights, config)
            build = partial(build_nanochat, options.nanochat, config, d, length)
            peers.append(("nanochat", "nanochat", build, {"n_embd": d}))
        for kind, peer_name, build, more in peers:
            own_bf16 = "its own bf16" if kind == "nanochat" else "bf16 weights"
            ways = peer_steps(build, tokens, 1 if kind == "transformers" else 2, own_bf16)
            for line in lines(kind, peer_name, case, mine, ways, bounds, repeats, {**details, **more}):
                measure.print_line(line, as_json=options.json)


if __name__ == "__main__":
    main()
