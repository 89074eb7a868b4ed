"""torchrun with two processes over gloo: the same training as one process, and no hang when not."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from _support.tolerances import TOL, assert_close
from ulae_rt import cli
from ulae_rt.model.checkpoint import read_torch
from ulae_rt.training import loop
from ulae_rt.training.config import read_config
from ulae_rt.training.data import PairDataset, find_scans

PATIENCE = 240

# What a process under torchrun runs: the command, with something broken first.
SCRIPT = """
import sys
import numpy as np
import torch.distributed as dist
from ulae_rt.cli import run_command
from ulae_rt.errors import ConfigError
from ulae_rt.training import loop
from ulae_rt.training.data import PairDataset

loop._LOG_EVERY = 1
original = PairDataset.__getitem__

def broken(self, index):
    pair = original(self, index)
    {broken}
    return pair

PairDataset.__getitem__ = broken
sys.exit(run_command("train"))
"""


def write_config(folder: Path, scans: Path, steps: int, run: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "c.toml"
    path.write_text(
        f"""
[data]
train = "{scans}"
pool = 4
[output]
folder = "run"
[model]
channels = 2
[loss]
windows = [5, 3]
[augment]
flip = 0.5
intensity = 0.1
[optimiser]
steps = {steps}
lr = 1e-3
batch = 2
[run]
device = "cpu"
{run}
"""
    )
    return path


def start(config: Path, *arguments: str, broken: str | None = None) -> subprocess.Popen[str]:
    """Two processes on this machine: of the script, or of the command as a user starts it."""
    if broken is None:
        target = ["-m", "ulae_rt.train"]
    else:
        script = config.with_name("script.py")
        script.write_text(SCRIPT.format(broken=broken))
        target = [str(script)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port),
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *launcher, *target, str(config), *arguments],
        cwd=config.parent,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launched: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = launched.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        launched.kill()
        out, err = launched.communicate()
        pytest.fail(f"still running after {PATIENCE} s:\n{out}\n{err}")
    return launched.returncode, out, err


def losses(config: Path) -> torch.Tensor:
    """(steps, 4) as logged."""
    with (config.parent / "run" / loop.LOG_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("loss", "similarity", "smoothness", "folding")
    return torch.tensor([[float(row[c]) for c in columns] for row in rows], dtype=torch.float64)


def trained_alone(config: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> torch.Tensor:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    assert cli.main(["train", str(config), *arguments]) == 0
    return losses(config)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_micro_batch(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = write_config(tmp_path / "alone", scans, 4, "micro_batch = 2")
    together = write_config(tmp_path / "together", scans, 4)
    expected = trained_alone(alone, monkeypatch)
    status, out, err = finish(start(together, "--json", broken=""))
    assert status == 0, err
    assert out.count('{"step": 4') == 1
    found = losses(together)
    assert found.shape == expected.shape == (4, 4)
    assert float((expected[0] - expected[-1]).abs().max()) > 1e-3
    assert_close("losses", found, expected, TOL["losses of 4 steps"])


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = write_config(tmp_path / "alone", scans, 4)
    halves = write_config(tmp_path / "halves", scans, 2)
    expected = trained_alone(alone, monkeypatch)
    status, out, err = finish(start(halves))
    assert status == 0, err
    assert len(re.findall(r"step 0 to 2 on cpu and 1 more", out)) == 1
    write_config(tmp_path / "halves", scans, 4)
    found = trained_alone(halves, monkeypatch, "--resume")
    assert_close("losses", found[-2:], expected[-2:], TOL["losses of 4 steps"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_both(scans: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, scans, 1000)
    # Of step 1: its second pair, which the second process has.
    status, _, err = finish(start(config, broken="pair.moving.mul_(np.nan if index == 3 else 1)"))
    assert status == 1
    name = PairDataset(find_scans(scans), 0, 4, read_config(config).augment)[3].name
    assert err.count("error: ") == err.count(f"error: step 1: the loss of {name} is nan\n") == 1
    assert read_torch(tmp_path / "run" / loop.STATE_FILE)["step"] == 1


@pytest.mark.slow
def test_an_error_in_one_process_stops_both(scans: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, scans, 1000)
    raising = 'if dist.get_rank() == 1 and index > 4: raise ConfigError("no such scan", "find it")'
    status, _, err = finish(start(config, broken=raising))
    assert status == 1
    assert "error: no such scan\nhint: find it\n" in err


@pytest.mark.slow
def test_a_signal_stops_both(scans: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, scans, 100_000)
    launched = start(config, broken="")
    log = tmp_path / "run" / loop.LOG_FILE
    deadline = time.monotonic() + PATIENCE
    while not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        assert launched.poll() is None
        time.sleep(0.1)
    launched.send_signal(signal.SIGTERM)
    status, _, err = finish(launched)
    assert status != 0
    assert err.count("error: ") == err.count("error: interrupted; nothing half-written") == 1


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_out_is_refused(scans: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, scans, 4, "micro_batch = 2")
    status, _, err = finish(start(config))
    assert status == 1
    assert "optimiser.batch is 2, expected a multiple of 4: 2 process(es)" in err
    assert not (tmp_path / "run").exists()
