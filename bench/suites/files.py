"""Scans in, files out: what a user waits for, the reading and the writing included.

Each run is a process of its own, as a user starts one, but for the program that keeps a
`Registrar`. The scans are the shipped pair, Colin27 to ICBM 2009a.
"""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.case import FULL, PACKAGE, Case, LeftOut, Measured, Outcome, Setting
from harness.record import ROOT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ulae_rt.conventions import AffineMode

NAME = "files"
NEEDED = ("nibabel", "safetensors", "scipy")
SAMPLES = ROOT / "samples"
MOVING, FIXED = SAMPLES / "colin27_brain.nii.gz", SAMPLES / "mni152_2009a_brain.nii.gz"
# Of a small run's scans, along every axis: one voxel of so many.
THIN = 3

NO_AFFINE = f"{PACKAGE}, no affine"
SYN, GREEDY = "antspyx SyN", "picsl-greedy"
# A registration takes 10 s, and the two of other packages together four minutes: the whole suite is
# to take six.
REGISTRATIONS = 2
BATCH_ROUNDS = 2
# One after the other, each pair takes as long as the last one; only a batch has to fill first.
PAIRS = {"nibabel and scipy, one by one": 1, "Registrar, one by one": 1, "batch": 4}
PLAIN = next(iter(PAIRS))
REAL_PAIRS = 6
REACH = 3.0  # voxels of the stand-in's displacement
# Correlation with the plain way's moved image: 0.9995 was found. The scan not moved at all has
# 0.80, one that is moved the wrong way along one axis 0.81.
ALIKE = 0.99

# A process starts with the peak of the one that forked it, so a small one has to.
_WATCH = """\
import json, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:]).returncode
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([seconds, peak / 1e6]))
sys.exit(status if status >= 0 else 128 - status)
"""


def cases(setting: Setting) -> list[Case]:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise LeftOut(f"{name} is not installed: scans are read, aligned and checked with it")
    import nibabel as nib

    thin = THIN if setting.small else 1
    x, y, z = (-(-size // thin) for size in nib.load(FIXED).shape)
    case = partial(Case, NAME, sizes=(x, y, z))
    return [
        case(
            "register, whole process, no affine",
            (NO_AFFINE,),
            partial(registered, setting, "none"),
            own=(NO_AFFINE,),
            goal="under 5 s but for load and network; at most 3 GB",
        ),
        case("Registrar, warm", (PACKAGE,), partial(kept, setting)),
        case(
            "batch, a network that costs nothing, a pair",
            tuple(PAIRS),
            partial(stood_in, setting),
            baseline=PLAIN,
            own=tuple(PAIRS)[1:],
            goal="3 times as fast as the plain way",
        ),
        case(
            "batch, real network, a pair",
            (PACKAGE,),
            partial(real, setting),
            goal="the network waits less than 5 % of the time",
        ),
        # Last: where time is short, it is the one to be left out.
        case(
            "register, whole process",
            (PACKAGE, *OTHERS),
            partial(registered, setting, "affine"),
            baseline=SYN,
            goal="at most 3 GB",
            about_seconds=270.0,
        ),
    ]


# Processes, and whether their result is right


@dataclass(frozen=True)
class Watched:
    """A process that has ended.

    Attributes:
        seconds: from its start to its end.
        peak_gb: largest memory of it, or of a process that it waited for.
        said: the last line on its standard output.
    """

    seconds: float
    peak_gb: float
    said: str


def watched(*command: str) -> Watched:
    """Run a command.

    Raises:
        Failed: it ended with an error.
    """
    from harness.processes import Failed  # brings torch, which no contender has to start with

    done = subprocess.run(
        [sys.executable, "-c", _WATCH, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith("hint:")]
        raise Failed(lines[-1] if lines else f"it ended with {done.returncode}")
    *said, last = done.stdout.strip().splitlines()
    seconds, peak_gb = json.loads(last)
    return Watched(seconds, peak_gb, said[-1] if said else "")


def calling(function: Callable[..., None], *arguments: Any) -> list[str]:
    """The command that calls a function of this module in a process of its own.

    Args:
        function: by its name.
        arguments: by their repr; paths as text.
    """
    given = tuple(str(each) if isinstance(each, Path) else each for each in arguments)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); from suites import files;"
        f"files.{function.__name__}(*{given!r})"
    )
    return [sys.executable, "-c", script]


@dataclass(frozen=True)
class Gate:
    """What a moved image has to be.

    Attributes:
        like: the image that it has to resemble, on the grid on which it has to lie.
        least: their correlation where ``like`` is not 0 that it has to exceed, -1 to 1.
    """

    like: Path
    least: float

    def fault(self, moved: Path) -> str:
        """What is wrong with it, or ""."""
        import nibabel as nib
        import numpy as np

        if not moved.exists():
            return "there is no moved image"
        image, like = nib.load(moved), nib.load(self.like)
        if image.shape != like.shape or not np.allclose(image.affine, like.affine, atol=1e-3):
            return f"the moved image of {image.shape} does not lie on the fixed grid, {like.shape}"
        values = image.get_fdata(dtype=np.float32)
        if not np.isfinite(values).all():
            return "the moved image has NaN or Inf"
        found = correlation(values, like.get_fdata(dtype=np.float32))
        if not found > self.least:
            return f"the moved image correlates by {found:.4f}, {self.least:.4f} is too little"
        return ""


def correlation(values: "NDArray[np.float32]", like: "NDArray[np.float32]") -> float:
    """Of two images (X, Y, Z) where the second is not 0."""
    import numpy as np

    inside = like != 0
    return float(np.corrcoef(values[inside], like[inside])[0, 1])


@cache
def gate_of(moving: Path, fixed: Path) -> Gate:
    """A moved image has to be more like the fixed one than the moving scan is as it lies."""
    import nibabel as nib
    import numpy as np
    from nibabel.processing import resample_from_to

    target = nib.load(fixed)
    before = resample_from_to(nib.load(moving), target, order=1).get_fdata(dtype=np.float32)
    return Gate(fixed, correlation(before, target.get_fdata(dtype=np.float32)))


def scans(setting: Setting, folder: Path) -> tuple[Path, Path]:
    """The moving and the fixed scan; thinned ones, in a folder, where all is to be small."""
    if not setting.small:
        return MOVING, FIXED
    import nibabel as nib

    thinned = folder / "moving.nii.gz", folder / "fixed.nii.gz"
    for scan, file in zip((MOVING, FIXED), thinned, strict=True):
        nib.save(nib.load(scan).slicer[::THIN, ::THIN, ::THIN], file)
    return thinned


def affine_of(setting: Setting) -> "AffineMode":
    """The affine takes seconds of any pair, however small."""
    return "none" if setting.small else "affine"


def linked(moving: Path, fixed: Path, folder: Path, count: int) -> list[tuple[str, Path, Path]]:
    """The pair under paths of its own, so often that no pair profits from another's scan."""
    pairs = []
    for number in range(count):
        pair = folder / f"moving{number}.nii.gz", folder / f"fixed{number}.nii.gz"
        for link, scan in zip(pair, (moving, fixed), strict=True):
            link.symlink_to(scan)
        pairs.append((f"p{number}", *pair))
    return pairs


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Contenders in turn


@dataclass(frozen=True)
class Run:
    """One run of a contender.

    Attributes:
        seconds: it took, of one pair.
        peak_gb: largest memory of its process.
        stages: seconds by stage, of one pair unless they say otherwise.
    """

    seconds: float
    peak_gb: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        run: once; raises `harness.processes.Failed`.
        moved: the image that it leaves.
        rounds: in which it runs.
    """

    run: Callable[[], Run]
    moved: Path
    rounds: int


def timed(contenders: Mapping[str, Contender], gate: Gate) -> dict[str, Outcome]:
    """All of them in turn; one that fails, or whose first result is not right, is not timed."""
    from harness.processes import Failed

    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    found: dict[str, Outcome] = {}
    for turn in range(max(each.rounds for each in contenders.values())):
        for name, each in contenders.items():
            if name in found or turn >= each.rounds:
                continue
            try:
                runs[name].append(each.run())
            except Failed as error:
                found[name] = Outcome("failed", str(error))
                continue
            if turn == 0 and (fault := gate.fault(each.moved)):
                found[name] = Outcome("wrong", fault)
    return {name: found.get(name) or outcome(runs[name]) for name in contenders}


def outcome(runs: list[Run]) -> Outcome:
    return Outcome(
        seconds=[run.seconds for run in runs],
        stages={stage: [run.stages[stage] for run in runs] for stage in runs[0].stages},
        peak_gb=max(run.peak_gb for run in runs),
    )


# register


def registered(setting: Setting, affine: str, rounds: int) -> Measured:
    """``ulae-rt register`` from files to files; with the affine, the other packages beside it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moving, fixed = scans(setting, folder)
        own = PACKAGE if affine == "affine" else NO_AFFINE
        run = partial(register, moving, fixed, emptied(folder / "own"), affine, setting.device)
        rounds = 1 if setting.small else min(rounds, REGISTRATIONS)
        contenders = {own: Contender(run, folder / "own" / "moved.nii.gz", rounds)}
        left_out: dict[str, Outcome] = {}
        for other, (module, package, function) in OTHERS.items() if own == PACKAGE else ():
            if setting.small:
                left_out[other] = Outcome("left out", "takes minutes")
            elif importlib.util.find_spec(module) is None:
                left_out[other] = Outcome("left out", f"{package} is not installed")
            else:
                run = partial(other_package, function, moving, fixed, folder / module)
                contenders[other] = Contender(run, folder / module / "moved.nii.gz", 1)
        return Measured({**timed(contenders, gate_of(moving, fixed)), **left_out})


def register(moving: Path, fixed: Path, folder: Path, affine: str, device: str) -> Run:
    """As a user runs it: the moved image and the warp are written."""
    done = watched(
        sys.executable, "-m", "ulae_rt.register", "-m", str(moving), "-f", str(fixed),
        "-o", str(folder / "moved.nii.gz"), "-w", str(folder / "warp.nii.gz"),
        "--affine", affine, "--device", device, "--overwrite", "--json",
    )  # fmt: skip
    stages: dict[str, float] = json.loads(done.said)["seconds"]
    stages["start and end"] = done.seconds - sum(stages.values())
    return Run(done.seconds, done.peak_gb, stages)


def other_package(function: Callable[..., None], moving: Path, fixed: Path, folder: Path) -> Run:
    emptied(folder)
    # Greedy parts its commands at spaces, which the way to a folder may have.
    (folder / "moving.nii.gz").symlink_to(moving)
    (folder / "fixed.nii.gz").symlink_to(fixed)
    done = watched(*calling(function, folder))
    return Run(done.seconds, done.peak_gb)


def syn(folder: str) -> None:
    """ANTs as its documentation has it: an affine and SyN, whose warp it writes itself."""
    import ants

    os.chdir(folder)
    fixed, moving = ants.image_read("fixed.nii.gz"), ants.image_read("moving.nii.gz")
    found = ants.registration(fixed, moving, "SyN", outprefix="./")
    ants.image_write(found["warpedmovout"], "moved.nii.gz")


def greedy(folder: str) -> None:
    """Greedy as its documentation has it: an affine, the warp, the moved image.

    With fewer iterations than ``ulae-rt batch --method greedy``, which is to be accurate.
    """
    from picsl_greedy import Greedy3D

    os.chdir(folder)
    package = Greedy3D()
    usual = "-V 0 -i fixed.nii.gz moving.nii.gz -m NCC 2x2x2 -n 100x50x10"
    package.execute(f"{usual} -a -ia-image-centers -o affine.mat")
    package.execute(f"{usual} -it affine.mat -o warp.nii.gz")
    package.execute(
        "-V 0 -rf fixed.nii.gz -rm moving.nii.gz moved.nii.gz -r warp.nii.gz affine.mat"
    )


# By name: the module, the package that has it, and what runs in its process.
OTHERS: dict[str, tuple[str, str, Callable[..., None]]] = {
    SYN: ("ants", "antspyx", syn),
    GREEDY: ("picsl_greedy", "picsl-greedy", greedy),
}


# Registrar


def kept(setting: Setting, rounds: int) -> Measured:
    """A program that keeps a `Registrar`: `--benchmark-min-rounds=100` for its 99th percentile."""
    from harness.processes import child
    from harness.rounds import interleaved

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moving, fixed = scans(setting, folder)
        moved = folder / "moved.nii"
        arguments = (str(moving), str(fixed), str(moved), affine_of(setting), setting.device)
        with child("suites.files", *arguments) as process:
            if fault := gate_of(moving, fixed).fault(moved):
                return Measured({PACKAGE: Outcome("wrong", fault)})
            seconds = interleaved({PACKAGE: process.run}, rounds)[PACKAGE]
            own, gpu = process.finish()
    return Measured(
        {
            PACKAGE: Outcome(
                seconds=seconds,
                first_seconds=process.first_seconds,
                peak_gb=own,
                gpu_peak_gb=gpu or None,
            )
        }
    )


def prepare(
    moving: str, fixed: str, moved: str, affine: "AffineMode", device: str
) -> Callable[[], object]:
    """The program: opens the network, registers once and then again and again, nothing written."""
    import nibabel as nib

    from ulae_rt import Registrar
    from ulae_rt.allocator import keep_freed_memory

    keep_freed_memory()
    registrar = Registrar(device=device, precision="auto", affine=affine)
    # Not packed, it takes a hundredth of the call.
    nib.save(registrar(moving, fixed).moved, moved)
    return lambda: registrar(moving, fixed)


# batch, a network that costs nothing


def stood_in(setting: Setting, rounds: int) -> Measured:
    """What stands around the network, in `batch`, in a loop, and in a user's own script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moving, fixed = scans(setting, folder)
        rounds = 1 if setting.small else min(rounds, BATCH_ROUNDS)
        contenders = {}
        for number, (contender, count) in enumerate(PAIRS.items()):
            place, count = folder / str(number), 1 if setting.small else count
            contenders[contender] = Contender(
                partial(stand_in_run, contender, moving, fixed, place, count),
                place / ("pairs/p0/moved.nii.gz" if contender == "batch" else "moved0.nii.gz"),
                rounds,
            )
        plain_result = Gate(contenders[PLAIN].moved, ALIKE)
        return Measured(timed(contenders, plain_result))


def stand_in_run(contender: str, moving: Path, fixed: Path, folder: Path, count: int) -> Run:
    done = watched(*calling(stand_in_process, contender, moving, fixed, emptied(folder), count))
    return Run(float(done.said) / count, done.peak_gb)


def stand_in_process(contender: str, moving: str, fixed: str, folder: str, count: int) -> None:
    """A contender's process: says the seconds that it took, its imports left out."""
    ways = dict(zip(PAIRS, (plain, one_by_one, batch), strict=True))
    run = ways[contender](Path(moving), Path(fixed), Path(folder), count)
    started = time.perf_counter()
    run()
    print(time.perf_counter() - started)


def displacement() -> "NDArray[np.float32]":
    """What the stand-in finds: a slow wave, (3, D, H, W) voxels."""
    import numpy as np

    waves = [np.sin(np.linspace(0, 2 * np.pi, n, dtype=np.float32)) for n in FULL]
    wave = waves[0][:, None, None] * waves[1][:, None] * waves[2]
    return np.stack([REACH * wave] * 3)


class StandIn:
    """A network that costs nothing."""

    description = "stand-in"
    device = "cpu"
    precision = "fp32"
    weights_sha256 = "0" * 64
    batch = at_once = 1

    class metadata:  # noqa: N801 - a field of every network
        """Of a network at 1 mm."""

        shape = FULL
        spacing_mm = 1.0
        normalisation = "p99.9"

    def __init__(self) -> None:
        import torch

        self._disp = torch.from_numpy(displacement())[None]

    def displacement(self, moving: Any, fixed: Any) -> Any:
        """Always the same."""
        return self._disp


def plain(moving: Path, fixed: Path, folder: Path, count: int) -> Callable[[], None]:
    """As most people's own script does it, with nibabel and scipy."""
    import nibabel as nib
    import numpy as np
    from nibabel.processing import resample_from_to
    from scipy.ndimage import map_coordinates

    disp = displacement()

    def register_one(number: int) -> None:
        scan, target = nib.load(moving), nib.load(fixed)
        brain = target.get_fdata() > 0
        ends = [np.flatnonzero(brain.any(axis=axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
        centre = target.affine @ [*np.mean(ends, axis=1), 1.0]
        affine = np.eye(4)
        affine[:3, 3] = centre[:3] - (np.array(FULL) - 1) / 2
        for each in (scan, target):  # what a network would be given
            image = resample_from_to(each, (FULL, affine), order=1).get_fdata()
            image /= np.percentile(image[image > 0], 99.9)
        # The displacement on the fixed image's own voxels, then through it.
        index = np.indices(target.shape).reshape(3, -1).astype(np.float32)
        to_grid = np.linalg.inv(affine) @ target.affine
        at = to_grid[:3, :3] @ index + to_grid[:3, 3:]
        found = np.stack([map_coordinates(c, at, order=1, mode="nearest") for c in disp])
        world = target.affine[:3, :3] @ index + target.affine[:3, 3:] + found
        back = np.linalg.inv(scan.affine)
        source = back[:3, :3] @ world + back[:3, 3:]
        moved = map_coordinates(scan.get_fdata(), source, order=1).reshape(target.shape)
        found = found.reshape(3, *target.shape)
        m = [list(np.gradient(component)) for component in found]
        for axis in range(3):
            m[axis][axis] += 1
        jacobian = m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        jacobian -= m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        jacobian += m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        (jacobian <= 0).mean()
        for name, values in (("moved", moved), ("warp", np.moveaxis(found, 0, -1))):
            image = nib.Nifti1Image(values.astype(np.float32), target.affine)
            nib.save(image, folder / f"{name}{number}.nii.gz")

    def run() -> None:
        for number in range(count):
            register_one(number)

    return run


def one_by_one(moving: Path, fixed: Path, folder: Path, count: int) -> Callable[[], None]:
    """As a loop over `Registrar` does it."""
    from ulae_rt.registration import Registrar

    def run() -> None:
        registrar = Registrar(StandIn(), affine="none")
        for number in range(count):
            files = [folder / f"{name}{number}.nii.gz" for name in ("moved", "warp")]
            registrar(moving, fixed).save(*files)

    return run


def batch(moving: Path, fixed: Path, folder: Path, count: int) -> Callable[[], None]:
    """As ``ulae-rt batch`` does it."""
    from ulae_rt.allocator import keep_freed_memory
    from ulae_rt.batching.pairs import Pair
    from ulae_rt.batching.pipeline import Pipeline, Wanted, processors
    from ulae_rt.batching.results import ResultsFolder
    from ulae_rt.registration import Registrar

    pairs = [Pair(*each) for each in linked(moving, fixed, folder, count)]

    def run() -> None:
        keep_freed_memory()
        registrar = Registrar(StandIn(), affine="none")
        with ResultsFolder(folder, None, {}) as results:
            results.begin(pairs, resume=False)
            pipeline = Pipeline(
                registrar, results, Wanted(("moved", "warp")), workers=processors(), batch_size=1
            )
            for row in pipeline.run(pairs, threading.Event()):
                assert row.status == "done", row.error
                results.add(row)

    return run


# batch, the network itself


def real(setting: Setting, _: int) -> Measured:
    """``ulae-rt batch`` with the shipped weights: once, for one pair alone says little of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        moving, fixed = scans(setting, folder)
        count = 1 if setting.small else REAL_PAIRS
        place = emptied(folder / "pairs")
        run = partial(real_run, moving, fixed, place, count, affine_of(setting), setting.device)
        moved = place / "out" / "pairs" / "p0" / "moved.nii.gz"
        return Measured(timed({PACKAGE: Contender(run, moved, 1)}, gate_of(moving, fixed)))


def real_run(moving: Path, fixed: Path, folder: Path, count: int, affine: str, device: str) -> Run:
    """Its seconds are those in which pairs are registered: what comes before is paid once.

    So are the page's pictures, of the worst pairs of a list of any length: they are not drawn.
    """
    pairs, out = folder / "pairs.csv", folder / "out"
    rows = [",".join(map(str, each)) for each in linked(moving, fixed, folder, count)]
    pairs.write_text("\n".join(["id,moving,fixed", *rows, ""]), encoding="utf-8")
    done = watched(
        sys.executable, "-m", "ulae_rt.batch", str(pairs), "-o", str(out), "--pictures", "0",
        "--affine", affine, "--device", device,
    )  # fmt: skip
    of_run = json.loads((out / "summary.json").read_text(encoding="utf-8"))["this_run"]
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    by_pair = [json.loads(line)["seconds"] for line in lines]
    return Run(
        of_run["seconds"] / count,
        done.peak_gb,
        {
            **{stage: statistics.median(each[stage] for each in by_pair) for stage in by_pair[0]},
            "network busy": of_run["network_busy_seconds"] / count,
            "network idle": of_run["network_idle_seconds"] / count,
            "start and end, once": done.seconds - of_run["seconds"],
        },
    )
