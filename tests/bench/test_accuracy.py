"""The commands behind the tables of accuracy: what they run, leave out, and say."""

import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import ablation
import accuracy
import pytest
from scipy.stats import wilcoxon

from harness import registering
from harness.record import ROOT
from harness.registering import Evidence
from report.accuracy import newest, section
from ulae_rt.batch import add_arguments
from ulae_rt.batching.results import Row
from ulae_rt.training.config import read_config

PAIRS = 20
COLUMNS = ("cortex", "below_100", "FL", "PL", "OL", "TL", "CL")


def dice_of(method: str, pair: int) -> float:
    """Greedy the best on all pairs but the first, where the network is."""
    base = {"affine-only": 0.4, "syn": 0.5, "greedy": 0.6}.get(method, 0.55)
    slope = {"network": 0.0013, "syn": 0.0012}.get(method, 0.001)
    return base + slope * pair + (0.1 if pair == 0 and method == "network" else 0)


def cases(methods: list[str]) -> str:
    lines = [["method", "id", "dice", "folded_brain_percent", *(f"dice_{c}" for c in COLUMNS)]]
    lines += [
        [method, f"p{n}", *map(str, [dice_of(method, n), 0.25, *[dice_of(method, n) / 2] * 7])]
        for method in methods
        for n in range(PAIRS)
    ]
    return "\n".join(map(",".join, lines)) + "\n"


def finished(pair: int) -> str:
    """Pairs end 2 and 4 seconds after each other in turn; before the last ten lies a night."""
    return f"2026-01-0{1 + pair // 10}T00:00:{3 * pair + pair % 2:02}+00:00"


class Stage:
    """Stands in for the package's commands: each does what it does to the folder."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []
        self.status = 0

    def run(self, line: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        self.lines.append(line[3:])
        entries = dict(x.split("=", 1) for x in line if x.startswith(("output.", "optimiser.")))
        out = Path(entries.get("output.folder") or line[line.index("-o") + 1])
        if line[3] == "ulae_rt.pairs":
            out.write_text("id,moving,fixed\n")
        else:
            out.mkdir(exist_ok=True, parents=True)
        if line[3] == "ulae_rt.prepare":
            (out / "prepared.json").touch()
        if line[3] == "ulae_rt.train":
            (out / "state.pt").touch()
            (out / "log.csv").write_text(f"step,seconds\n1,2\n{entries['optimiser.steps']},1\n")
        if line[3] == "ulae_rt.batch":
            (out / "run.json").touch()
            rows = [Row(f"p{n}", "done", {}, finished=finished(n)) for n in range(PAIRS)]
            (out / "results.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows))
        if line[3] == "ulae_rt.evaluate":
            methods = ["affine-only", *(x.partition("=")[0] for x in line if "=" in x)]
            (out / "cases.csv").write_text(cases(methods))
            (out / "table.md").write_text("tables\n")
        return subprocess.CompletedProcess(line, self.status)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path) -> Stage:
    stage = Stage()
    monkeypatch.setattr(subprocess, "run", stage.run)
    monkeypatch.setattr(registering, "RESULTS", results)
    monkeypatch.setattr(registering, "commit", lambda: ("abc", False))
    monkeypatch.setattr(registering, "facts", lambda: {"title": "Xeon, 2 cores"})
    monkeypatch.setattr(accuracy.readme, "write", lambda path: path.exists())
    monkeypatch.setenv("ULAE_RT_DATA", str(tmp_path))
    return stage


def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--out", str(tmp_path / "out"), *flags])
    return accuracy.main()


def test_every_method_once_then_all_measured_together(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    assert call(monkeypatch, tmp_path) == 0
    commands = [line[0].removeprefix("ulae_rt.") for line in stage.lines]
    assert commands == ["pairs", *["batch"] * len(accuracy.METHODS), "evaluate"]
    assert not any("--resume" in line for line in stage.lines)
    measured = [each.partition("=")[0] for each in stage.lines[-1] if "=" in each]
    assert measured == list(accuracy.METHODS)
    names = sorted(path.name for path in results.iterdir())
    assert [name.rpartition("-")[2] for name in names] == ["abc.csv", "abc.json", "abc.md"]
    assert all(name.startswith("accuracy-20") for name in names)
    evidence = Evidence.read(results / names[1])
    assert dict(evidence.ways) == accuracy.METHODS
    assert list(evidence.seconds) == list(accuracy.METHODS)
    assert set(evidence.seconds.values()) == {56 / 18}


def test_what_was_begun_goes_on_and_what_was_done_keeps_its_seconds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    call(monkeypatch, tmp_path, "--methods", "network")
    (path,) = results.glob("*.json")
    before = Evidence.read(path).seconds["network"]
    stage.lines.clear()
    call(monkeypatch, tmp_path, "--methods", "network,network+10")
    assert [line[0] for line in stage.lines] == ["ulae_rt.batch"] * 2 + ["ulae_rt.evaluate"]
    assert ["--resume" in line for line in stage.lines[:2]] == [True, False]
    assert Evidence.read(path).seconds["network"] == before


def test_a_method_that_there_is_not(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "--methods", "demons")
    assert not stage.lines


def test_an_earlier_record_that_there_is_not_is_refused_before_any_work(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "alone.json").touch()
    for name in ("none.json", "alone.json"):
        with pytest.raises(SystemExit):
            call(monkeypatch, tmp_path, "--earlier", str(tmp_path / name))
        assert "expected a record's .json with its .csv beside it" in capsys.readouterr().err
    assert not stage.lines


def test_a_command_that_fails_ends_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    stage.status = 1
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path)
    assert len(stage.lines) == 1
    assert not list(results.iterdir())


@pytest.mark.parametrize("way", accuracy.METHODS.values(), ids=accuracy.METHODS)
def test_batch_takes_the_flags(way: registering.Way) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    parser.parse_args(shlex.split(f"pairs.csv -o out --outputs warp {shlex.join(way.flags)}"))


def test_the_table_has_a_row_for_each_method_and_its_paired_tests(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    call(monkeypatch, tmp_path, "--methods", "syn,greedy,network")
    (path,) = results.glob("*.json")
    titles, _, *rows = section(path).splitlines()
    assert titles.startswith("| Dice, 20 pairs, 20")
    assert titles.split(" | ")[0].endswith(", abc")
    cells = {row.split("|")[1].strip(): [x.strip() for x in row.split("|")[2:-1]] for row in rows}
    assert [name.split(" (")[0] for name in cells] == ["affine", "ANTs SyN", "greedy", "network"]
    values = [dice_of("network", n) for n in range(PAIRS)]
    differences = [value - dice_of("greedy", n) for n, value in enumerate(values)]
    assert cells["network"][7].endswith(f"({median(values):.3f})")
    assert cells["network"][8:10] == [
        "+0.051, 2e-06", f"{median(differences):+.3f}, {wilcoxon(differences).pvalue:.0e}",
    ]  # fmt: skip
    assert cells["greedy (picsl-greedy 1.4)"][9] == ""
    assert cells["network"][10] == "0.250"
    assert cells["network"][11] == "3.11"
    assert cells["affine"][11] == ""


def test_what_did_not_change_is_carried_over_from_an_earlier_record(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    call(monkeypatch, tmp_path, "--methods", "syn,greedy,network")
    (first,) = results.glob("*.json")
    before = section(first).splitlines()
    monkeypatch.setattr(registering, "commit", lambda: ("def", False))
    out = ("--out", str(tmp_path / "anew"))
    call(monkeypatch, tmp_path, *out, "--methods", "network,network+10", "--earlier", str(first))
    assert len([line for line in stage.lines if line[0] == "ulae_rt.batch"]) == 3 + 2
    (second,) = results.glob("*def.json")
    evidence = Evidence.read(second)
    assert list(evidence.ways) == ["syn", "greedy", "network", "network+10"]
    stem = Evidence.read(first).stem
    assert evidence.carried == {"syn": stem, "greedy": stem}
    after = section(second).splitlines()
    assert after[3] == before[3].replace(" (antspyx 0.5.3) |", f" (antspyx 0.5.3); {stem} |")
    assert [row for row in after if row.startswith("| network |")] == before[5:6]
    # Once more: a row's origin is where it was measured.
    monkeypatch.setattr(registering, "commit", lambda: ("ghi", False))
    call(monkeypatch, tmp_path, *out, "--methods", "network", "--earlier", str(second))
    (third,) = results.glob("*ghi.json")
    carried = {"syn": stem, "greedy": stem, "network+10": evidence.stem}
    assert Evidence.read(third).carried == carried


def test_nothing_is_carried_over_from_other_affine_alignments(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    results: Path,
) -> None:
    call(monkeypatch, tmp_path, "--methods", "syn")
    (first,) = results.glob("*.json")
    table = first.with_suffix(".csv")
    table.write_text(table.read_text().replace("affine-only,p3,", "affine-only,p4,"))
    monkeypatch.setattr(registering, "commit", lambda: ("def", False))
    with pytest.raises(SystemExit, match="its columns, pairs or affine alignments are not those"):
        call(monkeypatch, tmp_path, "--methods", "network", "--earlier", str(first))
    assert not list(results.glob("*def*"))


def test_the_newest_evidence_of_the_most_methods_counts(results: Path) -> None:
    ways = accuracy.METHODS
    full = Evidence("2026-01-01T00:00:00+00:00", "a", False, "Xeon", ways, {}, {})
    partial = replace(full, started="2026-01-03", ways={"network": ways["network"]})
    assert newest("accuracy", results) is None
    newer = replace(full, started="2026-01-02")
    for name, each in {"old": full, "new": newer, "part": partial}.items():
        (results / f"accuracy-{name}.json").write_text(each.to_json())
    found = newest("accuracy", results)
    assert found is not None
    assert found.stem == "accuracy-new"


def test_the_ablation_trains_four_networks_that_differ_by_one_thing_each(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
) -> None:
    flags = ["ablation.py", "--out", str(tmp_path / "out"), "--steps", "7"]
    monkeypatch.setattr(sys, "argv", flags)
    assert ablation.main() == 0
    commands = [line[0].removeprefix("ulae_rt.") for line in stage.lines]
    assert commands == [
        *["prepare"] * 2, *["train"] * 4, "pairs", *["batch"] * 4, "evaluate",
    ]  # fmt: skip
    configs = [
        read_config(ROOT / line[1], line[3::2])
        for line in stage.lines
        if line[0] == "ulae_rt.train"
    ]
    found = [(c.model.accumulate, c.model.uncoupled, c.loss.windows) for c in configs]
    assert found == [
        (False, False, (7,)), (True, False, (7,)), (True, True, (7,)), (True, True, (7, 5)),
    ]  # fmt: skip
    same = {(c.optimiser.model_dump_json(), c.augment.model_dump_json()) for c in configs}
    assert len(same) == 1
    assert configs[0].optimiser.steps == 7
    assert all((c.output.folder / "log.csv").exists() for c in configs)
    (path,) = results.glob("*.json")
    evidence = Evidence.read(path)
    assert str(tmp_path) not in path.read_text()
    assert list(evidence.ways) == list(ablation.STAGES)
    assert evidence.notes["windows"]["steps"] == 7
    assert evidence.notes["windows"]["seconds_a_step"] == 1.5

    stage.lines.clear()
    ablation.main()
    commands = [line[0].removeprefix("ulae_rt.") for line in stage.lines]
    assert commands == [*["train"] * 4, *["batch"] * 4, "evaluate"]
    assert all("--resume" in line for line in stage.lines[:-1])
