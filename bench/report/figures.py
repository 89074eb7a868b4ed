"""What the rounds of a record say, as numbers: medians, ratios, floors, exponents.

Pure functions: nothing here knows how a figure is written or drawn.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.case import Outcome
from harness.record import CaseRecord, Record

# A percentile is shown from so many rounds: below, it would be the slowest round by another name.
ENOUGH = {95: 20, 99: 100}
# The suite of many small cases: one of them stands for nothing, so their mean stands for it.
KERNELS = "kernels"
# The suite of the same work at other sizes: charts and exponents say what it has to say.
SCALING = "scaling"
# Of a case's own contenders, a headline names so many: the fastest of each precision.
MOST_OWN = 3
_PRECISION = re.compile(r"(?<![a-z0-9])(fp64|fp32|tf32|bf16|fp16|fp8)(?![a-z0-9])")


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The value that so many percent do not exceed; None where there are too few for it."""
    if len(values) < ENOUGH.get(percent, 1):
        return None
    return float(np.percentile(values, percent))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(low), float(middle), float(high)


def times_as_fast(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times as fast as the baseline.

    The median over the rounds of the ratio in one round, where both ran in every round: the
    machine drifts for both alike. Elsewhere the ratio of the medians.
    """
    if len(seconds) == len(baseline):
        return statistics.median(b / a for a, b in zip(seconds, baseline, strict=True))
    return statistics.median(baseline) / statistics.median(seconds)


def is_timed(outcome: Outcome | None) -> bool:
    """Whether there is a round of it."""
    return outcome is not None and outcome.status == "timed" and bool(outcome.seconds)


def precision_of(case: CaseRecord, contender: str) -> str:
    """What a contender computes in, as its name says; else the case's."""
    for said in (contender, case.precision):
        named = _PRECISION.findall(said.lower())
        if named:
            return str(named[-1])
    return case.precision


def floor(record: Record, case: CaseRecord, precision: str) -> float | None:
    """Seconds that this machine needs at least, by the ceilings measured in the same run.

    The larger of: the bytes at the copy bandwidth; the FLOP at the matrix rate of the precision,
    or of fp32 where that was not measured. None where the case counts neither.
    """
    rates = record.matmul_flops_per_second
    rate = rates.get(precision, rates.get("fp32"))
    bounds = []
    if case.bytes and record.copy_bytes_per_second:
        bounds.append(case.bytes / record.copy_bytes_per_second)
    if case.flops and rate:
        bounds.append(case.flops / rate)
    return max(bounds, default=None)


@dataclass(frozen=True)
class Figures:
    """What there is to say of a contender that was timed.

    Attributes:
        rounds: how many.
        median: seconds; so are ``low`` and ``high``, the fastest and the slowest round.
        p95: seconds; None of too few rounds.
        p99: likewise.
        hot: median seconds with warm caches, on a GPU.
        times: as fast as the baseline; None without one, and for the baseline itself.
        pairs_per_second: of volumes.
        bytes_per_second: of the bytes that have to move.
        copy_share: the same by the copy bandwidth.
        floor: seconds that the hardware needs at least.
        floors: the median by it.
    """

    rounds: int
    median: float
    low: float
    high: float
    p95: float | None
    p99: float | None
    hot: float | None
    times: float | None
    pairs_per_second: float
    bytes_per_second: float | None
    copy_share: float | None
    floor: float | None
    floors: float | None


def figures(record: Record, case: CaseRecord, contender: str) -> Figures | None:
    """Those of a contender; None where it was not timed."""
    outcome = case.contenders[contender]
    if not is_timed(outcome):
        return None
    seconds = outcome.seconds
    median = statistics.median(seconds)
    baseline = case.contenders.get(case.baseline)
    times = None
    if baseline is not None and is_timed(baseline) and contender != case.baseline:
        times = times_as_fast(seconds, baseline.seconds)
    least = floor(record, case, precision_of(case, contender))
    moved = case.bytes / median if case.bytes else None
    copy = record.copy_bytes_per_second
    return Figures(
        rounds=len(seconds),
        median=median,
        low=min(seconds),
        high=max(seconds),
        p95=percentile(seconds, 95),
        p99=percentile(seconds, 99),
        hot=statistics.median(outcome.hot) if outcome.hot else None,
        times=times,
        pairs_per_second=case.batch / median,
        bytes_per_second=moved,
        copy_share=moved / copy if moved and copy else None,
        floor=least,
        floors=median / least if least else None,
    )


@dataclass(frozen=True)
class Fit:
    """``seconds = constant * x ** exponent``, with the standard error of the exponent."""

    exponent: float
    error: float
    constant: float


def exponent(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Least squares of log seconds on log x over (x, seconds); None below three distinct x."""
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    start = float(y.mean() - slope * x.mean())
    rest = y - start - slope * x
    error = math.sqrt(float(rest @ rest) / (len(points) - 2) / float(spread @ spread))
    return Fit(slope, error, math.exp(start))


def suites(record: Record) -> list[str]:
    """Names, in the order in which they ran."""
    return list(dict.fromkeys(case.suite for case in record.cases))


def series(record: Record, suite: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """(x, median seconds) of every timed contender of every series of a suite, x rising."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in sorted(record.cases, key=lambda case: case.x or 0.0):
        if case.suite != suite or not case.series or not case.x:
            continue
        for name, outcome in case.contenders.items():
            if is_timed(outcome):
                points = found.setdefault(case.series, {}).setdefault(name, [])
                points.append((case.x, statistics.median(outcome.seconds)))
    return found


def own_by_precision(record: Record, case: CaseRecord) -> dict[str, Figures]:
    """The fastest own contender of each precision, the fastest first, at most `MOST_OWN`."""
    fastest: dict[str, tuple[str, Figures]] = {}
    for name in case.own:
        found = figures(record, case, name) if name in case.contenders else None
        if found is None or name == case.baseline:
            continue
        precision = precision_of(case, name)
        if precision not in fastest or found.median < fastest[precision][1].median:
            fastest[precision] = name, found
    ordered = sorted(fastest.values(), key=lambda each: each[1].median)
    return dict(ordered[:MOST_OWN])


def headline_cases(record: Record, suite: str) -> list[CaseRecord]:
    """The cases that stand for a suite: its largest of one pair, and its largest batch if any.

    Of equals one for each baseline: the first in which the package was timed. Those without a
    baseline stand for a suite only where there is no other.
    """

    def size(case: CaseRecord) -> tuple[int, int]:
        return case.batch, math.prod(case.sizes)

    cases = [case for case in record.cases if case.suite == suite]
    found: list[CaseRecord] = []
    for batched in (False, True):
        group = [case for case in cases if (case.batch > 1) == batched]
        largest = [case for case in group if size(case) == max(map(size, group))]
        # Stable: those that were timed before those that were not.
        largest.sort(key=lambda case: not own_by_precision(record, case))
        chosen: dict[str, CaseRecord] = {}
        for case in largest:
            chosen.setdefault(case.baseline, case)
        if len(chosen) > 1:
            chosen.pop("", None)
        found += sorted(chosen.values(), key=cases.index)
    return found


@dataclass(frozen=True)
class Mean:
    """The cases of a suite taken together.

    Attributes:
        times: geometric mean of how many times as fast as its baseline each case is.
        least: the worst case's; ``most``: the best case's.
        compared: cases in the mean.
        cases: of the suite.
        baselines: their names.
        floors: median of the medians by their floors; None without floors.
        peak_gb: largest GPU memory of the package's contenders, None where not measured.
    """

    times: float
    least: float
    most: float
    compared: int
    cases: int
    baselines: tuple[str, ...]
    floors: float | None
    peak_gb: float | None


def mean(record: Record, suite: str) -> Mean | None:
    """Over the fastest own contender of each case; None where no case can be compared."""
    cases = [case for case in record.cases if case.suite == suite]
    best: list[tuple[CaseRecord, str, Figures]] = []
    for case in cases:
        for name, found in list(own_by_precision(record, case).items())[:1]:
            best.append((case, name, found))
    times = {case.id: found.times for case, _, found in best if found.times is not None}
    ratios = [value for value in times.values() if value is not None]
    if not ratios:
        return None
    floors = [found.floors for _, _, found in best if found.floors is not None]
    peaks = [case.contenders[name].gpu_peak_gb for case, name, _ in best]
    return Mean(
        times=statistics.geometric_mean(ratios),
        least=min(ratios),
        most=max(ratios),
        compared=len(ratios),
        cases=len(cases),
        baselines=tuple(dict.fromkeys(case.baseline for case, _, _ in best if case.id in times)),
        floors=statistics.median(floors) if floors else None,
        peak_gb=max((peak for peak in peaks if peak is not None), default=None),
    )


def untimed(record: Record) -> list[tuple[CaseRecord, str, Outcome]]:
    """(case, contender, what came of it) wherever there is no time, failures first."""
    order: Mapping[str, int] = {"wrong": 0, "failed": 1, "left out": 3}
    found = [
        (case, name, outcome)
        for case in record.cases
        for name, outcome in case.contenders.items()
        if not is_timed(outcome)
    ]
    return sorted(found, key=lambda each: order.get(each[2].status, 2))
