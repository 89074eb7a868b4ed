"""Every op as a call on tensors of any size, for whatever asks the same of all of them.

The tests that need a GPU and the benchmarks go through :data:`OPS`; so does a test that runs each
once on the CPU, where the rest of them cannot run. Ops without a gradient are apart, in
:data:`INFERENCE_OPS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from _support.volumes import Sizes, generator
from ulae_rt import kernels

WINDOWS, WEIGHTS = (11, 9, 7), (1.0, 0.5, 0.25)


def textured(
    shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, C, D, H, W), made on the device: blobs in [0, 0.8] and noise in [0, 0.2] over them."""
    coarse = torch.rand(*shape[:2], 8, 8, 8, generator=generator(seed)).to(device)
    blobs = F.interpolate(coarse, size=shape[2:], mode="trilinear", align_corners=True)
    noise = torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return (0.8 * blobs + 0.2 * noise).to(dtype)


def field(
    sizes: Sizes, seed: int, device: torch.device, reach: float = 6.0, batch: int = 1
) -> Tensor:
    """(B, 3, D, H, W): smooth up to jumps of 0.2, and 0.1 to 0.9 from the next voxel centre.

    Trilinear sampling has a kink at every voxel centre: beside one, rounding alone would make two
    correct gradients differ.
    """
    coarse = torch.rand(batch, 3, 5, 5, 5, generator=generator(seed)) - 0.5
    u = F.interpolate(coarse.to(device), size=sizes, mode="trilinear", align_corners=True)
    u = 2 * reach * u
    return u.floor() + 0.1 + 0.8 * (u - u.floor())


def coarse(sizes: Sizes, factor: int) -> Sizes:
    """The grid ``factor`` times as coarse."""
    return sizes[0] // factor, sizes[1] // factor, sizes[2] // factor


@dataclass(frozen=True)
class OpCase:
    """An op with its options, and inputs for it.

    Attributes:
        call: tensors to one tensor or several, all differentiable (:data:`OPS`) or none.
        make: (sizes, seed, device) to float32 inputs; ``sizes`` is the full grid.
        kinked: whether inputs may lie beside a kink, where gradients of two correct computations
            differ in single voxels.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[Sizes, int, torch.device], list[Tensor]]
    kinked: bool = False


def _image(sizes: Sizes, seed: int, device: torch.device) -> Tensor:
    return textured((1, 1, *sizes), seed, device)


def _warp(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [_image(sizes, seed, device), field(sizes, seed + 1, device)]


def _warp_coarse(factor: int, sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    inner = field(coarse(sizes, factor), seed + 1, device, reach=6 / factor)
    return [_image(sizes, seed, device), inner]


def _compose(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [field(sizes, seed, device), field(sizes, seed + 1, device)]


def _warp_compose(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [_image(sizes, seed + 2, device), *_compose(sizes, seed, device)]


def _warp_compose_coarse(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    outer = field(sizes, seed + 2, device)
    image, inner = _warp_coarse(2, sizes, seed, device)
    return [image, outer, inner]


def _coarse_field(factor: int, sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [field(coarse(sizes, factor), seed, device)]


def _two_images(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    first = _image(sizes, seed, device)
    # A second view of the same thing: a correlation between 0 and 1.
    return [first, 0.7 * first + 0.3 * _image(sizes, seed + 1, device)]


def _field(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [field(sizes, seed, device)]


def _features(channels: int, sizes: Sizes, seed: int, device: torch.device) -> Tensor:
    x = torch.randn(
        1, channels, *sizes, generator=torch.Generator(device).manual_seed(seed), device=device
    )
    return x.contiguous(memory_format=torch.channels_last_3d)


def _one_of_features(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    return [_features(16, sizes, seed, device)]


def _two_of_features(sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
    small = _features(16, coarse(sizes, 2), seed, device)
    return [small, _features(2, sizes, seed + 1, device)]


def _block(
    channels: tuple[int, int], branches: int, factor: int, sizes: Sizes, seed: int,
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Features at 1 / ``factor`` of the grid and what a block adds; results of order 1."""
    before, after = channels
    x = _features(before, coarse(sizes, factor), seed, device)
    halves = tuple((size + 1) // 2 for size in x.shape[2:])
    kernels = torch.randn(branches, after, before, 3, 3, 3, generator=generator(seed + 1))
    return [
        x,
        _features(after, halves, seed + 2, device),
        torch.randn(1, after, generator=generator(seed + 3)).to(device),
        kernels.to(device) * (27 * before * branches) ** -0.5,
    ]


def _moving_block(dilations: tuple[int, ...], *tensors: Tensor) -> Tensor:
    x, fixed_term, mean_term, weights = tensors
    # Every other case has one type; here one term is never of half precision.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return kernels.moving_block(x, fixed_term, mean_term.to(exact), weights, dilations)


def weighted_total(x: Tensor, y: Tensor) -> Tensor:
    """The result of ``weighted_lncc`` that has a gradient."""
    return kernels.weighted_lncc(x, y, WINDOWS, WEIGHTS)[0]


OPS = {
    "warp": OpCase(kernels.warp, _warp),
    "warp border": OpCase(partial(kernels.warp, padding="border"), _warp),
    "warp coarse": OpCase(partial(kernels.warp, factor=2), partial(_warp_coarse, 2), kinked=True),
    "compose": OpCase(kernels.compose, _compose),
    "compose coarse": OpCase(
        partial(kernels.compose, factor=2),
        lambda *of: _warp_compose_coarse(*of)[1:],
        kinked=True,
    ),
    "warp_compose": OpCase(kernels.warp_compose, _warp_compose),
    "warp_compose coarse": OpCase(
        partial(kernels.warp_compose, factor=2), _warp_compose_coarse, kinked=True
    ),
    "resize_displacement": OpCase(
        partial(kernels.resize_displacement, factor=2), partial(_coarse_field, 2)
    ),
    "resize_displacement by 4": OpCase(
        partial(kernels.resize_displacement, factor=4), partial(_coarse_field, 4)
    ),
    "multi_window_lncc": OpCase(partial(kernels.multi_window_lncc, windows=WINDOWS), _two_images),
    "weighted_lncc": OpCase(weighted_total, _two_images),
    "diffusion": OpCase(kernels.diffusion, _field),
    "norm_activate": OpCase(kernels.norm_activate, _one_of_features, kinked=True),
    "upsample_concat": OpCase(kernels.upsample_concat, _two_of_features),
}


# The blocks of the network's first three levels: the fourth is as the third.
INFERENCE_OPS = {
    "moving_block of an image": OpCase(
        partial(_moving_block, (1, 4, 8, 12)), partial(_block, (1, 16), 4, 1)
    ),
    "moving_block": OpCase(partial(_moving_block, (1, 3, 6, 9)), partial(_block, (16, 32), 4, 2)),
    "moving_block in parts": OpCase(
        partial(_moving_block, (1, 2, 4, 6)), partial(_block, (32, 32), 4, 4)
    ),
}


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The results of a call as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Fixed numbers of order 1, one an output element, to differentiate with; laid out as it is."""
    found = []
    for index, out in enumerate(outputs):
        numbers = torch.Generator(out.device).manual_seed(7 + index)
        values = torch.randn(out.shape, generator=numbers, device=out.device)
        found.append(torch.empty_like(out).copy_(values))
    return found


def forward_backward(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """Outputs, and then the gradients to all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = outputs_of(call(*leaves))
    grads = cotangents(outputs) if grads is None else grads
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]
