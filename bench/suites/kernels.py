"""Every op, forward and backward, against what a user has today and against its floor.

The floor is what must be read and written, once, at the copy bandwidth measured in the same run.
A contender is checked against float64 before it is timed, and this package's must be right; a
baseline's error is shown beside its time. On a CPU the package's ops are plain torch.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import baselines
from _support.kernels import implementation
from _support.ops import OPS, WEIGHTS, WINDOWS, cotangents, outputs_of
from harness import gpu_timing
from harness.case import FULL, PACKAGE, RELEASED, Case, Measured, Outcome, Setting, Sizes
from harness.rounds import interleaved
from ulae_rt import kernels

NAME = "kernels"
SMALL: Sizes = (8, 16, 8)
# What plain torch does of it on a CPU in the time of a benchmark.
ON_CPU: Sizes = (64, 64, 64)
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
SECONDS_PER_STATE = 4.0
# A sample of a GPU is a millisecond: more of them than of what takes seconds.
GPU_ROUNDS = 4
# Relative RMS error above which this package's result counts as wrong.
GATES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """A way to compute a row's result.

    Attributes:
        call: inputs to the row's outputs.
        tf32: whether cuDNN may round float32 convolutions to TF32.
        compiled: whether torch.compile is let at it.
        plain_layout: whether it gets its inputs in torch's default memory layout.
        capture: whether it may be put into a CUDA graph.
    """

    call: Call
    tf32: bool = False
    compiled: bool = False
    plain_layout: bool = False
    capture: bool = True


@dataclass(frozen=True)
class Row:
    """A case of an op.

    Attributes:
        call: the op as this package has it.
        make: (sizes, seed, device) to its inputs.
        direction: what is timed: forward, backward, or both.
        needs: which inputs get a gradient; all where not given.
        types: the inputs' types, in their order; float32 where not given.
        linear: the backward needs no input, so does not read them.
        kinked: points meet the kinks of what is sampled, where a derivative jumps: float32 and
            float64 may be on two sides of one.
        goal: times the floor, or with ``goal_us`` microseconds; shown, never asserted.
        baselines: other ways, by name.
        missing: peers that there are none of, and why.
    """

    call: Call
    make: Callable[[Sizes, int, torch.device], list[Tensor]]
    direction: str = FORWARD
    needs: tuple[bool, ...] | None = None
    types: tuple[torch.dtype, ...] | None = None
    linear: bool = False
    kinked: bool = False
    goal: float | None = None
    goal_us: float | None = None
    baselines: dict[str, Contender] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def goal_text(self) -> str:
        """What was asked for, for people."""
        if self.goal_us:
            return f"{self.goal_us:.0f} us"
        return f"{self.goal:.2f} x the floor" if self.goal else ""

    @property
    def precision(self) -> str:
        """Of what is read first."""
        return _PRECISIONS[self.types[0]] if self.types else "fp32"

    def inputs(self, sizes: Sizes, batch: int, seed: int, device: torch.device) -> list[Tensor]:
        """A batch of volumes, each of its own seed."""
        made = zip(*(self.make(sizes, seed + i, device) for i in range(batch)), strict=True)
        types = self.types or [torch.float32] * 9
        return [_batched(x).to(t) for x, t in zip(made, types, strict=False)]

    def needed(self, inputs: list[Tensor]) -> tuple[bool, ...]:
        return self.needs or (True,) * len(inputs)


def _batched(tensors: tuple[Tensor, ...]) -> Tensor:
    # Of one, itself: concatenating would lose its memory layout.
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def released(call: Call, *, compiled: bool = True, **options: Any) -> dict[str, Contender]:
    """The released arithmetic as it is and compiled."""
    found = {RELEASED: Contender(call, **options)}
    if compiled:
        found[f"{RELEASED}, compiled"] = Contender(call, compiled=True, **options)
    return found


def with_peers(
    peers: dict[str, baselines.Call | str],
) -> tuple[dict[str, Contender], dict[str, str]]:
    # Some wait for the host in their backward pass: no graph.
    able = {k: Contender(v, capture=False) for k, v in peers.items() if not isinstance(v, str)}
    return able, {k: v for k, v in peers.items() if isinstance(v, str)}


def all_rows() -> dict[str, Row]:
    """Every case by name."""
    half, brain = torch.float16, torch.bfloat16
    warp = partial(Row, kernels.warp, OPS["warp"].make)
    both = OPS["warp_compose"].make
    lncc = partial(Row, partial(kernels.multi_window_lncc, windows=WINDOWS))
    images = OPS["multi_window_lncc"].make
    one = (True, False)
    warp_able, warp_missing = with_peers(baselines.warp_peers())
    lncc_able, lncc_missing = with_peers(baselines.lncc_peers(9))
    dense = {
        RELEASED: Contender(baselines.ncc),
        f"{RELEASED}, TF32": Contender(baselines.ncc, tf32=True),
        f"{RELEASED}, compiled": Contender(baselines.ncc, compiled=True),
        "separable, compiled": Contender(baselines.separable_ncc, compiled=True),
    }
    single = {
        name: Contender(partial(c.call, windows=(9,)), tf32=c.tf32)
        for name, c in dense.items()
        if not c.compiled
    }
    single["separable, compiled"] = Contender(
        partial(baselines.separable_ncc, windows=(9,)), compiled=True
    )
    rows = {
        "warp": warp(
            goal=1.25, baselines=released(baselines.warp) | warp_able, missing=warp_missing
        ),
        "warp, fp16 image": warp(types=(half, torch.float32)),
        "warp, bf16 image": warp(types=(brain, torch.float32)),
        "warp, by displacement": warp(
            BACKWARD, (False, True), goal=1.5, baselines=released(baselines.warp)
        ),
        "warp, by both": warp(
            BACKWARD, goal=2.5, baselines=released(baselines.warp, compiled=False)
        ),
        "warp, fp16 image, by displacement": warp(
            BACKWARD, (False, True), types=(half, torch.float32)
        ),
        "compose": Row(
            kernels.compose, OPS["compose"].make, goal=1.25, baselines=released(baselines.compose)
        ),
        "compose, by both": Row(
            kernels.compose, OPS["compose"].make, BACKWARD,
            baselines=released(baselines.compose, compiled=False),
        ),
        "warp_compose": Row(
            kernels.warp_compose, both, goal=1.25,
            baselines=released(baselines.warp_compose, compiled=False),
        ),
        "warp_compose, fp16 image": Row(
            kernels.warp_compose, both, types=(half, torch.float32, torch.float32)
        ),
        "warp_compose, half-size field": Row(
            OPS["warp_compose coarse"].call, OPS["warp_compose coarse"].make,
            baselines=released(baselines.warp_compose_coarse, compiled=False),
        ),
        "warp_compose, by all": Row(
            kernels.warp_compose, both, BACKWARD,
            baselines=released(baselines.warp_compose, compiled=False),
        ),
        "warp_compose, half-size field, by all": Row(
            OPS["warp_compose coarse"].call, OPS["warp_compose coarse"].make, BACKWARD, kinked=True,
            baselines=released(baselines.warp_compose_coarse, compiled=False),
        ),
    }  # fmt: skip
    for factor, name in ((2, "resize_displacement"), (4, "resize_displacement by 4")):
        resize = partial(baselines.resize, factor=factor)
        for direction in (FORWARD, BACKWARD):
            rows[f"resize by {factor}, {direction}"] = Row(
                OPS[name].call, OPS[name].make, direction, linear=True,
                baselines=released(resize, compiled=False),
            )  # fmt: skip
    rows |= {
        "lncc 11 9 7": lncc(images, baselines={k: dense[k] for k in list(dense)[:2]}),
        "lncc 11 9 7, by one": lncc(images, BOTH, one, baselines=dense),
        "lncc 11 9 7, by both": lncc(images, BOTH),
        "lncc 11 9 7, fp16, by one": lncc(images, BOTH, one, types=(half, half)),
        "lncc 11 9 7, bf16, by one": lncc(images, BOTH, one, types=(brain, brain)),
        # What training and refinement run: value and gradient from one pass.
        "weighted lncc, by one": Row(
            OPS["weighted_lncc"].call, images, BOTH, one, goal_us=450,
            baselines={name: Contender(_weighted(c.call), tf32=c.tf32) for name, c in dense.items()
                       if not c.compiled},
        ),
        "lncc 9, by one": Row(
            partial(kernels.multi_window_lncc, windows=(9,)), images, BOTH, one,
            baselines=single | lncc_able, missing=lncc_missing,
        ),
        "diffusion": Row(
            kernels.diffusion, OPS["diffusion"].make, baselines=released(baselines.smoothness)
        ),
        "diffusion, by displacement": Row(
            kernels.diffusion, OPS["diffusion"].make, BACKWARD,
            baselines=released(baselines.smoothness, compiled=False),
        ),
        "diffusion, loss and gradient": Row(
            kernels.diffusion_with_gradient, OPS["diffusion"].make, goal=1.25,
            baselines=released(baselines.smoothness_with_gradient, compiled=False),
        ),
    }  # fmt: skip
    for name, call in (
        ("norm_activate", baselines.norm_activate),
        ("upsample_concat", baselines.upsample_concat),
    ):
        case = OPS[name]
        for direction, types in itertools.product((FORWARD, BACKWARD), ((brain,) * 2, None)):
            width = "bf16" if types else "fp32"
            compiled = types is not None and name == "norm_activate"
            rows[f"{name}, {width}, {direction}"] = Row(
                case.call, case.make, direction, types=types, linear=name == "upsample_concat",
                baselines=released(call, compiled=compiled, plain_layout=True),
            )  # fmt: skip
    return rows


def _weighted(means: Call) -> Call:
    """The sum that `ulae_rt.kernels.weighted_lncc` gives, of another way to find the means."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        # Numbers, not a tensor of them: bringing that to a GPU could not be part of a graph.
        parts = outputs_of(means(x, y))[0].unbind()
        return torch.stack([w * part for w, part in zip(WEIGHTS, parts, strict=True)]).sum()

    return total


def prepared(row: Row, contender: Contender, call: Call, inputs: list[Tensor]) -> gpu_timing.Run:
    """What is timed: the outputs, the gradients, or both, in this order."""
    if contender.plain_layout:
        inputs = [x.contiguous() for x in inputs]
    leaves = [
        x.detach().requires_grad_(need and row.direction != FORWARD)
        for x, need in zip(inputs, row.needed(inputs), strict=True)
    ]
    wanted = [x for x in leaves if x.requires_grad]
    torch.backends.cudnn.allow_tf32 = contender.tf32

    def forward() -> list[Tensor]:
        torch.backends.cudnn.allow_tf32 = contender.tf32
        with torch.set_grad_enabled(bool(wanted)):
            return outputs_of(call(*leaves))

    if row.direction == FORWARD:
        return forward
    outputs = forward()
    grads = cotangents(outputs)

    def backward(of: list[Tensor], keep: bool) -> list[Tensor]:
        torch.backends.cudnn.allow_tf32 = contender.tf32
        return list(torch.autograd.grad(of, wanted, grads, retain_graph=keep))

    if row.direction == BACKWARD:
        return lambda: backward(outputs, True)

    def both() -> list[Tensor]:
        results = forward()
        return [*(x.detach() for x in results), *backward(results, False)]

    return both


def in_float64(row: Row, inputs: list[Tensor]) -> list[Tensor]:
    """What the row's result should be: the reference, on the same numbers."""
    with implementation("reference"):
        run = prepared(row, Contender(row.call), row.call, [x.double() for x in inputs])
        return [x.detach() for x in run()]


def error_of(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative RMS error among the results."""
    if len(found) != len(truth):
        return math.inf
    worst = 0.0
    for actual, expected in zip(found, truth, strict=True):
        off = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)
        worst = max(worst, float(off.nan_to_num(nan=math.inf)))
    return worst


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def traffic(row: Row, inputs: list[Tensor], results: list[Tensor]) -> int:
    """Bytes that have to move: every tensor read or written, once."""
    needed = [x for x, need in zip(inputs, row.needed(inputs), strict=True) if need]
    if row.direction == FORWARD:
        return size(inputs) + size(results)
    if row.direction == BACKWARD:
        with torch.no_grad():
            outputs = outputs_of(row.call(*inputs))
        return size(outputs) + (0 if row.linear else size(inputs)) + size(needed)
    return size(inputs) + size(results)


def contenders(row: Row, on_gpu: bool) -> Iterator[tuple[str, Contender]]:
    yield PACKAGE, Contender(row.call)
    for name, contender in row.baselines.items():
        if on_gpu or not (contender.compiled or contender.tf32):
            yield name, contender


def measured(row: Row, sizes: Sizes, batch: int, rounds: int) -> Measured:
    """Error, cold and hot seconds of every contender, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    found = {name: Outcome("left out", why) for name, why in row.missing.items()}
    timed: dict[str, gpu_timing.Timed] = {}
    moved = None
    with settled(), gpu_timing.own_stream(device):
        first = row.inputs(sizes, batch, 1, device)
        count = gpu_timing.sets_of(first)
        sets = [first, *(row.inputs(sizes, batch, 10 * seed, device) for seed in range(1, count))]
        truth = in_float64(row, first)
        errors: dict[str, float] = {}
        for name, contender in contenders(row, on_gpu):
            call = contender.call
            if contender.compiled:
                call = torch.compile(call, dynamic=False)
            try:
                entry = gpu_timing.Timed(
                    partial(prepared, row, contender, call), sets, capture=contender.capture
                )
            except Exception as error:  # a peer of another version, a graph that gives up
                found[name] = Outcome("failed", f"{type(error).__name__}: {error}")
                continue
            errors[name] = error_of(entry.first, truth)
            timed[name] = entry
        if PACKAGE in timed:
            moved = traffic(row, first, timed[PACKAGE].first)
            allowed = GATES[row.types[0] if row.types else torch.float32]
            if row.kinked:  # no further off than what a user has today
                allowed = max(allowed, errors.get(RELEASED, 0.0))
            if not errors[PACKAGE] <= allowed:
                off = f"off by {errors[PACKAGE]:.1e} of the result, at most {allowed:.1e} allowed"
                found[PACKAGE] = Outcome("wrong", off, error=errors[PACKAGE])
                del timed[PACKAGE]
        rounds = GPU_ROUNDS * rounds if on_gpu else rounds
        seconds = {
            state: interleaved(
                {name: partial(entry.seconds, state) for name, entry in timed.items()},
                rounds,
                SECONDS_PER_STATE,
            )
            for state in (("cold", "hot") if on_gpu else ("cold",))
        }
    for name, entry in timed.items():
        hot = seconds["hot"][name] if on_gpu else []
        found[name] = Outcome(
            seconds=seconds["cold"][name], hot=hot, error=errors[name], how=entry.how
        )
    return Measured(found, bytes=moved)


@contextmanager
def settled() -> Iterator[None]:
    """torch's settings as a case wants them, and as they were afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch._functorch.config.donated_buffer
    # A compiled backward pass may else use up what it is to be run on again.
    torch._functorch.config.donated_buffer = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch._functorch.config.donated_buffer = before
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cases(setting: Setting) -> list[Case]:
    on_gpu = setting.device == "cuda"
    sizes = SMALL if setting.small else FULL if on_gpu else ON_CPU
    found = []
    for name, row in all_rows().items():
        half = row.types is not None and torch.float16 in row.types
        if half and not on_gpu:  # no CPU has fast fp16
            continue
        names = [each for each, _ in contenders(row, on_gpu)]
        found.append(
            Case(
                NAME,
                re.sub(r", (fp|bf)\d\d( image)?", "", name),  # the case says it
                (*names, *row.missing),
                partial(measured, row, sizes, 1),
                sizes,
                precision=row.precision,
                baseline=RELEASED if RELEASED in names else "",
                goal=row.goal_text,
                error_unit="of the result, root mean square",
            )
        )
    return found
