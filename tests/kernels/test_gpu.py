"""What only a GPU can show of the ops: streams, graphs, sizes, memory, compilers, real volumes.

Sizes and devices are arguments of the ``check_...`` functions, so that the tests at the end run
the same code on the CPU, small, and nothing waits for a GPU to be found broken.
"""

import gc
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from _support.kernels import deterministic, implementation
from _support.nets import small_net
from _support.ops import (
    INFERENCE_OPS,
    OPS,
    WINDOWS,
    OpCase,
    cotangents,
    forward_backward,
    outputs_of,
)
from _support.tolerances import TOL, assert_close
from _support.volumes import Sizes, smooth_image
from ulae_rt.conventions import FULL_SHAPE
from ulae_rt.kernels import (
    compose,
    diffusion,
    diffusion_with_gradient,
    moving_block,
    multi_window_lncc,
    norm_activate,
    resize_displacement,
    warp,
    warp_compose,
    weighted_lncc,
)
from ulae_rt.losses import registration_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MEDIUM: Sizes = (32, 48, 40)
INT32 = 2**31
# Float32 sums whose terms arrive in another order; of the largest value.
ANOTHER_ORDER = 2e-5

gpu = pytest.mark.gpu
every_op = pytest.mark.parametrize("name", OPS)
every_inference_op = pytest.mark.parametrize("name", INFERENCE_OPS)


@contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"{what}: result {index} differs"


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Within ``relative`` of the largest expected value; NaN is not."""
    worst = float((actual.double() - expected.double()).abs().max())
    largest = float(expected.double().abs().max())
    print(f"{what}: {worst:.2e} where values reach {largest:.2e}")
    assert worst <= relative * largest, f"{what}: {worst:.2e} where values reach {largest:.2e}"


def need_memory(gigabytes: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory, there are {free:.0f}")


# Values, at the size they are used at


def check_against_float64(case: OpCase, sizes: Sizes, device: torch.device) -> None:
    """RMS errors at most 1.1 times the reference's in float32; the largest at most 2.2 times.

    Beside that one rounding of the largest value, where the reference happens to be exact.
    Rounding alone puts points beside a kink on either side of it: there the two may draw worse.
    """
    inputs = case.make(sizes, 1, device)
    with implementation("reference"), without_tf32():
        truth = forward_backward(case.call, [x.double() for x in inputs])
        eager = forward_backward(case.call, inputs, cotangents(truth_like(truth, case, inputs)))
    with implementation("triton"):
        found = forward_backward(case.call, inputs, cotangents(truth_like(truth, case, inputs)))
    # Two correct float32 sums in another order draw RMS errors that differ by a few percent.
    worse = 1.5 if case.kinked else 1.1
    for index, (actual, plain, expected) in enumerate(zip(found, eager, truth, strict=True)):
        assert (actual.dtype, actual.shape) == (plain.dtype, plain.shape)
        assert actual.isfinite().all()
        error, allowed = ((x.double() - expected).abs() for x in (actual, plain))
        rounding = torch.finfo(actual.dtype).eps * float(expected.abs().max())
        if actual.numel() < 10:  # of a few means, the reference's may be right by chance
            rounding *= 4
        rms, allowed_rms = (float(x.square().mean().sqrt()) for x in (error, allowed))
        line = (
            f"result {index}: RMS {rms:.2e}, reference {allowed_rms:.2e}; "
            f"largest {float(error.max()):.2e}, reference {float(allowed.max()):.2e}"
        )
        print(line)
        assert rms <= worse * allowed_rms + rounding, line
        assert float(error.max()) <= 2 * worse * float(allowed.max()) + rounding, line


def truth_like(truth: list[Tensor], case: OpCase, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs among ``truth``, whose cotangents the float32 runs must share."""
    return truth[: len(truth) - len(inputs)]


@gpu
@every_op
def test_real_size_against_float64(name: str) -> None:
    check_against_float64(OPS[name], FULL_SHAPE, CUDA)


def check_same_bits(case: OpCase, sizes: Sizes, device: torch.device, times: int) -> None:
    inputs = case.make(sizes, 1, device)
    with deterministic(), implementation("triton"):
        first = forward_backward(case.call, inputs)
        for _ in range(times - 1):
            assert_same(forward_backward(case.call, inputs), first, "again")


@gpu
@every_op
def test_deterministic_over_ten_runs(name: str) -> None:
    check_same_bits(OPS[name], FULL_SHAPE, CUDA, times=10)


# Streams, devices, graphs


@gpu
@every_op
def test_side_stream_and_no_waiting(name: str) -> None:
    """What a stream has still to do, the op on it waits for, and the host does not."""
    case = OPS[name]
    inputs, fresh = (case.make(MEDIUM, seed, CUDA) for seed in (1, 11))
    with deterministic():
        expected = forward_backward(case.call, fresh)
        grads = cotangents(expected[: len(expected) - len(inputs)])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)  # about half a second
            for x, y in zip(inputs, fresh, strict=True):
                x.copy_(y)
            found = forward_backward(case.call, inputs, grads)
            waited = stream.query()
        stream.synchronize()
    assert not waited, "the host waited for the device"
    assert_same(found, expected, "on a side stream")


@gpu
@every_op
def test_second_device(name: str) -> None:
    """The tensors' device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case, second = OPS[name], torch.device("cuda", 1)
    inputs = case.make(MEDIUM, 1, CUDA)
    with torch.cuda.device(0), deterministic():
        expected = forward_backward(case.call, inputs)
        grads = [g.to(second) for g in cotangents(expected[: len(expected) - len(inputs)])]
        found = forward_backward(case.call, [x.to(second) for x in inputs], grads)
        assert torch.cuda.current_device() == 0
    assert all(x.device == second for x in found)
    assert_same([x.cpu() for x in found], [x.cpu() for x in expected], "on the second device")


@gpu
@every_op
def test_no_synchronisation(name: str) -> None:
    case = OPS[name]
    inputs = case.make(MEDIUM, 1, CUDA)
    found = forward_backward(case.call, inputs)
    grads = cotangents(found[: len(found) - len(inputs)])
    for fixed_order in (False, True):
        torch.use_deterministic_algorithms(fixed_order)
        forward_backward(case.call, inputs, grads)
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_backward(case.call, inputs, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(False)


@gpu
@pytest.mark.parametrize("fixed_order", [False, True], ids=["any-order", "deterministic"])
@every_op
def test_captured_graph(name: str, fixed_order: bool) -> None:
    """Forward and backward recorded once, replayed with other inputs in the same memory."""
    case = OPS[name]
    inputs = case.make(MEDIUM, 1, CUDA)
    first = forward_backward(case.call, inputs)
    grads = cotangents(first[: len(first) - len(inputs)])
    torch.use_deterministic_algorithms(fixed_order)
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                forward_backward(case.call, inputs, grads)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward_backward(case.call, inputs, grads)
        for seed in (21, 31):
            fresh = case.make(MEDIUM, seed, CUDA)
            for x, y in zip(inputs, fresh, strict=True):
                x.copy_(y)
            graph.replay()
            expected = forward_backward(case.call, fresh, grads)
            if fixed_order:
                assert_same(found, expected, "replayed")
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert_near(a, b, ANOTHER_ORDER, f"replayed {index}")
    finally:
        torch.use_deterministic_algorithms(False)


# Sizes beyond 32 bits

# Bytes of GPU memory an element of the largest tensor (float16), everything included.
BATCH_BYTES = {"multi_window_lncc": 60, "weighted_lncc": 60}
ON_THE_FULL_GRID = [name for name in OPS if name not in ("warp border", "warp coarse")]


def check_batch(case: OpCase, sizes: Sizes, device: torch.device, elements: int) -> None:
    """As many items as it takes for a tensor of ``elements``: each as if it were alone."""
    items = [[x.half() for x in case.make(sizes, seed, device)] for seed in (1, 11)]
    with implementation("triton"):
        single = [outputs_of(case.call(*item)) for item in items]
        means = single[0][0].ndim < 5
        largest = max(x.numel() for x in (*items[0], *single[0]))
        pairs = -(-elements // (2 * largest)) + 1

        def repeated(tensors: tuple[Tensor, ...]) -> Tensor:
            return torch.cat(tensors).repeat(pairs, 1, 1, 1, 1)

        inputs = [repeated(xs) for xs in zip(*items, strict=True)]
        if means:
            # Scaled up by the number of voxels, or a gradient would be too small for float16.
            scales = [[x.new_full(x.shape, float(items[0][0].numel())) for x in single[0]]] * 2
            grads = [g * (2 * pairs) for g in scales[0]]
        else:
            scales = [cotangents(x) for x in single]
            grads = [repeated(gs) for gs in zip(*scales, strict=True)]
        alone = [
            forward_backward(case.call, item, g) for item, g in zip(items, scales, strict=True)
        ]
        found = forward_backward(case.call, inputs, grads)
    count = len(single[0])
    for index, x in enumerate(found):
        pair = [results[index] for results in alone]
        if means and index < count:
            assert_near(x, (pair[0] + pair[1]) / 2, 1e-4, "mean")
            continue
        for b in (0, 1, pairs, 2 * pairs - 2, 2 * pairs - 1):
            assert_near(x[b], pair[b % 2][0], 2e-3, f"item {b} of result {index}")


@gpu
@pytest.mark.parametrize("name", ON_THE_FULL_GRID)
def test_batches_beyond_32_bits(name: str) -> None:
    need_memory(BATCH_BYTES.get(name, 30) * INT32 / 1e9)
    check_batch(OPS[name], FULL_SHAPE, CUDA, INT32 + 1)


def check_channels(
    call: Callable[..., Tensor], sizes: Sizes, device: torch.device, elements: int
) -> None:
    """``call(image, disp)`` with as many channels as it takes: each as if it were alone."""
    _, disp = OPS["warp"].make(sizes, 1, device)
    channels = elements // math.prod(sizes) + 2
    image = torch.rand(1, channels, *sizes, dtype=torch.float16, device=device)
    grad = torch.rand(1, channels, *sizes, dtype=torch.float16, device=device)
    with implementation("triton"):
        found = forward_backward(call, [image, disp], [grad])
        for c in (0, 1, channels - 2, channels - 1):
            one = [x[:, c : c + 1].contiguous() for x in (image, grad)]
            alone = forward_backward(call, [one[0], disp], [one[1]])
            assert torch.equal(found[0][:, c], alone[0][:, 0]), f"channel {c} differs"
            # Half an ulp of float16 either way, of values up to 4.
            assert_near(found[1][:, c], alone[1][:, 0], 2e-3, f"gradient of channel {c}")
    assert found[2].isfinite().all()


@gpu
def test_channels_beyond_32_bits() -> None:
    need_memory(14 * INT32 / 1e9)
    check_channels(warp, FULL_SHAPE, CUDA, INT32 + 1)


def quarters(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Displacements of up to two voxels in steps of a quarter: exact in float16, at any place."""
    return torch.randint(-8, 9, shape, dtype=torch.int8, device=device).half() / 4


def check_one_volume(sizes: Sizes, device: torch.device) -> None:
    """The end of a volume, where offsets are largest, against the same voxels on their own.

    Quarter-voxel weights and float16 values are exact, so it does not matter where they lie.
    """
    depth = 16
    crop = (slice(None), slice(None), slice(-depth, None))
    # Two voxels away and one more: these slices see nothing that was cut off.
    inner = (slice(None), slice(None), slice(-depth // 2, None))
    image = torch.rand(1, 1, *sizes, dtype=torch.float16, device=device)
    disp, outer = quarters((1, 3, *sizes), device), quarters((1, 3, *sizes), device)
    cropped = [x[crop].contiguous() for x in (image, outer, disp)]
    with implementation("triton"):
        found = [*warp_compose(image, outer, disp), warp(image, disp), compose(outer, disp)]
        one, other = warp_compose(*cropped)
        for index, expected in enumerate((one, other, one, other)):
            assert torch.equal(found[index][inner], expected[inner]), f"output {index} differs"
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
        grads = found[:2]
        del found
        needs = (True, True, True)
        by = torch.ops.ulae_rt.warp_compose_backward(*grads, image, outer, disp, 1, *needs)
        grads = [g[crop].contiguous() for g in grads]
        by_crop = torch.ops.ulae_rt.warp_compose_backward(*grads, *cropped, 1, *needs)
    for index, (actual, expected) in enumerate(zip(by, by_crop, strict=True)):
        assert_near(actual[inner], expected[inner], 2e-3, f"gradient {index}")


@gpu
def test_sampling_beyond_32_bits_in_one_volume() -> None:
    sizes = (1292, 1290, 1290)  # 2^31 and 2.5 million more
    need_memory(54 * INT32 / 1e9)
    check_one_volume(sizes, CUDA)


def check_resize(sizes: Sizes, device: torch.device) -> None:
    """A ramp stays a line between the same ends; the adjoint keeps the sum."""
    disp = torch.ones(1, 3, *sizes, device=device)
    for axis, size in enumerate(sizes):
        ramp = torch.linspace(0, 1, size, device=device)
        disp[:, axis] *= ramp.view([-1 if i == axis else 1 for i in range(3)])
    with implementation("triton"):
        out = resize_displacement(disp, 2)
        for axis, size in enumerate(sizes):
            line = 2 * torch.linspace(0, 1, 2 * size, device=device)
            line = line.view([-1 if i == axis else 1 for i in range(3)])
            for place in (slice(0, 4), slice(-4, None)):
                part = out[0, axis, place]
                expected = (line[place] if axis == 0 else line).expand_as(part)
                assert_near(part, expected, 1e-5, f"axis {axis}")
        total = out.numel()
        out.fill_(1.0)
        by = torch.ops.ulae_rt.resize_displacement_backward(out, 2)
    assert abs(float(by.sum(dtype=torch.float64)) / (2 * total) - 1) < 1e-6


@gpu
def test_resizing_beyond_32_bits_in_one_volume() -> None:
    need_memory(34 * INT32 / 1e9)
    check_resize((646, 645, 645), CUDA)


def check_diffusion(sizes: Sizes, device: torch.device) -> None:
    """Zero but for the end of the volume, which float64 can be asked about on its own."""
    depth = 8
    disp = torch.zeros(1, 3, *sizes, dtype=torch.float16, device=device)
    disp[:, :, -depth:] = quarters((1, 3, depth, *sizes[1:]), device)
    end = disp[:, :, -depth - 2 :].double()
    weight = float(disp.numel())
    loss = 0.0
    grad = torch.zeros_like(end)
    for axis in (2, 3, 4):
        steps = end.diff(dim=axis)
        count = disp.numel() // sizes[axis - 2] * (sizes[axis - 2] - 1)
        loss += float(steps.square().sum()) / (3 * count)
        pull = steps * (2 * weight / (3 * count))
        grad.narrow(axis, 0, steps.shape[axis]).sub_(pull)
        grad.narrow(axis, 1, steps.shape[axis]).add_(pull)
    with implementation("triton"):
        value, found = diffusion_with_gradient(disp, weight)
    assert abs(float(value) / loss - 1) < 1e-4
    assert_near(found[:, :, -depth - 1 :], grad[:, :, 1:], 2e-3, "gradient")
    assert not found[:, :, : -depth - 1].any()


@gpu
def test_diffusion_beyond_32_bits_in_one_volume() -> None:
    need_memory(16 * INT32 / 1e9)
    check_diffusion((1292, 1290, 1290), CUDA)


def check_lncc(sizes: Sizes, device: torch.device, windows: tuple[int, ...]) -> None:
    """Zero but for the end of the volume: nothing correlates elsewhere."""
    depth, margin = 24, 16
    x, y = (torch.zeros(1, 1, *sizes, dtype=torch.float16, device=device) for _ in range(2))
    for image in (x, y):
        image[:, :, -depth:] = torch.rand(1, 1, depth, *sizes[1:], device=device).half()
    ends = [image[:, :, -depth - margin :].contiguous() for image in (x, y)]
    with implementation("triton"):
        results = []
        for pair in ((x, y), ends):
            leaf = pair[0].detach().requires_grad_()
            total = multi_window_lncc(leaf, pair[1], windows) * leaf.numel()
            results.append((total.detach(), *torch.autograd.grad(total.sum(), leaf)))
    (total, grad), (expected, by_end) = results
    assert_near(total, expected, 1e-4, "sums of cc")
    # Near the first slices of the end alone, its zeros are those outside the volume: the same.
    assert_near(grad[:, :, -depth - margin :], by_end, 2e-3, "gradient")


@gpu
def test_lncc_beyond_30_bits_in_one_volume() -> None:
    need_memory(25 * INT32 / 1e9)
    check_lncc((1040, 1024, 1024), CUDA, WINDOWS)


def check_norm(sizes: Sizes, device: torch.device) -> None:
    """One channel of many voxels; the moments by torch, slice by slice in float64."""
    x = torch.rand(1, 1, *sizes, dtype=torch.float16, device=device)
    x[:, :, -4:] += 1
    mean = torch.stack([s.double().mean() for s in x[0, 0]]).mean()
    variance = torch.stack([(s.double() - mean).square().mean() for s in x[0, 0]]).mean()
    with implementation("triton"):
        y = norm_activate(x)
    for place in (slice(0, 4), slice(-4, None)):
        part = (x[:, :, place].double() - mean) / (variance + 1e-5).sqrt()
        expected = torch.where(part > 0, part, 0.2 * part)
        assert_near(y[:, :, place], expected, 1e-3, "normalised")


@gpu
def test_norm_activate_beyond_32_bits_in_one_channel() -> None:
    need_memory(8 * INT32 / 1e9)
    check_norm((1292, 1290, 1290), CUDA)


# Memory

# Volumes of 160x192x160 float32 that may exist beside the inputs and the outputs' gradients, at
# the forward pass without gradients and at forward and backward to every input, results included.
CEILINGS = {
    "warp": (1, 5),  # out; and both gradients
    "warp border": (1, 5),
    "warp coarse": (1, 7.5),  # the gradient on the full grid, and the passes that bring it down
    "compose": (3, 9),
    "compose coarse": (3, 11.5),
    "warp_compose": (4, 11),
    "warp_compose coarse": (4, 13.5),
    "resize_displacement": (3, 6),
    "resize_displacement by 4": (3, 5),
    "multi_window_lncc": (5, 12),  # five sums; and five adjoint maps and the gradients
    "weighted_lncc": (5, 14),
    "diffusion": (0, 3),
    "norm_activate": (16, 32),
    "upsample_concat": (18, 22),
}


def peak_and_kept(run: Callable[[], object]) -> tuple[float, float]:
    """Bytes allocated at most while ``run`` runs, and at its end with its result alive."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del result
    return peak, kept


@gpu
@every_op
def test_memory_ceiling(name: str) -> None:
    case = OPS[name]
    inputs = case.make(FULL_SHAPE, 1, CUDA)
    found = forward_backward(case.call, inputs)  # whatever is allocated once is now
    count = len(found) - len(inputs)
    grads = cotangents(found[:count])
    size = sum(x.numel() * x.element_size() for x in found[:count])
    del found
    leaves = [x.detach().requires_grad_() for x in inputs]
    volume = 4 * math.prod(FULL_SHAPE)
    small = 0.2 * volume  # partial sums, and what the allocator rounds up

    def without_gradients() -> object:
        with torch.no_grad():
            return case.call(*leaves)

    forward, kept = peak_and_kept(without_gradients)
    both, _ = peak_and_kept(lambda: forward_backward(case.call, inputs, grads))
    print(f"forward {forward / volume:.2f}, with backward {both / volume:.2f} volumes")
    assert kept <= size + small, f"{(kept - size) / volume:.2f} volumes saved without gradients"
    assert forward <= CEILINGS[name][0] * volume + small
    assert both <= CEILINGS[name][1] * volume + small


@gpu
def test_memory_ceiling_of_one_gradient() -> None:
    """Training differentiates by one image: three adjoint maps, not five."""
    x, y = OPS["multi_window_lncc"].make(FULL_SHAPE, 1, CUDA)

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(multi_window_lncc(leaf, y, WINDOWS).sum(), leaf)[0]

    run()
    peak, _ = peak_and_kept(run)
    volume = 4 * math.prod(FULL_SHAPE)
    print(f"{peak / volume:.2f} volumes")
    assert peak <= 9.1 * volume


# Operations without a gradient


def check_values(case: OpCase, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    """RMS error at most 1.1 times the reference's in the same type, the largest at most 2.2 times.

    Beside that one rounding of the largest value: in half precision the reference's single one.
    """
    inputs = [x.to(dtype) for x in case.make(sizes, 1, device)]
    with implementation("reference"), without_tf32():
        truth = outputs_of(case.call(*(x.double() for x in inputs)))
        eager = outputs_of(case.call(*inputs))
    with implementation("triton"):
        found = outputs_of(case.call(*inputs))
    for actual, plain, expected in zip(found, eager, truth, strict=True):
        assert (actual.dtype, actual.shape) == (plain.dtype, plain.shape)
        error, allowed = ((x.double() - expected).abs() for x in (actual, plain))
        rounding = torch.finfo(dtype).eps * float(expected.abs().max())
        rms, allowed_rms = (float(x.square().mean().sqrt()) for x in (error, allowed))
        print(f"RMS {rms:.2e}, reference {allowed_rms:.2e}; largest {float(error.max()):.2e}")
        assert rms <= 1.1 * allowed_rms + rounding
        assert float(error.max()) <= 2.2 * float(allowed.max()) + rounding


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_inference_op
def test_inference_at_real_size_against_float64(name: str, dtype: torch.dtype) -> None:
    check_values(INFERENCE_OPS[name], FULL_SHAPE, CUDA, dtype)


def check_inference_again(case: OpCase, sizes: Sizes, device: torch.device, times: int) -> None:
    inputs = case.make(sizes, 1, device)
    with implementation("triton"):
        first = outputs_of(case.call(*inputs))
        for _ in range(times - 1):
            assert_same(outputs_of(case.call(*inputs)), first, "again")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert_same(outputs_of(case.call(*inputs)), first, "under autocast")


@gpu
@every_inference_op
def test_inference_has_the_same_bits_every_time(name: str) -> None:
    check_inference_again(INFERENCE_OPS[name], FULL_SHAPE, CUDA, times=10)


@gpu
@every_inference_op
def test_inference_on_a_side_stream_without_waiting(name: str) -> None:
    case = INFERENCE_OPS[name]
    inputs, fresh = (case.make(MEDIUM, seed, CUDA) for seed in (1, 11))
    expected = outputs_of(case.call(*fresh))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
            for x, y in zip(inputs, fresh, strict=True):
                x.copy_(y)
            found = outputs_of(case.call(*inputs))
            waited = stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert not waited, "the host waited for the device"
    assert_same(found, expected, "on a side stream")


@gpu
@every_inference_op
def test_inference_on_the_second_device(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case, second = INFERENCE_OPS[name], torch.device("cuda", 1)
    inputs = case.make(MEDIUM, 1, CUDA)
    with torch.cuda.device(0):
        expected = outputs_of(case.call(*inputs))
        found = outputs_of(case.call(*(x.to(second) for x in inputs)))
    assert all(x.device == second for x in found)
    assert_same([x.cpu() for x in found], [x.cpu() for x in expected], "on the second device")


@gpu
@every_inference_op
def test_inference_in_a_captured_graph(name: str) -> None:
    case = INFERENCE_OPS[name]
    inputs = case.make(MEDIUM, 1, CUDA)
    case.call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs_of(case.call(*inputs))
    for seed in (21, 31):
        fresh = case.make(MEDIUM, seed, CUDA)
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        assert_same(found, outputs_of(case.call(*fresh)), "replayed")


@gpu
@every_inference_op
def test_inference_takes_no_memory_but_its_result(name: str) -> None:
    case = INFERENCE_OPS[name]
    inputs = case.make(FULL_SHAPE, 1, CUDA)
    size = sum(x.numel() * x.element_size() for x in outputs_of(case.call(*inputs)))
    peak, kept = peak_and_kept(lambda: case.call(*inputs))
    small = 4 * inputs[3].numel() * inputs[3].element_size() + 2**22  # the weights' own order
    assert kept <= size + 2**22
    assert peak <= size + small


def check_block(
    shape: tuple[int, ...], channels: int, dilations: tuple[int, ...], device: torch.device
) -> None:
    """The end of a batch of volumes, where offsets are largest, against those voxels alone."""
    B, C, *sizes = shape
    halves = [(size + 1) // 2 for size in sizes]
    slices = 2 * max(dilations)  # of the result, which are two of x: half of them see no cut
    # Made a slice at a time: no second copy of what takes gigabytes.
    x = torch.empty(B, *sizes, C, dtype=torch.float16, device=device).permute(0, 4, 1, 2, 3)
    term = torch.empty(B, *halves, channels, dtype=torch.float16, device=device)
    term = term.permute(0, 4, 1, 2, 3)
    for tensor in (x, term):
        for part in tensor.unbind(2):
            part.copy_(torch.rand(part.shape, device=device) - 0.5)
    mean_term = torch.zeros(B, channels, device=device)
    weights = torch.randn(len(dilations), channels, C, 3, 3, 3, generator=torch.Generator())
    weights = weights.to(device, torch.float16) * 0.1
    with implementation("triton"):
        found = moving_block(x, term, mean_term, weights, dilations)
        ends = [x[-1:, :, -2 * slices :].contiguous(), term[-1:, :, -slices:].contiguous()]
        alone = moving_block(*ends, mean_term[-1:], weights, dilations)
    inner = (slice(None), slice(None), slice(-(slices // 2), None))
    assert torch.equal(found[-1:][inner], alone[inner]), "the end differs"


@gpu
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 1, 1292, 1290, 1290), 4),
        ((1, 16, 514, 512, 512), 32),
        ((440, 1, *FULL_SHAPE), 4),
        ((219, 16, 80, 96, 80), 32),
    ],
    ids=str,
)
def test_moving_block_beyond_32_bits(shape: tuple[int, ...], channels: int) -> None:
    need_memory(16)
    check_block(shape, channels, (1, 2, 4), CUDA)


# Compilers and types


class Objective(torch.nn.Module):
    """Every op of the registration objective, one after the other."""

    def forward(self, moving: Tensor, fixed: Tensor, u: Tensor, v: Tensor) -> Tensor:
        full = resize_displacement(v, 2)
        warped, field = warp_compose(moving, full, v, 2)
        field = compose(field, u)
        warped = norm_activate(warp(warped, u))
        similarity, _ = weighted_lncc(warped, fixed, (7, 5), (1.0, 0.5))
        return multi_window_lncc(warped, fixed, (5,)).sum() + similarity - diffusion(field)


def objective_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    moving, fixed = OPS["multi_window_lncc"].make(sizes, 1, device)
    return [moving, fixed, *OPS["warp"].make(sizes, 5, device)[1:],
            *OPS["resize_displacement"].make(sizes, 7, device)]  # fmt: skip


def check_compiled(sizes: Sizes, device: torch.device, backend: str) -> None:
    inputs = objective_inputs(sizes, device)
    with implementation("triton"):
        expected = forward_backward(Objective(), inputs)
        compiled = torch.compile(Objective(), fullgraph=True, dynamic=False, backend=backend)
        found = forward_backward(compiled, inputs)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_near(a, b, 1e-3, f"compiled {index}")


@gpu
@pytest.mark.filterwarnings("ignore")  # a compiler's advice about this machine is no failure
def test_inductor() -> None:
    check_compiled(MEDIUM, CUDA, "inductor")


@gpu
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_the_network_whole() -> None:
    moving, fixed = (smooth_image((32, 48, 32), seed=s).float().to(CUDA) for s in (1, 2))
    net = small_net().to(CUDA)
    with torch.no_grad(), without_tf32():
        expected = net.predict(moving, fixed)
        found = torch.compile(net.predict, fullgraph=True, dynamic=False)(moving, fixed)
    assert_close("displacement", found.disp, expected.disp, TOL["network float32"])
    assert_close("moved", found.moved, expected.moved, TOL["network float32"])


def check_autocast(case: OpCase, sizes: Sizes, device: torch.device) -> None:
    inputs = case.make(sizes, 1, device)
    with implementation("triton"), deterministic():
        expected = forward_backward(case.call, inputs)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = forward_backward(case.call, inputs)
    assert_same(found, expected, "under autocast")


@gpu
@every_op
def test_autocast_changes_nothing(name: str) -> None:
    check_autocast(OPS[name], MEDIUM, CUDA)


# The network


def network_results(
    choice: str, device: torch.device, sizes: Sizes, dtype: torch.dtype
) -> list[Tensor]:
    """Moved image, displacement, loss, and all parameters' gradients as one vector."""
    net = small_net(channels=8).to(device=device, dtype=dtype)
    moving, fixed = (smooth_image(sizes, seed=s).to(device=device, dtype=dtype) for s in (1, 2))
    with implementation(choice), without_tf32():
        out = net(moving, fixed)
        loss = registration_loss(out.progressive[-1], fixed, out.disp, windows=(7, 5)).total
        grads = torch.autograd.grad(loss + out.moved.square().mean(), list(net.parameters()))
    flat = torch.cat([g.flatten() for g in grads])
    return [out.moved.detach(), out.disp.detach(), loss.detach(), flat]


def check_network(sizes: Sizes, device: torch.device) -> None:
    truth = network_results("reference", device, sizes, torch.float64)
    eager = network_results("reference", device, sizes, torch.float32)
    found = network_results("triton", device, sizes, torch.float32)
    for name, actual, expected in zip(("moved", "disp", "loss"), found, eager, strict=False):
        assert_close(name, actual, expected, TOL["network float32"])
    error, allowed = (float((x[3] - truth[3]).norm() / truth[3].norm()) for x in (found, eager))
    print(f"gradient: off by {error:.1e} of its length, the reference by {allowed:.1e}")
    # Sampling points beside a kink fall on either side of it in either.
    assert error <= 2 * allowed + 1e-3


@gpu
def test_network_with_kernels_and_with_references() -> None:
    check_network((48, 64, 48), CUDA)


@gpu
def test_network_in_bf16() -> None:
    moving, fixed = (smooth_image((48, 64, 48), seed=s).float().to(CUDA) for s in (1, 2))
    net = small_net(channels=8).to(CUDA)
    with torch.no_grad(), without_tf32():
        expected = net.predict(moving, fixed)
        net.feature_dtype = torch.bfloat16
        found = net.predict(moving, fixed)
    assert_close("displacement", found.disp, expected.disp, TOL["network bfloat16"])


# compute-sanitizer

EVERY_OP_ONCE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from _support.ops import INFERENCE_OPS, OPS, forward_backward
for sizes in ((4, 8, 12), (8, 20, 36)):
    for name, case in OPS.items():
        forward_backward(case.call, case.make(sizes, 1, torch.device(sys.argv[2])))
        print(name, sizes, flush=True)
    for name, case in INFERENCE_OPS.items():
        case.call(*case.make(sizes, 1, torch.device(sys.argv[2])))
        print(name, sizes, flush=True)
"""


def every_op_once(device: str) -> list[str]:
    return [sys.executable, "-c", EVERY_OP_ONCE, str(Path(__file__).parents[1]), device]


@gpu
def test_compute_sanitizer() -> None:
    """No kernel reads or writes outside its tensors, each of which is then one allocation."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [tool, "--tool", "memcheck", *every_op_once("cuda")],
            env=environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than three minutes")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-4000:]


# The same code where there is no GPU

TINY: Sizes = (4, 8, 12)


@every_op
def test_the_table_of_ops(name: str) -> None:
    case = OPS[name]
    inputs = case.make(TINY, 1, CPU)
    assert all(x.dtype == torch.float32 for x in inputs)
    found = forward_backward(case.call, inputs)
    assert all(x.isfinite().all() for x in found)
    assert [x.shape for x in found[-len(inputs) :]] == [x.shape for x in inputs]
    assert name in CEILINGS


def test_the_checks_themselves(triton_device: torch.device) -> None:
    warp_alone = OPS["warp"]
    check_against_float64(warp_alone, TINY, triton_device)
    check_same_bits(warp_alone, TINY, triton_device, times=2)
    check_batch(warp_alone, TINY, triton_device, 2000)
    check_channels(warp, TINY, triton_device, 1000)
    check_resize((3, 4, 5), triton_device)
    check_diffusion((12, 4, 5), triton_device)
    check_norm((10, 4, 5), triton_device)
    for case in INFERENCE_OPS.values():
        check_values(case, TINY, triton_device, torch.float32)
        check_values(case, TINY, triton_device, torch.bfloat16)
        check_inference_again(case, TINY, triton_device, times=2)
    check_block((2, 1, 20, 3, 4), 3, (1, 2), triton_device)
    check_block((1, 4, 20, 3, 4), 3, (1, 2), triton_device)
    check_autocast(OPS["diffusion"], TINY, triton_device)
