"""What is measured of one registered pair."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ulae_rt.batching.pairs import Pair
from ulae_rt.errors import EvaluationError, GeometryError, ImageError, ShapeError, UlaeError
from ulae_rt.evaluation.landmarks import Points, read_landmarks, target_registration_error
from ulae_rt.evaluation.protocol import Protocol
from ulae_rt.evaluation.surface import UNIT, hd95_per_label
from ulae_rt.imaging.grid import Affine, Displacement, gap_mm, grid_of
from ulae_rt.imaging.image import as_array, file_order, in_file_order, labels_of
from ulae_rt.imaging.inverse import inverse_consistency
from ulae_rt.imaging.labelmap import check_labels
from ulae_rt.imaging.nifti import Volume, read_grid, read_volume
from ulae_rt.imaging.preprocess import with_background_on_host
from ulae_rt.imaging.transform import (
    add_affine,
    as_displacement,
    folding,
    in_mm,
    jacobian_determinant,
    warp_image,
)
from ulae_rt.imaging.warpfile import read_warp
from ulae_rt.metrics import dice_per_label

# Learn2Reg's: voxels at each face that are left out, because differences are one-sided there.
BORDER = 2
SMALLEST, LARGEST = 1e-9, 1e9


@dataclass(frozen=True)
class Registration:
    """How one method registered a pair: a warp file, or a matrix and no more.

    Attributes:
        method: its name in the tables.
        warp: displacement on the fixed grid, the affine included.
        affine: (4, 4), fixed RAS mm to moving RAS mm, where that alone is meant.
        inverse_warp: the way back, on the moving grid.
        seconds: what the pair took.
    """

    method: str
    warp: Path | None = None
    affine: Affine | None = None
    inverse_warp: Path | None = None
    seconds: float = math.nan


@dataclass(frozen=True)
class Case:
    """One pair by one method. What was not measured is NaN or empty.

    Attributes:
        method: its name.
        id: the pair's.
        dice: by label, 0 to 1; NaN for a label that the moving or the fixed map never had, 0 for
            one that got lost on the way, as Learn2Reg has it.
        hd95_mm: by label, see `hd95_per_label`; NaN for a lost label, too, which has no surface.
        hd95_voxels: the same with voxels for millimetres, which is Learn2Reg's number.
        lost: labels that both scans have and the moved map has not.
        sdlogj, sdlogj_l2r: see `sd_log_jacobian`.
        folded_image_percent, folded_brain_percent: voxels with a Jacobian determinant of 0 or
            less, of all and of those in the fixed brain.
        foldings: their number without the outermost two layers.
        inverse_consistency_mm: mean of |T^-1(T(x)) - x| over the fixed brain.
        tre_mm: by landmark, see `target_registration_error`.
        seconds: that the registration took.
    """

    method: str
    id: str
    dice: Mapping[int, float]
    hd95_mm: Mapping[int, float]
    hd95_voxels: Mapping[int, float]
    lost: int
    sdlogj: float
    sdlogj_l2r: float
    folded_image_percent: float
    folded_brain_percent: float
    foldings: int
    inverse_consistency_mm: float
    tre_mm: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A pair that could not be evaluated, and why."""

    method: str
    id: str
    error: str
    hint: str


@dataclass(frozen=True)
class _Labels:
    """Label maps of a pair, with places in a list of labels (from 1) for values.

    Attributes:
        labels: the list.
        moving, fixed: the maps.
        shared: the places that both have.
    """

    labels: tuple[int, ...]
    moving: Volume
    fixed: NDArray[np.int32]
    shared: frozenset[int]


@dataclass(frozen=True)
class _Landmarks:
    """RAS mm, by name."""

    moving: Points
    fixed: Points


@dataclass(frozen=True)
class _Scans:
    """What the methods of a pair share."""

    fixed: Volume
    brain: NDArray[np.bool_]
    labels: _Labels | None
    landmarks: _Landmarks | None


def evaluate_pair(
    pair: Pair, registrations: Sequence[Registration], protocol: Protocol
) -> list[Case | Failure]:
    """Measure every registration of one pair; what cannot be measured becomes a `Failure`."""
    try:
        scans = _read(pair, protocol)
    except UlaeError as error:
        return [Failure(each.method, pair.id, str(error), error.hint) for each in registrations]
    found: list[Case | Failure] = []
    for registration in registrations:
        try:
            found.append(_measured(pair, scans, registration))
        except UlaeError as error:
            found.append(Failure(registration.method, pair.id, str(error), error.hint))
    return found


def _read(pair: Pair, protocol: Protocol) -> _Scans:
    fixed = read_volume(pair.fixed)
    cleaned = with_background_on_host(fixed)
    brain = np.asarray(cleaned.data > 0)
    labels = landmarks = None
    if pair.moving_labels is not None and pair.fixed_labels is not None:
        moving_map, fixed_map = _label_map(pair.moving_labels), _label_map(pair.fixed_labels)
        _check_same_grid(fixed_map, fixed)
        check_labels(fixed_map, cleaned)
        check_labels(moving_map, with_background_on_host(read_volume(pair.moving)))
        values, places = protocol.indexed(moving_map.data, fixed_map.data)
        there = [frozenset(np.flatnonzero(np.bincount(each.ravel())).tolist()) for each in places]
        shared = there[0] & there[1] - {0}
        labels = _Labels(values, replace(moving_map, data=places[0]), places[1], shared)
    if pair.moving_landmarks is not None and pair.fixed_landmarks is not None:
        points = read_landmarks(pair.moving_landmarks), read_landmarks(pair.fixed_landmarks)
        landmarks = _Landmarks(*points)
    return _Scans(fixed, brain, labels, landmarks)


def _label_map(path: Path) -> Volume:
    volume = read_volume(path, kind="labels")
    low, high = volume.data.min(), volume.data.max()
    if low < 0 or high > np.iinfo(np.int32).max:
        raise ImageError(
            f"{path} holds the label {low if low < 0 else high:.10g}, expected 0 to "
            f"{np.iinfo(np.int32).max}",
            "give the label map as segmented; 0 is the background",
        )
    return replace(volume, data=volume.data.astype(np.int32))


def _check_same_grid(one: Volume, other: Volume) -> None:
    """Both lie on one grid: the same voxels in the same places.

    Raises:
        GeometryError: if not.
    """
    hint = "give the label map on the scan's own grid, and the warp of this very pair"
    if one.shape != other.shape:
        here, there = ("x".join(map(str, each.shape)) for each in (one, other))
        raise GeometryError(f"{one.name} has size {here}, {other.name} has {there}", hint)
    gap = gap_mm(grid_of(one), grid_of(other))
    if gap:
        raise GeometryError(
            f"{one.name} and {other.name} lie on grids that are {gap:.3g} mm apart", hint
        )


def _measured(pair: Pair, scans: _Scans, registration: Registration) -> Case:
    disp = _displacement(scans.fixed, registration)
    on_device = in_mm(disp)
    grid = file_order(grid_of(scans.fixed))
    dice: dict[int, float] = {}
    hd95_mm: dict[int, float] = {}
    hd95_voxels: dict[int, float] = {}
    lost = 0
    if scans.labels is not None:
        labels, fixed = scans.labels.labels, scans.labels.fixed
        moved = as_array(warp_image(labels_of(scans.labels.moving), on_device, grid, "nearest"))
        places = range(1, len(labels) + 1)
        scores = dice_per_label(moved, fixed, places)
        gone = [k for k in scans.labels.shared if math.isnan(scores[k])]
        lost = len(gone)
        dice = {labels[k - 1]: 0.0 if k in gone else scores[k] for k in places}
        spacing = scans.fixed.spacing_mm
        hd95 = hd95_per_label(moved, fixed, places, spacing)
        # The same numbers, usually, and what takes the time.
        same = np.allclose(spacing, UNIT, rtol=0, atol=1e-6)
        in_voxels = hd95 if same else hd95_per_label(moved, fixed, places, UNIT)
        hd95_mm = {labels[k - 1]: v for k, v in hd95.items()}
        hd95_voxels = {labels[k - 1]: v for k, v in in_voxels.items()}
    determinants = jacobian_determinant(on_device, grid.affine)
    folds = folding(determinants, in_file_order(scans.brain))
    jacobian = as_array(determinants)
    tre = {}
    if scans.landmarks is not None:
        tre = target_registration_error(
            disp, grid_of(scans.fixed), scans.landmarks.fixed, scans.landmarks.moving
        )
    return Case(
        registration.method,
        pair.id,
        dice,
        hd95_mm,
        hd95_voxels,
        lost,
        sd_log_jacobian(jacobian),
        sd_log_jacobian(jacobian, shift=3),
        folds.image_percent,
        folds.brain_percent,
        int(np.count_nonzero(_inner(jacobian) <= 0)),
        _inverse_consistency_mm(pair, registration, disp, scans),
        tre,
        registration.seconds,
    )


def _displacement(fixed: Volume, registration: Registration) -> Displacement:
    if registration.affine is not None:
        grid = file_order(grid_of(fixed))
        return as_displacement(
            add_affine(torch.zeros(1, 3, *grid.shape), grid, registration.affine)
        )
    if registration.warp is None:
        raise EvaluationError(
            "its warp was not written",
            "run 'ulae-rt batch' into another folder, with warp among its --outputs",
        )
    warp = read_warp(registration.warp, fixed=fixed)
    _check_same_grid(warp.grid, fixed)
    return warp.disp


def _inverse_consistency_mm(
    pair: Pair, registration: Registration, disp: Displacement, scans: _Scans
) -> float:
    if registration.inverse_warp is None:
        return math.nan
    inverse = read_warp(registration.inverse_warp, fixed=read_grid(pair.moving))
    grid = grid_of(scans.fixed)
    return inverse_consistency(disp, grid, inverse.disp, grid_of(inverse.grid), scans.brain).mean_mm


def sd_log_jacobian(jacobian: NDArray[np.float32], shift: float = 0.0) -> float:
    """Spread of the local change of volume: 0 where a warp scales everything alike.

        SDlogJ = std(log(clip(det J + shift, 1e-9, 1e9)))

    over all voxels but the outermost two layers. Learn2Reg's own number is that with a shift of 3:
    its code adds 3 to a determinant that is 1 at rest already, which makes it about a quarter of
    the plain one and blind to folding. Both are reported.

    Args:
        jacobian: (X, Y, Z), determinants, see `jacobian_determinant`.
        shift: what is added to them.

    Raises:
        ShapeError: fewer than 5 voxels along an axis.

    Source: MDL-UzL/L2R, evaluation/utils.py and evaluation.py, version 2.0.
    """
    inner = _inner(jacobian).astype(np.float64)
    return float(np.log(np.clip(inner + shift, SMALLEST, LARGEST)).std())


def _inner(jacobian: NDArray[np.float32]) -> NDArray[np.float32]:
    if min(jacobian.shape) <= 2 * BORDER:
        raise ShapeError(
            f"the warp has {'x'.join(map(str, jacobian.shape))} voxels, expected at least 5 along "
            "each axis",
            "give whole volumes",
        )
    return jacobian[(slice(BORDER, -BORDER),) * 3]


def check_measurable(pairs: Sequence[Pair]) -> None:
    """Whether there is anything to compare.

    Raises:
        EvaluationError: no pair has label maps or landmarks of both of its scans.
    """
    if not any(
        (pair.moving_labels and pair.fixed_labels)
        or (pair.moving_landmarks and pair.fixed_landmarks)
        for pair in pairs
    ):
        raise EvaluationError(
            f"none of {len(pairs)} pairs has labels or landmarks of both scans",
            "add the columns moving_labels and fixed_labels (or moving_landmarks and "
            "fixed_landmarks) to the list of pairs, and register it",
        )
