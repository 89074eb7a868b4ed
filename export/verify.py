"""Running an artefact against the network it was made from. No artefact leaves without it."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ulae_rt.engines.backends import Array, Backend
from ulae_rt.errors import EquivalenceError, ExportError
from ulae_rt.manifest import Measured
from ulae_rt.model import UlaeNet
from ulae_rt.optional import require

# Two correct float32 runs differ by the order of their sums, which the warps pass on. Measured at
# 160x192x160 with displacements up to 11 voxels: 6e-5 voxel, and 4e-5 in intensity on noise. The
# project's bound for its CPU path is 1e-3 voxel, through which noise changes by as much.
DISP_TOLERANCE = 1e-3
MOVED_TOLERANCE = 1e-3

# Heads that make voxels of displacement whatever the weights: std of the weights, and a shift by
# step and component in full-resolution voxels, far from whole and half numbers.
CANARY_STD = 0.02
CANARY_SHIFT = ((0.3, -0.2, 0.4), (-0.4, 0.3, -0.2), (0.2, 0.4, 0.3))
_FACTORS = (4, 2, 1)


class Case(NamedTuple):
    """A pair of images, and the network that both sides run on it."""

    name: str
    model: UlaeNet
    proto: Any
    moving: Tensor
    fixed: Tensor


def cases(model: UlaeNet, proto: Any, shape: tuple[int, int, int]) -> Iterator[Case]:
    """What an ONNX model is run on.

    First two synthetic brains with the weights as they are. Then noise, with the heads of both
    sides replaced: untrained weights displace nothing, and then a graph that samples the nearest
    voxel for the linear mean, or mixes up its axes, would pass unseen.

    Args:
        model: the network, float32.
        proto: ``onnx.ModelProto`` made from it.
        shape: (D, H, W).
    """
    yield Case("synthetic brains", model, proto, _brain(shape, 1), _brain(shape, 2))
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(2, 1, 1, *shape, generator=generator)
    canary = _with_canary_heads(model)
    canary_proto = _with_heads_of(canary, proto)
    yield Case("noise, canary heads", canary, canary_proto, noise[0], noise[1])


def measure(case: Case, backend: Backend) -> Measured:
    """Run one case on both sides.

    Args:
        case: of :func:`cases`.
        backend: ``case.proto``, loaded.

    Raises:
        EquivalenceError: if they differ by more than the tolerance, naming the worst place.
    """
    with torch.no_grad():
        expected = case.model.predict(case.moving, case.fixed)
    found = backend.run({"moving": case.moving.numpy(), "fixed": case.fixed.numpy()})
    moved, disp = expected.moved.numpy(), expected.disp.numpy()
    largest = float(np.sqrt((disp**2).sum(axis=1).max()))
    _compare(case, "disp", found["disp"], disp, DISP_TOLERANCE)
    _compare(case, "moved", found["moved"], moved, MOVED_TOLERANCE)
    distance = np.sqrt(((found["disp"] - disp) ** 2).sum(axis=1))
    return Measured(
        pair=case.name,
        runtime=f"{backend.name} {backend.device}",
        machine="",
        seconds=0.0,
        disp_largest=largest,
        disp_mean=float(distance.mean(dtype=np.float64)),
        disp_p99=float(np.quantile(distance, 0.99)),
        disp_max=float(distance.max()),
        moved_mean=float(np.abs(found["moved"] - moved).mean()),
        moved_max=float(np.abs(found["moved"] - moved).max()),
        sign_flips=0,
    )


def _compare(case: Case, name: str, found: Array, expected: Array, tolerance: float) -> None:
    """Refuse the worst element, a NaN before all."""
    difference = np.nan_to_num(np.abs(found - expected), nan=np.inf)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    if not difference[worst] <= tolerance:
        index = ", ".join(str(int(i)) for i in worst)
        raise EquivalenceError(
            f"verification failed on {case.name}: {name}[{index}] is {found[worst]:.6g}, expected "
            f"{expected[worst]:.6g} to {tolerance:g}",
            "nothing was written; install the versions of constraints.txt, and report it if they "
            "are installed",
        )


def _brain(shape: tuple[int, int, int], seed: int) -> Tensor:
    """A smooth, textured ellipsoid in [0, 1] on a background of zero, (1, 1, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(-1, 1, size) for size in shape]
    radius = sum(x**2 for x in torch.meshgrid(*axes, indexing="ij"))
    bumps = torch.zeros(1, 1, *shape)
    for cells, weight in ((4, 0.3), (16, 0.2)):
        coarse = torch.rand(1, 1, *[max(2, size // cells) for size in shape], generator=generator)
        bumps += weight * F.interpolate(coarse, shape, mode="trilinear", align_corners=True)
    outline = torch.sigmoid(20 * (0.7 + bumps - radius))
    return (outline * (0.3 + bumps)).clamp(0, 1)


def _with_canary_heads(model: UlaeNet) -> UlaeNet:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for step in model.used_steps:
            weight = model.get_parameter(f"heads.{step}.weight")
            weight.copy_(CANARY_STD * torch.randn(weight.shape, generator=generator))
            shift = torch.tensor(CANARY_SHIFT[step - 1]) / _FACTORS[step - 1]
            model.get_parameter(f"heads.{step}.bias").copy_(shift)
    return model


def _with_heads_of(model: UlaeNet, proto: Any) -> Any:
    """A copy of the ONNX model with another network's heads."""
    onnx = require("onnx", "export")
    changed = type(proto)()
    changed.CopyFrom(proto)
    constants = {tensor.name: tensor for tensor in changed.graph.initializer}
    for step in model.used_steps:
        name = f"model.heads.{step}.weight"
        heads = [node for node in changed.graph.node if name in node.input]
        if name not in constants or [node.op_type for node in heads] != ["Conv"]:
            raise ExportError(f"the graph is off: no convolution with the weights {name}")
        weight = model.get_parameter(f"heads.{step}.weight").detach().contiguous().numpy()
        constants[name].CopyFrom(onnx.numpy_helper.from_array(weight, name))
        bias = model.get_parameter(f"heads.{step}.bias").detach().numpy()
        # A name of its own: equal biases (fresh ones are all zero) share one constant.
        changed.graph.initializer.append(onnx.numpy_helper.from_array(bias, f"canary.{step}"))
        del heads[0].input[2:]
        heads[0].input.append(f"canary.{step}")
    return changed
