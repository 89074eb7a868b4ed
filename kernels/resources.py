"""Registers, spills and memory accesses of every Triton kernel, read from its machine code.

``python -m ulae_rt.kernels.resources`` compiles what the public operations launch on a 1 mm scan,
forward and backward, for every architecture. It needs triton and no GPU: each launch is compiled
with the arguments, the specialisation and the configuration that it would have there, and not run.
It fails when a forward kernel spills.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ulae_rt import env, kernels
from ulae_rt.errors import BackendUnavailable, UlaeError
from ulae_rt.kernels import _launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
GRID = (160, 192, 160)

LEGEND = """\
stack: bytes of local memory a thread (spilled registers); local: instructions that access it
shared: bytes a program; conv: tiles that change hands between threads (layout conversions)
mma: instructions of the tensor cores
loads, stores: instructions on global memory x bits a thread moves with one
red, atom: atomics without and with a result to wait for"""


@dataclass(frozen=True)
class Case:
    """One call of a public operation, forward alone and then with its gradients.

    Attributes:
        name: what the table calls it.
        op: the operation.
        inputs: its tensors, never read.
        needs: which of them need a gradient, all by default.
        deterministic: under ``torch.use_deterministic_algorithms``.
    """

    name: str
    op: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    needs: tuple[bool, ...] | None = None
    deterministic: bool = False

    def run(self, backward: bool) -> None:
        """The call; ``backward``: with a gradient to every input that needs one."""
        needs = self.needs or (True,) * len(self.inputs)
        leaves = [
            tensor.detach().requires_grad_(backward and need)
            for tensor, need in zip(self.inputs, needs, strict=True)
        ]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            found = self.op(*leaves)
            every = found if isinstance(found, tuple) else (found,)
            if outputs := [output for output in every if output.requires_grad]:
                torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture, as one case launches it.

    Attributes:
        kernel: name of the Triton function.
        case: the first of the cases that launch it in this form.
        forward: whether that case launches it without gradients; such a kernel may not spill.
        arch: 90 for compute capability 9.0.
        tile: elements a program computes along the kernel's axes.
        warps: warps a program.
        registers: a thread's.
        stack: bytes of local memory a thread, where registers are spilled to.
        local: instructions that access local memory.
        shared: bytes a program.
        conversions: tiles that Triton hands from threads to other threads.
        products: instructions of the tensor cores.
        loads: instructions that read global memory, by the bits a thread reads at once.
        stores: the same for writes.
        reductions: atomics without a result.
        atomics: atomics with a result, for which a thread waits.
    """

    kernel: str
    case: str
    forward: bool
    arch: int
    tile: tuple[int, ...]
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    conversions: int
    products: int
    loads: dict[int, int]
    stores: dict[int, int]
    reductions: int
    atomics: int

    @property
    def spilled(self) -> bool:
        """Whether it has more values than registers."""
        return self.stack > 0 or self.local > 0


def _volume(channels: int, dtype: torch.dtype = torch.float32, factor: int = 1) -> Tensor:
    # Never written, so that it takes no memory.
    return torch.empty(1, channels, *(size // factor for size in GRID), dtype=dtype)


def _features(channels: int, factor: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    volume = _volume(channels, dtype, factor)
    return torch.empty_like(volume, memory_format=torch.channels_last_3d)


def cases() -> Iterator[Case]:
    """Calls that together launch every kernel, in the forms that the network and training use."""
    image, half, disp = _volume(1), _volume(1, torch.bfloat16), _volume(3)
    nearest = partial(kernels.warp, mode="nearest")
    fused = kernels.warp_compose
    yield Case("warp", kernels.warp, (image, disp))
    yield Case("warp, bf16 image", kernels.warp, (half, disp))
    yield Case("warp, fixed image", kernels.warp, (image, disp), needs=(False, True))
    yield Case("warp, deterministic", kernels.warp, (image, disp), deterministic=True)
    yield Case("warp, nearest", nearest, (image, disp), needs=(True, False))
    yield Case("compose", kernels.compose, (disp, disp))
    yield Case("compose, deterministic", kernels.compose, (disp, disp), deterministic=True)
    yield Case("warp_compose", fused, (image, disp, disp))
    yield Case("warp_compose, bf16 image", fused, (half, disp, disp))
    yield Case("warp_compose, fixed image", fused, (image, disp, disp), needs=(False, True, True))
    yield Case("warp_compose, deterministic", fused, (image, disp, disp), deterministic=True)
    yield Case("diffusion", kernels.diffusion, (disp,))
    yield Case("diffusion, with gradient", kernels.diffusion_with_gradient, (disp,))
    for window in (11, 9, 7):
        # In training the first window writes the gradient and the others add to it.
        windows = tuple(dict.fromkeys((11, window)))
        lncc = partial(kernels.weighted_lncc, windows=windows, weights=(1.0,) * len(windows))
        yield Case(f"lncc, window {window}", lncc, (image, image), needs=(True, False))
    two_sided = partial(kernels.lncc, window=7)
    yield Case("lncc, window 7, both sides", two_sided, (image, image))
    pair, wide, narrow = _features(2), _features(16), _features(16, factor=2)
    yield Case("norm_activate, bf16", kernels.norm_activate, (wide,))
    yield Case("upsample_concat, bf16", kernels.upsample_concat, (narrow, pair))
    padded = partial(kernels.upsample_concat, width=24)
    yield Case("upsample_concat, bf16, 24 wide", padded, (narrow, pair))
    yield from _moving_blocks()
    # A sampling kernel is the same for every factor above 1, but for a constant.
    coarse = _volume(3, factor=2)
    yield Case("warp, factor 2", partial(kernels.warp, factor=2), (image, coarse))
    yield Case("compose, factor 2", partial(kernels.compose, factor=2), (disp, coarse))
    yield Case("warp_compose, factor 2", partial(fused, factor=2), (image, disp, coarse))
    for mode, sampled in (("linear", image), ("nearest", _volume(1, torch.int16))):
        sample = partial(kernels.sample_world, mode=mode)
        in_mm = partial(sample, disp_matrix=torch.empty(1, 3, 3))
        inputs, needs = (sampled, torch.empty(1, 3, 4), disp), (False,) * 3
        yield Case(f"sample_world, {mode}", sample, inputs[:2], needs[:2])
        yield Case(f"sample_world, {mode}, displaced", sample, inputs, needs)
        yield Case(f"sample_world, {mode}, displaced in mm", in_mm, inputs, needs)
    onto_grid = partial(kernels.world_displacement, shape=GRID)
    matrices = (torch.empty(1, 3, 4), torch.empty(1, 3, 3), torch.empty(1, 3, 4))
    yield Case("world_displacement", onto_grid, (coarse, *matrices), needs=(False,) * 4)
    one_mm = torch.eye(3)[None]  # of which the determinant is read
    yield Case("world_jacobian", kernels.world_jacobian, (disp, one_mm), needs=(False,) * 2)
    yield from _normal_equations()
    for factor in (2, 4):
        resize = partial(kernels.resize_displacement, factor=factor)
        yield Case(f"resize, factor {factor}", resize, (_volume(3, factor=factor),))


def _normal_equations() -> Iterator[Case]:
    """With derivatives and without, of an image and of one in double precision."""
    points, values = torch.empty(3, 50_000), torch.empty(50_000)
    for what, moving in (("", _volume(1)), (", fp64", _volume(1, torch.float64))):
        inputs, needs = (moving, points, values, torch.empty(2, 3, 4)), (False,) * 4
        with_slopes = kernels.affine_normal_equations
        of_values = partial(with_slopes, degree=4, derivatives=False)
        yield Case(f"affine_normal_equations{what}", with_slopes, inputs, needs)
        yield Case(f"affine_normal_equations, degree 4{what}", of_values, inputs, needs)


def _moving_blocks() -> Iterator[Case]:
    """The network's four, each with its dilations; the first two in single precision as well."""
    blocks = ((1, 16, 4), (16, 32, 3), (32, 32, 2), (32, 32, 1))
    for dtype, levels in ((torch.bfloat16, 4), (torch.float32, 2)):
        for level, (before, after, base) in enumerate(blocks[:levels]):
            dilations = tuple(dict.fromkeys((1, base, 2 * base, 3 * base)))
            inputs = (
                _features(before, 2**level, dtype),
                _features(after, 2 ** (level + 1), dtype),
                torch.empty(1, after),
                torch.empty(len(dilations), after, before, 3, 3, 3, dtype=dtype),
            )
            name = "bf16" if dtype == torch.bfloat16 else "fp32"
            call = partial(kernels.moving_block, dilations=dilations)
            yield Case(f"moving_block {level + 1}, {name}", call, inputs, needs=(False,) * 4)


# How kernels name the sizes of what a program computes.
_TILE = ("TILE", "ROWS", "PARTS", "VOXELS", "CHANNELS")


class _Driver:
    """Stands in for the GPU's driver: all that a compilation asks of it is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # what Triton keeps compiled kernels apart by

    def get_current_stream(self, device: int) -> int:
        return 0


def measure(arch: int, chosen: Callable[[], Iterator[Case]] = cases) -> list[Resources]:
    """The kernels that the cases launch on ``arch``, each form of each once."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    found: dict[str, Resources] = {}
    case, backward = Case("", print, ()), False

    def compile_only(function: Any, *arguments: Any, **options: Any) -> None:
        compiled = run(function, *arguments, **{**options, "warmup": True})
        if compiled.hash not in found:
            found[compiled.hash] = Resources(
                kernel=function.__name__,
                case=case.name,
                forward=not backward,
                arch=arch,
                tile=tuple(size for name, size in options.items() if name.startswith(_TILE)),
                **_figures(compiled),
            )

    as_on_gpu = mock.patch.multiple(
        _launch,
        architecture=lambda tensor: arch,
        multiprocessors=lambda tensor: 132,  # changes no kernel
        unavailable=lambda device: None,
        uses_triton=lambda tensor: True,
    )
    driver.set_active(_Driver(arch))
    with mock.patch.object(JITFunction, "run", compile_only), as_on_gpu:
        for case in chosen():
            for backward in (False, True):
                case.run(backward)
    return list(found.values())


# "        /*0a10*/  @!P0 LDG.E.64.CONSTANT R2, desc[UR4][R2.64] ;" without what follows the name.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _figures(compiled: Any) -> dict[str, Any]:
    """What the machine code of a kernel takes, by attribute of :class:`Resources`."""
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", _dump(compiled, "-res-usage")))
    code = _dump(compiled, "-sass")
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    others: Counter[str] = Counter()
    for name in _INSTRUCTION.findall(code):
        operation, *modifiers = name.split(".")
        bits = next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32)
        if operation in ("LDG", "LDGSTS"):
            loads[bits] += 1
        elif operation == "STG":
            stores[bits] += 1
        else:
            others[operation] += 1
    assert others["EXIT"], f"{compiled.name}: cuobjdump shows no instructions"
    return {
        "warps": compiled.metadata.num_warps,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": others["LDL"] + others["STL"],
        "shared": compiled.metadata.shared,
        "conversions": compiled.asm["ttgir"].count("ttg.convert_layout"),
        # HMMA, HGMMA, UTCHMMA, ...: a name for each generation and type.
        "products": sum(count for name, count in others.items() if name.endswith("MMA")),
        "loads": dict(sorted(loads.items())),
        "stores": dict(sorted(stores.items())),
        "reductions": others["RED"] + others["REDG"],
        "atomics": others["ATOM"] + others["ATOMG"],
    }


def _dump(compiled: Any, option: str) -> str:
    """What cuobjdump says of a kernel; kept beside it in Triton's cache, as it takes as long."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(compiled.hash)
    name = f"{compiled.name}.cuobjdump{option}"
    if (kept := cache.get_file(name)) is not None:
        return Path(kept).read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise BackendUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()}")
    cache.put(done.stdout, name, binary=False)
    return done.stdout


def check_tools() -> None:
    """Refuse, with the reason, where nothing can be compiled or read.

    Raises:
        BackendUnavailable: without triton or its cuobjdump, and under Triton's interpreter.
    """
    what = "the kernels cannot be compiled"
    if not _launch.TRITON_INSTALLED:
        raise BackendUnavailable(f"{what}: triton is not installed", "pip install 'ulae-rt[gpu]'")
    if env.triton_interprets():
        raise BackendUnavailable(
            f"{what}: TRITON_INTERPRET=1 runs them in Python", "unset TRITON_INTERPRET"
        )
    from triton import knobs

    try:
        _ = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        hint = "name the ones of a CUDA toolkit in TRITON_CUOBJDUMP_PATH and TRITON_NVDISASM_PATH"
        raise BackendUnavailable(f"their machine code cannot be read: {error}", hint) from error


def measure_all(archs: Sequence[int]) -> list[Resources]:
    """:func:`measure` for several architectures, each in a process of its own."""
    rows: list[Resources] = []
    workers = min(len(archs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for arch, found in zip(archs, pool.map(measure, archs), strict=True):
            rows += found
            if sys.stderr.isatty():
                sys.stderr.write(f"sm_{arch}: {len(found)} kernels\n")
    return rows


def table(rows: Sequence[Resources]) -> str:
    """One line a kernel and form; architectures that agree in every column share it."""
    kernels_and_cases = list(dict.fromkeys((row.kernel, row.case) for row in rows))
    rows = sorted(rows, key=lambda row: (kernels_and_cases.index((row.kernel, row.case)), row.arch))
    archs: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        archs.setdefault(_columns(row), []).append(str(row.arch))
    titles = (
        "kernel", "case", "pass", "sm", "tile", "warps", "regs", "stack", "local", "shared", "conv",
        "mma", "loads", "stores", "red", "atom",
    )  # fmt: skip
    lines = [titles] + [(*key[:3], " ".join(value), *key[3:]) for key, value in archs.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(row: Resources) -> tuple[str, ...]:
    """The table's cells, without the architecture."""
    numbers = (
        row.warps, row.registers, row.stack, row.local, row.shared, row.conversions,
        row.products,
    )  # fmt: skip
    return (
        row.kernel.strip("_").removesuffix("_kernel"),
        row.case,
        "forward" if row.forward else "backward",
        "x".join(map(str, row.tile)),
        *map(str, numbers),
        _accesses(row.loads),
        _accesses(row.stores),
        str(row.reductions),
        str(row.atomics),
    )


def _accesses(counts: dict[int, int]) -> str:
    """``{32: 11, 64: 2}`` as ``11x32 2x64``."""
    return " ".join(f"{count}x{bits}" for bits, count in counts.items()) or "-"


def problems(rows: Sequence[Resources]) -> list[str]:
    """What must not be: forward kernels that spill."""
    return [
        f"{row.kernel} spills on sm_{row.arch} ({row.case}): {row.stack} bytes a thread, "
        f"{row.local} accesses"
        for row in rows
        if row.forward and row.spilled
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a forward kernel spills or nothing can be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m ulae_rt.kernels.resources",
        description=__doc__,
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES,
        metavar="SM", help="%(choices)s; all of them by default",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print every row as JSON on stdout")
    arguments = parser.parse_args(argv)
    try:
        check_tools()
        rows = measure_all(sorted(set(arguments.arch)))
    except UlaeError as error:
        sys.stderr.write(f"error: {error}\nhint: {error.hint}\n")
        return 1
    found = problems(rows)
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
    else:
        sys.stdout.write(f"{table(rows)}\n\n{LEGEND}\n")
    for line in found:
        sys.stderr.write(f"error: {line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
