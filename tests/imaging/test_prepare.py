"""Scans are found, brought to the template's grid, and the transform that undoes it is kept."""

import json
import os

import nibabel as nib
import numpy as np
import pytest

from _support.brains import GEOMETRIES, grid_affine, real_brain, save_brain
from ulae_rt.cli import main
from ulae_rt.errors import UsageError
from ulae_rt.files import locked_run
from ulae_rt.prepare import find_scans

SHAPE = ["--shape", "64", "80", "64"]


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"x")


def test_scans_of_a_folder_with_their_labels(tmp_path):
    touch(tmp_path, "2_t1.nii.gz", "2_labels.nii.gz", "1.nii", "1_seg.nii", "3_T1w_brain.nii.gz")
    touch(tmp_path, "3_mask.nii.gz", "3_dseg.nii.gz", "12_labels.nii.gz", ".hidden.nii", "note.txt")
    scans = find_scans(tmp_path)
    assert [scan.name for scan in scans] == ["1", "2", "3"]
    found = [scan.labels.name for scan in scans]
    assert found == ["1_seg.nii", "2_labels.nii.gz", "3_dseg.nii.gz"]


def test_scans_of_a_list(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_labels.nii.gz", "b.nii.gz", "seg.nii.gz")
    (tmp_path / "list.txt").write_text("# scans\nb.nii.gz\n\na.nii.gz\n")
    assert [(s.name, s.labels and s.labels.name) for s in find_scans(tmp_path / "list.txt")] == [
        ("a", "a_labels.nii.gz"),
        ("b", None),
    ]
    (tmp_path / "list.csv").write_text("id,image,labels\nx,b.nii.gz,seg.nii.gz\ny,a.nii.gz,\n")
    scans = find_scans(tmp_path / "list.csv")
    assert [(s.name, s.labels and s.labels.name) for s in scans] == [
        ("x", "seg.nii.gz"),
        ("y", "a_labels.nii.gz"),
    ]


def test_lists_that_make_no_sense(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_scans(tmp_path / "no")
    with pytest.raises(UsageError, match=r"names no \.nii"):
        find_scans(tmp_path)
    touch(tmp_path, "a_t1.nii", "a.nii.gz")
    with pytest.raises(UsageError, match="more than one scan named a"):
        find_scans(tmp_path)


def test_scans_are_brought_to_the_template_and_back(samples, tmp_path, capsys):
    head, spacing = real_brain(samples[0]), (2, 2, 2)
    template = tmp_path / "template.nii.gz"
    save_brain(template, *grid_affine((88, 104, 88), spacing), brain=head)
    scans = tmp_path / "scans"
    scans.mkdir()
    far = grid_affine((100, 120, 100), spacing, codes="LIA", centre=(30, -280, 190))
    known = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.15, -0.1) * 1.05, [30, -280, 190]
    )
    scan = save_brain(scans / "a_t1.nii.gz", *far, pull=np.linalg.inv(known), brain=head)
    source = nib.load(scan)
    labels = np.digitize(np.asarray(source.dataobj), [1, 60, 90, 120, 160]).astype(np.int32)
    nib.save(nib.Nifti1Image(labels, source.affine), scans / "a_labels.nii.gz")
    (scans / "bad.nii.gz").write_bytes(b"not an image")

    out = tmp_path / "out"
    command = ["prepare", str(scans), "-o", str(out), "--template", str(template)]
    assert main(command) == 1  # the bad one; the good one is there
    said = capsys.readouterr()
    assert "error: 1 of 2 scans failed: bad" in said.err
    assert "1 of 2 scans prepared" in said.out
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "a.nii.gz",
        "a_affine.txt",
        "a_labels.nii.gz",
        "prepared.json",
    ]
    manifest = json.loads((out / "prepared.json").read_text())
    assert manifest["scans"]["a"]["source"] == str(scans / "a_t1.nii.gz")
    assert manifest["shape"] == [160, 192, 160]
    assert manifest["normalisation"] == "p99.9"
    assert "bad" in manifest["failed"]

    image, carried = nib.load(out / "a.nii.gz"), nib.load(out / "a_labels.nii.gz")
    assert image.shape == (160, 192, 160)
    assert image.get_data_dtype() == np.float32
    assert carried.get_data_dtype() == np.uint16
    assert 0.9 < image.get_fdata().max() <= 1
    # aligned: as the template itself would be
    reference = tmp_path / "same"
    alone = ["prepare", str(template), "-o", str(reference), "--template", str(template)]
    assert main([*alone, "--affine", "none"]) == 0
    expected = nib.load(reference / "template.nii.gz").get_fdata()
    assert np.corrcoef(image.get_fdata().ravel(), expected.ravel())[0, 1] > 0.99
    # the transform that was kept: template RAS mm -> scan RAS mm
    text = (out / "a_affine.txt").read_text()
    assert text.startswith("# template world RAS mm -> scan world RAS mm")
    matrix = np.loadtxt(out / "a_affine.txt")
    points = np.array([[60.0, -75, 55], [-60, 75, -55], [0, 0, 0]])
    apply = nib.affines.apply_affine
    assert np.linalg.norm(apply(matrix, points) - apply(known, points), axis=1).max() < 0.5
    # labels went the same way
    brain, regions = image.get_fdata() > 0.05, carried.get_fdata() > 0
    assert (brain & regions).sum() > 0.9 * (brain | regions).sum()


@pytest.mark.follows("give --overwrite to replace them")
def test_a_second_run_needs_overwrite(tmp_path, capsys):
    template = save_brain(tmp_path / "t.nii.gz", *GEOMETRIES["LAS"])
    command = ["prepare", str(template), "-o", str(tmp_path / "o"), "--template", str(template)]
    command += [*SHAPE, "--affine", "none", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["scans"]["t"]["cut_off_percent"] == 0
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "holds prepared scans already" in said
    assert "hint: give --overwrite to replace them" in said
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers is 0"),
        (["--shape", "60", "80", "64"], "expected multiples of 16"),
        (["--affine", "rigid"], "invalid choice"),
    ],
)
def test_nonsense_is_usage(tmp_path, capsys, flags, message):
    command = ["prepare", str(tmp_path), "-o", str(tmp_path / "o"), "--template", "t.nii", *flags]
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.follows("give --workers 1", "use --shape 160 192 160")
@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--workers", "0"], "give --workers 1"),
        (["--shape", "60", "80", "64"], "use --shape 160 192 160"),
    ],
)
def test_nonsense_is_replaced_by_what_the_hint_gives(tmp_path, capsys, flags, hint):
    scan = str(save_brain(tmp_path / "a.nii.gz", *GEOMETRIES["RAS"]))
    command = ["prepare", scan, "-o", str(tmp_path / "o"), "--template", scan, "--affine", "none"]
    assert main([*command, *flags]) == 2
    assert f"hint: {hint}\n" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main([*command, *hint.split()[1:]]) == 0


@pytest.mark.follows("the reasons are above and in {}; the others are prepared", "renumber them")
def test_the_reason_and_what_to_do_are_where_the_hint_says(tmp_path, capsys):
    shape, affine = GEOMETRIES["RAS"]
    for name in "ab":
        save_brain(tmp_path / f"{name}.nii.gz", shape, affine)
    values = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj) > 60
    labels = nib.Nifti1Image(values * np.int32(70000), affine)
    nib.save(labels, tmp_path / "a_labels.nii.gz")
    out, template = tmp_path / "o", tmp_path / "b.nii.gz"
    command = ["prepare", str(tmp_path), "-o", str(out), "--template", str(template), *SHAPE]
    assert main([*command, "--affine", "none"]) == 1
    said = capsys.readouterr().err
    manifest = out / "prepared.json"
    assert f"hint: the reasons are above and in {manifest}; the others are prepared" in said
    reason = json.loads(manifest.read_text())["failed"]["a"]
    assert f"a left out: {reason}" in said
    assert reason.endswith("(renumber them)")
    assert (out / "b.nii.gz").exists()
    nib.save(nib.Nifti1Image(values.astype(np.int32), affine), tmp_path / "a_labels.nii.gz")
    assert main([*command, "--affine", "none", "--overwrite"]) == 0
    assert (out / "a_labels.nii.gz").exists()


def test_labels_beyond_16_bits_fail_that_scan_alone(tmp_path, capsys):
    scan = save_brain(tmp_path / "a.nii.gz", *GEOMETRIES["RAS"])
    labels = np.full(GEOMETRIES["RAS"][0], 70000, np.int32)
    nib.save(nib.Nifti1Image(labels, GEOMETRIES["RAS"][1]), tmp_path / "a_labels.nii.gz")
    out = tmp_path / "o"
    command = ["prepare", str(scan), "-o", str(out), "--template", str(scan), *SHAPE]
    assert main([*command, "--affine", "none"]) == 1
    said = capsys.readouterr().err
    assert "1 of 1 scans failed: a" in said
    assert f"hint: the reasons are above and in {out / 'prepared.json'}\n" in said
    assert (
        "labels from 0 to 70000" in json.loads((out / "prepared.json").read_text())["failed"]["a"]
    )
    assert sorted(os.listdir(out)) == [".lock", "prepared.json"]


@pytest.mark.follows("give another folder to -o")
@pytest.mark.parametrize("given", [".", "x.nii.gz", "list.txt"])
def test_the_folder_of_the_scans_is_not_written_to(tmp_path, capsys, monkeypatch, given):
    (tmp_path / "scans").mkdir()
    monkeypatch.chdir(tmp_path / "scans")
    save_brain(tmp_path / "scans" / "x.nii.gz", *GEOMETRIES["RAS"])
    (tmp_path / "scans" / "list.txt").write_text("x.nii.gz\n")
    flags = ["--template", "x.nii.gz", *SHAPE, "--affine", "none"]
    assert main(["prepare", given, "-o", str(tmp_path / "scans"), *flags]) == 2
    said = capsys.readouterr().err
    assert "scans is the folder of x.nii.gz, expected one without the scans" in said
    assert "hint: give another folder to -o" in said
    assert sorted(os.listdir()) == ["list.txt", "x.nii.gz"]
    assert main(["prepare", given, "-o", str(tmp_path / "o"), *flags]) == 0


@pytest.mark.follows("give --shape {}, which holds it")
def test_a_shape_too_small_for_the_template_and_one_that_holds_it(tmp_path, capsys):
    scan = str(save_brain(tmp_path / "a.nii.gz", *GEOMETRIES["RAS"]))
    command = ["prepare", scan, "-o", str(tmp_path / "o"), "--template", scan, "--affine", "none"]
    assert main([*command, "--shape", "16", "16", "16"]) == 2
    said = capsys.readouterr().err
    assert f"--shape 16 16 16 is too small for the brain of {scan}: 9" in said
    assert not (tmp_path / "o").exists()
    shape = said.partition("hint: give --shape ")[2].partition(",")[0].split()
    assert main([*command, "--shape", *shape]) == 0
    assert "cut off" not in capsys.readouterr().err


def test_a_template_that_no_shape_holds_is_told_to_check_its_unit(tmp_path, capsys):
    shape, affine = GEOMETRIES["RAS"]
    save_brain(tmp_path / "a.nii.gz", shape, affine)
    data = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    nib.save(nib.Nifti1Image(data, np.diag([20.0, 20, 20, 1]) @ affine), tmp_path / "a.nii.gz")
    scan = str(tmp_path / "a.nii.gz")
    assert main(["prepare", scan, "-o", str(tmp_path / "o"), "--template", scan]) == 2
    assert "hint: check the unit of its header, mm" in capsys.readouterr().err


def scans(path):
    return [(scan.name, scan.image.name, scan.labels) for scan in find_scans(path)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"id,image,label\nx,a.nii,s.nii\n", "the column 'label' is unknown"),
        (b"id,image,image\nx,a.nii,b.nii\n", "has the column image twice"),
        (b"id,labels\nx,a.nii\n", "has no column image, found id, labels"),
        (b"id;image;labels\nx;a.nii;s.nii\n", "line 1: its columns are separated by semicolons"),
        (b"a.nii;s.nii\n", "line 1: its columns are separated by semicolons, expected commas"),
        (b"a,b.nii,s.nii\n", "line 1: has 3 columns, expected 2 at most"),
        (b"id,image\nx,a,b.nii\n", "line 2: has 3 columns, expected 2 at most"),
        (b"id,image\nx,\n", "line 2: has a row without an image"),
        (b'id,image\nx,"a.nii\n', "is no readable list: line 2: is no CSV: unexpected end"),
        (b"id,image\nx,a\0.nii\n", "is no readable list: it has a zero byte in line 2"),
        ("id,image\nx,a.nii\n".encode("utf-16"), "it is UTF-16 text, expected UTF-8"),
        (b"id,image\nx,\xe4.nii\n", "it is not UTF-8 text: line 2"),
        (b"id,image\n../x,a.nii\n", "a scan named '../x', which cannot name its files"),
        (b"id,image\n.x,a.nii\n", "a scan named '.x', which cannot name its files"),
        (b"id,image\nx_labels,a.nii\n", "a scan named x_labels, as a label map is called"),
        (b"id,image\nx,a.nii\nX,b.nii\n", "more than one scan named X, x"),
        (b"x" * 140_000, "is no readable list: line 1: is no CSV: field larger than"),
    ],
)
def test_lists_that_would_be_misread(tmp_path, text, message):
    touch(tmp_path, "a.nii", "b.nii", "s.nii")
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(UsageError, match=message) as caught:
        find_scans(tmp_path / "list.csv")
    assert caught.value.hint


def test_hints_of_lists_of_scans_work(tmp_path):
    touch(tmp_path, "a,b.nii", "s.nii", "b.nii")
    right = [("x", "a,b.nii", tmp_path / "s.nii")]
    for wrong, hint, mended in (
        (
            "a,b.nii,s.nii\n",
            "quote paths with a comma in them",
            'id,image,labels\nx,"a,b.nii",s.nii',
        ),
        ("id;image\n", "with commas", 'id, image, labels\nx, "a,b.nii", s.nii'),
        ("id,image,label\n", "write it labels, or rename it", 'id,image,labels\nx,"a,b.nii",s.nii'),
        ("id,image\n/x,b.nii\n", "an id has up to 200", 'id,image,labels\nx,"a,b.nii",s.nii'),
        (
            "b.nii\n./b.nii\n",
            "with the columns id,image,labels",
            'id,image,labels\nx,"a,b.nii",s.nii',
        ),
    ):
        (tmp_path / "list.csv").write_text(wrong)
        with pytest.raises(UsageError) as caught:
            find_scans(tmp_path / "list.csv")
        assert hint in caught.value.hint
        (tmp_path / "list.csv").write_text("\ufeff" + mended, encoding="utf-8")
        assert scans(tmp_path / "list.csv") == right


def test_a_second_run_into_one_folder_is_told(tmp_path, capsys):
    template = save_brain(tmp_path / "t.nii.gz", *GEOMETRIES["LAS"])
    command = ["prepare", str(template), "-o", str(tmp_path / "o"), "--template", str(template)]
    command += [*SHAPE, "--affine", "none"]
    with locked_run(tmp_path / "o"):
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "another run is writing to" in said
    assert "hint: wait for it, stop it, or take another folder" in said
    assert main(command) == 0


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    template = save_brain(tmp_path / "t.nii.gz", *GEOMETRIES["LAS"])
    command = ["prepare", str(template), "-o", str(template), "--template", str(template), *SHAPE]
    assert main(command) == 1
    assert "t.nii.gz cannot be written to: File exists" in capsys.readouterr().err
