"""The Triton kernel of ``world_displacement`` against the reference, and as a torch operator."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import implementation
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, world_displacement

# The field's B, D, H, W; the output.
CASES = [
    ((1, 9, 11, 10), (8, 9, 12)),
    ((2, 6, 5, 7), (11, 13, 9)),
    ((3, 1, 5, 7), (4, 1, 3)),
    ((1, 5, 1, 1), (1, 6, 1)),
    ((2, 1, 1, 1), (1, 1, 1)),
    ((1, 7, 20, 18), (6, 37, 48)),  # more rows and columns than a program takes
]
FLOAT64 = torch.float64


def inputs_of(
    field: tuple[int, ...], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A field, matrices that turn about the centres and reach beyond the field, and in mm."""
    batch, *sizes = field
    linear = torch.eye(3, dtype=FLOAT64) + 0.4 * (noise(batch, 3, 3, seed=5) - 0.5)
    ratio = [(n + 1) / m for n, m in zip(sizes, shape, strict=True)]
    linear = linear * torch.tensor(ratio, dtype=FLOAT64)[:, None]
    from_centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=FLOAT64)
    to_centre = torch.tensor([(n - 1) / 2 for n in sizes], dtype=FLOAT64)
    shift = to_centre - linear @ from_centre + noise(batch, 3, seed=6) - 0.5
    return [
        (2 * noise(batch, 3, *sizes) - 1).to(dtype),
        torch.cat((linear, shift[:, :, None]), dim=2),
        2 * noise(batch, 3, 3, seed=7) - 1,
        0.2 * noise(batch, 3, 4, seed=8) - 0.1,
    ]


def by(choice: str, *inputs: Tensor, device: torch.device, shape: tuple[int, int, int]) -> Tensor:
    """By ``reference`` or ``triton``, on the CPU."""
    with implementation(choice):
        return world_displacement(*(x.to(device) for x in inputs), shape=shape).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("field", "shape"), CASES, ids=str)
def test_value(
    field: tuple[int, ...],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    triton_device: torch.device,
) -> None:
    inputs = inputs_of(field, shape, dtype)
    found = by("triton", *inputs, device=triton_device, shape=shape)
    truth = by(
        "reference", inputs[0].double(), *inputs[1:], device=torch.device("cpu"), shape=shape
    )
    assert found.dtype == dtype
    name = "op float64" if dtype == FLOAT64 else "op float32"
    assert_close("values", found, truth, TOL[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(
    dtype: torch.dtype, triton_device: torch.device
) -> None:
    shape = (8, 9, 12)
    disp, *matrices = inputs_of((2, 9, 11, 10), shape, dtype)
    found = by("triton", disp, *matrices, device=triton_device, shape=shape)
    expected = by("triton", disp.float(), *matrices, device=triton_device, shape=shape)
    assert_equal("values", found, expected)


@pytest.mark.parametrize("apart", [300.0, 37e3])
def test_an_offset_is_rounded_once(apart: float, triton_device: torch.device) -> None:
    """Coordinates of 300 mm, and images that lie 37 m apart; rows beyond a program's first."""
    shape = (9, 40, 50)
    _, to_field, linear, offset = inputs_of((2, 4, 5, 6), shape)
    offset = 10 * offset
    offset[:, :, 3] += apart + 0.1
    found = by("triton", torch.zeros(2, 3, 4, 5, 6), to_field, linear, offset,
               device=triton_device, shape=shape)  # fmt: skip
    axes = [torch.arange(size, dtype=FLOAT64) for size in shape]
    places = torch.stack((*torch.meshgrid(*axes, indexing="ij"), torch.ones(shape, dtype=FLOAT64)))
    exact = torch.einsum("bij,jdhw->bidhw", offset, places)
    # Half a step of float32 for the sum, and what 32 rows and columns from a corner lose.
    allowed = float(exact.abs().max()) * torch.finfo(torch.float32).eps / 2 + 1e-5
    assert float((found.double() - exact).abs().max()) <= allowed


def test_no_number_gives_no_number(triton_device: torch.device) -> None:
    """As in the reference, whose tests say where."""
    shape = (8, 9, 12)
    disp, *matrices = inputs_of((2, 9, 11, 10), shape)
    disp[0, 1, 4, 5, 3] = torch.nan
    disp[1, 2, 0, 5, 9] = torch.nan
    found = by("triton", disp, *matrices, device=triton_device, shape=shape)
    expected = by("reference", disp, *matrices, device=torch.device("cpu"), shape=shape)
    assert 20 < int(expected.isnan().sum()) < expected.numel() / 2
    assert_equal("where", found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_close("others", found[number], expected[number], TOL["op float32"])


@pytest.mark.parametrize("which", range(3))
def test_a_matrix_without_numbers_gives_none(which: int, triton_device: torch.device) -> None:
    shape = (8, 9, 12)
    disp, *matrices = inputs_of((2, 9, 11, 10), shape)
    good = by("triton", disp, *matrices, device=triton_device, shape=shape)
    matrices[which][1, 2, 1] = torch.nan
    found = by("triton", disp, *matrices, device=triton_device, shape=shape)
    assert_equal("the other one", found[0], good[0])
    assert (found[1] if which == 0 else found[1, 2]).isnan().all()


def test_offsets_of_64_bits(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, shape in CASES[:4]:
        inputs = inputs_of(field, shape)
        expected = by("triton", *inputs, device=triton_device, shape=shape)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "wide_index", lambda voxels: True)
            wide = by("triton", *inputs, device=triton_device, shape=shape)
        assert_equal("wide", wide, expected)


def test_memory_layouts(triton_device: torch.device) -> None:
    shape = (8, 9, 12)
    inputs = inputs_of((2, 9, 11, 10), shape)
    expected = by("triton", *inputs, device=triton_device, shape=shape)
    permuted = [x.mT.contiguous().mT for x in inputs]
    found = by("triton", *permuted, device=triton_device, shape=shape)
    assert_equal("permuted", found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = [x.to(triton_device) for x in inputs_of((2, 5, 4, 6), (4, 3, 5), dtype)]
    torch.library.opcheck(torch.ops.ulae_rt.world_displacement.default, (*inputs, [4, 3, 5]))


def test_compile_and_export(triton_device: torch.device) -> None:
    shape = (4, 3, 5)
    inputs = inputs_of((2, 5, 4, 6), shape)
    expected = by("triton", *inputs, device=triton_device, shape=shape)
    call = partial(world_displacement, shape=shape)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return call(*inputs)

    moved = [x.to(triton_device) for x in inputs]
    with implementation("triton"):
        assert_equal("compiled", compiled(*moved).cpu(), expected)
        program = torch.export.export(Module(), tuple(moved))
        assert "ulae_rt.world_displacement.default" in program.graph_module.code
        assert_equal("exported", program.module()(*moved).cpu(), expected)


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
        world_displacement(*inputs_of((1, 3, 4, 5), (3, 4, 5)), shape=(3, 4, 5))
