"""Several processes make the step of one: same losses, same gradients, and a worker's failure is told."""

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.errors import RorqualError
from rorqual.model import Transformer
from rorqual.train.feed import Rows
from rorqual.train.losses import LossWeights
from rorqual.train.workers import Numerics, Pool, accumulate

CFG = ModelConfig.preset("minke").replace(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    compress_ratios=(0, 4, 0),
    n_routed_experts=4,
    moe_intermediate_size=32,
    sliding_window=8,
    index_topk=2,
)
NUMERICS = Numerics(torch.float32, 64, 1)


def step() -> tuple[list[Rows], list[LossWeights]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, (3, 1, 24), generator=generator)
    labels = torch.full_like(tokens, -100)
    labels[..., :-1] = tokens[..., 1:]
    rows = [Rows(t, y, torch.zeros_like(t)) for t, y in zip(tokens, labels, strict=True)]
    return rows, [LossWeights(0.3, 1e-3, 1.0, 69, 66, 1 / 3, 1 / 3)] * 3


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_two_processes_equal_one_and_follow_weight_changes() -> None:
    rows, weights = step()
    alone, model = Transformer(CFG, seed=1), Transformer(CFG, seed=1)
    with Pool(model, CFG, 1, NUMERICS) as pool:
        for _ in range(2):
            for m in (alone, model):
                m.zero_grad(set_to_none=True)
            expected = accumulate(alone, rows, weights, dense=False, numerics=NUMERICS)
            found = pool.accumulate(rows, weights, dense=False)
            assert [p.lm for p in found] == pytest.approx([p.lm for p in expected], rel=1e-5)
            assert [p.router_counts for p in found] == [p.router_counts for p in expected]
            ours, theirs = gradients(model), gradients(alone)
            assert set(ours) == set(theirs)
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4, msg=name)
            with torch.no_grad():  # an optimizer's step, seen by the worker through the shared memory
                for m in (alone, model):
                    for p in m.parameters():
                        p.mul_(1.1)
                    for name, buffer in m.named_buffers():
                        if name.endswith("gate.bias"):
                            buffer.add_(torch.tensor([0.3, 0.0, -0.3, 0.0]))
    for name, parameter in model.named_parameters():  # the mapping outlives the pool
        assert torch.equal(parameter, dict(alone.named_parameters())[name])


def test_a_failing_worker_ends_the_step_with_its_reason() -> None:
    rows, weights = step()
    bad = Rows(rows[1].tokens + 1000, rows[1].labels, rows[1].segment_ids)
    with (
        Pool(Transformer(CFG), CFG, 1, NUMERICS) as pool,
        pytest.raises(RorqualError, match=r"Training process 1 of 2 failed: RequestError: Token ids .*--resume"),
    ):
        pool.accumulate([rows[0], bad], weights[:2], dense=False)


def test_a_dead_worker_is_noticed() -> None:
    rows, weights = step()
    with Pool(Transformer(CFG), CFG, 1, NUMERICS) as pool:
        assert pool._folder is not None and not pool._folder.exists()  # nothing to leak, however this ends
        pool._processes[0].kill()
        pool._processes[0].join()
        with pytest.raises(RorqualError, match="it ended with exit code -9"):
            pool.accumulate(rows, weights, dense=False)


def test_one_process_shares_nothing() -> None:
    model = Transformer(CFG).to("meta")  # a device whose memory cannot be shared
    with Pool(model, CFG, 0, NUMERICS) as pool:
        assert pool._folder is None


def test_a_worker_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = CFG.replace(vocab_size=1 << 20)  # its weights are not those in the shared file
    with pytest.raises(RorqualError, match=r"process 2 of 2 did not start: it ended with exit code 1"):
        Pool(Transformer(CFG), broken, 1, NUMERICS)
