"""What of torch.cuda a captured program uses, on the CPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch


class FakeCuda:
    """What of torch.cuda a captured program uses, by the rules of CUDA graphs, on the CPU.

    Capturing computes nothing; a replay computes from what the inputs then hold, into the memory
    of the outputs that were captured.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, refuses: RuntimeError | None = None
    ) -> None:
        self.refuses, self.capturing, self.current = refuses, None, None
        self.calls, self.pools = [], []
        made = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: made(*a, **k))
        for name in (
            "Stream",
            "CUDAGraph",
            "device",
            "stream",
            "graph",
            "synchronize",
            "graph_pool_handle",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return SimpleNamespace(device=device, synchronize=lambda: self.calls.append("synchronize"))

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
        yield
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
