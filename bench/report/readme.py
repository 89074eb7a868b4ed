"""The README's figures: of speed from the newest full record of each machine, and of accuracy.

    python bench/report/readme.py

rewrites what stands in the README between their marks.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.record import ROOT, Record, all_records, newest
from report import accuracy, blocks, quarter, text, words
from report.headlines import Headline, headlines
from report.markdown import plain

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


def is_current(readme: Path) -> bool:
    """Whether a README has the figures of the newest records."""
    return all(blocks.get(readme, name) == block for name, block in _blocks().items())


def write(readme: Path) -> None:
    """Put the figures of the newest records between the marks of a README.

    Raises:
        ValueError: the marks do not stand in it, once each, in their order.
    """
    for name, block in _blocks().items():
        blocks.put(readme, name, block)


def _blocks() -> dict[str, str]:
    found = {"benchmark": section(all_records()), "gpu": quarter.section(quarter.newest())}
    if (evidence := accuracy.newest("accuracy")) is not None:
        found["accuracy"] = accuracy.section(evidence)
    return found


def main(arguments: Sequence[str]) -> int:
    """Rewrite the README of this checkout."""
    if arguments:
        print("usage: python bench/report/readme.py", file=sys.stderr)
        return 2
    try:
        write(ROOT / "README.md")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
