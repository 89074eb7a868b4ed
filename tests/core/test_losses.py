import pytest
import torch

from ulae_rt.kernels import diffusion, lncc
from ulae_rt.losses import (
    FOLDING_MARGIN,
    folding_penalty,
    jacobian_determinant,
    registration_loss,
)


def linear_displacement(matrix: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """u(p) = matrix p - p, so that p + u(p) has the Jacobian ``matrix`` everywhere."""
    axes = [torch.arange(s, dtype=torch.float64) for s in size]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return (torch.einsum("ij,jdhw->idhw", matrix, points) - points)[None]


def test_jacobian_of_a_linear_map_is_its_determinant() -> None:
    matrix = torch.tensor(
        [[1.1, 0.2, -0.1], [0.05, 0.9, 0.3], [0.0, -0.2, 1.3]], dtype=torch.float64
    )
    jacobian = jacobian_determinant(linear_displacement(matrix, (4, 5, 6)))
    assert jacobian.shape == (1, 3, 4, 5)
    torch.testing.assert_close(jacobian, torch.linalg.det(matrix).expand_as(jacobian))


def test_a_mirror_folds_and_the_identity_does_not() -> None:
    mirror = linear_displacement(
        torch.diag(torch.tensor([-1.0, 1, 1], dtype=torch.float64)), (3,) * 3
    )
    assert (jacobian_determinant(mirror) < 0).all()
    assert float(folding_penalty(mirror)) == pytest.approx(FOLDING_MARGIN + 1)
    assert float(folding_penalty(torch.zeros(1, 3, 4, 4, 4))) == 0


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    moved, fixed = torch.rand(2, 1, 1, 9, 10, 8, dtype=torch.float64)
    disp = torch.randn(1, 3, 9, 10, 8, dtype=torch.float64)
    loss = registration_loss(
        moved, fixed, disp, windows=(5, 3), gamma=0.25, smoothness=0.7, folding=2.0
    )
    similarity = -lncc(moved, fixed, 5) - 0.25 * lncc(moved, fixed, 3)
    torch.testing.assert_close(loss.similarity, similarity)
    expected = similarity + 0.7 * diffusion(disp) + 2.0 * folding_penalty(disp)
    torch.testing.assert_close(loss.total, expected)


def test_without_a_weight_the_penalty_is_not_computed() -> None:
    disp = torch.randn(1, 3, 5, 5, 5)
    image = torch.rand(1, 1, 5, 5, 5)
    assert float(registration_loss(image, image, disp).folding) == 0


def test_gradients() -> None:
    torch.manual_seed(1)
    moved = torch.rand(1, 1, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    fixed = torch.rand(1, 1, 5, 4, 6, dtype=torch.float64)
    disp = torch.randn(1, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, u: registration_loss(m, fixed, u, windows=(3,), folding=1.0).total, (moved, disp)
    )
