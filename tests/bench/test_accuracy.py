"""The one command behind the table of accuracy: what it runs, and what it leaves out."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import accuracy
import pytest

from ulae_rt.batch import add_arguments


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that were run, each of which did what it does to the folder."""
    lines: list[list[str]] = []

    def run(line: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        lines.append(line[3:])
        if line[3] == "ulae_rt.pairs":
            Path(line[line.index("-o") + 1]).write_text("id,moving,fixed\n")
        out = Path(line[line.index("-o") + 1])
        if line[3] != "ulae_rt.pairs":
            out.mkdir(exist_ok=True)
            (out / "run.json").touch()
        if line[3] == "ulae_rt.evaluate":
            for name in ("cases.csv", "table.md"):
                (out / name).write_text(name)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(accuracy, "commit", lambda: ("abc", False))
    monkeypatch.setenv("ULAE_RT_DATA", str(tmp_path))
    (tmp_path / "results").mkdir()
    return lines


def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--out", str(tmp_path / "out"), *flags])
    return accuracy.main()


def test_every_method_once_then_all_measured_together(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(monkeypatch, tmp_path) == 0
    commands = [line[0].removeprefix("ulae_rt.") for line in ran]
    assert commands == ["pairs", *["batch"] * len(accuracy.METHODS), "evaluate"]
    assert not any("--resume" in line for line in ran)
    assert [each.partition("=")[0] for each in ran[-1] if "=" in each] == list(accuracy.METHODS)
    results = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert [name.rpartition("-")[2] for name in results] == ["abc.csv", "abc.md"]
    assert all(name.startswith("accuracy-oasis-val-20") for name in results)


def test_what_was_begun_goes_on(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, tmp_path, "--methods", "network")
    ran.clear()
    call(monkeypatch, tmp_path, "--methods", "network,network+10")
    assert [line[0] for line in ran] == ["ulae_rt.batch", "ulae_rt.batch", "ulae_rt.evaluate"]
    assert ["--resume" in line for line in ran[:2]] == [True, False]


def test_a_method_that_there_is_not(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "--methods", "demons")
    assert not ran


@pytest.mark.parametrize("flags", accuracy.METHODS.values(), ids=accuracy.METHODS)
def test_batch_takes_the_flags(flags: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    parser.parse_args(shlex.split(f"pairs.csv -o out --outputs warp {shlex.join(flags)}"))
