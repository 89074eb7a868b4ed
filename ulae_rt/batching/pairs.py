"""The list of pairs: a CSV or JSON file with one row for each."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ulae_rt.errors import PairsError, UsageError
from ulae_rt.strict_csv import csv_rows, decode_text, separator
from ulae_rt.strict_json import parse_json

REQUIRED = ("id", "moving", "fixed")
# A pair's files lie in a folder of its name.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")


@dataclass(frozen=True)
class Pair:
    """One row of a list; paths are absolute.

    Attributes:
        id: names the pair and its folder.
        moving, fixed: scans.
        moving_labels, fixed_labels: label maps in the space of the scan.
        moving_landmarks, fixed_landmarks: points in the space of the scan, for `evaluate`.
    """

    id: str
    moving: Path
    fixed: Path
    moving_labels: Path | None = None
    fixed_labels: Path | None = None
    moving_landmarks: Path | None = None
    fixed_landmarks: Path | None = None

    def paths(self) -> dict[str, Path]:
        """Its files by column; those it lacks are left out."""
        values = {name: getattr(self, name) for name in PATHS}
        return {name: path for name, path in values.items() if path is not None}

    @classmethod
    def from_paths(cls, id_: str, paths: dict[str, str]) -> Self:
        """The inverse of `paths`, from a row of results."""
        return cls(id_, **{name: Path(path) for name, path in paths.items()})


COLUMNS = tuple(field.name for field in fields(Pair))
PATHS = COLUMNS[1:]


def read_pairs(path: Path) -> list[Pair]:
    """Read a list of pairs.

    A CSV file has a header line with the columns ``id,moving,fixed`` and, as wanted, those of the
    other attributes of `Pair`. A JSON file is an array of objects with these keys, or an object
    that has the array under ``pairs``. Paths are relative to the list; columns that are none of
    these are left to other readers.

    Args:
        path: ``.csv`` or ``.json``.

    Raises:
        PairsError: missing, not of such a form, empty, or a row that cannot be used: named by its
            number in the file.
    """
    if path.suffix.lower() not in (".csv", ".json"):
        raise PairsError(f"{path} is no list of pairs, expected .csv or .json", _FORM)
    try:
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        if path.is_symlink():
            raise PairsError(
                f"{path} is a link to {path.readlink()}, which does not exist",
                "get the file that it leads to, or set the link right",
            ) from None
        raise PairsError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise PairsError(f"{path} cannot be read: {error.strerror}", "check the file") from None
    except ValueError as error:
        raise PairsError(
            f"{path} cannot be read: {error}", "save it as UTF-8; Excel calls it 'CSV UTF-8'"
        ) from None
    rows = list(_rows_of_csv(path, text) if path.suffix.lower() == ".csv" else _of_json(path, text))
    if not rows:
        raise PairsError(f"{path} has no pairs", _FORM)
    folder = path.resolve().parent
    pairs = [_pair(f"{path}, {where}", row, folder) for where, row in rows]
    # Without regard to case: some file systems have none.
    counts = Counter(pair.id.casefold() for pair in pairs)
    twice = [pair.id for pair in pairs if counts[pair.id.casefold()] > 1]
    if twice:
        where = [where for where, row in rows if str(row["id"]).strip() == twice[0]]
        raise PairsError(
            f"{path}: {len(twice)} rows share an id with another, the first is {twice[0]!r} "
            f"({', '.join(where[:3])})",
            "give every pair an id of its own; capital letters do not tell two apart",
        )
    return pairs


_FORM = "give a CSV file with the columns id,moving,fixed, or a JSON array of such objects"


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv_rows(text)
    try:
        number, header = next(rows, (0, []))
        if sign := separator(",".join(header)) if len(header) == 1 else None:
            raise PairsError(
                f"{path}, line {number}: its columns are separated by {sign}, expected commas",
                "save it as CSV with commas; Excel writes the list separator of the system",
            )
        _check_columns(str(path), header)
        for number, cells in rows:
            where = f"line {number}"
            if len(cells) != len(header):
                raise PairsError(
                    f"{path}, {where}: has {len(cells)} columns, expected {len(header)} as in the "
                    "first line",
                    "quote paths with a comma in them",
                )
            yield where, dict(zip(header, cells, strict=True))
    except ValueError as error:
        if isinstance(error, PairsError):
            raise
        raise PairsError(f"{path}, {error}", _FORM) from None


def _of_json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise PairsError(f"{path} is no JSON: {error}", _FORM) from None
    rows = content.get("pairs") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise PairsError(f"{path} holds no array of pairs", _FORM)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise PairsError(
                f"{path}, pair {number}: is {json.dumps(row)[:40]}, expected an object", _FORM
            )
        _check_columns(f"{path}, pair {number}", list(row))
        yield f"pair {number}", row


def _check_columns(where: str, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name in COLUMNS]
    if repeated:
        raise PairsError(f"{where}: has the column {repeated[0]} twice", "remove one")
    if missing := [name for name in REQUIRED if name not in names]:
        raise PairsError(
            f"{where}: has no {' and no '.join(missing)}, found {', '.join(names) or 'nothing'}",
            _FORM,
        )
    for name in set(names) - set(COLUMNS):
        # A slip of the pen would leave labels behind in silence.
        if meant := difflib.get_close_matches(name.lower(), COLUMNS, 1, 0.8):
            raise PairsError(
                f"{where}: the column {name!r} is unknown", f"write it {meant[0]}, or rename it"
            )


def _pair(where: str, row: dict[str, Any], folder: Path) -> Pair:
    values: dict[str, str] = {}
    for name in COLUMNS:
        value = row.get(name)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise PairsError(f"{where}: {name} is {value!r}, expected text", _FORM)
        if any(ord(sign) < 32 for sign in (value or "").strip()):
            raise PairsError(
                f"{where}: {name} has a control character in it: {value!r}",
                "check the file; a name of a file has no line breaks",
            )
        if value and value.strip():
            values[name] = value.strip()
        elif name in REQUIRED:
            raise PairsError(f"{where}: has no {name}", _FORM)
    if not _ID.fullmatch(values["id"]):
        raise PairsError(
            f"{where}: the id {values['id'][:210]!r} cannot name a folder",
            "use up to 200 letters, digits and _ . - + = @, the first a letter, digit or _",
        )
    return Pair(values.pop("id"), **{name: folder / value for name, value in values.items()})


def outside(pairs: Iterable[Pair], folder: Path) -> list[Path]:
    """Files that lie outside the list's folder, by ``..``, by a link, or by an absolute path."""
    inside = folder.resolve()
    found: dict[Path, None] = {}
    for pair in pairs:
        for path in pair.paths().values():
            if path not in found and not path.resolve().is_relative_to(inside):
                found[path] = None
    return list(found)


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count`` of a list."""

    index: int
    count: int

    def of(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Its pairs: every ``count``-th, so that all parts take equally long."""
        return list(pairs[self.index - 1 :: self.count])

    @classmethod
    def parse(cls, text: str) -> Self:
        """``"2/8"``.

        Raises:
            UsageError: if it is something else.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(
                f"--shard is {text!r}, expected I/N with I from 1 to N",
                "an array job of 8 gives 1/8 to 8/8; SLURM_ARRAY_TASK_ID may begin at 0: add 1",
            )
        return cls(int(found[1]), int(found[2]))
