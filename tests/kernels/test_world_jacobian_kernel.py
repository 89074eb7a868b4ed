"""The Triton kernel of ``world_jacobian`` against the reference, and as a torch operator."""

import pytest
import torch
from torch import Tensor

from _support.kernels import implementation
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, world_jacobian

# B, D, H, W; the last two have more slices, rows and columns than a program takes.
CASES = [(1, 6, 5, 7), (3, 5, 9, 4), (2, 2, 2, 2), (1, 2, 3, 17), (2, 9, 3, 40), (1, 11, 37, 48)]


def inputs_of(batch: int, *sizes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A displacement and matrices that are anisotropic, turned and of either handedness."""
    matrix = torch.tensor([[0.9, 0.2, -0.3], [-0.1, 1.4, 0.4], [0.2, -0.3, 2.2]])
    matrix = matrix.double() + 0.2 * (noise(batch, 3, 3, seed=5) - 0.5)
    matrix[1::2] = matrix[1::2].flip(2)
    return noise(batch, 3, *sizes).to(dtype), matrix


def by(choice: str, *inputs: Tensor, device: torch.device) -> Tensor:
    """By ``reference`` or ``triton``, on the CPU."""
    with implementation(choice):
        return world_jacobian(*(x.to(device) for x in inputs)).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_value(sizes: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device) -> None:
    disp, matrix = inputs_of(*sizes, dtype=dtype)
    found = by("triton", disp, matrix, device=triton_device)
    truth = by("reference", disp.double(), matrix, device=torch.device("cpu"))
    assert found.dtype == dtype
    name = "op float64" if dtype == torch.float64 else "op float32"
    assert_close("values", found, truth, TOL[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(
    dtype: torch.dtype, triton_device: torch.device
) -> None:
    disp, matrix = inputs_of(2, 9, 6, 7, dtype=dtype)
    found = by("triton", disp, matrix, device=triton_device)
    assert_equal("values", found, by("triton", disp.float(), matrix, device=triton_device))


def test_no_number_gives_no_number(triton_device: torch.device) -> None:
    """As in the reference, whose tests say where."""
    disp, matrix = inputs_of(2, 9, 6, 7)
    for b, component, at in ((0, 1, (3, 2, 3)), (0, 2, (4, 4, 5)), (1, 0, (0, 5, 0))):
        disp[(b, component, *at)] = torch.nan
    found = by("triton", disp, matrix, device=triton_device)
    expected = by("reference", disp, matrix, device=torch.device("cpu"))
    assert 3 * 4 <= int(expected.isnan().sum()) <= 3 * 7
    assert_equal("where", found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_close("others", found[number], expected[number], TOL["op float32"])


def test_offsets_of_64_bits(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in CASES[:5]:
        inputs = inputs_of(*sizes)
        expected = by("triton", *inputs, device=triton_device)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "wide_index", lambda voxels: True)
            wide = by("triton", *inputs, device=triton_device)
        assert_equal("wide", wide, expected)


def test_memory_layouts(triton_device: torch.device) -> None:
    inputs = inputs_of(2, 9, 6, 7)
    expected = by("triton", *inputs, device=triton_device)
    found = by("triton", *(x.mT.contiguous().mT for x in inputs), device=triton_device)
    assert_equal("permuted", found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = [x.to(triton_device) for x in inputs_of(2, 5, 4, 6, dtype=dtype)]
    torch.library.opcheck(torch.ops.ulae_rt.world_jacobian.default, tuple(inputs))


def test_compile_and_export(triton_device: torch.device) -> None:
    inputs = inputs_of(2, 5, 4, 6)
    expected = by("triton", *inputs, device=triton_device)
    compiled = torch.compile(world_jacobian, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return world_jacobian(*inputs)

    moved = [x.to(triton_device) for x in inputs]
    with implementation("triton"):
        assert_equal("compiled", compiled(*moved).cpu(), expected)
        program = torch.export.export(Module(), tuple(moved))
        assert "ulae_rt.world_jacobian.default" in program.graph_module.code
        assert_equal("exported", program.module()(*moved).cpu(), expected)


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
        world_jacobian(*inputs_of(1, 3, 4, 5))
