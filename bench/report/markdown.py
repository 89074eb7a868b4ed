"""A record as Markdown: all of it, for a terminal, a mail or a pull request."""

import statistics
from collections.abc import Iterable, Sequence

from harness.record import Record
from report import text, words
from report.charts import power
from report.figures import exponent, series, suites
from report.headlines import Headline, headlines, title_of
from report.tables import Table, table


def markdown(record: Record) -> str:
    """The whole report: the short answer, a table a suite, what is missing, method, machine."""
    parts = [
        f"# How fast: {plain(record.machine['title'])}",
        f"{text.moment(record)}, commit {_commit(record)}, {text.summary(record)}, "
        f"took {words.duration(record.seconds)}.",
        *([f"**{text.SMALL}**"] if record.small else []),
        _headlines(headlines(record)),
    ]
    for suite in suites(record):
        parts += [f"## {plain(title_of(suite))}"]
        if suite in text.INTRODUCTIONS:
            parts.append(text.INTRODUCTIONS[suite])
        parts += [_table(table(record, suite)), *_lists(record, suite)]
    missing = text.problems(record)
    if missing:
        parts += ["## Wrong, failed, left out", _rows(("what", "why"), missing)]
    parts += ["## Method", "\n".join(f"- {point}" for point in text.method(record))]
    present, absent = text.versions(record)
    parts += [
        "## Machine",
        _rows(("", ""), [*text.machine(record), *text.ceilings(record)]),
        "## Versions",
        _rows(("", ""), [*present, *((name, "not installed") for name in absent)]),
        "Repeat it with `{}`.".format(" ".join(record.command.replace("`", "'").split())),
    ]
    return "\n\n".join(parts) + "\n"


def _commit(record: Record) -> str:
    return f"{record.commit}, **with files changed**" if record.dirty else record.commit


def plain(value: str) -> str:
    """A value as one line in which nothing is markup or ends a cell of a table."""
    line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    for sign in ("|", "*", "[", "]", "`"):
        line = line.replace(sign, f"\\{sign}")
    return line


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headlines(found: Sequence[Headline]) -> str:
    rows = []
    for each in found:
        if each.mean is not None:
            said = f"{text.against(each)}; {text.extremes(each)}"
            rows.append((each.title, each.what, words.NONE, words.times(each.mean.times), said))
        elif each.problem:
            rows.append((each.title, each.what, words.NONE, words.NONE, each.problem))
        for line in each.lines:
            times = words.NONE if line.figures.times is None else words.times(line.figures.times)
            what = f"{each.what}: {line.name}"
            median = words.seconds(line.figures.median)
            rows.append((each.title, what, median, times, text.against(each)))
    return _rows(("", "what", "median", "times", ""), rows)


def _table(found: Table) -> str:
    rows: list[tuple[str, ...]] = []
    for group in found.groups:
        said = f"{group.title} ({'; '.join(group.notes)})" if group.notes else group.title
        for number, row in enumerate(group.rows):
            cells = row.cells or (row.problem, *[""] * (len(found.columns) - 1))
            rows.append((said if not number else "", row.name, *cells))
    return _rows(("case", "contender", *(found.columns or ("",))), rows)


def _lists(record: Record, suite: str) -> list[str]:
    """What grows how, and where the time of a run goes."""
    lines = [
        f"- {plain(name)}, {plain(contender)}: {power(exponent(points))}"
        for name, contenders in series(record, suite).items()
        for contender, points in contenders.items()
    ]
    for case in record.cases:
        for contender, outcome in case.contenders.items() if case.suite == suite else ():
            parts = [
                f"{plain(stage)} {words.seconds(statistics.median(values))}"
                for stage, values in outcome.stages.items()
                if values
            ]
            if parts:
                lines.append(f"- {plain(case.name)}, {plain(contender)}: {', '.join(parts)}")
    return ["\n".join(lines)] if lines else []
