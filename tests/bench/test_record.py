"""A record is read as it was written, and nothing else is taken for one."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import FULL, Case, Measured, Outcome
from harness.record import CaseRecord, Record, all_records, newest


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_it_comes_back_as_it_was(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    record: Record = request.getfixturevalue(name)
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_case_and_what_was_measured_are_put_together() -> None:
    def measure(rounds: int) -> Measured:
        return Measured({"ulae_rt": Outcome(seconds=[1.0] * rounds)}, bytes=12, flops=3.0)

    case = Case("network", "one pair", ("ulae_rt",), measure, FULL, batch=2, series="pairs", x=2.0)
    kept = CaseRecord.of(case, case.measure(3))
    assert kept.id == case.id == "network: one pair, fp32, 2x160x192x160"
    assert kept.contenders["ulae_rt"].seconds == [1.0, 1.0, 1.0]
    assert (kept.bytes, kept.flops, kept.series, kept.x) == (12, 3.0, "pairs", 2.0)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 0}', '{"format": 1}', '{"format": 1, "cases": [{}]}', '"text"'],
)
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is no record of 'pytest --benchmark'"):
        Record.read(path)
    assert all_records(tmp_path) == []


def test_the_newest_of_each_machine(cpu: Record, gpu: Record, tmp_path: Path) -> None:
    later = replace(cpu, started="2026-11-24T00:00:00+00:00", commit="fff")
    for record in (later, cpu, gpu):
        record.write(tmp_path / f"{record.stem}.json")
    assert newest(all_records(tmp_path)) == {"cpu2-xeon": later, "nvidia-h200": gpu}


def test_an_earlier_run_of_the_day_lends_what_this_one_has_not(cpu: Record) -> None:
    first = replace(cpu, cases=cpu.cases[:2], left_out={"kernels": "old", "files": "old"})
    second = replace(cpu, cases=cpu.cases[1:], left_out={"kernels": "new"}, seconds=1.0)
    both = second.with_earlier(first)
    assert [case.id for case in both.cases] == [case.id for case in cpu.cases]
    assert both.left_out == {"kernels": "new"}
    assert both.seconds == cpu.seconds + 1.0
