"""Contenders timed in one run, in turn, and the record that is left of it."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, which each times itself, ``rounds`` times all of them in turn.

    In turn, so that a machine that drifts drifts for all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(run())
    return seconds


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over the rounds of a contender's seconds by the baseline's in the same round."""
    base = seconds[baseline]
    return {
        name: statistics.median(a / b for a, b in zip(values, base, strict=True))
        for name, values in seconds.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # other systems, other processors
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` when files differ from it."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=9"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return run.stdout.strip() or "unknown"


def record(name: str, rows: dict[str, Any], program: str = "pytest") -> Path:
    """Write raw rounds and machine as ``results/<name>-<machine>-<date>-<commit>.json``."""
    facts = machine()
    where = (facts["gpu"] or f"cpu{facts['cores']}").replace(" ", "-").lower()
    today = datetime.date.today().isoformat()
    path = RESULTS / f"{name}-{where}-{today}-{commit()}.json"
    command = " ".join([program, *sys.argv[1:]])
    content = {
        "date": today,
        "commit": commit(),
        "command": command,
        "machine": facts,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(seconds: dict[str, list[float]], baseline: str) -> str:
    """Median, spread and ratio to the baseline, one line a contender."""
    ratio = ratios(seconds, baseline)
    lines = [f"{'':<28}{'median s':>10}{'min':>9}{'max':>9}{'ratio':>8}"]
    for name, values in seconds.items():
        lines.append(
            f"{name:<28}{statistics.median(values):>10.3f}{min(values):>9.3f}{max(values):>9.3f}"
            f"{ratio[name]:>8.2f}"
        )
    return "\n".join(lines)
