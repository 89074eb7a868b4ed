"""What the compiler makes of the kernels, on every architecture; no GPU needed."""

import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from _support.project import modules
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, resources
from ulae_rt.kernels._configs import resident
from ulae_rt.kernels.resources import ARCHITECTURES, Resources

needs_triton = pytest.mark.skipif(not _launch.TRITON_INSTALLED, reason="triton is not installed")


def compiling(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process where kernels are compiled, not interpreted as in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(path), *filter(None, [environment.get("PYTHONPATH")])]
        )
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        capture_output=True, text=True, timeout=1800, env=environment,
    )  # fmt: skip


def parsed(text: str) -> list[Resources]:
    """What ``--json`` printed; JSON's keys are strings."""
    rows = json.loads(text)
    for row in rows:
        for name in ("loads", "stores"):
            row[name] = {int(bits): count for bits, count in row[name].items()}
    return [Resources(**row) for row in rows]


def compiled(source: str, path: Path) -> list[Resources]:
    """What becomes of the ``cases()`` of ``source`` on sm_90."""
    (path / "some.py").write_text(source)
    program = (
        "import json, some; from dataclasses import asdict; from ulae_rt.kernels import resources;"
        "print(json.dumps([asdict(row) for row in resources.measure(90, some.cases)]))"
    )
    done = compiling("-c", program, path=path)
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


@pytest.fixture(scope="module")
def rows() -> list[Resources]:
    done = compiling("-m", "ulae_rt.kernels.resources", "--json")
    assert done.stdout, done.stderr
    return parsed(done.stdout)


def kernel_names() -> set[str]:
    """Every kernel that a launcher could start, by reading the source."""
    return {
        node.name
        for file in modules().values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@needs_triton
@pytest.mark.slow
def test_no_forward_kernel_spills(rows: list[Resources]) -> None:
    assert resources.problems(rows) == []


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_measured(arch: int, rows: list[Resources]) -> None:
    measured = {row.kernel for row in rows if row.arch == arch}
    assert measured == kernel_names(), "add a case to ulae_rt.kernels.resources"


@needs_triton
@pytest.mark.slow
def test_no_thread_waits_for_an_atomic(rows: list[Resources]) -> None:
    assert [row for row in rows if row.atomics] == []
    assert [row for row in rows if row.reductions]  # else nothing was recognised


@needs_triton
@pytest.mark.slow
def test_sampling_hands_no_tile_to_other_threads(rows: list[Resources]) -> None:
    names = ("_warp", "_compose", "_resize", "_affine_normal_equations")
    # Not the one that adds up what programs left.
    sampling = [
        row
        for row in rows
        if row.kernel.startswith(names) and not row.kernel.endswith("_sum_kernel")
    ]
    assert {row.kernel.split("_")[1] for row in sampling} == {name.split("_")[1] for name in names}
    assert [row for row in sampling if row.shared or row.conversions] == []


@needs_triton
@pytest.mark.slow
def test_lanes_read_neighbours_at_once_and_corners_one_by_one(rows: list[Resources]) -> None:
    found = [row for row in rows if (row.kernel, row.case) == ("_warp_forward_kernel", "warp")]
    assert {row.arch for row in found} == set(ARCHITECTURES)
    for row in found:
        voxels = math.prod(row.tile) // (32 * row.warps)
        # Eight corners of each voxel, and three components of the displacement of two.
        assert voxels == 2
        assert (row.loads, row.stores) == ({32: 8 * voxels, 64: 3}, {64: 1})


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("op", ["warp", "compose", "warp_compose", "resize"])
def test_sampling_runs_as_many_programs_at_a_time_as_it_is_cut_for(
    op: str, rows: list[Resources]
) -> None:
    noted = importlib.import_module(f"ulae_rt.kernels.{op}.kernel").REGISTERS
    for coarse in (False, True):
        registers = noted if op == "resize" else noted[coarse]
        found = [
            row for row in rows
            if row.kernel == f"_{op}_forward_kernel" and row.arch == 90
            and (op == "resize" or ("factor" in row.case) == coarse)
        ]  # fmt: skip
        fits = min(resident(row.registers, row.warps, 90) for row in found)
        assert fits == resident(registers, found[0].warps, 90), (op, coarse)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "forms"), [("sample_world", 6), ("world_displacement", 1), ("world_jacobian", 1)]
)
def test_world_ops_run_as_many_programs_at_a_time_as_they_are_cut_for(
    op: str, forms: int, rows: list[Resources]
) -> None:
    registers = importlib.import_module(f"ulae_rt.kernels.{op}.kernel").REGISTERS
    found = [row for row in rows if row.kernel == f"_{op}_kernel" and row.arch == 90]
    assert len(found) == forms
    fits = min(resident(row.registers, row.warps, 90) for row in found)
    assert fits == resident(registers, found[0].warps, 90)


@needs_triton
@pytest.mark.slow
def test_lncc_runs_as_many_programs_at_a_time_as_it_is_cut_for(rows: list[Resources]) -> None:
    from ulae_rt.kernels.lncc.kernel import REGISTERS

    for kernel, windows in REGISTERS.items():
        for window, registers in windows.items():
            (row,) = (
                row for row in rows
                if (row.kernel, row.case, row.arch, row.forward)
                == (f"_{kernel}_kernel", f"lncc, window {window}", 90, kernel == "lncc_planes")
            )  # fmt: skip
            fits = resident(row.registers, row.warps, 90)
            assert fits == resident(registers, row.warps, 90), (kernel, window, row.registers)


@needs_triton
@pytest.mark.slow
def test_diffusion_runs_as_many_programs_at_a_time_as_it_is_cut_for(rows: list[Resources]) -> None:
    from ulae_rt.kernels.diffusion.kernel import REGISTERS

    found = [row for row in rows if row.kernel == "_diffusion_kernel" and row.arch == 90]
    assert max(row.registers for row in found) <= REGISTERS < 64
    both = next(row for row in found if row.case == "diffusion, with gradient")
    assert resident(both.registers, both.warps, 90) == resident(REGISTERS, both.warps, 90)
    assert (both.loads, both.stores) == ({32: 5, 64: 7}, {32: 1, 64: 1})


WIDTHS = """
import torch
from functools import partial
from ulae_rt import kernels
from ulae_rt.kernels import resources

def cases():
    for width in (1, 2, 3, 16):
        image, disp, coarse = torch.empty(1, 1, 2, 4, width), torch.empty(1, 3, 2, 4, width), \
            torch.empty(1, 3, 1, 2, (width + 1) // 2)
        for padding in ("zeros", "border"):
            warp = partial(kernels.warp, padding=padding)
            yield resources.Case(f"warp {padding} {width}", warp, (image, disp))
        nearest = partial(kernels.warp, mode="nearest")
        yield resources.Case(f"nearest {width}", nearest, (image, disp), needs=(True, False))
        yield resources.Case(f"compose {width}", kernels.compose, (disp, disp))
        yield resources.Case(f"warp_compose {width}", kernels.warp_compose, (image, disp, disp))
        yield resources.Case(f"diffusion {width}", kernels.diffusion_with_gradient, (disp,))
        matrices = torch.empty(1, 3, 4), torch.eye(3)[None], torch.empty(1, 3, 4)
        onto_grid = partial(kernels.world_displacement, shape=(2, 4, width))
        inputs, needs = (coarse, *matrices), (False,) * 4
        yield resources.Case(f"world_displacement {width}", onto_grid, inputs, needs)
        if width > 1:
            jacobian, inputs = kernels.world_jacobian, (disp, matrices[1])
            yield resources.Case(f"world_jacobian {width}", jacobian, inputs, needs[:2])
        if width % 2 == 0:
            warp = partial(kernels.warp, factor=2)
            yield resources.Case(f"coarse {width}", warp, (image, coarse))
            resize = partial(kernels.resize_displacement, factor=2)
            yield resources.Case(f"resize {width}", resize, (coarse,))
"""


@needs_triton
@pytest.mark.slow
def test_widths_of_every_kind_compile(tmp_path: Path) -> None:
    """A width of 1 is a constant to a kernel that is told of widths divisible by 16."""
    cases = {row.case for row in compiled(WIDTHS, tmp_path)}
    assert {"warp zeros 1", "warp zeros 2", "warp zeros 16"} <= cases
    assert {"world_displacement 1", "world_displacement 16", "world_jacobian 2"} <= cases
    assert "warp zeros 3" not in cases  # the form of 2


@needs_triton
@pytest.mark.slow
def test_tensor_cores_multiply_half_precision_alone(rows: list[Resources]) -> None:
    """They would round single precision to TF32, which keeps 10 bits of 23."""
    found = [row for row in rows if row.case.startswith("moving_block")]
    for precision in ("bf16", "fp32"):
        products = [row.products for row in found if row.case.endswith(precision)]
        assert len(products) >= len(ARCHITECTURES)
        assert all(products) if precision == "bf16" else not any(products)


# The guards can fail

BAD = """
import torch, triton, triton.language as tl
from ulae_rt.kernels import resources

@triton.jit
def _greedy_kernel(ptr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    value = tl.load(ptr + at)
    tl.store(ptr + at, value / tl.sum(value))

@triton.jit
def _waiting_kernel(ptr, count_ptr, TILE: tl.constexpr):
    at = tl.atomic_add(count_ptr + tl.arange(0, TILE), 1)
    tl.store(ptr + at, 1.0)

def greedy(memory):
    _greedy_kernel[(1,)](memory, TILE=2**13, num_warps=1)
    return memory.detach()

def waiting(memory):
    counts = torch.empty(128, dtype=torch.int32)
    _waiting_kernel[(1,)](memory, counts, TILE=128, num_warps=4)
    return memory.detach()

def cases():
    memory = torch.empty(2**13)
    yield resources.Case("greedy", greedy, (memory,))
    yield resources.Case("waiting", waiting, (memory,))
"""


@needs_triton
def test_a_spill_and_an_atomic_that_waits_are_found(tmp_path: Path) -> None:
    greedy, waiting = compiled(BAD, tmp_path)
    assert greedy.spilled
    assert greedy.stack
    assert greedy.local
    assert (waiting.spilled, waiting.atomics, waiting.reductions) == (False, 1, 0)
    (problem,) = resources.problems([greedy, waiting])
    assert problem.startswith("_greedy_kernel spills on sm_90 (greedy): ")


# The table


def row(**changes: object) -> Resources:
    values: dict[str, object] = {
        "kernel": "_warp_forward_kernel", "case": "warp", "forward": True, "arch": 80,
        "tile": (4, 32), "warps": 4, "registers": 25, "stack": 0, "local": 0,
        "shared": 0, "conversions": 0, "products": 0,
        "loads": {16: 8, 32: 3}, "stores": {16: 1}, "reductions": 0, "atomics": 0,
    }  # fmt: skip
    return Resources(**{**values, **changes})  # type: ignore[arg-type]


def test_architectures_that_agree_share_a_line() -> None:
    other = row(kernel="_warp_backward_kernel", forward=False, stores={}, registers=40)
    text = resources.table([row(), other, row(arch=86), row(arch=90, registers=30)])
    title, *lines = [" ".join(line.split()) for line in text.splitlines()]
    assert title == (
        "kernel case pass sm tile warps regs stack local shared conv mma loads stores red atom"
    )
    assert lines == [
        "warp_forward warp forward 80 86 4x32 4 25 0 0 0 0 0 8x16 3x32 1x16 0 0",
        "warp_forward warp forward 90 4x32 4 30 0 0 0 0 0 8x16 3x32 1x16 0 0",
        "warp_backward warp backward 80 4x32 4 40 0 0 0 0 0 8x16 3x32 - 0 0",
    ]
    starts = {line.index("4x32") for line in text.splitlines()[1:]}
    assert starts == {text.splitlines()[0].index("tile")}


def test_only_forward_kernels_may_not_spill() -> None:
    spilled = [row(stack=8), row(local=2), row(forward=False, stack=8, local=2)]
    assert len(resources.problems(spilled)) == 2
    assert resources.problems([row()]) == []


@pytest.mark.follows("unset TRITON_INTERPRET")
@needs_triton
def test_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_launch, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 1
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[1]) == ("", "hint: unset TRITON_INTERPRET")
    monkeypatch.delenv("TRITON_INTERPRET")
    resources.check_tools()


@pytest.mark.follows(
    "name the ones of a CUDA toolkit in TRITON_CUOBJDUMP_PATH and TRITON_NVDISASM_PATH"
)
@needs_triton
def test_programs_of_a_toolkit_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuobjdump", "nvdisasm"):
        monkeypatch.delenv(f"TRITON_{name.upper()}_PATH", raising=False)
        monkeypatch.setattr(
            type(knobs.nvidia).__dict__[name], "default_path", str(tmp_path / "gone" / name)
        )
    with pytest.raises(BackendUnavailable, match="their machine code cannot be read") as caught:
        resources.check_tools()
    variables = re.findall(r"[A-Z]+_[A-Z_]+", caught.value.hint)
    assert len(variables) == 2
    for variable in variables:
        program = tmp_path / variable
        program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
        program.chmod(0o755)
        monkeypatch.setenv(variable, str(program))
    resources.check_tools()


def test_missing_triton_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_launch, "TRITON_INSTALLED", False)
    assert resources.main(["--arch", "90"]) == 1
    assert "triton is not installed" in capsys.readouterr().err
