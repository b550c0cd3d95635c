"""Rows cut into 1, 2 and 4 parts give the logits, losses and gradients of whole rows."""

import functools

import context_cases
import pytest
import torch
from ranks import run_ranks

from rorqual.errors import RequestError
from rorqual.model.context import part_bounds

SIZES = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def whole() -> dict[str, list[dict]]:
    torch.set_num_threads(1)
    out = {}
    for name, make in context_cases.MODELS.items():
        model = make()
        out[name] = [context_cases.step(model, case) for case in context_cases.cases()]
    return out


@functools.cache
def parts(size: int) -> list[dict[str, dict[int, list[dict]]]]:
    return run_ranks(context_cases.steps_in_parts, size, [size])


@pytest.mark.parametrize("model", list(context_cases.MODELS))
@pytest.mark.parametrize("size", SIZES)
def test_parts_are_the_whole(whole: dict, size: int, model: str) -> None:
    for number, expected in enumerate(whole[model]):
        shares = [rank[model][size][number] for rank in parts(size)]
        logits = torch.cat([share["logits"] for share in shares], 1)
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
        assert sum(share["loss"] for share in shares) == pytest.approx(expected["loss"], abs=1e-5)
        for part in ("lm", "mtp", "balance", "index"):
            total = sum(getattr(share["parts"], part) for share in shares)
            assert total == pytest.approx(getattr(expected["parts"], part), abs=1e-5), f"case {number}: {part}"
        for name, counts in expected["parts"].router_counts.items():
            shared = torch.tensor([share["parts"].router_counts[name] for share in shares]).sum(0)
            assert shared.tolist() == counts, f"case {number}: {name}"
        for share in shares:
            assert share["parts"].index_recall == pytest.approx(expected["parts"].index_recall, abs=1e-5, nan_ok=True)
        for name, gradient in expected["gradients"].items():
            total = torch.stack([share["gradients"][name] for share in shares]).sum(0)
            difference = float((total - gradient).abs().max())
            scale = max(1.0, float(gradient.abs().max()))
            assert difference <= 1e-5 * scale, f"case {number}: {name} is off by {difference} (scale {scale})"


@pytest.mark.parametrize("model", list(context_cases.MODELS))
def test_every_parameter_is_checked(whole: dict, model: str) -> None:
    steps = whole[model]
    touched = {name for step in steps for name, gradient in step["gradients"].items() if gradient.any()}
    assert touched == set(steps[0]["gradients"])


def test_a_state_needs_no_other_part() -> None:
    model = context_cases.build_model()
    tokens = torch.arange(30).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens)
        model.context = NoContext()
        found = model(tokens, state=model.new_state(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class NoContext:
    """Other parts that nobody may ask."""

    rank, size = 1, 2


def test_too_few_tokens() -> None:
    with pytest.raises(RequestError, match="3 tokens, which cannot be cut into 4 parts"):
        part_bounds(3, 4)
