"""The device of the Triton kernels: a GPU where there is one, Triton's interpreter elsewhere."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ulae_rt.kernels import _launch


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run; all memory that they are given is full of NaN (or of a large integer)."""
    if not _launch.TRITON_INSTALLED:
        pytest.skip("triton is not installed")
    allocate = _launch.allocate

    def poisoned(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
        memory = allocate(shape, dtype, like)
        if dtype.is_floating_point:
            return memory.fill_(torch.nan)
        return memory.fill_(min(2**30, torch.iinfo(dtype).max))

    monkeypatch.setattr(_launch, "allocate", poisoned)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
