"""Two scans in, one aligned to the other: the whole of a registration, for Python callers."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ulae_rt.arguments import PathLike, path_of
from ulae_rt.errors import CheckpointError, EngineMismatch, UsageError
from ulae_rt.imaging.affine import AFFINE_MODES, AffineMode, register_affine
from ulae_rt.imaging.grid import (
    Affine,
    Grid,
    cut_off,
    grid_of,
    network_input,
    pool,
    resample,
    warn_cut_off,
    with_background,
    working_grid,
)
from ulae_rt.imaging.labelmap import check_carried, check_labels
from ulae_rt.imaging.nifti import (
    Kind,
    Volume,
    image_on_grid,
    read_volume,
    volume_from_array,
    volume_from_image,
)
from ulae_rt.imaging.plausible import warn_implausible_affine, warn_unlike
from ulae_rt.imaging.similarity import correlation
from ulae_rt.imaging.transform import Deformation, folding, jacobian_determinant, warp_image
from ulae_rt.imaging.warpfile import Warp
from ulae_rt.manifest import EXPORT_AGAIN_HINT
from ulae_rt.messages import about
from ulae_rt.network import Network, load_network
from ulae_rt.optional import require
from ulae_rt.result import Result, Stats

logger = logging.getLogger(__name__)

Scan = PathLike | Volume | nib.Nifti1Image | tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Target:
    """A fixed scan that has been read: for any number of moving ones.

    Attributes:
        volume: as it was read.
        cleaned: as `with_background` gives it.
    """

    volume: Volume
    cleaned: Volume

    @property
    def brain(self) -> NDArray[np.bool_]:
        """(X, Y, Z), where the brain is."""
        return np.asarray(self.cleaned.data > 0)


@dataclass(frozen=True)
class Prepared:
    """A pair that waits to be registered.

    Attributes:
        moving: as it was read.
        target: the fixed scan.
        labels: the moving label map, or None.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        seconds: what it took, stage by stage.
    """

    moving: Volume
    target: Target
    labels: Volume | None
    affine: Affine
    seconds: dict[str, float]


PairT = TypeVar("PairT", bound=Prepared)


TargetT = TypeVar("TargetT", bound=Target)


class Method(Protocol[TargetT, PairT]):
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

    def target(self, fixed: Scan) -> TargetT:
        """Read a fixed scan, for any number of moving ones."""

    def prepare(self, moving: Scan, fixed: TargetT, *, labels: Scan | None = None) -> PairT:
        """Read a pair and align it affinely."""

    def deform(self, pairs: Sequence[PairT]) -> list[Deformation]:
        """Find the deformation of each."""


@dataclass(frozen=True)
class _TargetOnGrid(Target):
    """With the working grid at 1 mm, and what the network sees: (D, H, W) float32 in [0, 1].

    ``detail`` is the same before it was averaged, where the pair will be refined.
    """

    grid: Grid
    image: NDArray[np.float32]
    detail: NDArray[np.float32] | None


@dataclass(frozen=True)
class _PreparedOnGrid(Prepared):
    """With the moving scan, through the affine, as the network sees it."""

    target: _TargetOnGrid
    image: NDArray[np.float32]
    detail: NDArray[np.float32] | None


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
            device: ``auto``, ``cpu`` or ``cuda[:N]``.
            backend: what runs the network; ``auto`` decides by the file.
            precision: of the network's features; of an engine's folder, which one. ``auto`` takes
                fp32 weights, and of a folder the fastest engine.
            affine: how the pair is aligned first; see `register_affine`.
            refine: iterations by which the displacement is then improved for the pair itself, see
                `ulae_rt.refinement`; on a GPU where there is one and ``device`` allows. It begins
                with the mean of what the network says of the pair and of its mirror image.
        """
        if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
            raise UsageError(
                f"refine is {refine!r}, expected a whole number of iterations from 0",
                "give refine=10, or leave it out",
            )
        if refine:
            require("torch", "torch")
        if affine not in AFFINE_MODES:
            raise UsageError(
                f"affine is {affine!r}, expected one of {', '.join(AFFINE_MODES)}",
                "give affine='affine', or leave it out",
            )
        self.affine: AffineMode = affine
        self.refine = refine
        self.device = device
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
                "give the file, or what ulae_rt.network.load_network makes of it",
            )

    def __call__(
        self,
        moving: Scan,
        fixed: Scan | _TargetOnGrid,
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

    def target(self, fixed: Scan) -> _TargetOnGrid:
        """Read a fixed scan and bring it to the network's grid."""
        volume = as_volume(fixed, "fixed")
        with about(volume.name):
            cleaned = with_background(volume)
            metadata = self.network.metadata
            factor = self._factor()
            d, h, w = (n * factor for n in metadata.shape)
            grid, lost = working_grid(cleaned, (d, h, w))
            warn_cut_off(lost, volume.name, grid)
            image = network_input(cleaned, grid, None, metadata.normalisation)
        detail = image if self.refine else None
        return _TargetOnGrid(volume, cleaned, grid, pool(image, factor), detail)

    def prepare(
        self,
        moving: Scan,
        fixed: Scan | _TargetOnGrid,
        *,
        labels: Scan | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> _PreparedOnGrid:
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
            if not isinstance(fixed, _TargetOnGrid):
                fixed = as_volume(fixed, "fixed")
        with clock("preprocess"), about(moving_volume.name):
            target = fixed if isinstance(fixed, _TargetOnGrid) else self.target(fixed)
            warn_same(moving_volume, target.volume)
            cleaned = with_background(moving_volume)
            if label_volume is not None:
                check_labels(label_volume, cleaned)
        with clock("affine"), about(moving_volume.name):
            affine = register_affine(cleaned, target.cleaned, self.affine)
            warn_implausible_affine(affine, moving_volume.name, target.volume.name)
        with clock("preprocess"), about(moving_volume.name):
            lost = cut_off(cleaned, target.grid, np.asarray(np.linalg.inv(affine)))
            warn_cut_off(lost, moving_volume.name, target.grid)
            normalisation = self.network.metadata.normalisation
            image = network_input(cleaned, target.grid, affine, normalisation)
            seen = pool(image, self._factor())
        detail = image if self.refine else None
        return _PreparedOnGrid(
            moving_volume, target, label_volume, affine, clock.seconds, seen, detail
        )

    def deform(self, pairs: Sequence[_PreparedOnGrid]) -> list[Deformation]:
        """Run the network on prepared pairs, all at once, and refine what it found one by one.

        Raises:
            EngineMismatch: the network returned another grid, or failed.
        """
        if not pairs:
            return []
        found = self._run(pairs)
        if not self.refine:
            return found
        return [self._refined(*each) for each in zip(found, pairs, strict=True)]

    def _run(self, pairs: Sequence[_PreparedOnGrid]) -> list[Deformation]:
        # An engine made for more pairs at once gets the last as often as it takes.
        fill = -len(pairs) % self.network.batch
        filled = [*pairs, *[pairs[-1]] * fill]
        moving = np.stack([pair.image[None] for pair in filled])
        fixed = np.stack([pair.target.image[None] for pair in filled])
        disp = self.network.displacement(moving, fixed)
        if self.refine:
            # What it makes of left and right exchanged is as good and errs elsewhere.
            mirrored = (np.ascontiguousarray(image[:, :, ::-1]) for image in (moving, fixed))
            disp = np.float32(0.5) * (disp + unmirrored(self.network.displacement(*mirrored)))
        grids = [pair.target.grid.pooled(self._factor()) for pair in pairs]
        for grid in grids:
            if disp.shape[1:] != (3, *grid.shape):
                raise EngineMismatch(
                    f"the network returned a displacement of {disp.shape[1:]}, expected "
                    f"{(3, *grid.shape)}",
                    EXPORT_AGAIN_HINT,
                )
        return [
            Deformation(np.ascontiguousarray(each), grid, pair.affine)
            for each, grid, pair in zip(disp, grids, pairs, strict=False)
        ]

    def _refined(
        self,
        found: Deformation,
        pair: _PreparedOnGrid,
        progress: Callable[[str], None] | None = None,
    ) -> Deformation:
        import torch  # loaded with the network, unless an engine runs it

        from ulae_rt.refinement import refine, schedule

        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        device = self.device if on_gpu and self.device != "auto" else "cuda" if on_gpu else "cpu"
        assert pair.detail is not None
        assert pair.target.detail is not None
        refined = refine(
            torch.from_numpy(pair.detail)[None, None].to(device),
            torch.from_numpy(pair.target.detail)[None, None].to(device),
            torch.from_numpy(found.disp)[None].to(device),
            schedule(self.refine),
            progress=progress and (lambda done: progress(f"refine {done}/{self.refine}")),
        )
        return Deformation(
            refined.disp[0].cpu().numpy(),
            pair.target.grid.pooled(refined.factor),
            pair.affine,
            refined.report,
        )

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


def unmirrored(disp: NDArray[np.float32]) -> NDArray[np.float32]:
    """The displacement of a pair from that of the pair mirrored left to right.

    (B, 3, D, H, W) to the same: index d to D - 1 - d, and what moves along d the other way.
    """
    found = disp[:, :, ::-1].copy()
    found[:, 0] *= -1
    return found


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
    if not np.isfinite(deformation.disp).all():
        raise EngineMismatch(
            "the network returned NaN or Inf",
            "use --precision fp32; if that is what ran, the weights are damaged",
        )
    refinement = deformation.refinement
    if refinement is not None and refinement.kept_back:
        logger.warning("refinement: %s", refinement.ended)
    clock = Clock(progress, pair.seconds)
    with clock("warp"), about(pair.moving.name):
        fixed, brain = pair.target.volume, pair.target.brain
        target = grid_of(fixed)
        total = deformation.sample(target)
        moved = warp_image(pair.moving, total, target)
        moved_labels = None
        if pair.labels is not None:
            carried = warp_image(pair.labels, total, target, "nearest")
            check_carried(pair.labels.data, carried, pair.labels.name)
            moved_labels = image_on_grid(carried, fixed)
        jacobian = jacobian_determinant(total, fixed.affine)
        before = resample(pair.moving, target, deformation.affine)
        fixed_values = fixed.data[brain]
        folds = folding(jacobian, brain)
        stats = Stats(
            correlation(fixed_values, before[brain]),
            correlation(fixed_values, moved[brain]),
            folds.brain_percent,
            folds.image_percent,
            refinement,
        )
    after = stats.similarity_after if deformation.disp.any() else None
    warn_unlike(stats.similarity_before, after, pair.moving.name, fixed.name)
    stats.seconds = clock.seconds
    return Result(
        image_on_grid(moved, fixed),
        Warp(total, fixed, grid_of(pair.moving)),
        jacobian,
        deformation.affine,
        stats,
        moved_labels,
        before,
        deformation,
        fixed,
        pair.moving,
        brain,
    )


class Clock:
    """Seconds by stage."""

    def __init__(
        self,
        progress: Callable[[str], None] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.seconds = {} if seconds is None else dict(seconds)
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as ``stage``, added to what the stage took before."""
        if self._progress is not None:
            self._progress(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def as_volume(scan: Scan, name: str, kind: Kind = "image") -> Volume:
    """Read or check one input of a registration; ``name`` is for messages about arrays."""
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | os.PathLike):
        return read_volume(path_of(scan, name), kind=kind)
    if isinstance(scan, tuple):
        if len(scan) != 2:
            raise UsageError(
                f"{name} is a tuple of {len(scan)}, expected (array, affine)",
                "give a path, a nibabel image, or (array, affine)",
            )
        return volume_from_array(*scan, name=name, kind=kind)
    anything: Any = scan
    if anything is None or isinstance(anything, np.ndarray):
        raise UsageError(
            f"{name} is {'nothing' if anything is None else 'an array alone'}, expected a scan",
            "give a path, a nibabel image, or (array, affine) with the affine to RAS mm",
        )
    return volume_from_image(scan, name=name, kind=kind)


def warn_same(moving: Volume, fixed: Volume) -> None:
    """Say so if a pair is one image twice."""
    same_file = moving.path is not None and fixed.path is not None
    same_file = same_file and os.path.samefile(str(moving.path), str(fixed.path))
    if same_file or (
        moving.shape == fixed.shape
        and np.array_equal(moving.affine, fixed.affine)
        and np.array_equal(moving.data, fixed.data)
    ):
        logger.warning("moving and fixed are the same image: there is nothing to align")
