"""The stages of ``make gpu-quarter``, each run by name in a process of its own; see `quarter`."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before a kernel is defined: a rehearsal on a CPU runs them in Triton's interpreter, and only
    # where a stage asks for them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ULAE_RT_KERNELS", "reference")

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from _support.interpreter import quicken
from _support.kernels import deterministic, implementation
from _support.ops import OPS, cotangents, forward_backward
from harness import carried, gpu_timing, machine
from harness.case import FULL, Outcome, Sizes
from harness.evidence import Evidence
from harness.record import ROOT
from suites import kernels as kernel_suite
from suites import network as network_suite
from suites import training as training_suite
from ulae_rt.convolutions import exact_convolutions

SMALL: Sizes = (8, 16, 8)
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
ROUNDS = 20
LONGEST_KERNELS = 30

Run = Callable[[], Any]


class Setting:
    """What a stage works on."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.sizes = SMALL if small else FULL
        self.rounds = 2 if small else ROUNDS


def facts(evidence: Evidence, setting: Setting) -> None:
    """What this machine is, and its ceilings."""
    evidence.add("machine", **machine.facts())
    evidence.add("versions", **machine.versions())
    evidence.add("copy", bytes_per_second=gpu_timing.copy_bandwidth(setting.device))
    for name, rate in machine.ceilings(setting.device)[1].items():
        evidence.add("matmul", precision=name, flops_per_second=rate)
    major, minor = torch.cuda.get_device_capability() if setting.on_gpu else (9, 0)
    evidence.add("carried kernels", **carried.compared(carried.CACHE, 10 * major + minor))


def ops(evidence: Evidence, setting: Setting) -> None:
    """Every op forward and backward: its error and the reference's, and the same bits again."""
    for name, case in OPS.items():
        inputs = case.make(setting.sizes, 1, setting.device)
        with implementation("reference"), exact_convolutions():
            truth = forward_backward(case.call, [x.double() for x in inputs])
            grads = cotangents(truth[: len(truth) - len(inputs)])
            plain = forward_backward(case.call, inputs, [x.float() for x in grads])
        with implementation("triton"):
            results = forward_backward(case.call, inputs, [x.float() for x in grads])
            with deterministic():
                first = forward_backward(case.call, inputs)
                again = all(
                    torch.equal(a, b)
                    for _ in range(2 if setting.small else 10)
                    for a, b in zip(forward_backward(case.call, inputs), first, strict=True)
                )
        evidence.add(
            name,
            sizes=setting.sizes,
            kernel_rms=[relative_rms(*both) for both in zip(results, truth, strict=True)],
            reference_rms=[relative_rms(*both) for both in zip(plain, truth, strict=True)],
            same_bits_again=again,
            kinked=case.kinked,
        )


def tests(evidence: Evidence, setting: Setting) -> None:
    """The kernels' own tests; a row for each that fails as soon as it does."""
    folder = ROOT / "tests" / "kernels"
    files = [*sorted(folder.glob("test_*_kernel.py")), folder / "test_gpu.py"]
    # In a rehearsal, one quick file of them.
    chosen = [folder / "test_diffusion_kernel.py"] if setting.small else files
    run_pytest(evidence, chosen, ["-k", "not two_billion"] if not setting.small else [])


def large(evidence: Evidence, setting: Setting) -> None:
    """The tests of volumes of more than 2^31 elements."""
    run_pytest(evidence, [ROOT / "tests" / "kernels" / "test_gpu.py"], ["-k", "two_billion"])


def run_pytest(evidence: Evidence, files: list[Path], flags: list[str]) -> None:
    environment = {**os.environ, "ULAE_RT_EVIDENCE": str(evidence.path.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default"]
    command += ["-p", "harness.pytest_evidence"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    done = subprocess.run(
        [*command, *map(str, files), *flags],
        cwd=ROOT, env=environment | {"ULAE_RT_STAGE": evidence.stage}, check=False,
    )  # fmt: skip
    evidence.add("pytest", status=done.returncode)


def network(evidence: Evidence, setting: Setting) -> None:
    """One pair through the network, device to device; then each of its convolutions alone."""
    sizes = (32, 32, 32) if setting.small else setting.sizes
    pair = network_suite.images(sizes, 1, str(setting.device))
    with exact_convolutions(), torch.inference_mode():
        truth = network_suite.package("paper", None).to(setting.device).predict(*pair).disp.clone()
    for name, dtype in PRECISIONS.items():
        if name == "fp16" and not setting.on_gpu:
            continue
        net = network_suite.package("paper", dtype).to(setting.device)
        for kind, run in ways(net, name, pair).items():
            with (
                exact_convolutions(),
                torch.inference_mode(),
                gpu_timing.own_stream(setting.device),
            ):
                how = "eager"
                if kind != "eager":
                    run, how = captured(run, setting)
                seconds = times(run, setting)
                off = voxels_off(name, run(), truth)
            evidence.add(f"{kind}, {name}", how=how, seconds=seconds, median=median(seconds), **off)
        host_to_host(evidence, net, name, pair, truth, setting)
        if name != "fp32" or setting.small:
            with exact_convolutions(), torch.inference_mode():
                run = ways(net, name, pair)["program"]
                profiled(evidence, f"kernels, {name}", run, setting)
    for name, dtype in PRECISIONS.items():
        if name == "fp16" and not setting.on_gpu:
            continue
        convolutions(evidence, name, dtype, pair, setting)


def ways(net: Any, precision: str, pair: list[Tensor]) -> dict[str, Run]:
    """The network's displacement, device to device, in every way that may be the fastest.

    ``program`` is what weights are run by. Beside it, what decides about it: concatenations of 18
    channels as they are, and each moving block as one kernel.
    """
    from ulae_rt.model.blocks import channel_multiple
    from ulae_rt.model.program import InferenceProgram

    device = pair[0].device
    multiple = channel_multiple(PRECISIONS[precision] or torch.float32, device.type)
    programs = {"program": InferenceProgram(net, precision, multiple)}
    if multiple > 1:
        programs["18 channels"] = InferenceProgram(net, precision)
    programs["fused moving blocks"] = InferenceProgram(net, precision, multiple, fused=True)
    runs: dict[str, Run] = {"eager": partial(net.displacement, *pair)}
    for name, program in programs.items():
        runs[name] = partial(program.to(device).displacement, *pair)
    return runs


def host_to_host(
    evidence: Evidence,
    net: Any,
    precision: str,
    pair: list[Tensor],
    truth: Tensor,
    setting: Setting,
) -> None:
    """The displacement as `Registrar` gets it: arrays in, arrays out, copies included."""
    from ulae_rt.registration.network import TorchBackend

    arrays = dict(zip(("moving", "fixed"), (x.cpu().numpy() for x in pair), strict=True))
    started = time.perf_counter()
    backend = TorchBackend(net, setting.device.type, precision)
    disp = backend.run(arrays, ["disp"])["disp"]
    first = time.perf_counter() - started
    seconds = []
    for _ in range(setting.rounds):
        started = time.perf_counter()
        backend.run(arrays, ["disp"])
        seconds.append(time.perf_counter() - started)
    off = voxels_off(precision, torch.from_numpy(disp), truth.cpu())
    evidence.add(
        f"host to host, {precision}", how=f"first after {first:.2f} s", seconds=seconds,
        median=median(seconds), **off,
    )  # fmt: skip


def voxels_off(precision: str, disp: Tensor, truth: Tensor) -> dict[str, Any]:
    """How far a displacement is from the network's in float32, and whether that is right."""
    off = (disp.float() - truth).norm(dim=1)
    mean, largest = float(off.mean()), float(off.max())
    if precision == "fp32":
        right = largest <= network_suite.FP32_TOLERANCE_VOXELS
    else:
        right = mean <= network_suite.HALF_TOLERANCE_VOXELS
    return {"voxels_off_mean": mean, "voxels_off_largest": largest, "right": right}


def captured(run: Run, setting: Setting) -> tuple[Run, str]:
    """The run as a CUDA graph, where there is CUDA and it can be one."""
    for _ in range(3):
        run()
    if not setting.on_gpu:
        return run, "no graph"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = run()
    except RuntimeError as error:
        return run, f"no graph: {error}"

    def replay() -> Any:
        graph.replay()
        return result

    return replay, "graph"


def times(run: Run, setting: Setting) -> list[float]:
    """Seconds of some runs, between events on the device."""
    for _ in range(1 if setting.small else 5):
        run()
    return [gpu_timing.seconds_of(run, setting.device) for _ in range(setting.rounds)]


def profiled(evidence: Evidence, what: str, run: Run, setting: Setting) -> None:
    """The device's kernels of one run, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        run()
        if setting.on_gpu:
            torch.cuda.synchronize()
    totals = [
        (event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total, event)
        for event in recorded.key_averages()
    ]
    totals.sort(key=lambda total: -total[0])
    evidence.add(
        what,
        microseconds=sum(spent for spent, _ in totals),
        launches=sum(event.count for _, event in totals),
        longest=[[event.key[:120], us, event.count] for us, event in totals[:LONGEST_KERNELS]],
    )


class _Convolutions(TorchFunctionMode):
    """Counts the convolutions of a run by shapes and options."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv3d:
            image, weight, *rest = args
            names = ("bias", "stride", "padding", "dilation")
            options = dict(zip(names, rest, strict=False)) | kwargs
            options.pop("bias", None)
            kept = tuple(sorted((name, _hashable(value)) for name, value in options.items()))
            self.seen[tuple(image.shape), tuple(weight.shape), kept] += 1
        return func(*args, **kwargs)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def convolutions(
    evidence: Evidence, name: str, dtype: torch.dtype | None, pair: list[Tensor], setting: Setting
) -> None:
    """Each shape of convolution alone; 18 channels also as 24, a multiple of 8."""
    net = network_suite.package("paper", dtype).to(setting.device)
    run = ways(net, name, pair)["eager"]
    with exact_convolutions(), torch.inference_mode(), _Convolutions() as counted:
        run()
    wide = torch.float32 if dtype is None else dtype
    layout = torch.channels_last_3d
    for (image_shape, weight_shape, options), count in counted.seen.items():
        widths = [18, 24] if weight_shape[1] in (18, 24) else [weight_shape[1]]
        for channels in widths:
            shapes = [(image_shape[0], channels, *image_shape[2:])]
            shapes += [(weight_shape[0], channels, *weight_shape[2:])]
            image, weight = (
                torch.rand(shape, device=setting.device).to(wide).contiguous(memory_format=layout)
                for shape in shapes
            )
            run = partial(F.conv3d, image, weight, None, **dict(options))
            with exact_convolutions(), torch.inference_mode():
                seconds = times(run, replace_rounds(setting, 2 if setting.small else 8))
                kernel = longest_kernel(run, setting)
            evidence.add(
                f"convolution, {name}", image=shapes[0], weight=shapes[1], options=dict(options),
                count=count, median=median(seconds), least=min(seconds), kernel=kernel,
            )  # fmt: skip


def replace_rounds(setting: Setting, rounds: int) -> Setting:
    """The setting with another number of rounds."""
    changed = Setting(setting.small)
    changed.rounds = rounds
    return changed


def longest_kernel(run: Run, setting: Setting) -> str:
    """The name of the kernel that a run spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    if not setting.on_gpu:
        return ""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return str(events[0].key) if events else ""


def goals(evidence: Evidence, setting: Setting) -> None:
    """The ops that have a goal, cold and hot, beside the eager ways a user has."""
    for name, row in kernel_suite.all_rows().items():
        if not (row.goal or row.goal_us):
            continue
        eager = {key: way for key, way in row.baselines.items() if not way.compiled}
        row = replace(row, baselines=eager, missing={})
        try:
            measured = kernel_suite.measured(row, setting.sizes, 1, 1 if setting.small else 3)
        except Exception as error:  # the other rows are still worth the machine's time
            evidence.add(name, failed=f"{type(error).__name__}: {error}")
            continue
        for contender, outcome in measured.outcomes.items():
            values = {"goal": row.goal_text, "bytes": measured.bytes}
            add_outcome(evidence, name, contender, outcome, **values)


def training(evidence: Evidence, setting: Setting) -> None:
    """One step of training, as it is released and as it is here."""
    sizes = training_suite.SMALL if setting.small else setting.sizes
    for case in training_suite.cases(training_suite.Setting(setting.small, 1, setting.device.type)):
        if "compiled" in case.name:
            continue
        measured = case.measure(1 if setting.small else 5)
        for contender, outcome in measured.outcomes.items():
            add_outcome(evidence, case.name, contender, outcome, sizes=sizes)


def add_outcome(
    evidence: Evidence, what: str, contender: str, outcome: Outcome, **values: Any
) -> None:
    """A contender's row."""
    middle = median(outcome.seconds) if outcome.seconds else None
    evidence.add(
        what, contender=contender, status=outcome.status, why=outcome.why,
        seconds=outcome.seconds, median=middle, hot=outcome.hot, error=outcome.error,
        gpu_peak_gb=outcome.gpu_peak_gb, how=outcome.how, **values,
    )  # fmt: skip


def counters(evidence: Evidence, setting: Setting) -> None:
    """What ``ncu`` counts of each op's kernels, once; run in a process of its own."""
    tool = shutil.which("ncu")
    if tool is None or not setting.on_gpu:
        evidence.add("ncu", left_out="there is no ncu" if tool is None else "there is no GPU")
        return
    command = [tool, "--clock-control", "none", "--set", "basic", "--csv", "--page", "details"]
    command += ["--kernel-name-base", "function", "--launch-count", "40"]
    command += [sys.executable, __file__, "once", str(evidence.path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('"'):
                evidence.add("ncu", line=line.strip())
    evidence.add("ncu", status=process.returncode)


def once(evidence: Evidence, setting: Setting) -> None:
    """Every op once, for `counters`."""
    for case in OPS.values():
        with implementation("triton"):
            forward_backward(case.call, case.make(setting.sizes, 1, setting.device))


def program(evidence: Evidence, setting: Setting) -> None:
    """The ``.pt2`` program in fp16: seconds to build it, and one pair through it."""
    from ulae_rt.export import pt2

    sizes = (32, 32, 32) if setting.small else setting.sizes
    precision = "fp16" if setting.on_gpu else "fp32"
    target = "cpu"
    if setting.on_gpu:
        target = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}"
    net = network_suite.package("paper", None)
    started = time.perf_counter()
    built = pt2.build(net, sizes, precision=precision, batch=1, target=target)
    evidence.add("built", seconds=time.perf_counter() - started, megabytes=len(built.content) / 1e6)
    path = evidence.path.parent / "net.pt2"
    path.write_bytes(built.content)
    try:
        if setting.on_gpu:
            loaded: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        else:
            loaded = torch.export.load(path).module(check_guards=False)
    finally:
        path.unlink()
    pair = network_suite.images(sizes, 1, str(setting.device))
    with exact_convolutions(), torch.inference_mode(), gpu_timing.own_stream(setting.device):
        run, how = captured(partial(loaded, *pair), setting)
        seconds = times(run, setting)
    evidence.add("one pair", precision=precision, how=how, seconds=seconds, median=median(seconds))


def refinement(evidence: Evidence, setting: Setting) -> None:
    """Ten iterations on a pair of textured volumes, all on the device."""
    from ulae_rt.refinement import refine, schedule

    sizes = (32, 32, 32) if setting.small else setting.sizes
    moving, fixed = training_suite.pair(sizes)
    half = [size // 2 for size in sizes]
    disp = torch.zeros(1, 3, *half, device=setting.device)
    for number in range(3):
        started = time.perf_counter()
        refined = refine(moving, fixed, disp, schedule(10))
        if setting.on_gpu:
            torch.cuda.synchronize()
        report = refined.report
        evidence.add(
            "ten iterations", number=number, seconds=time.perf_counter() - started,
            iterations=report.iterations, before=report.lncc_before, after=report.lncc_after,
        )  # fmt: skip


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Of the difference, relative to the expected values'."""
    off = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)
    return float(off)


STAGES: dict[str, Callable[[Evidence, Setting], None]] = {
    stage.__name__: stage
    for stage in (
        facts,
        ops,
        tests,
        network,
        goals,
        training,
        counters,
        program,
        refinement,
        large,
        once,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(arguments.small)
    if not setting.on_gpu:
        quicken()
        torch.set_num_threads(1)
    evidence = Evidence(arguments.folder, arguments.stage)
    try:
        STAGES[arguments.stage](evidence, setting)
    except Exception as error:
        evidence.add("failed", error=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
