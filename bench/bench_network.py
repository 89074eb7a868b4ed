"""The network against the released code's arithmetic, each in a process of its own, in turn.

The baseline is what a user has today: every branch, every concatenation and every step's fixed path
computed as published, default memory layout and allocator, sampling grids built and normalised
(tests/_support/plain_ulae.py, in float32). The package runs as its commands run it.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import baselines
import pytest
import timing
import torch
from torch import Tensor

from _support import plain_ulae as plain
from _support.volumes import smooth_image
from ulae_rt.allocator import keep_freed_memory
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.model import UlaeNet

# Weights that move by tens of voxels, in the steps' own proportions.
HEAD_SCALES = (1.7, 0.5, 0.5)
RELEASED = "released, eager fp32"
PACKAGE = {"ulae_rt fp32": None, "ulae_rt bf16": torch.bfloat16, "ulae_rt fp16": torch.float16}
# Two correct float32 runs differ by rounding; a displacement must not by more than this.
FP32_TOLERANCE_VOXELS = 1e-3


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def names() -> list[str]:
    """The contenders that this machine can run."""
    on_cpu = device() == "cpu"
    skipped = {"ulae_rt fp16"} if on_cpu else set()  # no CPU has a fast fp16 convolution
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        skipped.add("ulae_rt bf16")
    return [RELEASED, *(name for name in PACKAGE if name not in skipped)]


def contender(name: str, sizes: tuple[int, int, int]) -> Callable[[], tuple[Tensor, Tensor]]:
    """Moved image and displacement of one and the same pair, computed the contender's way."""
    state = plain.scale_heads(plain.random_state("paper"), HEAD_SCALES)
    state = {key: value.float().to(device()) for key, value in state.items()}
    pair = [smooth_image(sizes, seed=s, dtype=torch.float32).to(device()) for s in (1, 2)]
    if name == RELEASED:
        torch.backends.cudnn.allow_tf32 = False
        if device() == "cuda":  # the CPU's figures were taken with it written out
            baselines.use_released_norm()

        def released() -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                out = plain.register(state, *pair)
                return out.moved, out.disp

        return released

    keep_freed_memory()
    net = UlaeNet("paper")
    net.load_state_dict(plain.package_state(state, "paper"))
    net = net.to(device()).eval()
    net.feature_dtype = PACKAGE[name]

    def package() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return net.predict(*pair)

    return package


def serve(name: str, sizes: tuple[int, int, int], result: str) -> None:
    """A contender's process: one warm-up, whose result is saved, then one run a line of stdin."""
    run = contender(name, sizes)
    torch.save([x.float().cpu() for x in run()], result)
    print("ready", flush=True)
    for _ in sys.stdin:
        timing.synchronise()
        started = time.perf_counter()
        run()
        timing.synchronise()
        print(time.perf_counter() - started, flush=True)
    print(peak_gb(), flush=True)


def peak_gb() -> float:
    """Largest resident size of this process (``ru_maxrss`` would include its parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith("VmHWM"))) / 1e6


@contextmanager
def process(
    name: str, sizes: tuple[int, int, int], result: Path
) -> Iterator["subprocess.Popen[str]"]:
    script = (
        "import sys; sys.path[:0] = ['bench', 'tests']; import bench_network;"
        f"bench_network.serve({name!r}, {sizes}, {str(result)!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=timing.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert line(child) == "ready"
        yield child


def line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def ask(child: "subprocess.Popen[str]") -> float:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return float(line(child))


def finish(child: "subprocess.Popen[str]") -> float:
    assert child.stdin is not None
    child.stdin.close()
    return float(line(child))


def errors(moved: Tensor, disp: Tensor, truth: list[Tensor]) -> dict[str, float]:
    """Against the released arithmetic, displacements in voxels."""
    return {
        "disp_mean": float((disp - truth[1]).norm(dim=1).mean()),
        "disp_max": float((disp - truth[1]).abs().max()),
        "moved_max": float((moved - truth[0]).abs().max()),
        "reach": float(truth[1].abs().max()),
    }


def test_network(
    full: bool, rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = FULL_SHAPE if full else (32, 48, 32)
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        children = {}
        for number, name in enumerate(names()):
            result = tmp_path / f"{number}.pt"
            children[name] = stack.enter_context(process(name, sizes, result))
            found = torch.load(result, weights_only=True)
            if name == RELEASED:
                truth = found
            rows[name] = {"sizes": sizes, "error_voxels": errors(*found, truth)}
        # The gate: nothing is timed that is not right.
        worst = rows["ulae_rt fp32"]["error_voxels"]["disp_max"]
        assert worst <= FP32_TOLERANCE_VOXELS, f"float32 is off by {worst} voxel"
        seconds = timing.interleaved(
            {name: lambda child=child: ask(child) for name, child in children.items()}, rounds
        )
        for name, child in children.items():
            rows[name] |= {"seconds": seconds[name], "peak_gb": finish(child)}
    ratios = timing.ratios(seconds, RELEASED)
    for name, row in rows.items():
        row["ratio"] = ratios[name]
    if full:
        timing.record("network", rows)
    with capsys.disabled():
        print(
            f"\nnetwork, one pair {'x'.join(map(str, sizes))}, {device()}, {rounds} rounds in turn"
        )
        print(timing.table(seconds, RELEASED))
        for name, row in rows.items():
            off = row["error_voxels"]
            print(
                f"{name:<28}{row['peak_gb']:>8.2f} GB peak; displacement off by "
                f"{off['disp_mean']:.1e} (mean), {off['disp_max']:.1e} (max) voxel where it "
                f"reaches {off['reach']:.0f}"
            )
