"""A step through pipeline stages, for the checks; a module of its own so that spawned ranks can import it."""

from typing import Any

import context_cases
import torch
from context_cases import build_model, cases
from torch import Tensor

from rorqual.model import Transformer
from rorqual.parallel import context
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.pipeline import Pipeline
from rorqual.parallel.recompute import Mode, install
from rorqual.parallel.stages import cut_model
from rorqual.train import losses
from rorqual.train.feed import Rows

LAYOUTS: dict[str, tuple[dict[str, int], Mode]] = {
    "pp4": ({"pp": 4}, "none"),
    "pp2 x cp2": ({"pp": 2, "cp": 2}, "none"),
    "pp2 x cp2, mhc": ({"pp": 2, "cp": 2}, "mhc"),
    "pp2 x cp2, block": ({"pp": 2, "cp": 2}, "block"),
    "pp2 x dp2": ({"pp": 2}, "none"),
}


def micro_batches() -> list[Rows]:
    """Five of one shape: more than stages for 1F1B, with documents, padding and blank rows."""
    make = context_cases.random.Random(11)
    out = [context_cases.packed_rows(make, 2, 24, 20, padding=i % 2 == 1) for i in range(5)]
    return out


def weights_of(batches: list[Rows]) -> list[losses.LossWeights]:
    targets = sum(int((b.labels != losses.IGNORE).sum()) for b in batches)
    mtp = sum(int((t != losses.IGNORE).sum()) for b in batches for t in losses.mtp_targets(b, 1))
    queries = [losses.num_index_queries(b) for b in batches]
    return [
        losses.LossWeights(0.3, 0.01, 1.0, targets, mtp, row_share=1 / len(batches), index_share=q / sum(queries))
        for q in queries
    ]


def step(model: Transformer, pipeline: Pipeline | None, batches: list[Rows]) -> dict[str, Any]:
    """Loss parts and gradients of this process's share in the step."""
    model.zero_grad(set_to_none=True)
    weights, parts = weights_of(batches), []

    def compute(number: int, streams: Tensor | None) -> Tensor:
        out, part = losses.compute(model, batches[number], weights[number], dense=False, streams=streams)
        parts.append(part)
        return out

    if pipeline is None:
        for number in range(len(batches)):
            compute(number, None).backward()
    else:
        pipeline.forward_backward(len(batches), batches[0].tokens, compute)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"parts": parts, "gradients": gradients, "elsewhere": model.elsewhere}


def logits(model: Transformer, pipeline: Pipeline | None, rows: Rows) -> Tensor:
    """Logits of this process's part of the rows, by a forward pass through all stages."""

    def compute(_: int, streams: Tensor | None) -> Tensor:
        out = model.forward_streams(rows.tokens, segment_ids=rows.segment_ids, streams=streams)
        return model.logits(model.final_hidden(out)) if model.is_last else out

    with torch.no_grad():
        if pipeline is None:
            return compute(0, None)
        return pipeline.relay(rows.tokens, compute)


def steps_in_stages() -> dict[str, dict[str, Any]]:
    """A step in every layout, twice with another number of micro-batches."""
    results = {}
    for name, (sizes, mode) in LAYOUTS.items():
        mesh = Mesh.build(torch.device("cpu"), **sizes)
        model = build_model()
        cut_model(model, mesh, seq_len=24)
        context.install(model, mesh)
        install(model, mode)
        pipeline = Pipeline(model, mesh, torch.device("cpu"))
        batches = micro_batches()
        few = step(model, pipeline, batches[:1])  # fewer than stages
        results[name] = {
            "few": few,
            "many": step(model, pipeline, batches),
            "logits": logits(model, pipeline, cases()[0].rows),
            "place": (mesh.pp_rank, mesh.dp_rank, mesh.cp_rank),
        }
    return results
