"""Bad input by its message, geometry kept to the bit, and files written whole or not at all."""

import errno
import gzip
import logging
import os
import subprocess
import threading
from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import SimpleITK as sitk

from ulae_rt.errors import GeometryError, ImageError, OutputError, UsageError
from ulae_rt.imaging import nifti
from ulae_rt.imaging.nifti import (
    Outputs,
    check_output,
    image_on_grid,
    output_error,
    read_volume,
    save_image,
    volume_from_array,
    write_volume,
)

rng = np.random.default_rng(0)
DATA = rng.integers(0, 200, (7, 8, 9)).astype(np.int16)
AFFINE = np.diag([2.0, 1.0, 1.5, 1.0])


def save(path: Path, data=DATA, affine=AFFINE, **header) -> Path:
    image = nib.Nifti1Image(data, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, content: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def test_a_good_file_keeps_values_type_and_affine(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii.gz"))
    assert volume.data.dtype == np.int16
    assert np.array_equal(volume.data, DATA)
    assert np.array_equal(volume.affine, AFFINE)
    assert volume.spacing_mm == (2.0, 1.0, 1.5)


def test_one_trailing_frame_is_dropped(tmp_path):
    assert read_volume(save(tmp_path / "a.nii", DATA[..., None])).shape == DATA.shape


def test_scaled_values_are_read_scaled(tmp_path):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.data.dtype == np.float32
    # Halves are exact in single precision.
    np.testing.assert_array_equal(volume.data, nib.load(tmp_path / "a.nii.gz").get_fdata())


def test_big_endian_values_become_native(tmp_path):
    image = nib.Nifti1Image(DATA.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.data.dtype.isnative
    assert np.array_equal(volume.data, DATA)


def test_microns_are_millimetres_as_itk_has_it(tmp_path):
    image = nib.Nifti1Image(DATA, np.diag([1000.0, 1000, 1000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz").spacing_mm == pytest.approx((1, 1, 1))
    assert sitk.ReadImage(str(tmp_path / "a.nii.gz")).GetSpacing() == pytest.approx((1, 1, 1))


def missing(p):
    return p / "no.nii.gz"


def folder(p):
    (p / "d.nii.gz").mkdir()
    return p / "d.nii.gz"


def other_suffix(p):
    (p / "a.mgz").write_bytes(b"x")
    return p / "a.mgz"


def empty_file(p):
    (p / "a.nii.gz").write_bytes(b"")
    return p / "a.nii.gz"


def text(p):
    (p / "a.nii").write_text("hello " * 100)
    return p / "a.nii"


def not_gzip(p):
    save(p / "b.nii")
    return (p / "b.nii").rename(p / "a.nii.gz")


def truncated_gzip(p):
    path = save(p / "a.nii.gz", rng.random((20, 20, 20)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:9000])
    return path


def truncated_header(p):
    path = save(p / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:30])
    return path


def truncated_plain(p):
    path = save(p / "a.nii")
    path.write_bytes(path.read_bytes()[:800])
    return path


def damaged_gzip(p):
    path = save(p / "a.nii.gz", rng.random((20, 20, 20)).astype(np.float32))
    return patched(path, 9000, b"\xff" * 500)


def damaged_at_its_begin(p):
    """Where the header is packed, with what says it is a NIfTI."""
    raw = bytearray(save(p / "b.nii").read_bytes())
    packed = bytearray(gzip.compress(bytes(raw), mtime=0))
    packed[20:60] = b"\xff" * 40
    (p / "a.nii.gz").write_bytes(packed)
    return p / "a.nii.gz"


def nan(p):
    data = DATA.astype(np.float32)
    data[1, 2, 3] = np.nan
    data[3, 2, 1] = np.inf
    return save(p / "a.nii.gz", data)


def colour(p):
    rgb = np.zeros(DATA.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return save(p / "a.nii.gz", rgb)


def no_affine(p):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, p / "a.nii.gz")
    return p / "a.nii.gz"


def header_of_size(*dim):
    def make(p):
        path = save(p / "a.nii")
        values = np.array([len(dim), *dim] + [1] * (7 - len(dim)), np.int16)
        return patched(path, 40, values.tobytes())

    return make


def with_sform(rows):
    def make(p):
        path = save(p / "a.nii")
        return patched(path, 280, np.array(rows, np.float32).tobytes())

    return make


SINGULAR = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
NAN_ROW = [[np.nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
SHEARED = [[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
TINY = [[1e-4, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (missing, ImageError, "does not exist"),
        (folder, ImageError, "is a folder"),
        (other_suffix, ImageError, r"expected \.nii or \.nii\.gz"),
        (empty_file, ImageError, "is empty"),
        (text, ImageError, "not a readable NIfTI"),
        (not_gzip, ImageError, "is not compressed, though its name ends in .gz"),
        (truncated_gzip, ImageError, "truncated or damaged"),
        (truncated_header, ImageError, "truncated or damaged|not a readable"),
        (truncated_plain, ImageError, "truncated or damaged"),
        (damaged_gzip, ImageError, "truncated or damaged"),
        (damaged_at_its_begin, ImageError, "truncated or damaged"),
        (nan, ImageError, "has 2 NaN or Inf voxels of 504"),
        (colour, ImageError, "colour voxels"),
        (lambda p: save(p / "a.nii", DATA.astype(np.complex64)), ImageError, "complex64 voxels"),
        (lambda p: save(p / "a.nii", np.zeros_like(DATA)), ImageError, "constant: .* 0$"),
        (lambda p: save(p / "a.nii", np.full_like(DATA, 7)), ImageError, "constant: .* 7$"),
        (lambda p: save(p / "a.nii", np.stack([DATA] * 2, 3)), ImageError, "7x8x9x2, expected one"),
        (lambda p: save(p / "a.nii", DATA[:, :, 0]), ImageError, "size 7x8, expected a 3-D"),
        (lambda p: save(p / "a.nii", DATA[:, :, :1]), ImageError, "size 7x8x1, expected a 3-D"),
        (header_of_size(7, 0, 9), ImageError, "no voxels|not a readable"),
        (header_of_size(30000, 30000, 30000), ImageError, "more than 1024 on an axis"),
        (header_of_size(1000, 1000, 1000), ImageError, r"or 5e\+08 voxels"),
        (no_affine, GeometryError, "sform_code and qform_code are 0"),
        (with_sform(SINGULAR), GeometryError, "cannot be inverted"),
        (with_sform(NAN_ROW), GeometryError, "NaN or Inf in its affine"),
        (with_sform(SHEARED), GeometryError, "sheared"),
        (with_sform(TINY), GeometryError, r"0\.0001x1x1 mm"),
    ],
)
def test_bad_input_says_what_is_wrong(tmp_path, make, error, message):
    with pytest.raises(error, match=message) as caught:
        read_volume(make(tmp_path))
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = save(tmp_path / "a.nii.gz")
    path.chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        read_volume(path)


def test_permission_denied_is_said(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nifti.nib, "load", refuse)
    with pytest.raises(ImageError, match="permission denied"):
        read_volume(save(tmp_path / "a.nii.gz"))


def test_labels_must_be_whole_numbers_and_may_be_constant(tmp_path):
    halves = DATA.astype(np.float32) + 0.5
    with pytest.raises(ImageError, match="holds fractions"):
        read_volume(save(tmp_path / "a.nii.gz", halves), kind="labels")
    read_volume(save(tmp_path / "b.nii.gz", np.zeros_like(DATA)), kind="labels")
    read_volume(save(tmp_path / "c.nii.gz", DATA.astype(np.float32)), kind="labels")


def test_differing_forms_warn_and_the_sform_is_used(tmp_path, caplog):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.set_sform(AFFINE, 1)
    shifted = AFFINE.copy()
    shifted[0, 3] = 5
    image.set_qform(shifted, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    with caplog.at_level(logging.WARNING):
        volume = read_volume(tmp_path / "a.nii.gz")
    assert "sform and qform differ by up to 5 mm; the sform is used" in caplog.text
    assert np.array_equal(volume.affine, AFFINE)


def test_agreeing_forms_are_silent(tmp_path, caplog):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    read_volume(tmp_path / "a.nii.gz")
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [np.bool_, np.float16, np.float64, np.int64, np.uint8])
def test_arrays_of_any_number_type(dtype):
    volume = volume_from_array((DATA > 100).astype(dtype), AFFINE, name="moving")
    assert volume.data.sum() == (DATA > 100).sum()


def test_array_with_a_wrong_affine():
    with pytest.raises(GeometryError, match=r"affine of float64 and shape \(3, 3\)"):
        volume_from_array(DATA, np.eye(3), name="moving")


OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-1.0, 1.3, 2.0]), [10.5, -20.25, 30.125]
)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_writing_keeps_sform_qform_codes_and_units_to_the_bit(tmp_path, suffix, image_class):
    image = image_class(DATA, OBLIQUE)
    image.set_sform(OBLIQUE, 4)
    image.set_qform(OBLIQUE + np.diag([0.0, 0, 0, 0]), 2)
    image.header.set_intent("t test", (2,))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "a.nii")
    like = read_volume(tmp_path / "a.nii")
    out = tmp_path / f"b{suffix}"
    write_volume(out, rng.random(DATA.shape).astype(np.float32), like)
    before, after = nib.load(tmp_path / "a.nii").header, nib.load(out).header
    forms = "sform_code qform_code xyzt_units srow_x srow_y srow_z quatern_b quatern_c quatern_d"
    for field in f"{forms} qoffset_x qoffset_y qoffset_z".split():
        assert before[field].tobytes() == after[field].tobytes(), field
    assert np.array_equal(before["pixdim"][:4], after["pixdim"][:4])
    assert after.get_intent()[0] == "none"
    assert after.get_data_dtype() == np.float32


def test_written_values_come_back_and_itk_reads_them(tmp_path):
    like = volume_from_array(DATA, OBLIQUE, name="fixed")
    data = rng.normal(size=DATA.shape).astype(np.float32)
    data[:3] = 0
    write_volume(tmp_path / "a.nii.gz", data, like)
    assert np.array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata(dtype=np.float32), data)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(image).T, data)
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:4] == b"\x5c\x01\x00\x00"


def test_the_same_image_gives_the_same_bytes(tmp_path):
    like = volume_from_array(DATA, OBLIQUE, name="fixed")
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, DATA, like)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    like = volume_from_array(DATA, AFFINE, name="fixed")

    def half(image, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(nifti, "save_image", half)
    with pytest.raises(error):
        write_volume(tmp_path / "a.nii.gz", DATA, like)
    assert list(tmp_path.iterdir()) == []


def interrupted(path):
    with Outputs([path], overwrite=True) as outputs:
        outputs.temporary(path).write_bytes(b"half")
        raise KeyboardInterrupt


def test_an_interrupted_write_keeps_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a.nii.gz").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == b"old"


def test_a_full_disk_is_an_output_error():
    image = image_on_grid(
        rng.random((40, 40, 40)), volume_from_array(DATA, AFFINE, name="fixed"), AFFINE
    )
    with pytest.raises(OutputError, match="the disk is full"):
        save_image(image, "/dev/full")


def test_outputs_are_checked_before_work(tmp_path):
    good = tmp_path / "a.nii.gz"
    check_output(good, overwrite=False)
    good.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(good, overwrite=False)
    check_output(good, overwrite=True)
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        check_output(tmp_path / "no" / "a.nii", overwrite=False)
    with pytest.raises(UsageError, match=r"must end in \.nii\.gz or \.nii"):
        check_output(tmp_path / "a.img", overwrite=False)
    (tmp_path / "d.nii").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "d.nii", overwrite=True)
    with pytest.raises(UsageError, match="also an input"):
        Outputs([good], overwrite=True, inputs=[tmp_path / "x" / ".." / "a.nii.gz"])
    with pytest.raises(UsageError, match="named twice"):
        Outputs([tmp_path / "b.nii", tmp_path / "b.nii"], overwrite=True)


def test_a_closed_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti.os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(tmp_path / "a.nii", overwrite=False)


def write(outputs, path, content):
    outputs.temporary(path).write_bytes(content)


@pytest.mark.follows("give --overwrite to replace it")
def test_of_two_writers_the_second_is_told_and_loses_nothing_of_the_first(tmp_path):
    places = [tmp_path / "a.nii", tmp_path / "b.nii"]
    with Outputs(places, overwrite=False) as first, Outputs(places, overwrite=False) as second:
        for path in places:
            write(first, path, b"first")
            write(second, path, b"second")
        first.commit()
        with pytest.raises(OutputError, match=r"a\.nii exists already") as caught:
            second.commit()
    assert {path.read_bytes() for path in places} == {b"first"}
    assert sorted(tmp_path.iterdir()) == places
    assert "--overwrite" in caught.value.hint
    with Outputs(places, overwrite=True) as again:  # the hint
        for path in places:
            write(again, path, b"again")
        again.commit()
    assert {path.read_bytes() for path in places} == {b"again"}


def test_two_that_replace_at_once_mix_nothing(tmp_path):
    places = [tmp_path / f"{name}.nii" for name in "abcdefgh"]
    start = threading.Barrier(4)

    def replace(content):
        for _ in range(10):
            with Outputs(places, overwrite=True) as outputs:
                for path in places:
                    write(outputs, path, content)
                start.wait()
                outputs.commit()

    threads = [threading.Thread(target=replace, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in places}) == 1
    assert sorted(tmp_path.iterdir()) == places


@pytest.mark.parametrize("links", [True, False], ids=["", "no links"])
def test_a_rename_that_fails_takes_back_those_before_it(tmp_path, monkeypatch, links):
    old, new, bad = (tmp_path / f"{name}.nii" for name in ("old", "new", "bad"))
    old.write_bytes(b"before")
    replace = os.replace

    def fails(source, target):
        if target == bad:
            raise OSError(5, "Input/output error")
        replace(source, target)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(nifti.os, "replace", fails)
    if not links:
        monkeypatch.setattr(nifti.os, "link", refuse)
    with Outputs([new, old, bad], overwrite=True) as outputs:
        for path in (new, old, bad):
            write(outputs, path, b"after")
        with pytest.raises(OutputError, match=r"bad\.nii cannot be written: Input/output error"):
            outputs.commit()
    assert list(tmp_path.iterdir()) == [old]
    # Without a second name what was there is gone: the new file is better than none.
    assert old.read_bytes() == (b"before" if links else b"after")


def test_a_link_to_nothing_is_there_already(tmp_path):
    link = tmp_path / "a.nii"
    link.symlink_to("annex/a.nii")
    with pytest.raises(OutputError, match="exists already"):
        check_output(link, overwrite=False)
    with Outputs([link], overwrite=True) as outputs:
        write(outputs, link, b"new")
        outputs.commit()
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()


def test_long_names_are_written_or_refused_before_work(tmp_path):
    name = tmp_path / f"{'a' * 248}.nii.gz"
    with Outputs([name], overwrite=False) as outputs:
        write(outputs, name, b"new")
        outputs.commit()
    assert name.read_bytes() == b"new"
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        check_output(tmp_path / f"{'a' * 250}.nii.gz", overwrite=False)


@pytest.mark.follows("set it with nibabel's set_sform, fslorient or 3drefit")
@pytest.mark.parametrize(
    "make", [no_affine, with_sform(NAN_ROW), with_sform(SINGULAR), with_sform(TINY)]
)
def test_an_affine_that_is_none_is_set_with_nibabel(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(GeometryError) as caught:
        read_volume(path)
    assert "set it with nibabel's set_sform" in caught.value.hint
    image = nib.load(path)
    image.set_sform(AFFINE, code=1)
    nib.save(image, tmp_path / "set.nii.gz")
    volume = read_volume(tmp_path / "set.nii.gz")
    assert np.array_equal(volume.affine, AFFINE)
    assert np.array_equal(volume.data, DATA)


@pytest.mark.follows(
    "resample it to an orthogonal grid first, e.g. with nibabel.processing.resample_to_output"
)
def test_a_sheared_affine_is_resampled_with_nibabel(tmp_path):
    path = with_sform(SHEARED)(tmp_path)
    with pytest.raises(GeometryError, match="sheared") as caught:
        read_volume(path)
    assert "nibabel.processing.resample_to_output" in caught.value.hint
    straight = nib.processing.resample_to_output(nib.load(path), (1, 1, 1), order=1)
    nib.save(straight, tmp_path / "straight.nii.gz")
    assert read_volume(tmp_path / "straight.nii.gz").data.max() > 100


@pytest.mark.follows("extract one frame first, e.g. with fslroi or nibabel's four_to_three")
def test_one_frame_of_several_is_extracted_with_nibabel(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.stack([DATA, DATA + 1], 3))
    with pytest.raises(ImageError, match="expected one 3-D volume") as caught:
        read_volume(path)
    assert "four_to_three" in caught.value.hint
    nib.save(nib.four_to_three(nib.load(path))[1], tmp_path / "frame.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "frame.nii.gz").data, DATA + 1)


@pytest.mark.follows("replace them, e.g. with numpy.nan_to_num, once you know where they come from")
def test_values_that_are_none_are_replaced_with_numpy(tmp_path):
    path = nan(tmp_path)
    with pytest.raises(ImageError, match="2 NaN or Inf") as caught:
        read_volume(path)
    assert "numpy.nan_to_num" in caught.value.hint
    image = nib.load(path)
    data = np.nan_to_num(image.get_fdata(dtype=np.float32), posinf=0, neginf=0)
    nib.save(nib.Nifti1Image(data, image.affine), path)
    assert np.count_nonzero(read_volume(path).data != DATA) <= 2


@pytest.mark.follows("copy or download it again; 'gzip -t' says whether it is whole")
@pytest.mark.parametrize("make", [truncated_gzip, damaged_gzip, damaged_at_its_begin])
def test_a_damaged_file_is_found_out_by_gzip_and_copied_again(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(ImageError, match="truncated or damaged") as caught:
        read_volume(path)
    assert "'gzip -t' says whether it is whole" in caught.value.hint
    check = ["gzip", "-t", str(path)]
    assert subprocess.run(check, capture_output=True).returncode != 0
    save(path)  # as a second copy would be
    assert subprocess.run(check).returncode == 0
    assert np.array_equal(read_volume(path).data, DATA)


def test_a_damaged_file_that_is_not_packed_has_nothing_for_gzip_to_test(tmp_path):
    with pytest.raises(ImageError, match="truncated or damaged") as caught:
        read_volume(truncated_plain(tmp_path))
    assert caught.value.hint == "copy or download it again"


@pytest.mark.follows("convert it first, e.g. with mri_convert or dcm2niix")
@pytest.mark.follows("give a NIfTI-1 or NIfTI-2 file; convert other formats first")
@pytest.mark.parametrize(("name", "message"), [("a.mgz", "is not named"), ("a.nii", "readable")])
def test_a_file_of_freesurfer_is_converted(tmp_path, name, message):
    """As it is called, and under another name; nibabel does what mri_convert does."""
    mgh = tmp_path / "as it was.mgz"
    nib.save(nib.MGHImage(DATA.astype(np.float32), AFFINE), mgh)
    content = mgh.read_bytes()
    path = tmp_path / name
    path.write_bytes(content if name.endswith("mgz") else gzip.decompress(content))
    with pytest.raises(ImageError, match=message) as caught:
        read_volume(path)
    assert "with mri_convert" in caught.value.hint
    image = nib.load(mgh)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), tmp_path / "b.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "b.nii.gz").data, DATA)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.full((4, 4), np.nan), "expected finite numbers"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "cannot be inverted"),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]), "0 0 0 1 in its"),
        (np.eye(4) + 0j, "an affine of complex128"),
        (np.eye(4).astype(str), "an affine of <U"),
        (np.eye(3), "shape \\(3, 3\\)"),
    ],
)
def test_an_affine_that_is_none_is_refused_as_such(affine, words):
    data = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    with pytest.raises(GeometryError, match=words) as caught:
        volume_from_array(data, affine, name="scan")
    assert "\n" not in str(caught.value)


@pytest.mark.follows("fill it first, with array.filled(0)")
def test_a_masked_array_is_not_taken_whole():
    data = np.ma.masked_greater(np.arange(27, dtype=np.float32).reshape(3, 3, 3), 20)
    with pytest.raises(ImageError, match="scan is a masked array"):
        volume_from_array(data, np.eye(4), name="scan")
    assert volume_from_array(data.filled(0), np.eye(4), name="scan").data.max() == 20


@pytest.mark.follows("scale its values, e.g. with numpy")
@pytest.mark.parametrize("factor", [1e300, 1e-310])
def test_values_that_single_precision_has_not_are_named_as_such(tmp_path, factor):
    data = factor * np.arange(27, dtype=np.float64).reshape(3, 3, 3)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ImageError, match="single precision has no others"):
        read_volume(tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(data / factor, np.eye(4)), tmp_path / "a.nii.gz")
    assert read_volume(tmp_path / "a.nii.gz").data.max() == 26


def test_errors_name_the_file_as_the_user_does(tmp_path):
    hidden = tmp_path / ".moved.123-0949abfb.part.nii.gz"
    error = output_error(hidden, OSError(errno.EFBIG, "File too large"))
    assert str(error) == f"{tmp_path / 'moved.nii.gz'} cannot be written: File too large"
