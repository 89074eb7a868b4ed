"""Networks whose displacement is known: no torch, no weights."""

from dataclasses import dataclass

import numpy as np


@dataclass
class FakeMetadata:
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 2.0
    normalisation: str = "p99.9"


class FakeNetwork:
    """Shifts by ``shift`` voxels of its grid, or raises or returns what it is told to."""

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

    def displacement(self, moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        pairs = zip(moving[:, 0], fixed[:, 0], strict=True)
        return np.stack([self._displacement(*pair) for pair in pairs])

    def _displacement(self, moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        assert moving.shape == fixed.shape == self.metadata.shape
        assert moving.dtype == fixed.dtype == np.float32
        self.seen = moving, fixed
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is not None:
            return self.answer
        shift = np.array(self.shift, np.float32)[:, None, None, None]
        return np.ascontiguousarray(np.broadcast_to(shift, (3, *moving.shape)))
