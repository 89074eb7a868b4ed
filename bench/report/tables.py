"""The tables of a report, one a suite, as text that both Markdown and the page show."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.case import Outcome
from harness.record import CaseRecord, Record
from report import words
from report.figures import KERNELS, Figures, figures, floor, is_timed, precision_of

Kind = Literal["own", "base", "other"]


@dataclass(frozen=True)
class Row:
    """A contender.

    Attributes:
        name: of it.
        kind: whether it is the package's, the baseline, or neither.
        cells: by column; none where it was not timed.
        problem: why it was not, after its status.
    """

    name: str
    kind: Kind
    cells: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """A case: what it is, what else is known of it, and its contenders."""

    title: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A suite: columns, those in which no contender has anything left out, and its cases."""

    columns: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class _Each:
    """All there is on one row."""

    case: CaseRecord
    name: str
    outcome: Outcome
    figures: Figures


def _optional(value: float | None, said: Callable[[float], str]) -> str:
    return words.NONE if value is None else said(value)


def _times(each: _Each) -> str:
    if each.name == each.case.baseline:
        return "baseline"
    return _optional(each.figures.times, words.times)


def _bytes(each: _Each, value: float | None, said: Callable[[float], str]) -> str:
    """Where there is much to compute, how fast the bytes went says nothing."""
    return words.NONE if each.case.flops else _optional(value, said)


def _memory(value: float | None) -> str:
    return _optional(value, lambda gb: words.size(gb * 1e9))


_COLUMNS: dict[str, Callable[[_Each], str]] = {
    "median": lambda each: words.seconds(each.figures.median),
    "× as fast": _times,
    "fastest to slowest": lambda each: words.span(each.figures.low, each.figures.high),
    "p95": lambda each: _optional(each.figures.p95, words.seconds),
    "p99": lambda each: _optional(each.figures.p99, words.seconds),
    "rounds": lambda each: str(each.figures.rounds),
    "hot": lambda each: _optional(each.figures.hot, words.seconds),
    "floors": lambda each: _optional(each.figures.floors, words.digits),
    "bytes/s": lambda each: _bytes(each, each.figures.bytes_per_second, words.bandwidth),
    "of copy": lambda each: _bytes(each, each.figures.copy_share, words.percent),
    "pairs/s": lambda each: words.digits(each.figures.pairs_per_second),
    "memory": lambda each: _memory(each.outcome.peak_gb),
    "GPU memory": lambda each: _memory(each.outcome.gpu_peak_gb),
    "first result": lambda each: _optional(each.outcome.first_seconds, words.seconds),
    "off by": lambda each: _optional(each.outcome.error, words.error),
    "timed by": lambda each: each.outcome.how or words.NONE,
}
# What a column means, for who points at its heading and for the method.
MEANINGS = {
    "median": "seconds of one run, median of the rounds",
    "× as fast": "times as fast as the baseline: median over the rounds of the ratio in one round",
    "fastest to slowest": "round",
    "p95": "95 % of the rounds were no slower; from 20 rounds",
    "p99": "99 % of the rounds were no slower; from 100 rounds",
    "hot": "median where the input was in the caches already",
    "floors": "the median by what the hardware needs at least: 1 is the limit",
    "bytes/s": "bytes that have to move, each once, by the median",
    "of copy": "the same as a share of a large copy's bandwidth in this run",
    "memory": "peak of the process",
    "GPU memory": "peak of the GPU",
    "first result": "until it was there, everything built first included",
    "off by": "error of the result, in what stands beside the case",
}


def kind(case: CaseRecord, name: str) -> Kind:
    """Whose a contender is."""
    if name == case.baseline:
        return "base"
    return "own" if name in case.own else "other"


def in_order(case: CaseRecord) -> list[str]:
    """Names of the contenders: the baseline, others, the package's; what was not timed last."""
    order: dict[Kind, int] = {"base": 0, "other": 1, "own": 2}
    return sorted(
        case.contenders,
        key=lambda name: (not is_timed(case.contenders[name]), order[kind(case, name)]),
    )


def title(case: CaseRecord) -> str:
    """What a case is, without its suite."""
    name = words.case(case.name, case.precision)
    return f"{name}, {words.volume(case.sizes, case.batch)}"


def problem(outcome: Outcome) -> str:
    """Why a contender was not timed, on one line."""
    status = outcome.status if outcome.status != "timed" else "not timed"
    return f"{status}: {' '.join((outcome.why or 'no reason was given').split())}"


def notes(record: Record, case: CaseRecord) -> tuple[str, ...]:
    """What was asked for, and what the floor is made of."""
    found = []
    if case.goal:
        found.append(f"asked for: {case.goal}")
    if case.bytes:
        found.append(f"{words.size(case.bytes)} must move")
    if case.flops:
        found.append(words.work(case.flops))
    precisions = [precision_of(case, name) for name, o in case.contenders.items() if is_timed(o)]
    floors: dict[float, list[str]] = {}
    for precision in dict.fromkeys(precisions):
        least = floor(record, case, precision)
        if least is not None:
            floors.setdefault(least, []).append(precision)
    said = [f"{words.seconds(least)} in {' and '.join(each)}" for least, each in floors.items()]
    if said:
        found.append(f"floor {', '.join(said)}")
    if case.error_unit:
        found.append(f"off by: {case.error_unit}")
    if not case.baseline:
        found.append("no baseline")
    return tuple(found)


def table(record: Record, suite: str) -> Table:
    """Of all cases of a suite and all their contenders, timed or not."""
    cases = [case for case in record.cases if case.suite == suite]
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for number, case in enumerate(cases):
        for name, outcome in case.contenders.items():
            found = figures(record, case, name)
            if found is not None:
                each = _Each(case, name, outcome, found)
                cells[number, name] = {column: said(each) for column, said in _COLUMNS.items()}
    # A kernel is a small part of what a pair takes.
    empty = {"pairs/s"} if suite == KERNELS else set()
    columns = tuple(
        column
        for column in _COLUMNS
        if column not in empty and any(row[column] != words.NONE for row in cells.values())
    )
    groups = []
    for number, case in enumerate(cases):
        rows = []
        for name in in_order(case):
            row = cells.get((number, name))
            rows.append(
                Row(name, kind(case, name), tuple(row[column] for column in columns))
                if row
                else Row(name, kind(case, name), problem=problem(case.contenders[name]))
            )
        groups.append(Group(title(case), notes(record, case), tuple(rows)))
    return Table(columns, tuple(groups))
