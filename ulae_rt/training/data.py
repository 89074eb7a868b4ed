"""Pairs of prepared scans, loaded and augmented on the fly, the same for the same seed and step."""

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.errors import ConfigError
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.training.config import AugmentConfig

# 15 scans at 1 mm are 0.3 GB; larger sets are read again and again, as they should be.
_CACHED_SCANS = 32
_LABEL_SUFFIX = "_labels"


class Pair(NamedTuple):
    """One training example: (1, D, H, W) float32 in [0, 1] each, and whose they are."""

    moving: Tensor
    fixed: Tensor
    name: str


def find_scans(source: Path) -> list[Path]:
    """The prepared scans of a folder, or those a text file lists (paths relative to it), sorted.

    Raises:
        ConfigError: when there are fewer than two, or one is missing.
    """
    if source.is_dir():
        scans = sorted(p for p in source.glob("*.nii*") if not _stem(p).endswith(_LABEL_SUFFIX))
    elif source.is_file():
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
        scans = [source.parent / line for line in lines if line and not line.startswith("#")]
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


def scan_name(path: Path) -> str:
    """``ID`` of ``ID.nii.gz``."""
    return _stem(path)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


@lru_cache(maxsize=_CACHED_SCANS)
def load_scan(path: Path, pool: int) -> Tensor:
    """(1, D, H, W) float32 of a prepared scan, averaged over blocks of ``pool`` voxels an edge."""
    data = read_volume(path).data
    _check_prepared(path, data.shape)
    scan = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))[None]
    return F.avg_pool3d(scan, pool) if pool > 1 else scan


@lru_cache(maxsize=_CACHED_SCANS)
def load_labels(scan: Path) -> NDArray[np.int32]:
    """(D, H, W) label map beside a prepared scan, at its full resolution.

    Raises:
        ConfigError: when there is none.
    """
    suffix = scan.name.removeprefix(_stem(scan))
    path = scan.with_name(f"{_stem(scan)}{_LABEL_SUFFIX}{suffix}")
    if not path.is_file():
        raise ConfigError(
            f"{path}: no label map beside the validation scan",
            "run `ulae-rt prepare` on scans that have ID_labels.nii.gz beside them",
        )
    data = read_volume(path, kind="labels").data
    _check_prepared(path, data.shape)
    return np.ascontiguousarray(data, dtype=np.int32)


def _check_prepared(path: Path, shape: tuple[int, ...]) -> None:
    if shape != FULL_SHAPE:
        raise ConfigError(
            f"{path}: grid {shape}, expected {FULL_SHAPE}", "run `ulae-rt prepare` on the scans"
        )


class PairDataset(Dataset[Pair]):
    """Item k is the pair of training step k: a function of (scans, seed, k) and nothing else.

    All ordered pairs of different scans come once an epoch, in an order of that epoch's own. So a
    run that is resumed at step k sees what the uninterrupted one would have seen.
    """

    def __init__(
        self, scans: list[Path], steps: int, seed: int, pool: int, augment: AugmentConfig
    ) -> None:
        self.scans = scans
        self.steps = steps
        self.seed = seed
        self.pool = pool
        self.augment = augment
        self.pairs = [(m, f) for m in range(len(scans)) for f in range(len(scans)) if m != f]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Pair:
        epoch, position = divmod(step, len(self.pairs))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.pairs))
        moving, fixed = (self.scans[i] for i in self.pairs[order[position]])
        random = np.random.default_rng((self.seed, 1, step))
        images = augment_pair(
            load_scan(moving, self.pool),
            load_scan(fixed, self.pool),
            self.augment,
            self.pool,
            random,
        )
        return Pair(*images, name=f"{scan_name(moving)} -> {scan_name(fixed)}")


def augment_pair(
    moving: Tensor,
    fixed: Tensor,
    config: AugmentConfig,
    voxel_mm: float,
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Random changes of a pair of (1, D, H, W) images; see :class:`AugmentConfig`."""
    common = random_affine(config.rotation_deg, config.scale, config.shift_mm / voxel_mm, random)
    spread = (1 - config.residual_scale, 1 + config.residual_scale)
    own = random_affine(config.residual_deg, spread, config.residual_mm / voxel_mm, random)
    if random.random() < config.flip:
        common = common @ np.diag([-1.0, 1.0, 1.0, 1.0])
    moving = affine_warp(moving, own @ common)
    fixed = affine_warp(fixed, common)
    return (
        random_intensity(moving, config.intensity, random),
        random_intensity(fixed, config.intensity, random),
    )


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


def affine_warp(image: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """Sample (1, D, H, W) at ``matrix @ p``, voxels about the centre; trilinear, zero outside."""
    if np.array_equal(matrix, np.eye(4)):
        return image
    sizes = np.array(image.shape[1:], dtype=np.float64)
    # affine_grid works in half-extents, and lists the last axis first.
    theta = matrix[:3] * np.append(sizes, 1.0) / sizes[:, None]
    theta[:, 3] *= 2
    theta = theta[::-1][:, [2, 1, 0, 3]].copy()
    grid = F.affine_grid(
        torch.from_numpy(theta).float()[None], [1, *image.shape], align_corners=False
    )
    return F.grid_sample(image[None], grid, align_corners=False)[0]


def random_intensity(image: Tensor, amount: float, random: np.random.Generator) -> Tensor:
    """``gain * image ** gamma``; the gain only darkens, so that the range stays [0, 1]."""
    gain = 1 - amount * random.random()
    gamma = math.exp(random.uniform(-1, 1) * math.log1p(amount))
    return gain * image**gamma if amount else image
