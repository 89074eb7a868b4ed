"""The network against the released code's arithmetic, each in a process of its own, in turn.

The baseline is what a user has today: every branch, every concatenation and every step's fixed path
computed as published, default memory layout and allocator, sampling grids built and normalised
(tests/_support/plain_ulae.py, in float32), and the same in the memory layout that convolutions
like best. The package runs as its commands run it.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import baselines
from _support import plain_ulae as plain
from _support.volumes import smooth_image
from harness.case import FULL, RELEASED, Case, Measured, Outcome, Setting, Sizes
from harness.processes import Child, child
from harness.rounds import interleaved
from ulae_rt.allocator import keep_freed_memory
from ulae_rt.model import UlaeNet
from ulae_rt.model.blocks import channel_multiple
from ulae_rt.model.checkpoint import PRECISIONS
from ulae_rt.model.program import InferenceProgram
from ulae_rt.model.ulae_net import VARIANTS

NAME = "network"
SMALL: Sizes = (32, 48, 32)
# The shipped weights' grid.
HALF: Sizes = (80, 96, 80)
# Weights that move by tens of voxels, in the steps' own proportions.
HEAD_SCALES = (1.7, 0.5, 0.5)
RELEASED_LAYOUT = f"{RELEASED}, channels_last"
# What torch makes of float32 convolutions on a GPU unless it is told otherwise.
TF32 = ", TF32"
PACKAGE = ("ulae_rt fp32", "ulae_rt bf16", "ulae_rt fp16")
PACKAGE_TF32 = f"ulae_rt fp32{TF32}"
# Two correct float32 runs differ by rounding; a displacement must not by more than this.
FP32_TOLERANCE_VOXELS = 1e-3
# Half precision with random, hence rough, weights, in the mean: 0.3 was measured.
HALF_TOLERANCE_VOXELS = 1.0
SECONDS = 30.0

Outputs = tuple[Tensor, Tensor]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    return device() == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cases(setting: Setting) -> list[Case]:
    # A CPU has no time for two variants at the paper's size, or for a second baseline.
    on_gpu = setting.device == "cuda"
    other = SMALL if setting.small else FULL if on_gpu else HALF
    both = (RELEASED, RELEASED_LAYOUT)
    own = PACKAGE
    if on_gpu:
        both = (RELEASED, f"{RELEASED}{TF32}", RELEASED_LAYOUT, f"{RELEASED_LAYOUT}{TF32}")
        own = (*own, PACKAGE_TF32)
    chosen = {
        VARIANTS[0]: (SMALL if setting.small else FULL, both if on_gpu else both[:1]),
        VARIANTS[1]: (other, both),
    }
    return [
        Case(
            NAME,
            f"one pair, {variant} variant",
            (*released, *own),
            partial(measured, variant, size, (*released, *own)),
            size,
            precision="fp32 images",
            baseline=f"{RELEASED}{TF32}" if on_gpu else RELEASED,
            own=own,
            error_unit="voxel, largest",
            about_seconds=100.0 if size == FULL else 30.0,
        )
        for variant, (size, released) in chosen.items()
    ]


def left_out(name: str) -> str:
    """Why this machine cannot run a contender; "" when it can."""
    if name.endswith("fp16") and device() == "cpu":
        return "no CPU has a fast fp16 convolution"
    if name.endswith("bf16") and not has_bf16():
        return "this processor has no bf16 arithmetic"
    return ""


def weights(variant: str) -> plain.State:
    """Random ones, in the released code's names, float32."""
    state = plain.scale_heads(plain.random_state(variant), HEAD_SCALES)
    return {key: value.float() for key, value in state.items()}


def package(variant: str, precision: torch.dtype | None) -> UlaeNet:
    """The package's network with `weights`, on the CPU."""
    net = UlaeNet(variant)
    net.load_state_dict(plain.package_state(weights(variant), variant))
    net.feature_dtype = precision
    return net.eval()


def inference_program(variant: str, precision: str) -> InferenceProgram:
    """What the package runs weights by, on the device of the benchmarks."""
    dtype = PRECISIONS[precision] or torch.float32
    multiple = channel_multiple(dtype, device())
    return InferenceProgram(package(variant, None), precision, multiple).to(device())


def flops(variant: str, sizes: Sizes, batch: int = 1) -> float:
    """Of the convolutions that the function needs, as the package has it.

    They are in proportion to the voxels, so they are counted on a small volume.
    """
    net = package(variant, None)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.predict(*images(SMALL, 1, "cpu"))
    voxels, counted = (float(torch.tensor(each).prod()) for each in (sizes, SMALL))
    return counter.get_total_flops() * batch * voxels / counted


def images(sizes: Sizes, batch: int, where: str) -> list[Tensor]:
    return [smooth_image(sizes, batch, seed=s, dtype=torch.float32).to(where) for s in (1, 2)]


def released(
    variant: str, pair: list[Tensor], *, channels_last: bool = False
) -> Callable[[], Outputs]:
    """The released code's arithmetic on a pair."""
    if device() == "cuda":  # the CPU's figures were taken with it written out
        baselines.use_released_norm()
    state = {key: value.to(device()) for key, value in weights(variant).items()}
    if channels_last:
        pair = [x.contiguous(memory_format=torch.channels_last_3d) for x in pair]
        state = {
            key: value.contiguous(memory_format=torch.channels_last_3d)
            if value.ndim == 5
            else value
            for key, value in state.items()
        }

    def run() -> Outputs:
        with torch.inference_mode():
            out = plain.register(state, *pair)
            return out.moved, out.disp

    return run


def prepare(name: str, variant: str, sizes: Sizes, result: str) -> Callable[[], object]:
    """A contender's process: what it finds is saved once, and then found again and again."""
    pair = images(sizes, 1, device())
    torch.backends.cudnn.allow_tf32 = name.endswith(TF32)
    if name.startswith(RELEASED):
        run = released(variant, pair, channels_last=name.startswith(RELEASED_LAYOUT))
    else:
        keep_freed_memory()
        program = inference_program(variant, name.removesuffix(TF32).rpartition(" ")[2])

        def run() -> Outputs:
            with torch.inference_mode():
                moved, disp = program(*pair)
                return moved, disp

    torch.save([x.float().cpu() for x in run()], result)
    return run


def errors(found: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """Largest and mean difference of two displacements, voxels."""
    difference = found[1] - truth[1]
    return float(difference.abs().max()), float(difference.norm(dim=1).mean())


def verdict(name: str, found: list[Tensor], truth: list[Tensor]) -> tuple[float, str]:
    """Largest difference from the released arithmetic, and what is wrong with it, or ""."""
    largest, mean = errors(found, truth)
    exact = not any(rough in name for rough in ("bf16", "fp16", TF32))
    off, allowed = (largest, FP32_TOLERANCE_VOXELS) if exact else (mean, HALF_TOLERANCE_VOXELS)
    if not off <= allowed:  # NaN is wrong as well
        kind = "largest" if exact else "mean"
        return largest, f"displacement off by {off:.2g} voxel ({kind}), at most {allowed:g} allowed"
    return largest, ""


def outcomes(
    names: dict[str, str],
    start: Callable[[str, Path], Child],
    rounds: int,
    folder: Path,
) -> dict[str, Outcome]:
    """Start each contender, hold it to the first one's result, and time the right ones in turn.

    Args:
        names: of the contenders, the baseline first, and why one is left out, or "".
        start: given a name and the file for its result, starts its process.
        rounds: to time them.
        folder: for results.
    """
    found = {name: Outcome("left out", why) for name, why in names.items() if why}
    children: dict[str, Child] = {}
    largest: dict[str, float] = {}
    truth: list[Tensor] | None = None
    for number, name in enumerate(name for name, why in names.items() if not why):
        file = folder / f"{number}.pt"
        try:
            started = start(name, file)
        except Exception as error:  # of an exporter or an engine: the others are still timed
            found[name] = Outcome("failed", f"{type(error).__name__}: {error}")
            continue
        result = torch.load(file, weights_only=True)
        file.unlink()
        truth = result if truth is None else truth
        largest[name], wrong = verdict(name, result, truth)
        if wrong:
            found[name] = Outcome("wrong", wrong, error=largest[name])
        else:
            children[name] = started
    seconds = interleaved({name: each.run for name, each in children.items()}, rounds, SECONDS)
    for name, each in children.items():
        own, gpu = each.finish()
        found[name] = Outcome(
            seconds=seconds[name],
            first_seconds=each.first_seconds,
            error=largest[name],
            peak_gb=own,
            gpu_peak_gb=gpu or None,
        )
    return found


def measured(variant: str, sizes: Sizes, contenders: tuple[str, ...], rounds: int) -> Measured:
    names = {name: left_out(name) for name in contenders}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def start(name: str, file: Path) -> Child:
            return stack.enter_context(child("suites.network", name, variant, sizes, str(file)))

        return Measured(outcomes(names, start, rounds, Path(folder)), flops=flops(variant, sizes))
