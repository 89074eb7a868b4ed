"""A label map is held against its scan before it is carried anywhere."""

import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _support.brains import GEOMETRIES, brain_at, centre_of, world
from ulae_rt.errors import GeometryError, ImageError
from ulae_rt.imaging.labelmap import check_carried, check_labels, refuse_empty
from ulae_rt.imaging.nifti import read_volume, volume_from_array


def scan_and_labels(geometry="LAS"):
    """A head without symmetry, and labels by its brightness: one a shell."""
    shape, affine = GEOMETRIES[geometry]
    values = brain_at(world(shape, affine) - centre_of(shape, affine))
    scan = volume_from_array(np.rint(values).astype(np.int16), affine, name="scan")
    labels = volume_from_array(
        (values // 30).astype(np.uint8), affine, name="labels", kind="labels"
    )
    return scan, labels


def verdict(labels, scan, caplog):
    """``right``, ``refused``, or the warning."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            check_labels(labels, scan)
        except GeometryError:
            return "refused"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) <= 1
    return messages[0] if messages else "right"


def moved(volume, mm, axis=0):
    affine = volume.affine.copy()
    affine[axis, 3] += mm
    return replace(volume, affine=affine)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_labels_in_their_place_are_right(geometry, caplog):
    scan, labels = scan_and_labels(geometry)
    assert verdict(labels, scan, caplog) == "right"


def test_labels_with_another_affine_are_refused_or_doubted(caplog):
    scan, labels = scan_and_labels("far")
    assert verdict(replace(labels, affine=np.eye(4)), scan, caplog) == "refused"
    scan, labels = scan_and_labels("LAS")
    assert verdict(moved(labels, 300), scan, caplog) == "refused"
    said = verdict(moved(labels, 15), scan, caplog)
    assert "labels may not belong to the scan scan" in said
    assert "% of its labelled voxels lie on the background" in said
    assert "it fits much better voxel by voxel than by the two headers" in said
    assert "fits much better voxel by voxel" in verdict(moved(labels, 5), scan, caplog)


@pytest.mark.parametrize(("axis", "name"), [(0, "first"), (1, "second"), (2, "third")])
def test_mirrored_labels_are_doubted(axis, name, caplog):
    scan, labels = scan_and_labels()
    mirrored = replace(labels, data=np.flip(labels.data, axis))
    assert f"mirrored along its {name} array axis" in verdict(mirrored, scan, caplog)


def test_labels_reoriented_with_their_affine_are_right(caplog):
    scan, labels = scan_and_labels()
    image = nib.as_closest_canonical(nib.Nifti1Image(labels.data, labels.affine))
    assert not np.allclose(image.affine, labels.affine)
    other = replace(labels, data=np.asarray(image.dataobj), affine=image.affine)
    assert verdict(other, scan, caplog) == "right"


def test_a_crop_and_another_resolution_in_the_right_place_are_right(caplog):
    scan, labels = scan_and_labels()
    affine = labels.affine.copy()
    affine[:3, 3] = (labels.affine @ [14, 20, 12, 1])[:3]
    crop = replace(labels, data=labels.data[14:44, 20:50, 12:40], affine=affine)
    assert verdict(crop, scan, caplog) == "right"
    coarse = replace(
        labels, data=labels.data[::2, ::2, ::2], affine=labels.affine @ np.diag([2, 2, 2, 1])
    )
    assert verdict(coarse, scan, caplog) == "right"


def test_a_small_structure_is_found_and_right(caplog):
    scan, labels = scan_and_labels()
    lesion = np.zeros_like(labels.data)
    middle = tuple(n // 2 for n in scan.shape)
    lesion[tuple(slice(i, i + 3) for i in middle)] = 1
    assert verdict(replace(labels, data=lesion), scan, caplog) == "right"
    assert "lie on the background" in verdict(
        replace(labels, data=np.roll(lesion, scan.shape[0] // 2 - 4, 0)), scan, caplog
    )


def test_landmarks_of_one_voxel_each_are_right(caplog):
    scan, labels = scan_and_labels()
    inside = np.argwhere(scan.data > 0)[::2001]
    landmarks = np.zeros_like(labels.data)
    landmarks[tuple(inside.T)] = np.arange(1, len(inside) + 1)
    assert verdict(replace(labels, data=landmarks), scan, caplog) == "right"


def test_a_map_without_a_label_is_told(caplog):
    scan, labels = scan_and_labels()
    empty = replace(labels, data=np.zeros_like(labels.data))
    assert verdict(empty, scan, caplog) == "labels has no label: every voxel is 0"


def test_labels_that_leave_nothing_are_told_or_refused(caplog):
    nothing, something = np.zeros((3, 3, 3)), np.eye(3)
    check_carried(nothing, nothing, "empty")
    check_carried(something, something, "kept")
    assert not caplog.records
    check_carried(something, nothing, "lost")
    assert "lost: no label lies on the grid" in caplog.text
    refuse_empty(something, "kept")
    with pytest.raises(ImageError, match="lost has no label on the prepared grid") as caught:
        refuse_empty(nothing, "lost")
    assert caught.value.hint


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_done_to_labels_they_are_right_or_it_is_told(data):
    """Moved, mirrored, cropped, of another type: never silent when more than 4 mm off."""
    scan, labels = scan_and_labels(data.draw(st.sampled_from(["LAS", "PSR", "oblique"])))
    kind = data.draw(st.sampled_from(["moved", "mirrored", "cropped", "type"]))
    expected_right = kind in ("cropped", "type")
    if kind == "moved":
        axis, sign = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([-1, 1]))
        labels = moved(labels, sign * data.draw(st.floats(4, 500)), axis)
    elif kind == "mirrored":
        labels = replace(labels, data=np.flip(labels.data, data.draw(st.integers(0, 2))))
    elif kind == "cropped":
        first = np.array([data.draw(st.integers(0, n // 3)) for n in labels.shape])
        last = np.array([data.draw(st.integers(2 * n // 3, n)) for n in labels.shape])
        affine = labels.affine.copy()
        affine[:3, 3] = (labels.affine @ [*first, 1])[:3]
        box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        labels = replace(labels, data=labels.data[box], affine=affine)
    else:
        dtype = data.draw(st.sampled_from([np.int8, np.int32, np.float32, np.float64, np.uint16]))
        labels = replace(labels, data=labels.data.astype(dtype))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ulae_rt.imaging.labelmap")
    log.addHandler(handler)
    try:
        check_labels(labels, scan)
    except GeometryError as error:
        records.append(str(error))
    finally:
        log.removeHandler(handler)
    assert (records == []) == expected_right


@pytest.mark.slow
def test_labels_of_oasis_are_right_and_moved_ones_told(data_dir, caplog):
    for name in ("train/1000", "train/1017", "val/1101", "val/1113"):
        scan = read_volume(data_dir / "oasis" / f"{name}_t1.nii.gz")
        labels = read_volume(data_dir / "oasis" / f"{name}_labels.nii.gz", kind="labels")
        assert verdict(labels, scan, caplog) == "right"
        assert verdict(replace(labels, affine=np.eye(4)), scan, caplog) == "refused"
        assert "background" in verdict(moved(labels, 40), scan, caplog)
        assert "voxel by voxel" in verdict(moved(labels, 3), scan, caplog)
        left_right = replace(labels, data=labels.data[::-1])
        assert "mirrored along its first array axis" in verdict(left_right, scan, caplog)
        for mm in (3, 5, 10, -10):
            for axis in range(3):
                rolled = replace(labels, data=np.roll(labels.data, mm, axis))
                assert "may not belong" in verdict(rolled, scan, caplog), (name, mm, axis)
        itself = replace(labels, data=scan.data)
        assert "hardly two of its voxels beside each other are equal" in verdict(
            itself, scan, caplog
        )
        for part in (
            labels.data == 59,
            labels.data > 0,
            np.where(labels.data < 100, labels.data, 0),
        ):
            assert verdict(replace(labels, data=part.astype(np.int16)), scan, caplog) == "right"
        one = replace(labels, data=(labels.data > 0).astype(np.uint8)[::-1])
        assert "mirrored along its first array axis" in verdict(one, scan, caplog)
