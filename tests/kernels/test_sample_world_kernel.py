"""The Triton kernel of ``sample_world`` against the reference, and as a torch operator."""

from functools import partial

import pytest
import torch
from torch import Tensor

from _support.kernels import implementation
from _support.tolerances import TOL, assert_close, assert_equal
from _support.volumes import noise
from ulae_rt.errors import BackendUnavailable
from ulae_rt.kernels import _launch, sample_world

# Image's B, C, D, H, W; matrices; output; factor of the displacement, 0 for none.
CASES = [
    ((1, 1, 9, 11, 10), 1, (8, 9, 12), 0),
    ((1, 1, 9, 11, 10), 3, (8, 9, 12), 0),  # one image for all
    ((2, 2, 9, 11, 10), 2, (8, 9, 12), 1),
    ((2, 1, 6, 5, 7), 2, (8, 4, 12), 2),
    ((1, 3, 6, 5, 7), 2, (8, 4, 12), 4),
    ((1, 1, 1, 5, 7), 1, (4, 1, 3), 1),
    ((1, 1, 5, 1, 1), 1, (1, 6, 1), 0),
    ((1, 1, 1, 1, 1), 2, (1, 1, 1), 1),
    ((1, 1, 12, 40, 35), 1, (6, 37, 48), 1),  # more rows and columns than a program takes
]
MODES = ("linear", "nearest")


def inputs_of(
    image: tuple[int, ...],
    batch: int,
    shape: tuple[int, int, int],
    factor: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """An image, matrices that turn and scale about the centres, and a displacement."""
    linear = torch.eye(3, dtype=torch.float64) + 0.4 * (noise(batch, 3, 3, seed=5) - 0.5)
    ratio = [(n - 1) / max(m - 1, 1) for n, m in zip(image[2:], shape, strict=True)]
    linear = linear * torch.tensor(ratio, dtype=torch.float64)[:, None].clamp(min=0.1)
    from_centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    to_centre = torch.tensor([(n - 1) / 2 for n in image[2:]], dtype=torch.float64)
    offset = to_centre - linear @ from_centre + noise(batch, 3, seed=6) - 0.5
    matrix = torch.cat((linear, offset[:, :, None]), dim=2)
    disp = None
    if factor:
        sizes = [size // factor for size in shape]
        disp = (2 * (noise(batch, 3, *sizes, seed=3) - 0.5)).float()
    return noise(*image).to(dtype), matrix, disp


def by(
    choice: str,
    *inputs: Tensor | None,
    device: torch.device,
    disp_matrix: Tensor | None = None,
    **options: object,
) -> Tensor:
    """By ``reference`` or ``triton``, on the CPU."""
    moved = [None if x is None else x.to(device) for x in inputs]
    if disp_matrix is not None:
        options["disp_matrix"] = disp_matrix.to(device)
    with implementation(choice):
        return sample_world(*moved, **options).cpu()  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("image", "batch", "shape", "factor"), CASES, ids=str)
def test_value(
    image: tuple[int, ...],
    batch: int,
    shape: tuple[int, int, int],
    factor: int,
    mode: str,
    triton_device: torch.device,
) -> None:
    inputs = inputs_of(image, batch, shape, factor)
    options = {"shape": shape, "mode": mode, "factor": factor or 1}
    found = by("triton", *inputs, device=triton_device, **options)
    truth = by("reference", *inputs, device=torch.device("cpu"), **options)
    assert truth.any()
    assert found.dtype == torch.float32
    # Half a voxel from a centre, and half a voxel beyond the last, rounding decides.
    off = (found - truth).abs() > TOL["op float32"].absolute
    assert float(off.double().mean()) <= (1e-3 if mode == "linear" else 2e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_displacement_with_a_matrix_of_its_own(
    batch: int, mode: str, triton_device: torch.device
) -> None:
    shape = (8, 9, 12)
    inputs = inputs_of((1, 2, 9, 11, 10), batch, shape, 1)
    disp_matrix = 2 * (noise(batch, 3, 3, seed=9) - 0.5)
    options = {"shape": shape, "mode": mode, "disp_matrix": disp_matrix}
    found = by("triton", *inputs, device=triton_device, **options)
    truth = by("reference", *inputs, device=torch.device("cpu"), **options)
    assert truth.any()
    off = (found - truth).abs() > TOL["op float32"].absolute
    assert float(off.double().mean()) <= (1e-3 if mode == "linear" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_types(dtype: torch.dtype, triton_device: torch.device) -> None:
    shape = (8, 9, 12)
    image, matrix, disp = inputs_of((2, 2, 9, 11, 10), 2, shape, 1, dtype)
    found = by("triton", image, matrix, disp, device=triton_device, shape=shape)
    wide = image if dtype == torch.float64 else image.float()
    exact = by("triton", wide, matrix, disp, device=triton_device, shape=shape)
    assert found.dtype == dtype
    # Up to 1; of a bfloat16 the interpreter cuts off what a GPU rounds.
    assert (found.double() - exact.double()).abs().max() <= torch.finfo(dtype).eps
    if dtype == torch.float64:
        truth = by("reference", image, matrix, disp, device=torch.device("cpu"), shape=shape)
        assert_close("float64", found, truth, TOL["op float64"])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_labels(dtype: torch.dtype, triton_device: torch.device) -> None:
    """Computed in float64, so that the kernel and the reference take the same voxels."""
    shape = (8, 9, 12)
    image, matrix, disp = inputs_of((1, 1, 9, 11, 10), 2, shape, 1)
    labels = (100 * image).to(dtype)
    if dtype == torch.int64:
        labels = labels + 2**53
    disp = disp.double()
    options = {"shape": shape, "mode": "nearest"}
    found = by("triton", labels, matrix, disp, device=triton_device, **options)
    expected = by("reference", labels, matrix, disp, device=torch.device("cpu"), **options)
    assert found.dtype == dtype
    assert len(found.unique()) > 20
    assert_equal("labels", found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_border_is_half_a_voxel_away(mode: str, triton_device: torch.device) -> None:
    image = noise(1, 1, 3, 4, 5).float() + 1
    for axis in range(3):
        for shift in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
            matrix = torch.eye(3, 4)[None].clone()
            matrix[0, axis, 3] = shift
            found = by("triton", image, matrix, device=triton_device, mode=mode)
            expected = by("reference", image, matrix, device=torch.device("cpu"), mode=mode)
            assert_close(f"{axis} {shift}", found, expected, TOL["op float32"])


# An infinity times a zero of the matrix is NaN, of which numpy warns in the interpreter.
@pytest.mark.parametrize("value", [torch.nan, 1e30, -1e30])
@pytest.mark.parametrize("mode", MODES)
def test_a_point_that_is_nowhere_samples_nothing(
    mode: str, value: float, triton_device: torch.device
) -> None:
    image, disp = noise(1, 1, 4, 5, 6).float() + 1, torch.zeros(1, 3, 4, 5, 6)
    disp[0, 2, 1, 2, 3] = value
    expected = image.clone()
    expected[0, 0, 1, 2, 3] = 0
    matrix = torch.eye(3, 4)[None]
    for disp_matrix in (None, torch.eye(3)[None]):
        options = {"mode": mode, "disp_matrix": disp_matrix}
        found = by("triton", image, matrix, disp, device=triton_device, **options)
        assert_close("others", found, expected, TOL["op float32"])
    ones, nowhere = torch.ones_like(disp), torch.full((1, 3, 3), value)
    options = {"mode": mode, "disp_matrix": nowhere}
    assert not by("triton", image, matrix, ones, device=triton_device, **options).any()
    matrix = torch.full((1, 3, 4), value)
    assert not by("triton", image, matrix, device=triton_device, mode=mode).any()


def test_offsets_of_64_bits(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for image, batch, shape, factor in CASES[:4]:
        for mode in MODES:
            inputs = inputs_of(image, batch, shape, factor)
            options = {"shape": shape, "mode": mode, "factor": factor or 1}
            expected = by("triton", *inputs, device=triton_device, **options)
            with monkeypatch.context() as patch:
                patch.setattr(_launch, "wide_index", lambda voxels: True)
                wide = by("triton", *inputs, device=triton_device, **options)
            assert_equal("wide", wide, expected)


def test_memory_layouts(triton_device: torch.device) -> None:
    shape = (8, 9, 12)
    image, matrix, disp = inputs_of((2, 2, 9, 11, 10), 2, shape, 1)
    expected = by("triton", image, matrix, disp, device=triton_device, shape=shape)
    permuted = [x.mT.contiguous().mT for x in (image, matrix, disp)]
    found = by("triton", *permuted, device=triton_device, shape=shape)
    assert_equal("permuted", found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("displaced", ["not", "in voxels", "in mm"])
def test_opcheck(displaced: str, triton_device: torch.device) -> None:
    image, matrix, disp = inputs_of((1, 2, 5, 4, 6), 2, (4, 3, 5), 1)
    moved = [x.to(triton_device) for x in (image, matrix, disp, noise(2, 3, 3))]
    if displaced != "in mm":
        moved[3] = None
    if displaced == "not":
        moved[2] = None
    operator = torch.ops.ulae_rt.sample_world.default
    torch.library.opcheck(operator, (*moved, [4, 3, 5], "linear", 1))


def test_compile_and_export(triton_device: torch.device) -> None:
    image, matrix, disp = inputs_of((1, 2, 5, 4, 6), 2, (4, 3, 5), 1)
    inputs = [x.to(triton_device) for x in (image, matrix, disp)]
    expected = by("triton", *inputs, device=triton_device, shape=(4, 3, 5))
    call = partial(sample_world, shape=(4, 3, 5))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return call(*inputs)

    with implementation("triton"):
        assert_equal("compiled", compiled(*inputs).cpu(), expected)
        program = torch.export.export(Module(), tuple(inputs))
        assert "ulae_rt.sample_world.default" in program.graph_module.code
        assert_equal("exported", program.module()(*inputs).cpu(), expected)


def test_a_request_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULAE_RT_KERNELS", "triton")
    image, matrix, _ = inputs_of((1, 1, 3, 4, 5), 1, (3, 4, 5), 0)
    with pytest.raises(BackendUnavailable, match="cannot run: they need a CUDA tensor"):
        sample_world(image, matrix)
