"""Warps that `ulae-rt register` writes: the way back, and Learn2Reg's format."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close
from _support.brains import GEOMETRIES, save_brain, world
from _support.networks import FakeNetwork
from _support.tolerances import TOL
from ulae_rt.cli import main
from ulae_rt.imaging.warpfile import read_warp
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")

# Those of the fixture `pair`.
FIXED, MOVING = GEOMETRIES["oblique"], GEOMETRIES["LIA"]


@pytest.fixture
def folder(pair, tmp_path):
    return tmp_path


def register(folder, *flags, moving="moving", affine="none"):
    files = [str(folder / f"{name}.nii.gz") for name in (moving, "fixed", "moved")]
    command = ["register", "-m", files[0], "-f", files[1], "-o", files[2], "--affine", affine]
    return main([*command, *(flag.format(dir=folder) for flag in flags)])


def bumps(amplitude):
    """A smooth displacement of the fake network's grid, voxels of 2 mm."""
    d, h, w = np.meshgrid(*(np.arange(n) / 4 for n in (48, 64, 48)), indexing="ij")
    parts = np.sin(d) * np.cos(h), np.cos(h + 1) * np.sin(w), np.sin(d + 2) * np.cos(w)
    return (amplitude * np.stack(parts)).astype(np.float32)


def values(path):
    return np.asanyarray(nib.load(path).dataobj)


@pytest.mark.parametrize("fmt", ["itk", "ras", "voxel"])
def test_the_way_back_lies_on_the_moving_grid(folder, network, capsys, fmt):
    flags = ["--inverse-warp", "{dir}/back.nii.gz", "--warp-format", fmt]
    assert register(folder, *flags, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    written, moving = (nib.load(folder / f"{name}.nii.gz") for name in ("back", "moving"))
    assert written.shape[:3] == moving.shape
    np.testing.assert_array_equal(written.affine, moving.affine)
    back = read_warp(folder / "back.nii.gz").disp
    shift = np.broadcast_to([-2, 0, 0], back.shape)
    assert_arrays_close("back", back, shift, TOL["displacement of a few mm float32"])
    consistency = said["inverse_consistency"]
    assert set(consistency) == {"mean_mm", "p99_mm", "max_mm", "outside_percent"}
    assert 0 <= consistency["mean_mm"] <= consistency["max_mm"]
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("there and back", consistency["max_mm"], 0, few)
    assert said["outputs"]["inverse_warp"] == str(folder / "back.nii.gz")
    assert said["seconds"]["inverse"] > 0


def test_the_fixed_image_goes_back_to_the_moving_one(folder, network, capsys):
    """Aligned brains, bent by the network: bent back on top of that, they are aligned again."""
    network.answer = bumps(1.2)
    flags = ["-w", "{dir}/warp.nii.gz", "--inverse-warp", "{dir}/back.nii.gz"]
    assert register(folder, *flags) == 0
    assert "there and back" in capsys.readouterr().out
    command = ["apply", "-i", "moved", "-r", "moving", "-t", "back", "-o", "again"]
    files = [word if len(word) < 3 else f"{folder}/{word}.nii.gz" for word in command[1:]]
    assert main(["apply", *files]) == 0
    again, moving, moved = (
        values(folder / f"{name}.nii.gz") for name in ("again", "moving", "moved")
    )
    inside = tuple(slice(n // 4, -n // 4) for n in moving.shape)
    assert np.corrcoef(again[inside].ravel(), moving[inside].ravel())[0, 1] > 0.99
    fixed = values(folder / "fixed.nii.gz")
    assert np.corrcoef(moved.ravel(), fixed.ravel())[0, 1] < 0.98  # it had been bent


@pytest.mark.follows("give the inverse warp: register --inverse-warp writes it")
def test_in_place_of_a_warp_s_inverse_there_is_one_to_give(folder, network, capsys):
    files = [
        word if len(word) < 3 else f"{folder}/{word}.nii.gz"
        for word in ("-i", "fixed", "-r", "moving", "-o", "out")
    ]
    assert register(folder, "-w", "{dir}/warp.nii.gz") == 0
    assert main(["apply", *files, "-t", f"[{folder}/warp.nii.gz,1]"]) == 2
    assert "hint: give the inverse warp: register --inverse-warp" in capsys.readouterr().err
    assert register(folder, "--overwrite", "--inverse-warp", "{dir}/back.nii.gz") == 0
    assert main(["apply", *files, "-t", f"{folder}/back.nii.gz"]) == 0
    assert values(folder / "out.nii.gz").max() > 100


@pytest.mark.follows("give a dense displacement in NIfTI, as register -w writes")
@pytest.mark.parametrize("wrong", ["an image", "colours"])
def test_what_is_no_warp_is_one_once_register_writes_it(folder, network, capsys, wrong):
    data = values(folder / "fixed.nii.gz")
    if wrong == "colours":
        data = np.zeros((*data.shape, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(data, FIXED[1]), folder / "warp.nii.gz")
    files = [
        word if len(word) < 3 else f"{folder}/{word}.nii.gz"
        for word in ("-i", "moving", "-r", "fixed", "-t", "warp", "-o", "out")
    ]
    assert main(["apply", *files]) == 1
    assert "hint: give a dense displacement in NIfTI, as register -w" in capsys.readouterr().err
    assert register(folder, "--overwrite", "-w", "{dir}/warp.nii.gz") == 0
    assert main(["apply", *files]) == 0
    assert values(folder / "out.nii.gz").max() > 100


def test_the_error_there_and_back_is_what_scipy_finds(folder, network):
    result = Registrar(FakeNetwork(answer=bumps(1.2)), affine="com")(
        folder / "moving.nii.gz", folder / "fixed.nii.gz"
    )
    there = world(*FIXED) + result.warp.disp
    index = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(MOVING[1]), there), -1, 0)
    back = [
        map_coordinates(result.inverse.disp[..., c].astype(float), index, order=1, mode="nearest")
        for c in range(3)
    ]
    error = np.linalg.norm(there + np.stack(back, -1) - world(*FIXED), axis=-1)
    reaches = ((index >= -0.5) & (index <= np.array(MOVING[0])[:, None, None, None] - 0.5)).all(0)
    brain = values(folder / "fixed.nii.gz") > 0
    counted = error[brain & reaches]
    found = result.inverse_consistency
    assert_arrays_close(
        "there and back",
        [found.mean_mm, found.p99_mm, found.max_mm],
        [counted.mean(), np.percentile(counted, 99), counted.max()],
        TOL["displacement of a few mm float32"],
    )
    # All that is left is the inverse's interpolation between voxels of 1 mm.
    assert 0.001 < found.mean_mm < 0.05


def test_a_fold_is_measured_and_written(folder, network, capsys):
    network.answer = bumps(1.0)
    network.answer[0, 22:26, 24:40, 16:32] += np.float32([4, 4, -4, -4])[:, None, None]
    assert register(folder, "--inverse-warp", "{dir}/back.nii.gz", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folding_percent"] > 0
    assert said["inverse_consistency"]["max_mm"] > 2
    assert np.isfinite(values(folder / "back.nii.gz")).all()


def test_without_an_inverse_nothing_is_said_of_it(folder, network, capsys):
    assert register(folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["inverse_consistency"] is None
    assert "inverse" not in said["seconds"]
    assert said["seconds"]["network"] > 0


def test_the_way_back_is_saved_from_python(folder):
    result = Registrar(FakeNetwork(shift=(0, 1, 0)), affine="none")(
        folder / "moving.nii.gz", folder / "fixed.nii.gz"
    )
    result.save(inverse_warp=folder / "back.nii.gz", warp_format="ras")
    assert result.inverse.disp.shape == (*MOVING[0], 3)
    np.testing.assert_array_equal(values(folder / "back.nii.gz"), result.inverse.disp)


def test_learn2regs_format_for_images_on_one_grid(folder, network):
    save_brain(folder / "same.nii.gz", *FIXED)
    flags = ["-w", "{dir}/disp_0001_0002.npz", "--inverse-warp", "{dir}/disp_0002_0001.nii.gz"]
    assert register(folder, *flags, "--warp-format", "l2r", moving="same") == 0
    step = np.linalg.inv(FIXED[1][:3, :3]) @ [2, 0, 0]
    with np.load(folder / "disp_0001_0002.npz") as arrays:
        disp = arrays[arrays.files[0]]
    step = np.broadcast_to(step, (*FIXED[0], 3))
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("there", disp, step, few)
    back = values(folder / "disp_0002_0001.nii.gz")
    assert_arrays_close("back", back, -disp, few)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["-w", "{dir}/w.npz", "--warp-format", "l2r"], 1,
         "the moving image on the fixed image's grid: 60x56x76 voxels instead of 64x64x36"),
        (["--inverse-warp", "{dir}/w.npz", "--warp-format", "l2r"], 1, "format l2r needs"),
        (["--inverse-warp", "{dir}/w.npz"], 2, "must end in .nii.gz or .nii"),
        (["-w", "{dir}/w.nii", "--inverse-warp", "{dir}/w.nii"], 2, "named twice as an output"),
        (["--inverse-warp", "{dir}/moving.nii.gz", "--overwrite"], 2, "is also an input"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said_before_the_network_runs(
    folder, network, capsys, flags, status, message
):
    before = sorted(folder.iterdir())
    assert register(folder, *flags) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert sorted(folder.iterdir()) == before
    assert network.seen is None
