from pathlib import Path

import numpy as np
import pytest
import torch

from ulae_rt.errors import ConfigError
from ulae_rt.training import data
from ulae_rt.training.config import AugmentConfig
from ulae_rt.training.data import (
    PairDataset,
    affine_warp,
    augment_pair,
    find_scans,
    random_affine,
    random_intensity,
)
from ulae_rt.training.validation import carry_labels, first_pairs, upsample_displacement


@pytest.fixture
def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(1, 9, 11, 7)


def test_affine_warp_shifts_along_the_right_axis(image: torch.Tensor) -> None:
    matrix = np.eye(4)
    matrix[:3, 3] = 1, 2, 3
    shifted = affine_warp(image, matrix)
    torch.testing.assert_close(shifted[0, :8, :9, :4], image[0, 1:, 2:, 3:])


def test_affine_warp_mirrors_and_turns_about_the_centre(image: torch.Tensor) -> None:
    torch.testing.assert_close(affine_warp(image, np.diag([-1.0, 1, 1, 1])), image.flip(1))
    square = image[:, :, :9]
    quarter = np.eye(4)
    quarter[:2, :2] = [[0, -1], [1, 0]]
    torch.testing.assert_close(affine_warp(square, quarter), torch.rot90(square, -1, (1, 2)))


def test_random_affine_keeps_to_its_ranges() -> None:
    random = np.random.default_rng(0)
    matrices = np.array([random_affine(0.0, (0.5, 0.8), 2.0, random) for _ in range(200)])
    sizes = 1 / np.diagonal(matrices, axis1=1, axis2=2)[:, :3]
    assert 0.5 <= sizes.min() < 0.55
    assert 0.75 < sizes.max() <= 0.8
    assert 1.8 < np.abs(matrices[:, :3, 3]).max() <= 2.0
    turn = random_affine(30.0, (1.0, 1.0), 0.0, random)[:3, :3]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1.0)


def test_without_augmentation_a_pair_is_untouched(image: torch.Tensor) -> None:
    pair = augment_pair(image, image + 1, AugmentConfig(), 1.0, np.random.default_rng(0))
    assert torch.equal(pair[0], image)
    assert torch.equal(pair[1], image + 1)


def test_intensity_stays_in_range(image: torch.Tensor) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        changed = random_intensity(image, 0.3, random)
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        assert torch.equal(changed.argsort(dim=-1), image.argsort(dim=-1))


def test_every_ordered_pair_once_an_epoch_and_the_same_for_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "load_scan", lambda path, pool: torch.rand(1, 4, 4, 4))
    scans = [Path(f"{name}.nii.gz") for name in "abcd"]
    dataset = PairDataset(scans, 36, 7, 1, AugmentConfig())
    names = [dataset[k].name for k in range(36)]
    for epoch in range(3):
        assert len(set(names[12 * epoch : 12 * (epoch + 1)])) == 12
    assert names[:12] != names[12:24]
    assert [dataset[k].name for k in (35, 3)] == [names[35], names[3]]
    assert [PairDataset(scans, 36, 8, 1, AugmentConfig())[k].name for k in range(36)] != names


def test_find_scans(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", "a_labels.nii", "b_affine.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_scans(tmp_path)] == ["a.nii", "b.nii.gz"]
    listing = tmp_path / "list.txt"
    listing.write_text("# two\nb.nii.gz\n\na.nii\n")
    assert [p.name for p in find_scans(listing)] == ["b.nii.gz", "a.nii"]
    listing.write_text("b.nii.gz\nc.nii.gz\n")
    with pytest.raises(ConfigError, match=r"lists .*c\.nii\.gz, which does not exist"):
        find_scans(listing)
    with pytest.raises(ConfigError, match="no such folder"):
        find_scans(tmp_path / "none")
    (tmp_path / "a.nii").unlink()
    with pytest.raises(ConfigError, match=r"1 scan\(s\), expected at least 2"):
        find_scans(tmp_path)


def test_an_unprepared_scan_is_refused(tmp_path: Path) -> None:
    import nibabel as nib

    path = tmp_path / "a.nii.gz"
    volume = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    with pytest.raises(ConfigError, match=r"grid \(8, 8, 8\), expected \(160, 192, 160\)"):
        data.load_scan(path, 1)


def test_upsampling_a_displacement_keeps_the_world() -> None:
    """Blocks of 2: coarse voxel i is centred on fine coordinate 2 i + 0.5."""
    coarse = torch.arange(6, dtype=torch.float64)
    disp = (0.3 * coarse + 1.0).view(1, 1, 6, 1, 1).expand(1, 3, 6, 4, 4)
    fine = upsample_displacement(disp, 2)
    assert fine.shape == (1, 3, 12, 8, 8)
    position = (torch.arange(12, dtype=torch.float64) - 0.5) / 2
    expected = 2 * (0.3 * position + 1.0)
    torch.testing.assert_close(fine[0, 0, 1:-1, 3, 3], expected[1:-1])


def test_carried_labels_follow_the_pull_back() -> None:
    labels = np.zeros((6, 6, 6), np.int32)
    labels[3, 2, 2] = 205
    disp = torch.zeros(1, 3, 6, 6, 6)
    disp[:, 0] = 1.2  # nearest: one voxel
    moved = carry_labels(labels, disp)
    assert moved[2, 2, 2] == 205
    assert (moved != 0).sum() == 1


def test_validation_pairs_spread_over_the_scans() -> None:
    scans = [Path(name) for name in "abc"]
    assert [(m.name, f.name) for m, f in first_pairs(scans, 4)] == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
        ("a", "c"),
    ]
    assert len(set(first_pairs(scans, 99))) == 6
