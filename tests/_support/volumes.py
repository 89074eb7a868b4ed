"""Seeded volumes and displacements for the tests."""

import torch
from torch import Tensor
from torch.nn import functional as F

Sizes = tuple[int, int, int]


def generator(seed: int = 0) -> torch.Generator:
    """The tests' only source of randomness."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in [0, 1), different in every voxel."""
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def smooth_image(
    sizes: Sizes,
    batch: int = 1,
    channels: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A brain-like volume in [0, 1]: coarse blobs with some texture, dark towards the faces."""
    x = torch.zeros(batch, channels, *sizes, dtype=torch.float64)
    for octave, weight in ((3, 1.0), (6, 0.5), (12, 0.25)):
        coarse = noise(batch, channels, octave, octave, octave, seed=seed + octave)
        x += weight * F.interpolate(coarse, size=sizes, mode="trilinear", align_corners=True)
    for axis, size in enumerate(sizes, start=2):
        ramp = torch.sin(torch.linspace(0.1, torch.pi - 0.1, size, dtype=torch.float64))
        x *= ramp.view([-1 if i == axis else 1 for i in range(5)])
    return (x / x.amax(dim=(1, 2, 3, 4), keepdim=True)).to(dtype)


def smooth_displacement(
    sizes: Sizes, reach: float, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A displacement without folds for a small ``reach`` (its largest component, in voxels)."""
    coarse = noise(batch, 3, 4, 4, 4, seed=seed) - 0.5
    u = F.interpolate(coarse, size=sizes, mode="trilinear", align_corners=True)
    return (u * (reach / u.abs().max())).to(dtype)


def off_lattice_displacement(
    sizes: Sizes, reach: int = 2, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Whole voxels up to ``reach`` plus a fraction in [0.1, 0.9].

    Trilinear sampling has a kink at every voxel centre; finite differences must not straddle one.
    """
    g = generator(seed)
    shape = (batch, 3, *sizes)
    whole = torch.randint(-reach, reach, shape, generator=g).double()
    return (whole + 0.1 + 0.8 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)


def wave_image(sizes: Sizes) -> Tensor:
    """One slow cosine an axis: nearly what trilinear interpolation reproduces."""
    x = torch.ones(1, 1, *sizes, dtype=torch.float64)
    for axis, size in enumerate(sizes, start=2):
        wave = torch.cos(torch.arange(size, dtype=torch.float64) * (0.15 + 0.02 * axis))
        x *= wave.view([-1 if i == axis else 1 for i in range(5)])
    return x
