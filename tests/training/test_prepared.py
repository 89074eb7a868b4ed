"""Scans to train on are those that `ulae-rt prepare` writes together; others are named."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from _support.brains import GEOMETRIES, save_brain
from ulae_rt.cli import main
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.errors import ConfigError
from ulae_rt.imaging.preprocess import NORMALISATION
from ulae_rt.training.data import check_prepared, find_scans, load_labels, load_scan

VALUES = np.zeros(FULL_SHAPE, np.uint8)
VALUES[80] = 1


def save(
    path: Path, data: np.ndarray = VALUES, shift: float = 0, shape: tuple[int, ...] = FULL_SHAPE
) -> Path:
    affine = np.eye(4)
    affine[0, 3] = shift
    image = nib.Nifti1Image(data[: shape[0], : shape[1], : shape[2]], affine, dtype=data.dtype)
    nib.save(image, path)
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder as `prepare` leaves it."""
    for name in "ab":
        save(tmp_path / f"{name}.nii")
        save(tmp_path / f"{name}_labels.nii")
    manifest = {
        "template": "t.nii.gz", "shape": list(FULL_SHAPE), "grid_affine": np.eye(4).tolist(),
        "normalisation": NORMALISATION, "scans": {n: {"image": f"{n}.nii"} for n in "ab"},
    }  # fmt: skip
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    return tmp_path


def check(folder: Path) -> None:
    check_prepared(find_scans(folder))


def test_what_prepare_leaves_is_taken(prepared: Path) -> None:
    check(prepared)
    (prepared / "prepared.json").unlink()  # it may be gone
    check(prepared)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("b.nii", {"shift": 0.5}, r"b\.nii: lies up to 0.5 mm apart from .*a\.nii"),
        ("b.nii", {"shape": (160, 192, 144)}, r"b\.nii: grid \(160, 192, 144\), expected"),
        ("b_labels.nii", {"shift": 0.5}, r"b_labels\.nii: lies up to 0.5 mm apart from its scan"),
        ("b_labels.nii", {"shape": (160, 192, 144)}, r"b_labels\.nii: grid \(160, 192, 144\)"),
        ("c.nii", {}, r"c\.nii: is not among the scans of prepared\.json"),
    ],
)
def test_scans_of_another_grid_or_run(
    prepared: Path, name: str, changes: dict[str, object], message: str
) -> None:
    path = save(prepared / name, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as caught:
        check(prepared)
    assert caught.value.hint
    if name == "c.nii":  # the hint
        assert "move it out of" in caught.value.hint
        path.rename(prepared.parent / "c.nii")
        check(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalisation": "max"}, "normalisation 'max', expected"),
        ({"shape": [1, 2, 3]}, "its grid is another than that of a.nii"),
        ({"grid_affine": (2 * np.eye(4)).tolist()}, "its grid is another than that of a.nii"),
        ({"grid_affine": [1]}, "is damaged: cannot reshape"),
        ({"grid_affine": "x"}, "is damaged: "),
        ({"scans": ["a"]}, "is damaged: "),
        ({"scans": {"a": {}}}, "is damaged: 'image'"),
        ({"shape": None}, "is damaged: "),
    ],
)
def test_a_manifest_of_something_else(
    prepared: Path, changes: dict[str, object], message: str
) -> None:
    manifest = prepared / "prepared.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        check(prepared)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"shape": NaN}', '{"a": 1, "a": 2}'])
def test_a_damaged_manifest(prepared: Path, text: str) -> None:
    (prepared / "prepared.json").write_text(text)
    with pytest.raises(ConfigError, match=r"prepared\.json: is damaged"):
        check(prepared)


@pytest.mark.parametrize("values", [(0, 250), (-0.5, 1), (0, 1.01)])
def test_values_outside_0_to_1(tmp_path: Path, values: tuple[float, float]) -> None:
    data = VALUES.astype(np.float32)
    data[0, 0, :2] = values
    with pytest.raises(ConfigError, match=r"values from .* expected 0 to 1"):
        load_scan(save(tmp_path / "a.nii", data), 4)


def test_labels_beyond_32_bits(tmp_path: Path) -> None:
    save(tmp_path / "a.nii")
    save(tmp_path / "a_labels.nii", VALUES.astype(np.int64) * 2**32)
    with pytest.raises(ConfigError, match=f"labels from 0 to {2**32}, expected 32 bits"):
        load_labels(tmp_path / "a.nii")


def test_what_a_killed_run_left_is_no_scan(prepared: Path) -> None:
    shutil.copy(prepared / "a.nii", prepared / ".c.77-ab.part.nii")
    (prepared / "a.nii.json").write_text("{}")
    assert [path.name for path in find_scans(prepared)] == ["a.nii", "b.nii"]


def test_lists_of_scans(prepared: Path) -> None:
    path = prepared / "list.txt"
    path.write_text("\ufeffa.nii\n# c\nb.nii\n", encoding="utf-8")
    assert find_scans(path) == [prepared / "a.nii", prepared / "b.nii"]
    path.write_text("a.nii\nb.nii\na.nii\n")
    with pytest.raises(ConfigError, match=r"lists .*a\.nii twice"):
        find_scans(path)
    path.write_bytes("a.nii\nb.nii\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="it is UTF-16 text"):
        find_scans(path)


# Hints, followed


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two brains with labels, as a scanner leaves them, and a template beside their folder."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, geometry in (("a", "RAS"), ("b", "LIA")):
        scan = save_brain(folder / f"{name}.nii.gz", *GEOMETRIES[geometry])
        image = nib.load(scan)
        labels = (np.asarray(image.dataobj) > 60).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, image.affine), folder / f"{name}_labels.nii.gz")
    save_brain(tmp_path / "template.nii.gz", *GEOMETRIES["RAS"])
    return folder


def prepare(raw: Path, name: str = "out") -> Path:
    """What the hints name."""
    template, out = raw.parent / "template.nii.gz", raw.parent / name
    command = ["prepare", str(raw), "-o", str(out), "--template", str(template)]
    assert main([*command, "--affine", "none"]) == 0
    return out


def usable(folder: Path) -> None:
    """As far as training goes before its first step."""
    scans = find_scans(folder)
    check_prepared(scans)
    for scan in scans:
        assert load_scan(scan, 4).max() > 0.5
        assert load_labels(scan).any()


@pytest.mark.follows("run `ulae-rt prepare` first")
@pytest.mark.parametrize("before", ["nothing", "one scan"])
def test_scans_that_are_not_there_are_prepared(raw: Path, before: str) -> None:
    place = raw.parent / "out"
    if before == "one scan":
        place.mkdir()
        save(place / "a.nii")
    with pytest.raises(ConfigError) as caught:
        find_scans(place)
    assert caught.value.hint == "run `ulae-rt prepare` first"
    shutil.rmtree(place, ignore_errors=True)
    usable(prepare(raw))


@pytest.mark.follows("run `ulae-rt prepare` on the scans")
@pytest.mark.parametrize("wrong", ["grid", "values"])
def test_scans_of_a_scanner_are_prepared(raw: Path, wrong: str) -> None:
    if wrong == "values":
        affine = nib.affines.from_matvec(np.eye(3), [-80, -96, -80])
        data = np.full(FULL_SHAPE, 7, np.int16)
        data[40:120, 40:150, 40:120] = 700
        nib.save(nib.Nifti1Image(data, affine), raw / "whole.nii.gz")
        nib.save(nib.Nifti1Image((data > 7).astype(np.uint8), affine), raw / "whole_labels.nii.gz")
    with pytest.raises(ConfigError) as caught:
        load_scan(raw / ("whole.nii.gz" if wrong == "values" else "a.nii.gz"), 4)
    assert caught.value.hint == "run `ulae-rt prepare` on the scans"
    usable(prepare(raw))


@pytest.mark.follows("run `ulae-rt prepare` on scans that have ID_labels.nii.gz beside them")
def test_scans_without_labels_are_prepared_with_them(raw: Path) -> None:
    beside = [path.rename(raw.parent / path.name) for path in raw.glob("*_labels.nii.gz")]
    scan = find_scans(prepare(raw, "without"))[0]
    with pytest.raises(ConfigError, match="no label map beside the scan") as caught:
        load_labels(scan)
    assert "ID_labels.nii.gz beside them" in caught.value.hint
    for path in beside:
        path.rename(raw / path.name)
    usable(prepare(raw))


@pytest.mark.follows("run `ulae-rt prepare` on the scans, with labels up to 65535")
def test_labels_beyond_32_bits_are_numbered_anew(raw: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.nii")
    save(tmp_path / "a_labels.nii", VALUES.astype(np.int64) * 2**32)
    with pytest.raises(ConfigError, match="expected 32 bits") as caught:
        load_labels(tmp_path / "a.nii")
    assert "with labels up to 65535" in caught.value.hint
    image = nib.load(raw / "a_labels.nii.gz")
    labels = np.asarray(image.dataobj).astype(np.uint16) * 65535
    nib.save(nib.Nifti1Image(labels, image.affine), raw / "a_labels.nii.gz")
    usable(prepare(raw))


def _moved(folder: Path, name: str) -> None:
    image = nib.load(folder / name)
    affine = nib.affines.from_matvec(np.eye(3), [3, 0, 0]) @ image.affine
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), folder / name)


@pytest.mark.follows("prepare all scans with one template: ulae-rt prepare SCANS -o DIR --template")
@pytest.mark.parametrize("wrong", ["scan", "labels", "damaged", "normalisation", "grid"])
def test_scans_that_do_not_belong_together_are_prepared_together(raw: Path, wrong: str) -> None:
    folder = prepare(raw, "mixed")
    manifest = folder / "prepared.json"
    if wrong in ("scan", "labels"):
        _moved(folder, "b.nii.gz" if wrong == "scan" else "b_labels.nii.gz")
    elif wrong == "damaged":
        manifest.write_text("{")
    else:
        change = {"normalisation": "max"} if wrong == "normalisation" else {"shape": [1, 2, 3]}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(ConfigError) as caught:
        check(folder)
    assert "ulae-rt prepare SCANS -o DIR --template IMAGE" in caught.value.hint
    usable(prepare(raw))
