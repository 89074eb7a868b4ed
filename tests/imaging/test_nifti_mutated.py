"""Files that are nearly right: each is read or refused, soon and in little memory."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ulae_rt.errors import ImageError
from ulae_rt.imaging.nifti import Volume, read_volume

HEADER = 348
# Room for a few copies of what a file of this size could honestly hold, and for nibabel itself.
LIMIT_BYTES = 64 << 20


def original(image_class=nib.Nifti1Image) -> bytes:
    data = np.arange(8 * 9 * 7, dtype=np.int16).reshape(8, 9, 7)
    image = image_class(data, np.diag([-1.0, 1.2, 2.0, 1.0]))
    image.set_qform(image.affine, code=1)
    return bytes(image.to_bytes())


ORIGINAL = original()
ORIGINAL_2 = original(nib.Nifti2Image)
place = st.integers(0, len(ORIGINAL) - 1)
in_header = st.integers(0, HEADER + 3)
changes = st.lists(st.tuples(st.one_of(in_header, place), st.integers(0, 255)), max_size=8)
# Whole fields at once: dim, datatype, bitpix, pixdim, vox_offset, scl_slope, xyzt_units, codes.
FIELDS = (40, 42, 44, 46, 48, 70, 72, 76, 80, 84, 88, 108, 112, 116, 123, 252, 254, 280, 284, 344)
values = st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\x7f"])
fields = st.lists(st.tuples(st.sampled_from(FIELDS), values), max_size=4)
cut = st.one_of(st.none(), place)
# 512 million voxels of eight bytes, in a file of a kilobyte.
HUGE = [(42, b"\0\4"), (44, b"\0\4"), (46, b"\xe8\1"), (70, b"\x40\0"), (72, b"\x40\0")]
quick = settings(
    database=None,
    max_examples=60, deadline=2000, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def mutated(changes, fields, cut) -> bytes:
    content = bytearray(ORIGINAL)
    for index, value in changes:
        content[index] = value
    for index, value in fields:
        content[index : index + len(value)] = value
    return bytes(content[:cut])


def read(path, kind="image"):
    """The volume, or None if it is refused as it should be."""
    tracemalloc.start()
    try:
        volume = read_volume(path, kind=kind)
    except ImageError as error:
        refused = error
    else:
        refused = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LIMIT_BYTES
    if refused is not None:
        assert str(path) in str(refused)
        assert refused.hint
        return None
    assert isinstance(volume, Volume)
    assert volume.data.ndim == 3
    assert np.isfinite(volume.data).all()
    assert np.isfinite(volume.affine).all()
    assert abs(np.linalg.det(volume.affine[:3, :3])) > 0
    return volume


def test_the_original_is_read(tmp_path):
    (tmp_path / "a.nii").write_bytes(ORIGINAL)
    assert read(tmp_path / "a.nii").shape == (8, 9, 7)


@quick
@given(changes, fields, cut, st.sampled_from(["image", "labels"]))
@example([], [(42, b"\xff\x7f"), (44, b"\xff\x7f"), (46, b"\x10\0")], None, "image")
def test_a_plain_file(tmp_path, caplog, changes, fields, cut, kind):
    (tmp_path / "a.nii").write_bytes(mutated(changes, fields, cut))
    read(tmp_path / "a.nii", kind)


@quick
@given(changes, fields, cut)
# 512 million voxels of eight bytes in a file of a kilobyte.
@example(
    [], [(42, b"\0\4"), (44, b"\0\4"), (46, b"\xe8\1"), (70, b"\x40\0"), (72, b"\x40\0")], None
)
def test_a_packed_file(tmp_path, caplog, changes, fields, cut):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(mutated(changes, fields, cut), mtime=0))
    read(tmp_path / "a.nii.gz")


# Bytes of bitpix, pixdim, vox_offset, scl_slope and scl_inter, and of the extender.
LAYOUT = {
    False: (ORIGINAL, 352, [*range(72, 92), *range(108, 120), *range(348, 352)]),
    True: (ORIGINAL_2, 544, [14, 15, *range(112, 136), *range(168, 192), *range(540, 544)]),
}
INTERESTING = st.sampled_from([0, 1, 16, 63, 64, 67, 96, 127, 128, 176, 191, 192, 240, 255])


@quick
@given(
    st.booleans(), st.booleans(), st.lists(st.tuples(st.integers(0, 99), INTERESTING), max_size=3)
)
@example(False, False, [(22, 0), (23, 0)])  # the voxels begin at byte 0
@example(False, True, [(22, 0), (23, 0)])
def test_other_bytes_are_never_taken_for_the_voxels(tmp_path, caplog, packed, second, changes):
    """Whatever a header says of its own layout: the file's values, scaled as it says, or none."""
    content, begin, places = LAYOUT[second]
    content = bytearray(content)
    for index, value in changes:
        content[places[index % len(places)]] = value
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(bytes(content), mtime=0) if packed else bytes(content))
    volume = read(path, "values")
    if volume is None:
        return
    slope, inter = nib.load(path).dataobj.slope, nib.load(path).dataobj.inter
    stored = np.frombuffer(content[begin:], "<i2").astype(np.float64)
    np.testing.assert_array_equal(volume.data.ravel("F"), stored * slope + inter)


@quick
@given(st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4), cut)
def test_a_packed_file_whose_packing_is_damaged(tmp_path, caplog, changes, cut):
    content = bytearray(gzip.compress(ORIGINAL, mtime=0))
    for index, value in changes:
        content[index % len(content)] = value
    (tmp_path / "a.nii.gz").write_bytes(bytes(content[:cut]))
    volume = read(tmp_path / "a.nii.gz")
    if volume is not None:  # what is read in spite of all has the sum of what was packed
        np.testing.assert_array_equal(volume.data.ravel("F"), np.frombuffer(ORIGINAL[352:], "<i2"))


@quick
@given(st.binary(max_size=600), st.sampled_from([".nii", ".nii.gz"]))
def test_anything(tmp_path, caplog, content, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert read(tmp_path / f"a{suffix}") is None


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((1000, 1000, 500))
    header.set_sform(np.eye(4), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 4000))
    with pytest.raises(ImageError, match=r"its header promises 4000000000 bytes of voxels"):
        read_volume(tmp_path / "bomb.nii.gz")
    assert read(tmp_path / "bomb.nii.gz") is None
