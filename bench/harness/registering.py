"""The package's own commands one after the other, from scans to a table kept as evidence."""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from harness.checkout import commit
from harness.files import write_whole
from harness.machine import facts
from harness.record import RESULTS, ROOT
from ulae_rt import env
from ulae_rt.batching.results import read_results

# What is so many times the median between two pairs was a pause.
PAUSE = 5
# What evaluate calls the affine alone, which no method's own settings change.
AFFINE = "affine-only"


@dataclass(frozen=True)
class Way:
    """A way to register.

    Attributes:
        title: for people.
        flags: that `batch` is given; paths are relative to the checkout.
    """

    title: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What was run, beside the cases that came of it.

    Attributes:
        started: UTC, ISO 8601, when the cases were measured.
        commit, dirty: of the checkout.
        machine: for people.
        ways: by the name that the cases have.
        seconds: from one pair's end to the next in `batch`, mean, by the same name.
        notes: of each, what else is worth keeping.
        carried: those whose cases and seconds are an earlier record's, by name that one's stem.
    """

    started: str
    commit: str
    dirty: bool
    machine: str
    ways: Mapping[str, Way]
    seconds: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]]
    carried: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """What names its files."""
        return f"{self.started[:10]}-{self.commit}{'-dirty' * self.dirty}"

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """From one of its files."""
        values = json.loads(path.read_text(encoding="utf-8"))
        ways = {
            name: Way(way["title"], tuple(way["flags"])) for name, way in values.pop("ways").items()
        }
        return cls(ways=ways, **values)


def data_dir(parser: argparse.ArgumentParser) -> Path:
    """The folder with the scans; ends the program where none is named, or no commit is."""
    found = env.data_dir()
    if found is None:
        parser.error("ULAE_RT_DATA is not set: give it the folder that has oasis/train and val")
    try:
        commit()
    except ValueError as error:  # now, and not after the hours in which all is registered
        parser.error(str(error))
    return Path(found)


def ulae_rt(command: str, *arguments: object) -> None:
    """Run one of the package's commands in the checkout, and stop with it if it fails."""
    line = [sys.executable, "-P", "-m", f"ulae_rt.{command}", *map(str, arguments)]
    print("$", *line[3:], flush=True)
    status = subprocess.run(line, cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


def register(ways: Mapping[str, Way], scans: Path, out: Path) -> None:
    """Register all ordered pairs of OASIS scans by every way; what was begun goes on.

    Args:
        ways: by the name of the folder in ``out``.
        scans: their folder.
        out: for the list and the folders.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = out / "pairs.csv"
    if not pairs.exists():
        ulae_rt("pairs", scans, "-o", pairs, "--protocol", "oasis")
    for name, way in ways.items():
        folder = out / name
        begun = ["--resume"] if (folder / "run.json").exists() else []
        flags = ["--outputs", "warp", "--pictures", "0", *way.flags]
        ulae_rt("batch", pairs, "-o", folder, *flags, *begun)


def measure(
    kind: str,
    ways: Mapping[str, Way],
    out: Path,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    earlier: Path | None = None,
) -> Evidence:
    """Measure what `register` left in ``out`` together, and keep it as ``results/KIND-*``.

    A ``.csv`` by pair, the tables as ``.md``, and the rest as ``.json``.

    Args:
        kind: first part of the files' names.
        ways: by the name of the folder in ``out``.
        out: where the folders are.
        notes: of each way, what else is worth keeping.
        earlier: a record's ``.json``; what it has and ``ways`` has not is carried over from it.
    """
    report = out / "report"
    folders = [f"{name}={out / name}" for name in ways]
    ulae_rt("evaluate", *folders, "-o", report, "--protocol", "oasis", "--overwrite")
    came_from, dirty = commit()
    seconds = {name: _seconds(out / name) for name in ways}
    evidence = Evidence(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        came_from,
        dirty,
        facts()["title"],
        ways,
        seconds,
        notes or {},
    )
    cases = (report / "cases.csv").read_text(encoding="utf-8")
    if earlier is not None:
        evidence, cases = _with_earlier(evidence, cases, earlier)
    stem = RESULTS / f"{kind}-{evidence.stem}"
    write_whole(stem.with_name(f"{stem.name}.json"), evidence.to_json())
    write_whole(stem.with_name(f"{stem.name}.csv"), cases)
    shutil.copyfile(report / "table.md", stem.with_name(f"{stem.name}.md"))
    for suffix in ("json", "csv", "md"):
        print(f"written: {stem}.{suffix}")
    return evidence


def _with_earlier(evidence: Evidence, cases: str, earlier: Path) -> tuple[Evidence, str]:
    """Add the ways of an earlier record that this one lacks, with their cases and seconds.

    Ends the program where the affine alone does not give the same in both: then the pairs, the
    alignments or the measures are others.
    """
    before = Evidence.read(earlier)
    rows = {
        "now": cases.splitlines(keepends=True),
        "before": earlier.with_suffix(".csv").read_text(encoding="utf-8").splitlines(keepends=True),
    }
    affine = {name: sorted(_of(lines, AFFINE)) for name, lines in rows.items()}
    if rows["now"][0] != rows["before"][0] or affine["now"] != affine["before"]:
        raise SystemExit(
            f"error: {earlier.name}: its columns, pairs or affine alignments are not those of now\n"
            "hint: run all methods anew, without --earlier"
        )
    carried = [name for name in before.ways if name not in evidence.ways]
    evidence = replace(
        evidence,
        ways={**before.ways, **evidence.ways},
        seconds={**before.seconds, **evidence.seconds},
        carried={name: before.carried.get(name, before.stem) for name in carried},
    )
    return evidence, cases + "".join(line for name in carried for line in _of(rows["before"], name))


def _of(lines: list[str], method: str) -> list[str]:
    return [line for line in lines if line.startswith(f"{method},")]


def _seconds(folder: Path) -> float:
    """From one pair's end to the next, mean; where a run was stopped and went on, that is left out.

    While one pair is read, aligned or written, the network may work on another.
    """
    ends = sorted(datetime.datetime.fromisoformat(row.finished) for row in read_results(folder))
    gaps = [(after - before).total_seconds() for before, after in pairwise(ends)]
    return fmean(gap for gap in gaps if gap <= PAUSE * median(gaps))
