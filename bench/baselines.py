"""What a user has today, in plain torch from the published formulas; and peers, where installed."""

import importlib
import itertools
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from _support import plain_ulae as plain

WINDOWS = (11, 9, 7)


@cache
def identity_grid(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 3, D, H, W) voxel coordinates, which the released module keeps as a buffer."""
    axes = [torch.arange(size, dtype=dtype, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def warp(image: Tensor, disp: Tensor) -> Tensor:
    """The released SpatialTransformer: points made, normalised, permuted, flipped, sampled."""
    sizes = disp.shape[2:]
    points = identity_grid(tuple(sizes), disp.device, disp.dtype) + disp
    normalised = [2 * (points[:, i] / (size - 1) - 0.5) for i, size in enumerate(sizes)]
    grid = torch.stack(normalised, dim=1).permute(0, 2, 3, 4, 1).flip(-1)
    # grid_sample wants one type for both.
    return F.grid_sample(image, grid.to(image.dtype), align_corners=True)


def compose(a: Tensor, b: Tensor) -> Tensor:
    return warp(a, b) + b


def warp_compose(image: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return warp(image, b), compose(a, b)


def resize(disp: Tensor, factor: int) -> Tensor:
    size = [factor * n for n in disp.shape[2:]]
    return F.interpolate(factor * disp, size=size, mode="trilinear", align_corners=True)


def warp_compose_coarse(image: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return warp_compose(image, a, resize(b, 2))


def ncc(x: Tensor, y: Tensor, windows: tuple[int, ...] = WINDOWS) -> Tensor:
    """Five dense convolutions with ones a window, as published."""
    return torch.stack([plain.ncc(x, y, window) for window in windows])


def separable_ncc(x: Tensor, y: Tensor, windows: tuple[int, ...] = WINDOWS) -> Tensor:
    """The same sums by three convolutions along the axes, all five maps at once."""
    maps = torch.cat((x, y, x * y, x * x, y * y), dim=1)
    means = []
    for window in windows:
        sums = maps
        for axis in range(3):
            shape = [window if i == axis else 1 for i in range(3)]
            padding = [size // 2 for size in shape]
            sums = F.conv3d(sums, x.new_ones(5, 1, *shape), padding=padding, groups=5)
        s_x, s_y, s_xy, s_xx, s_yy = sums.split(1, dim=1)
        n = window**3
        cross = s_xy - s_x * s_y / n
        variances = (s_xx - s_x * s_x / n) * (s_yy - s_y * s_y / n)
        means.append((cross * cross / (variances + 1e-5)).mean())
    return torch.stack(means)


def smoothness(disp: Tensor) -> Tensor:
    return plain.smoothness(disp)


def smoothness_with_gradient(disp: Tensor) -> tuple[Tensor, Tensor]:
    leaf = disp.detach().requires_grad_()
    with torch.enable_grad():
        loss = plain.smoothness(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def norm_activate(x: Tensor) -> Tensor:
    return F.leaky_relu(F.instance_norm(x), 0.2)


def upsample_concat(x: Tensor, skip: Tensor) -> Tensor:
    return torch.cat((plain.up(x), skip), dim=1)


def use_released_norm() -> None:
    """Let the plain network normalise by torch's one call, as the released code does.

    Written out, as it is to be read, it takes several passes: no fair baseline.
    """
    plain.instance_norm = F.instance_norm


# The released network's training step

Step = Callable[[Tensor, Tensor], Tensor]


def training_state() -> plain.State:
    """Released-format weights with heads near zero, as training starts."""
    state = plain.scale_heads(plain.random_state("paper"), (1e-3, 1e-3, 1e-3))
    return {key: value.float() for key, value in state.items()}


def released_parameters(device: torch.device) -> tuple[plain.State, list[Tensor]]:
    """:func:`training_state` in which the steps share what they share, and its parameters."""
    state, own = {}, {}
    for key, value in training_state().items():
        shared = key if ".output." in key else key.split(".", 1)[1]
        if shared not in own:
            own[shared] = value.to(device).requires_grad_()
        state[key] = own[shared]
    return state, list(own.values())


def released_loss(state: plain.State, moving: Tensor, fixed: Tensor) -> Tensor:
    """Eq. 5 of the image warped three times, as the released code trains."""
    image, total = moving, None
    for step in plain.STEPS:
        phi = plain.step_displacement(state, step, image, fixed)
        image = warp(image, phi)
        total = phi if total is None else compose(total, phi)
    assert total is not None
    gains = zip(itertools.count(), ncc(image, fixed), strict=False)
    return smoothness(total) - torch.stack([0.5**i * mean for i, mean in gains]).sum()


# Peers

Call = Callable[..., Tensor]


def _fused_lncc(window: int) -> Call:
    loss = importlib.import_module("fused_lncc").fused_lncc_loss
    return lambda x, y: (1 - loss(x, y, kernel_size=window)).reshape(1)


def _fireants(window: int) -> Call:
    module = importlib.import_module("fireants.losses.fusedcc")
    loss = module.FusedLocalNormalizedCrossCorrelationLoss(
        spatial_dims=3, kernel_size=window, use_ants_gradient=False
    )
    return lambda x, y: -loss(x, y).reshape(1)


def _monai(window: int) -> Call:
    losses = importlib.import_module("monai.losses")
    loss = losses.LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=window)
    return lambda x, y: -loss(x, y).reshape(1)


def _voxelmorph(window: int) -> Call:
    # VoxelMorph's own refuses to be made and names this one.
    loss = importlib.import_module("neurite.nn.modules").NCC(window_size=window)
    return lambda x, y: loss(x, y).reshape(1)


def _monai_warp() -> Call:
    blocks = importlib.import_module("monai.networks.blocks")
    with warnings.catch_warnings():  # that it samples by torch's grid_sample, as was asked for
        warnings.simplefilter("ignore")
        return blocks.Warp(mode="bilinear", padding_mode="zeros")  # type: ignore[no-any-return]


def _voxelmorph_warp() -> Call:
    modules = importlib.import_module("voxelmorph.nn.modules")
    return modules.SpatialTransformer()  # type: ignore[no-any-return]


def _found(makers: dict[str, Callable[[], Call]]) -> dict[str, Call | str]:
    """Each peer's call, or why there is none."""
    found: dict[str, Call | str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ModuleNotFoundError as error:  # of fireants, the operators that it is built with
            found[name] = f"{error.name} is not installed"
        except Exception as error:  # another version of it: a benchmark goes on without
            found[name] = f"{type(error).__name__}: {error}"
    return found


def lncc_peers(window: int) -> dict[str, Call | str]:
    """Mean local correlation of one window, (1,); their epsilons differ."""
    return _found(
        {
            "fused_lncc": lambda: _fused_lncc(window),
            "fireants": lambda: _fireants(window),
            "monai": lambda: _monai(window),
            "voxelmorph": lambda: _voxelmorph(window),
        }
    )


def warp_peers() -> dict[str, Call | str]:
    """Warped image, by each peer's own layer."""
    return _found({"monai": _monai_warp, "voxelmorph": _voxelmorph_warp})
