"""Running an artefact against the reference, which each passes that anything here can run."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulae_rt.engines.backends import Backend
from ulae_rt.engines.machine import machine_name
from ulae_rt.errors import EquivalenceError
from ulae_rt.export.cases import Case, Truth, folded
from ulae_rt.export.config import Tolerance
from ulae_rt.manifest import ANY_BATCH, Measured

_MEANINGS = {
    "disp_mean": "mean displacement error, voxels",
    "disp_p99": "99th percentile of the displacement error, voxels",
    "disp_max": "largest displacement error, voxels",
    "moved_mean": "mean error of the moved image",
    "moved_max": "largest error of the moved image",
    "sign_flips": "voxels in a million whose Jacobian determinant changed its sign",
}
_PAIRS_OF_OPEN_BATCH = 2

UNVERIFIED_HINT = (
    "this artefact is not written; install the versions of constraints.txt, and report it if they "
    "are installed"
)


def verify(backend: Backend, batch: int, case: Case, tolerance: Tolerance) -> Measured:
    """Run one case on a loaded artefact: as it is, again, and with its pairs in another order.

    Args:
        backend: the artefact.
        batch: pairs it takes, or ``ANY_BATCH``.
        case: with two pairs where the artefact takes more than one.
        tolerance: of its precision.

    Returns:
        The largest errors of all runs, and the seconds of the quickest for one batch.

    Raises:
        EquivalenceError: if a run is farther from the truth than the tolerance, naming the worst
            place; or if the same inputs gave other bits the second time.
    """
    pairs = _PAIRS_OF_OPEN_BATCH if batch == ANY_BATCH else batch
    timed = 1 if batch == ANY_BATCH else batch
    seconds: list[float] = []

    def run(part: Case) -> dict[str, NDArray[np.float32]]:
        started = time.perf_counter()
        found = backend.run({"moving": part.moving, "fixed": part.fixed})
        if len(part.truth) == timed:
            seconds.append(time.perf_counter() - started)
        return found

    whole = case.batch(pairs)
    first = run(whole)
    errors = _errors(whole, first, tolerance)
    _check_repeated(case, first, run(whole))
    del first
    others = [case.batch(pairs, first=1)] if pairs > 1 else []
    if batch == ANY_BATCH:
        others.append(case.batch(1))
    for part in others:
        errors += _errors(part, run(part), tolerance)
    largest = max(float(np.sqrt((truth.disp**2).sum(axis=0).max())) for truth in case.truth)
    return Measured(
        pair=case.name,
        runtime=f"{backend.name} {backend.device}",
        machine=machine_name(backend.device),
        seconds=min(seconds),
        disp_largest=largest,
        disp_mean=max(each.disp_mean for each in errors),
        disp_p99=max(each.disp_p99 for each in errors),
        disp_max=max(each.disp_max for each in errors),
        moved_mean=max(each.moved_mean for each in errors),
        moved_max=max(each.moved_max for each in errors),
        sign_flips=max(each.sign_flips for each in errors),
    )


class _Errors(NamedTuple):
    """One pair's, as in :class:`Measured`."""

    disp_mean: float
    disp_p99: float
    disp_max: float
    moved_mean: float
    moved_max: float
    sign_flips: int


def _errors(
    case: Case, found: dict[str, NDArray[np.float32]], tolerance: Tolerance
) -> list[_Errors]:
    """Each pair's, all within the tolerance."""
    every = []
    for number, truth in enumerate(case.truth):
        moved, disp = found["moved"][number], found["disp"][number]
        # A NaN is infinitely far.
        distance = np.nan_to_num(np.sqrt(((disp - truth.disp) ** 2).sum(axis=0)), nan=np.inf)
        difference = np.nan_to_num(np.abs(moved - truth.moved)[0], nan=np.inf)
        errors = _Errors(
            disp_mean=float(distance.mean()),
            disp_p99=float(np.quantile(distance, 0.99)),
            disp_max=float(distance.max()),
            moved_mean=float(difference.mean()),
            moved_max=float(difference.max()),
            sign_flips=int((folded(disp) != truth.folded).sum()),
        )
        for name, value, allowed in tolerance.exceeded(errors, distance.size):
            where = _worst(difference if "moved" in name else distance, number, disp, truth)
            raise EquivalenceError(
                f"verification failed on {case.name}: {_MEANINGS[name]}: {value:.3g}, "
                f"expected at most {allowed:g}; {where}",
                f"{UNVERIFIED_HINT}. --tolerance {name}={_above(value)} lets it pass",
            )
        every.append(errors)
    return every


def _above(value: float) -> str:
    """Two digits of a number that is no smaller."""
    if not math.isfinite(value):
        return "..."
    rounded = float(f"{value:.1e}")
    return f"{rounded if rounded >= value else float(f'{value * 1.1:.1e}'):g}"


def _worst(error: NDArray[Any], number: int, disp: NDArray[np.float32], truth: Truth) -> str:
    d, h, w = np.unravel_index(int(error.argmax()), error.shape)
    numbers, expected = (
        ", ".join(f"{component:.6g}" for component in field[:, d, h, w])
        for field in (disp, truth.disp)
    )
    place = f"worst at disp[{number}, :, {d}, {h}, {w}]"
    return f"{place}, which is ({numbers}), expected ({expected})"


def _check_repeated(
    case: Case, first: dict[str, NDArray[np.float32]], second: dict[str, NDArray[np.float32]]
) -> None:
    for name, values in first.items():
        different = values != second[name]
        if different.any():
            place = ", ".join(str(int(i)) for i in np.argwhere(different)[0])
            raise EquivalenceError(
                f"verification failed on {case.name}: the same inputs gave another {name} the "
                f"second time, first at [{place}]",
                f"{UNVERIFIED_HINT}; a result that changes by itself cannot be verified",
            )
