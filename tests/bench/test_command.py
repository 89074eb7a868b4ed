"""``pytest --benchmark`` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from _support.project import ROOT
from harness.case import Setting
from harness.record import Record
from suites import kernels

SMALL = ["--benchmark-sizes=small", "--benchmark-min-rounds=2"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_plain_pytest_runs_no_benchmark() -> None:
    done = run("bench", "--collect-only", "-q")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "test_contender" not in done.stdout


def test_a_suite_that_does_not_exist_is_refused() -> None:
    done = run("--benchmark=kernels,nonsense")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark has the suite 'nonsense', expected of network, engines" in done.stderr


def test_a_path_after_the_flag_is_explained() -> None:
    done = run("--benchmark", "bench")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "where a path follows" in done.stderr


def test_its_record_and_pytest_benchmarks_hold_the_same_rounds(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    done = run(
        "--benchmark=kernels", *SMALL, "-k", "compose and not warp", f"--benchmark-json={theirs}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, record, markdown, page, _ = done.stdout.splitlines()
    written = [ROOT / line.removeprefix("written: ") for line in (record, markdown, page)]
    ours = Record.read(written[0])
    assert ours.small
    assert all(path.read_text() for path in written[1:])
    found = {
        (case.id, name): outcome.seconds
        for case in ours.cases
        for name, outcome in case.contenders.items()
    }
    played = json.loads(theirs.read_text())
    assert played["machine_info"]["ulae_rt"]["name"] == ours.machine["name"]
    assert len(played["benchmarks"]) >= 4
    for each in played["benchmarks"]:
        assert each["stats"]["data"] == found[each["group"], each["name"]]
        assert each["stats"]["rounds"] == 2


def test_a_run_that_is_killed_leaves_a_record_of_what_it_had_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "--benchmark=kernels", *SMALL]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "ULAE_RT_EVIDENCE": str(tmp_path)},
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    cases = 0
    while cases < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
        for path in tmp_path.glob("*.json"):
            cases = len(Record.read(path).cases)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    (path,) = tmp_path.glob("*.json")
    record = Record.read(path)
    # Not the whole one that the end of a run writes.
    assert 2 <= len(record.cases) < len(kernels.cases(Setting(True, 2, "cpu")))
    assert all(case.contenders["ulae_rt"].seconds for case in record.cases)


TUNE = """
import os, signal, sys
import tune
tune.torch.cuda.is_available = lambda: True
tune.torch.cuda.get_device_capability = lambda: (9, 0)
tune.machine.facts = lambda: {"name": "gpu"}
jobs = tune.jobs
tune.jobs = lambda grid, device: jobs(grid, "meta")
def measured(kernel, job, tried, rounds):
    if kernel == "diffusion":
        os.kill(os.getpid(), signal.SIGKILL)
    times = [20.0, 10.0]
    return [
        {"tile": config.tile, "warps": config.warps, "dropped": "", "cold": [us], "warm": [us],
         "median_cold": us, "median_warm": us}
        for config, us in zip(tried, times)
    ]
tune.tune = measured
sys.argv = ["tune.py", "compose_forward", "diffusion"]
tune.main()
"""


def test_tuning_that_is_killed_leaves_the_kernels_before(tmp_path: Path) -> None:
    place = f"{ROOT / 'bench'}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": place, "ULAE_RT_EVIDENCE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", TUNE], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [name.split()[0] for name in found["kernels"]] == ["compose_forward"]
    assert "# 2.00 times as fast" in found["proposals"][0]


def test_pytest_benchmarks_own_switch_runs_everything_once() -> None:
    done = run(
        "--benchmark=kernels",
        *SMALL,
        "-k",
        "diffusion and not displacement and not gradient",
        "--benchmark-disable",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
