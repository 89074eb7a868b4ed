"""Features in channels_last_3d: (B, C, D, H, W) whose memory is (B, D, H, W, C), gapless.

With one channel or one voxel torch calls many strides channels_last_3d. These functions give those
of the permuted (B, D, H, W, C), the same for a kernel's result and for its fake.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulae_rt.kernels import _launch


def channels_last(x: Tensor) -> Tensor:
    """``x``, copied if its memory is another."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def allocate_features(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised features of (B, C, D, H, W) from :func:`_launch.allocate`."""
    return _permuted(_launch.allocate(_memory(shape), dtype, like))


def fake_features(shape: Sequence[int], like: Tensor) -> Tensor:
    """What :func:`allocate_features` returns, for a fake implementation; ``like``'s type."""
    return _permuted(like.new_empty(_memory(shape)))


def _memory(shape: Sequence[int]) -> list[int]:
    return [shape[0], *shape[2:], shape[1]]


def _permuted(memory: Tensor) -> Tensor:
    return memory.permute(0, 4, 1, 2, 3)
