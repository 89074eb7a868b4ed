import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.errors import ConfigError
from ulae_rt.training import data
from ulae_rt.training.config import AugmentConfig
from ulae_rt.training.data import (
    Batch,
    Change,
    PairDataset,
    affine_theta,
    draw_changes,
    find_scans,
    load_batches,
    random_affine,
    random_intensity,
    worker_count,
)
from ulae_rt.training.validation import carry_labels, first_pairs, upsample_displacement


@pytest.fixture
def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(1, 9, 11, 7)


CPU = torch.device("cpu")


def affine_warp(image: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    theta = affine_theta(matrix, tuple(image.shape[1:]))
    assert theta is not None
    return data.affine_warp(image, theta)


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


def test_without_augmentation_an_image_is_untouched(image: torch.Tensor) -> None:
    changes = draw_changes(AugmentConfig(), 1.0, (9, 11, 7), np.random.default_rng(0))
    assert changes == (Change(None, None), Change(None, None))
    assert changes[0](image) is image


def test_both_images_of_a_pair_move_alike_and_the_moving_one_a_little_more() -> None:
    sizes, config = (9, 11, 7), AugmentConfig(rotation_deg=20.0, shift_mm=3.0, scale=(0.8, 1.1))
    moving, fixed = draw_changes(config, 1.0, sizes, np.random.default_rng(0))
    assert moving.theta is not None
    assert fixed.theta is not None
    assert torch.equal(moving.theta, fixed.theta)
    config = config.model_copy(update={"residual_deg": 2.0})
    moving, fixed = draw_changes(config, 1.0, sizes, np.random.default_rng(0))
    assert moving.theta is not None
    assert fixed.theta is not None
    assert 0 < float((moving.theta - fixed.theta).abs().max()) < 0.1


def test_intensity_stays_in_range(image: torch.Tensor) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        changed = Change(None, random_intensity(0.3, random))(image)
        assert not torch.equal(changed, image)
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        assert torch.equal(changed.argsort(dim=-1), image.argsort(dim=-1))


def test_a_batch_is_augmented_image_by_image() -> None:
    images = torch.rand(4, 1, 8, 9, 10)
    config = AugmentConfig(flip=0.5, rotation_deg=10.0, intensity=0.2)
    random = np.random.default_rng(1)
    changes = [draw_changes(config, 1.0, (8, 9, 10), random) for _ in range(2)]
    moving, fixed = Batch(images[:2], images[2:], changes, ["a -> b", "c -> d"]).augmented(CPU)
    for i, (move, fix) in enumerate(changes):
        assert torch.equal(moving[i], move(images[i]))
        assert torch.equal(fixed[i], fix(images[2 + i]))


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three prepared scans: one corner's voxel aside, each of one value."""
    folder = tmp_path_factory.mktemp("prepared")
    paths = [folder / f"{name}.nii.gz" for name in "abc"]
    for value, path in enumerate(paths):
        volume = np.full(FULL_SHAPE, value / 2, np.float32)
        volume[0, 0, 0] = 0.9
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_whoever_reads_them(readable: list[Path], workers: int) -> None:
    dataset = PairDataset(readable, 0, 4, AugmentConfig(rotation_deg=5.0))
    indices = [1, 4, 2, 3, 7, 5, 8, 0, 9, 6, 11, 10]
    batches = list(load_batches(dataset, indices, 2, workers, CPU))
    assert [name for batch in batches for name in batch.names] == [dataset[k].name for k in indices]
    assert torch.equal(batches[0].moving[1], dataset[4].moving)
    expected = dataset[5].changes[0].theta
    found = batches[2].changes[1][0].theta
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_that_cannot_be_read_keeps_its_hint(tmp_path: Path, workers: int) -> None:
    paths = [tmp_path / "a.nii", tmp_path / "b.nii"]
    for path in paths:
        nib.save(nib.Nifti1Image(np.indices((8, 8, 8), np.float32)[0], np.eye(4)), path)
    dataset = PairDataset(paths, 0, 1, AugmentConfig())
    with pytest.raises(ConfigError, match=r"^\S+\.nii: grid \(8, 8, 8\), expected") as caught:
        next(load_batches(dataset, range(2), 1, workers, CPU))
    assert caught.value.hint == "run `ulae-rt prepare` on the scans"


def test_readers_stop_when_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_scan", lambda path, pool: torch.zeros(1, 4, 4, 4))
    dataset = PairDataset([Path("a"), Path("b")], 0, 1, AugmentConfig())
    batches = load_batches(dataset, range(10**9), 1, 2, CPU)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert worker_count("auto", CPU, 1) == 0
    assert worker_count(3, CPU, 1) == worker_count(3, gpu, 8) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for cores, processes, expected in ((64, 1, 8), (16, 4, 3), (16, 16, 3), (2, 1, 1), (2, 4, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert worker_count("auto", gpu, processes) == expected


def test_every_ordered_pair_once_an_epoch_and_the_same_for_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "load_scan", lambda path, pool: torch.zeros(1, 4, 4, 4))
    scans = [Path(f"{name}.nii.gz") for name in "abcd"]
    dataset = PairDataset(scans, 7, 1, AugmentConfig())
    names = [dataset[k].name for k in range(36)]
    for epoch in range(3):
        assert len(set(names[12 * epoch : 12 * (epoch + 1)])) == 12
    assert names[:12] != names[12:24]
    assert [dataset[k].name for k in (35, 3)] == [names[35], names[3]]
    assert [PairDataset(scans, 8, 1, AugmentConfig())[k].name for k in range(36)] != names


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
