from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ulae_rt.conventions import FULL_SHAPE


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three smooth blobs, each a shifted copy of the first, on the full grid, with labels."""
    folder = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(0)
    blob = gaussian_filter(random.random([s // 4 for s in FULL_SHAPE]), 2.0)
    blob = (blob - blob.min()) / (blob.max() - blob.min())
    for name, shift in (("a", 0), ("b", 2), ("c", -2)):
        image = np.pad(np.roll(blob, shift, axis=1)[4:-4, 4:-4, 4:-4], 4)
        image = np.kron(image, np.ones((4, 4, 4)))
        labels = np.digitize(image, [0.3, 0.5, 0.7]).astype(np.uint8)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"{name}_labels.nii.gz")
    return folder
