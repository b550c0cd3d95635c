"""What the ranks of `test_engram_sharding.py` do; in a module of its own so that spawned processes can import it."""

from typing import Any

import torch
import torch.distributed as dist
from small_models import build, config, some_tokens
from torch import Tensor

from rorqual.model import Transformer
from rorqual.model.engram import Engram, memories
from rorqual.parallel.engram import spread_tables, whole_table
from rorqual.train.groups import assign
from rorqual.train.table_adam import TableAdam

LENGTH = 24


def model_of(placement: str, sparse: bool) -> Transformer:
    """Two memories whose hashes collide often (few rows), the same on every rank."""
    settings = {"layers": [1, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4, "placement": placement}
    model = build(config(engram=settings))
    for memory in memories(model):
        memory.is_sparse = sparse
    return model


def share(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """The rows of one rank: tokens, packed documents, lengths (one row is padded)."""
    tokens = some_tokens(model_of("device", False), 2, LENGTH, draw_seed=10 + rank)
    segments = (torch.arange(LENGTH) >= 9 + rank).int().expand(2, -1).clone()
    segments[1, LENGTH - 3 :] = 7
    return tokens, segments, [LENGTH, LENGTH - 3]


def loss(model: Transformer, tokens: Tensor, segments: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Some loss over the valid tokens, and the streams."""
    streams = model.forward_streams(tokens, segment_ids=segments, lengths=lengths)
    inside = torch.arange(tokens.shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    return streams[inside].square().sum() / 100, streams[inside].detach()


def single(world: int, placement: str, sparse: bool, announced: bool) -> dict[str, Any]:
    """One process that takes the ranks' shares as micro-batches."""
    model = model_of(placement, sparse)
    shares = [share(rank) for rank in range(world)]
    if announced:
        model.announce([(t, n, s) for t, s, n in shares])
    outputs = []
    for tokens, segments, lengths in shares:
        value, streams = loss(model, tokens, segments, lengths)
        value.backward()
        outputs.append(streams)
    if announced:
        model.collect()
    return {"outputs": outputs, **tables_of(model, lambda m: (m.table.grad, m.table.detach()))}


def tables_of(model: Transformer, look: Any) -> dict[str, Any]:
    """Gradients and, after a step of the tables' optimizer, values of all tables."""
    before = [look(memory) for memory in memories(model)]
    gradients = [g.to_dense() if g.is_sparse else g.clone() for g, _ in before]
    found = [a for a in assign(model, model.cfg) if a.role.kind == "table"]
    assert len(found) == 2
    TableAdam(found).step(1e-2)
    return {"gradients": gradients, "tables": [look(memory)[1].clone() for memory in memories(model)]}


def ranks(cases: list[tuple[str, bool, bool]]) -> list[dict[str, Any]]:
    """Each case on this rank, tables spread over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    out = []
    for placement, sparse, announced in cases:
        model = model_of(placement, sparse)
        whole = [memory.hash.num_rows for memory in memories(model)]
        shards = spread_tables(model, dist.group.WORLD)
        assert [shard.shape[0] for shard in shards.values()] == whole
        assert all(memory.table.shape[0] <= -(-n // world) for memory, n in zip(memories(model), whole, strict=True))
        tokens, segments, lengths = share(rank)
        if announced:
            model.announce([(tokens, lengths, segments)])
        value, streams = loss(model, tokens, segments, lengths)
        value.backward()
        if announced:
            model.collect()

        def look(memory: Engram) -> tuple[Tensor, Tensor]:
            assert memory.table.grad is not None
            return memory.table.grad, whole_table(memory)

        out.append({"streams": streams, **tables_of(model, look)})
        with torch.no_grad():  # evaluation and decoding work too, every rank its own tokens
            state = model.new_state()
            row = tokens[:1, :10]
            stepped = torch.cat([model(part, state=state) for part in row.split([4, 1, 5], 1)], 1)
            out[-1]["gap"] = float((stepped - model(row)).abs().max())
    return out
