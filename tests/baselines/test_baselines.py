"""Other packages' registrations, told in our terms: what they see is what we write."""

import json
import os
import signal
import sys
import tempfile
import threading

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, brain_at, centre_of, grid_affine, save_brain, world
from _support.tolerances import TOL
from ulae_rt.baselines import packages
from ulae_rt.baselines.method import Baseline
from ulae_rt.baselines.options import BASELINES, BaselineOptions
from ulae_rt.baselines.packages import Job
from ulae_rt.baselines.process import PackageProcess
from ulae_rt.batching.pairs import Pair
from ulae_rt.batching.pipeline import Pipeline, Wanted
from ulae_rt.batching.results import ResultsFolder, read_results
from ulae_rt.cli import run_command
from ulae_rt.errors import BackendUnavailable, BaselineError, PairsError, UsageError
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.image import as_array, file_order, image_of, resample
from ulae_rt.imaging.itk import from_sitk
from ulae_rt.imaging.nifti import read_volume, volume_from_array
from ulae_rt.imaging.transform import Deformation, warp_image
from ulae_rt.registration.registrar import finish

# Coarse, so that SyN takes a second; no axis where another would be.
FIXED = {
    "LAS": grid_affine((34, 42, 30), (2, 2, 2), "LAS"),
    "anisotropic": grid_affine((34, 34, 20), (2, 2.6, 3), "LPS"),
    "oblique-PIR": grid_affine((36, 40, 24), (2, 2.2, 3), "PIR", (20, -10, 15), (12, -30, 40)),
}


def job_on(name: str) -> Job:
    """A fixed brain about 0 of its grid, and one that lies elsewhere, larger and turned."""
    shape, grid = FIXED[name]
    centred = nib.affines.from_matvec(np.eye(3), -centre_of(shape, grid))
    fixed = brain_at(nib.affines.apply_affine(centred, world(shape, grid)))
    moving_shape, moving_grid = grid_affine((56, 68, 50), (1.6, 1.6, 1.6), "LIA")
    turn = nib.eulerangles.euler2mat(0.1, 0.05, -0.1) @ np.diag([1.1, 1, 0.95])
    pull = nib.affines.from_matvec(turn, (3, -4, 2))
    moving = brain_at(nib.affines.apply_affine(pull, world(moving_shape, moving_grid)))
    affine = np.linalg.inv(pull) @ centred
    affine[:3, 3] += (2, -1, 1)  # leaves something to the deformation
    return Job(np.float32(moving), moving_grid, np.float32(fixed), grid, affine)


def ours(job: Job, u_mm: np.ndarray) -> np.ndarray:
    """Moved as every method's is."""
    grid = Grid(job.fixed.shape, job.fixed_grid)
    disp = np.tensordot(np.linalg.inv(grid.affine[:3, :3]), u_mm, (1, 3)).astype(np.float32)
    moving = image_of(volume_from_array(job.moving, job.moving_grid, name="moving"))
    deformation = Deformation(torch.from_numpy(disp)[None], grid, job.affine)
    to = file_order(grid)
    return as_array(warp_image(moving, deformation.sample(to), to))


@pytest.mark.parametrize("name", FIXED)
def test_syn_moves_as_ants_itself_does(name, tmp_path, monkeypatch):
    ants = pytest.importorskip("ants")
    monkeypatch.chdir(tmp_path)
    job = job_on(name)
    u_mm = packages.syn(job, 1)
    assert np.linalg.norm(u_mm, axis=-1).max() > 1
    theirs = ants.apply_transforms(
        packages._to_ants(ants, job.fixed, job.fixed_grid),
        packages._to_ants(ants, job.moving, job.moving_grid),
        ["syn-1Warp.nii.gz", "syn-0GenericAffine.mat"],
    ).numpy()
    assert_arrays_close("ANTs", ours(job, u_mm), theirs, TOL["image by others"])
    assert np.corrcoef(theirs.ravel(), job.fixed.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", FIXED)
def test_greedy_moves_as_greedy_itself_does(name, tmp_path, monkeypatch):
    package = pytest.importorskip("picsl_greedy")
    kept = []

    class Kept(package.Greedy3D):
        def __init__(self):
            super().__init__()
            kept.append(self)

    monkeypatch.setattr(package, "Greedy3D", Kept)
    monkeypatch.chdir(tmp_path)
    job = job_on(name)
    u_mm = packages.greedy(job, 1)
    assert np.linalg.norm(u_mm, axis=-1).max() > 1
    kept[0].execute(
        "-threads 1 -rf fixed -ri LINEAR -rm moving moved -r warp affine.mat", moved=None
    )
    theirs = from_sitk(kept[0]["moved"])
    np.testing.assert_array_equal(u_mm, packages.greedy(job, 1))  # the same every time
    assert_arrays_close("greedy", ours(job, u_mm), theirs, TOL["image by others"])
    assert np.corrcoef(theirs.ravel(), job.fixed.ravel())[0, 1] > 0.98


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary files"  # a space, as some have
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_process_answers_job_after_job_and_leaves_nothing(temporary, capfd):
    pytest.importorskip("picsl_greedy")
    job = job_on("anisotropic")
    process = PackageProcess("greedy", 1)
    first = process.run(job)
    assert first.shape == (*job.fixed.shape, 3)
    assert first.dtype == np.float32
    running = process._running
    np.testing.assert_array_equal(process.run(job), first)
    assert process._running is running
    assert [path.name[:8] for path in temporary.iterdir()] == ["ulae-rt-"]
    del process
    assert running[0].poll() is not None
    assert not list(temporary.iterdir())
    assert capfd.readouterr() == ("", "")


def test_what_the_package_says_is_the_error(temporary):
    pytest.importorskip("picsl_greedy")
    job = job_on("anisotropic")
    process = PackageProcess("greedy", 1)
    flat = Job(job.moving[:, :, 0], job.moving_grid, job.fixed, job.fixed_grid, job.affine)
    with pytest.raises(BaselineError, match="greedy failed: "):
        process.run(flat)
    assert process.run(job).shape == (*job.fixed.shape, 3)
    process.close()


def test_a_crash_is_an_error_and_the_next_job_runs(temporary):
    pytest.importorskip("picsl_greedy")
    job = job_on("anisotropic")
    process = PackageProcess("greedy", 1)
    process.run(job)
    os.kill(process._running[0].pid, signal.SIGKILL)
    with pytest.raises(BaselineError, match="greedy ended with status -9: ") as caught:
        process.run(job)
    assert "memory" in caught.value.hint
    assert not list(temporary.iterdir())
    assert process.run(job).shape == (*job.fixed.shape, 3)
    process.close()
    assert not list(temporary.iterdir())


def test_the_process_ends_when_nobody_is_there_any_more(temporary):
    pytest.importorskip("picsl_greedy")
    process = PackageProcess("greedy", 1)
    child, folder = process._start()
    child.stdin.close()  # as when this process was killed
    assert child.wait(60) == 0
    assert not folder.exists()


@pytest.mark.parametrize(("name", "module"), [("syn", "ants"), ("greedy", "picsl_greedy")])
def test_a_missing_package_is_said_before_any_work(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=f"{module} ") as caught:
        BaselineOptions(name).open()
    assert "pip install 'ulae-rt[baselines]'" in caught.value.hint


def test_an_unknown_baseline():
    with pytest.raises(UsageError, match="'elastix', expected one of affine, syn, greedy"):
        Baseline("elastix")


def test_settings_name_the_package_and_its_version():
    pytest.importorskip("picsl_greedy")
    found = Baseline("greedy", "com").settings
    assert found["method"] == "greedy"
    assert found["affine"] == "com"
    assert found["made_by"].startswith("picsl_greedy 1.")
    assert "-m NCC 2x2x2 -n 100x100x40 -s 1.6vox 0.7vox" in found["made_by"]
    assert Baseline("affine").settings["made_by"] == "affine alignment only"


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    save_brain(folder / "fixed.nii.gz", *FIXED["oblique-PIR"])
    shape, grid = GEOMETRIES["LAS"]
    save_brain(folder / "moving.nii.gz", shape, grid, pull=np.diag([1.2, 0.9, 1.1, 1]))
    return folder


def test_affine_only_is_the_affine(scans):
    baseline = Baseline("affine", "com")
    pair = baseline.prepare(scans / "moving.nii.gz", baseline.target(scans / "fixed.nii.gz"))
    result = finish(pair, baseline.deform([pair])[0])
    moving, fixed = read_volume(scans / "moving.nii.gz"), read_volume(scans / "fixed.nii.gz")
    expected = as_array(resample(image_of(moving), image_of(fixed).grid, pair.affine))
    assert not np.array_equal(pair.affine, np.eye(4))
    assert_arrays_close(
        "moved", result.moved.get_fdata(), expected, TOL["image in our own two ways"]
    )
    determinant = np.linalg.det(pair.affine[:3, :3])
    assert_arrays_close("jacobian", result.jacobian, determinant, TOL["jacobian float32"])


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_is_written_as_the_network_s(name, scans, tmp_path):
    if name != "affine":
        pytest.importorskip({"syn": "ants", "greedy": "picsl_greedy"}[name])
    pairs = [
        Pair("good", scans / "moving.nii.gz", scans / "fixed.nii.gz"),
        Pair("bad", scans / "none.nii.gz", scans / "fixed.nii.gz"),
    ]
    baseline = BaselineOptions(name, "com").open()
    with ResultsFolder(tmp_path, None, baseline.settings) as folder:
        folder.begin(pairs, resume=False)
        pipeline = Pipeline(baseline, folder, Wanted(), workers=2, batch_size=baseline.at_once)
        rows = {row.id: row for row in pipeline.run(pairs, threading.Event())}
    assert rows["bad"].error.endswith("none.nii.gz does not exist")
    good = rows["good"]
    assert good.status == "done"
    assert sorted(good.outputs) == ["moved", "warp"]
    if name != "affine":
        assert good.similarity_after > good.similarity_before
    # SimpleITK reads the warp and finds the moved image.
    warp = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(tmp_path / good.outputs["warp"]), sitk.sitkVectorFloat64)
    )
    fixed, moving = (
        sitk.ReadImage(str(scans / f"{scan}.nii.gz"), sitk.sitkFloat32)
        for scan in ("fixed", "moving")
    )
    moved = nib.load(tmp_path / good.outputs["moved"]).get_fdata()
    expected = from_sitk(sitk.Resample(moving, fixed, warp, sitk.sitkLinear))
    assert_arrays_close("ITK", moved, expected, TOL["image by ITK"])


def batch(scans, out, *more):
    (scans / "pairs.csv").write_text("id,moving,fixed\na,moving.nii.gz,fixed.nii.gz\n")
    return run_command("batch", [str(scans / "pairs.csv"), "-o", str(out), *more])


def test_the_command_registers_with_a_baseline(scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert batch(scans, out, "--method", "affine", "--affine", "com") == 0
    assert "method      affine alignment only\n" in capsys.readouterr().out
    settings = json.loads((out / "run.json").read_text())
    assert (settings["method"], settings["affine"]) == ("affine", "com")
    [row] = read_results(out)
    assert row.status == "done"
    similarity = row.similarity_after, row.similarity_before
    assert_arrays_close("similarity", *similarity, TOL["similarity of one image"])
    assert row.folding_percent == 0
    # Another method's results do not mix with these.
    assert batch(scans, out, "--method", "affine", "--affine", "none", "--resume") == 1
    assert "was begun with affine com, now it is none" in capsys.readouterr().err
    network = {"method": "network", "weights_sha256": "0" * 64}  # other settings by name, too
    with pytest.raises(PairsError, match="was begun with method affine, now it is network"):
        ResultsFolder(out, None, network).__enter__()


@pytest.mark.parametrize(
    "flags",
    [
        ["--weights", "x.safetensors"],
        ["--backend", "torch"],
        ["--device", "cpu"],
        ["--precision", "fp16"],
        ["--refine", "10"],
    ],
)
def test_flags_of_the_network_are_refused_with_a_baseline(flags, scans, tmp_path, capsys):
    assert batch(scans, tmp_path / "out", "--method", "affine", *flags) == 2
    assert "error: --method affine runs no network\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.follows(
    "leave out --weights, --engine, --backend, --device, --precision and --refine",
    "leave out --batch-size",
)
@pytest.mark.parametrize("source", ["--weights", "--engine"])
def test_flags_that_a_baseline_has_no_use_for_are_left_out(source, scans, tmp_path, capsys):
    place = tmp_path if source == "--engine" else tmp_path / "w.safetensors"
    given = {
        source: str(place), "--backend": "torch", "--device": "cpu", "--precision": "fp32",
        "--refine": "10", "--batch-size": "2",
    }  # fmt: skip
    line = ("--method", "affine", "--affine", "none", "--pictures", "0")
    for _ in range(2):  # the network's flags first, then the batch's size
        flags = [word for flag in given.items() for word in flag]
        assert batch(scans, tmp_path / "out", *line, *flags) == 2
        hint = capsys.readouterr().err.splitlines()[-1]
        assert hint.startswith("hint: leave out --")
        given = {flag: value for flag, value in given.items() if flag not in hint}
    assert given == {}
    assert batch(scans, tmp_path / "out", *line) == 0


@pytest.mark.follows(
    "'affine' needs no other package, 'syn' and 'greedy' need 'ulae-rt[baselines]'"
)
@pytest.mark.parametrize("name", ["affine", "syn", "greedy"])
def test_a_baseline_that_there_is_not_is_one_of_three(name):
    with pytest.raises(UsageError) as caught:
        Baseline("elastix")
    assert f"'{name}'" in caught.value.hint
    if name != "affine":
        pytest.importorskip({"syn": "ants", "greedy": "picsl_greedy"}[name])
    assert Baseline(name).settings["method"] == name


@pytest.mark.follows("a negative status is a signal: -9 is often too little memory")
def test_a_status_is_the_signal_that_the_hint_says():
    pytest.importorskip("picsl_greedy")
    process = PackageProcess("greedy", 1)
    child, _ = process._start()
    child.kill()  # as the kernel does where memory runs out
    with pytest.raises(BaselineError, match=rf"ended with status {-signal.SIGKILL}: ") as caught:
        process.run(job_on("anisotropic"))
    assert caught.value.hint == "a negative status is a signal: -9 is often too little memory"
    process.close()


def test_a_gpu_by_number_is_ray_s_to_choose(scans, tmp_path, capsys):
    assert batch(scans, tmp_path / "out", "--ray", "--device", "cuda:1") == 2
    assert "--device cuda:1 with --ray" in capsys.readouterr().err
