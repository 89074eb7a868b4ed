"""What every test starts from: seeds, the interpreter where there is no GPU, the data set."""

import importlib.util
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.interpreter import quicken

if not torch.cuda.is_available():
    # Before anything imports a kernel: Triton decides when a kernel is defined. The interpreter
    # takes seconds where the reference takes milliseconds, so a test asks for the kernels by name.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ULAE_RT_KERNELS", "reference")

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    quicken()

ROOT = Path(__file__).resolve().parent.parent


# The volumes are small: a second thread would save nothing, and on a busy machine each waits for
# the other (twice the time, measured).
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are reported as skipped with the reason, never silently deselected."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code under test that draws from the global generator
    torch.manual_seed(0)


@pytest.fixture
def upright(monkeypatch) -> None:
    """The working grid lies along R, A and S at 1 mm, whatever a head's pose.

    For the blobs of `_support.brains`, which are no heads, and for displacements that are given in
    voxels of that grid.
    """
    monkeypatch.setattr("ulae_rt.registration.registrar.pose_of", lambda _: None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The OASIS scans with labels: ``ULAE_RT_DATA``, or ``../shared/data`` beside the checkout."""
    place = Path(os.environ.get("ULAE_RT_DATA") or ROOT.parent / "shared" / "data")
    if not (place / "oasis").is_dir():
        pytest.skip(f"no data set at {place}: set ULAE_RT_DATA to a folder with oasis/")
    return place


@pytest.fixture(scope="session")
def samples() -> tuple[Path, Path]:
    """The shipped pair: moving, fixed."""
    folder = ROOT / "samples"
    return folder / "colin27_brain.nii.gz", folder / "mni152_2009a_brain.nii.gz"
