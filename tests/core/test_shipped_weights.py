"""The shipped weights on real brains, from files to files."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import ulae_rt
from ulae_rt import cli
from ulae_rt.imaging.image import as_array, labels_of, resample
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.metrics import mean_dice
from ulae_rt.model.checkpoint import DEFAULT_WEIGHTS

pytestmark = pytest.mark.slow


def test_they_are_small_and_say_what_they_are() -> None:
    assert os.path.getsize(DEFAULT_WEIGHTS) <= 4e6
    metadata = ulae_rt.load_model().metadata
    assert metadata.normalisation == "p99.9"
    assert [s * metadata.spacing_mm for s in metadata.shape] == [160, 192, 160]
    assert "OASIS" in metadata.training_data
    assert "non-commercial" in metadata.licence
    assert DEFAULT_WEIGHTS.with_suffix(".md").is_file()


def test_the_sample_pair(samples: tuple[Path, Path], tmp_path: Path) -> None:
    """One real pair: similarity, folding, and SimpleITK finding our image with our warp."""
    moving, fixed = samples
    moved, warp, jacobian = (tmp_path / f"{n}.nii.gz" for n in ("moved", "warp", "jacobian"))
    status = cli.main(
        [
            "register", "-m", str(moving), "-f", str(fixed), "-o", str(moved), "-w", str(warp),
            "--jacobian", str(jacobian), "--qc", str(tmp_path / "qc.png"),
        ]
    )  # fmt: skip
    assert status == 0
    header = nib.load(moved).header
    assert np.array_equal(header.get_sform(), nib.load(fixed).header.get_sform())
    brain = nib.load(fixed).get_fdata() > 0
    assert 100 * np.mean(nib.load(jacobian).get_fdata()[brain] <= 0) < 0.5

    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(warp), sitk.sitkVectorFloat64))
    fixed_image = sitk.ReadImage(str(fixed))
    applied = sitk.Resample(
        sitk.ReadImage(str(moving), sitk.sitkFloat32), fixed_image, field, sitk.sitkLinear
    )
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(moved)))
    difference = np.abs(sitk.GetArrayFromImage(applied) - ours)
    # ITK decides in float64 whether a point lies inside the moving image, at its very edge.
    assert np.quantile(difference, 0.9999) < 1e-2
    reference = sitk.GetArrayFromImage(fixed_image).astype(float)
    inside = reference > 0
    assert np.corrcoef(ours[inside], reference[inside])[0, 1] > 0.78  # 0.62 by the affine alone


def test_two_people_never_trained_on(data_dir: Path) -> None:
    scans = data_dir / "oasis" / "val"
    labels = {n: scans / f"{n}_labels.nii.gz" for n in ("1101", "1104")}
    registrar = ulae_rt.Registrar()
    result = registrar(scans / "1101_t1.nii.gz", scans / "1104_t1.nii.gz", labels=labels["1101"])
    source, target = (read_volume(labels[n], kind="labels") for n in ("1101", "1104"))
    truth = target.data.astype(int)
    grid = labels_of(target).grid
    by_affine = as_array(resample(labels_of(source), grid, result.affine, "nearest")).astype(int)
    assert result.moved_labels is not None
    moved = np.asarray(result.moved_labels.dataobj).astype(int)
    assert mean_dice(moved, truth) > mean_dice(by_affine, truth) + 0.1
    assert result.stats.folding_percent < 0.5
