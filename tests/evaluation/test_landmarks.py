"""Landmarks of three formats, and errors worked out by hand."""

import json

import numpy as np
import pytest

from _support.arrays import assert_arrays_close
from _support.brains import grid_affine, world
from _support.tolerances import TOL
from ulae_rt.errors import EvaluationError
from ulae_rt.evaluation.landmarks import read_landmarks, target_registration_error
from ulae_rt.imaging.grid import Grid

CSV = "id,x,y,z\nA,1.5,-2,3\nB,0,0,1e1\n"
FCSV = """# Markups fiducial file version = 4.11
# CoordinateSystem = {}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
1,{},{},3,0,0,0,1,1,1,0,A,,
2,0,0,10,0,0,0,1,1,1,0,B,,
"""


def markups(system, x, y):
    points = [
        {"id": "1", "label": "A", "position": [x, y, 3.0]},
        {"id": "2", "label": "B", "position": [0.0, 0.0, 10.0]},
    ]
    return json.dumps({"markups": [{"coordinateSystem": system, "controlPoints": points}]})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.csv", "\ufeffnote, id ,z,y,x\nof Excel,A,3,-2,1.5\n,B,10,0,0\n"),
        ("a.fcsv", FCSV.format("RAS", 1.5, -2)),
        ("a.fcsv", FCSV.format("0", 1.5, -2)),
        ("a.fcsv", FCSV.format("LPS", -1.5, 2)),
        ("a.fcsv", FCSV.format("1", -1.5, 2)),
        ("a.mrk.json", markups("RAS", 1.5, -2.0)),
        ("a.mrk.json", markups("LPS", -1.5, 2.0)),
    ],
)
def test_every_format_gives_ras_mm(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    points = read_landmarks(tmp_path / name)
    assert {name: at.tolist() for name, at in points.items()} == {
        "A": [1.5, -2, 3],
        "B": [0, 0, 10],
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", CSV, "is no file of landmarks"),
        ("a.csv", "", "has no column id"),
        ("a.csv", "id,x,y\nA,1,2\n", "has no column z"),
        ("a.csv", "id,x,y,z\n", "has no landmarks"),
        ("a.csv", "id,x,y,z\nA,1,2,three\n", "could not convert string to float"),
        ("a.csv", "id,x,y,z\nA,1,2\n", "line 2: has 3 columns, expected 4"),
        ("a.csv", "id,x,y,z\nA,1,5,2,3\n", "line 2: has 5 columns, expected 4"),  # 1,5 for 1.5
        ("a.csv", "id,x,y,z,x\nA,1,2,3,4\n", "has the column x twice"),
        ("a.csv", "id;x;y;z\nA;1;2;3\n", "separated by semicolons, expected commas"),
        ("a.csv", 'id,x,y,z\n"A,1,2,3\n', "line 2: is no CSV: unexpected end of data"),
        ("a.csv", "id,x,y,z\nA\0,1,2,3\n", "it has a zero byte in line 2"),
        ("a.csv", f"id,x,y,z\n{'A' * 140_000},1,2,3\n", "field larger than field limit"),
        ("a.fcsv", CSV, "it has no line '# CoordinateSystem = ...'"),
        ("a.fcsv", "# CoordinateSystem = 0\n1,2,3\n", "it has no line '# columns = ...'"),
        ("a.fcsv", FCSV.format("RAS", "1,5", 2), "line 4: has 15 columns, expected 14"),
        ("a.mrk.json", "[" * 100_000, "it is nested too deep"),
        ("a.mrk.json", '{"markups": [], "markups": []}', "the key 'markups' is there twice"),
        ("a.mrk.json", markups("RAS", 1.5, float("nan")), "NaN is no number"),
        ("a.mrk.json", markups("RAS", "1", 2), "the landmark 'A' lies at"),
        ("a.mrk.json", markups("RAS", True, 2), "the landmark 'A' lies at"),
        ("a.mrk.json", markups(0, 1, 2), "its coordinate system is 0, expected RAS or LPS"),
        ("a.mrk.json", markups("RAS", 1, 2).replace("[1, 2, 3.0]", "[1, 2]"), "2 coordinates"),
        (
            "a.mrk.json",
            markups("RAS", 1, 2).replace('"markups": [{', '"markups": [{"coordinateUnits": "um", '),
            "its unit is 'um', expected mm",
        ),
        (
            "a.mrk.json",
            markups("RAS", 1, 2).replace(
                '"label": "A",', '"label": "A", "positionStatus": "undefined",'
            ),
            "the landmark 'A' is not placed yet",
        ),
        ("a.mrk.json", '{"marks": []}', "is no file of landmarks: no 'markups'"),
        ("a.csv", "id,x,y,z\nA,1,2,nan\n", "'A' lies at"),
        ("a.csv", "id,x,y,z\n ,1,2,3\n", "the landmark '' lies at"),
        ("a.csv", CSV + "A,1,2,3\n", "has the landmark 'A' twice"),
        ("a.fcsv", FCSV.format("IJK", 1, 2), "its coordinate system is 'IJK', expected RAS or LPS"),
        ("a.mrk.json", "{", "is no file of landmarks"),
        ("a.mrk.json", "[]", "is no file of landmarks"),
        ("a.mrk.json", markups("RAS", 1, None), "is no file of landmarks"),
        ("a.mrk.json", '{"markups": []}', "has no landmarks"),
    ],
)
def test_what_is_no_file_of_landmarks_is_said(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_landmarks(tmp_path / name)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        read_landmarks(tmp_path / "none.csv")


def at(**points):
    return {name: np.array(point, float) for name, point in points.items()}


def test_error_of_a_displacement_that_is_linear_in_space():
    # Trilinear interpolation gives a linear field exactly, between the voxels too.
    shape, affine = grid_affine((11, 12, 9), (1, 1.3, 2), "LPS", (20, -10, 15), (5, -30, 40))
    matrix, shift = np.diag([0.1, -0.05, 0.2]), np.array([1.0, 2.0, -3.0])
    disp = (world(shape, affine) @ matrix + shift).astype(np.float32)
    fixed = at(A=(5.3, -29.1, 40.2), B=(4.1, -31.7, 41.9))
    moving = {name: x + x @ matrix + shift for name, x in fixed.items()}
    moving["B"] = moving["B"] + np.array([3.0, 0, 4.0])
    errors = target_registration_error(disp, Grid(shape, affine), fixed, moving)
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("errors", [errors["A"], errors["B"]], [0, 5], few)


def test_landmarks_that_do_not_belong_together_are_said():
    grid = Grid((8, 8, 8), np.eye(4))
    disp = np.zeros((8, 8, 8, 3), np.float32)
    with pytest.raises(EvaluationError, match="'B' is only in the fixed file"):
        target_registration_error(disp, grid, at(A=(1, 1, 1), B=(2, 2, 2)), at(A=(1, 1, 1)))
    with pytest.raises(EvaluationError, match="'C' is only in the moving file"):
        target_registration_error(disp, grid, at(A=(1, 1, 1)), at(A=(1, 1, 1), C=(1, 1, 1)))
    outside = at(A=(1, 7.6, 1))
    with pytest.raises(
        EvaluationError, match=r"'A' lies outside the fixed image, at voxel .1.0, 7.6"
    ):
        target_registration_error(disp, grid, outside, outside)
    edge = at(A=(7.4, -0.4, 0))  # within the last voxel
    assert target_registration_error(disp, grid, edge, edge) == {"A": 0.0}


def test_files_of_other_encodings_are_said(tmp_path):
    (tmp_path / "a.csv").write_bytes(CSV.encode("utf-16"))
    with pytest.raises(EvaluationError, match="it is UTF-16 text, expected UTF-8"):
        read_landmarks(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes("id,x,y,z\nÄ,1,2,3\n".encode("latin-1"))
    with pytest.raises(EvaluationError, match="it is not UTF-8 text: line 2") as caught:
        read_landmarks(tmp_path / "a.csv")
    assert "give a .csv with the columns id,x,y,z in RAS mm" in caught.value.hint
    (tmp_path / "a.csv").write_text("id,x,y,z\nÄ,1,2,3\n", encoding="utf-8")
    assert list(read_landmarks(tmp_path / "a.csv")) == ["Ä"]


def test_slicer_s_units_and_states_that_are_right_are_read(tmp_path):
    text = markups("RAS", 1.5, -2.0)
    text = text.replace('"markups": [{', '"markups": [{"coordinateUnits": ["mm", "UCUM", "x"], ')
    text = text.replace('"label": "A",', '"label": "A", "positionStatus": "defined",')
    (tmp_path / "a.mrk.json").write_text(text)
    assert read_landmarks(tmp_path / "a.mrk.json")["A"].tolist() == [1.5, -2, 3]
