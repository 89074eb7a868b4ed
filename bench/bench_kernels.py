"""Every op against its floor and against what a user has today, one row a case.

The floor is what must be read and written, once, at the copy bandwidth measured in the same run.
A contender is checked against float64 before it is timed, and this package's must be right; a
baseline's error is printed beside its time.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import baselines
import gpu_timing
import pytest
import timing
import torch
import torch._functorch.config
from torch import Tensor

from _support.kernels import implementation
from _support.ops import OPS, WINDOWS, cotangents, outputs_of
from _support.volumes import Sizes
from ulae_rt import kernels
from ulae_rt.conventions import FULL_SHAPE

# A contender's warning must not throw away what was measured.
pytestmark = pytest.mark.filterwarnings("default")

SMALL: Sizes = (8, 16, 8)
PACKAGE = "ulae_rt"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
# A row whose contenders take seconds a round gets fewer rounds than it was asked for, at least 3.
SECONDS_PER_STATE = 4.0
# Relative RMS error above which this package's result counts as wrong.
GATES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}

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
        goal: times the floor, or with ``goal_us`` microseconds; printed, never asserted.
        baselines: other ways, by name.
        missing: peers that there are none of, and why.
    """

    call: Call
    make: Callable[[Sizes, int, torch.device], list[Tensor]]
    direction: str = FORWARD
    needs: tuple[bool, ...] | None = None
    types: tuple[torch.dtype, ...] | None = None
    linear: bool = False
    goal: float | None = None
    goal_us: float | None = None
    baselines: dict[str, Contender] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def inputs(self, sizes: Sizes, seed: int, device: torch.device) -> list[Tensor]:
        made = self.make(sizes, seed, device)
        return [x.to(t) for x, t in zip(made, self.types or [torch.float32] * 9, strict=False)]

    def needed(self, inputs: list[Tensor]) -> tuple[bool, ...]:
        return self.needs or (True,) * len(inputs)


def released(call: Call, *, compiled: bool = True, **options: Any) -> dict[str, Contender]:
    """The released arithmetic as it is and compiled."""
    found = {"released, eager": Contender(call, **options)}
    if compiled:
        found["released, compiled"] = Contender(call, compiled=True, **options)
    return found


def with_peers(
    peers: dict[str, baselines.Call | str],
) -> tuple[dict[str, Contender], dict[str, str]]:
    # Some wait for the host in their backward pass: no graph.
    able = {k: Contender(v, capture=False) for k, v in peers.items() if not isinstance(v, str)}
    return able, {k: v for k, v in peers.items() if isinstance(v, str)}


def all_rows(sizes: Sizes, device: torch.device) -> dict[str, Row]:
    half, brain = torch.float16, torch.bfloat16
    warp = partial(Row, kernels.warp, OPS["warp"].make)
    both = OPS["warp_compose"].make
    lncc = partial(Row, partial(kernels.multi_window_lncc, windows=WINDOWS))
    images = OPS["multi_window_lncc"].make
    one = (True, False)
    warp_able, warp_missing = with_peers(baselines.warp_peers(sizes, device))
    lncc_able, lncc_missing = with_peers(baselines.lncc_peers(9))
    dense = {
        "released, eager": Contender(baselines.ncc),
        "released, eager, TF32": Contender(baselines.ncc, tf32=True),
        "released, compiled": Contender(baselines.ncc, compiled=True),
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
            OPS["warp_compose coarse"].call, OPS["warp_compose coarse"].make, BACKWARD,
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
        "lncc 11 9 7, by one": lncc(images, BOTH, one, goal_us=450, baselines=dense),
        "lncc 11 9 7, by both": lncc(images, BOTH),
        "lncc 11 9 7, fp16, by one": lncc(images, BOTH, one, types=(half, half)),
        "lncc 11 9 7, bf16, by one": lncc(images, BOTH, one, types=(brain, brain)),
        "weighted lncc, by one": Row(OPS["weighted_lncc"].call, images, BOTH, one),
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


def measured(row: Row, sizes: Sizes, device: torch.device, rounds: int) -> dict[str, Any]:
    """Samples and error of every contender, in turn."""
    on_gpu = device.type == "cuda"
    first = row.inputs(sizes, 1, device)
    count = gpu_timing.sets_of(first)
    sets = [first, *(row.inputs(sizes, 10 * seed, device) for seed in range(1, count))]
    truth = in_float64(row, first)
    found: dict[str, Any] = {}
    timed: dict[str, gpu_timing.Timed] = {}
    for name, contender in contenders(row, on_gpu):
        call = contender.call
        if contender.compiled:
            call = torch.compile(call, dynamic=False)
        try:
            entry = gpu_timing.Timed(
                partial(prepared, row, contender, call), sets, capture=contender.capture
            )
        except Exception as error:
            if name == PACKAGE:
                raise
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        error = error_of(entry.first, truth)
        found[name] = {"error": error, "how": entry.how, "runs_per_sample": entry.count}
        if name == PACKAGE:
            width = row.types[0] if row.types else torch.float32
            if error > GATES[width]:
                # Nothing is timed that is not right.
                return {"contenders": found, "wrong": f"off by {error:.1e}"}
            moved = traffic(row, first, entry.first)
        timed[name] = entry
    round_seconds = sum(entry.sample_seconds for entry in timed.values())
    if round_seconds * rounds > SECONDS_PER_STATE:
        rounds = max(3, int(SECONDS_PER_STATE / round_seconds))
    for state in ("cold", "hot"):
        samples = timing.interleaved(
            {name: partial(entry.seconds, state) for name, entry in timed.items()}, rounds
        )
        for name, seconds in samples.items():
            found[name][state] = seconds
    return {"bytes": moved, "contenders": found}


def lines(name: str, row: Row, result: dict[str, Any], bandwidth: float) -> list[str]:
    """The row as text: this package first, the others by how much longer they take."""
    if "wrong" in result:
        return [f"{name:<40}WRONG, not timed: {result['wrong'].splitlines()[0][:100]}"]
    floor = result["bytes"] / bandwidth
    own = statistics.median(result["contenders"][PACKAGE]["cold"])
    own_hot = statistics.median(result["contenders"][PACKAGE]["hot"])
    out = []
    for contender, each in result["contenders"].items():
        label = name if contender == PACKAGE else f"  {contender}"
        if "failed" in each:
            out.append(f"{label:<40}failed: {each['failed'][:80]}")
            continue
        cold, hot = (statistics.median(each[state]) for state in ("cold", "hot"))
        text = (
            f"{label:<40}{cold * 1e6:>10.1f}{min(each['cold']) * 1e6:>10.1f}"
            f"{max(each['cold']) * 1e6:>10.1f}{hot * 1e6:>10.1f}"
        )
        if contender == PACKAGE:
            goal = f"{row.goal:.2f}" if row.goal else ""
            if row.goal_us:
                goal = f"{row.goal_us:.0f} us"
            text += (
                f"{result['bytes'] / cold / 1e9:>8.0f}{100 * floor / cold:>7.0f} %"
                f"{floor * 1e6:>9.1f}{cold / floor:>8.2f}{goal:>8}"
            )
        else:
            text += f"{'x':>8}{cold / own:>9.2f} cold,{hot / own_hot:>8.2f} hot"
        out.append(f"{text}  {each['how']}, off by {each['error']:.0e}")
    out += [f"  {peer:<38}{why[:90]}" for peer, why in row.missing.items()]
    return out


HEADER = (
    f"{'microseconds':<40}{'cold':>10}{'min':>10}{'max':>10}{'hot':>10}"
    f"{'GB/s':>8}{'of copy':>9}{'floor':>9}{'ratio':>8}{'goal':>8}"
)


def test_kernels(
    full: bool, rounds: int, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = FULL_SHAPE if full else SMALL
    if full and device.type == "cpu":
        pytest.skip("kernels are timed on a GPU; --sizes small runs this code on the CPU")
    chosen = request.config.getoption("--rows")
    allow_tf32, threads = torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    if not full:
        torch.set_num_threads(1)  # small volumes: a second thread only waits for the first
    # A compiled backward pass may else use up what it is to be run on again.
    torch._functorch.config.donated_buffer = False
    results: dict[str, Any] = {}
    report = []
    try:
        with gpu_timing.own_stream(device):
            bandwidth = gpu_timing.copy_bandwidth(device)
            rows = {k: v for k, v in all_rows(sizes, device).items() if chosen in k}
            for name, row in rows.items():
                try:
                    asked = 4 * rounds if device.type == "cuda" else rounds
                    result = measured(row, sizes, device, asked)
                except Exception as error:  # the other rows are still worth the machine's time
                    result = {"wrong": f"{type(error).__name__}: {error}"}
                results[name] = result | {"goal": row.goal, "goal_us": row.goal_us}
                results[name] |= {"missing": row.missing}
                report += lines(name, row, result, bandwidth)
                with capsys.disabled():  # as it goes: a run that is cut short has told something
                    print("\n".join(["", *lines(name, row, result, bandwidth)]), end="")
                torch._dynamo.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.set_num_threads(threads)
    if full:
        timing.record(
            "kernels", {"copy_bytes_per_second": bandwidth, "sizes": sizes, "ops": results}
        )
    with capsys.disabled():
        print(f"\n\nops, {'x'.join(map(str, sizes))}, {device}, copy {bandwidth / 1e9:.0f} GB/s")
        print("\n".join([HEADER, *report]))
    wrong = [name for name, result in results.items() if "wrong" in result]
    assert not wrong, f"wrong, not timed: {', '.join(wrong)}"
