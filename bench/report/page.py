"""A record as one page of HTML that needs nothing else, least of all a network."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from harness.record import CaseRecord, Record
from report import tables, text, words
from report.charts import (
    Bar,
    Plot,
    Point,
    Rung,
    bars,
    is_log,
    ladder,
    latency,
    roofline,
    scaling,
    shares,
    stages,
)
from report.compare import (
    MARGIN,
    Change,
    Verdict,
    compared,
    counts,
    difference,
    differences,
    in_order,
    quantity,
    spread,
)
from report.figures import (
    ENOUGH,
    KERNELS,
    exponent,
    figures,
    headline_cases,
    is_timed,
    series,
    suites,
)
from report.headlines import headlines, title_of
from report.tables import MEANINGS, Kind, Table, kind, table, title

# A suite of more cases is drawn as one chart of them all, not as one chart each.
EACH = 12
_FOLDER = Path(__file__).resolve().parent
_MARKS: tuple[tuple[str, str], ...] = (
    ("own", "ulae_rt"), ("base", "baseline"), ("other", "others"), ("floor", "hardware’s floor"),
)  # fmt: skip


@dataclass(frozen=True)
class _Figure:
    """A chart with its title, (style, name) of what is in it, and what else to say."""

    title: str
    svg: Markup
    key: Sequence[tuple[str, str]] = ()
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class _Section:
    """A suite."""

    name: str
    title: str
    introduction: str
    charts: Sequence[_Figure]
    table: Table


@dataclass(frozen=True)
class _Comparison:
    """With an earlier record: what else differs, what changed, and what stayed the same."""

    earlier: Record
    differences: Sequence[str]
    changed: Sequence[Change]
    same: Sequence[Change]
    counts: Mapping[Verdict, int]


def page(record: Record, earlier: Record | None) -> str:
    """The report of a record: the short answer, the suites, the method; compared with another.

    Args:
        record: of the run.
        earlier: of a run on the same machine, if there is one.

    Raises:
        ValueError: ``earlier`` is of another machine, or either is small.
    """
    present, absent = text.versions(record)
    return _template().render(
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        record=record,
        moment=text.moment(record),
        summary=text.summary(record),
        small=text.SMALL,
        ceilings=text.ceilings(record),
        headlines=headlines(record),
        against=text.against,
        extremes=text.extremes,
        spread=spread,
        difference=difference,
        quantity=quantity,
        sections=[_section(record, suite) for suite in suites(record)],
        meanings=MEANINGS,
        comparison=_comparison(earlier, record) if earlier else None,
        margin=MARGIN,
        problems=text.problems(record),
        method=text.method(record),
        machine=text.machine(record),
        present=present,
        absent=absent,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        seconds=words.seconds, times=words.times, digits=words.digits, duration=words.duration
    )
    return environment.from_string((_FOLDER / "page.html").read_text(encoding="utf-8"))


def _section(record: Record, suite: str) -> _Section:
    cases = [case for case in record.cases if case.suite == suite]
    charts = [
        *_cases(record, cases),
        *_scalings(record, suite),
        *_hardware(record, cases),
        *_latencies(record, suite),
        *_stages(cases),
    ]
    introduction = text.INTRODUCTIONS.get(suite, "")
    return _Section(suite, title_of(suite), introduction, charts, table(record, suite))


def _cases(record: Record, cases: Sequence[CaseRecord]) -> list[_Figure]:
    """Contenders side by side: a chart a case, or one of all where there are many."""
    fitted = {
        name
        for suite in {case.suite for case in cases}
        for name, contenders in series(record, suite).items()
        if any(exponent(points) for points in contenders.values())
    }
    shown = [case for case in cases if case.series not in fitted]
    if len(shown) <= EACH:
        return [_bars(record, case) for case in shown]
    rungs = [_rung(record, case) for case in shown]
    if not any(rung.dots for rung in rungs):
        return [_bars(record, case) for case in shown]
    heading = "Times the hardware’s floor, logarithmic"
    key = [mark for mark in _MARKS if mark[0] in {k for r in rungs for k, _, _ in r.dots}]
    key.append(("floor", "1: as fast as this machine can move the bytes"))
    note = "Beside each: the package’s floors, and how many times as fast as the baseline it is."
    return [_Figure(heading, ladder(rungs, title=heading), key, note, wide=True)]


def _bars(record: Record, case: CaseRecord) -> _Figure:
    contenders = []
    for name in tables.in_order(case):
        outcome = case.contenders[name]
        found = figures(record, case, name)
        beside: str = outcome.status if outcome.status != "timed" else "not timed"
        if found is not None:
            beside = words.seconds(found.median)
            if found.times is not None:
                beside += f", {words.times(found.times)}"
        contenders.append(
            Bar(
                name,
                kind(case, name),
                outcome.seconds if found else (),
                beside,
                found.floor if found else None,
            )
        )
    heading = title(case)
    marks: set[str] = {each.kind for each in contenders if each.seconds}
    marks |= {"floor"} if any(each.floor for each in contenders) else set()
    key = [mark for mark in _MARKS if mark[0] in marks]
    note = "Logarithmic axis." if is_log(contenders) else ""
    return _Figure(heading, bars(contenders, title=heading), key, note)


def _rung(record: Record, case: CaseRecord) -> Rung:
    dots, beside = [], []
    for name in case.contenders:
        found = figures(record, case, name)
        if found is None or found.floors is None:
            continue
        whose = kind(case, name)
        point = f"{name}: {words.seconds(found.median)}, {words.digits(found.floors)} floors"
        dots.append((whose, found.floors, point))
        if whose == "own":
            beside.append((found.floors, found.times))
    label = words.case(case.name, case.precision)
    if beside:
        floors, times = min(beside, key=lambda each: each[0])
        beside_it = words.digits(floors) + (f", {words.times(times)}" if times else "")
        return Rung(label, dots, beside_it)
    own = [case.contenders[name].status for name in case.own if name in case.contenders]
    problems = [status for status in own if status != "timed"]
    return Rung(label, dots, problems[0] if problems else words.NONE, bad=bool(problems))


def _hardware(record: Record, cases: Sequence[CaseRecord]) -> list[_Figure]:
    """Where the contenders lie under what the machine allows."""
    flops: list[Point] = []
    moved: list[Point] = []
    for case in cases:
        for name in case.contenders:
            found = figures(record, case, name)
            if found is None or not case.bytes or found.copy_share is None:
                continue
            label = f"{case.name}: {name}"
            if case.flops:
                rate = case.flops / found.median
                label += f", {words.arithmetic(rate)}"
                flops.append(Point(case.flops / case.bytes, rate, kind(case, name), label))
            else:
                label += f", {words.percent(found.copy_share)} of the copy bandwidth"
                moved.append(Point(case.bytes, found.copy_share, kind(case, name), label))
    found_figures = []
    rates = list(record.matmul_flops_per_second.items())
    if flops and rates:
        heading = "Arithmetic reached, under what the hardware allows"
        plot = roofline(flops, copy=record.copy_bytes_per_second, rates=rates, title=heading)
        found_figures.append(_plot(heading, plot))
    if len(moved) > 3:
        heading = "Bandwidth reached" + ", cold caches" * bool(record.machine.get("gpu"))
        found_figures.append(_plot(heading, shares(moved, title=heading)))
    return found_figures


def _plot(heading: str, plot: Plot, note: str = "") -> _Figure:
    return _Figure(heading, plot.svg, plot.key, note)


def _latencies(record: Record, suite: str) -> list[_Figure]:
    """How the rounds of the headline case are distributed, where there are enough of them."""
    found = []
    for case in headline_cases(record, suite)[:1]:
        contenders = [
            (name, kind(case, name), outcome.seconds)
            for name, outcome in case.contenders.items()
            if is_timed(outcome) and len(outcome.seconds) >= ENOUGH[95]
        ]
        if contenders and suite != KERNELS and not case.series:
            heading = f"Rounds, fastest to slowest: {title(case)}"
            found.append(_plot(heading, latency(contenders, title=heading)))
    return found


def _scalings(record: Record, suite: str) -> list[_Figure]:
    """Time by size; the series of one suite that grow by the same thing share a chart."""
    shared: dict[str, list[tuple[str, Kind, list[tuple[float, float]]]]] = {}
    for name, contenders in series(record, suite).items():
        work, _, x_name = name.rpartition(" by ")
        case = next(c for c in record.cases if c.suite == suite and c.series == name)
        for each, points in contenders.items():
            alone = work and len(contenders) == 1
            said = work if alone else f"{work}, {each}".removeprefix(", ")
            shared.setdefault(x_name, []).append((said, kind(case, each), points))
    return [
        _plot(f"Time by {x_name}", scaling(lines, title=f"Time by {x_name}", x_name=x_name))
        for x_name, lines in shared.items()
    ]


def _stages(cases: Sequence[CaseRecord]) -> list[_Figure]:
    """Where the time of a run goes, of every contender that says so."""
    found = []
    for case in cases:
        contenders = [
            (name, [(stage, statistics.median(v)) for stage, v in outcome.stages.items() if v])
            for name, outcome in case.contenders.items()
            if any(outcome.stages.values())
        ]
        if contenders:
            heading = f"Stages: {title(case)}"
            plot = stages(contenders, title=heading)
            note = "Medians; between its stages a run takes a little more."
            found.append(_plot(heading, plot, note))
    return found


def _comparison(earlier: Record, record: Record) -> _Comparison:
    changes = in_order(compared(earlier, record))
    return _Comparison(
        earlier,
        differences(earlier, record),
        changed=[change for change in changes if change.verdict != "same"],
        same=[change for change in changes if change.verdict == "same"],
        counts=counts(changes),
    )
