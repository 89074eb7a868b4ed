"""Two scans in, one aligned to the other: the whole of a registration, for Python callers."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ulae_rt.arguments import PathLike
from ulae_rt.clock import Clock
from ulae_rt.conventions import AFFINE_MODES, AffineMode
from ulae_rt.engines.backends.base import failure
from ulae_rt.errors import CheckpointError, EngineMismatch, UsageError
from ulae_rt.imaging.affine import BACKGROUND, register_affine
from ulae_rt.imaging.grid import Affine, Grid, grid_of
from ulae_rt.imaging.image import Image, as_array, bounding_box, image_of, labels_of, resample
from ulae_rt.imaging.labelmap import check_carried, check_labels
from ulae_rt.imaging.nifti import Volume, image_on_grid
from ulae_rt.imaging.pose import own_axes, pose_of
from ulae_rt.imaging.preprocess import (
    cut_off,
    intensity_scale,
    network_input,
    warn_cut_off,
    with_background,
    working_grid,
)
from ulae_rt.imaging.scan import Scan, as_volume, warn_same
from ulae_rt.imaging.similarity import correlation
from ulae_rt.imaging.transform import (
    Deformation,
    as_displacement,
    folding,
    jacobian_determinant,
    on_grid,
    warp_image,
)
from ulae_rt.imaging.warpfile import Warp
from ulae_rt.manifest import EXPORT_AGAIN_HINT
from ulae_rt.messages import about
from ulae_rt.refinement import refine, schedule
from ulae_rt.registration.network import Network, load_network
from ulae_rt.registration.result import Result, Stats
from ulae_rt.registration.verdict import Signs, judge, tell

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrainScan:
    """A scan that has been read and sent to the device.

    Attributes:
        volume: as it was read, on the host.
        image: its voxels on the device.
        cleaned: the same as `with_background` gives it.
    """

    volume: Volume
    image: Image
    cleaned: Image

    @cached_property
    def brain(self) -> Tensor:
        """(1, 1, D, H, W), where the brain is."""
        return self.cleaned.voxels > 0

    @property
    def cleaned_volume(self) -> Volume:
        """`cleaned` on the host."""
        if self.cleaned is self.image:
            return self.volume
        return replace(self.volume, data=as_array(self.cleaned.voxels))


@dataclass(frozen=True)
class NetworkInput:
    """A scan as a network sees it.

    Attributes:
        grid: the working grid at 1 mm, of the template.
        image: (1, 1, D, H, W) float32 in [0, 1], on the network's own grid, the working grid's
            means over blocks.
        detail: what a refinement sees; None where there will be none.
    """

    grid: Grid
    image: Tensor
    detail: "Detail | None"


@dataclass(frozen=True)
class Detail:
    """A scan as a refinement sees it.

    Attributes:
        grid: at 1 mm along the fixed scan's own axes, so that the usual scan is copied: what an
            interpolation blurs is what a refinement aligns.
        image: (1, 1, D, H, W) float32 in [0, 1].
    """

    grid: Grid
    image: Tensor


@dataclass(frozen=True)
class Target:
    """A fixed scan that has been read: for any number of moving ones.

    Attributes:
        scan: the scan.
        seen: by the network; None for a method that has none.
    """

    scan: BrainScan
    seen: NetworkInput | None = None


@dataclass(frozen=True)
class Prepared:
    """A pair that waits to be registered.

    Attributes:
        moving: the moving scan.
        target: the fixed scan.
        labels: the moving label map, or None.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        seconds: what it took, stage by stage.
        seen: the moving scan through the affine, by the network; None for a method that has none.
    """

    moving: BrainScan
    target: Target
    labels: Volume | None
    affine: Affine
    seconds: dict[str, float]
    seen: NetworkInput | None = None


class Method(Protocol):
    """A way to register: what `Registrar` offers to those who work on many pairs.

    The steps of one pair may be called from different threads, `deform` from one at a time.
    """

    @property
    def description(self) -> str:
        """What it is, for people."""

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on, for JSON."""

    @property
    def at_once(self) -> int:
        """Pairs that `deform` is best given together."""

    def target(self, fixed: Scan) -> Target:
        """Read a fixed scan, for any number of moving ones."""

    def prepare(self, moving: Scan, fixed: Target, *, labels: Scan | None = None) -> Prepared:
        """Read a pair and align it affinely."""

    def deform(self, pairs: Sequence[Prepared]) -> list[Deformation]:
        """Find the deformation of each."""


P = ParamSpec("P")
R = TypeVar("R")


def _memory_is_told(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with `OutOfMemory` where a GPU has too little memory for it."""

    @wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise failure("registering a pair on the GPU", error) from error

    return told


class Registrar:
    """Registers pairs of scans with one network.

    Example:
        >>> registrar = Registrar()
        >>> result = registrar("moving.nii.gz", "fixed.nii.gz")
        >>> result.save("moved.nii.gz", "warp.nii.gz")
    """

    def __init__(
        self,
        weights: PathLike | Network | None = None,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "fp32",
        affine: AffineMode = "affine",
        refine: int = 0,
    ) -> None:
        """Open the network.

        Args:
            weights: a weights file, an engine's folder or file, an opened network, or None for
                the weights that the package ships.
            device: ``auto``, ``cpu`` or ``cuda[:N]``; all of a registration runs where the network
                does.
            backend: what runs the network; ``auto`` decides by the file.
            precision: of the network's features; of an engine's folder, which one. ``auto`` takes
                fp32 weights, and of a folder the fastest engine.
            affine: how the pair is aligned first; see `register_affine`.
            refine: iterations by which the displacement is then improved for the pair itself, see
                `ulae_rt.refinement`. It begins with the mean of what the network says of the pair
                and of its mirror image.
        """
        if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
            raise UsageError(
                f"refine is {refine!r}, expected a whole number of iterations from 0",
                "give refine=10, or leave it out",
            )
        if affine not in AFFINE_MODES:
            raise UsageError(
                f"affine is {affine!r}, expected one of {', '.join(AFFINE_MODES)}",
                "give affine='affine', or leave it out",
            )
        self.affine: AffineMode = affine
        self.refine = refine
        self.network: Network
        if weights is None or isinstance(weights, str | os.PathLike):
            self.network = load_network(
                weights, device=device, backend=backend, precision=precision
            )
        elif isinstance(weights, Network):
            self.network = weights
        else:
            raise UsageError(
                f"weights is {type(weights).__name__}, expected a path or an opened network",
                "give the file, or what ulae_rt.registration.network.load_network makes of it",
            )

    def __call__(
        self,
        moving: Scan,
        fixed: Scan | Target,
        *,
        labels: Scan | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Result:
        """Register ``moving`` to ``fixed``: `prepare`, `deform` and `finish` one after the other.

        Any thread may call it. What works on many pairs calls the three itself, so that the
        network runs while other pairs are read and written.

        Args:
            moving: a path, a nibabel image, or (array (X, Y, Z), affine (4, 4) to RAS mm).
            fixed: likewise, of any other size, spacing and orientation.
            labels: a label map in the moving image's space, carried along.
            progress: called with the name of each stage as it starts, and after each iteration of
                a refinement with ``refine DONE/ALL``.

        Raises:
            ImageError, GeometryError: a scan that cannot be used; see `read_volume`.
            EngineMismatch: the network returned NaN or another grid.
        """
        pair = self.prepare(moving, fixed, labels=labels, progress=progress)
        clock = Clock(progress, pair.seconds)
        with clock("network"):
            deformation = self._run([pair])[0]
        if self.refine:
            with clock("refine"):
                deformation = self._refined(deformation, pair, progress)
        pair.seconds.update(clock.seconds)
        return finish(pair, deformation, progress=progress)

    @property
    def at_once(self) -> int:
        """Pairs that `deform` is best given together."""
        return self.network.at_once

    @property
    def description(self) -> str:
        """The network's."""
        return self.network.description

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on, for JSON."""
        return {
            "method": "network",
            "weights_sha256": self.network.weights_sha256,
            "precision": self.network.precision,
            "spacing_mm": self.network.metadata.spacing_mm,
            "affine": self.affine,
            "refine": self.refine,
        }

    @_memory_is_told
    def target(self, fixed: Scan) -> Target:
        """Read a fixed scan and bring it to the network's grid."""
        volume = as_volume(fixed, "fixed")
        with about(volume.name):
            scan = brain_scan(volume, self.network.device)
            factor = self._factor()
            d, h, w = (n * factor for n in self.network.metadata.shape)
            axes = pose_of(scan.cleaned)
            grid, lost = working_grid(scan.cleaned, (d, h, w), axes)
            warn_cut_off(lost, volume.name, grid)
            fine_grid = None
            if self.refine:
                own = None if axes is None else own_axes(scan.cleaned, axes)
                fine_grid, _ = working_grid(scan.cleaned, (d, h, w), own)
            return Target(scan, self._seen(scan, grid, fine_grid, None))

    @_memory_is_told
    def prepare(
        self,
        moving: Scan,
        fixed: Scan | Target,
        *,
        labels: Scan | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Prepared:
        """Read a pair, align it affinely and bring it to the network's grid.

        Args:
            moving: as for a call, as are the others.
            fixed: a scan, or what `target` made of it.
            labels: a label map in the moving image's space.
            progress: called with the name of each stage as it starts.
        """
        clock = Clock(progress)
        with clock("read"):
            moving_volume = as_volume(moving, "moving")
            label_volume = None if labels is None else as_volume(labels, "labels", "labels")
            if not isinstance(fixed, Target):
                fixed = as_volume(fixed, "fixed")
        with clock("preprocess"), about(moving_volume.name):
            target = fixed if isinstance(fixed, Target) else self.target(fixed)
            scan = moving_scan(moving_volume, target, label_volume)
        with clock("affine"), about(moving_volume.name):
            affine = register_affine(scan.cleaned, target.scan.cleaned, self.affine)
        with clock("preprocess"), about(moving_volume.name):
            assert target.seen is not None
            grid = target.seen.grid
            lost = cut_off(scan.cleaned, grid, np.asarray(np.linalg.inv(affine)))
            warn_cut_off(lost, moving_volume.name, grid)
            detail = target.seen.detail
            seen = self._seen(scan, grid, None if detail is None else detail.grid, affine)
        return Prepared(scan, target, label_volume, affine, clock.seconds, seen)

    def _seen(
        self, scan: BrainScan, grid: Grid, fine_grid: Grid | None, affine: Affine | None
    ) -> NetworkInput:
        normalisation, factor = self.network.metadata.normalisation, self._factor()
        image = network_input(scan.cleaned, grid, affine, normalisation, factor=factor)
        if fine_grid is None:
            return NetworkInput(grid, image, None)
        fine = network_input(scan.cleaned, fine_grid, affine, normalisation)
        return NetworkInput(grid, image, Detail(fine_grid, fine))

    def deform(self, pairs: Sequence[Prepared]) -> list[Deformation]:
        """Run the network on prepared pairs, all at once, and refine its results one by one.

        Raises:
            EngineMismatch: the network returned another grid, or failed.
        """
        if not pairs:
            return []
        deformations = self._run(pairs)
        if not self.refine:
            return deformations
        return [self._refined(*both) for both in zip(deformations, pairs, strict=True)]

    @_memory_is_told
    def _run(self, pairs: Sequence[Prepared]) -> list[Deformation]:
        # An engine made for more pairs at once gets the last as often as it takes.
        fill = -len(pairs) % self.network.batch
        filled = [*pairs, *[pairs[-1]] * fill]
        moving = torch.cat([_seen(pair).image for pair in filled])
        fixed = torch.cat([_seen(pair.target).image for pair in filled])
        disp = torch.as_tensor(self.network.displacement(moving, fixed))
        if self.refine:
            # What it makes of left and right exchanged is as good and errs elsewhere.
            mirrored = (image.flip(2) for image in (moving, fixed))
            disp = (disp + unmirrored(torch.as_tensor(self.network.displacement(*mirrored)))).mul_(
                0.5
            )
        grids = [_seen(pair).grid.pooled(self._factor()) for pair in pairs]
        for grid in grids:
            if disp.shape[1:] != (3, *grid.shape):
                raise EngineMismatch(
                    f"the network returned a displacement of {tuple(disp.shape[1:])}, expected "
                    f"{(3, *grid.shape)}",
                    EXPORT_AGAIN_HINT,
                )
        return [
            Deformation(one[None], grid, pair.affine)
            for one, grid, pair in zip(disp, grids, pairs, strict=False)
        ]

    def _refined(
        self,
        deformation: Deformation,
        pair: Prepared,
        progress: Callable[[str], None] | None = None,
    ) -> Deformation:
        moving, fixed = _seen(pair).detail, _seen(pair.target).detail
        assert moving is not None
        assert fixed is not None
        begin = fixed.grid.pooled(self._factor())
        # From voxels of the network's grid to those of the one that the refinement begins on.
        linear = np.linalg.inv(begin.affine) @ deformation.grid.affine
        refined = refine(
            moving.image,
            fixed.image,
            on_grid(deformation.disp, deformation.grid, begin, linear),
            schedule(self.refine),
            progress=progress and (lambda done: progress(f"refine {done}/{self.refine}")),
        )
        grid = fixed.grid.pooled(refined.factor)
        return Deformation(refined.disp, grid, pair.affine, refined.report)

    def _factor(self) -> int:
        """Working grid's voxels along an edge of the network's."""
        spacing = self.network.metadata.spacing_mm
        factor = round(spacing)
        if factor < 1 or abs(factor - spacing) > 1e-6:
            raise CheckpointError(
                f"the network's grid has {spacing} mm, expected 1, 2 or another whole number",
                "train it again, with data.pool = 1 or 2 in the configuration",
            )
        return factor


def _seen(scan: Prepared | Target) -> NetworkInput:
    assert scan.seen is not None  # a registrar's own `prepare` and `target` see to that
    return scan.seen


def brain_scan(volume: Volume, device: str | torch.device) -> BrainScan:
    """Send a volume to a device and find its background."""
    image = image_of(volume, device)
    return BrainScan(volume, image, with_background(image))


def moving_scan(volume: Volume, target: Target, labels: Volume | None) -> BrainScan:
    """The moving scan of a pair on its target's device, held against its target and its labels."""
    warn_same(volume, target.scan.volume)
    scan = brain_scan(volume, target.scan.image.voxels.device)
    if labels is not None:
        check_labels(labels, scan.cleaned_volume)
    return scan


def unmirrored(disp: Tensor) -> Tensor:
    """The displacement of a pair from that of the pair mirrored left to right.

    (B, 3, D, H, W) to the same: index d to D - 1 - d, and what moves along d the other way.
    """
    flipped = disp.flip(2)
    flipped[:, 0] *= -1
    return flipped


@_memory_is_told
def finish(
    pair: Prepared,
    deformation: Deformation,
    *,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Carry the moving scan and its labels onto the fixed grid, and measure.

    Args:
        pair: what `deformation` was found for.
        deformation: of the pair.
        progress: called with the name of the stage as it starts.

    Raises:
        EngineMismatch: the displacement has NaN or Inf.
    """
    if not torch.isfinite(deformation.disp).all():
        raise EngineMismatch(
            "the network returned NaN or Inf",
            "use --precision fp32; if that is what ran, the weights are damaged",
        )
    refinement = deformation.refinement
    if refinement is not None and refinement.kept_back:
        logger.warning("refinement: %s", refinement.ended)
    clock = Clock(progress, pair.seconds)
    moving, fixed = pair.moving, pair.target.scan
    with clock("warp"), about(moving.volume.name):
        grid, brain = fixed.image.grid, fixed.brain
        disp = deformation.sample(grid)
        moved = warp_image(moving.image, disp, grid)
        moved_labels = None
        if pair.labels is not None:
            labels = labels_of(pair.labels, disp.device)
            carried = as_array(warp_image(labels, disp, grid, "nearest"))
            check_carried(pair.labels.data, carried, pair.labels.name)
            moved_labels = image_on_grid(carried, fixed.volume)
        jacobian = jacobian_determinant(disp, grid.affine)
        folds = folding(jacobian, brain)
        box = bounding_box(brain[0, 0])
        before = resample(moving.cleaned, grid.cropped(box), deformation.affine)[0, 0]
        inside = brain[0, 0][box].flatten().nonzero()[:, 0]
        values, values_before, values_moved = (
            image.flatten()[inside]
            for image in (fixed.image.voxels[0, 0][box], before, moved[0, 0][box])
        )
        signs = Signs(
            deformation.affine,
            _overlap(values_before, len(values), moving, fixed, deformation.affine),
            correlation(values, values_before),
            correlation(values, values_moved) if deformation.disp.any() else None,
        )
        verdict = judge(signs, moving.volume.name, fixed.volume.name)
        tell(verdict.reasons)
        stats = Stats(
            signs.before,
            signs.before if signs.after is None else signs.after,
            signs.overlap,
            folds.brain_percent,
            folds.image_percent,
            verdict.name,
            refinement,
            clock.seconds,
        )
    return Result(
        image_on_grid(as_array(moved), fixed.volume),
        Warp(as_displacement(disp), fixed.volume, grid_of(moving.volume)),
        as_array(jacobian),
        deformation.affine,
        stats,
        moved_labels,
        deformation,
        fixed.volume,
        moving.volume,
        as_array(brain),
    )


def _overlap(
    inside: Tensor, voxels: int, moving: BrainScan, fixed: BrainScan, affine: Affine
) -> float:
    """Dice of two brains through an affine.

    Args:
        inside: (N,), the moving image through the affine at the voxels of the fixed brain.
        voxels: N.
        moving: the moving scan.
        fixed: the fixed scan.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
    """
    threshold = BACKGROUND * intensity_scale(moving.cleaned)
    shared = int(torch.count_nonzero(inside > threshold))
    to_fixed = np.linalg.inv(affine @ fixed.image.affine)[:3, :3] @ moving.image.affine[:3, :3]
    brain = int(torch.count_nonzero(moving.cleaned.voxels > threshold))
    return 2 * shared / (voxels + brain * abs(float(np.linalg.det(to_fixed))))
