"""Which registered pairs need a look: how far each lies from what is usual in its batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ulae_rt.batching.results import Row
from ulae_rt.batching.summary import spread_of

# Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993): 3.5 for a z-score by median and
# median absolute deviation, which 1.4826 makes a standard deviation where values are normal.
LIMIT, TO_SIGMA = 3.5, 1.4826
# Fewer pairs say nothing about what is usual.
ENOUGH = 10


@dataclass(frozen=True)
class Measure:
    """A figure by which pairs are ranked.

    Attributes:
        name: for people.
        of: the figure of a row; None: not known.
        sign: 1 where a high value is bad, -1 where a low one is.
        least: spread below which pairs count as alike, however alike the others are.
        unit: after the number.
    """

    name: str
    of: Callable[[Row], float | None]
    sign: int
    least: float
    unit: str = ""


def known(value: float | None) -> float | None:
    """``value``; None if it is NaN or infinite, as nothing can be said about it either."""
    return value if value is not None and math.isfinite(value) else None


def gain(row: Row) -> float | None:
    """Similarity after less that before."""
    before, after = known(row.similarity_before), known(row.similarity_after)
    return None if before is None or after is None else after - before


MEASURES = (
    Measure("similarity after", lambda row: known(row.similarity_after), -1, 0.01),
    Measure("gain", gain, -1, 0.01),
    Measure("folding in the brain", lambda row: known(row.folding_percent), 1, 0.05, "\u00a0%"),
    Measure(
        "inverse consistency", lambda row: known(row.inverse_consistency_mm), 1, 0.1, "\u00a0mm"
    ),
)


@dataclass(frozen=True)
class Flag:
    """A figure that lies far out on its bad side: the pair's ``value`` and all pairs' median."""

    measure: Measure
    value: float
    median: float


@dataclass(frozen=True)
class Ranked:
    """A pair that was registered, and how far out it lies.

    Attributes:
        row: of the pair.
        z: the largest z of `MEASURES`; None: it has no figures.
        flags: figures that lie far out.
    """

    row: Row
    z: float | None
    flags: list[Flag] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        """Of `gain`."""
        return gain(self.row)

    @property
    def worse(self) -> bool:
        """Whether the similarity did not rise."""
        return self.gain is not None and self.gain <= 0

    @property
    def flagged(self) -> bool:
        """Whether the pair needs a look."""
        return self.worse or bool(self.flags)


def rank(rows: Sequence[Row]) -> list[Ranked]:
    """The pairs that were registered: those that need a look first, then by z, worst first.

        z = sign (value - median) / max(1.4826 median |value - median|, least)

    A figure is flagged where its z is above `LIMIT`, if `ENOUGH` pairs have it.

    Args:
        rows: of `read_results`; those that failed are left out.
    """
    done = [row for row in rows if row.status == "done"]
    scores: list[list[float]] = [[] for _ in done]
    flags: list[list[Flag]] = [[] for _ in done]
    for measure in MEASURES:
        values = [measure.of(row) for row in done]
        present = [value for value in values if value is not None]
        if not present:
            continue
        median = spread_of(present)["p50"]
        deviation = spread_of([abs(value - median) for value in present])["p50"]
        scale = max(TO_SIGMA * deviation, measure.least)
        for number, value in enumerate(values):
            if value is None:
                continue
            z = measure.sign * (value - median) / scale
            scores[number].append(z)
            if z > LIMIT and len(present) >= ENOUGH:
                flags[number].append(Flag(measure, value, median))
    ranked = [
        Ranked(row, max(own, default=None), said)
        for row, own, said in zip(done, scores, flags, strict=True)
    ]
    return sorted(ranked, key=_urgency)


def _urgency(each: Ranked) -> tuple[bool, float]:
    return not each.flagged, math.inf if each.z is None else -each.z
