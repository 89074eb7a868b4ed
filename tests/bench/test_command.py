"""``pytest --benchmark`` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from _support.project import ROOT
from harness.record import Record

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
