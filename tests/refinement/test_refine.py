"""Instance optimisation on small synthetic pairs."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from _support.tolerances import TOL, assert_close, assert_equal
from ulae_rt.displacement import pool_displacement, upsample_displacement
from ulae_rt.errors import ShapeError
from ulae_rt.kernels import compose, lncc, warp
from ulae_rt.losses import jacobian_determinant
from ulae_rt.refinement import Level, optimise, refine, schedule
from ulae_rt.refinement.smoothing import Gaussian

SIZES = (48, 56, 52)
FINE = Level(1, 10, window=5, step=0.2, update_sigma=1.0, field_sigma=0.5)


def brain(seed: int) -> torch.Tensor:
    """(1, 1, D, H, W): texture inside an ellipsoid, 0 outside."""
    random = np.random.default_rng(seed)
    texture = gaussian_filter(random.random(SIZES), 1.5)
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    axes = np.meshgrid(*(np.linspace(-1.4, 1.4, n) for n in SIZES), indexing="ij")
    inside = sum(x**2 for x in axes) < 1
    return torch.from_numpy(np.where(inside, 0.2 + 0.8 * texture, 0)).float()[None, None]


def field(seed: int, size: float, sigma: float = 5.0) -> torch.Tensor:
    """(1, 3, D, H, W), smooth, ``size`` voxels in the root mean square."""
    random = np.random.default_rng(seed)
    raw = np.stack([gaussian_filter(random.standard_normal(SIZES), sigma) for _ in range(3)])
    return torch.from_numpy(raw * size / raw.std()).float()[None]


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moving and fixed image, and the displacement that lies between them."""
    moving, disp = brain(0), field(1, 1.0)
    return moving, warp(moving, disp), disp


def test_a_known_displacement_is_found(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    inside = (fixed > 0).expand_as(truth)
    seen: list[int] = []
    found = refine(moving, fixed, torch.zeros_like(truth), schedule(50), progress=seen.append)
    assert found.factor == 1
    assert found.disp.shape == truth.shape
    before = truth[inside].square().mean().sqrt()
    after = (found.disp - truth)[inside].square().mean().sqrt()
    assert float(after) < 0.35 * float(before)
    assert found.report.lncc_after > 2 * found.report.lncc_before > 0
    assert not found.report.kept_back
    assert float(jacobian_determinant(found.disp).min()) > 0
    assert seen == list(range(1, found.report.iterations + 1))


def test_it_begins_where_the_network_ended_and_unfolds(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    rough = truth + field(2, 0.8, sigma=1.0)
    assert float((jacobian_determinant(rough) <= 0).float().mean()) > 0.005
    found = refine(moving, fixed, rough, (FINE,)).disp
    inside = (fixed > 0).expand_as(truth)
    assert (found - truth)[inside].square().mean() < 0.3 * (rough - truth)[inside].square().mean()
    assert float((jacobian_determinant(found) <= 0)[..., 8:-8, 8:-8, 8:-8].sum()) == 0


def test_what_is_far_from_both_brains_stays() -> None:
    moving = torch.zeros(1, 1, *SIZES)
    moving[..., 4:20, 4:24, 4:22] = brain(0)[..., 16:32, 18:38, 17:35]
    fixed = moving.roll(1, 2)
    given = field(3, 0.3)[:, :, ::2, ::2, ::2]
    found = refine(moving, fixed, given, (FINE,))
    assert found.report.lncc_after > found.report.lncc_before
    whole = upsample_displacement(given, 2)
    far = slice(20 + 1 + optimise._MARGIN + 1, None)
    assert_equal("outside", found.disp[:, :, far], whole[:, :, far])
    assert not torch.equal(found.disp[:, :, :20], whole[:, :, :20])


def test_the_update_climbs_as_the_formula_says(pair: tuple[torch.Tensor, ...]) -> None:
    """Its product with a smooth v is the similarity's slope along compose(disp, t v)."""
    # So smooth that a central difference is the slope of an interpolation, nearly.
    images = [gaussian_filter(x.double(), (0, 0, 2, 2, 2)) for x in pair[:2]]
    moving, fixed = (torch.from_numpy(x) for x in images)
    disp = 0.5 * pair[2].double()
    moved = warp(moving, disp).requires_grad_()
    (slope,) = torch.autograd.grad(lncc(moved, fixed, 5), moved)
    with torch.no_grad():
        update = optimise._gradient(moved) * slope
        along = Gaussian(3.0, SIZES, update)(update)
        along /= along.square().mean().sqrt()
        found = float((update * along).sum())
        step = 1e-3
        ends = [
            float(lncc(warp(moving, compose(disp, sign * step * along)), fixed, 5))
            for sign in (1, -1)
        ]
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.03)


@pytest.mark.parametrize("what", ["same", "constant", "empty", "not a number"])
def test_a_pair_that_gains_nothing_keeps_the_networks_displacement(
    pair: tuple[torch.Tensor, ...], what: str
) -> None:
    moving, fixed, truth = pair
    given = torch.zeros_like(truth) if what == "same" else pool_displacement(truth, 2)
    if what == "same":
        moving = fixed
    elif what == "constant":
        moving, fixed = torch.ones_like(moving), torch.ones_like(fixed)
    elif what == "empty":
        moving = torch.zeros_like(moving)
    else:
        moving = moving * torch.nan
    found = refine(moving, fixed, given, schedule(10))
    assert found.factor == (1 if what == "same" else 2)
    assert_equal("displacement", found.disp, given)
    assert found.report.ended.startswith("no gain")
    assert found.report.kept_back
    assert found.report.lncc_after == found.report.lncc_before or what == "not a number"


def test_masks_are_images_too() -> None:
    moving = (brain(0) > 0).float()
    fixed = moving.roll(2, 3)
    found = refine(moving, fixed, torch.zeros(1, 3, *SIZES), schedule(40))
    overlap = [float((warp(moving, u) - fixed).abs().sum()) for u in (0 * found.disp, found.disp)]
    assert overlap[1] < 0.5 * overlap[0]


def test_where_memory_does_not_suffice_the_coarser_result_is_kept(
    pair: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, fixed, truth = pair
    original = optimise.compose

    def small(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[2] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(a, b)

    monkeypatch.setattr(optimise, "compose", small)
    found = refine(moving, fixed, torch.zeros_like(truth), schedule(10))
    assert found.factor == 2
    assert found.report.iterations == 6
    assert "too little memory at 1 mm" in found.report.ended
    assert found.report.kept_back
    assert found.report.lncc_after > found.report.lncc_before


def test_another_error_is_not_taken_for_a_lack_of_memory(
    pair: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(optimise, "compose", broken)
    with pytest.raises(RuntimeError, match="something else"):
        refine(pair[0], pair[1], torch.zeros_like(pair[2]), schedule(10))


def test_it_stops_when_nothing_more_is_gained(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    level = Level(1, 500, window=5, step=0.2, update_sigma=2.0, field_sigma=1.0)
    found = refine(moving, fixed, torch.zeros_like(truth), (level,))
    assert found.report.iterations < 200
    assert found.report.ended == "converged"


def test_twice_the_same_is_the_same(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    first, second = (refine(moving, fixed, 0.5 * truth, schedule(8)).disp for _ in range(2))
    assert_equal("displacement", first, second)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 50, 200])
def test_a_schedule_has_as_many_iterations_as_asked_for(iterations: int) -> None:
    levels = schedule(iterations)
    assert sum(level.iterations for level in levels) == iterations
    assert [level.factor for level in levels] == [2, 1]


def test_no_iterations_change_nothing(pair: tuple[torch.Tensor, ...]) -> None:
    found = refine(*pair, schedule(0))
    assert_equal("displacement", found.disp, pair[2])
    assert found.report.iterations == 0


def test_sizes_that_do_not_fit(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    with pytest.raises(ShapeError, match="expected"):
        refine(moving, fixed, truth[..., :40], schedule(2))
    with pytest.raises(ShapeError, match="expected"):
        refine(moving, fixed[..., :40], truth, schedule(2))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.3])
def test_the_gaussian_is_scipys(sigma: float) -> None:
    x = field(5, 1.0, sigma=1.0).double()
    smoothed = Gaussian(sigma, SIZES, x)(x)
    inner = (slice(None), slice(None), *(slice(8, -8),) * 3)
    radius = max(1, int(3 * sigma))
    expected = np.stack([gaussian_filter(c, sigma, radius=radius) for c in x[0].numpy()])
    assert_close(
        "inside", smoothed[inner], torch.from_numpy(expected)[None][inner], TOL["op float64"]
    )


def test_the_gaussian_keeps_a_constant_up_to_the_border() -> None:
    x = torch.full((1, 3, 7, 5, 6), 2.0, dtype=torch.float64)
    assert_close("constant", Gaussian(1.5, (7, 5, 6), x)(x), x, TOL["op float64"])
    assert Gaussian(0.0, (7, 5, 6), x)(x) is x


def test_pooling_undoes_upsampling_of_a_linear_field() -> None:
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (6, 5, 7)), indexing="ij")
    disp = torch.stack(axes)[None]
    there = upsample_displacement(disp, 2)
    inner = (slice(None), slice(None), *(slice(1, -1),) * 3)
    assert_close("inside", pool_displacement(there, 2)[inner], disp[inner], TOL["op float64"])
    assert pool_displacement(disp, 1) is disp


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_graphs_find_what_the_cpu_finds(pair: tuple[torch.Tensor, ...]) -> None:
    moving, fixed, truth = pair
    here = refine(moving, fixed, torch.zeros_like(truth), schedule(20))
    there = refine(moving.cuda(), fixed.cuda(), torch.zeros_like(truth).cuda(), schedule(20))
    inside = (fixed > 0).expand_as(truth)
    apart = (here.disp - there.disp.cpu())[inside].square().mean().sqrt()
    # Adam takes whole steps along gradients that are all rounding.
    assert float(apart) < 0.05 * float(truth[inside].square().mean().sqrt())
    assert F.mse_loss(warp(moving, there.disp.cpu()), fixed) < 1.1 * F.mse_loss(
        warp(moving, here.disp), fixed
    )
