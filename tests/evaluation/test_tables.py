"""Figures by hand, and the layouts that other tools read."""

import csv
import io
import json
import math

import numpy as np
import pytest

from ulae_rt.evaluation.measures import Case
from ulae_rt.evaluation.protocol import Protocol
from ulae_rt.evaluation.tables import (
    Comparison,
    Spread,
    cases_csv,
    compared,
    dice_by_area,
    labels_csv,
    learn2reg_json,
    markdown,
    mean_of,
    summarised,
)

NAN = math.nan
AREAS = Protocol("mine", {"A": (1, 2), "B": (3,), "C": (8, 9)}, ("A", "B"), {1: "one, left"})


def case(id_="p", method="m", dice=None, **values):
    dice = {1: 0.2, 2: NAN, 3: 0.6} if dice is None else dice
    fields = {
        "hd95_mm": dict.fromkeys(dice, 2.0), "hd95_voxels": dict.fromkeys(dice, 1.0), "lost": 0,
        "sdlogj": 0.3, "sdlogj_l2r": 0.07, "folded_image_percent": 1.0,
        "folded_brain_percent": 2.0, "foldings": 5, "inverse_consistency_mm": NAN, "tre_mm": {},
        "seconds": NAN,
    }  # fmt: skip
    return Case(method, id_, dice, **{**fields, **values})


def many(method, values):
    return [case(f"p{i}", method, {1: value}) for i, value in enumerate(values)]


def test_means_leave_out_what_is_missing():
    values = {1: 0.2, 2: NAN, 3: 0.6}
    assert mean_of(values) == pytest.approx(0.4)
    assert mean_of(values, (1, 2)) == 0.2
    assert math.isnan(mean_of(values, (2,)))
    assert math.isnan(mean_of(values, (7, 8)))
    assert math.isnan(mean_of({}))


def test_the_average_is_that_of_the_areas_not_of_the_labels():
    # (0.2 + 0.4) / 2 = 0.3 of A and 0.6 of B: 0.45, while the mean over labels is 0.4.
    found = dice_by_area(case(dice={1: 0.2, 2: 0.4, 3: 0.6}), AREAS)
    assert found["Avg."] == pytest.approx(0.45)
    assert math.isnan(found["C"])  # an area that neither scan has
    assert "Avg." not in dice_by_area(case(), Protocol("x", {"A": (1,)}))


def test_spread_by_hand():
    spread = Spread.of([1.0, NAN, 2.0, 6.0])
    assert spread == Spread(3, 3.0, pytest.approx(math.sqrt(14 / 3)), 2.0, 1.0, 6.0)
    assert Spread.of([NAN]) is None
    assert Spread.of([]) is None


def test_methods_are_summarised_apart_and_empty_measures_left_out():
    found = summarised([*many("x", [0.1, 0.3]), *many("y", [0.5])], AREAS)
    assert list(found) == ["x", "y"]
    assert found["x"]["dice"].mean == pytest.approx(0.2)
    assert found["y"]["dice"].pairs == 1
    assert found["x"]["dice_A"].median == pytest.approx(0.2)
    assert found["x"]["hd95_mm_A"].mean == 2.0
    assert not {"seconds", "tre_mm", "dice_C", "dice_Avg."} & found["x"].keys()


def test_wilcoxon_by_hand():
    # Five differences of one sign, none tied: 2 of the 2^5 assignments of signs are as extreme.
    x, y = [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.4, 0.6, 0.8, 1.0]
    assert compared([*many("x", x), *many("y", y)]) == [
        Comparison("x", "y", 5, pytest.approx(0.3), pytest.approx(2 / 32))
    ]


def test_methods_are_compared_on_the_pairs_they_share():
    (found,) = compared([*many("x", [0.1, 0.2, NAN]), *many("y", [0.4, 0.2, 0.9, 0.9])])
    assert found.pairs == 2
    assert found.median_difference == pytest.approx(0.15)


def test_the_same_twice_has_no_p():
    (found,) = compared([*many("x", [0.1, 0.2]), *many("y", [0.1, 0.2])])
    assert found.median_difference == 0
    assert math.isnan(found.p)
    assert compared(many("x", [0.1])) == []
    assert compared([*many("x", [0.1]), case("other", "y", {1: 0.2})]) == []


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_holds_every_case_and_label():
    cases = [case(tre_mm={"A": 1.0, "B": 2.0}), case("q", dice={}, seconds=1.25)]
    first, second = read(cases_csv(cases, AREAS))
    assert (first["method"], first["id"]) == ("m", "p")
    assert float(first["dice"]) == pytest.approx(0.4)
    assert (first["dice_A"], first["dice_B"], first["dice_C"]) == ("0.2", "0.6", "")
    assert (first["tre_mm"], first["labels_lost"], first["seconds"]) == ("1.5", "0", "")
    assert (second["dice"], second["labels_lost"], second["seconds"]) == ("", "", "1.25")
    rows = read(labels_csv(cases, AREAS))
    assert [(row["label"], row["name"], row["dice"]) for row in rows] == [
        ("1", "one, left", "0.2"),
        ("2", "", ""),
        ("3", "", "0.6"),
    ]


def test_learn2reg_s_layout():
    cases = [
        case(f"p{i}", dice={1: value, 2: NAN}, tre_mm={"A": 3.0})
        for i, value in enumerate([0.1, 0.2, 0.6])
    ]
    content = json.loads(learn2reg_json(cases, "mine"))
    assert list(content) == ["name", "aggregates", "cases", "eval_version"]
    assert set(content["aggregates"]) == {"DSC", "HD95", "LogJacDetStd", "num_foldings", "TRE"}
    assert content["aggregates"]["DSC"] == {
        "mean": pytest.approx(0.3),
        "std": pytest.approx(np.std([0.1, 0.2, 0.6])),
        "30": pytest.approx(np.quantile([0.1, 0.2, 0.6], 0.3)),
    }
    assert content["cases"]["p0"]["DSC"] == {"mean": 0.1, "detailed": [0.1, None]}
    assert content["cases"]["p0"]["HD95"] == {"mean": 1.0, "detailed": [1.0, 1.0]}
    assert content["cases"]["p0"]["LogJacDetStd"] == {"mean": 0.07, "detailed": 0.07}
    assert content["cases"]["p0"]["TRE"] == {"mean": 3.0, "detailed": [3.0]}
    assert content["cases"]["p2"]["num_foldings"]["mean"] == 5


def test_learn2reg_s_layout_of_what_was_not_measured():
    content = json.loads(learn2reg_json([case(dice={1: NAN}), case("q", dice={})], "mine"))
    assert "DSC" not in content["aggregates"]
    assert content["cases"]["p"]["DSC"] == {"mean": None, "detailed": [None]}
    assert "TRE" not in content["cases"]["p"]


def table(text, heading):
    """Rows of the table under a heading, cell by cell."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_paper_s_table():
    cases = [
        *[case(f"p{i}", "VM", {1: v, 2: v, 3: 2 * v}) for i, v in enumerate([0.1, 0.3])],
        *[case(f"p{i}", "ours", {1: v, 3: 0.5}) for i, v in enumerate([0.1, 0.5])],
    ]
    text = markdown(summarised(cases, AREAS), compared(cases), AREAS)
    assert text.startswith("# mine\n")
    by_area = table(text, "Dice by area")
    assert [by_area[0], *by_area[2:]] == [
        ["Dice", "A", "B", "C", "Avg.", "all 5"],
        ["VM", "0.200", "0.400", "-", "0.300", "0.267"],
        ["ours", "0.300", "0.500", "-", "0.400", "0.400"],
    ]
    measures = table(text, "Measures")
    assert measures[0][:4] == ["", "pairs", "Dice", "median"]
    assert measures[2][:6] == ["VM", "2", "0.267", "0.267", "0.133", "0.133"]
    assert "seconds" not in measures[0]
    # Differences: 0.3 - 0.1333 and 0.5 - 0.4.
    assert table(text, "Method against method")[2] == ["ours - VM", "2", "+0.1333", "0.5"]


def test_methods_with_other_numbers_of_pairs_are_pointed_out():
    protocol = Protocol.of_labels()
    said = "Not every method has every pair"
    for cases, expected in (
        ([*many("x", [0.1, 0.2]), *many("y", [0.1])], True),
        ([*many("x", [0.1, 0.2]), *many("y", [0.1, 0.2])], False),
    ):
        text = markdown(summarised(cases, protocol), compared(cases), protocol)
        assert (said in text) == expected


def test_one_method_without_areas_has_one_table():
    protocol = Protocol.of_labels()
    cases = many("x", [0.1])
    text = markdown(summarised(cases, protocol), compared(cases), protocol)
    assert "Dice by area" not in text
    assert "against" not in text
    assert table(text, "Measures")[2][:3] == ["x", "1", "0.100"]
