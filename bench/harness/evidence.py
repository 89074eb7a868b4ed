"""What a borrowed machine showed: one line of JSON a fact, on the disk as soon as it is known.

A command that is killed loses the fact it was after, and none of those before.
"""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "evidence.jsonl"
# The checkout, of which an error's words may name a file; the rows are committed.
HERE = str(Path(__file__).resolve().parents[2])


class Evidence:
    """The file of one run, open for one of its stages.

    Args:
        folder: it lies in; made where it is not there.
        stage: that its rows are of.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.stage = stage

    def add(self, what: str, **values: Any) -> None:
        """Append a row, to the disk itself.

        Args:
            what: names the row within its stage.
            values: numbers, texts, lists; what JSON has no word for is written as text.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"stage": self.stage, "what": what, "at": now, **values}
        with self.path.open("a", encoding="utf-8") as file:
            # A line that a killed process began must not spoil this one.
            begin = "" if _ends_with_newline(self.path) else "\n"
            text = json.dumps(row, default=str).replace(HERE, ".")
            file.write(f"{begin}{text}\n")
            file.flush()
            os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def rows(folder: Path) -> list[dict[str, Any]]:
    """All that is known, in its order; a line that was cut off is left out."""
    path = folder / FILE
    return list(read(path)) if path.is_file() else []


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, as `rows`."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "what"} <= row.keys():
            yield row
