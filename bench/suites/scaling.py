"""How the cost grows: the package's main ops and its network against voxels and against pairs.

A cost in proportion has the exponent 1; less says that the machine was not filled by the small
ones, more that something is lost on the large.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from harness.case import FULL, PACKAGE, Case, Measured, Outcome, Setting, Sizes
from harness.gpu_timing import seconds_of
from harness.rounds import interleaved
from suites import kernels, network

NAME = "scaling"
ROWS = ("warp", "warp, by displacement", "lncc 11 9 7, by one")
ON_GPU: tuple[Sizes, ...] = ((96, 96, 96), (128, 128, 128), FULL, (192, 224, 192))
ON_CPU: tuple[Sizes, ...] = ((32, 32, 32), (48, 48, 48), (64, 64, 64), (96, 96, 96))
NETWORK_ON_CPU: tuple[Sizes, ...] = (
    (48, 48, 48),
    (64, 80, 64),
    (80, 96, 80),
    (128, 128, 128),
    FULL,
)
BATCHES = (1, 2, 4, 8)
WARM_UPS = 2
SECONDS = 8.0

Measure = Callable[[int], Measured]


def cases(setting: Setting) -> list[Case]:
    on_gpu = setting.device == "cuda"
    sizes = ON_GPU if on_gpu else ON_CPU
    network_sizes = ON_GPU if on_gpu else NETWORK_ON_CPU
    batches = BATCHES
    if setting.small:
        sizes = network_sizes = ((16, 16, 16), (16, 32, 16), (32, 32, 32))
        batches = (1, 2, 3)
    found = []
    for name, row in kernels.all_rows().items():
        if name in ROWS:
            alone = replace(row, baselines={}, missing={})
            measure = partial(kernels.measured, alone)
            found += series(name, measure, sizes, batches, on_gpu, row.precision)
    precision = "fp16" if on_gpu else "fp32"
    measure = partial(measured_network, torch.float16 if on_gpu else None)
    found += series("network", measure, network_sizes, batches, on_gpu, precision)
    return found


def series(
    name: str,
    measure: Callable[[Sizes, int, int], Measured],
    sizes: tuple[Sizes, ...],
    batches: tuple[int, ...],
    on_gpu: bool,
    precision: str,
) -> list[Case]:
    """One work by voxels and, at the smallest of them, by pairs."""

    def case(size: Sizes, batch: int, by: str, x: float) -> Case:
        return Case(
            NAME,
            f"{name} by {by}",
            (PACKAGE,),
            partial(measure, size, batch),
            size,
            batch,
            precision,
            series=f"{name} by {by}",
            x=x,
        )

    by_voxels = [case(size, 1, "voxels", _voxels(size)) for size in sizes]
    # On a GPU at the size that people use: there the small ones do not fill it.
    one = FULL if on_gpu and FULL in sizes else sizes[0]
    return by_voxels + [case(one, batch, "pairs", batch) for batch in batches]


def _voxels(size: Sizes) -> float:
    return float(size[0] * size[1] * size[2])


def measured_network(
    precision: torch.dtype | None, sizes: Sizes, batch: int, rounds: int
) -> Measured:
    """The network in this process: its error is the network suite's to look at."""
    device = torch.device(network.device())
    net = network.package("paper", precision).to(device)
    pair = network.images(sizes, batch, device.type)

    def run() -> Any:
        with torch.inference_mode():
            return net.predict(*pair)

    for _ in range(WARM_UPS):
        run()
    seconds = interleaved({PACKAGE: lambda: seconds_of(run, device)}, rounds, SECONDS)
    return Measured(
        {PACKAGE: Outcome(seconds=seconds[PACKAGE])}, flops=network.flops("paper", sizes, batch)
    )
