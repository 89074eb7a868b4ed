"""`ulae-rt pairs`: the list of a folder, in the words of a data set."""

import shutil

import pytest

from ulae_rt.batching.pairs import read_pairs
from ulae_rt.cli import main


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_ordered_pair_with_its_labels(tmp_path, capsys):
    data = tmp_path / "data"
    for person in ("7", "x y", "b"):
        touch(data, f"{person}_t1.nii.gz", f"{person}_labels.nii.gz")
    shutil.move(data / "x y_t1.nii.gz", data / "x.y_t1.nii.gz")
    shutil.move(data / "x y_labels.nii.gz", data / "x.y_labels.nii.gz")
    touch(data, "notes.txt", "deeper/z_t1.nii.gz")
    out = tmp_path / "pairs.csv"
    assert main(["pairs", str(data), "-o", str(out), "--protocol", "oasis"]) == 0
    assert "people      3\npairs       6\n" in capsys.readouterr().out
    pairs = read_pairs(out)
    assert [pair.id for pair in pairs] == ["7-b", "7-x.y", "b-7", "b-x.y", "x.y-7", "x.y-b"]
    assert pairs[1].paths() == {
        "moving": data / "7_t1.nii.gz",
        "fixed": data / "x.y_t1.nii.gz",
        "moving_labels": data / "7_labels.nii.gz",
        "fixed_labels": data / "x.y_labels.nii.gz",
    }
    assert str(tmp_path) not in out.read_text()  # relative: data and list can be moved


def test_a_folder_a_person(tmp_path):
    data = tmp_path / "data"
    scan, labels = "t1weighted_brain.MNI152.nii.gz", "labels.DKT25.manual.MNI152.nii.gz"
    for person in ("OASIS-TRT-20-1", "OASIS-TRT-20-2"):
        touch(data, f"{person}/{scan}", f"{person}/{labels}")
    (tmp_path / "lists").mkdir()
    out = tmp_path / "lists" / "pairs.csv"
    assert main(["pairs", str(data), "-o", str(out), "--protocol", "mindboggle101"]) == 0
    first, second = read_pairs(out)
    assert first.moving == second.fixed == data / "OASIS-TRT-20-1" / scan
    assert first.fixed_labels == data / "OASIS-TRT-20-2" / labels


def test_patterns_of_one_s_own(tmp_path):
    touch(tmp_path, "a/a.nii.gz", "b/b.nii.gz", "b/a.nii.gz")
    out = tmp_path / "pairs.csv"
    assert main(["pairs", str(tmp_path), "-o", str(out), "--scans", "{id}/{id}.nii.gz"]) == 0
    assert [pair.id for pair in read_pairs(out)] == ["a-b", "b-a"]
    assert read_pairs(out)[0].moving_labels is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--protocol", "oasis"], 1, "d has 1 scans called {id}_t1.nii.gz, expected two or more"),
        (["--scans", "*.nii.gz"], 2, "the pattern '*.nii.gz' has no {id}"),
        (["--scans", "s_{id}.nii", "--label-maps", "l_{id}.nii"], 1, "l_b.nii does not exist"),
        (["--scans", "n {id}.nii"], 1, "pairs.csv, line 2: the id 'b-x y' cannot name a folder"),
        (["--protocol", "oasis", "--label-maps", "x"], 2, "--protocol names the label maps"),
        (["--protocol", "lpba"], 1, "there is no protocol 'lpba'"),
        ([], 2, "one of the arguments --protocol --scans is required"),
    ],
)
def test_what_makes_no_list_is_said(tmp_path, capsys, arguments, status, message):
    data = tmp_path / "d"
    touch(data, "a_t1.nii.gz", "s_a.nii", "s_b.nii", "l_a.nii", "n x y.nii", "n b.nii")
    out = tmp_path / "pairs.csv"
    try:
        found = main(["pairs", str(data), "-o", str(out), *arguments])
    except SystemExit as error:
        found = error.code
    assert found == status
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_a_list_is_not_replaced_unasked(tmp_path, capsys):
    touch(tmp_path, "a.nii", "b.nii", "pairs.csv")
    arguments = ["pairs", str(tmp_path), "-o", str(tmp_path / "pairs.csv"), "--scans", "{id}.nii"]
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert len(read_pairs(tmp_path / "pairs.csv")) == 2


@pytest.mark.follows("give --scans instead")
def test_label_maps_of_one_s_own_come_with_scans(tmp_path, capsys):
    touch(tmp_path, "a_t1.nii.gz", "a_seg.nii.gz", "b_t1.nii.gz", "b_seg.nii.gz")
    command = ["pairs", str(tmp_path), "-o", str(tmp_path / "pairs.csv")]
    command += ["--label-maps", "{id}_seg.nii.gz"]
    assert main([*command, "--protocol", "oasis"]) == 2
    assert "hint: give --scans instead" in capsys.readouterr().err
    assert main([*command, "--scans", "{id}_t1.nii.gz"]) == 0
    assert read_pairs(tmp_path / "pairs.csv")[0].moving_labels == tmp_path / "a_seg.nii.gz"


@pytest.mark.follows("check the folder, or give --scans with another pattern")
@pytest.mark.parametrize(
    ("folder", "pattern"), [("data", "{id}_t1.nii.gz"), (".", "data/{id}_t1.nii.gz")]
)
def test_a_folder_without_scans_is_another_or_they_are_called_otherwise(
    tmp_path, capsys, folder, pattern
):
    touch(tmp_path / "data", "a_t1.nii.gz", "b_t1.nii.gz")
    out = ["-o", str(tmp_path / "pairs.csv"), "--scans"]
    assert main(["pairs", str(tmp_path), *out, "{id}_t1.nii.gz"]) == 1
    assert "hint: check the folder, or give --scans with another" in capsys.readouterr().err
    assert main(["pairs", str(tmp_path / folder), *out, pattern]) == 0
    assert len(read_pairs(tmp_path / "pairs.csv")) == 2
