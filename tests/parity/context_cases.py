"""Rows and steps for the context-parallel checks; a module of its own so that spawned ranks can import it."""

import random
from dataclasses import dataclass
from typing import Any

import small_models
import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.model import Transformer
from rorqual.parallel.context import ContextGroup
from rorqual.train import losses
from rorqual.train.feed import Rows


@dataclass
class Case:
    """A micro-batch and how it is computed."""

    rows: Rows
    dense: bool


def packed_rows(generator: random.Random, num_rows: int, num_tokens: int, longest: int, padding: bool) -> Rows:
    """Random documents of 1 to `longest` tokens side by side; with `padding` some rows end early."""
    tokens = torch.tensor([[generator.randrange(64) for _ in range(num_tokens)] for _ in range(num_rows)])
    segments = torch.zeros_like(tokens)
    lengths = [num_tokens - (generator.randrange(num_tokens // 2) if padding else 0) for _ in range(num_rows)]
    for row, length in enumerate(lengths):
        document = place = 0
        while place < num_tokens:
            count = generator.randint(1, longest) if place < length else 1  # padding has a document of its own a token
            segments[row, place : min(place + count, length) if place < length else place + 1] = document
            place, document = min(place + count, length) if place < length else place + 1, document + 1
    return Rows(tokens, next_labels(tokens, segments, lengths), segments, tuple(lengths) if padding else None)


def plain_rows(generator: random.Random, num_rows: int, num_tokens: int, padding: bool) -> Rows:
    """Rows of one document each."""
    tokens = torch.tensor([[generator.randrange(64) for _ in range(num_tokens)] for _ in range(num_rows)])
    lengths = [num_tokens - (generator.randrange(num_tokens // 2) if padding else 0) for _ in range(num_rows)]
    return Rows(tokens, next_labels(tokens, None, lengths), None, tuple(lengths) if padding else None)


def next_labels(tokens: Tensor, segments: Tensor | None, lengths: list[int]) -> Tensor:
    """The next token of the same document."""
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    if segments is not None:
        labels[:, :-1][segments[:, 1:] != segments[:, :-1]] = losses.IGNORE
    for row, length in enumerate(lengths):
        labels[row, max(length - 1, 0) :] = losses.IGNORE
    return labels


def cases() -> list[Case]:
    """Every kind of row: short documents, documents over three parts, none at all, padding, uneven and tiny parts."""
    make = random.Random(7)
    rows = [
        packed_rows(make, 2, 48, 6, padding=False),  # most documents shorter than a block of 8, some than one of 4
        packed_rows(make, 2, 48, 40, padding=True),
        packed_rows(make, 3, 61, 30, padding=False),  # 61 does not divide
        packed_rows(make, 2, 22, 20, padding=True),  # parts of 5 or 6 tokens: the halo spans several of them
        plain_rows(make, 2, 48, padding=False),
        plain_rows(make, 3, 39, padding=True),
        Rows(*(t := torch.arange(7).unsqueeze(0), next_labels(t, None, [7]))),  # no HCA entry at all
        Rows(t := torch.arange(9).unsqueeze(0), next_labels(t, None, [9]), torch.arange(9).unsqueeze(0)),  # no entry
    ]
    return [Case(r, dense=i % 2 == 1) for i, r in enumerate(rows)] + [Case(rows[2], True), Case(rows[4], True)]


def step(model: Transformer, case: Case) -> dict[str, Any]:
    """Loss parts, logits and gradients of this process's share."""
    model.zero_grad(set_to_none=True)
    rows = case.rows
    targets = int((rows.labels != losses.IGNORE).sum())
    mtp_targets = int((losses.mtp_labels(rows.labels, rows.segment_ids) != losses.IGNORE).sum())
    weights = losses.LossWeights(0.3, 0.01, 1.0, targets, mtp_targets, row_share=0.5, index_share=0.25)
    loss, parts = losses.compute(model, rows, weights, dense=case.dense)
    loss.backward()
    with torch.no_grad():
        logits = model(rows.tokens, segment_ids=rows.segment_ids, lengths=rows.lengths)
        lengths = torch.tensor(rows.lengths or [rows.tokens.shape[1]] * len(rows.tokens)).unsqueeze(-1)
        is_text = model.own((torch.arange(rows.tokens.shape[1]) < lengths).unsqueeze(-1))
        logits = logits.masked_fill(~is_text, 0)  # on padding they mean nothing
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return {"loss": loss.item(), "parts": parts, "logits": logits, "gradients": gradients}


def build_model(**changes: Any) -> Transformer:
    return small_models.build(small_models.config(num_nextn_predict_layers=1, **changes), weights_seed=3)


def engram_model() -> Transformer:
    """Two memories: one whose hashes and convolution look back 9 tokens, over several parts where those are short."""
    engram = {"layers": [1, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4}
    return build_model(engram=engram)


MODELS = {"v4": build_model, "engram": engram_model}


def steps_in_parts(sizes: list[int]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The cases with rows cut into each number of parts; the first parts' processes do the work, others watch."""
    torch.use_deterministic_algorithms(True)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in MODELS}
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if dist.get_rank() >= size:
            continue
        for name, make in MODELS.items():
            model = make()
            model.context = ContextGroup(group)
            results[name][size] = [step(model, case) for case in cases()]
    return results
