import pytest
import torch

from ulae_rt.kernels import diffusion, lncc, warp
from ulae_rt.losses import (
    FOLDING_MARGIN,
    Labels,
    folding_penalty,
    jacobian_determinant,
    label_dice,
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


def random_labels(pairs: int, count: int) -> Labels:
    random = torch.Generator().manual_seed(2)
    maps = torch.randint(0, count, (2, pairs, 1, 6, 5, 7), generator=random)
    return Labels(*maps.to(torch.int16), count)


def test_label_dice_is_that_of_every_indicator_warped() -> None:
    labels = random_labels(pairs=2, count=4)
    # The largest value is in one map only, and does not count.
    labels.fixed[labels.fixed == 3] = 0
    torch.manual_seed(3)
    # Some of it points out of the volume.
    disp = 2 * torch.randn(2, 3, 6, 5, 7, dtype=torch.float64)
    expected = []
    for label in (1, 2):
        carried = warp((labels.moving == label).double(), disp)
        there = (labels.fixed == label).double()
        both = (carried * there).sum((1, 2, 3, 4))
        expected.append(2 * both / (carried + there).sum((1, 2, 3, 4)))
    torch.testing.assert_close(label_dice(labels, disp), torch.stack(expected).mean())


def test_label_dice_of_a_map_with_itself_and_with_nothing() -> None:
    labels = random_labels(pairs=1, count=4)
    still = torch.zeros(1, 3, 6, 5, 7)
    assert float(label_dice(labels._replace(fixed=labels.moving), still)) == pytest.approx(1)
    assert float(label_dice(labels._replace(fixed=0 * labels.moving), still)) == 0


def test_label_dice_gradient() -> None:
    labels = random_labels(pairs=1, count=3)
    torch.manual_seed(4)
    # Off the lattice, where the weights have no kink.
    disp = torch.randint(-1, 2, (1, 3, 6, 5, 7)) + 0.2 + 0.6 * torch.rand(1, 3, 6, 5, 7)
    disp = disp.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: label_dice(labels, u), disp)


def test_labels_count_with_their_weight() -> None:
    labels = random_labels(pairs=1, count=3)
    torch.manual_seed(5)
    images = torch.rand(2, 1, 1, 6, 5, 7)
    disp = torch.rand(1, 3, 6, 5, 7)
    without = registration_loss(*images, disp, windows=(3,))
    loss = registration_loss(*images, disp, windows=(3,), labels=labels, label_weight=0.5)
    torch.testing.assert_close(loss.labels, label_dice(labels, disp))
    torch.testing.assert_close(loss.total, without.total - 0.5 * loss.labels)
    assert float(without.labels) == 0
