"""Many pairs, files to files: against reading, resampling and writing them one after the other.

Each run is a process of its own, as a user starts one: ``python bench_batch.py CONTENDER FOLDER
PAIRS``. The stand-in network costs nothing, so that all that is timed is what stands around one.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timing
from numpy.typing import NDArray

pytest.importorskip("nibabel", reason="reads NIfTI files")

SAMPLES = timing.ROOT / "samples"
MOVING, FIXED = SAMPLES / "colin27_brain.nii.gz", SAMPLES / "mni152_2009a_brain.nii.gz"
SHAPE = (160, 192, 160)
REACH = 3.0  # voxels of the stand-in's displacement
# A process starts with the peak of the one that forked it, so a small one has to.
PEAK_OF_CHILD = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def displacement() -> NDArray[np.float32]:
    """What the stand-in finds: a slow wave, (3, D, H, W) voxels."""
    waves = [np.sin(np.linspace(0, 2 * np.pi, n, dtype=np.float32)) for n in SHAPE]
    wave = waves[0][:, None, None] * waves[1][:, None] * waves[2]
    return np.stack([REACH * wave] * 3)


def plain(folder: Path, count: int) -> None:
    """As most people's own script does it, with nibabel and scipy."""
    import nibabel as nib
    from nibabel.processing import resample_from_to
    from scipy.ndimage import map_coordinates

    disp = displacement()
    for number in range(count):
        moving, fixed = nib.load(MOVING), nib.load(FIXED)
        centre = fixed.affine @ [*(n / 2 for n in fixed.shape), 1.0]
        affine = np.eye(4)
        affine[:3, 3] = centre[:3] - np.array(SHAPE) / 2
        for scan in (moving, fixed):  # what a network would be given
            image = resample_from_to(scan, (SHAPE, affine), order=1).get_fdata()
            image /= np.percentile(image[image > 0], 99.9)
        # The displacement on the fixed image's own voxels, then through it.
        index = np.indices(fixed.shape).reshape(3, -1).astype(np.float32)
        to_grid = np.linalg.inv(affine) @ fixed.affine
        at = to_grid[:3, :3] @ index + to_grid[:3, 3:]
        field = np.stack([map_coordinates(c, at, order=1, mode="nearest") for c in disp])
        world = fixed.affine[:3, :3] @ index + fixed.affine[:3, 3:] + field
        back = np.linalg.inv(moving.affine)
        source = back[:3, :3] @ world + back[:3, 3:]
        moved = map_coordinates(moving.get_fdata(), source, order=1).reshape(fixed.shape)
        field = field.reshape(3, *fixed.shape)
        m = [list(np.gradient(component)) for component in field]
        for axis in range(3):
            m[axis][axis] += 1
        jacobian = m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        jacobian -= m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        jacobian += m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        (jacobian <= 0).mean()
        for name, values in (("moved", moved), ("warp", np.moveaxis(field, 0, -1))):
            image = nib.Nifti1Image(values.astype(np.float32), fixed.affine)
            nib.save(image, folder / f"{name}{number}.nii.gz")


class StandIn:
    """A network that costs nothing."""

    description = "stand-in"
    precision = "fp32"
    weights_sha256 = "0" * 64
    batch = at_once = 1

    class metadata:  # noqa: N801 - a field of every network
        """Of a network at 1 mm."""

        shape = SHAPE
        spacing_mm = 1.0
        normalisation = "p99.9"

    def __init__(self) -> None:
        self._disp = displacement()[None]

    def run(self, moving: Any, fixed: Any) -> Any:
        """Always the same."""
        from ulae_rt.engines import EngineOutput

        return EngineOutput(moving, self._disp)


def batch(folder: Path, count: int, network: Any = None, affine: str = "none") -> Any:
    """As ``ulae-rt batch`` does it; returns how its network was used."""
    import SimpleITK as sitk

    from ulae_rt.allocator import keep_freed_memory
    from ulae_rt.batching.pairs import Pair
    from ulae_rt.batching.pipeline import Pipeline, Wanted, processors
    from ulae_rt.batching.results import ResultsFolder
    from ulae_rt.registrar import Registrar

    keep_freed_memory()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    registrar = Registrar(network or StandIn(), affine=affine)
    pairs = []
    for number in range(count):  # paths of its own, so that no pair profits from another's scan
        scans = folder / f"moving{number}.nii.gz", folder / f"fixed{number}.nii.gz"
        for place, scan in zip(scans, (MOVING, FIXED), strict=True):
            place.symlink_to(scan)
        pairs.append(Pair(f"p{number}", *scans))
    with ResultsFolder(folder / "out", None, {}) as results:
        results.begin(pairs, resume=False)
        pipeline = Pipeline(
            registrar, results, Wanted(("moved", "warp")), workers=processors(), batch_size=1
        )
        for row in pipeline.run(pairs, threading.Event()):
            assert row.status == "done", row.error
            results.add(row)
    return pipeline.usage


def sequential(folder: Path, count: int) -> None:
    """As a loop over ``Registrar`` does it."""
    from ulae_rt.registrar import Registrar

    registrar = Registrar(StandIn(), affine="none")
    for number in range(count):
        files = [folder / f"{name}{number}.nii.gz" for name in ("moved", "warp")]
        registrar(MOVING, FIXED).save(*files)


def real(folder: Path, count: int, affine: str) -> dict[str, float]:
    """``ulae-rt batch`` with random weights at 1 mm on the CPU: how much the network waited."""
    from ulae_rt.model import UlaeNet, load_model
    from ulae_rt.model.checkpoint import save_checkpoint
    from ulae_rt.network import load_network

    shipped = load_model(None).metadata
    model = UlaeNet(shipped.variant)
    weights = folder / "random.safetensors"
    save_checkpoint(weights, model, dataclasses.replace(shipped, shape=SHAPE, spacing_mm=1.0))
    usage = batch(folder, count, load_network(weights, device="cpu"), affine)
    return {"busy": usage.busy, "idle": usage.idle}


CONTENDERS = {"nibabel, one by one": plain, "Registrar, one by one": sequential, "batch": batch}


def seconds_and_peak(name: str, folder: Path, count: int) -> tuple[float, float]:
    """Of a whole process, the time for its imports left out; peak memory in GB."""
    folder.mkdir()
    command = [sys.executable, __file__, name, str(folder), str(count)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_CHILD, *command], capture_output=True, text=True, check=True
    )
    *_, seconds, peak_kb = done.stdout.split()
    return float(seconds), int(peak_kb) / 1e6


def test_batch(full: bool, rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy", reason="the plain way needs it")
    count = 8 if full else 1
    rows: dict[str, dict[str, list[float]]] = {
        name: {"seconds a pair": [], "peak GB": []} for name in CONTENDERS
    }
    for turn in range(rounds):
        for number, (name, row) in enumerate(rows.items()):
            seconds, peak = seconds_and_peak(name, tmp_path / f"{turn}-{number}", count)
            row["seconds a pair"].append(seconds / count)
            row["peak GB"].append(peak)
    peaks = {
        n: seconds_and_peak("batch", tmp_path / f"n{n}", n)[1] for n in ((16, 48) if full else (1,))
    }
    if full:
        timing.record("batch", {**rows, "peak GB by pairs": peaks})
    with capsys.disabled():
        print(f"\n{count} pairs, Colin27 to ICBM 2009a at 1 mm, a network that costs nothing")
        seconds = {name: row["seconds a pair"] for name, row in rows.items()}
        print(timing.table(seconds, "nibabel, one by one"))
        for name, row in rows.items():
            print(f"{name:<28}{statistics.median(row['peak GB']):.2f} GB peak")
        print(
            "peak of batch by pairs: " + ", ".join(f"{n}: {gb:.2f} GB" for n, gb in peaks.items())
        )


@pytest.mark.parametrize("affine", ["none", "affine"])
def test_network_is_not_kept_waiting(
    full: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], affine: str
) -> None:
    if not full:
        pytest.skip("one pair says nothing about it")
    pytest.importorskip("safetensors", reason="reads weights")
    usage = real(tmp_path, 16, affine)
    timing.record(f"batch-idle-{affine}", usage)
    with capsys.disabled():
        part = usage["idle"] / (usage["busy"] + usage["idle"])
        print(f"\n16 pairs, network at 1 mm in fp32, affine {affine}: idle {100 * part:.1f} %")


if __name__ == "__main__":
    contender, where, pairs = sys.argv[1:]
    displacement()  # imports numpy
    import scipy.ndimage  # noqa: F401
    import SimpleITK  # noqa: F401 - loaded before the clock starts, as are the next two

    start = time.perf_counter()
    CONTENDERS[contender](Path(where), int(pairs))
    print(json.dumps(time.perf_counter() - start))
