"""The short answer, suite by suite: is it fast, and against what."""

from dataclasses import dataclass

from harness.record import CaseRecord, Record
from report import words
from report.figures import (
    KERNELS,
    SCALING,
    Figures,
    Mean,
    figures,
    headline_cases,
    mean,
    own_by_precision,
    suites,
)
from report.tables import problem

# What each suite is to someone who does not know the names; any other is called by its name.
TITLES = {
    "kernels": "Kernels",
    "network": "Network",
    "engines": "Engines",
    "training": "Training step",
    "files": "Files to files",
    "scaling": "Scaling",
}


@dataclass(frozen=True)
class Line:
    """A contender of the package in a headline."""

    name: str
    figures: Figures
    peak_gb: float | None


@dataclass(frozen=True)
class Headline:
    """What a suite comes to.

    Attributes:
        suite: its name.
        title: for people.
        what: was run.
        lines: the package's contenders, the fastest of each precision, the fastest first.
        baseline: name and figures of what they are compared with.
        mean: of a suite that its mean stands for; then there are no lines.
        problem: why there is nothing to say.
    """

    suite: str
    title: str
    what: str
    lines: tuple[Line, ...] = ()
    baseline: tuple[str, Figures] | None = None
    mean: Mean | None = None
    problem: str = ""


def title_of(suite: str) -> str:
    """For people."""
    return TITLES.get(suite, suite[:1].upper() + suite[1:])


def headlines(record: Record) -> list[Headline]:
    """Of all suites but the scaling; the kernels, which are parts of the others, come last."""
    order = sorted(set(suites(record)) - {SCALING}, key=_place)
    found = []
    for suite in order:
        if suite == KERNELS:
            found.append(_of_mean(record, suite))
        else:
            found += [_of_case(record, case) for case in headline_cases(record, suite)]
    return found


def _place(suite: str) -> tuple[int, str]:
    order = list(TITLES)
    return (order.index(suite) if suite in order else len(order)) + 99 * (suite == KERNELS), suite


def _of_mean(record: Record, suite: str) -> Headline:
    found = mean(record, suite)
    if found is None:
        return Headline(suite, title_of(suite), "", problem="no case could be compared")
    what = f"geometric mean of {words.count(found.compared, 'case')}"
    if found.compared < found.cases:
        what += f", of {found.cases}"
    return Headline(suite, title_of(suite), what, mean=found)


def _of_case(record: Record, case: CaseRecord) -> Headline:
    lines = tuple(
        Line(name, found, _peak(case, name))
        for name, found in own_by_precision(record, case).items()
    )
    baseline = figures(record, case, case.baseline) if case.baseline in case.contenders else None
    what = f"{case.name}, {words.volume(case.sizes, case.batch)}"
    why = ""
    if not lines:
        failed = [case.contenders[name] for name in case.own if name in case.contenders]
        why = problem(failed[0]) if failed else "none of its contenders is the package's"
    return Headline(
        case.suite,
        title_of(case.suite),
        what,
        lines,
        (case.baseline, baseline) if baseline else None,
        problem=why,
    )


def _peak(case: CaseRecord, name: str) -> float | None:
    """Of the GPU where one was used, else of the process."""
    outcome = case.contenders[name]
    return outcome.gpu_peak_gb or outcome.peak_gb
