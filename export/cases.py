"""The pairs of images that every artefact is run on before it is written, and what they must give.

The reference is the network in float64. Of a large volume only the products of its convolutions are
float32: torch unfolds a volume for a float64 convolution, which takes a minute and 21 GB at
160x192x160, and changes the displacement by 1.4e-5 voxel at most.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ulae_rt import samples
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.image import image_of
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.preprocess import network_input, with_background, working_grid
from ulae_rt.imaging.transform import jacobian_determinant
from ulae_rt.model import UlaeNet

Shape = tuple[int, int, int]

SAMPLE = "sample pair"
CANARY = "noise, canary heads"

# Heads that make voxels of displacement whatever the weights: std of the weights, and a shift by
# step and component in full-resolution voxels, far from whole and half numbers.
CANARY_STD = 0.02
CANARY_SHIFT = ((0.3, -0.2, 0.4), (-0.4, 0.3, -0.2), (0.2, 0.4, 0.3))
_FACTORS = (4, 2, 1)

FIELD_OF_VIEW_MM = (160.0, 192.0, 160.0)
_ALL_FLOAT64 = 2**18  # voxels


class Truth(NamedTuple):
    """What one pair must give, float64.

    Attributes:
        moved: (1, D, H, W).
        disp: (3, D, H, W), voxels.
        folded: (D, H, W), where the Jacobian determinant is 0 or less.
    """

    moved: NDArray[np.float64]
    disp: NDArray[np.float64]
    folded: NDArray[np.bool_]


class Case(NamedTuple):
    """One batch of pairs and what it must give.

    Attributes:
        name: for people.
        moving, fixed: (B, 1, D, H, W) float32 in [0, 1].
        truth: one for each pair.
    """

    name: str
    moving: NDArray[np.float32]
    fixed: NDArray[np.float32]
    truth: tuple[Truth, ...]

    def batch(self, pairs: int, first: int = 0) -> "Case":
        """``pairs`` of its pairs from ``first`` on, again from the beginning after the last."""
        order = [(first + i) % len(self.truth) for i in range(pairs)]
        return Case(
            self.name, self.moving[order], self.fixed[order], tuple(self.truth[i] for i in order)
        )


def sample_case(model: UlaeNet, shape: Shape, both_ways: bool) -> Case:
    """The two sample brains, registered with the weights as they are.

    Args:
        model: the network, float32.
        shape: (D, H, W); the brains fill it whatever its voxels' size.
        both_ways: a second pair with the images exchanged, for artefacts of larger batches.
    """
    moving, fixed = _sample_pair(shape)
    if not both_ways:
        return _case(SAMPLE, model, moving[None], fixed[None])
    return _case(SAMPLE, model, np.stack((moving, fixed)), np.stack((fixed, moving)))


def canary_case(canary: UlaeNet, shape: Shape, both_ways: bool) -> Case:
    """Noise, registered by a network with :func:`canary_heads`.

    Weights that displace little, untrained ones most of all, do not show a graph that samples the
    nearest voxel for the linear mean, that mixes up its axes or shifts by half a voxel. On noise,
    displaced by fractions of a voxel everywhere, each of these changes every voxel of the result.

    Args:
        canary: the network with such heads.
        shape: (D, H, W).
        both_ways: two pairs in place of one.
    """
    pairs = 2 if both_ways else 1
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(2, pairs, 1, *shape, generator=generator).numpy()
    return _case(CANARY, canary, noise[0], noise[1])


def canary_heads(model: UlaeNet) -> UlaeNet:
    """A copy of ``model`` whose heads displace by voxels, in every direction and step."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for step in model.used_steps:
            weight = model.get_parameter(f"heads.{step}.weight")
            weight.copy_(CANARY_STD * torch.randn(weight.shape, generator=generator))
            shift = torch.tensor(CANARY_SHIFT[step - 1]) / _FACTORS[step - 1]
            model.get_parameter(f"heads.{step}.bias").copy_(shift)
    return model


def folded(disp: NDArray[Any]) -> NDArray[np.bool_]:
    """Where p -> p + disp(p) has a Jacobian determinant of 0 or less; disp is (3, D, H, W)."""
    voxels = torch.from_numpy(np.ascontiguousarray(disp, np.float32))[None]
    return np.asarray(jacobian_determinant(voxels, np.eye(4))[0, 0] <= 0)


def _case(
    name: str, model: UlaeNet, moving: NDArray[np.float32], fixed: NDArray[np.float32]
) -> Case:
    reference = copy.deepcopy(model).double()
    reference.feature_dtype = None
    truth = []
    for pair in zip(moving, fixed, strict=True):
        images = [torch.from_numpy(image)[None].double() for image in pair]
        with torch.inference_mode(), _Float32Products():
            moved, disp = reference.predict(*images)
        found = disp[0].numpy()
        truth.append(Truth(moved[0].numpy(), found, folded(found)))
    return Case(name, moving, fixed, tuple(truth))


class _Float32Products(TorchFunctionMode):
    """Convolutions of large float64 volumes in float32; see the module."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.conv3d or args[0][0, 0].numel() <= _ALL_FLOAT64:
            return func(*args, **kwargs)
        narrow: list[Any] = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*narrow, **kwargs).double()


def _sample_pair(shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sample brains on a grid of ``shape`` that shows all of them, (1, D, H, W) each."""
    spacing = max(mm / size for mm, size in zip(FIELD_OF_VIEW_MM, shape, strict=True))
    moving, fixed = (
        with_background(image_of(read_volume(path))) for path in (samples.MOVING, samples.FIXED)
    )
    affine = register_affine(moving, fixed)
    grid, _ = working_grid(fixed, shape, spacing * np.eye(3))
    return (
        network_input(moving, grid, affine)[0].numpy(),
        network_input(fixed, grid, None)[0].numpy(),
    )
