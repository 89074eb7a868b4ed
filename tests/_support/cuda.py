"""What of torch.cuda the backends use, on the CPU; and tensors that say they are on a GPU."""

import contextlib
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch


class FakeStream:
    """One whose waits are counted."""

    def __init__(self, cuda, name, device):
        self.cuda, self.name, self.device = cuda, name, device

    def synchronize(self):
        self.cuda.calls.append("synchronize")

    def wait_stream(self, other):
        self.cuda.calls.append(f"{self.name} waits for {other.name}")
        if self is self.cuda.callers:
            self.cuda.flush()


class FakeCuda:
    """What of torch.cuda the backends use, by the rules of CUDA graphs, on the CPU.

    Capturing computes nothing; a replay computes from what the inputs then hold, into the memory
    of the outputs that were captured.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, refuses: RuntimeError | None = None
    ) -> None:
        self.refuses, self.capturing = refuses, None
        self.of_thread = threading.local()
        self.calls, self.pools = [], []
        self.callers = FakeStream(self, "the caller's", "cuda:0")
        self.flush = lambda: None  # does what another library has queued
        made = torch.empty

        def empty(*shape, pin_memory=False, device=None, **options):
            return made(*shape, **options).fill_(torch.nan)

        monkeypatch.setattr(torch, "empty", empty)
        for name in (
            "Stream",
            "ExternalStream",
            "current_stream",
            "CUDAGraph",
            "device",
            "stream",
            "graph",
            "synchronize",
            "graph_pool_handle",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @property
    def current(self):
        """The stream that this thread made the current one, or None."""
        return getattr(self.of_thread, "current", None)

    @current.setter
    def current(self, stream):
        self.of_thread.current = stream

    def Stream(self, device):
        return FakeStream(self, "its own", device)

    def ExternalStream(self, address, device):
        return FakeStream(self, f"its own at {address}", device)

    def current_stream(self, device):
        return self.current or self.callers

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        graph = SimpleNamespace(captured=None)
        graph.replay = lambda: self.replay(graph)
        return graph

    def device(self, name):
        return contextlib.nullcontext(name)

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        if self.refuses is not None:
            raise self.refuses
        self.capturing = graph
        with self.stream(stream):
            yield
        self.capturing = None

    def recorded(self, compute):
        """A program of ``compute``, which gives tensors; it must run on its own stream."""

        def program(*images):
            assert self.current is not None
            self.calls.append("capture" if self.capturing else "run")
            outputs = [torch.full_like(result, torch.nan) for result in compute(*images)]
            if self.capturing:
                self.capturing.captured = compute, images, outputs
            else:
                self.fill(compute, images, outputs)
            return outputs

        return program

    def fill(self, compute, images, outputs):
        for output, result in zip(outputs, compute(*images), strict=True):
            output.copy_(result)

    def replay(self, graph):
        assert self.current is not None
        self.calls.append("replay")
        self.fill(*graph.captured)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and what of it the host waited for."""

    is_cuda = True
    place = "cuda:0"
    waits: ClassVar[list[str]] = []

    @property
    def device(self):
        return torch.device(self.place)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            cls.waits.append(name)
        return super().__torch_function__(function, types, arguments, options or {})

    def cpu(self):
        """The values, as a tensor of the CPU."""
        self.waits.append("cpu")
        return self.as_subclass(torch.Tensor)

    def to(self, device):
        assert device == "cpu"
        return self.cpu()
