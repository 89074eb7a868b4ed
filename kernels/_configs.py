"""Launch configurations: frozen data, chosen by a pure function of shape, type and architecture.

``bench/tune.py`` measures candidates and proposes lines; a person commits them. Nothing is tuned at
run time: the first call costs what the thousandth does, and equal machines compute equal bits.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs.

    Attributes:
        tile: elements a program computes along the kernel's own axes, powers of two.
        warps: warps a program.
    """

    tile: tuple[int, ...]
    warps: int


@dataclass(frozen=True)
class Line:
    """One line of the table: ``config`` where every condition that is given holds.

    Attributes:
        config: what to launch.
        width_at_most: longest row (the last axis) it is for.
        itemsize: bytes of an element of the largest input.
        archs: architectures, 90 for compute capability 9.0.
    """

    config: LaunchConfig
    width_at_most: int | None = None
    itemsize: int | None = None
    archs: tuple[int, ...] | None = None

    def fits(self, width: int, itemsize: int, arch: int) -> bool:
        """Whether the conditions hold."""
        return (
            (self.width_at_most is None or width <= self.width_at_most)
            and (self.itemsize is None or itemsize == self.itemsize)
            and (self.archs is None or arch in self.archs)
        )


# The first line that fits is taken; the last of each kernel has no condition.
# Slices to march through at most, and the rows and columns of each.
# Rows of 32 lanes: one 128-byte access a warp for float32, and no waste at widths of 160 and 192.
# The interpreter pays by the statement, not by the lane: few and large programs.
_SAMPLING = (
    Line(LaunchConfig(tile=(4, 32, 32), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(32, 16, 16), warps=8), width_at_most=16),
    Line(LaunchConfig(tile=(32, 8, 32), warps=8)),
)
# Rows and columns of one slice: a loop over more costs the registers of a third of the warps, and
# it is the atomics that these kernels wait for.
_SCATTERING = (
    Line(LaunchConfig(tile=(32, 32), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(8, 16), warps=4), width_at_most=16),
    Line(LaunchConfig(tile=(4, 32), warps=4)),
)
_FLAT = (
    Line(LaunchConfig(tile=(2048,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(256,), warps=4)),
)
# Slices to march through at most, and the rows and columns of each: two voxels a lane.
_COLUMNS = (
    Line(LaunchConfig(tile=(8, 32, 32), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(64, 8, 32), warps=4)),
)
# Elements: rows of channels by as many voxels as there is room for. The interpreter adds up a
# column one by one, which would show in float32: short ones.
_ROWS = (
    Line(LaunchConfig(tile=(64,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(2048,), warps=4), itemsize=8),
    Line(LaunchConfig(tile=(8192,), warps=4)),
)
# Rows to march through, and elements: channels of a row of voxels, eight a lane. Widths of 160 and
# 192 are multiples of the 32 voxels that 16 channels leave, and their halves of 16.
_UPSAMPLED = (
    Line(LaunchConfig(tile=(4, 1024), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(8, 512), warps=2)),
)
# Four sums a channel: half as many channels a lane, or they take all registers.
_GATHERED = (
    Line(LaunchConfig(tile=(1024,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(256,), warps=2)),
)
# One program adds up what the others left, with enough of it in flight at a time.
_SUMS = (
    Line(LaunchConfig(tile=(1024,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(4096,), warps=8)),
)
# Slices a program marches over at most, and lanes that do; see lncc/kernel.py.
_MARCH = (
    Line(LaunchConfig(tile=(8, 1024), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(128, 128), warps=4)),
)
# Parts that the taps are dealt out to, and elements: channels of as many voxels as there is room
# for. 20x24x20 voxels of 32 channels are 75 tiles of 128, too few for a GPU: there short tiles, and
# a warp a part. Wider types take two warps: of four, Triton 3.7 makes the tensor cores of sm_100
# round single precision to TF32, whatever it is asked for (triton-lang/triton#10176). In the
# interpreter a narrow grid has parts too, so that the tests see them.
_PRODUCT = (
    Line(LaunchConfig(tile=(4, 1024), warps=1), width_at_most=3, archs=(0,)),
    Line(LaunchConfig(tile=(1, 4096), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(1, 1024), warps=2), itemsize=8),
    Line(LaunchConfig(tile=(1, 2048), warps=2), itemsize=4),
    Line(LaunchConfig(tile=(4, 1024), warps=4), width_at_most=20),
    Line(LaunchConfig(tile=(1, 4096), warps=4)),
)
# Voxels, of which a thread gathers the taps; wider types in two warps for the same reason.
_GATHERED_TAPS = (
    Line(LaunchConfig(tile=(1024,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(256,), warps=4), itemsize=2),
    Line(LaunchConfig(tile=(64,), warps=2)),
)
# Points that a lane takes one after another, and the lanes of a program. A warp alone hands nothing
# through shared memory; 102 sums of 32 points each take most of a lane's registers. In double
# precision they would take more than all: there each point's products are summed over the lanes.
_GRAM = (
    Line(LaunchConfig(tile=(4, 1024), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(1, 32), warps=1), itemsize=8),
    Line(LaunchConfig(tile=(4, 32), warps=1)),
)
_GRAM_OF_VALUES = (
    Line(LaunchConfig(tile=(4, 1024), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(16, 32), warps=1)),
)
# One program adds up what the programs of a matrix left of one sum.
_GRAM_SUMS = (
    Line(LaunchConfig(tile=(1024,), warps=1), archs=(0,)),
    Line(LaunchConfig(tile=(512,), warps=2)),
)
TABLE: dict[str, tuple[Line, ...]] = {
    "affine_normal_equations": _GRAM,
    "affine_normal_equations_sum": _GRAM_SUMS,
    "affine_normal_equations_values": _GRAM_OF_VALUES,
    "compose_backward": _SCATTERING,
    "compose_forward": _SAMPLING,
    "diffusion": _COLUMNS,
    "diffusion_sum": _SUMS,
    "lncc_gradient": _MARCH,
    "lncc_planes": _MARCH,
    "lncc_score": _MARCH,
    "lncc_spread_planes": _MARCH,
    "moving_block": _PRODUCT,
    "moving_block_narrow": _GATHERED_TAPS,
    "norm_activate": _ROWS,
    "norm_activate_merge": _SUMS,
    "resize_backward": _FLAT,
    "resize_forward": _SAMPLING,
    "sample_world": _SAMPLING,
    "upsample_concat_backward": _GATHERED,
    "upsample_concat_forward": _UPSAMPLED,
    "warp_backward": _SCATTERING,
    "warp_compose_backward": _SCATTERING,
    "warp_compose_forward": _SAMPLING,
    # Two voxels a lane, side by side where the width is a multiple of 16: 97 instructions a voxel
    # in place of 116, 64 bits an access to what is not sampled, and still 32 registers.
    "warp_forward": (*_SAMPLING[:2], Line(LaunchConfig(tile=(32, 8, 32), warps=4))),
    "world_displacement": _SAMPLING,
    "world_jacobian": _SAMPLING,
}


def launch_config(kernel: str, width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """The configuration of ``kernel`` for rows of ``width`` elements of ``dtype`` on ``arch``."""
    for line in TABLE[kernel]:
        if line.fits(width, dtype.itemsize, arch):
            return line.config
    raise AssertionError(f"{kernel}: the last line of the table must have no condition")


def resident(registers: int, warps: int, arch: int) -> int:
    """Programs that a multiprocessor runs at a time, where ``registers`` a lane are what limits it.

    It has 2^16 registers, given out by eights, and room for 64 warps. The interpreter runs one.
    """
    if arch == 0:
        return 1
    lanes = 2**16 // (-(-registers // 8) * 8)
    return max(min(lanes // 32, 64) // warps, 1)


@lru_cache(maxsize=1024)
def march(
    steps: int, most: int, columns: int, multiprocessors: int, resident: int, extra: int
) -> int:
    """How many of ``steps`` steps along an axis a program takes, ``most`` or fewer.

    There are ``columns`` programs abreast, and a program takes as long as its steps and ``extra``
    more. The multiprocessor with most programs runs them in waves of ``resident``; a wave that is
    not full is limited half by its programs' latency, as if it were, and half by their number.
    Chosen is the fastest, and of equally fast ones the longest, which repeat least. GPUs with as
    many multiprocessors choose alike, and so add up in the same order.
    """

    def time(length: int) -> int:
        programs = -(-columns * -(-steps // length) // multiprocessors)
        full, rest = divmod(programs, resident)
        waves = 2 * resident * full + (resident + rest if rest else 0)
        return waves * (length + extra)

    return min(range(1, min(steps, most) + 1), key=lambda length: (time(length), -length))
