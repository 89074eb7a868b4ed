"""The packaged protocols hold what the paper and the challenge say; others are read or refused."""

import csv
from importlib.resources import files

import numpy as np
import pytest

from ulae_rt.errors import EvaluationError
from ulae_rt.evaluation.protocol import PROTOCOLS, Protocol, read_protocol
from ulae_rt.imaging.nifti import read_volume

AREAS = ("FL", "PL", "OL", "TL", "CL")
# The paper's 25 labels of the left hemisphere.
GYRI = (
    "1002 1003 1005 1006 1007 1008 1009 1011 1012 1013 1014 1015 1016 1017 1018 1021 1022 1024 "
    "1025 1028 1029 1030 1031 1034 1035"
)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_labels_are_named_and_each_lies_in_one_area(name):
    protocol = read_protocol(name)
    in_areas = [label for area in protocol.average for label in protocol.groups[area]]
    assert len(in_areas) == len(set(in_areas))
    assert set(protocol.names) == set(protocol.labels)
    assert "{id}" in protocol.scans
    assert "{id}" in protocol.label_maps


def test_oasis_has_the_challenge_s_134_regions():
    protocol = read_protocol("oasis")
    assert len(protocol.labels) == 134
    cortex, below = protocol.groups["cortex"], protocol.groups["below_100"]
    assert min(cortex) == 100
    assert max(below) < 100
    assert sorted(cortex + below) == list(protocol.labels)
    assert protocol.average == AREAS
    assert sorted(label for area in AREAS for label in protocol.groups[area]) == list(cortex)
    # Right and left of every gyrus.
    for labels in (protocol.groups[area] for area in AREAS):
        assert {label + 1 for label in labels if label % 2 == 0} == {k for k in labels if k % 2}


def test_oasis_agrees_with_the_data(data_dir):
    oasis = data_dir / "oasis"
    protocol = read_protocol("oasis")
    with open(oasis / "labels.csv", encoding="utf-8") as file:
        names = {
            int(row[0]): " ".join(row[1].split())
            for row in csv.reader(file)
            if row[0:1] and row[0].isdigit()
        }
    assert {label: names[label] for label in protocol.labels} == protocol.names
    there = np.unique(read_volume(oasis / "val" / "1101_labels.nii.gz", kind="labels").data)
    assert set(protocol.labels) <= set(there.tolist())
    assert set(there.tolist()) - set(protocol.labels) <= {0, 15, 42, 43, 63, 64, 65, 66, 74}


def test_mindboggle_has_the_paper_s_25_labels_a_side():
    protocol = read_protocol("mindboggle101")
    left = [int(label) for label in GYRI.split()]
    assert list(protocol.labels) == left + [label + 1000 for label in left]
    assert protocol.average == tuple(protocol.groups) == AREAS
    assert {area: len(labels) / 2 for area, labels in protocol.groups.items()} == {
        "FL": 7, "PL": 5, "OL": 4, "TL": 7, "CL": 2,
    }  # fmt: skip
    # What DKT31 has beyond DKT25.
    assert {label % 1000 for label in protocol.merge} == {10, 19, 20, 23, 26, 27}
    assert {label // 1000 for label in protocol.merge.values()} == {1, 2}


def test_ixi_has_four_tissues():
    protocol = read_protocol("ixi")
    assert protocol.groups == {"LWm": (2,), "RWm": (41,), "LGm": (3,), "RGm": (42,)}
    assert protocol.average == tuple(protocol.groups)


def test_labels_become_places():
    protocol = Protocol("", {"a": (5, 900), "b": (2, 5)}, merge={7: 5})
    x = np.array([0, 2, 5, 7, 900, 906, 3, 2**31 - 1], np.int32)
    labels, (places,) = protocol.indexed(x)
    assert labels == (2, 5, 900)
    assert places.tolist() == [0, 1, 2, 2, 3, 0, 0, 0]


def test_without_a_protocol_the_labels_are_those_found():
    labels, places = Protocol.of_labels().indexed(np.array([0, 9]), np.array([4, 9]))
    assert labels == (4, 9)
    assert [each.tolist() for each in places] == [[0, 2], [1, 2]]
    assert Protocol.of_labels([9, 4, 9]).labels == (4, 9)
    labels, (places,) = Protocol.of_labels().indexed(np.zeros(3, np.int32))
    assert labels == ()
    assert places.tolist() == [0, 0, 0]


FULL = """
title = "mine"
average = ["a"]
[groups.a]
labels = [1, 2]
[merge]
2 = [8, 9]
[names]
1 = "one"
"""


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FULL)
    assert read_protocol(str(path)) == Protocol(
        "mine", {"a": (1, 2)}, ("a",), {1: "one"}, {8: 2, 9: 2}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 'x'", "has no groups"),
        ("groups = 3", "is no protocol"),
        ("[groups.a]\nlabels = []", "the group a has no labels"),
        ("[groups.a]\ntitle = 'x'", "the group a has no labels"),
        ("[groups.a]\nlabels = [1.5]", "a has the label 1.5"),
        ("[groups.a]\nlabels = [0]", "a has the label 0"),
        ("[groups.a]\nlabels = [true]", "a has the label True"),
        ("[groups.a]\nlabels = 5", "is no protocol"),
        ("lables = 3\n[groups.a]\nlabels = [1]", "lables is unknown, expected average, groups"),
        ("average = ['b']\n[groups.a]\nlabels = [1]", "average names the group b"),
        ("[groups.a]\nlabels = [1]\n[merge]\n3 = [4]", r"merge 3 = \[4\]"),
        ("[groups.a]\nlabels = [1, 4]\n[merge]\n1 = [4]", r"merge 1 = \[4\]"),
        ("[groups.a]\nlabels = [1]\n[names]\nx = 'y'", "is no protocol: invalid literal"),
        ("[groups", "is no TOML"),
        ("a = " + "[" * 50_000, "is no TOML: "),
        ("[groups.a]\nlabels = [1]\nlabel = [2]", "the group a has the key label, expected"),
        ("average = ['a', 'a']\n[groups.a]\nlabels = [1]", "average names the group a twice"),
        ("title = 3\n[groups.a]\nlabels = [1]", "title is 3, expected text"),
        ("scans = ['a']\n[groups.a]\nlabels = [1]", "scans is .'a'., expected text"),
    ],
)
def test_what_is_no_protocol_is_said(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_protocol(str(path))


def test_an_unknown_protocol_is_said(tmp_path):
    with pytest.raises(EvaluationError, match="no protocol 'lpba', expected oasis, mindboggle101"):
        read_protocol("lpba")
    with pytest.raises(EvaluationError, match=r"none\.toml cannot be read: No such file"):
        read_protocol(str(tmp_path / "none.toml"))


def test_encodings_of_a_protocol(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("\ufeff" + FULL, encoding="utf-8")
    assert read_protocol(str(path)).title == "mine"
    path.write_bytes(FULL.encode("utf-16"))
    with pytest.raises(EvaluationError, match="it is UTF-16 text, expected UTF-8") as caught:
        read_protocol(str(path))
    assert caught.value.hint == "save it as UTF-8"


def test_the_hint_names_a_file_that_is_there(tmp_path):
    with pytest.raises(EvaluationError) as caught:
        read_protocol("lpba")
    example = caught.value.hint.removeprefix("see the package's own: ulae_rt/")
    text = (files("ulae_rt") / example).read_text("utf-8")
    (tmp_path / "mine.toml").write_text(text)
    assert read_protocol(str(tmp_path / "mine.toml")) == read_protocol("oasis")
