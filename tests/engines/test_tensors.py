"""Engines that are given torch tensors: on the CPU for real, on a GPU with one that is made up."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from _support.cuda import FakeCuda, OnGpu
from _support.engines import SHAPE, images, write_engine
from _support.nets import SHAPE as NET_SHAPE
from _support.nets import small_net, small_weights
from _support.tolerances import TOL, assert_close
from ulae_rt.engines import Engine, EngineOutput, load_engine
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.backends.pt2 import Pt2Backend
from ulae_rt.engines.values import RANGE_SLACK
from ulae_rt.errors import DtypeError, EngineMismatch, IntensityError, OutOfMemory, ShapeError
from ulae_rt.export import pt2
from ulae_rt.manifest import ANY_BATCH, EngineMetadata
from ulae_rt.registration.network import load_network

METADATA = EngineMetadata("paper", SHAPE, 1.0, "max", "none", "CC0")
GPU = "cuda:0"


class Sums:
    """Gives M + F and three times M - F, of what it is fed, and keeps both."""

    name = "sums"

    def __init__(self, device="cpu", batch=ANY_BATCH):
        self.device = device
        self.inputs = dict.fromkeys(("moving", "fixed"), (batch, 1, *SHAPE))
        self.outputs = {"moved": (batch, 1, *SHAPE), "disp": (batch, 3, *SHAPE)}
        self.fed, self.given = [], []
        self.most = 100  # pairs that there is memory for
        self.add = 0.0  # to the last value of each result

    def run(self, feeds, outputs=None):
        if len(feeds["moving"]) > self.most:
            raise failure("running it", RuntimeError("CUDA out of memory. Tried to allocate"))
        self.fed.append(feeds)
        moving, fixed = feeds["moving"], feeds["fixed"]
        library = np if isinstance(moving, np.ndarray) else torch
        difference = moving - fixed
        results = {
            "moved": moving + fixed,
            "disp": library.concatenate([difference, difference, difference], 1),
        }
        for result in results.values():
            result[-1, -1, -1, -1, -1] += self.add
        self.given.append({name: results[name] for name in outputs or results})
        return self.given[-1]

    def close(self):
        pass


def tensors(batch=1):
    return [torch.from_numpy(image) for image in images(batch)]


@pytest.fixture
def on_gpu():
    """Images that say they are on a GPU."""
    OnGpu.waits.clear()
    return lambda batch=1: [image.as_subclass(OnGpu) for image in tensors(batch)]


@pytest.fixture
def cpu():
    with Engine(Sums(), METADATA, "fp32") as engine:
        yield engine


@pytest.fixture
def gpu():
    with Engine(Sums(GPU), METADATA, "fp32") as engine:
        yield engine


# On the CPU


def test_tensors_are_read_and_given_without_a_copy(cpu):
    moving, fixed = tensors()
    out = cpu.run(moving, fixed)
    (fed,), (given,) = cpu._backend.fed, cpu._backend.given
    assert fed["moving"].ctypes.data == moving.data_ptr()
    assert fed["fixed"].ctypes.data == fixed.data_ptr()
    assert isinstance(out, EngineOutput)
    assert out.moved.data_ptr() == given["moved"].ctypes.data
    assert torch.equal(out.moved, moving + fixed)
    disp = cpu.displacement(moving, fixed)
    assert disp.data_ptr() == cpu._backend.given[-1]["disp"].ctypes.data
    assert torch.equal(disp, (moving - fixed).expand(-1, 3, -1, -1, -1))


def test_tensors_in_pieces_of_a_larger_one(cpu):
    wide = torch.rand(3, 1, *SHAPE, 2)
    moving, fixed = wide[..., 0], wide[..., 1].flip(2)
    out = cpu.run(moving, fixed)  # part by part
    assert len(cpu._backend.fed) == 3
    assert torch.equal(out.moved, moving + fixed)
    assert out.disp.shape == (3, 3, *SHAPE)


def test_a_sign_that_torch_has_not_applied_counts(cpu, gpu):
    value = torch.complex(torch.zeros(1, 1, *SHAPE), -torch.rand(1, 1, *SHAPE))
    moving = value.conj().imag
    assert moving.is_neg()
    (_, fixed) = tensors()
    assert torch.equal(cpu.run(moving, fixed).moved, moving + fixed)
    gpu.run(moving.as_subclass(OnGpu), fixed.as_subclass(OnGpu))
    assert not gpu._backend.fed[0]["moving"].is_neg()


def pt2_engine(folder: Path) -> Engine:
    built = pt2.build(small_net(), NET_SHAPE, precision="fp32", batch=1, target="cpu")
    (folder / "net.pt2").write_bytes(built.content)
    specs = {"moving": 1, "fixed": 1, "moved": 1, "disp": 3}
    specs = [SimpleNamespace(name=n, shape=(1, c, *NET_SHAPE)) for n, c in specs.items()]
    manifest = SimpleNamespace(artefact="net.pt2", inputs=specs[:2], outputs=specs[2:])
    metadata = EngineMetadata("paper", NET_SHAPE, 2.0, "max", "none", "CC0")
    return Engine(Pt2Backend(built.content, manifest), metadata, "fp32")


def opened(kind: str, folder: Path, device: str = "cpu") -> Engine:
    if kind == "onnxruntime":
        return load_engine(write_engine(folder), device=device)
    if kind == "pt2":
        return pt2_engine(folder)
    return load_network(small_weights(folder / "w.safetensors"), device=device)


@pytest.mark.parametrize("kind", ["onnxruntime", "pt2", "torch"])
def test_tensors_give_what_arrays_give(kind, tmp_path):
    with opened(kind, tmp_path) as engine:
        first, second = torch.rand(2, 2, 2, 1, *engine.metadata.shape)
        expected = engine.run(*(image.numpy() for image in first))
        assert isinstance(expected.moved, np.ndarray)
        out = engine.run(*first)
        np.testing.assert_array_equal(out.moved, expected.moved)
        np.testing.assert_array_equal(out.disp, expected.disp)
        disp = engine.submit(*first).result(60).disp
        np.testing.assert_array_equal(disp, expected.disp)
        kept = out.disp.clone()
        engine.run(*second)
        assert torch.equal(out.disp, kept)  # not the memory of the next run
        disp = engine.displacement(*first)
        assert (disp.device.type, disp.dtype) == ("cpu", torch.float32)
    np.testing.assert_array_equal(disp, expected.disp)
    scale = torch.ones((), requires_grad=True)
    (disp * scale).sum().backward()  # as of no inference tensor
    assert scale.grad is not None
    disp += 1


@pytest.mark.parametrize("value", [1.5, -0.1, torch.nan, torch.inf, -torch.inf])
def test_values_are_checked_as_of_arrays(cpu, gpu, value):
    pairs = images(3)
    pairs[1, 2, 0, 1, 2, 3] = value
    with pytest.raises(IntensityError) as caught:
        cpu.run(*pairs)
    assert str(caught.value).startswith("fixed of pair 2 (counted from 0, of 3): ")
    message = re.escape(str(caught.value))
    with pytest.raises(IntensityError, match=f"^{message}$"):
        cpu.run(*map(torch.from_numpy, pairs))
    with pytest.raises(IntensityError, match=f"^{message}$"):
        gpu.run(*(torch.from_numpy(image).as_subclass(OnGpu) for image in pairs))
    assert not cpu._backend.fed
    assert not gpu._backend.fed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_results_are_checked_as_of_arrays(cpu, gpu, on_gpu, value):
    cpu._backend.add = gpu._backend.add = value
    message = r"moved of pair %s has 1 of 120 values NaN or infinite$"
    with pytest.raises(EngineMismatch, match=message % "0"):
        cpu.run(*tensors())
    with pytest.raises(EngineMismatch, match=message % r"7 \(counted from 0, of 10\)"):
        gpu.run(*on_gpu(10))  # eight of them are the first part


def test_rounding_at_the_ends_is_let_through(gpu, on_gpu):
    moving, fixed = on_gpu()
    moving[0, 0, 0, 0, :3] = torch.tensor([-RANGE_SLACK, 1 + RANGE_SLACK / 2, -0.0])
    assert gpu.run(moving, fixed).moved.shape == moving.shape
    moving[0, 0, 0, 0, 0] = -1.5 * RANGE_SLACK
    with pytest.raises(IntensityError, match="expected 0 to 1"):
        gpu.run(moving, fixed)


def test_tensors_of_another_shape_are_refused(cpu):
    moving, fixed = tensors()
    with pytest.raises(ShapeError, match=r"moving has shape \(1, 1, 4, 6, 4\), expected \(B, 1,"):
        cpu.run(moving[..., :-1], fixed)
    with pytest.raises(ShapeError, match=r"moving has shape \(\), expected \(B, 1,"):
        cpu.run(moving[0, 0, 0, 0, 0], fixed)


# On a GPU that is made up


def test_the_host_waits_for_the_images_once_and_for_the_results_once(gpu, on_gpu):
    moving, fixed = on_gpu(20)
    assert gpu.at_once == 8
    out = gpu.run(moving, fixed)
    assert OnGpu.waits == ["tolist", "tolist"]
    assert len(gpu._backend.fed) == 3
    assert out.moved.cpu().equal((moving + fixed).cpu())
    OnGpu.waits.clear()
    gpu.displacement(moving, fixed)
    assert OnGpu.waits == ["tolist", "tolist"]


def test_a_backend_is_fed_the_tensors_themselves(gpu, on_gpu):
    moving, fixed = aligned(on_gpu(4))
    gpu.run(moving, fixed)
    (fed,) = gpu._backend.fed
    assert fed["moving"].data_ptr() == moving.data_ptr()
    assert fed["fixed"].data_ptr() == fixed.data_ptr()


def aligned(pair):
    """The same values where an allocation on a GPU could begin."""
    memory = torch.zeros(sum(image.numel() for image in pair) + 256)
    start = -memory.data_ptr() % 256 // 4
    images = []
    for image in pair:
        part = memory[start : start + image.numel()].view(image.shape)
        images.append(part.copy_(image.as_subclass(torch.Tensor)).as_subclass(OnGpu))
        start += -(-image.numel() // 64) * 64
    return images


def test_a_backend_is_fed_what_is_aligned_and_in_one_piece(gpu, on_gpu, monkeypatch):
    made = torch.Tensor.clone
    cloned = []
    monkeypatch.setattr(OnGpu, "clone", lambda image: cloned.append(made(image)) or cloned[-1])
    moving, _ = aligned(on_gpu(2))
    assert SHAPE[0] * SHAPE[1] * SHAPE[2] * 4 % 256
    (wide,) = aligned([torch.rand(1, 1, *SHAPE, 2)])
    fixed = wide[..., 0]
    assert not fixed.is_contiguous()
    out = gpu.run(moving[1:], fixed)  # of which the first begins between
    assert gpu._backend.fed[0]["moving"] is cloned[0]
    assert gpu._backend.fed[0]["fixed"].is_contiguous()
    assert torch.equal(out.moved.cpu(), (moving[1:] + fixed).cpu())


def test_full_memory_halves_what_is_given_at_once(gpu, on_gpu):
    gpu._backend.most = 2
    moving, fixed = on_gpu(5)
    out = gpu.run(moving, fixed)
    assert torch.equal(out.moved.cpu(), (moving + fixed).cpu())
    assert [len(fed["moving"]) for fed in gpu._backend.fed] == [2, 2, 1]
    assert gpu.at_once == 2
    gpu._backend.most = 0
    with pytest.raises(OutOfMemory, match="out of memory running it"):
        gpu.run(moving, fixed)


@pytest.mark.parametrize("function", ["cat", "aminmax"])
def test_full_memory_between_the_runs_is_one_error(gpu, on_gpu, monkeypatch, function):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch, function, full)
    with pytest.raises(OutOfMemory, match="out of memory registering 10 pairs at once") as caught:
        gpu.run(*on_gpu(10))
    assert "fewer pairs" in caught.value.hint


def test_submitted_tensors_are_worked_on_in_the_callers_order(gpu, on_gpu, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    streams = []
    run = gpu._backend.run

    def run_on_a_stream(*given):
        streams.append(cuda.current)
        return run(*given)

    gpu._backend.run = run_on_a_stream
    with torch.cuda.stream(cuda.Stream(GPU)):
        mine = cuda.current
        future = gpu.submit(*on_gpu())
    future.result(20)
    gpu.submit(*on_gpu()).result(20)
    assert streams == [mine, cuda.callers]


# Hints, followed


@pytest.mark.follows("torch.as_tensor({}, device='{}')")
@pytest.mark.parametrize("which", [0, 1])
def test_hint_for_an_array_and_a_tensor(cpu, which):
    pair = dict(zip(("moving", "fixed"), images(), strict=True))
    name, other = ("moving", "fixed") if which else ("fixed", "moving")
    pair[other] = torch.from_numpy(pair[other])
    with pytest.raises(DtypeError, match=f"{other} is a torch tensor and {name} is not") as caught:
        cpu.run(**pair)
    assert caught.value.hint == f"torch.as_tensor({name}, device='cpu')"
    pair[name] = eval(caught.value.hint, {"torch": torch, **pair})
    assert cpu.run(**pair).moved.shape


@pytest.mark.follows("{}.to('{}')")
def test_hint_for_a_tensor_on_another_device(cpu, gpu, on_gpu, monkeypatch):
    moving, fixed = on_gpu()
    message = "moving is on cuda:0, expected it on cpu, where this engine runs"
    with pytest.raises(DtypeError, match=message) as caught:
        cpu.run(moving, fixed)
    assert caught.value.hint == "moving.to('cpu')"
    with pytest.raises(DtypeError, match="fixed is on cuda:0") as second:
        cpu.run(eval(caught.value.hint, {"moving": moving}), fixed)
    both = [eval(e.value.hint, {"moving": moving, "fixed": fixed}) for e in (caught, second)]
    assert type(cpu.run(*both).moved) is torch.Tensor
    with pytest.raises(DtypeError, match="moving is on cpu, expected it on cuda:0") as caught:
        gpu.run(*both)
    assert caught.value.hint == "moving.to('cuda:0')"
    monkeypatch.setattr(OnGpu, "place", "cuda:1")
    with pytest.raises(DtypeError, match="moving is on cuda:1, expected it on cuda:0"):
        gpu.run(moving, fixed)


def follow(engine, moving, fixed, message, hint):
    with pytest.raises(DtypeError, match=message) as caught:
        engine.run(moving, fixed)
    assert caught.value.hint == hint
    assert engine.run(eval(hint, {"moving": moving}), fixed).moved.shape


@pytest.mark.follows("{}.float()")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_hint_for_a_tensor_of_another_type(cpu, gpu, on_gpu, dtype):
    message = f"moving is {str(dtype)[6:]}, expected float32"
    for engine, (moving, fixed) in ((cpu, tensors()), (gpu, on_gpu())):
        follow(engine, moving.type(dtype), fixed, message, "moving.float()")


@pytest.mark.follows("{}.detach()")
def test_hint_for_a_tensor_that_requires_a_gradient(cpu, gpu, on_gpu):
    for engine, (moving, fixed) in ((cpu, tensors()), (gpu, on_gpu())):
        moving.requires_grad_()
        follow(engine, moving, fixed, "moving requires a gradient, expected", "moving.detach()")


@pytest.mark.follows("{}.to_dense()")
def test_hint_for_a_sparse_tensor(cpu):
    moving, fixed = tensors()
    message = "moving is a tensor of torch.sparse_coo, expected a dense one"
    follow(cpu, moving.to_sparse(), fixed, message, "moving.to_dense()")


# On a GPU that is there


def later(image: torch.Tensor) -> torch.Tensor:
    """The image, on the GPU once its current stream has done half a second of other work."""
    torch.cuda._sleep(10**9)
    return image.cuda(non_blocking=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_gpu_computes_behind_the_stream_of_the_caller(kind, batch, tmp_path):
    """Images that are not there yet when the engine is called, on two streams in turn."""
    if kind == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            pytest.skip("this onnxruntime runs on the CPU only")
    with opened(kind, tmp_path, "cuda:0") as engine:
        pairs = [torch.rand(2, batch, 1, *engine.metadata.shape).pin_memory() for _ in range(4)]
        expected = [engine.run(*(image.numpy() for image in pair)) for pair in pairs]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        results = []
        for number, pair in enumerate(pairs):
            with torch.cuda.stream(streams[number % 2]):
                out = engine.run(*later(pair))
                assert str(out.disp.device) == engine.device == "cuda:0"
                results.append(EngineOutput(out.moved + 0, out.disp + 0))
                out.moved.fill_(7)  # the caller's own
        torch.cuda.synchronize()
    tol = TOL["network float32"]
    for out, array in zip(results, expected, strict=True):
        assert_close("moved", out.moved.cpu(), torch.from_numpy(array.moved), tol)
        assert_close("disp", out.disp.cpu(), torch.from_numpy(array.disp), tol)
