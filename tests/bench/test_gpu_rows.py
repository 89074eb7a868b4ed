"""The README's rows of a GPU: from the newest committed evidence, or that there is none."""

import sys
from pathlib import Path
from typing import Any

import pytest

from _support.project import ROOT
from harness.evidence import Evidence, read, rows
from report import quarter


def timed(contender: str, median: float | None, **values: Any) -> dict[str, Any]:
    status = "timed" if median else "failed"
    return {
        "contender": contender, "status": status, "why": "", "median": median,
        "seconds": [median] if median else [], "gpu_peak_gb": None, **values,
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """What two commands on a GPU left; the second measured a kernel again."""
    first, second = tmp_path / "first", tmp_path / "second"
    Evidence(first, "run").add(
        "begun", small=False, stages=[], commit="0123abcde", dirty=False, kernels_carried=128
    )
    Evidence(first, "facts").add("machine", name="nvidia-h200", title="NVIDIA H200", gpu="H200")
    Evidence(first, "facts").add("copy", bytes_per_second=4e12)
    network = Evidence(first, "network")
    off = {"how": "graph", "voxels_off_mean": 0.01, "voxels_off_largest": 0.1, "right": True}
    network.add("eager, fp16", median=0.012, seconds=[0.012], **off)
    network.add("program, fp16", median=0.004, seconds=[0.004], **off)
    network.add("host to host, fp16", median=0.03, seconds=[0.03], **off)
    wrong = {**off, "voxels_off_mean": 3.0, "right": False}
    network.add("program, bf16", median=0.001, seconds=[0.001], **wrong)
    training = Evidence(first, "training")
    training.add("one pair", **timed("released", 0.2, gpu_peak_gb=40.0))
    training.add("one pair", **timed("ulae_rt bf16", 0.025, gpu_peak_gb=9.5))
    training.add("one pair", **timed("ulae_rt bf16, graph", None))
    for folder, median in ((first, 6e-5), (second, 5e-5)):
        goals = Evidence(folder, "goals")
        values = {"bytes": 10**8, "goal": "1.25 x the floor"}
        goals.add("warp", **timed("ulae_rt", median, **values))
        goals.add("warp", **timed("released", 4e-4, **values))
        goals.add("lncc", **timed("ulae_rt", 4e-4, bytes=10**8, goal="450 us"))
    Evidence(second, "run").add(
        "begun", small=False, stages=[], commit="0123abcde", dirty=False, kernels_carried=128
    )
    return [first, second]


def test_rows_of_the_network_the_goals_and_training(folders: list[Path]) -> None:
    known = [row for folder in folders for row in rows(folder)]
    date = known[0]["at"][:10]
    assert quarter.section(known).splitlines() == [
        f"**NVIDIA H200**, {date}, 0123abcde:",
        "",
        "| | median | goal | beside | peak memory |",
        "|---|---|---|---|---|",
        "| Network, one pair, fp16 | 4.00 ms | 3 ms | 3.0× eager (12.0 ms) | - |",
        "| Network, one pair, fp16, host to host | 30.0 ms | - | 0.40× eager (12.0 ms) | - |",
        "| Network, one pair, bf16 | wrong: 3 voxel off in the mean | - | - | - |",
        "| Kernel, warp | 50.0 µs | 2.00 x, asked for 1.25 x the floor | 8.0× released (400 µs) "
        "| - |",
        "| Kernel, lncc | 400 µs | 450 us | - | - |",
        "| Training step, one pair: ulae_rt bf16 | 25.0 ms | - | 8.0× released (200 ms) "
        "| 9.50 GB |",
    ]


def test_evidence_of_no_commit_is_not_kept(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folders[0] / "evidence.jsonl"
    file.write_text(file.read_text().replace("0123abcde", "unknown"))
    results = folders[0] / "results"
    assert run(monkeypatch, folders[0], "--commit-to", results) == 1
    assert "error: the evidence does not say its commit" in capsys.readouterr().err
    assert not results.exists()


def test_no_row_names_where_the_files_lay(tmp_path: Path) -> None:
    Evidence(tmp_path, "tests").add("failed test", why=f"{ROOT}/tests/kernels/test_warp.py:3")
    assert rows(tmp_path)[0]["why"] == "./tests/kernels/test_warp.py:3"


def test_without_evidence_it_says_so(tmp_path: Path) -> None:
    assert quarter.newest(tmp_path) == []
    assert quarter.section([]) == "No GPU figure exists yet."


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["quarter.py", *map(str, arguments)])
    return quarter.main()


def test_evidence_is_kept_under_a_name_of_its_own_and_the_newest_is_shown(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    assert run(monkeypatch, *folders, "--commit-to", results) == 0
    date = rows(folders[0])[0]["at"][:10]
    stem = f"quarter-nvidia-h200-{date}-0123abcde"
    assert sorted(path.name for path in results.iterdir()) == [f"{stem}.jsonl", f"{stem}.md"]
    kept = list(read(results / f"{stem}.jsonl"))
    assert kept == [row for folder in folders for row in rows(folder)]
    assert "# A quarter of an hour on NVIDIA H200" in (results / f"{stem}.md").read_text()
    (results / "quarter-nvidia-h200-2020-01-01-fff.jsonl").write_text(
        '{"stage": "run", "what": "begun", "at": "2020-01-01", "commit": "f", "small": false}\n'
    )
    assert quarter.newest(results) == kept


@pytest.mark.parametrize("what", ["small", "no GPU", "nothing"])
def test_a_rehearsal_is_no_evidence_of_a_gpu(
    what: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "rehearsal"
    if what != "nothing":
        Evidence(folder, "run").add(
            "begun", small=what == "small", stages=[], commit="0123abcde", dirty=False
        )
        gpu = "H200" if what == "small" else None
        Evidence(folder, "facts").add("machine", name="x", title="X", gpu=gpu)
    assert run(monkeypatch, folder, "--commit-to", tmp_path) == 1
    said = capsys.readouterr().err
    expected = "no evidence.jsonl with a row" if what == "nothing" else "is a rehearsal's or of no"
    assert expected in said
    assert not list(tmp_path.glob("quarter-*"))
