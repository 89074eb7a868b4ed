"""`ulae-rt evaluate`: from the folders of a batch to the tables, and what it refuses."""

import argparse
import csv
import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from _support.arrays import assert_arrays_close
from _support.labelled import FIXED, SHIFT, labelled_pair
from _support.tolerances import TOL
from ulae_rt import evaluate as evaluate_module
from ulae_rt import optional
from ulae_rt.batching.results import Row
from ulae_rt.cli import main
from ulae_rt.errors import BackendUnavailable
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.warpfile import Warp

PROTOCOL = """
title = "head"
average = ["left", "right"]
[groups.left]
labels = [1, 3]
[groups.right]
labels = [2, 4]
[groups.core]
labels = [9]
"""
HALF = np.eye(4)
HALF[:3, 3] = SHIFT / 2


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "scans").mkdir()
    return [labelled_pair(tmp_path / "scans", name) for name in ("a", "b")]


@pytest.fixture
def protocol(tmp_path):
    path = tmp_path / "head.toml"
    path.write_text(PROTOCOL)
    return str(path)


def row(pair, status="done", outputs=None, **values):
    outputs = {"warp": f"pairs/{pair.id}/warp.nii.gz"} if outputs is None else outputs
    inputs = {name: str(path) for name, path in pair.paths().items()}
    return Row(pair.id, status, inputs, outputs, affine=HALF.tolist(), **values)


def batch(folder, pairs, shift=SHIFT, rows=None):
    """A folder as `batch` writes it, with the same displacement everywhere."""
    disp = np.broadcast_to(np.asarray(shift, np.float32), (*FIXED[0], 3))
    folder.mkdir()
    for pair in pairs:
        path = folder / "pairs" / pair.id
        path.mkdir(parents=True)
        Warp(disp, read_volume(pair.fixed)).save(path / "warp.nii.gz")
    rows = (
        [row(pair, seconds={"network": 1.0, "write": 0.5}) for pair in pairs]
        if rows is None
        else rows
    )
    (folder / "results.jsonl").write_text("".join(f"{each.to_json()}\n" for each in rows))
    return str(folder)


def evaluate(tmp_path, *arguments):
    return main(["evaluate", "-o", str(tmp_path / "report"), "--workers", "2", *arguments])


def cases(tmp_path):
    with open(tmp_path / "report" / "cases.csv", encoding="utf-8") as file:
        return {(each["method"], each["id"]): each for each in csv.DictReader(file)}


def test_methods_stand_beside_doing_nothing_and_the_affine(tmp_path, pairs, protocol, capsys):
    network = batch(tmp_path / "network", pairs)
    worse = batch(tmp_path / "of-old", pairs, SHIFT * 0.7)
    status = evaluate(tmp_path, network, f"worse={worse}", "--protocol", protocol)
    said = capsys.readouterr()
    assert status == 0, said.err
    found = cases(tmp_path)
    methods = ["zero-displacement", "affine-only", "network", "worse"]
    assert list(found) == [(method, id_) for method in methods for id_ in "ab"]
    dice = [float(found[method, "a"]["dice"]) for method in methods]
    assert dice[0] < dice[1] < dice[3] < dice[2]
    assert float(found["network", "a"]["seconds"]) == 1.5
    assert found["zero-displacement", "a"]["seconds"] == ""
    right = found["network", "b"]
    average = (float(right["dice_left"]) + float(right["dice_right"])) / 2
    assert_arrays_close("Avg.", float(right["dice_Avg."]), average, TOL["six decimals"])
    table = (tmp_path / "report" / "table.md").read_text()
    assert table in said.out
    assert "worse - network" in table
    report = {path.name for path in (tmp_path / "report").iterdir()}
    assert report == {
        "table.md", "cases.csv", "labels.csv", *(f"evaluation-{name}.json" for name in methods),
    }  # fmt: skip
    with open(tmp_path / "report" / "labels.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4 * 2 * 5


def test_a_list_of_pairs_is_measured_as_it_lies(tmp_path, pairs, capsys):
    lines = ["id,moving,fixed,moving_labels,fixed_labels"]
    for pair in pairs:
        lines.append(",".join([pair.id, *map(str, pair.paths().values())]))
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    assert evaluate(tmp_path, str(tmp_path / "pairs.csv"), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["methods"]) == ["zero-displacement"]
    assert said["methods"]["zero-displacement"]["dice"]["pairs"] == 2
    assert said["failures"] == said["comparisons"] == []


def test_pairs_that_were_not_registered_are_counted_and_left_out(tmp_path, pairs, capsys):
    rows = [row(pairs[0]), replace(row(pairs[1], "failed", {}), error="no brain")]
    network = batch(tmp_path / "network", pairs, rows=rows)
    full = batch(tmp_path / "full", pairs)
    assert evaluate(tmp_path, network, full, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["not_registered"] == {"network": ["b"]}
    assert said["methods"]["network"]["dice"]["pairs"] == 1
    assert said["methods"]["full"]["dice"]["pairs"] == 2
    assert [each["pairs"] for each in said["comparisons"]] == [2, 1, 2, 1, 2, 1]
    assert evaluate(tmp_path, network, full, "--overwrite") == 0
    assert "network: 1 pairs were not registered: b" in capsys.readouterr().out


def test_a_results_file_cut_off_in_a_line_is_read_up_to_there(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs)
    results = Path(network) / "results.jsonl"
    results.write_text(results.read_text()[:-40])
    assert evaluate(tmp_path, network) == 0
    assert {id_ for _, id_ in cases(tmp_path)} == {"a"}


def test_what_cannot_be_measured_is_said_and_the_rest_written(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs)
    (tmp_path / "network" / "pairs" / "a" / "warp.nii.gz").write_bytes(b"")
    assert evaluate(tmp_path, network, "--json") == 1
    said = capsys.readouterr()
    assert "error: 1 of 6 registrations could not be measured" in said.err
    assert "the first, a by network" in said.err
    assert "warp.nii.gz is empty" in said.err
    assert [each["id"] for each in json.loads(said.out)["failures"]] == ["a"]
    assert ("network", "a") not in cases(tmp_path)
    assert ("network", "b") in cases(tmp_path)


def test_nothing_is_replaced_unasked(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs[:1])
    assert evaluate(tmp_path, network) == 0
    before = (tmp_path / "report" / "cases.csv").read_bytes()
    assert evaluate(tmp_path, network) == 1
    assert "exists already" in capsys.readouterr().err
    assert evaluate(tmp_path, network, "--overwrite", "--labels", "9") == 0
    assert (tmp_path / "report" / "cases.csv").read_bytes() != before


def test_labels_can_be_chosen(tmp_path, pairs):
    network = batch(tmp_path / "network", pairs[:1])
    assert evaluate(tmp_path, network, "--labels", "9,4") == 0
    with open(tmp_path / "report" / "labels.csv", encoding="utf-8") as file:
        assert {each["label"] for each in csv.DictReader(file)} == {"4", "9"}


@pytest.mark.follows("give labels that the maps have, or leave --labels out")
def test_labels_that_no_map_has_are_said(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs)
    assert evaluate(tmp_path, network, "--labels", "9999,77") == 1
    said = capsys.readouterr().err
    assert "--labels is 77,9999, and no pair has any of them in both label maps" in said
    assert "hint: give labels that the maps have, or leave --labels out" in said
    assert not list((tmp_path / "report").iterdir())
    assert evaluate(tmp_path, network, "--labels", "9,9999") == 0
    assert "label 9999: no pair that was measured has it" in capsys.readouterr().err
    for flags in (["--labels", "9"], []):
        assert evaluate(tmp_path, network, "--overwrite", *flags) == 0
        assert "no pair" not in capsys.readouterr().err
        assert cases(tmp_path)["network", "a"]["dice"]


def test_labels_that_were_in_maps_that_failed_are_not_said_to_be_nowhere(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs)
    pairs[0].fixed_labels.write_bytes(b"")
    assert evaluate(tmp_path, network, "--labels", "9999") == 1
    said = capsys.readouterr().err
    assert "registrations could not be measured" in said
    assert "label 9999: no pair that was measured has it" in said


def unlabelled(pair):
    return replace(pair, moving_labels=None)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{none}"], 1, "none holds no results"),
        (["{bare}"], 1, "none of 2 pairs has labels or landmarks of both scans"),
        (["{failed}"], 1, "no pair is registered"),
        (["{warpless}"], 1, "2 of 6 registrations could not be measured"),
        (["{network}", "{network}"], 2, "two methods are called network"),
        (["zero-displacement={network}"], 2, "two methods are called zero-displacement"),
        (["a b={network}"], 2, "'a b' cannot name a method"),
        (["{network}", "{other}"], 1, "the pair a has another moving than in the results named"),
        (["{list}", "{network}"], 2, "is a list of pairs, expected nothing beside it"),
        (["{network}", "--labels", "1;2"], 2, "--labels is '1;2', expected all, or whole numbers"),
        (["{network}", "--protocol", "lpba"], 1, "there is no protocol 'lpba'"),
        (["{network}", "--workers", "0"], 2, "--workers is 0, expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, pairs, capsys, arguments, status, message):
    swapped = [replace(pair, moving=pair.fixed) for pair in pairs]
    failed = [row(pair, "failed", {}) for pair in pairs]
    sources = {
        "none": str(tmp_path / "none"),
        "list": str(tmp_path / "pairs.csv"),
        "network": batch(tmp_path / "network", pairs),
        "other": batch(tmp_path / "other", swapped),
        "bare": batch(tmp_path / "bare", [], rows=[row(unlabelled(pair)) for pair in pairs]),
        "failed": batch(tmp_path / "failed", [], rows=failed),
        "warpless": batch(
            tmp_path / "warpless", [], rows=[row(pair, outputs={}) for pair in pairs]
        ),
    }
    assert evaluate(tmp_path, *(each.format(**sources) for each in arguments)) == status
    said = capsys.readouterr()
    assert message in said.err
    assert "hint: " in said.err
    assert not list((tmp_path / "report").glob("*")) or "could not be measured" in message


def test_all_that_fails_leaves_no_report(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs)
    for pair in pairs:
        pair.fixed.write_bytes(b"")
    assert evaluate(tmp_path, network) == 1
    assert "error: a: " in capsys.readouterr().err
    assert not list((tmp_path / "report").iterdir())


def test_without_scipy_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    arguments = argparse.Namespace(results=["x"])
    with pytest.raises(BackendUnavailable, match="scipy is not installed") as error:
        evaluate_module.run(arguments, None)
    assert error.value.hint == "pip install 'ulae-rt[evaluate]'"


def test_a_full_disk_leaves_nothing_behind(tmp_path, pairs, capsys, monkeypatch):
    def full(path, text, **_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    network = batch(tmp_path / "network", pairs[:1])
    monkeypatch.setattr(Path, "write_text", full)
    assert evaluate(tmp_path, network) == 1
    assert "report/table.md cannot be written: the disk is full" in capsys.readouterr().err
    assert not list((tmp_path / "report").iterdir())


def list_of(path, pairs, *columns):
    """A list of pairs with some of their files."""
    names = ("moving", "fixed", *columns)
    lines = [",".join([pair.id, *(str(pair.paths()[name]) for name in names)]) for pair in pairs]
    path.write_text("\n".join([",".join(["id", *names]), *lines]) + "\n")
    return str(path)


def registered(path, out, *flags):
    """What `batch` says of a list, by the affine that the headers are: nothing to wait for."""
    quick = ("--method", "affine", "--affine", "none", "--pictures", "0")
    return main(["batch", str(path), "-o", str(out), *quick, *flags])


@pytest.mark.follows("leave --workers out for one for each processor")
def test_workers_may_be_left_out(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs[:1])
    assert evaluate(tmp_path, network, "--workers", "0") == 2
    assert "hint: leave --workers out for one for each processor" in capsys.readouterr().err
    assert main(["evaluate", network, "-o", str(tmp_path / "report")]) == 0


@pytest.mark.follows("give for example --labels 2,4,17, or leave it out")
def test_labels_are_numbers_with_commas_or_left_out(tmp_path, pairs, capsys):
    network = batch(tmp_path / "network", pairs[:1])
    assert evaluate(tmp_path, network, "--labels", "2 4") == 2
    assert "hint: give for example --labels 2,4,17, or leave it out" in capsys.readouterr().err
    assert evaluate(tmp_path, network, "--labels", "2,4,17") == 0
    with open(tmp_path / "report" / "labels.csv", encoding="utf-8") as file:
        assert {each["label"] for each in csv.DictReader(file)} == {"2", "4", "17"}
    assert evaluate(tmp_path, network, "--overwrite") == 0


@pytest.mark.follows("give it alone, or folders that 'ulae-rt batch' wrote")
def test_a_list_is_given_alone_or_as_the_folder_of_its_batch(tmp_path, pairs, capsys):
    listed = list_of(tmp_path / "pairs.csv", pairs, "moving_labels", "fixed_labels")
    network = batch(tmp_path / "network", pairs)
    assert evaluate(tmp_path, listed, network) == 2
    assert "hint: give it alone, or folders that 'ulae-rt batch' wrote" in capsys.readouterr().err
    assert evaluate(tmp_path, listed) == 0
    assert registered(listed, tmp_path / "affine") == 0
    assert evaluate(tmp_path, str(tmp_path / "affine"), network, "--overwrite") == 0
    assert {"affine", "network"} <= {method for method, _ in cases(tmp_path)}


@pytest.mark.follows("mend the pairs and run 'ulae-rt batch' with --resume")
def test_pairs_that_all_failed_are_mended_and_registered(tmp_path, pairs, capsys):
    listed = list_of(tmp_path / "pairs.csv", pairs[:1], "moving_labels", "fixed_labels")
    scan, out = pairs[0].moving, tmp_path / "affine"
    away = scan.rename(tmp_path / "away.nii.gz")
    assert registered(listed, out) == 1
    capsys.readouterr()
    assert evaluate(tmp_path, str(out)) == 1
    said = capsys.readouterr().err
    assert "hint: results.jsonl says why; mend the pairs and run 'ulae-rt batch' with" in said
    assert f"{scan} does not exist" in (out / "results.jsonl").read_text()
    away.rename(scan)
    assert registered(listed, out, "--resume") == 0
    assert evaluate(tmp_path, str(out)) == 0


@pytest.mark.follows("run 'ulae-rt batch' into another folder, with warp among its --outputs")
def test_a_batch_without_warps_is_run_again_with_them(tmp_path, pairs, capsys):
    listed = list_of(tmp_path / "pairs.csv", pairs[:1], "moving_labels", "fixed_labels")
    assert registered(listed, tmp_path / "first", "--outputs", "moved") == 0
    assert evaluate(tmp_path, str(tmp_path / "first")) == 1
    said = capsys.readouterr().err
    assert "hint: run 'ulae-rt batch' into another folder, with warp among its --outputs" in said
    assert registered(listed, tmp_path / "second", "--outputs", "moved", "warp") == 0
    assert evaluate(tmp_path, str(tmp_path / "second"), "--overwrite") == 0


@pytest.mark.follows("add the columns moving_labels and fixed_labels (or moving_landmarks and")
@pytest.mark.parametrize("kind", ["labels", "landmarks"])
def test_a_list_without_anything_to_measure_gets_columns(tmp_path, pairs, capsys, kind):
    listed = list_of(tmp_path / "pairs.csv", pairs[:1])
    assert evaluate(tmp_path, listed) == 1
    assert f"moving_{kind} and fixed_{kind}" in capsys.readouterr().err
    pair, columns = pairs[0], (f"moving_{kind}", f"fixed_{kind}")
    if kind == "landmarks":
        places = {name: tmp_path / f"{name}.csv" for name in columns}
        for path in places.values():
            path.write_text("id,x,y,z\na,1,2,3\nb,-1,0,2\n")
        pair = replace(pair, **places)
    list_of(tmp_path / "pairs.csv", [pair], *columns)
    assert registered(listed, tmp_path / "affine") == 0
    assert evaluate(tmp_path, str(tmp_path / "affine")) == 0
    assert ("affine", "a") in cases(tmp_path)


@pytest.mark.follows("write NAME={}", ", with letters, digits and _ . - + @ in NAME")
@pytest.mark.parametrize("folder", ["other/network", "a b"])
def test_a_method_whose_folder_cannot_name_it_gets_a_name(tmp_path, pairs, capsys, folder):
    (tmp_path / "other").mkdir()
    first = batch(tmp_path / "network", pairs[:1])
    second = batch(tmp_path / folder, pairs[:1])
    assert evaluate(tmp_path, first, second) == 2
    assert f"hint: write NAME={second}" in capsys.readouterr().err
    assert evaluate(tmp_path, first, f"Another_one-2.0+@={second}") == 0
    assert ("Another_one-2.0+@", "a") in cases(tmp_path)
