"""From the network's displacement to one that its own pair agrees with better."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.displacement import pool_displacement, upsample_displacement
from ulae_rt.errors import ShapeError
from ulae_rt.kernels.compose.op import compose
from ulae_rt.kernels.lncc.op import LnccTo, lncc
from ulae_rt.kernels.warp.op import warp
from ulae_rt.refinement.schedule import Level
from ulae_rt.refinement.smoothing import Gaussian
from ulae_rt.reports import Refinement

_Box = tuple[slice, slice, slice]

# Voxels around the brains that are refined with them: as far as anything is moved or smoothed to.
_MARGIN = 8
# Iterations between two looks at the similarity, for which the host waits for the device.
_LOOK_EVERY = 5
# A level is over when it gains less in this many iterations than this part of what it gained in
# its first as many.
_ENOUGH = 0.02
# What Adam finds to climb between two images that are one already, where a voxel of stronger
# contrast beats the correlation's eps, is a tenth of this; a pair of people gains tens of it.
_LEAST_GAIN = 0.005
# Adam's, and how much of the largest moment is too little to make a whole step of: where neither
# image has anything to say, rounding is not to move the field.
_BETA_1, _BETA_2, _STILL = 0.9, 0.99, 1e-3
_WARM_UPS = 3


@dataclass(frozen=True)
class Refined:
    """What a refinement gives.

    Attributes:
        disp: (1, 3, D / factor, H / factor, W / factor) float32, its own voxels.
        factor: working grid's voxels along an edge of one of ``disp``'s.
        report: how it went.
    """

    disp: Tensor
    factor: int
    report: Refinement


def refine(
    moving: Tensor,
    fixed: Tensor,
    disp: Tensor,
    levels: tuple[Level, ...],
    *,
    progress: Callable[[int], None] | None = None,
) -> Refined:
    """Climb the local correlation of warp(moving, disp) and fixed, level by level.

    In each iteration the field u is composed with a small one v, as greedy registration does:

        W = warp(moving, u),  g = G_update * (dLNCC(W, fixed) / dW  grad W)
        v = step Adam(g),     u <- G_field * compose(u, v)

    with Gaussians G. So the gradient needs no derivative of the sampling, and u, which is only
    ever composed with small steps and smoothed, does not fold.

    Args:
        moving: (1, 1, D, H, W) in [0, 1], on the working grid; sizes are multiples of every factor.
        fixed: the same shape.
        disp: (1, 3, D / f, H / f, W / f), voxels of a grid of means over blocks of f.
        levels: from coarse to fine; those coarser than ``disp`` begin with its means.
        progress: called with the iterations done.

    Returns:
        The refined displacement, on the finest level's grid. Where nothing was gained, or what came
        out is not finite, ``disp`` as it was.

    Raises:
        ShapeError: sizes that do not fit one another.

    Source: the composed, smoothed update is that of P. Yushkevich's greedy
    (github.com/pyushkevich/greedy); Adam on it that of R. Jena et al., FireANTs (arXiv 2404.01249).
    """
    start = time.perf_counter()
    given = _factor_of(moving, fixed, disp)
    levels = tuple(level for level in levels if level.iterations)
    box = _box(moving, fixed, max([given, *(level.factor for level in levels)]))
    moving, fixed = (
        image[..., box[0], box[1], box[2]].float().contiguous() for image in (moving, fixed)
    )
    begun = _inside(disp, box, given).float()
    found, factor, window, done, ended = begun, given, 0, 0, "nothing was asked for"
    kept_back = False
    for level in levels:
        try:
            climb = _Climb(
                F.avg_pool3d(moving, level.factor),
                F.avg_pool3d(fixed, level.factor),
                _brought(found, factor, level.factor),
                level,
            )
            climb.run(partial(_say, progress, done))
        except RuntimeError as error:  # torch has no narrower one for memory of the CPU
            if not _is_memory(error):
                raise
            ended = f"too little memory at {level.factor} mm: what was found before is kept"
            kept_back = True
            break
        found, factor, window = climb.disp, level.factor, level.window
        done, ended = done + climb.done, climb.ended
        del climb
    before, after = 0.0, 0.0
    if window:
        images = [F.avg_pool3d(image, factor) for image in (moving, fixed)]
        before, after = (
            float(lncc(warp(images[0], field), images[1], window))
            for field in (_brought(begun, given, factor), found)
        )
    if not after > (1 + _LEAST_GAIN) * before:  # NaN is not either
        ended = "no gain: the network's displacement is kept"
        found, factor, after, kept_back = begun, given, before, done > 0
    whole = _brought(disp.float(), given, factor).clone()
    _inside(whole, box, factor).copy_(found)
    report = Refinement(done, before, after, ended, time.perf_counter() - start, kept_back)
    return Refined(whole, factor, report)


class _Climb:
    """One level.

    All that changes stays where it is in memory, so that on a GPU an iteration is recorded once, as
    a CUDA graph, and replayed.

    Args:
        moving, fixed: (1, 1, D, H, W) on the level's grid.
        disp: (1, 3, D, H, W), voxels of it; where to begin.
        level: how.
    """

    def __init__(self, moving: Tensor, fixed: Tensor, disp: Tensor, level: Level) -> None:
        self.disp = disp.contiguous().clone()
        self.done = 0
        self.ended = "all iterations done"
        self._moving, self._level = moving, level
        self._similarity_to_fixed = LnccTo(fixed, level.window)
        sizes = disp.shape[2:]
        self._smooth_update = Gaussian(level.update_sigma, sizes, disp)
        self._smooth_field = Gaussian(level.field_sigma, sizes, disp)
        self._mean, self._square = torch.zeros_like(self.disp), torch.zeros_like(self.disp)
        self._count = disp.new_zeros(())
        self._similarity = disp.new_zeros(())

    def run(self, progress: Callable[[int], object]) -> None:
        """Iterate until it is enough."""
        iterate = self._iterate
        seen: list[float] = []
        while self.done < self._level.iterations:
            if self.done == _WARM_UPS and self.disp.is_cuda:
                iterate = self._recorded()
            iterate()
            self.done += 1
            progress(self.done)
            if self.done % _LOOK_EVERY == 0:
                seen.append(float(self._similarity))
                if len(seen) > 2 and not seen[-1] - seen[-2] > _ENOUGH * (seen[1] - seen[0]):
                    self.ended = "converged"
                    return

    def _iterate(self) -> None:
        level = self._level
        with torch.no_grad():
            moved = warp(self._moving, self.disp)
            similarity, slope = self._similarity_to_fixed(moved)
            # In means over all voxels a voxel's slope is tiny; Adam's squares of it would be lost.
            update = _gradient(moved).mul_(slope * slope.numel())
            update = self._smooth_update(update)
            self._count += 1
            self._similarity.copy_(similarity)
            self._mean.lerp_(update, 1 - _BETA_1)
            self._square.lerp_(update.square_(), 1 - _BETA_2)
            size = (self._square / (1 - _BETA_2**self._count)).sqrt_()
            size += _STILL * size.amax() + torch.finfo(size.dtype).tiny
            step = (self._mean / size).mul_(level.step / (1 - _BETA_1**self._count))
            self.disp.copy_(self._smooth_field(compose(self.disp, step)))

    def _recorded(self) -> Callable[[], None]:
        """An iteration as a CUDA graph, once those before it have compiled and reserved memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._iterate()
        return graph.replay


def _gradient(image: Tensor) -> Tensor:
    """(1, 1, D, H, W) to (1, 3, D, H, W): central differences, 0 at the border."""
    out = image.new_zeros((1, 3, *image.shape[2:]))
    for axis in (2, 3, 4):
        inner = image.shape[axis] - 2
        if inner > 0:
            part = out[:, axis - 2 : axis - 1].narrow(axis, 1, inner)
            torch.sub(image.narrow(axis, 2, inner), image.narrow(axis, 0, inner), out=part)
            part /= 2
    return out


def _brought(disp: Tensor, factor: int, to: int) -> Tensor:
    """From the grid of blocks of ``factor`` to that of blocks of ``to``."""
    if factor >= to:
        return upsample_displacement(disp, factor // to)
    return pool_displacement(disp, to // factor)


def _factor_of(moving: Tensor, fixed: Tensor, disp: Tensor) -> int:
    factor = moving.shape[2] // disp.shape[2]
    if (
        moving.shape != fixed.shape
        or moving.shape[:2] != (1, 1)
        or moving.shape[2:] != tuple(factor * size for size in disp.shape[2:])
    ):
        raise ShapeError(
            f"refine: moving {tuple(moving.shape)}, fixed {tuple(fixed.shape)} and disp "
            f"{tuple(disp.shape)}, expected (1, 1, D, H, W) twice and (1, 3, D / f, H / f, W / f)",
            "give one pair on the working grid, and its network's displacement",
        )
    return factor


def _box(moving: Tensor, fixed: Tensor, factor: int) -> _Box:
    """What holds both brains and a margin, its bounds multiples of ``factor``."""
    there = ((moving > 0) | (fixed > 0))[0, 0]
    slices = []
    for axis, size in enumerate(there.shape):
        others = tuple(i for i in range(3) if i != axis)
        found = there.amax(dim=others).nonzero()
        first, last = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, size)
        first = max(0, first - _MARGIN) // factor * factor
        last = -(-min(size, last + _MARGIN) // factor) * factor
        slices.append(slice(first, last))
    return slices[0], slices[1], slices[2]


def _inside(disp: Tensor, box: _Box, factor: int) -> Tensor:
    """The view of what lies in ``box`` of a displacement on the grid of blocks of ``factor``."""
    d, h, w = (slice(each.start // factor, each.stop // factor) for each in box)
    return disp[..., d, h, w]


def _say(progress: Callable[[int], None] | None, before: int, count: int) -> None:
    if progress is not None:
        progress(before + count)


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
