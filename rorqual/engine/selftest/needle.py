"""A needle at every place of a block: compressed entries are made, found and read wherever in its block a token stands.

A row of one token repeated holds another token, the needle, once; a question much later can know of it only through
compressed entries. The first CSA layer's indexer is given weights by which the question's query points at what sets the
needle's entry apart from the others, so it must pick it, whichever of the 128 places of its block the needle stands at;
the answer must depend on it; and after hits of the prefix cache, and token by token, picks and logits must be those of
one pass. Errors of this kind (the wrong digit at one prompt length in four) have been seen in engines in use.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rorqual.engine.selftest.caches import new_cache
from rorqual.engine.selftest.report import Check
from rorqual.engine.selftest.residues import BLOCK, one_by_one
from rorqual.model import State, Trace, Transformer
from rorqual.model.block import Block
from rorqual.model.indexer import Indexer
from rorqual.ops.hadamard import hadamard

FILLER, NEEDLE, QUESTION = 7, 11, 13
BEFORE, BEHIND = BLOCK, 60
"""Tokens before the first needle and, at least, between the last and the question."""


def needle_row(place: int | None) -> Tensor:
    """The row with a needle at `BEFORE + place`, or without one."""
    row = torch.full((BEFORE + BLOCK + BEHIND,), FILLER)
    row[-1] = QUESTION
    if place is not None:
        row[BEFORE + place] = NEEDLE
    return row


@torch.inference_mode()
def teach(model: Transformer) -> Transformer:
    """A copy whose first indexer looks for what sets the needle's entries apart.

    The query's latent z at the question is mapped to a direction d, outside the rotated channels, on which the needle's
    index key has 1 wherever in its block of 4 the needle stands and the filler's has 0; every head weighs by the same.
    """
    model = copy.deepcopy(model)
    cfg = model.cfg
    layer = first_indexed(model)
    indexer = indexer_of(model, layer)
    wide = indexer.width - cfg.qk_rope_head_dim  # channels that no distance turns
    filler = unrotated_keys(model, layer, needle_row(None))[8:-8].mean(0)
    apart = torch.zeros(4, indexer.width)
    for place in range(0, BLOCK, 8):
        for part in range(4):
            keys = unrotated_keys(model, layer, needle_row(place + part))
            apart[part] += (keys[(BEFORE + place) // 4] - filler) * 8 / BLOCK
    wanted = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])  # a needle anywhere in a block, and the filler
    direction = torch.zeros(indexer.width)
    direction[:wide] = torch.linalg.pinv(torch.cat([apart, filler[None]])[:, :wide]) @ wanted
    latent, x = question_inputs(model, layer)
    weight = torch.outer(direction, latent) / latent.square().sum()
    indexer.wq_b.weight.copy_(weight.repeat(indexer.heads, 1))
    indexer.weights_proj.weight.copy_((x / x.square().sum()).expand(indexer.heads, -1))
    return model


def first_indexed(model: Transformer) -> int:
    """The first layer that has an indexer."""
    return next(spec.index for spec in model.cfg.layers if spec.has_indexer)


def indexer_of(model: Transformer, layer: int) -> Indexer:
    """A layer's indexer."""
    block = model.layers[layer]
    assert isinstance(block, Block) and block.attn.indexer is not None
    return block.attn.indexer


def unrotated_keys(model: Transformer, layer: int, row: Tensor) -> Tensor:
    """Index keys [C, K] of a layer, without the Hadamard rotation (which is its own inverse); rope is left in."""
    name = f"layers.{layer}.attn.index_entries"
    trace = Trace(capture=[name])
    model.forward_streams(row[None], trace=trace)
    return hadamard(trace.captured[name][0]).float()


def question_inputs(model: Transformer, layer: int) -> tuple[Tensor, Tensor]:
    """What a layer's indexer reads at the question: the query latent and the hidden state."""
    seen: list[Tensor] = []
    indexer = indexer_of(model, layer)
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1].float()))
        for module in (indexer.wq_b, indexer.weights_proj)
    ]
    model.forward_streams(needle_row(5)[None])
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


@torch.inference_mode()
def ask(model: Transformer, row: Tensor, state: State | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [V] at the row's last token, and what each indexer picked for it."""
    names = [f"layers.{spec.index}.attn.index_topk" for spec in model.cfg.layers if spec.has_indexer]
    trace = Trace(capture=names)
    streams = model.forward_streams(row[None], state=state, trace=trace)
    logits = model.logits(model.final_hidden(streams[:, -1:]))[0, -1]
    return logits, {name: value[0, -1].sort().values for name, value in trace.captured.items()}


def needles(model: Transformer, check: Check, step: int = 1) -> None:
    """The needle at all 128 places, or every `step`th: found, read, and the same from the cache and token by token."""
    model = teach(model)
    without, _ = ask(model, needle_row(None))
    least = 1.0
    for place in range(0, BLOCK, step):
        row, at = needle_row(place), BEFORE + place
        logits, picks = ask(model, row)
        is_found = bool((picks[f"layers.{first_indexed(model)}.attn.index_topk"] == at // 4).any())
        check.holds(is_found, f"needle at place {place}: its entry {at // 4} was not picked")
        check.holds(not torch.equal(logits, without), f"needle at place {place}: the answer does not depend on it")
        least = min(least, float((logits - without).abs().max()))
        cache = new_cache(model, None, "full")
        stored = cache.begin(row[:-1].tolist())
        with torch.inference_mode():
            model.forward_streams(row[None, :-1], state=stored.state)
        cache.end_of_prompt(stored, torch.zeros(model.cfg.hidden_size))
        lease = cache.begin(row.tolist())
        check.holds(lease.num_cached == len(row) - 1, f"needle at place {place}: the cache brought {lease.num_cached}")
        found, again = ask(model, row[lease.num_cached :], lease.state)
        check.same(found, logits, f"needle at place {place}, from the cache")
        check.holds(
            all(torch.equal(again[name], picked) for name, picked in picks.items()),
            f"needle at place {place}: other picks from the cache",
        )
        if place % 8 == 0:
            state = model.new_state()
            decoded = one_by_one(model, row, state)[-1]
            check.same(decoded, logits, f"needle at place {place}, token by token")
    check.note = f"without the needle the answer's logits differ by {least:.2g} at least"
