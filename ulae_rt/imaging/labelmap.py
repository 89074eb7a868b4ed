"""Whether a label map belongs to its scan: what is seen before it is carried anywhere."""

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import GeometryError, ImageError
from ulae_rt.imaging.nifti import Volume

logger = logging.getLogger(__name__)

# Voxels of the label map that are looked at: enough for the fit of a hundred labels.
SAMPLES = 8_000
# So few labelled voxels among them (a lesion, a small structure), and all of them are looked at.
FEWEST = 200
# Of 20 label maps of OASIS, 0.0 % lie on the background of their scan; moved by 10 mm it is 11 %.
OFF_BRAIN = 0.1
OUTSIDE = 0.02
MOST = 0.5
# The part of the scan's variance that the labels leave unexplained is 0.04 to 0.05 for those maps,
# and three to four times that mirrored left to right or moved by 3 mm. Another place fits much
# better where it leaves less than this part of what is left as the labels lie, or that much less:
# a mask alone, mirrored, leaves 0.18 in place of 0.11.
MUCH_BETTER = 0.6
BETTER = 0.05
NOISE = 0.005

# Where else the labels are tried: what lies between is found from either side.
SHIFTS_MM = (-8, -3, 3, 8)
# Of two neighbours, so often the values are equal: 0.8 to 0.95 of labels, below 0.1 of scans.
ALIKE = 0.25

HINT = "compare the two headers, e.g. with nib-diff: a label map has the affine of its scan"
AXES = ("first", "second", "third")


class _Points(NamedTuple):
    """Voxels of a label map in its scan.

    Attributes:
        own: (3, N) voxel of the label map.
        in_scan: (3, N) nearest voxel of the scan, by the two headers; it may lie outside.
        labels: (N,).
        inside: (N,), whether the scan has that voxel.
    """

    own: NDArray[np.intp]
    in_scan: NDArray[np.intp]
    labels: NDArray[Any]
    inside: NDArray[np.bool_]


def check_labels(labels: Volume, scan: Volume) -> None:
    """Hold a label map against the scan that it is said to be of.

    The map may lie on another grid and cover a part of the scan only. What is looked at is where
    its labelled voxels (not 0) lie in the scan's world, and how much of the scan's intensities the
    labels explain: as they lie, mirrored along each array axis, moved by 3 and 8 mm and, where the
    two arrays have one shape, voxel by voxel.

    Args:
        labels: the label map.
        scan: as `with_background` gives it, the brain above 0.

    Raises:
        GeometryError: most of its labels lie outside the scan.

    A warning is logged where there is no label at all, where labels lie outside the scan or on its
    background, where the map looks like a scan, and where it fits the scan much better in one of
    the other places that were tried.
    """
    if not labels.data.any():
        logger.warning("%s has no label: every voxel is 0", labels.name)
        return
    points = _sampled(labels, scan)
    labelled = points.labels != 0
    outside = float((labelled & ~points.inside).sum() / labelled.sum())
    there = labelled & points.inside
    on_brain = float((_values_at(scan, points.in_scan[:, there]) > 0).sum() / max(there.sum(), 1))
    if outside > MOST and on_brain < 1 - OFF_BRAIN:
        raise GeometryError(
            f"{100 * outside:.3g} % of the labelled voxels of {labels.name} lie outside the scan "
            f"{scan.name}, expected its own label map",
            HINT,
        )
    doubts = []
    if outside > OUTSIDE:
        doubts.append(f"{100 * outside:.2g} % of its labelled voxels lie outside the scan")
    if on_brain < 1 - OFF_BRAIN:
        doubts.append(f"{100 * (1 - on_brain):.2g} % of its labelled voxels lie on the background")
    if _looks_like_a_scan(points, labels):
        doubts.append("hardly two of its voxels beside each other are equal, as in a scan")
    if better := _better_fit(points, labels, scan):
        doubts.append(f"it fits much better {better}")
    if doubts:
        logger.warning(
            "%s may not belong to the scan %s: %s; %s",
            labels.name, scan.name, "; ".join(doubts), HINT,
        )  # fmt: skip


def check_carried(before: NDArray[Any], carried: NDArray[Any], name: str) -> None:
    """Warn if a label map that has labels has none on the grid it was carried to."""
    if before.any() and not carried.any():
        logger.warning("%s: no label lies on the grid it was carried to; all of it is 0", name)


def refuse_empty(carried: NDArray[Any], name: str) -> None:
    """Refuse a label map that has nothing to teach.

    Raises:
        ImageError: every voxel is 0.
    """
    if not carried.any():
        raise ImageError(
            f"{name} has no label on the prepared grid: every voxel is 0",
            "check that the label map lies where its scan lies; leave it out of the list if the "
            "scan has none",
        )


def _sampled(labels: Volume, scan: Volume) -> _Points:
    step = max(1, round((labels.data.size / SAMPLES) ** (1 / 3)))
    picked = labels.data[::step, ::step, ::step]
    if np.count_nonzero(picked) < FEWEST:
        index = np.stack(np.nonzero(labels.data))
        index = index[:, :: max(1, index.shape[1] // SAMPLES)]
    else:
        index = np.indices(picked.shape).reshape(3, -1) * step
    to_scan = np.linalg.inv(scan.affine) @ labels.affine
    # Not matrix products: BLAS threads spin for longer than this takes when the cores are busy.
    places = np.stack(
        [
            np.rint(row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3])
            for row in to_scan[:3]
        ]
    ).astype(np.intp)
    sizes = np.array(scan.shape)[:, None]
    inside = np.all((places >= 0) & (places < sizes), axis=0)
    return _Points(index, places, labels.data[tuple(index)], inside)


def _values_at(scan: Volume, index: NDArray[np.intp]) -> NDArray[Any]:
    values: NDArray[Any] = scan.data[tuple(index)]
    return values


def _better_fit(points: _Points, labels: Volume, scan: Volume) -> str:
    """How the labels would fit the scan much better than as they lie, in words; or nothing."""
    index, values = points.in_scan[:, points.inside], points.labels[points.inside]
    if index.shape[1] == 0:
        return ""
    fit = _Fit(scan, index, values)
    others = {}
    for axis, name in enumerate(AXES):
        mirrored = index.copy()
        mirrored[axis] = scan.shape[axis] - 1 - mirrored[axis]
        others[f"mirrored along its {name} array axis"] = fit.unexplained(mirrored)
        for mm in SHIFTS_MM:
            moved = index.copy()
            moved[axis] += round(mm / scan.spacing_mm[axis])
            others[f"moved by about {abs(mm)} mm along its {name} array axis"] = min(
                fit.unexplained(moved),
                others.get(f"moved by about {abs(mm)} mm along its {name} array axis", 1.0),
            )
    if labels.shape == scan.shape:
        own = _Fit(scan, points.own, points.labels)
        others["voxel by voxel than by the two headers"] = own.unexplained(points.own)
    best = min(others, key=lambda way: others[way])
    left = fit.unexplained(index)
    much_better = min(max(MUCH_BETTER * left, left - BETTER), left - NOISE)
    return best if others[best] < much_better else ""


class _Fit:
    """How well labels explain a scan: the part of its variance that lies within them.

    Args:
        scan: the scan.
        index: (3, N), where its values are taken from to see between which they usually lie.
        labels: (N,), of the points whose values are explained.
    """

    def __init__(self, scan: Volume, index: NDArray[np.intp], labels: NDArray[Any]) -> None:
        self._scan = scan
        self._last = np.array(scan.shape)[:, None] - 1
        _, self._classes = np.unique(labels, return_inverse=True)
        self._counts = np.bincount(self._classes)
        self._low, self._high = np.quantile(_values_at(scan, index), (0.01, 0.99))

    def unexplained(self, index: NDArray[np.intp]) -> float:
        """0 to 1, with the points at ``index`` (3, N); what lies outside counts as the edge."""
        x = _values_at(self._scan, np.clip(index, 0, self._last)).astype(np.float64)
        np.clip(x, self._low, self._high, out=x)
        x -= x.mean()
        total = float((x * x).sum())
        if total == 0:
            return 1.0
        sums = np.bincount(self._classes, x)
        return 1 - float((sums**2 / self._counts).sum()) / total


def _looks_like_a_scan(points: _Points, labels: Volume) -> bool:
    """Whether next to hardly any labelled voxel lies one of the same value."""
    labelled = points.own[:, points.labels != 0]
    if labelled.shape[1] < FEWEST:  # landmarks, one voxel each
        return False
    beside = labelled.copy()
    beside[0] = np.where(beside[0] > 0, beside[0] - 1, beside[0] + 1)
    same = labels.data[tuple(beside)] == labels.data[tuple(labelled)]
    return bool(same.mean() < ALIKE)
