"""The quarter of an hour: evidence survives whatever happens, and stages end in their time."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quarter

from _support.project import ROOT
from harness import carried, checkout
from harness.evidence import FILE, Evidence, rows
from report.quarter import page, section

STAGES = """
import os, sys, time
from pathlib import Path
from harness.evidence import Evidence
name, folder = sys.argv[1], Path(sys.argv[2])
evidence = Evidence(folder, name)
evidence.add("first", number=1)
if name == "facts":
    raise SystemExit(3)
if name == "network":
    for folder in "AB":
        (Path(os.environ["TRITON_CACHE_DIR"]) / folder).mkdir(parents=True)
if name == "ops":
    print("it hangs", flush=True)
    time.sleep(600)
evidence.add("last", number=2)
"""


def test_a_row_is_on_the_disk_when_it_is_added(tmp_path: Path) -> None:
    Evidence(tmp_path / "made", "ops").add("warp", error=1e-7, where=Path("x"))
    (row,) = rows(tmp_path / "made")
    assert (row["stage"], row["what"], row["error"], row["where"]) == ("ops", "warp", 1e-7, "x")
    assert rows(tmp_path / "nothing") == []


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path, cut: int) -> None:
    evidence = Evidence(tmp_path, "ops")
    evidence.add("one")
    evidence.add("two")
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-cut])
    evidence.add("three")
    names = [row["what"] for row in rows(tmp_path)]
    assert names in (["one", "three"], ["one", "two", "three"])


ENDLESS = """
import sys
from pathlib import Path
from harness.evidence import Evidence
evidence = Evidence(Path(sys.argv[1]), "ops")
number = int(sys.argv[2])
while True:
    number += 1
    # Longer than what a file buffers, so that a line takes several writes.
    evidence.add("row", number=number, values=[number] * 5000)
"""


def test_rows_outlive_a_kill_at_any_moment(tmp_path: Path) -> None:
    known: list[int] = []
    for delay in (0.0, 0.003, 0.007, 0.011, 0.013):
        last = known[-1] if known else 0
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tmp_path), str(last)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "bench")},
        )
        deadline = time.monotonic() + 60
        while not any(row["number"] > last + 3 for row in rows(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait(30)
        found = rows(tmp_path)
        numbers = [row["number"] for row in found]
        assert numbers[: len(known)] == known
        assert numbers == list(range(1, len(numbers) + 1))
        assert all(row["values"] == [row["number"]] * 5000 for row in found)
        known = numbers


@pytest.mark.parametrize(("call", "most"), [(1, 570), (2, 200)])
def test_the_budgets_fit_into_the_two_commands(call: int, most: int) -> None:
    """With the seconds that it may take to end each of them."""
    stages = [stage for stage in quarter.STAGES if stage.call == call]
    assert sum(stage.seconds + quarter.GRACE_SECONDS for stage in stages) <= most


@pytest.fixture
def fake_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "bench"
    place.mkdir()
    (place / "stages.py").write_text(STAGES)
    monkeypatch.setattr(quarter, "__file__", str(place / "quarter.py"))
    monkeypatch.setattr(quarter, "GRACE_SECONDS", 1)
    monkeypatch.setattr(carried, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench"))
    return tmp_path / "out"


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(
    fake_stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarter, "REHEARSAL_SECONDS", 3)
    monkeypatch.setattr(
        sys, "argv", ["quarter.py", "--out", str(fake_stages), "--small", "--call", "1"]
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert quarter.main() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ends = {row["stage"]: row["how"] for row in rows(fake_stages) if row["what"] == "stage"}
    assert ends["facts"] == "failed, status 3"
    assert ends["ops"] == "out of time"
    assert ends["tests"] == ends["counters"] == "done"
    new = {row["stage"]: row["compiled_anew"] for row in rows(fake_stages) if "how" in row}
    assert (new["network"], new["goals"]) == (2, 0)
    assert "it hangs" in (fake_stages / quarter.LOG).read_text()
    last = [row["stage"] for row in rows(fake_stages) if row["what"] == "last"]
    assert last == ["tests", "network", "goals", "training", "counters"]


KILLED = """
import sys
import quarter
quarter.__file__ = {file!r}
sys.argv = ["quarter.py", "--out", {out!r}, "--small"]
sys.exit(quarter.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killing_it_leaves_what_was_known(fake_stages: Path, number: int) -> None:
    code = KILLED.format(file=quarter.__file__, out=str(fake_stages))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "bench")},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(row["stage"] == "ops" and row["what"] == "first" for row in rows(fake_stages)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    known = [(row["stage"], row["what"]) for row in rows(fake_stages)]
    assert ("facts", "first") in known
    assert ("ops", "first") in known
    for line in (fake_stages / FILE).read_text().splitlines():
        json.loads(line)
    assert process.returncode != 0
    left = subprocess.run(["pkill", "-f", str(fake_stages)], check=False).returncode == 0
    assert left == (number == signal.SIGKILL)  # otherwise the stage went with it


# What the borrowed machine does not have.
BLOCKED = ("nibabel", "SimpleITK", "pydantic", "isal", "tensorrt", "tensorrt_rtx", "onnxruntime",
           "monai", "voxelmorph", "ants", "picsl_greedy")  # fmt: skip
BLOCKER = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n"


@pytest.mark.slow
def test_the_rehearsal_runs_every_stage_without_what_is_missing_there(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    place = f"{tmp_path}:{ROOT / 'bench'}:{ROOT / 'tests'}"
    out = tmp_path / "out"
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = spent.ru_utime + spent.ru_stime
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "quarter.py"), "--out", str(out), "--small"],
        env={**os.environ, "PYTHONPATH": place}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    known = rows(out)
    ends = [(row["stage"], row["how"]) for row in known if row["what"] == "stage"]
    log = (out / quarter.LOG).read_text()
    assert ends == [(stage.name, "done") for stage in quarter.STAGES], log[-3000:]
    # Of processors, so that what else runs does not count; four minutes are asked for.
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime + spent.ru_stime - before < 240
    assert not [row for row in known if row["what"] == "failed" or "failed" in row]
    facts = {row["what"]: row for row in known if row["stage"] == "facts"}
    assert facts["copy"]["bytes_per_second"] > 0
    assert {row["what"] for row in known if row["stage"] == "ops"} >= {"warp", "compose", "stage"}
    assert any(row["what"] == "program, fp32" for row in known)
    assert any(row["what"].startswith("convolution") for row in known)
    timed = [row for row in known if row["stage"] in ("goals", "training") and "contender" in row]
    assert {row["status"] for row in timed if row["contender"].startswith("ulae_rt")} <= {
        "timed", "left out",
    }  # fmt: skip
    (tests,) = (row for row in known if row["what"] == "tests" and row["stage"] == "tests")
    assert tests["passed"] > 10
    assert "failed" not in tests
    shown = page(known)
    for words in (
        "Rehearsal",
        "| warp |",
        "| program, fp32 |",
        "A training step",
        "| goals | done |",
    ):
        assert words in shown
    table = section(known)
    for row in (
        "Network, one pair, fp32 ",
        "Network, one pair, fp32, host to host",
        "Kernel, warp",
    ):
        assert f"| {row}" in table, table


def test_a_place_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    command = [sys.executable, str(ROOT / "bench" / "quarter.py"), "--out", str(place), "--small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: --out {place}: File exists; give a new folder\n"


def test_the_page_of_a_killed_run_says_what_did_not_end(tmp_path: Path) -> None:
    Evidence(tmp_path, "run").add(
        "begun",
        small=False,
        stages=["facts", "ops", "network", "facts"],
        commit="0123abcde",
        dirty=True,
        kernels_carried=128,
    )
    Evidence(tmp_path, "facts").add("machine", title="NVIDIA H200")
    Evidence(tmp_path, "facts").add("copy", bytes_per_second=4e12)
    Evidence(tmp_path, "facts").add("stage", how="done", seconds=9.5, budget=15, compiled_anew=3)
    Evidence(tmp_path, "facts").add("carried kernels", same=False, differ=["triton_key", "ptxas"])
    Evidence(tmp_path, "ops").add(
        "warp", kernel_rms=[1e-7], reference_rms=[2e-7], same_bits_again=False
    )
    values = {"seconds": [5e-5], "median": 5e-5, "bytes": 10**8, "goal": "1.25 x the floor"}
    Evidence(tmp_path, "goals").add("warp", contender="ulae_rt", status="timed", why="", **values)
    shown = page(rows(tmp_path))
    assert "# A quarter of an hour on NVIDIA H200" in shown
    assert "commit 0123abcde, with files changed." in shown
    assert "Rehearsal" not in shown
    assert "| facts | done | 9.5 | 15 | 3 |" in shown
    assert "Kernels carried: 128, **of no use** (triton_key, ptxas)." in shown
    assert "| network | not ended |" in shown
    assert "| facts | not ended |" in shown  # the second time
    assert "| warp | 1.0e-07 | 2.0e-07 | **no** |" in shown
    assert "| warp | ulae_rt | 50.0 µs | 2.00 x | 1.25 x the floor |" in shown
    assert page([]).startswith("# A quarter of an hour on an unknown machine")


def test_a_commit_that_is_none_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(checkout.VARIABLE, "main")
    monkeypatch.setattr(sys, "argv", ["quarter.py", "--out", str(tmp_path / "out")])
    assert quarter.main() == 1
    assert "error: ULAE_RT_COMMIT is 'main', expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
