"""`ulae-rt register` as a user runs it: a process from files to files, stage by stage."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timing

pytest.importorskip("nibabel", reason="reads NIfTI files")

SAMPLES = timing.ROOT / "samples"
MOVING, FIXED = SAMPLES / "colin27_brain.nii.gz", SAMPLES / "mni152_2009a_brain.nii.gz"
# A process starts with the peak of the one that forked it, so a small one has to.
PEAK_OF_CHILD = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)
CALLS = 50
CASES = {
    "affine none": ["--affine", "none"],
    "affine": ["--affine", "affine"],
}


def run(arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each stage, of the whole process, and its peak memory in GB."""
    command = [
        sys.executable, "-m", "ulae_rt.register", "-m", str(MOVING), "-f", str(FIXED),
        "-o", str(folder / "moved.nii.gz"), "-w", str(folder / "warp.nii.gz"),
        "--overwrite", "--json", *arguments,
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_CHILD, *command], capture_output=True, text=True, check=True
    )
    output, peak_kb = done.stdout.strip().splitlines()
    seconds: dict[str, float] = json.loads(output)["seconds"]
    return {
        **seconds,
        "all but network and affine": sum(seconds.values())
        - sum(seconds.get(k, 0.0) for k in ("network", "affine", "load")),
        "process": time.perf_counter() - started,
        "peak GB": int(peak_kb) / 1e6,
    }


def test_register(
    full: bool, rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in CASES}
    for _ in range(rounds):
        for name, arguments in CASES.items():
            for key, value in run(arguments, tmp_path).items():
                rows[name].setdefault(key, []).append(value)
    if full:
        timing.record("register", rows)
    with capsys.disabled():
        print("\nregister, Colin27 to ICBM 2009a, moved image and warp written")
        for name, row in rows.items():
            medians = ", ".join(f"{k} {statistics.median(v):.2f}" for k, v in row.items())
            print(f"{name:<14}{medians}")


def test_warm_registrar(full: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Registrar that a program keeps: opening, first call, and every further call."""
    pytest.importorskip("safetensors", reason="reads weights")
    from ulae_rt import Registrar
    from ulae_rt.allocator import keep_freed_memory

    keep_freed_memory()
    calls = CALLS if full else 1
    started = time.perf_counter()
    registrar = Registrar(device="cpu", precision="auto")
    seconds = [time.perf_counter() - started]
    for _ in range(1 + calls):
        started = time.perf_counter()
        registrar(MOVING, FIXED)
        seconds.append(time.perf_counter() - started)
    opening, first, *steady = seconds
    if full:
        timing.record("registrar", {"opening": opening, "first": first, "steady": steady})
    steady.sort()
    ranks = {
        f"p{p}": steady[min(len(steady) - 1, round(p / 100 * len(steady)))] for p in (50, 95, 99)
    }
    with capsys.disabled():
        print(f"\nRegistrar, {registrar.description}, affine included, nothing written")
        print(f"opening {opening:.2f} s, first call {first:.2f} s, then of {len(steady)} calls")
        print(", ".join(f"{name} {value:.2f} s" for name, value in ranks.items()))


def test_import(full: bool, rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import time; s = time.perf_counter(); import ulae_rt; print(time.perf_counter() - s)"
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        )
        for _ in range(rounds)
    ]
    if full:
        timing.record("import", {"import ulae_rt": seconds})
    with capsys.disabled():
        print(f"\nimport ulae_rt: {statistics.median(seconds) * 1e3:.1f} ms")
