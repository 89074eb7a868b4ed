"""Programs as CUDA graphs: recorded once, replayed, their memory shared and given away."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from _support.arrays import assert_arrays_close
from _support.cuda import FakeCuda, OnGpu
from _support.nets import SHAPE, small_net
from _support.tolerances import TOL
from ulae_rt.engines.backends.captured import CapturedProgram
from ulae_rt.engines.session import Engine
from ulae_rt.errors import OutOfMemory
from ulae_rt.manifest import ANY_BATCH
from ulae_rt.registration.network import TorchBackend

REFUSED = RuntimeError("operation not permitted when stream is capturing")


def images(batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((2, batch, 1, *SHAPE), dtype=np.float32))


def sums(moving: torch.Tensor, fixed: torch.Tensor) -> list[torch.Tensor]:
    return [moving + fixed, moving - fixed]


@pytest.mark.parametrize("refused", [None, REFUSED])
def test_a_program_is_captured_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: RuntimeError | None,
) -> None:
    cuda = FakeCuda(monkeypatch, refused)
    moving, fixed = images()
    stream = torch.cuda.Stream("cpu")
    captured = CapturedProgram(cuda.recorded(sums), [moving.shape, fixed.shape], stream)
    first = captured([moving, fixed], [0, 1])
    kept = first[0].copy()
    (second,) = captured([fixed, fixed], [1])
    np.testing.assert_array_equal(first[0], kept)  # not the memory of the next run
    np.testing.assert_array_equal(first[0], moving + fixed)
    np.testing.assert_array_equal(first[1], moving - fixed)
    np.testing.assert_array_equal(second, fixed - fixed)
    runs = ["run" if refused else "replay", "synchronize"] * 2
    assert cuda.calls == ["run", "synchronize", *([] if refused else ["capture"]), *runs]
    assert ("runs without a CUDA graph" in caplog.text) == (refused is not None)


def test_a_full_memory_is_no_reason_to_run_without_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    moving, fixed = images()
    shapes = [moving.shape, fixed.shape]
    with pytest.raises(torch.OutOfMemoryError):
        CapturedProgram(cuda.recorded(sums), shapes, torch.cuda.Stream("cpu"))


@pytest.mark.parametrize("refused", [None, REFUSED])
def test_tensors_are_copied_on_the_gpu_between_what_the_caller_has_it_do(
    monkeypatch: pytest.MonkeyPatch, refused: RuntimeError | None
) -> None:
    cuda = FakeCuda(monkeypatch, refused)
    moving, fixed = map(torch.from_numpy, images())
    stream = torch.cuda.Stream("cpu")
    captured = CapturedProgram(cuda.recorded(sums), [moving.shape, fixed.shape], stream)
    cuda.calls.clear()
    first = captured([moving, fixed], [0, 1])
    ran = "run" if refused else "replay"
    order = ["its own waits for the caller's", ran, "the caller's waits for its own"]
    assert cuda.calls == order  # and the host waits for nothing
    (second,) = captured([fixed, fixed], [1])
    assert torch.equal(first[0], moving + fixed)
    assert torch.equal(first[1], moving - fixed)
    assert torch.equal(second, fixed - fixed)
    assert not any(result.is_inference() for result in first)
    (array,) = captured(images(), [0])  # arrays and tensors, in turn
    np.testing.assert_array_equal(array, first[0])


def test_the_caller_waits_for_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which some may be queued already, that reads the images."""
    cuda = FakeCuda(monkeypatch, REFUSED)
    pair = [torch.from_numpy(image) for image in images()]
    shapes = [image.shape for image in pair]
    captured = CapturedProgram(cuda.recorded(sums), shapes, torch.cuda.Stream("cpu"))

    def fail(*images: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("an illegal memory access")

    captured._program = fail
    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="illegal"):
        captured(pair, [0])
    assert cuda.calls == ["its own waits for the caller's", "the caller's waits for its own"]
    assert cuda.current is None


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    """The weights as on a GPU, whose stand-in counts."""
    cuda = FakeCuda(monkeypatch)
    net = small_net()
    backend = TorchBackend(net, "cpu", "fp32")
    backend.inputs = dict.fromkeys(("moving", "fixed"), (ANY_BATCH, 1, *SHAPE))
    backend.device = "cuda:0"
    backend._stream, backend._pool = torch.cuda.Stream("cpu"), "pool"
    call: Callable[..., Sequence[torch.Tensor]] = backend._call

    def recorded(names: Sequence[str], *pair: torch.Tensor) -> Sequence[torch.Tensor]:
        return cuda.recorded(partial(call, names))(*pair)

    backend._call, backend.cuda = recorded, cuda
    return backend


def test_weights_are_captured_once_for_each_number_of_pairs(backend: TorchBackend) -> None:
    cuda = backend.cuda
    net = small_net()
    for batch in (2, 2, 1, 2, 1):
        moving, fixed = images(batch, seed=len(cuda.calls))
        found = backend.run({"moving": moving, "fixed": fixed}, ["disp"])
        with torch.inference_mode():
            expected = net.predict(torch.from_numpy(moving), torch.from_numpy(fixed)).disp
        assert list(found) == ["disp"]
        tol = TOL["network float32 exported"]
        assert_arrays_close("disp", found["disp"], expected.numpy(), tol)
    assert [call for call in cuda.calls if call != "synchronize"] == [
        "run", "capture", "replay", "replay", "run", "capture", "replay", "replay", "replay",
    ]  # fmt: skip
    assert cuda.pools == ["pool"] * 2  # one memory for both, which never run at once


def test_weights_are_run_on_tensors_by_the_same_program(backend: TorchBackend) -> None:
    engine = Engine(backend, small_net().metadata, "fp32")
    moving, fixed = images(3)
    expected = engine.run(moving, fixed)
    out = engine.run(*(torch.from_numpy(image).as_subclass(OnGpu) for image in (moving, fixed)))
    np.testing.assert_array_equal(out.moved, expected.moved)
    np.testing.assert_array_equal(out.disp, expected.disp)
    assert set(backend._captured) == {(3, ("moved", "disp"))}


def test_the_moved_image_is_another_program_and_two_are_kept(backend: TorchBackend) -> None:
    moving, fixed = images()
    feeds = {"moving": moving, "fixed": fixed}
    both = backend.run(feeds)
    assert list(both) == ["moved", "disp"]
    alone = backend.run(feeds, ["disp"])
    np.testing.assert_array_equal(alone["disp"], both["disp"])
    assert set(backend._captured) == {(1, ("moved", "disp")), (1, ("disp",))}
    pairs = images(2)
    backend.run(dict(zip(feeds, pairs, strict=True)), ["disp"])
    assert set(backend._captured) == {(1, ("disp",)), (2, ("disp",))}
    backend.close()
    assert not backend._captured


def test_a_full_memory_frees_what_was_captured_and_halves_the_batch(
    backend: TorchBackend,
) -> None:
    engine = Engine(backend, small_net().metadata, "fp32")
    assert engine.at_once == 8
    moving, fixed = images(4)
    whole = backend._call

    def small_only(names: Sequence[str], *pair: torch.Tensor) -> Sequence[torch.Tensor]:
        if len(pair[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return whole(names, *pair)

    backend._call = small_only
    disp = engine.displacement(moving, fixed)
    assert engine.at_once == 1
    single = engine.displacement(moving[3:], fixed[3:])
    np.testing.assert_array_equal(disp[3:], single)

    def never(names: Sequence[str], *pair: torch.Tensor) -> Sequence[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    backend._captured.clear()
    backend._call = never
    with pytest.raises(OutOfMemory):
        engine.displacement(moving[:1], fixed[:1])
    assert not backend._captured
