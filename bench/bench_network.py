"""The network against the released code's arithmetic: time in turn, memory apart.

The baseline is what a user has today: every branch, every concatenation and every step's fixed path
computed as published, default memory layout, sampling grids built and normalised
(tests/_support/plain_ulae.py, in float32).
"""

import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest
import timing
import torch
from torch import Tensor

from _support import plain_ulae as plain
from _support.volumes import smooth_image
from ulae_rt.allocator import keep_freed_memory
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.model import UlaeNet

# Weights that move by up to about 15 voxels, in the steps' own proportions.
HEAD_SCALES = (1.7, 0.5, 0.5)
RELEASED = "released, eager fp32"
PACKAGE = {"ulae_rt fp32": None, "ulae_rt bf16": torch.bfloat16, "ulae_rt fp16": torch.float16}
# Two correct float32 runs differ by rounding; a displacement must not by more than this.
FP32_TOLERANCE_VOXELS = 1e-3


def weights() -> plain.State:
    state = plain.scale_heads(plain.random_state("paper"), HEAD_SCALES)
    return {key: value.float() for key, value in state.items()}


def package_network(state: plain.State) -> UlaeNet:
    net = UlaeNet("paper")
    net.load_state_dict(plain.package_state(state, "paper"))
    return net.eval()


def contenders(
    sizes: tuple[int, int, int], device: str
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Each returns moved and displacement of the same pair."""
    state = {key: value.to(device) for key, value in weights().items()}
    net = package_network(state).to(device)
    moving, fixed = (smooth_image(sizes, seed=s, dtype=torch.float32).to(device) for s in (1, 2))

    def released() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            out = plain.register(state, moving, fixed)
            return out.moved, out.disp

    def package(dtype: torch.dtype | None) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            net.feature_dtype = dtype
            with torch.inference_mode():
                return net.predict(moving, fixed)

        return run

    runs = {RELEASED: released} | {name: package(dtype) for name, dtype in PACKAGE.items()}
    if device == "cpu":
        del runs["ulae_rt fp16"]  # no CPU has a fast fp16 convolution
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            del runs["ulae_rt bf16"]
    return runs


def errors(runs: dict[str, Callable[[], tuple[Tensor, Tensor]]]) -> dict[str, dict[str, float]]:
    """Displacement error of each against the released arithmetic, voxels; the gate."""
    moved, disp = runs[RELEASED]()
    found = {}
    for name, run in runs.items():
        if name != RELEASED:
            other_moved, other = run()
            distance = (other - disp).norm(dim=1)
            found[name] = {
                "disp_mean": float(distance.mean()),
                "disp_max": float((other - disp).abs().max()),
                "moved_max": float((other_moved - moved).abs().max()),
                "reach": float(disp.abs().max()),
            }
    assert found["ulae_rt fp32"]["disp_max"] <= FP32_TOLERANCE_VOXELS, found
    return found


def peak_memory_gb(name: str, sizes: tuple[int, int, int]) -> float:
    """Largest resident size of a fresh process that runs one contender twice."""
    script = (
        "import resource, sys; sys.path[:0] = ['bench', 'tests']; import bench_network as b;"
        f"b.keep_freed_memory(); run = b.contenders({sizes}, 'cpu')[{name!r}]; run(); run();"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=timing.ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_network(full: bool, rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = FULL_SHAPE if full else (32, 48, 32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    keep_freed_memory()  # for all alike: the released arithmetic profits as much
    runs = contenders(sizes, device)
    found = errors(runs)
    seconds = timing.interleaved(runs, rounds)
    memory = {name: peak_memory_gb(name, sizes) for name in runs} if device == "cpu" else {}
    if full:
        base = statistics.median(seconds[RELEASED])
        timing.record(
            "network",
            {
                name: {
                    "sizes": sizes,
                    "seconds": values,
                    "ratio": statistics.median(values) / base,
                    "peak_gb": memory.get(name),
                    "error_voxels": found.get(name),
                }
                for name, values in seconds.items()
            },
        )
    with capsys.disabled():
        print(f"\nnetwork, one pair {'x'.join(map(str, sizes))}, {device}, {rounds} rounds in turn")
        print(timing.table(seconds, RELEASED))
        for name, gb in memory.items():
            print(f"{name:<28}{gb:>9.2f} GB peak")
        for name, row in found.items():
            print(
                f"{name:<28} displacement error mean {row['disp_mean']:.2e}, max "
                f"{row['disp_max']:.2e} voxel where it reaches {row['reach']:.1f}"
            )
