"""A whole training step: forward, Eq. 5, backward, Adam; one pair, contenders in turn.

The baseline is the released arithmetic with torch's own layers, convolutions in TF32 as torch's
defaults have them, and Adam as its code calls it. The package's step is what ``ulae_rt.train``
does with one pair, without its data and bookkeeping, which need more than torch.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import baselines
import gpu_timing
import pytest
import timing
import torch
from torch import Tensor

from _support import plain_ulae as plain
from _support.ops import textured
from _support.volumes import Sizes
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.losses import registration_loss
from ulae_rt.model import UlaeNet

pytestmark = pytest.mark.filterwarnings("default")

SMALL: Sizes = (16, 16, 32)
RELEASED, COMPILED = "released, eager, TF32", "released, compiled, TF32"
GOALS = {
    RELEASED: "ulae_rt asked for: 4 times as fast, half the peak memory",
    COMPILED: "ulae_rt asked for: 2 times as fast",
}
WARM_UPS = 3
# bf16 features; the loss is about 1.7.
LOSS_TOLERANCE = 0.02
PROFILE_ROWS = 25

Step = Callable[[], Tensor]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pair(sizes: Sizes) -> tuple[Tensor, Tensor]:
    moving, fixed = (textured((1, 1, *sizes), seed, device()) for seed in (1, 2))
    return moving, 0.7 * moving + 0.3 * fixed


def released(sizes: Sizes, *, compiled: bool) -> Step:
    baselines.use_released_norm()
    state, parameters = baselines.released_parameters(device())
    optimiser = torch.optim.Adam(parameters, lr=1e-4)
    moving, fixed = pair(sizes)
    loss_of = torch.compile(baselines.released_loss, dynamic=False) if compiled else None

    def step() -> Tensor:
        torch.backends.cudnn.allow_tf32 = True
        loss = (loss_of or baselines.released_loss)(state, moving, fixed)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def exact_loss(sizes: Sizes) -> float:
    """Of the released arithmetic, without TF32."""
    baselines.use_released_norm()
    state, _ = baselines.released_parameters(device())
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        return float(baselines.released_loss(state, *pair(sizes)))


def package(
    sizes: Sizes, dtype: torch.dtype | None, *, graph: bool = False, compiled: bool = False
) -> Step:
    net = UlaeNet("paper")
    net.load_state_dict(plain.package_state(baselines.training_state(), "paper"))
    net = net.to(device())
    net.feature_dtype = dtype
    network = torch.compile(net.predict, dynamic=False) if compiled else net.predict
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    moving, fixed = pair(sizes)

    def differentiate() -> Tensor:
        torch.backends.cudnn.allow_tf32 = False  # as training does
        optimiser.zero_grad(set_to_none=False)
        out = network(moving, fixed)
        loss = registration_loss(out.moved, fixed, out.disp).total
        loss.backward()
        return loss.detach()

    run: Step = differentiate
    if graph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                differentiate()
        torch.cuda.current_stream().wait_stream(aside)
        recorded = torch.cuda.CUDAGraph()
        # A replay allocates nothing: what it needs is what the recording took.
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(recorded):
            loss = differentiate()

        def replay() -> Tensor:
            recorded.replay()
            return loss

        run = replay

    def step() -> Tensor:
        value = run()
        optimiser.step()
        return value

    step.recorded = graph  # type: ignore[attr-defined]
    return step


def contenders(sizes: Sizes) -> dict[str, Callable[[], Step]]:
    half = torch.bfloat16
    found: dict[str, Callable[[], Step]] = {
        RELEASED: partial(released, sizes, compiled=False),
        "ulae_rt fp32": partial(package, sizes, None),
        "ulae_rt bf16": partial(package, sizes, half),
    }
    if device().type == "cuda":
        found["ulae_rt bf16, graph"] = partial(package, sizes, half, graph=True)
    elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        del found["ulae_rt bf16"]
    return found


def compiled_contenders(sizes: Sizes) -> dict[str, Callable[[], Step]]:
    """Compiling takes minutes: in a test of its own, beside the fastest that needs none."""
    half = torch.bfloat16
    return {
        COMPILED: partial(released, sizes, compiled=True),
        "ulae_rt bf16": partial(package, sizes, half),
        "ulae_rt bf16, graph": partial(package, sizes, half, graph=True),
        "ulae_rt bf16, compiled, graph": partial(package, sizes, half, graph=True, compiled=True),
    }


class Contender:
    """One prepared, and the peak memory of its weights, its optimiser and one of its steps."""

    def __init__(self, make: Callable[[], Step]) -> None:
        gc.collect()
        self.peak_bytes = 0
        on_gpu = device().type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.empty_cache()
        started = time.perf_counter()
        self.step = make()
        self.losses = [float(self.step())]
        timing.synchronise()
        self.first_seconds = time.perf_counter() - started
        if on_gpu:
            if not getattr(self.step, "recorded", False):
                # After the first steps, in which cuDNN tries algorithms with memory of any size.
                self.losses += [float(self.step()) for _ in range(WARM_UPS)]
                torch.cuda.reset_peak_memory_stats()
                self.step()
                timing.synchronise()
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> float:
        """Seconds of a step, between events on the device."""
        return gpu_timing.seconds_of(self.step, device())


def compare(
    makers: dict[str, Callable[[], Step]], baseline: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Time and memory of each, and their ratios to the baseline's."""
    prepared: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            prepared[name] = Contender(make)
        except Exception as error:
            # A compiler or a graph that gives up is a fact to print; the others are still timed.
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
            torch.cuda.empty_cache()
    seconds = timing.interleaved(prepared, rounds)
    for name, contender in prepared.items():
        rows[name] = {
            "seconds": seconds[name],
            "peak_bytes": contender.peak_bytes,
            "first_seconds": contender.first_seconds,
            "losses": contender.losses,
        }
        if baseline in seconds:
            rows[name]["ratio"] = timing.ratios(seconds, baseline)[name]
    return rows


def lines(rows: dict[str, dict[str, Any]], baseline: str) -> list[str]:
    out = [
        f"{'':<32}{'median ms':>10}{'min':>9}{'max':>9}{'times as fast':>15}"
        f"{'peak GB':>9}{'ratio':>7}{'first s':>9}{'first loss':>12}"
    ]
    peak = rows[baseline].get("peak_bytes", 0)
    for name, row in rows.items():
        if "failed" in row:
            out.append(f"{name:<32}failed: {row['failed'].splitlines()[0][:100]}")
            continue
        ms = [1e3 * s for s in row["seconds"]]
        share = f"{row['peak_bytes'] / peak:.2f}" if peak else ""
        faster = f"{1 / row['ratio']:.2f}" if "ratio" in row else ""
        out.append(
            f"{name:<32}{statistics.median(ms):>10.1f}{min(ms):>9.1f}{max(ms):>9.1f}{faster:>15}"
            f"{row['peak_bytes'] / 1e9:>9.2f}{share:>7}{row['first_seconds']:>9.1f}"
            f"{row['losses'][0]:>12.4f}"
        )
    return [*out, GOALS[baseline]]


def profile(sizes: Sizes) -> str:
    """The kernels that a step of the package spends its time in, the longest first."""
    from torch.profiler import ProfilerActivity

    step = package(sizes, torch.bfloat16)
    for _ in range(WARM_UPS):
        step()
    on_gpu = device().type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    timing.synchronise()
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        timing.synchronise()
    totals: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[event.key] = (spent, event.count)
    whole = sum(spent for spent, _ in totals.values())
    order = sorted(totals.items(), key=lambda item: -item[1][0])[:PROFILE_ROWS]
    out = [f"one step: {whole / 1e3:.2f} ms in {sum(n for _, n in totals.values())} launches"]
    for name, (spent, count) in order:
        out.append(
            f"{spent / 1e3:>9.3f} ms {100 * spent / whole:>5.1f} % {count:>5} x  {name[:90]}"
        )
    return "\n".join(out)


@pytest.fixture
def restored() -> Any:
    """torch's settings as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # small volumes: a second thread only waits for the first
    # Sizes do not change: let cuDNN choose by trying, for every contender.
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def show(
    rows: dict[str, dict[str, Any]],
    baseline: str,
    sizes: Sizes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with capsys.disabled():
        print(f"\ntraining step, one pair {'x'.join(map(str, sizes))}, {device()}")
        print("\n".join(lines(rows, baseline)))


def sizes_or_skip(full: bool) -> Sizes:
    if full and device().type == "cpu":
        pytest.skip("training is timed on a GPU; --sizes small runs this code on the CPU")
    return FULL_SHAPE if full else SMALL


def test_training_step(
    full: bool, rounds: int, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = sizes_or_skip(full)
    truth = exact_loss(sizes)
    rows = compare(contenders(sizes), RELEASED, rounds)
    if full:
        timing.record("training", rows)
    show(rows, RELEASED, sizes, capsys)
    # The gate: the same weights and pair have the same loss. The baseline's may be anything: TF32
    # rounds sums whose squares are then subtracted from each other.
    for name, row in rows.items():
        if name != RELEASED and "losses" in row:
            assert abs(row["losses"][0] - truth) < LOSS_TOLERANCE, f"{name}, expected {truth}"


def test_training_profile(
    full: bool,
    restored: None,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if not request.config.getoption("--profile"):
        pytest.skip("--profile lists the kernels of a step")
    with capsys.disabled():
        print(f"\n{profile(sizes_or_skip(full))}")


def test_training_step_compiled(
    full: bool, rounds: int, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if device().type == "cpu":
        pytest.skip("compares compiled CUDA code")
    sizes = sizes_or_skip(full)
    rows = compare(compiled_contenders(sizes), COMPILED, rounds)
    if full:
        timing.record("training-compiled", rows)
    show(rows, COMPILED, sizes, capsys)
