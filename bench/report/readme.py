"""The README's table of figures, from the newest full record of each machine.

    python bench/report/readme.py

rewrites what stands in the README between its two marks.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.record import ROOT, Record, all_records, newest
from report import text, words
from report.headlines import Headline, headlines
from report.markdown import plain

START, END = "<!-- benchmark -->", "<!-- /benchmark -->"
MOST_ROWS = 7


def section(records: Iterable[Record]) -> str:
    """A heading line and one table of at most seven rows for each machine.

    Of each machine its newest full record; a clean one before one with files changed.
    """
    full = sorted((each for each in records if not each.small), key=lambda each: each.started)
    chosen = {**newest(full), **newest(each for each in full if not each.dirty)}
    return "\n\n".join(_machine(record) for record in chosen.values())


def _machine(record: Record) -> str:
    changed = ", with files changed" if record.dirty else ""
    head = f"**{plain(record.machine['title'])}**, {record.date}, {record.commit}{changed}:"
    lines = ["| | median | pairs/s | times as fast as | peak memory |", "|---|---|---|---|---|"]
    found = headlines(record)
    rows = [_rows(headline) for headline in found]
    # The fastest of every headline, and of the first ones more while there is room.
    places = [(place, number) for number, each in enumerate(rows) for place in range(len(each))]
    shown = sorted((number, place) for place, number in sorted(places)[:MOST_ROWS])
    lines += [f"| {' | '.join(map(plain, rows[number][place]))} |" for number, place in shown]
    return f"{head}\n\n" + "\n".join(lines)


def _rows(headline: Headline) -> list[tuple[str, ...]]:
    found = headline.mean
    if found is not None:
        what = f"{headline.title}, {headline.what}"
        times = f"{words.times(found.times)} {text.against(headline).removeprefix('as fast as ')}"
        return [(what, words.NONE, words.NONE, times, _memory(found.peak_gb))]
    rows: list[tuple[str, ...]] = []
    for line in headline.lines:
        times = words.NONE
        if line.figures.times is not None and headline.baseline:
            name, base = headline.baseline
            times = f"{words.times(line.figures.times)} {name} ({words.seconds(base.median)})"
        rows.append(
            (
                f"{headline.title}, {headline.what}: {line.name}",
                words.seconds(line.figures.median),
                words.digits(line.figures.pairs_per_second),
                times,
                _memory(line.peak_gb),
            )
        )
    return rows


def _memory(value: float | None) -> str:
    return words.NONE if value is None else words.size(value * 1e9)


def write(readme: Path, records: Iterable[Record]) -> None:
    """Put the figures of some records between the marks of a README.

    Raises:
        ValueError: the marks do not stand in it, once each, in their order.
    """
    before, _, after = _parts(readme)
    hidden = readme.with_name(f".{readme.name}.part")
    hidden.write_text(f"{before}{START}\n{section(records)}\n{END}{after}", encoding="utf-8")
    os.replace(hidden, readme)


def is_current(readme: Path, records: Iterable[Record]) -> bool:
    """Whether a README has the figures of some records.

    Raises:
        ValueError: the marks do not stand in it, once each, in their order.
    """
    return _parts(readme)[1] == f"\n{section(records)}\n"


def _parts(readme: Path) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    content = readme.read_text(encoding="utf-8")
    for mark in (START, END):
        number = content.count(mark)
        if number != 1:
            raise ValueError(
                f"{readme.name}: {mark} stands in it {number} times, expected once; put it on a "
                "line of its own where the figures of the benchmark belong"
            )
    before, rest = content.split(START)
    if END not in rest:
        raise ValueError(
            f"{readme.name}: expected {START} before {END}, got the reverse; swap them"
        )
    between, after = rest.split(END)
    return before, between, after


def main(arguments: Sequence[str]) -> int:
    """Rewrite the README of this checkout."""
    if arguments:
        print("usage: python bench/report/readme.py", file=sys.stderr)
        return 2
    try:
        write(ROOT / "README.md", all_records())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
