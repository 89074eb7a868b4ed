"""`ulae-rt register` and the Registrar: what they write, what they say, and what they refuse."""

import json
import logging
import os
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import ulae_rt
from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, centre_of, grid_affine, save_brain
from _support.engines import write_engine
from _support.networks import FakeMetadata, FakeNetwork
from _support.tolerances import TOL
from ulae_rt.cli import main
from ulae_rt.errors import CheckpointError, EngineMismatch, GeometryError, UsageError
from ulae_rt.imaging import nifti
from ulae_rt.registration import result as result_module
from ulae_rt.registration.network import load_network
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")


def register(pair, tmp_path, *flags, affine="none"):
    moving, fixed = (str(p) for p in pair)
    out = str(tmp_path / "moved.nii.gz")
    return main(["register", "-m", moving, "-f", fixed, "-o", out, "--affine", affine, *flags])


NO_TORCH = (1, ["error: torch is not installed", "hint: pip install 'ulae-rt[torch]'"])


def without_torch(folder, command, *line):
    """Status and standard error of a command where torch is not installed."""
    (folder / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    program = "from ulae_rt.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, command, *map(str, line)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# Opening the network ends the command: what it would have found is said.
SAYS_HOW_THREADS_WAIT = """
import os, sys
from ulae_rt import options
from ulae_rt.cli import main
from ulae_rt.errors import UsageError

def opened(*_, **__):
    raise UsageError(f"{os.environ.get('OMP_WAIT_POLICY')}, torch: {'torch' in sys.modules}", "-")

options.NetworkOptions.open = opened
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("given", "found"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")]
)
@pytest.mark.parametrize("command", ["register", "batch"])
def test_threads_that_wait_leave_the_core_to_others(pair, tmp_path, command, given, found):
    moving, fixed = (str(p) for p in pair)
    if command == "register":
        line = ["-m", moving, "-f", fixed, "-o", str(tmp_path / "moved.nii.gz")]
    else:
        (tmp_path / "pairs.csv").write_text(f"id,moving,fixed\na,{moving},{fixed}\n")
        line = [str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out")]
    left = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", SAYS_HOW_THREADS_WAIT, command, *line],
        env=left | given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"{found}, torch: False" in ran.stderr, ran.stderr


def test_everything_is_written_on_the_fixed_grid(pair, tmp_path, network, capsys):
    labels = np.digitize(nib.load(pair[0]).get_fdata(), [1, 60, 90, 120]).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, nib.load(pair[0]).affine), tmp_path / "seg.nii.gz")
    out = {k: str(tmp_path / f"{k}.nii.gz") for k in ("warp", "jacobian", "moved_labels")}
    status = register(
        pair,
        tmp_path,
        *("-w", out["warp"], "--jacobian", out["jacobian"], "--qc", str(tmp_path / "qc.png")),
        *("--labels", str(tmp_path / "seg.nii.gz"), "--moved-labels", out["moved_labels"]),
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    for word in ("similarity", "before", "after", "folding", "seconds", "network", "qc.png"):
        assert word in said.out
    fixed = nib.load(pair[1])
    for name in ("moved", "jacobian", "moved_labels"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert image.shape == fixed.shape
        for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "sform_code", "qform_code"):
            assert image.header[field].tobytes() == fixed.header[field].tobytes()
    # 1 voxel of 2 mm to the right everywhere, nothing else
    warp = nib.load(out["warp"])
    assert warp.shape == (*fixed.shape, 1, 3)
    disp = np.asarray(warp.dataobj)
    shift = np.broadcast_to([-2, 0, 0], disp.shape)
    assert_arrays_close("warp", disp, shift, TOL["displacement of a few mm float32"])
    jacobian = nib.load(out["jacobian"]).get_fdata()
    assert_arrays_close("jacobian", jacobian, 1, TOL["jacobian float32"])
    assert nib.load(out["moved_labels"]).get_data_dtype() == np.uint8
    # and ITK, told only of the files, agrees
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(out["warp"], sitk.sitkVectorFloat64))
    seen = sitk.Resample(
        sitk.ReadImage(str(pair[0])), sitk.ReadImage(str(pair[1])), transform, sitk.sitkLinear, 0.0,
        sitk.sitkFloat32,
    )  # fmt: skip
    moved = nib.load(tmp_path / "moved.nii.gz").get_fdata()
    inside = (slice(2, -2),) * 3
    seen = sitk.GetArrayFromImage(seen).transpose(2, 1, 0)
    assert_arrays_close("ITK", moved[inside], seen[inside], TOL["image by ITK"])


def test_json_is_one_object(pair, tmp_path, network, capsys):
    assert register(pair, tmp_path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["seconds"]) >= {"read", "affine", "preprocess", "network", "warp", "write"}
    assert said["outputs"] == {"moved": str(tmp_path / "moved.nii.gz")}
    assert said["folding_percent"] == 0
    assert said["similarity_after"] < said["similarity_before"]  # the brains met already
    assert np.array_equal(said["affine"], np.eye(4))


def test_the_network_sees_both_brains_aligned_on_its_grid(tmp_path, network):
    moving = save_brain(tmp_path / "m.nii.gz", *GEOMETRIES["far"])
    fixed = save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["PSR"])
    result = Registrar(network, affine="affine")(moving, fixed)
    offset = centre_of(*GEOMETRIES["far"]) - centre_of(*GEOMETRIES["PSR"])
    np.testing.assert_allclose(result.affine[:3, 3], offset, atol=0.5)
    seen_moving, seen_fixed = network.seen
    assert np.corrcoef(seen_moving.ravel(), seen_fixed.ravel())[0, 1] > 0.995
    assert result.stats.similarity_before > 0.99


def test_a_refined_pair_is_closer_and_says_what_it_took(pair, tmp_path, network, capsys, caplog):
    network.shift = (0.0, 1.0, 0.0)  # not to the right, where that of the mirror image undoes it
    assert register(pair, tmp_path, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["refinement"] is None
    warp = str(tmp_path / "warp.nii.gz")
    assert register(pair, tmp_path, "--refine", "12", "-w", warp, "--json", "--overwrite") == 0
    said = json.loads(capsys.readouterr().out)
    # The network moves brains apart that met already.
    gap = 1 - alone["similarity_after"]
    assert 1 - said["similarity_after"] < 0.5 * gap
    assert said["folding_percent"] == 0
    assert said["refinement"]["iterations"] == 12
    assert said["refinement"]["lncc_after"] > said["refinement"]["lncc_before"]
    assert said["seconds"]["refine"] > 10 * said["seconds"]["network"] > 0
    assert nib.load(warp).shape == (*nib.load(pair[1]).shape, 1, 3)

    assert register(pair, tmp_path, "--refine", "5", "--overwrite") == 0
    assert "refined     5 iterations, local correlation 0." in capsys.readouterr().out
    network.shift = (0.0, 0.0, 0.0)
    same = (pair[1], pair[1])
    assert register(same, tmp_path, "--refine", "5", "--overwrite") == 0
    assert "no gain: the network's displacement is kept" in caplog.text


def test_progress_says_each_stage_and_each_iteration(tmp_path, network):
    scan = save_brain(tmp_path / "m.nii.gz", *GEOMETRIES["PSR"])
    said = []
    Registrar(network, affine="com", refine=3)(scan, scan, progress=said.append)
    start = said.index("refine")
    assert said[start - 1 : start + 5] == [
        "network", "refine", "refine 1/3", "refine 2/3", "refine 3/3", "warp",
    ]  # fmt: skip


def test_a_displacement_the_network_finds_is_undone(tmp_path):
    """Moving is fixed shifted by 4 mm to the right; the right answer gives fixed back."""
    shape, affine = grid_affine((64, 80, 60), codes="LIA")
    shift = nib.affines.from_matvec(np.eye(3), [-4, 0, 0])
    fixed = save_brain(tmp_path / "f.nii.gz", shape, affine)
    moving = save_brain(tmp_path / "m.nii.gz", shape, affine, pull=shift)
    for metadata, voxels in ((FakeMetadata(), 2), (FakeMetadata((96, 128, 96), 1.0), 4)):
        right = FakeNetwork(shift=(voxels, 0, 0), metadata=metadata)
        result = Registrar(right, affine="none")(moving, fixed)
        assert result.stats.similarity_before < 0.97
        assert result.stats.similarity_after > 0.9999
        moved, expected = np.asarray(result.moved.dataobj), nib.load(fixed).get_fdata()
        assert_arrays_close("moved", moved[2:-2], expected[2:-2], TOL["image on its own voxels"])


def test_paths_images_and_arrays_give_the_same(pair, network):
    registrar = Registrar(network, affine="none")
    by_path = registrar(*pair)
    images = [nib.load(p) for p in pair]
    by_image = registrar(*images)
    by_array = registrar(*((np.asarray(i.dataobj), i.affine) for i in images))
    for other in (by_image, by_array):
        assert np.array_equal(np.asarray(other.moved.dataobj), np.asarray(by_path.moved.dataobj))
    with pytest.raises(UsageError, match="tuple of 3, expected"):
        registrar((1, 2, 3), pair[1])


def test_results_are_saved_from_python(pair, tmp_path, network):
    result = Registrar(network, affine="none")(*pair)
    paths = result.save(tmp_path / "a.nii.gz", str(tmp_path / "w.nii"), warp_format="ras")
    assert {p.name for p in paths} == {"a.nii.gz", "w.nii"}
    result.warp.save(tmp_path / "v.nii.gz", "voxel")
    assert nib.load(tmp_path / "v.nii.gz").shape == (*nib.load(pair[1]).shape, 3)
    with pytest.raises(UsageError, match="there are no moved labels"):
        result.save(moved_labels=tmp_path / "l.nii.gz")
    with pytest.raises(UsageError, match="named twice"):
        result.save(tmp_path / "x.nii", tmp_path / "x.nii")


def test_the_same_file_twice_works_and_says_so(pair, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = Registrar(FakeNetwork(), affine="none")(pair[0], pair[0])
    assert "moving and fixed are the same image" in caplog.text
    assert result.stats.similarity_after == pytest.approx(1)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--labels", "x.nii"], 2, "--labels and --moved-labels must come together"),
        (["--moved-labels", "x.nii"], 2, "--labels and --moved-labels must come together"),
        (["--qc", "picture.jpg"], 2, "--qc is picture.jpg, expected a .png"),
        (["-w", "warp.mha"], 2, "must end in .nii.gz or .nii"),
        (["-w", "warp.png"], 2, "must end in .nii.gz or .nii"),
        (["-w", "{moved}"], 2, "named twice as an output"),
        (["-w", "{moving}", "--overwrite"], 2, "is also an input"),
        (["-w", "{dir}/no/w.nii"], 1, "no does not exist"),
        (["-w", "{fixed_copy}"], 1, "exists already"),
        (["--device", "tpu"], 2, "--device is 'tpu', expected auto, cpu or cuda[:N]"),
        (["--weights", "a", "--engine", "b"], 2, "not allowed with argument"),
        (["--engine", "{dir}/none"], 1, "none is no engine: expected a folder"),
        (["--affine", "rigid"], 2, "invalid choice"),
        (["-m", "{dir}/missing.nii.gz"], 1, "missing.nii.gz does not exist"),
    ],
)
def test_mistakes_are_two_lines_and_leave_nothing(
    pair, tmp_path, network, capsys, flags, status, message
):
    (tmp_path / "there.nii").write_bytes(b"old")
    before = names(tmp_path)
    words = {
        "moved": tmp_path / "moved.nii.gz",
        "moving": pair[0],
        "dir": tmp_path,
        "fixed_copy": tmp_path / "there.nii",
    }
    try:
        got = register(pair, tmp_path, *(flag.format(**words) for flag in flags))
    except SystemExit as stop:
        got = stop.code
    said = capsys.readouterr().err.strip().splitlines()
    assert got == status
    assert message in said[0]
    assert said[0].startswith("error: ")
    assert said[1].startswith("hint: ")
    assert len(said) == 2
    assert names(tmp_path) == before
    assert network.seen is None


def test_an_existing_output_is_replaced_only_when_asked(pair, tmp_path, network):
    assert register(pair, tmp_path) == 0
    written = (tmp_path / "moved.nii.gz").read_bytes()
    assert register(pair, tmp_path) == 1
    (tmp_path / "moved.nii.gz").write_bytes(b"old")
    assert register(pair, tmp_path, "--overwrite") == 0
    assert (tmp_path / "moved.nii.gz").read_bytes() == written


@pytest.mark.follows("use --affine affine or --affine com, and check the two headers")
def test_brains_that_do_not_meet_are_refused(tmp_path, network, capsys):
    moving = save_brain(tmp_path / "m.nii.gz", *GEOMETRIES["far"])
    fixed = save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["RAS"])
    assert register((moving, fixed), tmp_path) == 1
    said = capsys.readouterr().err
    assert "error: 100 % of the brain of" in said
    assert "hint: use --affine affine or --affine com" in said
    with pytest.raises(GeometryError):
        Registrar(network, affine="none")(moving, fixed)
    assert register((moving, fixed), tmp_path, affine="com") == 0
    assert register((moving, fixed), tmp_path, "--overwrite", affine="affine") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("bad weights", "no")])
def test_a_failure_in_the_network_leaves_nothing(pair, tmp_path, network, error):
    before = names(tmp_path)
    network.answer = error
    status = register(pair, tmp_path, "-w", str(tmp_path / "w.nii.gz"))
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert names(tmp_path) == before


def test_a_failure_while_writing_leaves_nothing(pair, tmp_path, network, monkeypatch):
    before = names(tmp_path)
    save = result_module.save_image

    def second_fails(image, path):
        save(image, path)
        if "moved" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(result_module, "save_image", second_fails)
    assert register(pair, tmp_path, "-w", str(tmp_path / "w.nii.gz")) == 130
    assert names(tmp_path) == before


def test_a_picture_that_fails_leaves_nothing(pair, tmp_path, network, monkeypatch):
    import ulae_rt.imaging.qc as qc

    def fail(*_, **__):
        raise nifti.OutputError("no picture", "no hint")

    before = names(tmp_path)
    monkeypatch.setattr(qc, "qc_figure", fail)
    assert register(pair, tmp_path, "--qc", str(tmp_path / "q.png")) == 1
    assert names(tmp_path) == before


def test_answers_that_no_network_may_give(pair, tmp_path):
    wrong = FakeNetwork(answer=np.zeros((3, 4, 4, 4), np.float32))
    with pytest.raises(EngineMismatch, match=r"returned a displacement of \(3, 4, 4, 4\)"):
        Registrar(wrong, affine="none")(*pair)
    shape = (3, *FakeMetadata().shape)
    with pytest.raises(EngineMismatch, match="returned NaN or Inf"):
        Registrar(FakeNetwork(answer=np.full(shape, np.nan, np.float32)), affine="none")(*pair)
    odd = FakeNetwork(metadata=FakeMetadata(spacing_mm=1.5))
    with pytest.raises(CheckpointError, match=r"grid has 1\.5 mm, expected 1, 2"):
        Registrar(odd, affine="none")(*pair)


def test_choices_that_make_no_sense(tmp_path):
    with pytest.raises(UsageError, match="backend is 'tf', expected one of auto"):
        load_network(backend="tf")
    with pytest.raises(UsageError, match="precision is 'int8', expected one of auto, fp32"):
        load_network(precision="int8")
    with pytest.raises(UsageError, match="which torch does not run"):
        load_network(tmp_path, backend="torch")
    with pytest.raises(UsageError, match="backend onnxruntime needs an engine"):
        load_network("w.safetensors", backend="onnxruntime")
    with pytest.raises(UsageError, match="affine is 'rigid'"):
        Registrar(FakeNetwork(), affine="rigid")
    with pytest.raises(
        UsageError, match="refine is -1, expected a whole number of iterations from 0"
    ):
        Registrar(FakeNetwork(), refine=-1)


def test_the_registrar_is_reached_from_the_package():
    assert ulae_rt.Registrar is Registrar


RUN = """
import signal, sys, time
from pathlib import Path
# What a shell starts in the background, and all that it starts, ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from _support.networks import FakeNetwork
from ulae_rt import cli
from ulae_rt.registration import registrar, result
registrar.load_network = lambda *_, **__: FakeNetwork()
registrar.pose_of = lambda _: None
{body}
sys.exit(cli.main(sys.argv[1:]))
"""
SLOW = """
save = result.save_image
def slow(image, path):
    save(image, path)
    print("half", flush=True)
    time.sleep(1)
result.save_image = slow
"""


def process(body, pair, tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    code = RUN.format(tests=tests, body=body)
    flags = ["register", "-m", str(pair[0]), "-f", str(pair[1]), "-o", str(tmp_path / "o.nii.gz")]
    flags += ["-w", str(tmp_path / "w.nii.gz"), "--affine", "none", "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_no_file(pair, tmp_path, stop):
    before = names(tmp_path)
    with process(SLOW, pair, tmp_path) as running:
        assert running.stdout.readline().startswith(b"half")  # two threads write, both may say it
        assert len(names(tmp_path)) > len(before)  # hidden, half the set
        running.send_signal(stop)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.decode().strip() == "error: interrupted; nothing half-written was left behind"
    assert names(tmp_path) == before


@pytest.mark.parametrize("source", ["the shipped weights", "an engine"])
def test_without_torch_the_command_says_what_to_install(pair, tmp_path, source):
    """The base installation has no torch: engines run there, and no scan is registered."""
    line = ["-m", str(pair[0]), "-f", str(pair[1]), "-o", str(tmp_path / "moved.nii.gz")]
    if source == "an engine":
        line += ["--engine", str(write_engine(tmp_path / "engine"))]
    assert without_torch(tmp_path, "register", *line) == NO_TORCH
    assert not (tmp_path / "moved.nii.gz").exists()


def test_without_torch_no_command_ends_with_a_traceback(pair, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"id,moving,fixed\na,{pair[0]},{pair[1]}\n")
    out = tmp_path / "out"
    listed, transform = tmp_path / "pairs.csv", tmp_path / "t.nii.gz"
    for command, *line in (
        ("batch", listed, "-o", out),
        ("batch", listed, "-o", out, "--method", "affine"),
        ("apply", "-i", pair[0], "-r", pair[1], "-t", transform, "-o", tmp_path / "o.nii.gz"),
        ("evaluate", listed, "-o", out),
        ("prepare", pair[0], "-o", out, "--template", pair[1]),
    ):
        assert without_torch(tmp_path, command, *line) == NO_TORCH, command


def test_help_says_which_way_the_jacobian_points(capsys):
    with pytest.raises(SystemExit):
        main(["register", "-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert "below 1 where the moving image is expanded" in said
    assert "not its logarithm" in said


def test_a_jacobian_below_one_is_a_moving_image_that_is_expanded(tmp_path, network):
    """As the help says: a brain of 0.8 times the size fills the fixed one."""
    fixed = save_brain(tmp_path / "f.nii.gz", *GEOMETRIES["RAS"])
    small = nib.affines.from_matvec(np.eye(3) / 0.8)
    moving = save_brain(tmp_path / "m.nii.gz", *grid_affine((60, 76, 56)), pull=small)
    network.shift = (0, 0, 0)
    result = Registrar(network, affine="affine")(moving, fixed)
    assert np.median(result.jacobian) == pytest.approx(0.8**3, rel=0.1)


@pytest.mark.parametrize("command", ["register", "batch"])
def test_a_warp_format_without_a_warp_is_refused(pair, tmp_path, network, command, capsys):
    if command == "register":
        status = register(pair, tmp_path, "--warp-format", "ras")
    else:
        (tmp_path / "pairs.csv").write_text(f"id,moving,fixed\na,{pair[0]},{pair[1]}\n")
        line = ["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out")]
        status = main([*line, "--outputs", "moved", "--warp-format", "ras"])
    assert status == 2
    assert "--warp-format ras is given, and no warp is written" in capsys.readouterr().err


@pytest.mark.parametrize("refine", [2.5, "10", None, True, -1])
def test_a_number_of_iterations_that_is_none_is_refused(refine, network):
    with pytest.raises(UsageError, match="expected a whole number of iterations"):
        Registrar(network, refine=refine)


@pytest.mark.parametrize("scan", [None, np.zeros((3, 3, 3))])
def test_what_is_no_scan_is_refused(scan, pair, network):
    with pytest.raises(UsageError, match="expected a scan"):
        Registrar(network)(scan, pair[1])


@pytest.mark.follows("give --warp or --inverse-warp too, or leave --warp-format out")
@pytest.mark.parametrize("remedy", ["--warp", "--inverse-warp", None])
def test_a_format_of_no_warp_gets_a_warp_or_is_left_out(pair, tmp_path, network, capsys, remedy):
    form = ("--warp-format", "voxel")
    assert register(pair, tmp_path, *form) == 2
    said = capsys.readouterr().err
    assert "hint: give --warp or --inverse-warp too, or leave --warp-format out" in said
    more = (*form, remedy, str(tmp_path / "w.nii.gz")) if remedy else ()
    assert register(pair, tmp_path, *more) == 0
    assert (tmp_path / "w.nii.gz").exists() == bool(remedy)


@pytest.mark.follows("give both, or neither")
def test_labels_come_with_where_they_go_or_not_at_all(pair, tmp_path, network, capsys):
    labels = np.asarray(nib.load(pair[0]).dataobj) > 60
    image = nib.Nifti1Image(labels.astype(np.uint8), nib.load(pair[0]).affine)
    nib.save(image, tmp_path / "seg.nii.gz")
    flags = ("--labels", str(tmp_path / "seg.nii.gz"))
    assert register(pair, tmp_path, *flags) == 2
    assert "hint: give both, or neither" in capsys.readouterr().err
    assert register(pair, tmp_path) == 0
    out = ("--moved-labels", str(tmp_path / "out.nii.gz"), "--overwrite")
    assert register(pair, tmp_path, *flags, *out) == 0


@pytest.mark.follows("rename it")
def test_a_picture_is_a_png(pair, tmp_path, network, capsys):
    assert register(pair, tmp_path, "--qc", str(tmp_path / "qc.jpg")) == 2
    said = capsys.readouterr().err
    assert "expected a .png file" in said
    assert "hint: rename it" in said
    assert register(pair, tmp_path, "--qc", str(tmp_path / "qc.png")) == 0


@pytest.mark.follows("give --device cpu, or leave it out to take the GPU where there is one")
@pytest.mark.parametrize("remedy", [("--device", "cpu"), ()])
def test_a_device_that_is_none_is_named_or_left_out(pair, tmp_path, network, capsys, remedy):
    assert register(pair, tmp_path, "--device", "gpu") == 2
    assert "hint: give --device cpu, or leave it out to take the GPU" in capsys.readouterr().err
    assert register(pair, tmp_path, *remedy) == 0


@pytest.mark.follows("give --refine 10, or leave it out")
@pytest.mark.parametrize("remedy", [("--refine", "10"), ()])
def test_iterations_that_are_none_are_given_or_left_out(pair, tmp_path, network, capsys, remedy):
    assert register(pair, tmp_path, "--refine", "-1") == 2
    assert "hint: give --refine 10, or leave it out" in capsys.readouterr().err
    assert register(pair, tmp_path, *remedy) == 0


@pytest.mark.follows("use --affine com, and check that both images show one whole skull-stripped")
def test_an_affine_that_fails_leaves_the_centres_of_mass(
    pair, tmp_path, network, capsys, monkeypatch
):
    monkeypatch.setattr("ulae_rt.imaging.affine._search", lambda *_: np.diag([0.6, 0.6, 0.6, 1.0]))
    assert register(pair, tmp_path, affine="affine") == 1
    assert "hint: use --affine com, and check that both images show" in capsys.readouterr().err
    assert register(pair, tmp_path, affine="com") == 0


@pytest.mark.follows("use --precision fp32; if that is what ran, the weights are damaged")
def test_a_network_that_overflows_runs_in_fp32(pair, tmp_path, capsys, monkeypatch):
    nan = np.full((3, *FakeMetadata().shape), np.nan, np.float32)

    def opened(*_, precision, **__):
        return FakeNetwork(answer=nan if precision == "bf16" else None)

    monkeypatch.setattr("ulae_rt.registration.registrar.load_network", opened)
    assert register(pair, tmp_path, "--precision", "bf16") == 1
    said = capsys.readouterr().err
    assert "the network returned NaN or Inf" in said
    assert "hint: use --precision fp32; if that is what ran" in said
    assert register(pair, tmp_path, "--precision", "fp32") == 0


def refusal_of(**arguments):
    with pytest.raises(UsageError) as caught:
        Registrar(FakeNetwork(), **arguments)
    return caught.value.hint


@pytest.mark.follows("give refine=10, or leave it out", "give affine='affine', or leave it out")
def test_from_python_a_choice_is_a_keyword_or_left_out():
    assert refusal_of(refine=True) == "give refine=10, or leave it out"
    assert Registrar(FakeNetwork(), refine=10).refine == 10
    assert refusal_of(affine="rigid") == "give affine='affine', or leave it out"
    assert Registrar(FakeNetwork(), affine="affine").affine == Registrar(FakeNetwork()).affine


@pytest.mark.follows("give a path, a nibabel image, or (array, affine)")
@pytest.mark.parametrize("form", ["path", "image", "array"])
def test_a_scan_is_given_in_one_of_three_forms(pair, form):
    registrar = Registrar(FakeNetwork(), affine="none")
    with pytest.raises(UsageError) as caught:
        registrar((1, 2, 3), pair[1])
    assert caught.value.hint == "give a path, a nibabel image, or (array, affine)"
    image = nib.load(pair[0])
    forms = {"path": pair[0], "image": image, "array": (np.asarray(image.dataobj), image.affine)}
    assert registrar(forms[form], pair[1]).moved.shape == nib.load(pair[1]).shape


@pytest.mark.follows("give labels to the registrar")
def test_moved_labels_come_from_labels(pair, tmp_path, network):
    out = tmp_path / "l.nii.gz"
    registrar = Registrar(network, affine="none")
    with pytest.raises(UsageError, match="there are no moved labels") as caught:
        registrar(*pair).save(moved_labels=out)
    assert caught.value.hint == "give labels to the registrar"
    image = nib.load(pair[0])
    labels = ((np.asarray(image.dataobj) > 60).astype(np.uint8), image.affine)
    registrar(*pair, labels=labels).save(moved_labels=out)
    assert np.asarray(nib.load(out).dataobj).any()


@pytest.mark.follows("look at the result (register --qc, or batch's summary.html)")
def test_a_doubtful_pair_can_be_looked_at(tmp_path, network, capsys):
    right = save_brain(tmp_path / "right.nii.gz", *GEOMETRIES["RAS"])
    fixed = save_brain(tmp_path / "fixed.nii.gz", *GEOMETRIES["LIA"])
    image = nib.load(right)
    data = np.asarray(image.dataobj)
    odd = tmp_path / "odd.nii.gz"  # no T1 brain: bright where one is dark
    nib.save(nib.Nifti1Image(np.where(data > 0, 201 - data, 0), image.affine), odd)
    assert register((odd, fixed), tmp_path) == 0
    assert "look at the result (register --qc, or batch's summary.html)" in capsys.readouterr().err
    picture = tmp_path / "qc.png"
    assert register((odd, fixed), tmp_path, "--qc", str(picture), "--overwrite") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "pairs.csv").write_text(f"id,moving,fixed\na,{odd},{fixed}\n")
    line = ["batch", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out")]
    assert main([*line, "--affine", "none"]) == 0
    assert "data:image" in (tmp_path / "out" / "summary.html").read_text()
    capsys.readouterr()
    # ... and with a T1 brain in its place there is nothing to say.
    assert register((right, fixed), tmp_path, "--overwrite") == 0
    assert "warning" not in capsys.readouterr().err


def test_saving_never_replaces_the_pair_s_own_scans(pair, network):
    before = pair[0].read_bytes(), pair[1].read_bytes()
    result = Registrar(network, affine="none")(str(pair[0]), str(pair[1]))
    for scan in pair:
        with pytest.raises(UsageError, match="is also an input"):
            result.save(scan, overwrite=True)
    assert (pair[0].read_bytes(), pair[1].read_bytes()) == before


@pytest.mark.follows("give a path for warp or inverse_warp too, or leave it out")
@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (5, {}, "moved is int '5', expected a path"),
        (b"x.nii.gz", {}, "moved is bytes"),
        ("", {}, "moved is '', expected a path"),
        ("o.nii.gz", {"overwrite": "no"}, "overwrite is 'no', expected True or False"),
        ("o.nii.gz", {"warp_format": "ras"}, "warp_format is 'ras', and no warp is written"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    pair, network, tmp_path, monkeypatch, path, options, message
):
    monkeypatch.chdir(tmp_path)
    result = Registrar(network, affine="none")(str(pair[0]), str(pair[1]))
    with pytest.raises(UsageError, match=message):
        result.save(path, **options)
    with pytest.raises(UsageError, match="expected a path"):
        result.warp.save(5)
    assert not (tmp_path / "o.nii.gz").exists()
    result.save("o.nii.gz")
    result.save(warp="w.nii.gz", warp_format="ras")


def test_an_empty_path_is_no_scan(pair, network):
    with pytest.raises(UsageError, match="moving is '', expected a path"):
        Registrar(network)("", str(pair[1]))
