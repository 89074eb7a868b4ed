import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.displacement import upsample_displacement
from ulae_rt.errors import ConfigError
from ulae_rt.losses import Labels, jacobian_determinant
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
    random_knots,
    smooth_field,
    worker_count,
)
from ulae_rt.training.validation import carry_labels, first_pairs


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


def test_a_smooth_field_is_the_cubic_spline_of_its_knots() -> None:
    sizes, random = (20, 17, 33), np.random.default_rng(0)
    knots = random_knots(2, sizes, 8.0, random)
    assert knots.shape == (2, 6, 6, 8)
    found = smooth_field(knots, sizes)
    # Voxel centres between the second knot and the last but one; scipy's knots are as many.
    at = [
        1 + (np.arange(n) + 0.5) / n * (k - 3) for n, k in zip(sizes, knots.shape[1:], strict=True)
    ]
    points = np.stack(np.meshgrid(*at, indexing="ij"))
    for channel, field in zip(knots.double().numpy(), found, strict=True):
        expected = map_coordinates(channel, points, order=3, prefilter=False)
        np.testing.assert_allclose(field.numpy(), expected, atol=1e-6)


def test_the_largest_deformation_does_not_fold() -> None:
    sizes, config = (40, 48, 40), AugmentConfig(deform_mm=5.0)
    for seed in range(5):
        moving, fixed = draw_changes(config, 4.0, sizes, np.random.default_rng(seed))
        assert fixed == (None, None, None, None)
        assert moving.deform is not None
        field = smooth_field(moving.deform, sizes).flip(0)
        voxels = field * torch.tensor(sizes).view(3, 1, 1, 1) / 2
        assert 0.3 < float(voxels.abs().max()) <= 5 / 4
        assert float(jacobian_determinant(voxels[None]).min()) > 0


def test_a_deformation_moves_the_way_its_knots_say(image: torch.Tensor) -> None:
    knots = torch.zeros(3, 4, 4, 4)
    knots[0] = 2 * 2 / image.shape[3]  # two voxels along the last axis, which comes first
    change = Change(torch.eye(3, 4)[None], None, knots)
    torch.testing.assert_close(change(image)[..., :-2], image[..., 2:])


def test_a_bias_field_is_smooth_and_keeps_the_range(image: torch.Tensor) -> None:
    config = AugmentConfig(bias=0.3)
    moving, fixed = draw_changes(config, 1.0, (9, 11, 7), np.random.default_rng(0))
    assert moving.theta is None
    for change in (moving, fixed):
        changed = change(image)
        ratio = (changed / image)[changed < 1]
        assert 1 / 1.3 - 1e-6 < float(ratio.min()) < float(ratio.max()) < 1.3 + 1e-6
        assert float(changed.min()) > 0
        assert float(changed.max()) <= 1


def test_labels_go_where_their_image_goes() -> None:
    random = np.random.default_rng(5)
    config = AugmentConfig(flip=0.5, rotation_deg=10.0, shift_mm=2.0, deform_mm=4.0)
    labels = torch.zeros(1, 32, 36, 28, dtype=torch.int16)
    labels[0, 8:20, 10:24, 6:15], labels[0, 20:26, 10:24, 6:15] = 1, 7
    for _ in range(4):
        change = draw_changes(config, 1.0, (32, 36, 28), random)[0]
        carried = change.of_labels(labels)
        assert carried.dtype == torch.int16
        for label in (1, 7):
            there = change((labels == label).float())
            assert torch.equal(carried == label, there > 0.5) or (
                ((carried == label) != (there > 0.5)).float().mean() < 0.02
            )


def test_a_batch_is_augmented_image_by_image() -> None:
    images = torch.rand(4, 1, 8, 9, 10)
    config = AugmentConfig(flip=0.5, rotation_deg=10.0, intensity=0.2)
    random = np.random.default_rng(1)
    changes = [draw_changes(config, 1.0, (8, 9, 10), random) for _ in range(2)]
    moving, fixed = Batch(images[:2], images[2:], changes, ["a -> b", "c -> d"]).augmented(CPU)
    for i, (move, fix) in enumerate(changes):
        assert torch.equal(moving[i], move(images[i]))
        assert torch.equal(fixed[i], fix(images[2 + i]))


def test_labels_of_a_batch_are_counted_through_and_changed_alike(scans: Path) -> None:
    found = find_scans(scans)
    config = AugmentConfig(flip=1.0)
    dataset = PairDataset(found, seed=0, pool=4, augment=config, labelled=True)
    (batch,) = load_batches(dataset, [0, 1], 2, 0, CPU)
    assert isinstance(batch.labels, Labels)
    assert batch.labels.number == 4
    assert set(batch.labels.moving.unique().tolist()) == {0, 1, 2, 3}
    flipped = batch.augmented_labels(CPU)
    assert flipped is not None
    assert torch.equal(flipped.moving, batch.labels.moving.flip(2))
    image = batch.augmented(CPU)[0]
    # The blobs' labels are bands of their intensity.
    assert float(image[flipped.moving == 1].max()) < float(image[flipped.moving == 3].min())
    assert Batch(*batch[:4]).augmented_labels(CPU) is None


def test_a_scan_without_labels_is_refused(readable: list[Path]) -> None:
    with pytest.raises(ConfigError, match="no label map"):
        PairDataset(readable, seed=0, pool=4, augment=AugmentConfig(), labelled=True)


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
