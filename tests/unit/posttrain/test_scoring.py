"""Log-probabilities of given tokens: the engine's, with its temperature, its truncated supports and its experts."""

import pytest
import torch
from mock_model import byte_tokenizer
from small_models import build, config, gap, some_tokens
from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.sampler import filtered_probabilities
from rorqual.errors import RequestError
from rorqual.model import Trace, Transformer
from rorqual.posttrain.scoring import token_logprobs, token_scores

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(config(vocab_size=byte_tokenizer().vocab_size))


def drawn_probabilities(model: Transformer, ids: Tensor, params: SamplingParams) -> Tensor:
    """What the engine's sampler draws from at every position of one row, [S, V]."""
    with torch.no_grad():
        logits = model(ids)[0]
    return torch.stack([filtered_probabilities(row, params) for row in logits])


def test_it_is_what_the_engine_reports(model: Transformer) -> None:
    prompts = [some_tokens(model, n, draw_seed=n).tolist() for n in (5, 19, 33)]
    with Engine(model, byte_tokenizer()) as engine:
        done = engine.generate(prompts, SamplingParams(max_tokens=24, logprobs=True, seed=3))
    rows = [[*c.prompt_ids, *c.ids] for c in done]
    lengths = [len(row) for row in rows]
    ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows])
    with torch.no_grad():
        ours = token_logprobs(model, ids, lengths=lengths)
    for row, completion in zip(ours, done, strict=True):
        first = len(completion.prompt_ids)
        assert gap(row[first - 1 : first - 1 + len(completion.ids)], torch.tensor(completion.logprobs)) < 1e-4
        assert not row[first - 1 + len(completion.ids) :].any()


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.1, "top_p": 0.9}])
def test_temperature_and_support_are_the_samplers(model: Transformer, filters: dict[str, float]) -> None:
    params = SamplingParams(temperature=0.7, **filters)  # type: ignore[arg-type]
    ids = some_tokens(model, 1, 20)
    probabilities = drawn_probabilities(model, ids, params)
    for t in range(19):  # tokens that the filters had left
        ids[0, t + 1] = probabilities[t].argsort(descending=True)[t % 2 if probabilities[t].gt(0).sum() > 1 else 0]
        probabilities = drawn_probabilities(model, ids, params)
    expected = probabilities[:-1].gather(1, ids[0, 1:, None]).squeeze(1).log().float()
    kept = probabilities[:-1] > 0
    widest = int(kept.sum(1).max())
    as_ids = torch.full((1, 19, widest), -1)
    for t, row in enumerate(kept):
        as_ids[0, t, : int(row.sum())] = row.nonzero().squeeze(1)
    for mask in (kept[None], as_ids):
        found = token_scores(model, ids, temperature=0.7, sampling_mask=mask)
        assert gap(found.logprobs[0].detach(), expected) < 1e-4
        entropy = -torch.special.xlogy(probabilities[:-1], probabilities[:-1]).sum(1).float()
        assert gap(found.entropies[0], entropy) < 1e-4
    assert filters == {} or (token_logprobs(model, ids, temperature=0.7)[0] < expected - 1e-3).any()


def test_packed_documents_and_wanted_positions(model: Transformer) -> None:
    first, second = some_tokens(model, 1, 13, draw_seed=4), some_tokens(model, 1, 22, draw_seed=5)
    packed = torch.cat([first, second], 1)
    segments = torch.tensor([[0] * 13 + [1] * 22])
    temperature = torch.linspace(0.5, 1.5, 34)[None]
    together = token_logprobs(model, packed, segments, temperature, chunk=7)
    alone = [token_logprobs(model, first, temperature=temperature[:, :12]),
             token_logprobs(model, second, temperature=temperature[:, 13:])]  # fmt: skip
    assert together[0, 12] == 0
    assert gap(together[:, :12], alone[0]) < 1e-4 and gap(together[:, 13:], alone[1]) < 1e-4
    wanted = torch.rand(1, 34, generator=torch.Generator().manual_seed(0)) < 0.5
    some = token_logprobs(model, packed, segments, temperature, wanted=wanted)
    assert gap(some, together * wanted) < 1e-5


def test_experts_are_replayed(model: Transformer) -> None:
    ids = some_tokens(model, 2, 17)
    note = Trace(router=True, router_ids=True)
    free = token_logprobs(model, ids, trace=note)
    used = {record.name: record.experts for record in note.routers if not record.is_hash}
    assert used and gap(token_logprobs(model, ids, routing=used), free) == 0
    others = {name: (experts + 1) % model.cfg.n_routed_experts for name, experts in used.items()}
    forced = token_logprobs(model, ids, routing=others)
    assert gap(forced, free) > 1e-3
    check = Trace(router=True, router_ids=True)
    token_logprobs(model, ids, routing={n: torch.cat([e, e[:, :1]], 1) for n, e in others.items()}, trace=check)
    assert all(torch.equal(r.experts, others[r.name]) for r in check.routers if not r.is_hash)


def test_gradient_in_chunks_is_that_of_all_logits(model: Transformer) -> None:
    ids = some_tokens(model, 2, 12)
    weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(2))
    gradients = []
    for chunk in (0, 5):
        model.zero_grad()
        if chunk:
            (token_logprobs(model, ids, temperature=0.8, chunk=chunk) * weights).sum().backward()
        else:
            whole = torch.log_softmax(model(ids[:, :-1]) / 0.8, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            (whole * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gap(gradient, gradients[1][name]) < 1e-4 * (1 + float(gradient.abs().max())), name


def test_what_cannot_be_scored_is_refused(model: Transformer) -> None:
    ids = some_tokens(model, 1, 6)
    with pytest.raises(RequestError, match="above 0"):
        token_logprobs(model, ids, temperature=0.0)
    excluded = torch.full((1, 5, 1), -1)
    excluded[0, 2, 0] = (int(ids[0, 3]) + 1) % model.cfg.vocab_size
    with pytest.raises(RequestError, match="excludes a token"):
        token_logprobs(model, ids, sampling_mask=excluded)
    with pytest.raises(RequestError, match="about the tokens after the first"):
        token_logprobs(model, ids, sampling_mask=torch.ones(1, 6, 64, dtype=torch.bool))
    with pytest.raises(RequestError, match="wanted has shape"):
        token_logprobs(model, ids, wanted=torch.ones(1, 6, dtype=torch.bool))
