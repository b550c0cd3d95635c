"""Full-vocabulary reverse KL: against its definition, its formula for the gradient, and its bound on memory."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.errors import ConfigError, RequestError
from rorqual.posttrain.distill import Term, response_rows, reverse_kl, reverse_kl_reference


def draw(rows: int, width: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """States of order one and a head that spreads logits over a few units."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, generator=generator) * 2 * width**-0.5
    return torch.randn(rows, width, generator=generator), head


def some_terms(rows: int, vocabulary: int, seed: int, count: int = 2) -> list[Term]:
    """Teachers of other widths than the student's, each with rows it has no say at."""
    out = []
    for number in range(count):
        hidden, head = draw(rows, 8 + 4 * number, vocabulary, seed + 10 + number)
        weight = torch.rand(rows, generator=torch.Generator().manual_seed(seed + number)) / rows
        weight[number::3] = 0
        out.append(Term(hidden, head, weight))
    return out


def gradients(hidden: Tensor, head: Tensor, call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    found = call(hidden, head)
    found.loss.backward()
    return found.loss.detach(), found.kl, hidden.grad, head.grad


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 23), st.integers(2, 40), st.integers(1, 9), st.integers(0, 99), st.integers(1, 3))
def test_chunked_is_plain(rows: int, vocabulary: int, chunk: int, seed: int, teachers: int) -> None:
    hidden, head = draw(rows, 12, vocabulary, seed)
    terms = some_terms(rows, vocabulary, seed, teachers)
    ours = gradients(hidden, head, lambda h, w: reverse_kl(h, w, terms, chunk))
    plain = gradients(hidden, head, lambda h, w: reverse_kl_reference(h, w, terms))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_gradient_is_the_formula() -> None:
    """With the identity as head the states are the logits: dL/dz = w p (log p - log q - KL)."""
    vocabulary, rows = 11, 6
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    (term,) = some_terms(rows, vocabulary, 1, 1)
    _, _, found, _ = gradients(logits, torch.eye(vocabulary), lambda h, w: reverse_kl(h, w, [term], 4))
    log_p = torch.log_softmax(logits.double(), -1)
    log_q = torch.log_softmax(term.hidden.double() @ term.head.double().T, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    wanted = term.weight.double()[:, None] * log_p.exp() * (log_p - log_q - kl)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_gradient_is_the_slope() -> None:
    """Central differences of the definition in fp64."""
    rows, vocabulary = 5, 9
    hidden, head = draw(rows, 7, vocabulary, 3)
    terms = some_terms(rows, vocabulary, 3)
    _, _, dhidden, dhead = gradients(hidden, head, lambda h, w: reverse_kl(h, w, terms, 2))

    def loss(h: Tensor, w: Tensor) -> float:
        log_p = torch.log_softmax(h @ w.T, -1)
        total = 0.0
        for term in terms:
            log_q = torch.log_softmax(term.hidden.double() @ term.head.double().T, -1)
            total += float((term.weight.double() * (log_p.exp() * (log_p - log_q)).sum(-1)).sum())
        return total

    h, w, step = hidden.double(), head.double(), 1e-5
    for at, gradient, name in ((h, dhidden, "hidden"), (w, dhead, "head")):
        for place in torch.randperm(at.numel(), generator=torch.Generator().manual_seed(4))[:12].tolist():
            kept = float(at.view(-1)[place])
            at.view(-1)[place] = kept + step
            above = loss(h, w)
            at.view(-1)[place] = kept - step
            slope = (above - loss(h, w)) / (2 * step)
            at.view(-1)[place] = kept
            assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-3, abs=2e-6), (name, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_like_the_student_teaches_nothing(dtype: torch.dtype) -> None:
    hidden, head = (t.to(dtype) for t in draw(17, 16, 48, 5))
    term = Term(hidden.clone(), head.clone(), torch.full((17,), 1 / 17))
    loss, kl, dhidden, dhead = gradients(hidden, head, lambda h, w: reverse_kl(h, w, [term], 5))
    assert loss == 0 and not kl.any() and not dhidden.any() and not dhead.any()


def test_divergence_is_that_of_the_distributions() -> None:
    """Not negative, zero weight gives zero, and the loss is the weighted sum."""
    hidden, head = draw(12, 16, 33, 6)
    terms = some_terms(12, 33, 6)
    found = reverse_kl(hidden, head, terms, 5)
    for term, kl in zip(terms, found.kl, strict=True):
        assert bool((kl[term.weight == 0] == 0).all()) and bool((kl[term.weight != 0] > 0).all())
    wanted = sum(float((term.weight * kl).sum()) for term, kl in zip(terms, found.kl, strict=True))
    assert float(found.loss) == pytest.approx(wanted, rel=1e-5)


class Live(TorchDispatchMode):
    """Counts elements of tensors at least one vocabulary wide that are alive at once, weights excluded."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.now, self.most, self.widest, self.seen = vocabulary, 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.vocabulary:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += tensor.numel()
                    self.widest = max(self.widest, tensor.shape[0])
                    weakref.finalize(tensor, self._gone, storage._cdata, tensor.numel())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("teachers", [1, 4])
def test_memory_is_bound_by_the_chunk(teachers: int) -> None:
    """Whatever the rows and teachers: at most four tensors of chunk x V at once, where plain logits are R x V each."""
    rows, vocabulary, chunk = 64, 300, 8
    hidden, head = draw(rows, 16, vocabulary, 7)
    terms = some_terms(rows, vocabulary, 7, teachers)
    with Live(vocabulary) as live:
        found = reverse_kl(hidden.requires_grad_(), head.requires_grad_(), terms, chunk)
        found.loss.backward()
    gc.collect()
    assert 0 < live.widest <= chunk
    assert live.most <= 4 * chunk * vocabulary


def test_rows_are_those_before_what_the_student_wrote() -> None:
    #        given  given  own   own    tool   own
    mask = [False, False, True, True, False, True]
    assert response_rows(mask) == [1, 2, 4]
    assert response_rows([True]) == [] and response_rows([]) == []


def test_what_cannot_be_compared_is_refused() -> None:
    hidden, head = draw(4, 8, 12, 8)
    (term,) = some_terms(4, 13, 8, 1)
    with pytest.raises(ConfigError, match="13 ids and the student 12"):
        reverse_kl(hidden, head, [term])
    (term,) = some_terms(5, 12, 8, 1)
    with pytest.raises(RequestError, match="5 states .* 4 rows"):
        reverse_kl(hidden, head, [term])
    with pytest.raises(ConfigError, match="chunk is 0"):
        reverse_kl(hidden, head, [], 0)
