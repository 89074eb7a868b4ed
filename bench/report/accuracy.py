"""The README's table of accuracy, from the newest evidence that has every method."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, pstdev

from harness.record import RESULTS
from harness.registering import AFFINE, Evidence

# Heading and column of cases.csv.
_AREAS = {
    "cortex": "dice_cortex",
    "below 100": "dice_below_100",
    "frontal": "dice_FL",
    "parietal": "dice_PL",
    "occipital": "dice_OL",
    "temporal": "dice_TL",
    "cingulate": "dice_CL",
}
# Beside the methods: what evaluate calls it, and for people.
_AFFINE_TITLE = "affine"
_BASELINES = {"syn": "SyN", "greedy": "greedy"}
Case = dict[str, str]


def newest(kind: str, folder: Path = RESULTS) -> Path | None:
    """The last ``KIND-*.json`` of the most methods; None where there is none."""
    files = {path: Evidence.read(path) for path in folder.glob(f"{kind}-*.json")}
    return max(files, key=lambda path: (len(files[path].ways), files[path].started), default=None)


def section(evidence: Path) -> str:
    """The table: means over pairs, and against each baseline the median difference with its p.

    Args:
        evidence: its ``.json``, the cases beside it as ``.csv``.
    """
    what = Evidence.read(evidence)
    with evidence.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    pairs = len({case["id"] for case in cases})
    changed = ", with files changed" if what.dirty else ""
    head = [
        f"Dice, {pairs} pairs, {what.started[:10]}, {what.commit}{changed}", *_AREAS,
        "all 134: mean ± sd (median)",
        *(f"less {title}, p" for title in _BASELINES.values()), "folded %", "s",
    ]  # fmt: skip
    titles = {AFFINE: _AFFINE_TITLE, **{name: _title(name, what) for name in what.ways}}
    lines = [
        _line(head),
        _line(["---"] * len(head)),
        *(_line(_row(name, title, cases, what)) for name, title in titles.items()),
    ]
    return "\n".join(lines)


def _title(name: str, what: Evidence) -> str:
    """With the day and commit of an earlier record, where the row is one's."""
    earlier = what.carried.get(name)
    return what.ways[name].title + (f"; {earlier}" if earlier else "")


def _row(name: str, title: str, cases: Sequence[Case], what: Evidence) -> list[str]:
    def of(column: str) -> list[float]:
        return [float(case[column]) for case in cases if case["method"] == name]

    dice = of("dice")
    return [
        title,
        *(f"{fmean(of(column)):.3f}" for column in _AREAS.values()),
        f"{fmean(dice):.3f} ± {pstdev(dice):.3f} ({median(dice):.3f})",
        *(_against(baseline, name, cases) for baseline in _BASELINES),
        f"{fmean(of('folded_brain_percent')):.3f}",
        f"{what.seconds[name]:.3g}" if name in what.seconds else "",
    ]


def _against(baseline: str, name: str, cases: Sequence[Case]) -> str:
    """Median difference from a baseline over the pairs, and how likely by chance."""
    # Here, because the machine that the kernels are measured on has no SciPy.
    from scipy.stats import wilcoxon

    dice = {(case["method"], case["id"]): float(case["dice"]) for case in cases}
    differences = [
        value - dice[baseline, id_] for (method, id_), value in dice.items() if method == name
    ]
    if not any(differences):
        return ""
    return f"{median(differences):+.3f}, {float(wilcoxon(differences).pvalue):.0e}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
