"""What `ulae-rt register` is given: two brains, and a network whose answer is known."""

from pathlib import Path

import pytest

from _support.brains import GEOMETRIES, save_brain
from _support.networks import FakeNetwork
from ulae_rt.registration import registrar as registrar_module


@pytest.fixture
def network(monkeypatch) -> FakeNetwork:
    """The network that the command gets, whatever weights it names: 2 mm to the right."""
    fake = FakeNetwork(shift=(1.0, 0.0, 0.0))
    monkeypatch.setattr(registrar_module, "load_network", lambda *_, **__: fake)
    return fake


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Moving and fixed: one brain on an LIA and on an oblique grid, both about 0."""
    moving = save_brain(tmp_path / "moving.nii.gz", *GEOMETRIES["LIA"])
    fixed = save_brain(tmp_path / "fixed.nii.gz", *GEOMETRIES["oblique"])
    return moving, fixed
