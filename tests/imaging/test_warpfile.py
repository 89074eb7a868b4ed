"""Warp files: what each format holds, by hand and by whoever reads it; and what is no warp."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from _support.arrays import assert_arrays_close, assert_labels_agree
from _support.brains import GEOMETRIES, grid_affine, save_brain, world
from _support.tolerances import TOL
from ulae_rt.errors import GeometryError, ImageError, OutputError, UlaeError, UsageError
from ulae_rt.imaging import warpfile
from ulae_rt.imaging.grid import Grid, grid_of
from ulae_rt.imaging.image import as_array, file_order, image_of, labels_of
from ulae_rt.imaging.nifti import read_volume, volume_from_array
from ulae_rt.imaging.transform import in_mm, warp_image
from ulae_rt.imaging.warpfile import WARP_FORMATS, Warp, read_warp, stated_format

FILES = [*((fmt, "w.nii.gz") for fmt in WARP_FORMATS), ("l2r", "w.npz")]
SMALL, AFFINE = grid_affine((10, 12, 14), (2, 1, 1.3), "PSR")


def volume(shape=SMALL, affine=AFFINE):
    return volume_from_array(np.ones(shape, np.uint8), affine, name="fixed", kind="labels")


def save_field(path, data, affine=AFFINE, intent=None, name=""):
    """A field as another tool would write it."""
    image = nib.Nifti1Image(data, affine)
    if intent is not None or name:
        image.header.set_intent(intent or 0, name=name, allow_unknown=True)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("fmt", "file"), FILES)
@pytest.mark.parametrize("name", ["LAS", "oblique-PIR"])
def test_warp_files_come_back(tmp_path, name, fmt, file):
    fixed = read_volume(save_brain(tmp_path / "f.nii.gz", *GEOMETRIES[name]))
    disp = np.random.default_rng(0).normal(size=(*fixed.shape, 3)).astype(np.float32)
    Warp(disp, fixed, grid_of(fixed)).save(tmp_path / file, fmt)
    warp = read_warp(tmp_path / file, fixed=fixed)
    # The voxel formats go through the grid's matrix and back.
    assert_arrays_close("read back", warp.disp, disp, TOL["displacement float32"])
    np.testing.assert_array_equal(warp.grid.affine, fixed.affine)
    if file.endswith(".npz"):
        return
    header = nib.load(tmp_path / file).header
    assert header["sform_code"] == header["qform_code"] == 1
    assert header.get_data_shape()[:3] == fixed.shape


def test_what_each_warp_format_holds(tmp_path):
    # Axes P, S, R at 1, 1.3, 2 mm: +1 mm to the right is -1 mm in LPS and +0.5 voxel on axis 2
    disp = np.zeros((*SMALL, 3), np.float32)
    disp[..., 0] = 1
    warp = Warp(disp, volume(), Grid(SMALL, AFFINE))
    held = {}
    for fmt in WARP_FORMATS:
        warp.save(tmp_path / f"{fmt}.nii.gz", fmt)
        image = nib.load(tmp_path / f"{fmt}.nii.gz")
        held[fmt] = np.asarray(image.dataobj)
        if fmt == "itk":
            assert image.shape == (*SMALL, 1, 3)
            assert image.header["intent_code"] == 1007
        else:
            assert image.shape == (*SMALL, 3)
    assert held["itk"][0, 0, 0, 0].tolist() == [-1, 0, 0]
    assert held["ras"][0, 0, 0].tolist() == [1, 0, 0]
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("voxel", held["voxel"][0, 0, 0], [0, 0, 0.5], few)
    np.testing.assert_array_equal(held["l2r"], held["voxel"])
    warp.save(tmp_path / "w.npz", "l2r")
    with np.load(tmp_path / "w.npz") as arrays:
        assert len(arrays.files) == 1
        np.testing.assert_array_equal(arrays[arrays.files[0]], held["l2r"])
    first = (tmp_path / "w.npz").read_bytes()
    warp.save(tmp_path / "w.npz", "l2r", overwrite=True)
    assert (tmp_path / "w.npz").read_bytes() == first


@pytest.mark.parametrize("name", ["LIA", "oblique-PIR"])
def test_learn2reg_applying_our_file_gives_our_image(tmp_path, name):
    """The lines of L2R's evaluation.py: the file, the arrays, and no geometry at all."""
    moving = read_volume(save_brain(tmp_path / "m.nii.gz", *GEOMETRIES[name]))
    grid = grid_of(moving)
    x, y, z = np.moveaxis(world(*GEOMETRIES[name]), -1, 0) / 15
    disp = (4 * np.stack([np.sin(y), np.cos(z) * 0.7, np.sin(x + z)], -1)).astype(np.float32)
    Warp(disp, moving, grid).save(tmp_path / "disp_0001_0002.npz", "l2r")
    with np.load(tmp_path / "disp_0001_0002.npz") as arrays:
        field = arrays[arrays.files[0]].astype("float32")
    D, H, W = moving.shape
    identity = np.meshgrid(np.arange(D), np.arange(H), np.arange(W), indexing="ij")
    at = identity + field.transpose(3, 0, 1, 2)
    seen = map_coordinates(moving.data.astype(float), at, order=1)
    ours = as_array(warp_image(image_of(moving), in_mm(disp), file_order(grid)))
    # Beyond the outermost voxel's centre scipy fades to 0, ITK half a voxel further on.
    inside = ((at >= 0) & (at <= np.array(moving.shape)[:, None, None, None] - 1)).all(0)
    assert_arrays_close("scipy", ours[inside], seen[inside], TOL["image by others"])
    assert np.abs(ours - moving.data).max() > 50
    labels = np.digitize(moving.data, [1, 60, 90, 120, 160]).astype(np.uint8)
    seen = map_coordinates(labels, at, order=0)
    label_map = volume_from_array(labels, moving.affine, name="labels", kind="labels")
    carried = warp_image(labels_of(label_map), in_mm(disp), file_order(grid), "nearest")
    ours = as_array(carried)
    assert_labels_agree("scipy", ours[inside], seen[inside], TOL["label ties"])


@pytest.mark.parametrize(
    ("moving", "message"),
    [
        (Grid((10, 12, 15), AFFINE), "10x12x15 voxels instead of 14x12x10"),
        (Grid(SMALL, AFFINE + np.eye(4)[:, [3, 3, 3, 0]] * 0.5), "lie up to .* mm apart"),
    ],
)
def test_format_l2r_is_refused_for_two_grids(tmp_path, moving, message):
    warp = Warp(np.zeros((*SMALL, 3), np.float32), volume(), moving)
    message = message.replace("14x12x10", "x".join(map(str, SMALL)))
    with pytest.raises(GeometryError, match=f"needs the moving image on the fixed.*{message}"):
        warp.save(tmp_path / "w.npz", "l2r")
    assert not list(tmp_path.iterdir())


def test_format_l2r_needs_to_know_the_moving_grid(tmp_path):
    with pytest.raises(UsageError, match="needs the moving image's grid"):
        Warp(np.zeros((*SMALL, 3), np.float32), volume()).save(tmp_path / "w.npz", "l2r")


@pytest.mark.parametrize("fmt", ["itk", "ras", "voxel"])
def test_only_learn2reg_writes_npz(tmp_path, fmt):
    warp = Warp(np.zeros((*SMALL, 3), np.float32), volume(), Grid(SMALL, AFFINE))
    with pytest.raises(UsageError, match=r"must end in \.nii\.gz or \.nii"):
        warp.save(tmp_path / "w.npz", fmt)


def test_a_full_disk_is_said_of_npz_too(monkeypatch):
    warp = Warp(np.zeros((*SMALL, 3), np.float32), volume(), Grid(SMALL, AFFINE))
    monkeypatch.setattr(warpfile, "NPZ", "full")
    with pytest.raises(OutputError, match="/dev/full cannot be written: the disk is full"):
        warpfile.write_warp(warp, "/dev/full", "l2r")


def test_a_field_of_another_tool_needs_its_format(tmp_path):
    disp = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    path = save_field(tmp_path / "w.nii.gz", disp)
    with pytest.raises(UsageError, match="does not say its unit") as caught:
        read_warp(path)
    assert "--warp-format" in caught.value.hint
    np.testing.assert_array_equal(read_warp(path, "ras").disp, disp)
    steps = disp @ AFFINE[:3, :3].T
    for fmt, fixed in (("voxel", None), ("l2r", volume())):
        found = read_warp(path, fmt, fixed).disp
        assert_arrays_close(fmt, found, steps, TOL["displacement float32"])
    named = save_field(tmp_path / "r.nii.gz", disp, name="disp-ras-mm")
    with pytest.raises(UsageError, match="is a warp of format ras, not voxel"):
        read_warp(named, "voxel")


def test_learn2reg_files_lie_on_the_fixed_grid_whatever_their_header_says(tmp_path):
    """Submissions are full of identity affines."""
    disp = np.ones((*SMALL, 3), np.float32)
    path = save_field(tmp_path / "w.nii.gz", disp, np.eye(4))
    warp = read_warp(path, "l2r", volume())
    np.testing.assert_array_equal(warp.grid.affine, AFFINE)
    few = TOL["displacement of a few mm float32"]
    assert_arrays_close("l2r", warp.disp[0, 0, 0], AFFINE[:3, :3].sum(1), few)
    for fixed, error in ((None, UsageError), (volume((14, 12, 9)), GeometryError)):
        with pytest.raises(error, match=r"not given|expected 14x12x9x3"):
            read_warp(path, "l2r", fixed)


def test_voxels_of_one_grid_are_not_those_of_another(tmp_path):
    warp = Warp(np.zeros((*SMALL, 3), np.float32), volume())
    warp.save(tmp_path / "w.nii.gz", "voxel")
    assert read_warp(tmp_path / "w.nii.gz", fixed=volume()).disp.shape == (*SMALL, 3)
    shifted = AFFINE.copy()
    shifted[:3, 3] += 3
    for fixed, message in (
        (volume(affine=shifted), r"lie up to 5\.2 mm apart"),
        (volume((4, 5, 6)), "voxels instead of 4x5x6"),
    ):
        with pytest.raises(GeometryError, match=f"in voxels of its own grid.*{message}"):
            read_warp(tmp_path / "w.nii.gz", fixed=fixed)


def absolute(kind):
    """Positions, as SPM, EasyReg or FreeSurfer keep them."""
    index = np.stack(np.meshgrid(*map(np.arange, SMALL), indexing="ij"), -1)
    ras = world(SMALL, AFFINE) + np.array([3, 2, 1])
    return {"ras": ras, "lps": ras * [-1, -1, 1], "voxel": index + 0.5}[kind].astype(np.float32)


@pytest.mark.parametrize("intent", range(2006, 2010))
@pytest.mark.parametrize("fmt", [None, *WARP_FORMATS])
@pytest.mark.parametrize("five", [False, True], ids=["4-D", "5-D"])
def test_files_of_fsl_are_refused_whatever_is_said(tmp_path, intent, fmt, five):
    """They were read as RAS mm, 16 mm off."""
    disp = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    data = disp[:, :, :, None] if five else disp
    path = save_field(tmp_path / "w.nii.gz", data, intent=intent)
    for read in (lambda: read_warp(path, fmt, volume()), lambda: stated_format(path)):
        with pytest.raises(ImageError, match=rf"a file of FSL's: .*intent {intent}") as caught:
            read()
        assert "wb_command -convert-warpfield -from-fnirt" in caught.value.hint


def save_niftyreg(path, disp, kind, affine=AFFINE):
    """As NiftyReg's reg_transform writes it."""
    image = nib.Nifti1Image(disp[:, :, :, None], affine)
    image.header.set_intent(1007, name="NREG_TRANS", allow_unknown=True)
    image.header["intent_p1"] = kind
    nib.save(image, path)
    return path


def test_a_displacement_of_niftyreg_is_ras(tmp_path):
    disp = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    path = save_niftyreg(tmp_path / "w.nii.gz", disp, 1)
    assert stated_format(path) == "ras"
    for fmt in (None, "ras"):
        np.testing.assert_array_equal(read_warp(path, fmt).disp, disp)
    with pytest.raises(UsageError, match="is a warp of format ras, not itk"):
        read_warp(path, "itk")


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        (0, "positions"), (2, "a grid of cubic splines"), (3, "a velocity field of positions"),
        (4, "a velocity field of displacements"), (5, "a velocity grid"), (6, "a grid of linear"),
        (7, "what is unknown here"), (0.5, "what is unknown here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fmt", [None, "itk", "ras"])
def test_what_else_niftyreg_writes_is_refused_by_name(tmp_path, kind, holds, fmt):
    """Zeros: nothing but the header tells."""
    path = save_niftyreg(tmp_path / "w.nii.gz", FIELD, kind)
    with pytest.raises(ImageError, match=f"of NiftyReg's that holds {holds}") as caught:
        read_warp(path, fmt, volume())
    assert "reg_transform -ref FIXED -disp" in caught.value.hint


def test_spm_s_mapping_is_positions_whatever_it_holds(tmp_path):
    path = save_field(tmp_path / "y_w.nii", FIELD[:, :, :, None], intent=1007, name="Mapping")
    with pytest.raises(ImageError, match="holds positions, as SPM"):
        read_warp(path)


@pytest.mark.follows("give it that intent, e.g. nifti_tool -mod_hdr")
def test_a_file_of_afni_s_is_named_and_the_hint_works(tmp_path):
    """3dQwarp: 5-D, no intent, an extension of AFNI's own, LPS mm (AFNI's RAI)."""
    disp = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    image = nib.Nifti1Image((disp * [-1, -1, 1]).astype(np.float32)[:, :, :, None], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<AFNI_attributes/>"))
    nib.save(image, tmp_path / "w.nii")
    with pytest.raises(ImageError, match="is a file of AFNI's with intent 0") as caught:
        read_warp(tmp_path / "w.nii")
    assert "-mod_field intent_code 1007" in caught.value.hint
    image.header["intent_code"] = 1007  # what nifti_tool does
    nib.save(image, tmp_path / "w.nii")
    np.testing.assert_array_equal(read_warp(tmp_path / "w.nii").disp, disp)


@pytest.mark.parametrize("kind", ["ras", "lps", "voxel", "one", "mm"])
@pytest.mark.parametrize("fmt", ["ras", "voxel", "l2r", "itk"])
@pytest.mark.parametrize("part", [np.s_[:], np.s_[4:6, 5:7, 8:10], np.s_[3:6, 3:7, 3:8]])
def test_positions_of_any_unit_and_in_a_crop_are_no_displacement(tmp_path, kind, fmt, part):
    """A third of them were read: their slope is not 1 in the unit that was said."""
    shape, affine = grid_affine((24, 26, 28), (0.6, 1, 2.2), "PSR", centre=(20, -30, 40))
    index = np.moveaxis(np.indices(shape), 0, -1)
    ras = world(shape, affine)
    positions = {
        "ras": ras, "lps": ras * [-1, -1, 1], "voxel": index, "one": index + 1,
        "mm": index * np.linalg.norm(affine[:3, :3], axis=0),
    }[kind]  # fmt: skip
    bump = np.sin(index / 3)  # a deformation whose slope is steep
    data = (positions + bump).astype(np.float32)[part]
    first = [cut.start or 0 for cut in part] if isinstance(part, tuple) else [0, 0, 0]
    cropped = affine @ nib.affines.from_matvec(np.eye(3), first)
    if kind in ("voxel", "one", "mm"):  # of the crop itself
        data = (positions + bump * 0.2)[tuple(slice(n) for n in data.shape[:3])].astype(np.float32)
    data, options = (data[:, :, :, None], {"intent": 1007}) if fmt == "itk" else (data, {})
    path = save_field(tmp_path / "w.nii", data, cropped, **options)
    with pytest.raises(ImageError, match="holds positions"):
        read_warp(path, fmt, volume(data.shape[:3], cropped))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(np.complex64, "holds complex64"), ([("R", "u1"), ("G", "u1"), ("B", "u1")], "colours")],
)
def test_numbers_that_are_none_are_refused(tmp_path, dtype, message):
    path = save_field(tmp_path / "w.nii", np.zeros((*SMALL, 3), dtype))
    with pytest.raises(ImageError, match=message):
        read_warp(path, "ras")


def test_doubles_beyond_single_precision_are_refused(tmp_path):
    disp = np.zeros((*SMALL, 3))
    disp[0, 0, 0] = 1e200
    with pytest.raises(ImageError, match="single precision has no others"):
        read_warp(save_field(tmp_path / "w.nii", disp), "ras")
    np.savez(tmp_path / "w.npz", disp)
    with pytest.raises(ImageError, match="NaN or Inf displacements"):
        read_warp(tmp_path / "w.npz", fixed=volume())


@pytest.mark.follows(
    "subtract each voxel's own position first, e.g. with mri_warp_convert --inspm",
)
def test_the_hints_of_formats_and_fixed_images_work(tmp_path):
    disp = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    named = save_field(tmp_path / "r.nii.gz", disp, name="disp-ras-mm")
    with pytest.raises(UsageError) as caught:
        read_warp(named, "voxel")
    assert caught.value.hint == "leave the format out"
    read_warp(named)
    np.savez(tmp_path / "w.npz", disp)
    with pytest.raises(UsageError) as caught:
        read_warp(tmp_path / "w.npz")
    assert caught.value.hint == "read it with fixed="
    read_warp(tmp_path / "w.npz", fixed=volume())
    with pytest.raises(UsageError) as caught:
        Warp(disp, volume()).save(tmp_path / "l.npz", "l2r")
    assert caught.value.hint == "give Warp(disp, grid, moving)"
    Warp(disp, volume(), Grid(SMALL, AFFINE)).save(tmp_path / "l.npz", "l2r")
    # Voxels of another grid: written as ras, they are used on it.
    Warp(disp, volume()).save(tmp_path / "v.nii.gz", "voxel")
    other = volume((4, 5, 6))
    with pytest.raises(GeometryError) as caught:
        read_warp(tmp_path / "v.nii.gz", fixed=other)
    assert "or write the warp as itk or ras" in caught.value.hint
    for fmt in ("itk", "ras"):
        Warp(disp, volume()).save(tmp_path / f"{fmt}.nii.gz", fmt)
        read_warp(tmp_path / f"{fmt}.nii.gz", fixed=other)
    # Positions, less each voxel's own.
    path = save_field(tmp_path / "y.nii", (world(SMALL, AFFINE) + disp).astype(np.float32))
    with pytest.raises(ImageError) as caught:
        read_warp(path, "ras")
    assert "subtract each voxel's own position" in caught.value.hint
    data = np.asarray(nib.load(path).dataobj) - world(SMALL, AFFINE)
    read_warp(save_field(tmp_path / "u.nii", data.astype(np.float32)), "ras")


FIELD = np.zeros((*SMALL, 3), np.float32)
NAN = np.full((*SMALL, 1, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("data", "options", "fmt", "message"),
    [
        (FIELD[..., 0], {}, None, "expected XxYxZx1x3 or XxYxZx3"),
        (np.zeros((*SMALL, 20), np.float32), {}, None, "expected XxYxZx1x3 or XxYxZx3"),
        (FIELD[:, :, :, None], {}, None, "intent 0, expected 1007"),
        (
            FIELD[:, :, :, None],
            {"intent": 1006},
            None,
            "intent 1006, which ITK reads with x and y flipped, expected",
        ),
        (NAN, {"intent": 1007}, None, "NaN or Inf displacements"),
        (absolute("ras")[:, :, :, None], {"intent": 1007}, None, "holds positions, as SPM"),
        (absolute("lps")[:, :, :, None], {"intent": 1007}, None, "holds positions, as SPM"),
        (absolute("ras"), {}, "ras", "holds positions, as SPM"),
        (absolute("voxel"), {}, "voxel", "holds positions, as SPM"),
        (absolute("voxel"), {}, "l2r", "holds positions, as SPM"),
        (FIELD[:, :, :1], {}, "ras", "expected a 3-D volume"),
    ],
)
def test_what_is_no_displacement_is_refused(tmp_path, data, options, fmt, message):
    path = save_field(tmp_path / "w.nii.gz", data, **options)
    with pytest.raises(ImageError, match=message) as caught:
        read_warp(path, fmt, volume())
    assert caught.value.hint


@pytest.mark.parametrize(
    "matrix",
    [
        nib.eulerangles.euler2mat(0.5, -0.3, 0.4) * 0.6,
        np.diag([1.8, 1, 1]),
        np.eye(3)[[1, 2, 0]],  # a third of a turn: its diagonal is 0
    ],
    ids=["small", "stretched", "turned"],
)
def test_a_strong_affine_is_no_position(tmp_path, matrix):
    """More than any two heads differ by."""
    disp = (world(SMALL, AFFINE) @ (matrix - np.eye(3)).T).astype(np.float32)
    Warp(disp, volume()).save(tmp_path / "w.nii.gz")
    np.testing.assert_array_equal(read_warp(tmp_path / "w.nii.gz").disp, disp)


def test_a_truncated_warp_is_refused(tmp_path):
    Warp(FIELD, volume(), Grid(SMALL, AFFINE)).save(tmp_path / "w.npz", "l2r")
    Warp(np.random.default_rng(0).random(FIELD.shape, np.float32), volume()).save(
        tmp_path / "w.nii.gz"
    )
    for name in ("w.npz", "w.nii.gz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ImageError, match="truncated or damaged"):
            read_warp(tmp_path / name, fixed=volume())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": FIELD, "b": FIELD}, "holds 2 arrays, expected 1"),
        ({"a": FIELD.transpose(3, 0, 1, 2)}, "expected 10x12x14x3|expected 12x14x10x3"),
        ({"a": np.full_like(FIELD, np.inf)}, "NaN or Inf"),
        ({"a": np.array([{}], object)}, "truncated or damaged: Object arrays"),
        ({"a": np.array(["x"])}, "holds no array of numbers"),
        ({"a": np.zeros((60, *SMALL, 3), np.float32)}, "has size more numbers than that"),
    ],
)
def test_an_npz_that_is_no_warp_is_refused(tmp_path, arrays, message):
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    with pytest.raises(UlaeError, match=message):
        read_warp(tmp_path / "w.npz", fixed=volume())


def test_an_npz_says_what_it_lacks(tmp_path):
    np.savez(tmp_path / "w.npz", disp=FIELD)
    with pytest.raises(UsageError, match="is in voxels of the fixed image, which is not given"):
        read_warp(tmp_path / "w.npz")
    with pytest.raises(UsageError, match="is a warp of format l2r, not itk"):
        read_warp(tmp_path / "w.npz", "itk")
    (tmp_path / "w.npz").write_text("no archive")
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_warp(tmp_path / "w.npz", fixed=volume())
    with pytest.raises(ImageError, match="does not exist"):
        read_warp(tmp_path / "none.npz", fixed=volume())


@pytest.mark.follows("leave it out, or give one of them")
@pytest.mark.parametrize("remedy", [(), *((fmt,) for fmt in WARP_FORMATS)])
def test_a_format_that_is_none_is_left_out_or_another(tmp_path, remedy):
    warp = Warp(FIELD, volume(), Grid(SMALL, AFFINE))
    with pytest.raises(UsageError, match="warp format is 'lps', expected one of itk") as caught:
        warp.save(tmp_path / "w.nii.gz", "lps")
    assert caught.value.hint == "leave it out, or give one of them"
    warp.save(tmp_path / "w.nii.gz", *remedy)
    assert (tmp_path / "w.nii.gz").exists()
