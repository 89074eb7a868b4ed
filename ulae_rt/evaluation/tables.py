"""From cases to tables: figures of each method, comparisons, and the files that hold them."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ulae_rt.evaluation.measures import Case
from ulae_rt.evaluation.protocol import Protocol
from ulae_rt.optional import require

AVERAGE = "Avg."
# Of Learn2Reg, whose layout `learn2reg_json` writes.
_L2R_VERSION = "2.0"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A measure over the pairs that have it.

    Attributes:
        pairs: how many.
        mean, median, min, max: over them.
        sd: standard deviation, divided by ``pairs`` as Learn2Reg's is.
    """

    pairs: int
    mean: float
    sd: float
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Of the values that are numbers; None of none."""
        there = np.array([value for value in values if not math.isnan(value)])
        if there.size == 0:
            return None
        return cls(
            there.size,
            float(there.mean()),
            float(there.std()),
            float(np.median(there)),
            float(there.min()),
            float(there.max()),
        )


@dataclass(frozen=True)
class Comparison:
    """Two methods on the pairs that both have.

    Attributes:
        first, second: their names.
        pairs: how many they share.
        median_difference: of the Dice over all labels, second less first.
        p: of the Wilcoxon signed-rank test, two-sided; NaN where nothing differs. The pairs of a
            few people are not independent, which makes it smaller than it should be.
    """

    first: str
    second: str
    pairs: int
    median_difference: float
    p: float


def mean_of(values: Mapping[int, float], labels: Sequence[int] | None = None) -> float:
    """Mean over ``labels`` (None: all) of those that are numbers; NaN of none."""
    asked = values if labels is None else [label for label in labels if label in values]
    there = [values[label] for label in asked if not math.isnan(values[label])]
    return float(np.mean(there)) if there else math.nan


def dice_by_area(case: Case, protocol: Protocol) -> dict[str, float]:
    """Mean Dice of each of a protocol's areas, and their average where it has one."""
    areas = {name: mean_of(case.dice, labels) for name, labels in protocol.groups.items()}
    if protocol.average:
        average = [areas[name] for name in protocol.average]
        areas[AVERAGE] = float(np.mean(average))
    return areas


# Measures of a case by their column in cases.csv.
MEASURES: dict[str, Callable[[Case], float]] = {
    "dice": lambda case: mean_of(case.dice),
    "hd95_mm": lambda case: mean_of(case.hd95_mm),
    "hd95_voxels": lambda case: mean_of(case.hd95_voxels),
    "labels_lost": lambda case: float(case.lost) if case.dice else math.nan,
    "sdlogj": lambda case: case.sdlogj,
    "sdlogj_l2r": lambda case: case.sdlogj_l2r,
    "folded_image_percent": lambda case: case.folded_image_percent,
    "folded_brain_percent": lambda case: case.folded_brain_percent,
    "inverse_consistency_mm": lambda case: case.inverse_consistency_mm,
    "tre_mm": lambda case: float(np.mean(list(case.tre_mm.values()))) if case.tre_mm else math.nan,
    "seconds": lambda case: case.seconds,
}


def measures_of(case: Case, protocol: Protocol) -> dict[str, float]:
    """All measures of a case by column: `MEASURES`, and the Dice and HD95 of each area."""
    values = {name: measure(case) for name, measure in MEASURES.items()}
    values |= {f"dice_{name}": dice for name, dice in dice_by_area(case, protocol).items()}
    for name, labels in protocol.groups.items():
        values[f"hd95_mm_{name}"] = mean_of(case.hd95_mm, labels)
    return values


def summarised(cases: Sequence[Case], protocol: Protocol) -> dict[str, dict[str, Spread]]:
    """Each method's measures over its pairs; a measure that no pair has is left out."""
    found: dict[str, dict[str, Spread]] = {}
    for method in dict.fromkeys(case.method for case in cases):
        rows = [measures_of(case, protocol) for case in cases if case.method == method]
        spreads = {name: Spread.of(row[name] for row in rows) for name in rows[0]}
        found[method] = {name: each for name, each in spreads.items() if each is not None}
    return found


def compared(cases: Sequence[Case]) -> list[Comparison]:
    """Every two methods by their Dice over all labels, pair by pair.

    Raises:
        BackendUnavailable: SciPy is not installed.
    """
    stats: Any = require("scipy.stats", "evaluate")
    dice: dict[str, dict[str, float]] = {}
    for case in cases:
        if not math.isnan(value := mean_of(case.dice)):
            dice.setdefault(case.method, {})[case.id] = value
    found = []
    for (first, x), (second, y) in combinations(dice.items(), 2):
        if shared := [id_ for id_ in x if id_ in y]:
            differences = np.array([y[id_] - x[id_] for id_ in shared])
            p = float(stats.wilcoxon(differences).pvalue) if differences.any() else math.nan
            median = float(np.median(differences))
            found.append(Comparison(first, second, len(shared), median, p))
    return found


def cases_csv(cases: Sequence[Case], protocol: Protocol) -> str:
    """One row a pair and method, with every measure; what was not measured is empty."""
    rows = [{"method": case.method, "id": case.id, **measures_of(case, protocol)} for case in cases]
    return _csv(list(rows[0]), rows)


def labels_csv(cases: Sequence[Case], protocol: Protocol) -> str:
    """One row a pair, method and label: its name, Dice and HD95."""
    rows = [
        {
            "method": case.method,
            "id": case.id,
            "label": label,
            "name": protocol.names.get(label, ""),
            "dice": dice,
            "hd95_mm": case.hd95_mm[label],
        }
        for case in cases
        for label, dice in case.dice.items()
    ]
    return _csv(["method", "id", "label", "name", "dice", "hd95_mm"], rows)


def _csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def learn2reg_json(cases: Sequence[Case], title: str) -> str:
    """One method's cases in the layout that Learn2Reg's evaluation writes.

        {"name", "aggregates": {METRIC: {"mean", "std", "30"}},
         "cases": {ID: {METRIC: {"mean", "detailed"}}}, "eval_version"}

    with DSC and HD95 (in voxels) by label, LogJacDetStd, TRE by landmark, and num_foldings. "30"
    is the 0.3 quantile of the cases' means. What was not measured is null, and not in the
    aggregates. Unlike Learn2Reg's, num_foldings counts determinants of 0 or less before 3 is
    added to them, and lost labels are left out of HD95 instead of being infinitely far away.

    Args:
        cases: of one method.
        title: its "name".

    Source: MDL-UzL/L2R, evaluation/L2RTest/evaluation.py, version 2.0.
    """
    labels = sorted({label for case in cases for label in case.dice})
    by_case: dict[str, dict[str, tuple[float, Any]]] = {}
    for case in cases:
        metrics: dict[str, tuple[float, Any]] = {
            "LogJacDetStd": (case.sdlogj_l2r, case.sdlogj_l2r),
            "num_foldings": (case.foldings, case.foldings),
        }
        if labels:
            for name, values in (("DSC", case.dice), ("HD95", case.hd95_voxels)):
                metrics[name] = mean_of(values), [values.get(k, math.nan) for k in labels]
        if case.tre_mm:
            metrics["TRE"] = MEASURES["tre_mm"](case), list(case.tre_mm.values())
        by_case[case.id] = metrics
    aggregates = {}
    for name in dict.fromkeys(name for metrics in by_case.values() for name in metrics):
        means = [metrics[name][0] for metrics in by_case.values() if name in metrics]
        if spread := Spread.of(means):
            quantile = float(np.nanquantile(means, 0.3))
            aggregates[name] = {"mean": spread.mean, "std": spread.sd, "30": quantile}
    content = {
        "name": title,
        "aggregates": aggregates,
        "cases": {
            id_: {name: {"mean": mean, "detailed": all_} for name, (mean, all_) in metrics.items()}
            for id_, metrics in by_case.items()
        },
        "eval_version": _L2R_VERSION,
    }
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """``value`` with None for every NaN in it, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# Columns of the table of measures: heading, measure, figure and digits.
_COLUMNS = (
    ("Dice", "dice", "mean", 3),
    ("median", "dice", "median", 3),
    ("sd", "dice", "sd", 3),
    ("min", "dice", "min", 3),
    ("HD95 mm", "hd95_mm", "mean", 2),
    ("SDlogJ", "sdlogj", "mean", 3),
    ("SDlogJ L2R", "sdlogj_l2r", "mean", 3),
    ("folded image %", "folded_image_percent", "mean", 3),
    ("folded brain %", "folded_brain_percent", "mean", 3),
    ("inverse mm", "inverse_consistency_mm", "mean", 3),
    ("TRE mm", "tre_mm", "mean", 2),
    ("labels lost", "labels_lost", "mean", 2),
    ("seconds", "seconds", "mean", 1),
)

_LEGEND = """\
Dice: over all labels; median, sd and min over pairs. HD95: 95th percentile of the distance between
surfaces, mean over labels. SDlogJ: standard deviation of the logarithm of the Jacobian determinant;
L2R: with 3 added to it, as Learn2Reg computes it. Folded: voxels with a determinant of 0 or less.
Inverse: there and back, mean distance inside the brain. TRE: distance of landmarks. Labels lost:
both scans have them, the moved one has not; they count as Dice 0 and not in HD95."""


def markdown(
    summary: Mapping[str, Mapping[str, Spread]],
    comparisons: Sequence[Comparison],
    protocol: Protocol,
) -> str:
    """The tables for people: Dice by area as in the paper's Table 1, measures, comparisons."""
    parts = [f"# {protocol.title}", "Means over pairs."]
    if len({_pairs(spreads) for spreads in summary.values()}) > 1:
        parts.append(
            "**Not every method has every pair**: the means are of different pairs; methods are "
            "compared on those that both have."
        )
    if len(protocol.groups) > 1:
        parts += ["## Dice by area", _dice_table(summary, protocol)]
    parts += ["## Measures", _measures_table(summary), _LEGEND]
    if comparisons:
        parts += [
            "## Method against method",
            "Dice over all labels, pair by pair; p by the Wilcoxon signed-rank test. Pairs that "
            "share a person are not independent: p is smaller than it should be.",
            _markdown_table(
                ["", "pairs", "median difference", "p"],
                [
                    [
                        f"{c.second} - {c.first}",
                        str(c.pairs),
                        f"{c.median_difference:+.4f}",
                        _p(c.p),
                    ]
                    for c in comparisons
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _dice_table(summary: Mapping[str, Mapping[str, Spread]], protocol: Protocol) -> str:
    areas = [*protocol.groups, *([AVERAGE] if protocol.average else [])]
    columns = {area: f"dice_{area}" for area in areas}
    columns[f"all {len(protocol.labels or ())}"] = "dice"
    rows = [
        [method, *(_figure(spreads.get(name), "mean", 3) for name in columns.values())]
        for method, spreads in summary.items()
    ]
    return _markdown_table(["Dice", *columns], rows)


def _measures_table(summary: Mapping[str, Mapping[str, Spread]]) -> str:
    there = {name for spreads in summary.values() for name in spreads}
    columns = [column for column in _COLUMNS if column[1] in there]
    rows = [
        [
            method,
            str(_pairs(spreads)),
            *(_figure(spreads.get(name), figure, digits) for _, name, figure, digits in columns),
        ]
        for method, spreads in summary.items()
    ]
    return _markdown_table(["", "pairs", *(column[0] for column in columns)], rows)


def _pairs(spreads: Mapping[str, Spread]) -> int:
    return max(each.pairs for each in spreads.values())


def _figure(spread: Spread | None, figure: str, digits: int) -> str:
    return "-" if spread is None else f"{asdict(spread)[figure]:.{digits}f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads as well before it is rendered."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in (head, *rows)
    ]  # fmt: skip
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])
