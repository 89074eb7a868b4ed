"""Distances between the surfaces of labels."""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulae_rt.optional import require

Spacing = tuple[float, float, float]

UNIT: Spacing = (1.0, 1.0, 1.0)
PERCENTILE = 95
# Eight voxels around a corner make a code: the sum of those that belong to the label.
_WEIGHTS = np.array([[[128, 64], [32, 16]], [[8, 4], [2, 1]]], np.uint8)
_FULL = 255
# Marching cubes' surface around a corner: the area, in eighths of a voxel's face, that is seen
# along each axis, for every kind of corner. All other codes are one of these turned, mirrored or
# with inside and outside exchanged.
_SURFACES: dict[int, tuple[tuple[int, int, int], ...]] = {
    0: (),
    1: ((1, 1, 1),),
    3: ((4, 4, 0),),
    6: ((2, 2, 2),),
    7: ((4, 0, 0), (3, 3, 3)),
    15: ((8, 0, 0),),
    22: ((3, 3, 3),),
    23: ((6, 6, 6),),
    24: ((2, 2, 2),),
    25: ((0, 4, 4), (1, 1, 1)),
    27: ((4, 4, 4), (0, 2, 2), (2, 0, 2)),
    30: ((4, 0, 0), (4, 4, 4)),
    60: ((8, 8, 0),),
    105: ((4, 4, 4),),
}


@cache
def _areas(spacing_mm: Spacing) -> NDArray[np.float64]:
    """(256,) mm², the surface at a corner by its code."""
    faces = np.prod(spacing_mm) / np.array(spacing_mm) / 8
    areas = np.full(256, np.nan)
    turns = itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3), (False, True)
    )
    for order, (x, y, z), exchanged in turns:
        weights = _WEIGHTS.transpose(order)[::x, ::y, ::z]
        for code, vectors in _SURFACES.items():
            turned = int(weights[(_WEIGHTS & code) > 0].sum())
            area = sum(float(np.linalg.norm(v * faces[list(order)])) for v in np.array(vectors))
            areas[_FULL - turned if exchanged else turned] = area
    return areas


def hd95_per_label(
    x: NDArray[np.integer],
    y: NDArray[np.integer],
    labels: Sequence[int],
    spacing_mm: Spacing = UNIT,
) -> dict[int, float]:
    """The 95th percentile of the distance between the two surfaces of each label.

        HD95 = max(P95 of d(p, S_y) over p in S_x,  P95 of d(q, S_x) over q in S_y)

    S is the set of voxel corners at which a label touches something else, the image's border
    included; d is the distance to the nearest point of the other set. Every corner counts by the
    area that marching cubes gives the surface there, and P95 is the least distance that 95 % of
    the area does not exceed.

    Args:
        x: (X, Y, Z), label map, small non-negative integers.
        y: the same shape.
        labels: which ones.
        spacing_mm: of the voxels along each array axis; ones give Learn2Reg's number.

    Returns:
        Label to mm; NaN for a label that one of the maps does not have.

    Raises:
        BackendUnavailable: SciPy is not installed.

    Source: Nikolov et al. 2018, the definition of DeepMind's surface-distance, which Learn2Reg
    evaluates with. That package is not used: it fails with NumPy 2 where a label is missing.
    """
    ndimage: Any = require("scipy.ndimage", "evaluate")
    boxes = [ndimage.find_objects(each, max_label=max(labels, default=0)) for each in (x, y)]
    found = {}
    for label in labels:
        x_box, y_box = (each[label - 1] for each in boxes)
        if x_box is None or y_box is None:
            found[label] = np.nan
            continue
        # All that is near enough to matter: nothing outside is looked at.
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(x_box, y_box, strict=True)
        )
        codes = _codes(x[box] == label), _codes(y[box] == label)
        found[label] = max(
            _percentile(here, there, spacing_mm) for here, there in (codes, codes[::-1])
        )
    return found


def _codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(X + 1, Y + 1, Z + 1), the code of every corner of a mask's voxels."""
    padded = np.pad(mask, 1).view(np.uint8)
    a, b, c = (n + 1 for n in mask.shape)
    codes = np.zeros((a, b, c), np.uint8)
    for (i, j, k), weight in np.ndenumerate(_WEIGHTS):
        codes += weight * padded[i : i + a, j : j + b, k : k + c]
    return codes


def _percentile(here: NDArray[np.uint8], there: NDArray[np.uint8], spacing_mm: Spacing) -> float:
    """P95 of the distance from the surface of one to that of the other, by their codes."""
    ndimage: Any = require("scipy.ndimage", "evaluate")
    away = ndimage.distance_transform_edt(~_on_surface(there), sampling=spacing_mm)
    codes = here[surface := _on_surface(here)]
    distances, areas = away[surface], _areas(spacing_mm)[codes]
    order = np.argsort(distances)
    covered = np.cumsum(areas[order])
    first = int(np.searchsorted(covered / covered[-1], PERCENTILE / 100))
    return float(distances[order[min(first, len(order) - 1)]])


def _on_surface(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray((codes != 0) & (codes != _FULL))
