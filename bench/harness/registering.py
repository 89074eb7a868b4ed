"""The package's own commands one after the other, from scans to a table kept as evidence."""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from harness.machine import commit, facts
from harness.record import RESULTS, ROOT
from ulae_rt import env
from ulae_rt.batching.results import read_results
from ulae_rt.errors import UlaeError


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
        seconds: a pair's share of the whole of `batch`, by the same name.
        notes: of each, what else is worth keeping.
    """

    started: str
    commit: str
    dirty: bool
    machine: str
    ways: Mapping[str, Way]
    seconds: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]]

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
    """The folder with the scans; ends the program where none is named."""
    found = env.data_dir()
    if found is None:
        parser.error("ULAE_RT_DATA is not set: give it the folder that has oasis/train and val")
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
        out: for the list, the folders, and the seconds that a pair of each took.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = out / "pairs.csv"
    if not pairs.exists():
        ulae_rt("pairs", scans, "-o", pairs, "--protocol", "oasis")
    for name, way in ways.items():
        folder = out / name
        begun = ["--resume"] if (folder / "run.json").exists() else []
        before, start = _done(folder), time.perf_counter()
        ulae_rt("batch", pairs, "-o", folder, "--outputs", "warp", *way.flags, *begun)
        elapsed, after = time.perf_counter() - start, _done(folder)
        if after > before:
            _write(_seconds(out, name), json.dumps(elapsed / (after - before)))


def measure(
    kind: str,
    ways: Mapping[str, Way],
    out: Path,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Evidence:
    """Measure what `register` left in ``out`` together, and keep it as ``results/KIND-*``.

    A ``.csv`` by pair, the tables as ``.md``, and the rest as ``.json``.
    """
    report = out / "report"
    folders = [f"{name}={out / name}" for name in ways]
    ulae_rt("evaluate", *folders, "-o", report, "--protocol", "oasis", "--overwrite")
    came_from, dirty = commit()
    seconds = {
        name: float(file.read_text(encoding="utf-8"))
        for name in ways
        if (file := _seconds(out, name)).exists()
    }
    evidence = Evidence(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        came_from,
        dirty,
        facts()["title"],
        ways,
        seconds,
        notes or {},
    )
    stem = RESULTS / f"{kind}-{evidence.stem}"
    _write(stem.with_name(f"{stem.name}.json"), evidence.to_json())
    for file, suffix in (("cases.csv", "csv"), ("table.md", "md")):
        shutil.copyfile(report / file, stem.with_name(f"{stem.name}.{suffix}"))
    for suffix in ("json", "csv", "md"):
        print(f"written: {stem}.{suffix}")
    return evidence


def _seconds(out: Path, name: str) -> Path:
    return out / f"{name}-seconds.json"


def _done(folder: Path) -> int:
    with contextlib.suppress(UlaeError):  # nothing in it yet
        return sum(row.status == "done" for row in read_results(folder))
    return 0


def _write(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.part")
    hidden.write_text(text, encoding="utf-8")
    os.replace(hidden, path)
