"""Networks whose displacement is known: no weights."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class FakeMetadata:
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 2.0
    normalisation: str = "p99.9"


class FakeNetwork:
    """Shifts by ``shift`` voxels of its grid, or raises or returns what it is told to.

    ``answer`` is an error, or an array (3, D, H, W).
    """

    description = "fake"
    device = "cpu"
    precision = "fp32"
    weights_sha256 = "0" * 64
    batch = 1
    at_once = 1

    def __init__(self, shift=(0.0, 0.0, 0.0), metadata=None, answer=None):
        self.metadata = metadata or FakeMetadata()
        self.shift = shift
        self.answer = answer
        self.seen: tuple[np.ndarray, np.ndarray] | None = None

    def displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        pairs = zip(moving[:, 0], fixed[:, 0], strict=True)
        return torch.stack([self._displacement(*pair) for pair in pairs])

    def _displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        assert tuple(moving.shape) == tuple(fixed.shape) == self.metadata.shape
        assert moving.dtype == fixed.dtype == torch.float32
        self.seen = moving.numpy(), fixed.numpy()
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is not None:
            return torch.from_numpy(self.answer)
        shift = torch.tensor(self.shift, dtype=torch.float32)[:, None, None, None]
        return shift.expand(3, *moving.shape).contiguous()
