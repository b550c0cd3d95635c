"""Newton-Schulz against the polar factor from an SVD, and its behaviour at zero."""

import pytest
import torch

from rorqual.ops.newton_schulz import FIVE_STEP, newton_schulz


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def with_singular_values(rows: int, columns: int, values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return (u * values) @ v.T


@pytest.mark.parametrize("shape", [(16, 16), (24, 96), (96, 24), (1, 40), (4, 512)])
def test_equals_the_polar_factor(shape: tuple[int, int]) -> None:
    rank = min(shape)
    values = torch.logspace(0, -3, rank, dtype=torch.float64)  # above 1e-4 of the Frobenius norm
    matrix = with_singular_values(*shape, values, seed=1)
    found = newton_schulz(matrix.float())
    torch.testing.assert_close(found.double(), polar_factor(matrix), atol=3e-3, rtol=0)
    spectrum = torch.linalg.svdvals(found)
    assert (spectrum - 1).abs().max() < 3e-3


def test_singular_values_down_to_1e_4_of_the_norm_reach_one() -> None:
    values = torch.tensor([1.0, 0.5, 1e-2, 1.2e-4], dtype=torch.float64)
    spectrum = torch.linalg.svdvals(newton_schulz(with_singular_values(8, 12, values, seed=2).float()))[:4]
    assert (spectrum - 1).abs().max() < 3e-3


def test_batch_equals_one_by_one_and_keeps_leading_axes() -> None:
    matrices = torch.randn(2, 3, 8, 20, generator=torch.Generator().manual_seed(0))
    batched = newton_schulz(matrices)
    assert batched.shape == matrices.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], newton_schulz(matrices[i, j]))


def test_zero_matrix_gives_zeros_beside_ordinary_ones() -> None:
    matrices = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    matrices[0] = 0
    found = newton_schulz(matrices)
    assert torch.equal(found[0], torch.zeros(6, 9))
    assert torch.isfinite(found).all() and found[1].norm() > 2


def test_scale_of_the_input_does_not_matter() -> None:
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(newton_schulz(matrix * 1e-9), newton_schulz(matrix), atol=1e-4, rtol=1e-3)


def test_bfloat16_stays_near() -> None:
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    found = newton_schulz(matrix, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.03


def test_five_steps_leave_a_spread() -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    spectrum = torch.linalg.svdvals(newton_schulz(matrix, FIVE_STEP))
    assert spectrum.max() > 1.05 and spectrum.max() < 1.25
