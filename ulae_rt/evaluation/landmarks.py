"""Landmarks: named points in the world of a scan, and how far a warp misses them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulae_rt.errors import EvaluationError
from ulae_rt.imaging.grid import LPS_SIGNS, Displacement, Grid
from ulae_rt.imaging.transform import Field, in_mm
from ulae_rt.strict_csv import csv_rows, decode_text, separator
from ulae_rt.strict_json import parse_json

Points = dict[str, NDArray[np.float64]]

_COLUMNS = ("id", "x", "y", "z")
# As Slicer writes it into .fcsv, by name and by number.
_SYSTEMS = {"RAS": 1, "0": 1, "LPS": LPS_SIGNS, "1": LPS_SIGNS}
_HINT = (
    "give a .csv with the columns id,x,y,z in RAS mm, or Slicer's .mrk.json or .fcsv; points are "
    "matched by id"
)


def read_landmarks(path: Path) -> Points:
    """Read named points, RAS mm.

    - ``.csv``: a header line with the columns ``id,x,y,z``, coordinates in RAS mm; other columns
      are left alone.
    - ``.mrk.json``, ``.fcsv``: 3D Slicer's, in the coordinate system that they say; the id is
      the point's label.

    Raises:
        EvaluationError: missing, not of such a form, no points, or an id twice.
    """
    readers = {".csv": _of_csv, ".fcsv": _of_fcsv, ".mrk.json": _of_markups}
    reader = next((r for end, r in readers.items() if path.name.lower().endswith(end)), None)
    if reader is None:
        raise EvaluationError(f"{path} is no file of landmarks", _HINT)
    try:
        rows = reader(decode_text(path.read_bytes()))
        points = [(name.strip(), np.array(at, np.float64)) for name, at in rows]
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}", "check it") from None
    except KeyError as error:
        raise EvaluationError(f"{path} is no file of landmarks: no {error}", _HINT) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise EvaluationError(f"{path} is no file of landmarks: {error}", _HINT) from None
    if not points:
        raise EvaluationError(f"{path} has no landmarks", _HINT)
    twice = [name for name, count in Counter(name for name, _ in points).items() if count > 1]
    if twice:
        raise EvaluationError(f"{path} has the landmark {twice[0]!r} twice", _HINT)
    for name, at in points:
        if not name or at.shape != (3,) or not np.isfinite(at).all():
            raise EvaluationError(f"{path}: the landmark {name!r} lies at {at.tolist()}", _HINT)
    return dict(points)


_Rows = list[tuple[str, list[float]]]


def _of_csv(text: str) -> _Rows:
    rows = csv_rows(text)
    _, names = next(rows, (0, []))
    if len(names) == 1 and (sign := separator(names[0])):
        raise ValueError(f"its columns are separated by {sign}, expected commas")
    if missing := [name for name in _COLUMNS if name not in names]:
        raise ValueError(f"it has no column {missing[0]}")
    return list(_points(names, rows, "id"))


def _points(
    names: Sequence[str], rows: Iterator[tuple[int, list[str]]], label: str
) -> Iterator[tuple[str, list[float]]]:
    """The points of the rows, whose number of cells must be the header's.

    A comma too many is often a decimal one, and what stands in the columns then is another point.
    """
    if repeated := [name for name in (*_COLUMNS, label) if names.count(name) > 1]:
        raise ValueError(f"it has the column {repeated[0]} twice")
    for number, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"line {number}: has {len(cells)} columns, expected {len(names)}")
        row = dict(zip(names, cells, strict=True))
        try:
            at = [float(row[axis]) for axis in "xyz"]
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        yield row[label] or row["id"], at


def _system(name: Any) -> Any:
    if not isinstance(name, str) or name not in _SYSTEMS:
        raise ValueError(f"its coordinate system is {name!r}, expected RAS or LPS")
    return _SYSTEMS[name]


def _of_fcsv(text: str) -> _Rows:
    lines = text.splitlines()
    comments = [line[1:].partition("=") for line in lines if line.startswith("#")]
    head = {key.strip(): value.strip() for key, _, value in comments}
    if missing := [key for key in ("CoordinateSystem", "columns") if key not in head]:
        raise ValueError(f"it has no line '# {missing[0]} = ...'")
    signs = _system(head["CoordinateSystem"])
    columns = head["columns"].split(",")
    # The lines keep their numbers.
    table = "\n".join("" if line.startswith("#") else line for line in lines)
    label = "label" if "label" in columns else "id"
    return [
        (name, list(signs * np.array(at))) for name, at in _points(columns, csv_rows(table), label)
    ]


def _of_markups(text: str) -> _Rows:
    rows: _Rows = []
    for markup in parse_json(text)["markups"]:
        signs = _system(markup.get("coordinateSystem", "LPS"))
        unit = markup.get("coordinateUnits", "mm")
        if unit != "mm" and not (isinstance(unit, list) and unit and unit[0] == "mm"):
            raise ValueError(f"its unit is {unit!r}, expected mm")
        for point in markup["controlPoints"]:
            name, status = point.get("label") or point["id"], point.get("positionStatus", "defined")
            if status != "defined":
                raise ValueError(f"the landmark {name!r} is not placed yet ({status})")
            at = point["position"]
            if not isinstance(at, list) or any(
                isinstance(x, bool) or not isinstance(x, int | float) for x in at
            ):
                raise ValueError(f"the landmark {name!r} lies at {at!r}, expected three numbers")
            if len(at) != 3:
                raise ValueError(f"the landmark {name!r} has {len(at)} coordinates, expected 3")
            rows.append((name, list(signs * np.array(at))))
    return rows


def target_registration_error(
    disp: Displacement, fixed: Grid, at: Mapping[str, NDArray[np.float64]], to: Points
) -> dict[str, float]:
    """How far each fixed landmark lands from its moving one: |x + disp(x) - y|.

    Args:
        disp: (X, Y, Z, 3), RAS mm, on ``fixed``; linear between its voxels.
        fixed: its grid.
        at: fixed landmarks x, RAS mm.
        to: moving landmarks y, RAS mm, by the same names.

    Returns:
        Name to mm.

    Raises:
        EvaluationError: a landmark that only one of the two has, or that lies outside the grid.
    """
    if alone := sorted(at.keys() ^ to.keys()):
        raise EvaluationError(
            f"the landmark {alone[0]!r} is only in the {'fixed' if alone[0] in at else 'moving'} "
            "file",
            "give both scans the same landmarks, by the same ids",
        )
    to_index = np.linalg.inv(fixed.affine)
    field = Field(in_mm(disp))
    errors = {}
    for name, point in at.items():
        index = to_index[:3, :3] @ point + to_index[:3, 3]
        if not ((index >= -0.5) & (index <= np.array(fixed.shape) - 0.5)).all():
            raise EvaluationError(
                f"the landmark {name!r} lies outside the fixed image, at voxel "
                f"{np.round(index, 1).tolist()}",
                "check that its coordinates are RAS mm in the world of the fixed scan",
            )
        moved = point + field(index[None, ::-1].copy())[0]
        errors[name] = float(np.linalg.norm(moved - to[name]))
    return errors
