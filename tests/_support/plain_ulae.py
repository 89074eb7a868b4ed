"""ULAE-net once more, written as plainly as it is specified, to judge the package by.

It shares no code with the package and imports only torch. Parameters come as a state dict with the
names of the released checkpoints (``acc1.mec2.ab6.weight``, ``acc3.output.bias``); arithmetic is in
whatever type they have, float64 in the tests. Nothing is reused between steps, folded or fast.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

STEPS = (1, 2, 3)
DILATIONS = {1: 4, 2: 3, 3: 2, 4: 1}
# Input and output channels, base width 16.
FIXED_PATH = {1: (1, 16), 2: (16, 32), 3: (32, 32), 4: (32, 32)}
FUSION = {1: (32, 16), 2: (64, 32), 3: (64, 32), 4: (64, 32)}
DECODER = {
    "dc0": (32, 32),
    "dc1": (64, 32),
    "dc2": (64, 32),
    "dc3": (48, 32),
    "dc4": (32, 32),
    "dc5": (32, 16),
    "dc6": (18, 16),
}
DECODER_OF_STEP = {
    1: ("dc0", "dc1", "dc4", "dc5", "dc6"),
    2: ("dc0", "dc1", "dc2", "dc4", "dc5", "dc6"),
    3: ("dc0", "dc1", "dc2", "dc3", "dc4", "dc5", "dc6"),
}


class Registered(NamedTuple):
    """W, Phi, and the three entries each of steps, accumulated and progressive."""

    moved: Tensor
    disp: Tensor
    steps: list[Tensor]
    accumulated: list[Tensor]
    progressive: list[Tensor]


# Parameters


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (before, after) in FIXED_PATH.items():
        shapes[f"fec{i}.0.weight"] = (after, before, 3, 3, 3)
        for name, size in (("conv", 1), ("conv2", 3), ("ab1", 1), ("ab6", 3), ("ab12", 3)):
            shapes[f"mec{i}.{name}.weight"] = (after, before, size, size, size)
        shapes[f"mec{i}.ab18.weight"] = (after, before, 3, 3, 3)
        shapes[f"mec{i}.out.weight"] = (after, 7 * after, 1, 1, 1)
        for name in ("conv", "conv2", "ab1", "ab6", "ab12", "ab18", "out"):
            shapes[f"mec{i}.{name}.bias"] = (after,)
    for i, (before, after) in FUSION.items():
        shapes[f"fusion{i}.0.weight"] = (after, before, 3, 3, 3)
    return shapes


def decoder_shapes(step: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.0.weight": (DECODER[name][1], DECODER[name][0], 3, 3, 3)
        for name in DECODER_OF_STEP[step]
    }


def random_tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * math.sqrt(2 / fan_in)


def random_state(variant: str, seed: int = 0) -> State:
    """A released-format state dict; ``paper`` repeats one decoder under the three steps."""
    state: State = {}
    for step in STEPS:
        shapes = encoder_shapes() | decoder_shapes(step)
        shapes |= {"output.weight": (3, 16, 3, 3, 3), "output.bias": (3,)}
        for name, shape in shapes.items():
            # A stable number for a name, other than Python's hash, which changes between runs.
            number = sum((i + 1) * ord(c) for i, c in enumerate(name)) + 100_000 * seed
            own = name.startswith("output") or (name.startswith("dc") and variant == "release")
            state[f"acc{step}.{name}"] = random_tensor(shape, number + own * 10_000 * step)
    return state


# Layers


def instance_norm(x: Tensor) -> Tensor:
    # Written out: F.instance_norm refuses a level of a single voxel, which a 16-voxel cube has.
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def conv_block(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    y = F.conv3d(x, state[f"{name}.0.weight"], stride=stride, padding=1)
    return F.leaky_relu(instance_norm(y), 0.2)


def moving_block(state: State, name: str, x: Tensor, y: Tensor, dilation: int) -> Tensor:
    """The seven branches, concatenated, and the 1x1x1 convolution over them."""

    def conv(branch: str, image: Tensor, **arguments: int) -> Tensor:
        weight, bias = state[f"{name}.{branch}.weight"], state[f"{name}.{branch}.bias"]
        return F.conv3d(image, weight, bias, **arguments)

    pooled = conv("conv", F.adaptive_avg_pool3d(x, 1))
    branches = [
        pooled.expand(-1, -1, *y.shape[2:]),
        conv("conv2", x, stride=2, padding=1),
        conv("ab1", x, stride=2),
        conv("ab6", x, stride=2, padding=dilation, dilation=dilation),
        conv("ab12", x, stride=2, padding=2 * dilation, dilation=2 * dilation),
        conv("ab18", x, stride=2, padding=3 * dilation, dilation=3 * dilation),
        y,
    ]
    return F.leaky_relu(conv("out", torch.cat(branches, dim=1)), 0.2)


def up(x: Tensor) -> Tensor:
    return torch.nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)(x)


def step_displacement(state: State, step: int, moving: Tensor, fixed: Tensor) -> Tensor:
    """phi of one step at full resolution, in voxels."""
    acc = f"acc{step}"
    fused = {}
    x, y = moving, fixed
    for i in (1, 2, 3, 4):
        y = conv_block(state, f"{acc}.fec{i}", y, stride=2)
        x = moving_block(state, f"{acc}.mec{i}", x, y, DILATIONS[i])
        fused[i] = conv_block(state, f"{acc}.fusion{i}", torch.cat([x, y], dim=1))

    x = conv_block(state, f"{acc}.dc0", fused[4])
    x = conv_block(state, f"{acc}.dc1", torch.cat([up(x), fused[3]], dim=1))
    if step >= 2:
        x = conv_block(state, f"{acc}.dc2", torch.cat([up(x), fused[2]], dim=1))
    if step >= 3:
        x = conv_block(state, f"{acc}.dc3", torch.cat([up(x), fused[1]], dim=1))
    x = conv_block(state, f"{acc}.dc4", x)
    x = conv_block(state, f"{acc}.dc5", x)

    pair = torch.cat([moving, fixed], dim=1)
    if step == 1:
        pair = F.avg_pool3d(F.avg_pool3d(pair, 2), 2)
    elif step == 2:
        pair = F.avg_pool3d(pair, 2)
    x = conv_block(state, f"{acc}.dc6", torch.cat([up(x), pair], dim=1))

    phi = F.conv3d(x, state[f"{acc}.output.weight"], state[f"{acc}.output.bias"], padding=1)
    factor = {1: 4, 2: 2, 3: 1}[step]
    if factor == 1:
        return phi
    return F.interpolate(factor * phi, size=moving.shape[2:], mode="trilinear", align_corners=True)


def warp(image: Tensor, disp: Tensor) -> Tensor:
    """image(p + disp(p)) with the grid normalised as the released code does; axes of size > 1."""
    sizes = image.shape[2:]
    lattice = torch.meshgrid(
        *[torch.arange(s, dtype=disp.dtype, device=disp.device) for s in sizes], indexing="ij"
    )
    columns = [
        2 * ((lattice[axis] + disp[:, axis]) / (sizes[axis] - 1) - 0.5) for axis in (2, 1, 0)
    ]
    grid = torch.stack(columns, dim=-1)
    return F.grid_sample(image, grid, "bilinear", "zeros", align_corners=True)


def register(state: State, moving: Tensor, fixed: Tensor) -> Registered:
    phi_1 = step_displacement(state, 1, moving, fixed)
    m_1 = warp(moving, phi_1)
    phi_2 = step_displacement(state, 2, m_1, fixed)
    m_2 = warp(m_1, phi_2)
    phi_3 = step_displacement(state, 3, m_2, fixed)
    m_3 = warp(m_2, phi_3)
    total_2 = warp(phi_1, phi_2) + phi_2
    total = warp(total_2, phi_3) + phi_3
    return Registered(
        moved=warp(moving, total),
        disp=total,
        steps=[phi_1, phi_2, phi_3],
        accumulated=[phi_1, total_2, total],
        progressive=[m_1, m_2, m_3],
    )


def scale_heads(state: State, scales: tuple[float, float, float]) -> State:
    """Random heads give displacements of a voxel or so; these reach further."""
    return {
        key: value * scales[int(key[3]) - 1] if ".output." in key else value
        for key, value in state.items()
    }


def package_state(state: State, variant: str) -> State:
    """Released names to the package's, written a second time (checkpoint.py has its own)."""
    out = {}
    for key, value in state.items():
        acc, block, rest = key.split(".", 2)
        step = acc.removeprefix("acc")
        if block == "output":
            out[f"heads.{step}.{rest}"] = value
        elif not block.startswith("dc"):
            out[f"encoder.{block}.{rest}"] = value
        elif variant == "release" or step == "3":
            out[f"decoders.{step}.{block}.{rest}"] = value
    return out


# Losses


def ncc(x: Tensor, y: Tensor, window: int, eps: float = 1e-5) -> Tensor:
    """One channel; window sums by a convolution with ones."""
    ones = x.new_ones(1, 1, window, window, window)

    def box(image: Tensor) -> Tensor:
        return F.conv3d(image, ones, padding=window // 2)

    n = window**3
    s_x, s_y = box(x), box(y)
    cross = box(x * y) - s_x * s_y / n
    variance_x = box(x * x) - s_x * s_x / n
    variance_y = box(y * y) - s_y * s_y / n
    return (cross * cross / (variance_x * variance_y + eps)).mean()


def smoothness(disp: Tensor) -> Tensor:
    dd = disp[:, :, 1:] - disp[:, :, :-1]
    dh = disp[:, :, :, 1:] - disp[:, :, :, :-1]
    dw = disp[:, :, :, :, 1:] - disp[:, :, :, :, :-1]
    return (torch.mean(dd**2) + torch.mean(dh**2) + torch.mean(dw**2)) / 3
