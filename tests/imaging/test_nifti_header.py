"""Headers that contradict themselves or their file: refused before voxels are read."""

import gzip
import shlex
import struct
import subprocess

import nibabel as nib
import numpy as np
import pytest

from ulae_rt.errors import GeometryError, ImageError, OutputError, UlaeError
from ulae_rt.imaging.nifti import read_volume

DATA = np.random.default_rng(0).integers(0, 200, (7, 8, 9)).astype(np.int16)
AFFINE = np.diag([2.0, 1.0, 1.5, 1.0])
# Where the fields stand and how they are stored, NIfTI-1 and NIfTI-2.
FIELDS = {
    nib.Nifti1Image: {
        "dim0": (40, "h"), "bitpix": (72, "h"), "pixdim2": (84, "f"), "vox_offset": (108, "f"),
        "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    },
    nib.Nifti2Image: {
        "dim0": (16, "q"), "bitpix": (14, "h"), "pixdim2": (120, "d"), "vox_offset": (168, "q"),
        "scl_slope": (176, "d"), "scl_inter": (184, "d"),
    },
}  # fmt: skip
NAN, INF = float("nan"), float("inf")


def save(path, image_class=nib.Nifti1Image, order="<", extension=b"", **changes):
    """A scan with fields of its header set to what no library would write."""
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(DATA.dtype)
    image = image_class(DATA, AFFINE, header)
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", extension))
    raw = bytearray(image.to_bytes())
    for name, value in changes.items():
        at, kind = FIELDS[image_class][name]
        struct.pack_into(order + kind, raw, at, value)
    path.write_bytes(gzip.compress(bytes(raw)) if path.name.endswith(".gz") else bytes(raw))
    return path


CLASSES = pytest.mark.parametrize("image_class", FIELDS, ids=["1", "2"])
ORDERS = pytest.mark.parametrize("order", "<>", ids=["little", "big"])
SUFFIXES = pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])


@CLASSES
@ORDERS
@SUFFIXES
def test_what_is_right_is_read(tmp_path, image_class, order, suffix):
    for changes in (
        {}, {"bitpix": 0}, {"scl_slope": NAN, "scl_inter": NAN}, {"scl_slope": 0},
        {"extension": b"a note of 40 bytes, filled up with zeros"},
    ):  # fmt: skip
        volume = read_volume(save(tmp_path / f"a{suffix}", image_class, order, **changes))
        np.testing.assert_array_equal(volume.data, DATA)


@CLASSES
@ORDERS
@SUFFIXES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vox_offset": 0}, "has its voxels begin at byte 0 .vox_offset., expected a whole number"),
        ({"vox_offset": 16}, "begin at byte 16 "),
        ({"vox_offset": 336}, "begin at byte 336 .*a whole number from (352|544) on"),
        ({"vox_offset": -352}, "begin at byte -352 "),
        ({"extension": b"x" * 90, "vox_offset": 400}, "has an extension of 112 bytes where"),
        ({"extension": b"x" * 1000, "vox_offset": 560}, "has an extension of 1008 bytes where"),
        ({"bitpix": 8}, "its datatype 4 has 16 bits a voxel, and its bitpix is 8"),
        ({"bitpix": 32}, "has 16 bits a voxel, and its bitpix is 32"),
        ({"scl_slope": 0, "scl_inter": 10}, "slope 0, which means none, and the intercept 10"),
        ({"scl_slope": NAN, "scl_inter": -3}, "slope nan, which means none, and the intercept -3"),
        ({"scl_slope": INF}, "the scaling slope inf"),
        ({"scl_slope": 2, "scl_inter": NAN}, "the scaling slope 2 and intercept nan"),
        ({"scl_slope": 2, "scl_inter": -INF}, "the scaling slope 2 and intercept -inf"),
        ({"pixdim2": -1}, "has voxels of 2x-1x1.5 mm in pixdim"),
        ({"pixdim2": 0}, "has voxels of 2x0x1.5 mm in pixdim"),
        ({"pixdim2": NAN}, "has voxels of 2xnanx1.5 mm in pixdim"),
    ],
)
def test_contradictions_are_refused(tmp_path, image_class, order, suffix, changes, message):
    extension = changes.get("extension", b"")
    if image_class is nib.Nifti2Image and len(extension) == 90:
        changes = {**changes, "vox_offset": 592}
    path = save(tmp_path / f"a{suffix}", image_class, order, **changes)
    with pytest.raises(ImageError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@SUFFIXES
@pytest.mark.parametrize("offset", [NAN, INF, 352.5, 1e9])
def test_a_place_of_the_voxels_that_is_none(tmp_path, suffix, offset):
    """In NIfTI-1 it is a floating-point number."""
    with pytest.raises(ImageError, match=r"vox_offset|bytes between its header|truncated"):
        read_volume(save(tmp_path / f"a{suffix}", vox_offset=offset))


@CLASSES
@pytest.mark.parametrize("dimensions", [0, -3, 8, 300])
def test_a_number_of_dimensions_that_is_none(tmp_path, image_class, dimensions):
    with pytest.raises(ImageError, match=f"has {dimensions} dimensions by its header, expected 3"):
        read_volume(save(tmp_path / "a.nii", image_class, dim0=dimensions))


def run(hint):
    """Follow the command that a hint ends with."""
    subprocess.run(hint.partition(": ")[2], shell=True, check=True)


@pytest.mark.follows("unpack it once: gzip -dc")
@pytest.mark.parametrize("folder", ["plain", "with a space"])
def test_a_name_that_hides_the_packing_is_said_and_the_hint_works(tmp_path, folder):
    place = tmp_path / folder
    place.mkdir()
    packed = save(place / "packed.nii.gz").rename(place / "packed.nii")
    with pytest.raises(ImageError, match=r"is compressed with gzip, though its name") as caught:
        read_volume(packed)
    run(caught.value.hint)
    np.testing.assert_array_equal(read_volume(place / "packed.nii.gz").data, DATA)

    plain = save(place / "plain.nii").rename(place / "plain.nii.gz")
    with pytest.raises(ImageError, match=r"is not compressed, though its name") as caught:
        read_volume(plain)
    run(caught.value.hint)
    np.testing.assert_array_equal(read_volume(place / "plain.nii").data, DATA)

    twice = place / "twice.nii.gz"
    twice.write_bytes(gzip.compress(save(place / "once.nii.gz").read_bytes()))
    with pytest.raises(ImageError, match="is compressed twice") as caught:
        read_volume(twice)
    run(caught.value.hint)
    (made,) = shlex.split(caught.value.hint)[-1:]
    np.testing.assert_array_equal(read_volume(made).data, DATA)


def test_a_link_to_nothing_is_said(tmp_path):
    link = tmp_path / "a.nii.gz"
    link.symlink_to("annex/objects/a.nii.gz")
    with pytest.raises(ImageError, match=r"is a link to annex/objects/a\.nii\.gz, which does not"):
        read_volume(link)
    (tmp_path / "annex" / "objects").mkdir(parents=True)
    save(tmp_path / "annex" / "objects" / "a.nii.gz")  # as datalad get would
    np.testing.assert_array_equal(read_volume(link).data, DATA)


def test_a_name_that_is_too_long_is_said(tmp_path):
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_volume(tmp_path / f"{'a' * 300}.nii")


LARGE = 2**53


@pytest.mark.follows(
    "number its labels from 1, e.g. with numpy.unique(labels, return_inverse=True)",
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
@SUFFIXES
def test_labels_that_double_precision_would_change(tmp_path, dtype, suffix):
    labels = np.zeros((4, 4, 4), dtype)
    labels[1:3] = LARGE
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=labels.dtype), tmp_path / f"a{suffix}")
    assert read_volume(tmp_path / f"a{suffix}", kind="labels").data.max() == LARGE
    labels[2, 2, 2] = np.nextafter(np.float64(LARGE), np.inf) if dtype == np.float64 else LARGE + 1
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=labels.dtype), tmp_path / f"a{suffix}")
    with pytest.raises(ImageError, match=rf"holds labels up to {int(labels.max())}, expected"):
        read_volume(tmp_path / f"a{suffix}", kind="labels")
    # The hint.
    numbered = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
    nib.save(nib.Nifti1Image(numbered, np.eye(4)), tmp_path / f"a{suffix}")
    assert read_volume(tmp_path / f"a{suffix}", kind="labels").data.max() == 2


def test_negative_labels_are_held_to_it_too(tmp_path):
    labels = np.full((4, 4, 4), -LARGE - 1, np.int64)
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=labels.dtype), tmp_path / "a.nii")
    with pytest.raises(ImageError, match=f"holds labels up to {LARGE + 1}"):
        read_volume(tmp_path / "a.nii", kind="labels")


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_values_beyond_single_precision_are_refused_without_a_word_of_numpy(tmp_path, value):
    data = DATA.astype(np.float64)
    data[0, 0, 0] = value
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "a.nii")
    with pytest.raises(ImageError, match="single precision has no others"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.follows("write it again with the tool that made it, e.g. as mri_convert IN OUT")
def test_the_hints_for_scaling_pixdim_and_damage_work(tmp_path):
    """What each asks for, done with nibabel."""
    path = save(tmp_path / "a.nii", scl_slope=0, scl_inter=10)
    with pytest.raises(UlaeError, match="slope"):
        read_volume(path)
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.set_slope_inter(1, 10)
    nib.save(image, path)
    assert read_volume(path).data.dtype == np.float32

    path = save(tmp_path / "b.nii", pixdim2=-1)
    with pytest.raises(GeometryError, match="pixdim"):
        read_volume(path)
    image = nib.load(path)
    image.header.set_zooms((2, 1, 1.5))
    path = tmp_path / "b2.nii"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
    assert read_volume(path).spacing_mm == (2, 1, 1.5)

    for name, changes in (("c", {"bitpix": 8}), ("d", {"vox_offset": 0})):
        path = save(tmp_path / f"{name}.nii", **changes)
        with pytest.raises(ImageError) as caught:
            read_volume(path)
        assert "write it again with the tool that made it" in caught.value.hint
        np.testing.assert_array_equal(read_volume(save(path)).data, DATA)


@pytest.mark.follows("make it: mkdir -p {}")
def test_the_hint_for_a_folder_that_is_not_there_works(tmp_path):
    from ulae_rt.imaging.nifti import check_output

    place = tmp_path / "new one" / "deep" / "a.nii.gz"
    with pytest.raises(OutputError, match="does not exist") as caught:
        check_output(place, overwrite=False)
    run(caught.value.hint)
    check_output(place, overwrite=False)
