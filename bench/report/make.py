"""Reports beside their records.

    python bench/report/make.py RECORD.json...

Writes RECORD.md and RECORD.html beside each, compared with the last earlier full record of the same
machine in the same folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.files import write_whole
from harness.record import Record, all_records
from report.markdown import markdown
from report.page import page


def write_report(record_path: Path) -> tuple[Path, Path]:
    """Write the report of a record: Markdown and the page, beside it.

    Raises:
        ValueError: it is no record.
    """
    record = Record.read(record_path)
    made = {
        record_path.with_suffix(".md"): markdown(record),
        record_path.with_suffix(".html"): page(record, earlier(record, record_path.parent)),
    }
    for path, content in made.items():
        write_whole(path, content)
    first, second = made
    return first, second


def earlier(record: Record, folder: Path) -> Record | None:
    """The last full record of the same machine in a folder that is older; None without one."""
    found = [
        other
        for other in all_records(folder)
        if other.machine["name"] == record.machine["name"]
        and other.started < record.started
        and not other.small
    ]
    return found[-1] if found and not record.small else None


def main(arguments: Sequence[str]) -> int:
    """Write the reports of some files."""
    if not arguments:
        print("usage: python bench/report/make.py RECORD.json...", file=sys.stderr)
        return 2
    for name in arguments:
        try:
            for path in write_report(Path(name)):
                print(path)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
