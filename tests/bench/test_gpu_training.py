"""Training on a borrowed GPU: packed here, run there without what is missing, gone on exactly."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_training
import nibabel as nib
import numpy as np
import pack_training
import pytest
import torch

from _support.project import ROOT
from harness import carried
from harness.evidence import rows
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.imaging.preprocess import NORMALISATION
from ulae_rt.model import load_model
from ulae_rt.model.checkpoint import read_torch
from ulae_rt.training.config import read_config

STEPS = 8
CONFIG = f"""
[data]
train = "training/train"
val = "training/val"
val_pairs = 1
pool = 4
[output]
folder = "whole"
validate_every = 6
[model]
channels = 2
[loss]
windows = [5, 3]
labels = 1.0
[augment]
flip = 0.5
[optimiser]
steps = {STEPS}
[run]
device = "cpu"
"""
# Another number of threads would be another order of sums.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# What the machine does not have, and nothing carries there.
BLOCKED = ("SimpleITK", "scipy", "matplotlib", "grpc", "markdown", "werkzeug", "monai")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans to train on and two to validate with, as `ulae-rt prepare` leaves them."""
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    for part, names in (("train", "abc"), ("val", "de")):
        (folder / part).mkdir()
        scans = {}
        for name in names:
            coarse = random.random([size // 16 for size in FULL_SHAPE]).astype(np.float32)
            image = np.kron(coarse / coarse.max(), np.ones((16, 16, 16), np.float32))
            labels = np.digitize(image, [0.3, 0.6]).astype(np.uint16)
            entry = {"image": f"{name}.nii.gz", "labels": f"{name}_labels.nii.gz"}
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / part / entry["image"])
            nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / part / entry["labels"])
            scans[name] = entry
        manifest = {
            "shape": FULL_SHAPE, "grid_affine": np.eye(4).tolist(), "scans": scans,
            "normalisation": NORMALISATION,
        }  # fmt: skip
        (folder / part / "prepared.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def unpacked(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in ``build/`` there, and the configuration beside it."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    (here / "build" / "wheels" / "site" / "package").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_training, "ROOT", here)
        patch.setattr(pack_training, "SITE", here / "build" / "wheels" / "site")
        patch.setattr(carried, "CACHE", here / "build" / "nothing")
        archive = here / "new" / "packed.tar.xz"
        patch.setattr(sys, "argv", ["", "--data", str(prepared), "-o", str(archive)])
        assert pack_training.main() == 0
    with tarfile.open(archive) as file:
        file.extractall(there, filter="data")
    (there / "config.toml").write_text(CONFIG)
    return there


def test_the_configuration_begins_with_the_shipped_weights_at_1_mm() -> None:
    config = read_config(gpu_training.CONFIG)
    assert config.data.pool == 1
    assert config.optimiser.start is not None
    shipped = load_model(config.optimiser.start).metadata
    assert {name: getattr(shipped, name) for name in config.model.model_dump()} == (
        config.model.model_dump()
    )
    assert config.optimiser.batch % config.run.micro_batch == 0


def test_scans_are_packed_to_a_quarter_with_a_small_error(prepared: Path, unpacked: Path) -> None:
    assert (unpacked / "wheels" / "site" / "package").is_dir()
    for name in ("train/a", "val/e"):
        packed = unpacked / "training" / name
        before, after = (
            read_volume(path).data
            for path in (prepared / f"{name}.nii.gz", packed.with_name(f"{packed.name}.nii"))
        )
        assert 0 < np.abs(before - after).max() <= 0.5 / 255 + 1e-6
        before, after = (
            read_volume(path, kind="labels").data
            for path in (
                prepared / f"{name}_labels.nii.gz",
                packed.with_name(f"{packed.name}_labels.nii"),
            )
        )
        assert np.array_equal(before, after)


def trained_there(
    folder: Path, out: Path, minutes: float, *more: object
) -> "subprocess.CompletedProcess[str]":
    """The command, where the packages that nothing carries are missing."""
    blocker = folder / "blocked"
    blocker.mkdir(exist_ok=True)
    code = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    (blocker / "sitecustomize.py").write_text(code)
    command = [sys.executable, "-P", str(ROOT / "bench" / "gpu_training.py"), "--out", out]
    command += ["--config", folder / "config.toml", "--data", folder / "training"]
    environment = {**ONE_THREAD, "PYTHONPATH": f"{blocker}:{ROOT / 'bench'}:{ROOT / 'tests'}"}
    return subprocess.run(
        [*map(str, command), "--minutes", str(minutes), *map(str, more)], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_commands_are_one_run(unpacked: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "ulae_rt.train", str(unpacked / "config.toml")]
    subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True)
    first, second = tmp_path / "first", tmp_path / "second"
    done = trained_there(unpacked, first, 1e-4)
    assert done.returncode == 0, done.stderr
    known = {row["what"]: row for row in rows(first)}
    assert (known["begun"]["step"], known["begun"]["scans"]) == (0, 3)
    assert known["ended"]["step"] == known["step"]["step"] == 5  # it looks at the clock every five
    assert known["ended"]["steps_per_second"] > 0
    assert sum(path.is_file() for path in first.rglob("*")) <= 7  # that come back
    done = trained_there(unpacked, second, 10, "--checkpoint", first / "run")
    assert done.returncode == 0, done.stderr
    known = {row["what"]: row for row in rows(second)}
    assert (known["begun"]["step"], known["ended"]["step"]) == (5, STEPS)
    whole, parts = (read_torch(path / "state.pt") for path in (unpacked / "whole", second / "run"))
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key
    for key, moments in whole["optimiser"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, parts["optimiser"]["state"][key][name]), (key, name)


@pytest.mark.slow
def test_mistakes_are_said_in_two_lines(unpacked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = trained_there(unpacked, out, 1, "--checkpoint", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: CHECKPOINT is {tmp_path}, expected the folder run/ of an earlier command, with "
        "state.pt in it",
        "hint: give that folder, or leave CHECKPOINT out to begin anew",
    ]
    assert rows(out)[-1]["what"] == "failed"
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "state.pt").touch()
    done = trained_there(unpacked, out, 1, "--checkpoint", earlier)
    assert done.returncode == 1
    assert "state.pt" in done.stderr
    assert not (out / "run").exists()  # or it would be in the way of the next try
    assert trained_there(unpacked, out, -1).stderr.startswith("error: --minutes is -1, expected")
    (out / "run").mkdir()
    done = trained_there(unpacked, out, 1, "--checkpoint", earlier)
    assert f"error: {out / 'run'} exists, expected a new folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_prepared_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "packed.tar.xz"
    monkeypatch.setattr(sys, "argv", ["", "--data", str(tmp_path), "-o", str(archive)])
    assert pack_training.main() == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'train'}: no prepared.json in it" in said
    assert "hint: ulae-rt prepare SCANS" in said
    assert not archive.exists()
