"""The figures of a whole batch."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

from ulae_rt.batching.results import Row
from ulae_rt.reports import VerdictName

# Of the similarity and the folding over all pairs.
PERCENTILES = (5, 25, 50, 75, 95)
FIGURES = (
    "similarity_before",
    "similarity_after",
    "overlap",
    "folding_percent",
    "folding_image_percent",
    "inverse_consistency_mm",
    "lncc_network",
    "lncc_refined",
)


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, spread of the figures, seconds by stage, and what went wrong how often.

    Args:
        rows: of `read_results`.
    """
    done = [row for row in rows if row.status == "done"]
    failed = [row for row in rows if row.status == "failed"]
    stages = dict.fromkeys(stage for row in done for stage in row.seconds)
    return {
        "pairs": len(rows),
        "done": len(done),
        "failed": len(failed),
        "verdicts": {
            name: sum(row.verdict == name for row in done) for name in get_args(VerdictName)
        },
        "with_warnings": sum(bool(row.warnings) for row in rows),
        **{name: spread_of(_known(done, name)) for name in FIGURES},
        # Over the pairs that had the stage: of a shared fixed scan only one pair was the reader.
        "seconds": {
            stage: statistics.fmean(row.seconds[stage] for row in done if stage in row.seconds)
            for stage in stages
        },
        "failures": [{"id": row.id, "error": row.error, "hint": row.hint} for row in failed],
        "hosts": dict(Counter(row.host for row in rows)),
    }


def _known(rows: Sequence[Row], name: str) -> list[float]:
    values = (getattr(row, name) for row in rows)
    return [value for value in values if value is not None]


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Least, greatest, mean and percentiles; empty of none."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        **{f"p{p}": ordered[round(p / 100 * last)] for p in PERCENTILES},
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
    }
