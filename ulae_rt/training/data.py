"""Pairs of prepared scans, read and augmented on the fly, the same for the same seed and index."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.errors import ConfigError
from ulae_rt.imaging.grid import Grid, gap_mm, grid_of
from ulae_rt.imaging.nifti import SUFFIXES, read_grid, read_volume
from ulae_rt.imaging.preprocess import NORMALISATION
from ulae_rt.kernels._separable import along_axes
from ulae_rt.losses import Labels
from ulae_rt.strict_csv import decode_text
from ulae_rt.strict_json import parse_json
from ulae_rt.training.config import AugmentConfig

# 0.6 GB at 1 mm. Larger sets are read again and again.
_CACHED_SCANS = 32
_LABEL_SUFFIX = "_labels"
_MANIFEST = "prepared.json"  # as `ulae_rt.prepare` calls it
_PREPARE_AGAIN = (
    "prepare all scans with one template: ulae-rt prepare SCANS -o DIR --template IMAGE"
)
# Rounding in the scan's values.
_ABOVE_ONE = 1e-4
# What unpacking two scans at 1 mm takes (half a second on one core) against a GPU's step.
_MOST_WORKERS = 8
_KNOTS_MM = 32.0


class Change(NamedTuple):
    """What augmentation does to one image: drawn where it is read, done where it is used.

    A volume at 1 mm takes a CPU core half a second to resample, and a GPU a millisecond or so.

    Attributes:
        theta: (1, 3, 4), for :func:`affine_warp`; None: no resampling.
        intensity: (gain, gamma): intensities become ``gain * image ** gamma``; None: untouched.
        deform: (3, K, K, K) knots of a displacement that goes with ``theta``, in half-extents.
        bias: (1, K, K, K) knots of the logarithm of a field that multiplies the image.
    """

    theta: Tensor | None
    intensity: tuple[float, float] | None
    deform: Tensor | None = None
    bias: Tensor | None = None

    def pinned(self) -> "Change":
        """The same in page-locked memory."""
        tensors = {name: getattr(self, name) for name in ("theta", "deform", "bias")}
        return self._replace(**{k: x.pin_memory() for k, x in tensors.items() if x is not None})

    def __call__(self, image: Tensor) -> Tensor:
        """(1, D, H, W) to the same shape, on its device."""
        image = self._resampled(image, "bilinear")
        if self.bias is not None:
            knots = self.bias.to(image.device, non_blocking=True)
            image = (image * smooth_field(knots, image.shape[1:]).exp()).clamp_max(1)
        if self.intensity is not None:
            gain, gamma = self.intensity
            image = gain * image**gamma
        return image

    def of_labels(self, labels: Tensor) -> Tensor:
        """(1, D, H, W) integers to the same, where ``__call__`` brings the image's voxels."""
        return self._resampled(labels.float(), "nearest").round().to(labels.dtype)

    def _resampled(self, image: Tensor, mode: str) -> Tensor:
        if self.theta is None:
            return image
        theta = self.theta.to(image.device, non_blocking=True)
        deform = self.deform
        if deform is not None:
            deform = deform.to(image.device, non_blocking=True)
        return affine_warp(image, theta, deform, mode)


class Pair(NamedTuple):
    """One training example: (1, D, H, W) float32 in [0, 1] each as prepared, and what to change.

    ``labels`` are the two label maps, (1, D, H, W) int16 each, counted through; see
    :class:`PairDataset`.
    """

    moving: Tensor
    fixed: Tensor
    changes: tuple[Change, Change]
    name: str
    labels: tuple[Tensor, Tensor] | None = None


class Batch(NamedTuple):
    """Some pairs: (B, 1, D, H, W) each, and their changes and names."""

    moving: Tensor
    fixed: Tensor
    changes: list[tuple[Change, Change]]
    names: list[str]
    labels: Labels | None = None

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from where a GPU fetches it by itself."""
        changes = [(moving.pinned(), fixed.pinned()) for moving, fixed in self.changes]
        labels = self.labels
        if labels is not None:
            labels = Labels(labels.moving.pin_memory(), labels.fixed.pin_memory(), labels.number)
        return Batch(self.moving.pin_memory(), self.fixed.pin_memory(), changes, self.names, labels)

    def augmented_labels(self, device: torch.device) -> Labels | None:
        """The labels on ``device``, changed as the images are."""
        if self.labels is None:
            return None
        *maps, count = self.labels
        moving, fixed = (
            torch.stack([change.of_labels(x) for x, change in zip(each, changes, strict=True)])
            for each, changes in zip(
                (x.to(device, non_blocking=True) for x in maps),
                zip(*self.changes, strict=True),
                strict=True,
            )
        )
        return Labels(moving, fixed, count)

    def augmented(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Moving and fixed images on ``device``, changed."""
        # From pinned memory the copy is queued like any kernel. It stands in the way of the
        # network's kernels for two or three milliseconds a pair at 1 mm, which is not worth a
        # second stream and its synchronisation.
        images = [x.to(device, non_blocking=True) for x in (self.moving, self.fixed)]
        moving, fixed = (
            torch.stack([change(x) for x, change in zip(image, changes, strict=True)])
            for image, changes in zip(images, zip(*self.changes, strict=True), strict=True)
        )
        return moving, fixed


def find_scans(source: Path) -> list[Path]:
    """The prepared scans of a folder, or those a text file lists (paths relative to it), sorted.

    Raises:
        ConfigError: when there are fewer than two, or one is missing.
    """
    if source.is_dir():
        scans = sorted(
            path
            for path in source.iterdir()
            if path.name.endswith(SUFFIXES)
            and not path.name.startswith(".")
            and not _stem(path).endswith(_LABEL_SUFFIX)
        )
    elif source.is_file():
        try:
            text = decode_text(source.read_bytes())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{source}: cannot be read: {reason}", "give UTF-8 text") from None
        lines = [line.strip() for line in text.splitlines()]
        scans = [source.parent / line for line in lines if line and not line.startswith("#")]
        if twice := [scan for scan in scans if scans.count(scan) > 1]:
            raise ConfigError(f"{source}: lists {twice[0]} twice", "remove one of the two lines")
        missing = [p for p in scans if not p.is_file()]
        if missing:
            raise ConfigError(f"{source}: lists {missing[0]}, which does not exist", "fix the list")
    else:
        raise ConfigError(f"{source}: no such folder or list", "run `ulae-rt prepare` first")
    if len(scans) < 2:
        raise ConfigError(
            f"{source}: {len(scans)} scan(s), expected at least 2", "run `ulae-rt prepare` first"
        )
    return scans


def check_prepared(scans: Sequence[Path]) -> None:
    """Refuse scans that `ulae-rt prepare` would not have written together; reads headers alone.

    All lie on one grid of the network's shape, as do the label maps beside them; a manifest in
    their folder names them, that grid and the normalisation.

    Raises:
        ConfigError: one that does not, by name.
        ImageError: one that cannot be read.
    """
    first = grid_of(read_grid(scans[0]))
    for scan in scans:
        for path in (scan, _labels_path(scan)):
            if path != scan and not path.is_file():
                continue
            grid = grid_of(read_grid(path))
            _check_shape(path, grid.shape)
            if path == scan and (gap := gap_mm(grid, first)):
                raise ConfigError(
                    f"{path}: lies up to {gap:.3g} mm apart from {scans[0]}", _PREPARE_AGAIN
                )
            if gap := gap_mm(grid, first):
                raise ConfigError(
                    f"{path}: lies up to {gap:.3g} mm apart from its scan", _PREPARE_AGAIN
                )
    for folder in dict.fromkeys(scan.parent for scan in scans):
        if (manifest := folder / _MANIFEST).is_file():
            _check_manifest(manifest, [scan for scan in scans if scan.parent == folder], first)


def _check_manifest(manifest: Path, scans: Sequence[Path], grid: Grid) -> None:
    try:
        values = parse_json(manifest.read_bytes())
        there = {entry["image"] for entry in values["scans"].values()}
        affine = np.array(values["grid_affine"], np.float64).reshape(4, 4)
        shape, normalisation = tuple(values["shape"]), values["normalisation"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{manifest}: is damaged: {reason}", _PREPARE_AGAIN) from None
    if left := [scan for scan in scans if scan.name not in there]:
        raise ConfigError(
            f"{left[0]}: is not among the scans of {manifest.name}, so it is of another run",
            f"move it out of {manifest.parent}, or prepare all scans again into a new folder",
        )
    if normalisation != NORMALISATION:
        raise ConfigError(
            f"{manifest}: normalisation {normalisation!r}, expected {NORMALISATION!r}",
            _PREPARE_AGAIN,
        )
    if shape != grid.shape or (gap_mm(Grid(grid.shape, affine), grid)):
        raise ConfigError(
            f"{manifest}: its grid is another than that of {scans[0].name}", _PREPARE_AGAIN
        )


def scan_name(path: Path) -> str:
    """``ID`` of ``ID.nii.gz``."""
    return _stem(path)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


@lru_cache(maxsize=_CACHED_SCANS)
def load_scan(path: Path, pool: int) -> Tensor:
    """(1, D, H, W) float32 of a prepared scan, averaged over blocks of ``pool`` voxels an edge."""
    data = read_volume(path).data
    _check_shape(path, data.shape)
    low, high = float(data.min()), float(data.max())
    if low < 0 or high > 1 + _ABOVE_ONE:
        raise ConfigError(
            f"{path}: values from {low:.4g} to {high:.4g}, expected 0 to 1",
            "run `ulae-rt prepare` on the scans",
        )
    scan = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))[None]
    return F.avg_pool3d(scan, pool) if pool > 1 else scan


@lru_cache(maxsize=_CACHED_SCANS)
def load_labels(scan: Path) -> NDArray[np.int32]:
    """(D, H, W) label map beside a prepared scan, at its full resolution.

    Raises:
        ConfigError: when there is none.
    """
    path = _labels_path(scan)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no label map beside the scan",
            "run `ulae-rt prepare` on scans that have ID_labels.nii.gz beside them",
        )
    data = read_volume(path, kind="labels").data
    _check_shape(path, data.shape)
    limits = np.iinfo(np.int32)
    if data.min() < limits.min or data.max() > limits.max:
        raise ConfigError(
            f"{path}: labels from {data.min()} to {data.max()}, expected 32 bits",
            "run `ulae-rt prepare` on the scans, with labels up to 65535",
        )
    return np.ascontiguousarray(data, dtype=np.int32)


def _labels_path(scan: Path) -> Path:
    suffix = scan.name.removeprefix(_stem(scan))
    return scan.with_name(f"{_stem(scan)}{_LABEL_SUFFIX}{suffix}")


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if shape != FULL_SHAPE:
        raise ConfigError(
            f"{path}: grid {shape}, expected {FULL_SHAPE}", "run `ulae-rt prepare` on the scans"
        )


class PairDataset:
    """Item k is the k-th pair of training: a function of (scans, seed, k) and nothing else.

    All ordered pairs of different scans come once an epoch, in an order of that epoch's own. So a
    run that is resumed sees what the uninterrupted one would have seen, on any number of processes.

    Args:
        scans: prepared, two or more.
        seed: of the order and the changes.
        pool: edge of the blocks of voxels that are averaged.
        augment: how a pair is changed.
        labelled: give the label maps too: of each block the voxel in the middle, the values that
            any scan has counted through from 1.
    """

    def __init__(
        self,
        scans: list[Path],
        seed: int,
        pool: int,
        augment: AugmentConfig,
        labelled: bool = False,
    ) -> None:
        self.scans = scans
        self.seed = seed
        self.pool = pool
        self.augment = augment
        self.pairs = [(m, f) for m in range(len(scans)) for f in range(len(scans)) if m != f]
        self.labels: dict[Path, Tensor] = {}
        self.label_count = 0
        if labelled:
            self._read_labels()

    def __getitem__(self, index: int) -> Pair:
        epoch, position = divmod(index, len(self.pairs))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.pairs))
        names = [self.scans[i] for i in self.pairs[order[position]]]
        moving, fixed = (load_scan(name, self.pool) for name in names)
        random = np.random.default_rng((self.seed, 1, index))
        changes = draw_changes(self.augment, self.pool, tuple(moving.shape[1:]), random)
        labels = (self.labels[names[0]], self.labels[names[1]]) if self.labels else None
        return Pair(moving, fixed, changes, " -> ".join(scan_name(name) for name in names), labels)

    def _read_labels(self) -> None:
        inside = (slice(self.pool // 2, None, self.pool),) * 3
        maps = {scan: load_labels(scan)[inside] for scan in self.scans}
        values = np.unique(np.concatenate([np.unique(each) for each in maps.values()]))
        values = values[values != 0]
        if len(values) > np.iinfo(np.int16).max:
            raise ConfigError(
                f"the label maps hold {len(values)} labels, expected {np.iinfo(np.int16).max} at "
                "most",
                "merge some of them",
            )
        for scan, each in maps.items():
            counted = np.where(each == 0, 0, np.searchsorted(values, each) + 1)
            self.labels[scan] = torch.from_numpy(counted.astype(np.int16))[None]
        self.label_count = len(values) + 1


def load_batches(
    dataset: PairDataset,
    indices: Iterable[int],
    size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The pairs of ``indices`` in their order, ``size`` at a time, in memory fit for ``device``.

    ``workers`` threads read ahead. Reading is unpacking and copying, which leave the interpreter
    to others; processes would each keep scans of their own and hand them over through shared
    memory, of which containers have little.

    Raises:
        UlaeError: what reading a scan raised.
    """
    indices = iter(indices)
    groups = iter(lambda: list(islice(indices, size)), [])

    def read(group: list[int]) -> Batch:
        pairs = [dataset[index] for index in group]
        batch = Batch(
            torch.stack([pair.moving for pair in pairs]),
            torch.stack([pair.fixed for pair in pairs]),
            [pair.changes for pair in pairs],
            [pair.name for pair in pairs],
            _stacked([pair.labels for pair in pairs if pair.labels], dataset.label_count),
        )
        return batch.pinned() if device.type == "cuda" else batch

    if not workers:
        yield from map(read, groups)
        return
    # Pinning is an act of the thread's current device.
    initializer = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(workers, "reader", initializer)
    try:
        ahead = deque(pool.submit(read, group) for group in islice(groups, 2 * workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(read, group) for group in islice(groups, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(labels: list[tuple[Tensor, Tensor]], count: int) -> Labels | None:
    if not labels:
        return None
    moving, fixed = (torch.stack(maps) for maps in zip(*labels, strict=True))
    return Labels(moving, fixed, count)


def worker_count(setting: int | Literal["auto"], device: torch.device, processes: int) -> int:
    """How many threads read ahead in each of ``processes`` training processes."""
    if setting != "auto":
        return setting
    if device.type == "cpu":  # the network wants every core
        return 0
    sharing = min(processes, torch.cuda.device_count())
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // sharing - 1))


def draw_changes(
    config: AugmentConfig,
    voxel_mm: float,
    sizes: tuple[int, ...],
    random: np.random.Generator,
) -> tuple[Change, Change]:
    """Random changes of a moving and a fixed image of (D, H, W); see :class:`AugmentConfig`."""
    common = random_affine(config.rotation_deg, config.scale, config.shift_mm / voxel_mm, random)
    spread = (1 - config.residual_scale, 1 + config.residual_scale)
    own = random_affine(config.residual_deg, spread, config.residual_mm / voxel_mm, random)
    if random.random() < config.flip:
        common = common @ np.diag([-1.0, 1.0, 1.0, 1.0])
    moving, fixed = (
        Change(affine_theta(matrix, sizes), random_intensity(config.intensity, random))
        for matrix in (own @ common, common)
    )
    spacing = _KNOTS_MM / voxel_mm
    if config.bias:
        moving, fixed = (
            change._replace(bias=math.log1p(config.bias) * random_knots(1, sizes, spacing, random))
            for change in (moving, fixed)
        )
    if config.deform_mm:
        # A half-extent is half an axis long, and the last axis comes first.
        unit = torch.tensor([2 * config.deform_mm / voxel_mm / size for size in sizes[::-1]])
        deform = unit.view(3, 1, 1, 1) * random_knots(3, sizes, spacing, random)
        theta = torch.eye(3, 4)[None] if moving.theta is None else moving.theta
        moving = moving._replace(theta=theta, deform=deform)
    return moving, fixed


def random_knots(
    channels: int, sizes: tuple[int, ...], spacing: float, random: np.random.Generator
) -> Tensor:
    """(channels, K, K, K) in [-1, 1], as many as :func:`smooth_field` needs at ``spacing``."""
    counts = [math.ceil(size / spacing) + 3 for size in sizes]
    return torch.from_numpy(random.uniform(-1, 1, (channels, *counts)).astype(np.float32))


def smooth_field(knots: Tensor, sizes: Sequence[int]) -> Tensor:
    """(C, K, K, K) knots to (C, D, H, W): uniform cubic B-splines, the outer knots one outside.

    Between neighbours it changes by no more than they differ, so that a displacement whose knots
    differ by less than a third of their distance has no fold.
    """
    along_d, along_h, along_w = (
        _basis(count, size).to(knots.device)
        for count, size in zip(knots.shape[1:], sizes, strict=True)
    )
    return along_axes(knots[None], along_d, along_h, along_w)[0]


@lru_cache(maxsize=32)
def _basis(count: int, size: int) -> Tensor:
    """(size, count) values of the cubic B-splines; the volume ends one knot inside the last."""
    at = 1 + (torch.arange(size) + 0.5) / size * (count - 3)
    distance = (at[:, None] - torch.arange(count)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def random_affine(
    rotation_deg: float, scale: tuple[float, float], shift: float, random: np.random.Generator
) -> NDArray[np.float64]:
    """4x4 pull-back in voxels about the volume's centre.

    Args:
        rotation_deg: largest rotation about each axis.
        scale: smallest and largest size of what is seen, drawn for each axis.
        shift: largest shift along each axis, voxels.
        random: where the numbers come from.
    """
    matrix = np.eye(4)
    for axis, angle in enumerate(np.radians(rotation_deg) * random.uniform(-1, 1, 3)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    matrix = matrix @ np.diag([*(1 / random.uniform(*scale, 3)), 1.0])
    matrix[:3, 3] = shift * random.uniform(-1, 1, 3)
    return matrix


def affine_theta(matrix: NDArray[np.float64], sizes: tuple[int, ...]) -> Tensor | None:
    """(1, 3, 4) form of a 4x4 pull-back in voxels about the centre of (D, H, W); identity: None."""
    if np.array_equal(matrix, np.eye(4)):
        return None
    extent = np.array(sizes, dtype=np.float64)
    # affine_grid works in half-extents, and lists the last axis first.
    theta = matrix[:3] * np.append(extent, 1.0) / extent[:, None]
    theta[:, 3] *= 2
    theta = theta[::-1][:, [2, 1, 0, 3]].copy()
    return torch.from_numpy(theta).float()[None]


def affine_warp(
    image: Tensor, theta: Tensor, deform: Tensor | None = None, mode: str = "bilinear"
) -> Tensor:
    """Sample (1, D, H, W) where ``theta``, and knots of a displacement, point; zero outside."""
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    if deform is not None:
        grid = grid + smooth_field(deform, image.shape[1:]).movedim(0, -1)
    return F.grid_sample(image[None], grid, mode, align_corners=False)[0]


def random_intensity(amount: float, random: np.random.Generator) -> tuple[float, float] | None:
    """Gain and gamma; the gain only darkens, so that the range stays [0, 1]. None: no change."""
    gain = 1 - amount * random.random()
    gamma = math.exp(random.uniform(-1, 1) * math.log1p(amount))
    return (gain, gamma) if amount else None
