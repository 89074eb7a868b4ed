"""Landmarks: named points in the world of a scan, and how far a warp misses them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ulae_rt.errors import EvaluationError
from ulae_rt.imaging.grid import Grid, to_sitk
from ulae_rt.imaging.transform import LPS_SIGNS, Displacement

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
        rows = reader(path.read_text("utf-8-sig"))
        points = [(name.strip(), np.array(at, np.float64)) for name, at in rows]
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}", "check it") from None
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
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
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = names
    if missing := [name for name in _COLUMNS if name not in names]:
        raise ValueError(f"it has no column {missing[0]}")
    return [(row["id"], [float(row[axis]) for axis in "xyz"]) for row in reader]


def _of_fcsv(text: str) -> _Rows:
    lines = text.splitlines()
    comments = [line[1:].partition("=") for line in lines if line.startswith("#")]
    head = {key.strip(): value.strip() for key, _, value in comments}
    signs = _SYSTEMS[head["CoordinateSystem"]]
    columns = head["columns"].split(",")
    rows = csv.DictReader([line for line in lines if not line.startswith("#")], columns)
    return [
        (row["label"] or row["id"], list(signs * np.array([float(row[axis]) for axis in "xyz"])))
        for row in rows
    ]


def _of_markups(text: str) -> _Rows:
    rows: _Rows = []
    for markup in json.loads(text)["markups"]:
        signs = _SYSTEMS[markup.get("coordinateSystem", "LPS")]
        rows += [
            (point.get("label") or point["id"], list(signs * np.array(point["position"])))
            for point in markup["controlPoints"]
        ]
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
    field = to_sitk(disp, fixed.affine)
    errors = {}
    for name, point in at.items():
        index = to_index[:3, :3] @ point + to_index[:3, 3]
        if not ((index >= -0.5) & (index <= np.array(fixed.shape) - 0.5)).all():
            raise EvaluationError(
                f"the landmark {name!r} lies outside the fixed image, at voxel "
                f"{np.round(index, 1).tolist()}",
                "check that its coordinates are RAS mm in the world of the fixed scan",
            )
        lps = (point * LPS_SIGNS).tolist()
        moved = point + np.array(field.EvaluateAtPhysicalPoint(lps, sitk.sitkLinear))
        errors[name] = float(np.linalg.norm(moved - to[name]))
    return errors
