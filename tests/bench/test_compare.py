"""What became slower is flagged, noise is not, and what cannot be compared is refused."""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Outcome
from harness.record import ROOT, CaseRecord, Record
from report.compare import compared, counts, differences, main, text

Make = Callable[..., CaseRecord]
Rounds = Callable[..., list[float]]


def timed(record: Record, factors: dict[str, float], drift: float = 1.0) -> Record:
    """The record, timed again: new noise, contenders slower by factors, all by a drift."""
    cases = []
    for case in record.cases:
        contenders = {
            name: replace(
                outcome,
                seconds=[
                    s * drift * factors.get(name, 1.0) * random.uniform(0.99, 1.01)
                    for s in outcome.seconds
                ],
            )
            for name, outcome in case.contenders.items()
        }
        cases.append(replace(case, contenders=contenders))
    return replace(record, cases=cases, started="2026-11-25T00:00:00+00:00", commit="newer")


def verdicts(old: Record, new: Record) -> dict[str, str]:
    return {
        change.contender: change.verdict
        for change in compared(old, new)
        if "one pair" in change.case
    }


def test_noise_is_not_a_change(cpu: Record, gpu: Record) -> None:
    for record in (cpu, gpu):
        changes = compared(record, timed(record, {}))
        assert changes
        assert {change.verdict for change in changes} == {"same"}


def test_a_slower_and_a_faster_contender_are_flagged(cpu: Record) -> None:
    new = timed(cpu, {"ulae_rt bf16": 1.4, "ulae_rt fp32": 0.7})
    assert verdicts(cpu, new) == {"ulae_rt bf16": "slower", "ulae_rt fp32": "faster"}
    change = next(c for c in compared(cpu, new) if c.contender == "ulae_rt bf16")
    assert change.slowdown == pytest.approx(1.4, rel=0.1)
    assert not change.absolute


def test_a_cpu_that_drifts_changed_nothing(cpu: Record) -> None:
    assert counts(compared(cpu, timed(cpu, {}, drift=1.5)))["same"] == len(compared(cpu, cpu))


def test_a_gpu_is_compared_in_seconds(gpu: Record) -> None:
    changes = compared(gpu, timed(gpu, {}, drift=1.5))
    assert all(change.absolute and change.verdict == "slower" for change in changes)


def test_without_a_baseline_it_is_seconds(cpu: Record, make_case: Make, rounds: Rounds) -> None:
    case = make_case("one pair", {"ulae_rt": Outcome(seconds=rounds(1.0))}, baseline="")
    (change,) = compared(replace(cpu, cases=[case]), replace(cpu, cases=[case]))
    assert change.absolute
    assert change.old == change.new


def test_only_the_packages_own_are_compared(cpu: Record) -> None:
    assert "released" not in verdicts(cpu, timed(cpu, {"released": 3.0}))


def test_what_ran_and_does_not_any_more_is_lost(cpu: Record) -> None:
    case = cpu.cases[0]
    broken = {**case.contenders, "ulae_rt bf16": Outcome("wrong", "off by 3 voxel"),
              "ulae_rt fp32": Outcome("left out", "not installed")}  # fmt: skip
    new = replace(cpu, cases=[replace(case, contenders=broken)])
    assert verdicts(cpu, new) == {"ulae_rt bf16": "lost"}
    assert "wrong: off by 3 voxel" in text(cpu, new, compared(cpu, new))
    # The other way round it is no change: there was nothing to be slower than.
    assert verdicts(new, cpu) == {}


def test_another_machine_is_refused(cpu: Record, gpu: Record) -> None:
    with pytest.raises(
        ValueError, match=r"two machines .* expected 'cpu2-xeon', .* got 'nvidia-h200'; run both"
    ):
        compared(cpu, gpu)


def test_a_small_run_is_refused(cpu: Record) -> None:
    with pytest.raises(ValueError, match=r"the old record is of a small run"):
        compared(replace(cpu, small=True), cpu)


def test_what_else_changed_is_said(cpu: Record) -> None:
    new = replace(
        cpu, versions={**cpu.versions, "torch": "2.14.0", "monai": "1.5"}, cases=cpu.cases[1:],
        machine={**cpu.machine, "cores": 4},
    )  # fmt: skip
    assert differences(cpu, new) == [
        "torch 2.13.0 → 2.14.0",
        "monai not installed → 1.5",
        "cores 2 → 4",
        "1 case only in the old record",
    ]
    assert differences(cpu, cpu) == []


def test_the_command(cpu: Record, gpu: Record, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("old", "same", "slow", "other")}
    slower = timed(cpu, {"ulae_rt bf16": 1.5})
    for path, record in zip(paths.values(), (cpu, timed(cpu, {}), slower, gpu), strict=True):
        record.write(path)
    old = str(paths["old"])
    assert main([old, str(paths["same"])]) == 0
    assert main([old, str(paths["slow"])]) == 1
    assert main([old, str(paths["other"])]) == 2
    assert main([old]) == 2


def test_the_command_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert main([str(other), str(other)]) == 2
    assert "is no record" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json"), str(other)]) == 2
    assert "none.json" in capsys.readouterr().err


def test_it_runs_from_anywhere(cpu: Record, tmp_path: Path) -> None:
    for name in ("old", "new"):
        cpu.write(tmp_path / f"{name}.json")
    script = str(ROOT / "bench" / "report" / "compare.py")
    done = subprocess.run(
        [sys.executable, "-P", script, "old.json", "new.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 lost, 0 slower, 0 faster" in done.stdout
