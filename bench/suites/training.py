"""A whole training step: forward, Eq. 5, backward, Adam; one pair, contenders in turn.

The baseline is the released arithmetic with torch's own layers, convolutions in TF32 as torch's
defaults have them, and Adam as its code calls it. The package's step is what ``ulae_rt.train``
does with one pair, without its data and bookkeeping, which need more than torch.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import baselines
from _support import plain_ulae as plain
from _support.ops import textured
from harness.case import FULL, RELEASED, Case, Measured, Outcome, Setting, Sizes
from harness.gpu_timing import seconds_of
from harness.rounds import interleaved, synchronise
from suites import network
from ulae_rt.losses import registration_loss
from ulae_rt.model import UlaeNet

NAME = "training"
SMALL: Sizes = (16, 16, 32)
# What a CPU does of it in the time of a benchmark.
ON_CPU: Sizes = (48, 48, 48)
COMPILED = f"{RELEASED}, compiled"
BF16, GRAPH = "ulae_rt bf16", "ulae_rt bf16, graph"
COMPILED_GRAPH = "ulae_rt bf16, compiled, graph"
WARM_UPS = 3
# bf16 features; the loss is about 1.7.
LOSS_TOLERANCE = 0.02
SECONDS = 30.0

Step = Callable[[], Tensor]


def cases(setting: Setting) -> list[Case]:
    on_gpu = setting.device == "cuda"
    sizes = SMALL if setting.small else FULL if on_gpu else ON_CPU
    eager = {
        RELEASED: partial(released, sizes, compiled=False),
        "ulae_rt fp32": partial(package, sizes, None),
        BF16: partial(package, sizes, torch.bfloat16),
    }
    if on_gpu:
        eager[GRAPH] = partial(package, sizes, torch.bfloat16, graph=True)
    found = [case("one pair", eager, sizes, "4 times as fast as the baseline, in half the memory")]
    if on_gpu and not setting.small:
        # Compiling takes minutes: by itself, beside the fastest that need none.
        compiled = {
            COMPILED: partial(released, sizes, compiled=True),
            BF16: eager[BF16],
            GRAPH: eager[GRAPH],
            COMPILED_GRAPH: partial(package, sizes, torch.bfloat16, graph=True, compiled=True),
        }
        found.append(case("one pair, compiled", compiled, sizes, "twice as fast as the baseline"))
    return found


def case(name: str, makers: dict[str, Callable[[], Step]], sizes: Sizes, goal: str) -> Case:
    baseline, *own = makers
    return Case(
        NAME,
        name,
        (baseline, *own),
        partial(measured, makers, sizes),
        sizes,
        precision="fp32 images",
        baseline=baseline,
        own=tuple(own),
        goal=goal,
        about_seconds=240.0 if baseline == COMPILED else 40.0,  # compiling is most of it
        error_unit="first loss against float32's",
    )


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
    predict = torch.compile(net.predict, dynamic=False) if compiled else net.predict
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    moving, fixed = pair(sizes)

    def differentiate() -> Tensor:
        torch.backends.cudnn.allow_tf32 = False  # as training does
        optimiser.zero_grad(set_to_none=False)
        out = predict(moving, fixed)
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
        self.loss = float(self.step())
        synchronise()
        self.first_seconds = time.perf_counter() - started
        if on_gpu:
            if not getattr(self.step, "recorded", False):
                # After the first steps, in which cuDNN tries algorithms with memory of any size.
                for _ in range(WARM_UPS):
                    self.step()
                torch.cuda.reset_peak_memory_stats()
                self.step()
                synchronise()
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> float:
        """Seconds of a step, between events on the device."""
        return seconds_of(self.step, device())


def measured(makers: dict[str, Callable[[], Step]], sizes: Sizes, rounds: int) -> Measured:
    with restored():
        truth = exact_loss(sizes)
        found: dict[str, Outcome] = {}
        prepared: dict[str, Contender] = {}
        for name, make in makers.items():
            if "bf16" in name and not network.has_bf16():
                found[name] = Outcome("left out", "this processor has no bf16 arithmetic")
                continue
            try:
                contender = Contender(make)
            except Exception as error:  # a compiler or a graph that gives up is a fact to show
                found[name] = Outcome("failed", f"{type(error).__name__}: {error}")
                torch.cuda.empty_cache()
                continue
            # The gate: the same weights and pair have the same loss. The baseline's may be
            # anything: TF32 rounds sums whose squares are then subtracted from each other.
            off = abs(contender.loss - truth)
            if name.startswith(RELEASED) or off < LOSS_TOLERANCE:
                prepared[name] = contender
            else:
                wrong = f"its first loss is {contender.loss:.4f}, expected {truth:.4f}"
                found[name] = Outcome("wrong", wrong, error=off)
        seconds = interleaved(prepared, rounds, SECONDS)
        for name, contender in prepared.items():
            found[name] = Outcome(
                seconds=seconds[name],
                first_seconds=contender.first_seconds,
                error=abs(contender.loss - truth),
                gpu_peak_gb=contender.peak_bytes / 1e9 or None,
            )
        return Measured({name: found[name] for name in makers})


@contextmanager
def restored() -> Iterator[None]:
    """torch's settings as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    # Sizes do not change: let cuDNN choose by trying, for every contender.
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
