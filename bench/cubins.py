"""Compile, without a GPU, the kernels that the stages of ``make gpu-quarter`` launch on one.

``make gpu-cubins`` runs it with the Python, torch and Triton of the machine that will be borrowed,
and leaves Triton's cache in ``build/triton-cache``, to be carried there. On a GPU the minutes in
which kernels are compiled are paid for; here they cost nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from _support.kernels import deterministic
from _support.ops import OPS, forward_backward, outputs_of
from harness import carried
from harness.case import FULL, Sizes
from harness.files import write_whole
from suites import kernels as kernel_suite
from suites import network as network_suite
from ulae_rt.kernels import _launch, resources
from ulae_rt.losses import registration_loss
from ulae_rt.model import blocks
from ulae_rt.model.blocks import channel_multiple
from ulae_rt.model.checkpoint import PRECISIONS
from ulae_rt.model.program import InferenceProgram
from ulae_rt.refinement import refine, schedule

Form = Callable[[], object]
CPU = torch.device("cpu")


def forms() -> Iterator[tuple[str, Form]]:
    """What the stages launch, by name: each call launches its kernels in the forms they have."""
    for case in resources.cases():
        for backward in (False, True):
            yield f"case {case.name}", partial(case.run, backward)
    for name in OPS:
        yield f"op {name}", partial(op, name, FULL)
    for name, row in kernel_suite.all_rows().items():
        yield f"row {name}", partial(row_once, row)
    for name, dtype in PRECISIONS.items():
        for fused in (False, True):
            yield f"network {name}{', fused' * fused}", partial(predict, name, fused)
        if name != "fp16":  # training has the other two
            yield f"training {name}", partial(train, dtype)
    yield "refinement", refine_once


def op(name: str, sizes: Sizes) -> None:
    """An op forward and backward, and in the deterministic mode."""
    case = OPS[name]
    inputs = case.make(sizes, 1, CPU)
    forward_backward(case.call, inputs)
    with deterministic():
        forward_backward(case.call, inputs)


def row_once(row: kernel_suite.Row) -> None:
    """What the benchmarks time of an op, and its outputs without gradients."""
    inputs = row.inputs(FULL, 1, 1, CPU)
    kernel_suite.prepared(row, kernel_suite.Contender(row.call), row.call, inputs)()
    with torch.no_grad():
        outputs_of(row.call(*inputs))


def predict(precision: str, fused: bool) -> None:
    """One pair through the network, as weights are run."""
    multiple = on_gpu(PRECISIONS[precision] or torch.float32)
    net = network_suite.package("paper", None)
    with torch.inference_mode():
        InferenceProgram(net, precision, multiple, fused=fused)(*pair())


def train(precision: torch.dtype | None) -> None:
    """One pair through the network, its loss and back."""
    net = network_suite.package("paper", precision).train()
    moving, fixed = pair()
    out = net.predict(moving, fixed)
    registration_loss(out.moved, fixed, out.disp).total.backward()


def refine_once() -> None:
    """One iteration of the refinement, from a displacement at half size."""
    refine(*pair(), torch.zeros(1, 3, *(size // 2 for size in FULL)), schedule(1))


def pair() -> tuple[Tensor, Tensor]:
    moving, fixed = (torch.zeros(1, 1, *FULL) for _ in range(2))
    return moving, fixed


def on_gpu(dtype: torch.dtype, _device: str = "cuda") -> int:
    """What `channel_multiple` says of a GPU."""
    return channel_multiple(dtype, "cuda")


class _Unfilled(torch.autograd.Function):
    """A convolution's result and gradients as memory that nobody fills: only shapes are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        shape = (x.shape[0], weight.shape[0], *sizes)
        return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


def unfilled_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """In place of `F.conv3d`, which would take minutes on a CPU."""
    stride, padding, dilation = (
        value if isinstance(value, tuple | list) else (value,) * 3
        for value in (stride, padding, dilation)
    )
    sizes = [
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    result: Tensor = _Unfilled.apply(x, weight, sizes)
    return result


class Compiled:
    """What was compiled.

    Attributes:
        kernels: names of the new ones, by the call's that launched them first.
        seconds: that their compilation took, which a GPU machine is spared; and their launchers'.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, list[str]] = {}
        self.seconds = {"kernels": 0.0, "launchers": 0.0}


def compile_forms(chosen: Iterable[tuple[str, Form]], arch: int) -> Compiled:
    """Compile what the calls launch, without running it."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    known: set[str] = set()
    names: list[str] = []
    new = Compiled()

    def compile_only(function: Any, *arguments: Any, **options: Any) -> None:
        started = time.perf_counter()
        compiled = run(function, *arguments, **{**options, "warmup": True})
        if compiled.hash not in known:
            done = time.perf_counter()
            known.add(compiled.hash)
            names.append(compiled.name)
            build_launcher(compiled)
            new.seconds["kernels"] += done - started
            new.seconds["launchers"] += time.perf_counter() - done

    as_on_gpu = mock.patch.multiple(
        _launch,
        architecture=lambda tensor: arch,
        unavailable=lambda device: None,
        uses_triton=lambda tensor: True,
    )
    driver.set_active(resources._Driver(arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(F, "conv3d", unfilled_conv3d),
        mock.patch.object(blocks, "channel_multiple", on_gpu),
        as_on_gpu,
        stand_in_libcuda(),
    ):
        build_utilities()
        for name, call in chosen:
            names.clear()
            call()
            new.kernels[name] = [*new.kernels.get(name, []), *names]
    return new


# What Triton builds with the C compiler at a kernel's first launch: as many seconds as the kernels
# themselves. It is only linked here, for want of a driver to load it with.
_not_loaded = partial(
    mock.patch, "triton.runtime.build._load_module_from_path", lambda name, path: mock.MagicMock()
)


def build_launcher(compiled: Any) -> None:
    """The C function that launches a kernel; Triton 3.7 has one for all of them."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with _not_loaded():
            driver.CudaLauncher(compiled.src, compiled.metadata)


def build_utilities() -> None:
    """Triton's own module that talks to the driver."""
    from triton.backends.nvidia import driver

    with _not_loaded():
        driver.CudaUtils()


@contextmanager
def stand_in_libcuda() -> Iterator[None]:
    """An empty library of the driver's name, to link with."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
        subprocess.run([*command, "-o", f"{folder}/libcuda.so.1"], check=True)
        with mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}):
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="90 for sm_90 (%(default)s)")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET is 1, which compiles nothing; unset it", file=sys.stderr)
        return 1
    if shutil.which("gcc") is None:
        print("error: there is no gcc, which kernels are launched by; install it", file=sys.stderr)
        return 1
    cache = carried.CACHE
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    # Machine code alone: what it was made from is eight times as large.
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    new = compile_forms(forms(), arguments.arch)
    for source in cache.rglob("*.source"):
        source.unlink()
    for name, kernels in new.kernels.items():
        if kernels:
            print(f"{name}: {', '.join(kernels)}")
    about = {
        **carried.key(arguments.arch),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "kernels": sum(map(len, new.kernels.values())),
        "seconds": {name: round(spent, 1) for name, spent in new.seconds.items()},
    }
    write_whole(cache / carried.KEY, json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    print(
        f"{about['kernels']} kernels for sm_{arguments.arch} by Triton {about['triton']}, "
        f"{len(carried.folders(cache))} folders, {size / 1e6:.1f} MB in {cache}; seconds: "
        f"{new.seconds['kernels']:.0f} for the kernels, {new.seconds['launchers']:.0f} for what "
        "launches them"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
