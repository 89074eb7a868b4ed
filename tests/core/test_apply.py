"""`ulae-rt apply`: what it gives against ITK, ANTs and scipy, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close, assert_labels_agree
from _support.brains import GEOMETRIES, grid_affine, save_brain, world
from _support.tolerances import TOL
from ulae_rt import apply as apply_module
from ulae_rt.cli import main
from ulae_rt.imaging.grid import grid_of
from ulae_rt.imaging.image import as_array, image_of
from ulae_rt.imaging.nifti import read_volume, write_volume
from ulae_rt.imaging.transform import in_mm, warp_image
from ulae_rt.imaging.warpfile import Warp

# Oblique and anisotropic, and flipped: no axis of one is an axis of the other.
FIXED = GEOMETRIES["oblique"]
MOVING = GEOMETRIES["LIA"]
TURN = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, -0.05, 0.08) @ np.diag([1.05, 0.95, 1.1]), [3.0, -4.0, 2.0]
)


def wave(points):
    """A smooth displacement in mm at ``points`` (..., 3), no component like another."""
    x, y, z = np.moveaxis(points, -1, 0) / 12
    return 2.5 * np.stack([np.sin(y), 0.7 * np.cos(z + 1), np.sin(x) * np.cos(z)], -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    moving = read_volume(save_brain(folder / "moving.nii.gz", *MOVING))
    fixed = read_volume(save_brain(folder / "fixed.nii.gz", *FIXED))
    labels = np.digitize(moving.data, [1, 60, 90, 120, 160]).astype(np.int16)
    write_volume(folder / "labels.nii.gz", labels, moving)
    points = world(*FIXED)
    disp = nib.affines.apply_affine(TURN, points + wave(points)) - points
    Warp(disp.astype(np.float32), fixed).save(folder / "warp.nii.gz")
    Warp(wave(points).astype(np.float32), fixed).save(folder / "wave.nii.gz")
    return folder


@pytest.fixture
def files(made, tmp_path):
    """Moving, its labels and fixed; wave.nii.gz; warp.nii.gz, the wave and then `TURN`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def apply(folder, *flags, image="moving", reference="fixed", out="out", transforms=("warp",)):
    """Run the command; a name without a dot is a .nii.gz in ``folder``."""

    def path(name):
        inverted = name.startswith("[")
        name = name.strip("[]").removesuffix(",1")
        name = str(folder / (name if "." in name else f"{name}.nii.gz"))
        return f"[{name},1]" if inverted else name

    named = [("-i", image), ("-r", reference), ("-o", out), *(("-t", t) for t in transforms)]
    return main(["apply", *(w for flag, name in named for w in (flag, path(name))), *flags])


def values(folder, name="out"):
    return np.asanyarray(nib.load(folder / f"{name}.nii.gz").dataobj)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def itk_applies(folder, transform, image="moving", reference="fixed", method=sitk.sitkLinear):
    """What a user of SimpleITK gets."""
    pixel = sitk.sitkFloat32 if method == sitk.sitkLinear else sitk.sitkUnknown
    moved = sitk.Resample(
        sitk.ReadImage(str(folder / f"{image}.nii.gz")),
        sitk.ReadImage(str(folder / f"{reference}.nii.gz")),
        transform, method, 0.0, pixel,
    )  # fmt: skip
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def itk_field(folder, name="warp"):
    image = sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkVectorFloat64)
    return sitk.DisplacementFieldTransform(image)


def itk_affine(matrix=TURN):
    flip = np.diag([-1.0, -1, 1, 1])
    lps = flip @ matrix @ flip
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def close(ours, theirs):
    """Apart from the outermost voxels, where a position's last digit decides between in and out."""
    inside = (slice(2, -2),) * 3
    difference = np.abs(ours - theirs)[inside].max()
    print(f"max abs {difference:.3e}")
    return difference <= TOL["image by ITK"].absolute


def warped(moving, disp, fixed):
    """(X, Y, Z), what a registration makes of a displacement."""
    return as_array(warp_image(image_of(moving), in_mm(disp), image_of(fixed).grid))


@pytest.mark.parametrize("fmt", ["itk", "ras", "voxel"])
def test_a_warp_gives_the_image_it_was_made_with(files, fmt):
    fixed, moving = (read_volume(files / f"{n}.nii.gz") for n in ("fixed", "moving"))
    points = world(*FIXED)
    disp = nib.affines.apply_affine(TURN, points + wave(points)) - points
    Warp(disp.astype(np.float32), fixed).save(files / "w.nii.gz", fmt)
    assert apply(files, transforms=["w"]) == 0
    moved = warped(moving, disp.astype(np.float32), fixed)
    # One format goes through the grid's matrix and back.
    tol = TOL["image in our own two ways" if fmt == "voxel" else "exact"]
    assert_arrays_close(fmt, values(files), moved, tol)
    written, like = nib.load(files / "out.nii.gz").header, nib.load(files / "fixed.nii.gz").header
    assert written.get_data_dtype() == np.float32
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "sform_code", "qform_code"):
        assert written[field].tobytes() == like[field].tobytes()
    assert close(values(files), itk_applies(files, itk_field(files)))


def test_several_images_in_one_call(files, capsys):
    second = [f"{files}/{name}" for name in ("labels.nii.gz", "out2.nii.gz")]
    assert apply(files, "-i", second[0], "-o", second[1], "--json", "--interp", "nearest") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["outputs"] == [f"{files}/out.nii.gz", f"{files}/out2.nii.gz"]
    assert said["interp"] == "nearest"
    for out, image in (("out", "moving"), ("out2", "labels")):
        seen = itk_applies(files, itk_field(files), image, method=sitk.sitkNearestNeighbor)
        assert values(files, out).dtype == np.int16
        assert_labels_agree(image, values(files, out), seen, TOL["label ties"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_nearest_keeps_labels_and_their_type(files, dtype):
    labels = nib.load(files / "labels.nii.gz")
    # Atlases number their regions up to hundreds of millions, more than single precision holds.
    largest = {np.uint8: 40, np.int32: 100_000_001, np.float64: 100_000_001}.get(dtype, 1000)
    data = np.asarray(labels.dataobj).astype(dtype) * dtype(largest)
    nib.save(nib.Nifti1Image(data, labels.affine), files / "typed.nii.gz")
    assert apply(files, "--interp", "nearest", image="typed") == 0
    assert values(files).dtype == dtype
    assert set(np.unique(values(files))) == set(np.unique(data))


@pytest.mark.follows(
    "looks like a label map: --interp nearest keeps its labels, linear mixes them",
)
def test_labels_given_to_linear_are_warned_of(files, caplog):
    assert apply(files, image="labels") == 0
    assert "labels.nii.gz looks like a label map: --interp nearest keeps" in caplog.text
    caplog.clear()
    assert apply(files, "--overwrite") == 0
    assert apply(files, "--overwrite", "--interp", "nearest", image="labels") == 0
    assert not caplog.text


@pytest.mark.parametrize("scan", ["colin27_brain.nii.gz", "mni152_2009a_brain.nii.gz"])
def test_whole_number_scans_are_no_labels(samples, scan):
    assert not apply_module._looks_like_labels(read_volume(samples[0].with_name(scan)).data)


def test_an_empty_mask_is_carried(files):
    mask = np.zeros(MOVING[0], np.uint8)
    write_volume(files / "mask.nii.gz", mask, read_volume(files / "moving.nii.gz"))
    assert apply(files, "--interp", "nearest", image="mask") == 0
    assert not values(files).any()


CROP = nib.affines.from_matvec(np.eye(3), [8, 5, 4])
COARSE = nib.affines.from_matvec(np.diag([2.0, 2, 2]), [0.5, 0.5, 0.5])
# Half a voxel out on every side: as far as the outermost voxels reach.
FINE = nib.affines.from_matvec(np.diag([0.5, 0.5, 0.5]), [-0.25, -0.25, -0.25])


@pytest.mark.parametrize(
    ("shape", "step"),
    [((40, 50, 20), CROP), ((32, 32, 18), COARSE), ((128, 128, 72), FINE)],
    ids=["crop", "coarse", "fine"],
)
@pytest.mark.parametrize("fmt", ["itk", "ras"])
def test_a_reference_inside_the_field(files, shape, step, fmt):
    warp = nib.load(files / "warp.nii.gz")
    disp = np.asarray(warp.dataobj)[:, :, :, 0] * [-1, -1, 1]
    affine = warp.affine @ step
    nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), affine), files / "ref.nii.gz")
    Warp(disp.astype(np.float32), read_volume(files / "fixed.nii.gz")).save(files / "w.nii.gz", fmt)
    assert apply(files, reference="ref", transforms=["w"]) == 0
    points = world(shape, affine)
    index = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(warp.affine), points), -1, 0)
    there = points + np.stack(
        [map_coordinates(disp[..., c], index, order=1, mode="nearest") for c in range(3)], -1
    )
    moving = nib.load(files / "moving.nii.gz")
    at = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(moving.affine), there), -1, 0)
    seen = map_coordinates(moving.get_fdata(), at, order=1)
    # Beyond the outermost voxel's centre scipy fades to 0, ITK half a voxel further on.
    inside = ((at >= 0) & (at <= np.array(MOVING[0])[:, None, None, None] - 1)).all(0)
    assert_arrays_close("scipy", values(files)[inside], seen[inside], TOL["image by others"])
    assert values(files).max() > 100


def composite(*transforms):
    """As a point goes through them; SimpleITK has the first one last."""
    return sitk.CompositeTransform(list(reversed(transforms)))


def test_transforms_come_in_the_order_of_ants(files):
    """-t WAVE -t TURN: a point of REFERENCE goes through the wave first, the image last."""
    for name in ("turn.mat", "turn.txt", "turn.tfm", "turn.h5", "turn.xfm"):
        sitk.WriteTransform(itk_affine(), str(files / name))
        assert apply(files, "--overwrite", transforms=["wave", name]) == 0
        assert close(values(files), itk_applies(files, itk_field(files)))
        seen = itk_applies(files, composite(itk_field(files, "wave"), itk_affine()))
        assert close(values(files), seen)
    # The other way round is another image.
    assert apply(files, "--overwrite", transforms=["turn.mat", "wave"]) == 0
    seen = itk_applies(files, composite(itk_affine(), itk_field(files, "wave")))
    assert close(values(files), seen)
    assert not close(values(files), itk_applies(files, itk_field(files)))


def test_an_affine_alone_and_its_inverse(files):
    sitk.WriteTransform(itk_affine(), str(files / "turn.mat"))
    assert apply(files, transforms=["turn.mat"]) == 0
    assert close(values(files), itk_applies(files, itk_affine()))
    assert apply(files, "--overwrite", transforms=["[turn.mat,1]"]) == 0
    assert close(values(files), itk_applies(files, itk_affine(np.linalg.inv(TURN))))
    assert apply(files, "--overwrite", transforms=["turn.mat", "[turn.mat,1]"]) == 0
    assert close(values(files), itk_applies(files, sitk.Transform()))


def test_a_composite_file_is_all_its_parts(files):
    parts = itk_field(files, "wave"), itk_affine()
    sitk.WriteTransform(composite(*parts), str(files / "c.h5"))
    assert apply(files, transforms=["c.h5"]) == 0
    assert close(values(files), itk_applies(files, itk_field(files)))


def test_learn2reg_warps_are_carried_out(files):
    """On one grid, the fixed image's; the .npz says nothing of it."""
    fixed = read_volume(files / "fixed.nii.gz")
    warp = Warp(wave(world(*FIXED)).astype(np.float32), fixed, grid_of(fixed))
    warp.save(files / "w.npz", "l2r")
    assert apply(files, image="fixed", transforms=["w.npz"]) == 0
    seen = warped(fixed, warp.disp, fixed)
    assert_arrays_close("npz", values(files), seen, TOL["image in our own two ways"])
    header = nib.Nifti1Image(np.load(files / "w.npz")["disp"], np.eye(4))
    nib.save(header, files / "w.nii.gz")
    flags = ("--overwrite", "--warp-format", "l2r")
    assert apply(files, *flags, image="fixed", transforms=["w"]) == 0
    assert_arrays_close("nii.gz", values(files), seen, TOL["image in our own two ways"])


def test_a_later_field_that_breaks_off_is_warned_of(files, caplog):
    away = nib.affines.from_matvec(np.eye(3), [20, 0, 0])
    sitk.WriteTransform(itk_affine(away), str(files / "away.mat"))
    assert apply(files, transforms=["away.mat", "warp"]) == 0
    assert "of the voxels get out of the field of" in caplog.text
    assert close(values(files), itk_applies(files, composite(itk_affine(away), itk_field(files))))
    caplog.clear()
    # One that ends at 0, as those of ANTs do, has nothing to break off.
    points = world(*FIXED)
    index = np.moveaxis(np.indices(FIXED[0]), 0, -1)
    edge = ((index == 0) | (index == np.array(FIXED[0]) - 1)).any(-1)
    disp = np.where(edge[..., None], 0, wave(points)).astype(np.float32)
    Warp(disp, read_volume(files / "fixed.nii.gz")).save(files / "calm.nii.gz")
    assert apply(files, "--overwrite", transforms=["away.mat", "calm"]) == 0
    assert not caplog.text


@pytest.fixture(scope="module")
def all_wrong(made, tmp_path_factory):
    files = tmp_path_factory.mktemp("wrong")
    shutil.copytree(made, files, dirs_exist_ok=True)
    far = nib.affines.from_matvec(np.eye(3), [500, 0, 0])
    shape, affine = FIXED
    shifted = nib.affines.from_matvec(np.eye(3), [10, 0, 0])
    larger = grid_affine((90, 90, 60), (1, 1.3, 2), angles_deg=(20, -10, 15))
    save_brain(files / "shifted.nii.gz", shape, affine @ shifted)
    save_brain(files / "larger.nii.gz", *larger)
    save_brain(files / "edge.nii.gz", (shape[0] + 1, *shape[1:]), affine)
    save_brain(files / "far.nii.gz", MOVING[0], far @ MOVING[1])
    nib.save(nib.Nifti1Image(np.zeros((*shape, 4), np.float32), affine), files / "series.nii.gz")
    data = nib.load(files / "moving.nii.gz").get_fdata(dtype=np.float32)
    data[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(data, MOVING[1]), files / "nan.nii.gz")
    whole = (files / "warp.nii.gz").read_bytes()
    (files / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    foreign = nib.Nifti1Image(np.zeros((*shape, 3), np.float32), affine)
    nib.save(foreign, files / "foreign.nii.gz")
    np.savez(files / "small.npz", disp=np.zeros((4, 4, 4, 3), np.float32))
    fsl = nib.Nifti1Image(np.zeros((*shape, 3), np.float32), affine)
    fsl.header.set_intent(2006, allow_unknown=True)
    nib.save(fsl, files / "fsl.nii.gz")
    ids = np.zeros(MOVING[0], np.int64)
    ids[20:40, 20:40, 20:40] = 2**53 + 1
    nib.save(nib.Nifti1Image(ids, MOVING[1], dtype=np.int64), files / "ids.nii.gz")
    sitk.WriteTransform(itk_affine(np.eye(4)), str(files / "one.txt"))
    one = (files / "one.txt").read_text().partition("\n")
    (files / "five.txt").write_text(one[0] + one[1] + 5 * one[2])
    (files / "fsl.mat").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (files / "text.h5").write_text("no transform")
    sitk.WriteTransform(itk_affine(), str(files / "turn.h5"))
    whole = (files / "turn.h5").read_bytes()
    (files / "cut.h5").write_bytes(whole[: len(whole) // 2])
    sitk.WriteTransform(sitk.AffineTransform(2), str(files / "flat.mat"))
    sitk.WriteTransform(itk_affine(np.diag([1.0, 1, 0, 1])), str(files / "flattens.mat"))
    sitk.WriteTransform(sitk.TranslationTransform(3, [np.nan, 0, 0]), str(files / "nan.mat"))
    sitk.WriteTransform(itk_affine(far), str(files / "far.mat"))
    return files


@pytest.fixture
def wrong(all_wrong, tmp_path):
    """Files that cannot be used, beside those that can."""
    shutil.copytree(all_wrong, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "flags", "status", "message"),
    [
        # by geometry
        ({"reference": "shifted"}, [], 1, "shifted.nii.gz reaches 9.5 mm out of the field of"),
        ({"reference": "edge"}, [], 1, "edge.nii.gz reaches 0.5 mm out of the field of"),
        ({"reference": "larger"}, [], 1, "mm out of the field of"),
        ({"image": "far"}, [], 1, "lead nowhere into {dir}/far.nii.gz: they end 4"),
        ({"reference": "shifted", "transforms": ["foreign"]}, ["--warp-format", "voxel"], 1,
         "is in voxels of its own grid, and {dir}/shifted.nii.gz is another: they lie up to 10 mm"),
        ({"transforms": ["small.npz"]}, [], 1, "has size 4x4x4x3, expected 64x64x36x3, the grid"),
        ({"transforms": ["far.mat", "warp"]}, [], 1, "no voxel gets into the field of"),
        # no transforms
        ({"transforms": ["moving"]}, [], 1, "expected XxYxZx1x3 or XxYxZx3"),
        ({"transforms": ["series"]}, [], 1, "expected XxYxZx1x3 or XxYxZx3"),
        ({"transforms": ["cut"]}, [], 1, "truncated or damaged"),
        ({"transforms": ["foreign"]}, [], 2, "does not say its unit"),
        ({}, ["--warp-format", "ras"], 2, "--warp-format ras has no effect: no transform is a 4-D"),
        ({"transforms": ["turn.mat"]}, ["--warp-format", "itk"], 2, "--warp-format itk has no"),
        ({"transforms": ["fsl"]}, ["--warp-format", "ras"], 1, "fsl.nii.gz is a file of FSL's"),
        ({"transforms": ["five.txt"]}, [], 1, "five.txt holds 5 transforms, expected one"),
        ({"image": "ids"}, ["--interp", "nearest"], 1, "holds labels up to 9007199254740993"),
        ({"transforms": ["none"]}, [], 1, "none.nii.gz does not exist"),
        ({"transforms": ["none.mat"]}, [], 1, "none.mat does not exist"),
        ({"transforms": ["fsl.mat"]}, [], 1, "fsl.mat is not a readable ITK transform: failed to"),
        ({"transforms": ["text.h5"]}, [], 1, "text.h5 is truncated, or not an HDF5 file"),
        ({"transforms": ["cut.h5"]}, [], 1, "cut.h5 is truncated, or not an HDF5 file"),
        ({"transforms": ["flat.mat"]}, [], 1, "is a transform of 2 dimensions, expected 3"),
        ({"transforms": ["nan.mat"]}, [], 1, "nan.mat has NaN or Inf"),
        ({"transforms": ["x.m3z"]}, [], 2, "x.m3z is no kind of transform that is known"),
        ({"transforms": ["[warp.nii.gz,1]"]}, [], 2, "warp.nii.gz cannot be inverted on the way"),
        ({"transforms": ["[flattens.mat,1]"]}, [], 1, "cannot be inverted: its matrix is singular"),
        ({"transforms": ["flattens.mat"]}, [], 1, "cannot be applied: its matrix is singular"),
        # images
        ({"image": "nan"}, [], 1, "nan.nii.gz has 1 NaN or Inf voxels"),
        ({"image": "series"}, [], 1, "expected one 3-D volume"),
        ({"image": "none"}, [], 1, "none.nii.gz does not exist"),
        ({"reference": "series"}, [], 1, "expected one 3-D volume"),
        ({"reference": "none"}, [], 1, "none.nii.gz does not exist"),
        # outputs
        ({}, ["-o", "x.nii.gz"], 2, "there are 1 -i and 2 -o, expected one -o for each -i"),
        ({}, ["-i", "x.nii.gz"], 2, "there are 2 -i and 1 -o, expected one -o for each -i"),
        ({"out": "moving"}, ["--overwrite"], 2, "moving.nii.gz is also an input"),
        ({"out": "warp"}, ["--overwrite"], 2, "warp.nii.gz is also an input"),
        ({"out": "fixed"}, ["--overwrite"], 2, "fixed.nii.gz is also an input"),
        ({"out": "wave"}, ["--overwrite", "-t", "[{dir}/wave.nii.gz,0]"], 2, "is also an input"),
        ({"out": "labels"}, [], 1, "labels.nii.gz exists already"),
        ({"out": "no/out.nii.gz"}, [], 1, "no does not exist"),
        ({"out": "out.mha"}, [], 2, "out.mha must end in .nii.gz or .nii"),
        # Found when the first image is written already: neither stays.
        ({}, ["-i", "{dir}/nan.nii.gz", "-o", "{dir}/second.nii.gz"], 1, "NaN or Inf voxels"),
    ],
)  # fmt: skip
def test_mistakes_are_two_lines_and_leave_nothing(wrong, capfd, changes, flags, status, message):
    before = {path: path.read_bytes() for path in wrong.iterdir()}
    assert apply(wrong, *(flag.format(dir=wrong) for flag in flags), **changes) == status
    said = capfd.readouterr().err.strip().splitlines()
    assert message.format(dir=wrong) in said[0]
    assert said[0].startswith("error: ")
    assert said[1].startswith("hint: ")
    assert len(said) == 2
    assert {path: path.read_bytes() for path in wrong.iterdir()} == before


@pytest.mark.follows("leave --warp-format out", "say it with --warp-format: ras, voxel or l2r")
def test_hints_about_formats_and_brackets_work(files, capsys):
    sitk.WriteTransform(itk_affine(), str(files / "turn.mat"))
    assert apply(files, "--warp-format", "ras") == 2
    assert "hint: leave --warp-format out" in capsys.readouterr().err
    assert apply(files) == 0
    disp = np.asarray(nib.load(files / "wave.nii.gz").dataobj)[:, :, :, 0] * [-1, -1, 1]
    foreign = nib.Nifti1Image(disp.astype(np.float32), FIXED[1])
    nib.save(foreign, files / "foreign.nii.gz")
    assert apply(files, "--overwrite", transforms=["foreign", "turn.mat"]) == 2
    assert "hint: say it with --warp-format: ras, voxel or l2r" in capsys.readouterr().err
    # One that needs it beside those that do not.
    flags = ("--overwrite", "--warp-format", "ras")
    assert apply(files, *flags, transforms=["foreign", "turn.mat"]) == 0
    assert close(values(files), itk_applies(files, itk_field(files)))
    calm = Warp(np.zeros((*FIXED[0], 3), np.float32), read_volume(files / "fixed.nii.gz"))
    calm.save(files / "calm.nii.gz")
    assert apply(files, *flags, transforms=["calm", "foreign", "turn.mat"]) == 0
    assert close(values(files), itk_applies(files, itk_field(files)))


def test_brackets_with_spaces(files):
    sitk.WriteTransform(itk_affine(), str(files / "turn.mat"))
    flags = ["-i", f"{files}/moving.nii.gz", "-r", f"{files}/fixed.nii.gz"]
    out = ["-o", f"{files}/out.nii.gz"]
    assert main(["apply", *flags, "-t", f"[ {files}/turn.mat, 1 ]", *out]) == 0
    assert close(values(files), itk_applies(files, itk_affine(np.linalg.inv(TURN))))


def test_hints_about_geometry_and_outputs_work(files, capsys):
    """Each from the failing state: outputs, folders, and images of another space."""
    points = world(*FIXED)
    (files / "out.nii.gz").touch()
    assert apply(files) == 1
    assert "hint: give --overwrite to replace it" in capsys.readouterr().err
    assert apply(files, "--overwrite") == 0
    assert apply(files, out="deep/er/out.nii.gz") == 1
    hint = capsys.readouterr().err.partition("hint: make it: ")[2].strip()
    subprocess.run(hint, shell=True, check=True)
    assert apply(files, out="deep/er/out.nii.gz") == 0
    assert apply(files, out="out.mha") == 2
    assert "hint: rename the output" in capsys.readouterr().err
    # An image in the fixed image's space: the inverse warp, and the moving image as REFERENCE.
    away = nib.affines.from_matvec(np.eye(3), [500, 0, 0])
    moving = nib.load(files / "moving.nii.gz")
    nib.save(nib.Nifti1Image(moving.dataobj, away @ MOVING[1]), files / "far.nii.gz")
    fixed = read_volume(files / "fixed.nii.gz")
    there = nib.affines.apply_affine(away, points) - points
    Warp(there.astype(np.float32), fixed).save(files / "go.nii.gz")
    assert apply(files, "--overwrite", image="fixed", transforms=["go"]) == 1
    assert "the inverse warp and the moving image as REFERENCE" in capsys.readouterr().err
    far = read_volume(files / "far.nii.gz")
    back = np.broadcast_to(np.array([-500, 0, 0], np.float32), (*far.shape, 3))
    Warp(back, far).save(files / "back.nii.gz")
    flags = {"image": "fixed", "reference": "far", "transforms": ["back"]}
    assert apply(files, "--overwrite", **flags) == 0
    assert values(files).max() > 100
    # A reference out of the field: the fixed image, or a crop of it.
    assert apply(files, "--overwrite", reference="moving", transforms=["wave"]) == 1
    assert "give the fixed image that the warp was made for" in capsys.readouterr().err
    assert apply(files, "--overwrite", transforms=["wave"]) == 0
    # The order of the transforms.
    sitk.WriteTransform(itk_affine(away), str(files / "away.mat"))
    assert apply(files, "--overwrite", image="far", transforms=["away.mat", "warp"]) == 1
    assert "check the order of the transforms" in capsys.readouterr().err
    assert apply(files, "--overwrite", image="far", transforms=["warp", "away.mat"]) == 0


STOPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ulae_rt import apply, cli
def slow(image, path):
    path.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
apply.save_image = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_no_file(files, stop):
    before = names(files)
    flags = ["-i", "moving.nii.gz", "-r", "fixed.nii.gz", "-t", "warp.nii.gz", "-o", "out.nii.gz"]
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, "apply", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=files,
    ) as running:  # fmt: skip
        assert running.stdout.readline() == b"half\n"
        assert len(names(files)) > len(before)
        running.send_signal(stop)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.decode().strip() == "error: interrupted; nothing half-written was left behind"
    assert names(files) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_closed_folder_is_said_at_once(files, capsys):
    (files / "closed").mkdir(mode=0o500)
    assert apply(files, out="closed/out.nii.gz") == 1
    assert "closed cannot be written to" in capsys.readouterr().err


def test_values_beyond_single_precision_are_not_made_infinite(tmp_path, capsys):
    data = 1e300 * np.random.default_rng(0).random((9, 9, 9))
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (1, 0, 0)), str(tmp_path / "t.tfm"))
    files = ["-i", str(tmp_path / "a.nii.gz"), "-r", str(tmp_path / "a.nii.gz")]
    line = ["apply", *files, "-t", str(tmp_path / "t.tfm"), "-o", str(tmp_path / "o.nii.gz")]
    assert main(line) == 1
    assert "single precision has no others" in capsys.readouterr().err
    assert main([*line, "--interp", "nearest"]) == 0
    carried = nib.load(tmp_path / "o.nii.gz").get_fdata()
    assert np.isfinite(carried).all()
