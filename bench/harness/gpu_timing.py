"""Time of one op on a GPU: cold and hot caches, many runs in one captured graph, events around it.

A kernel of 25 microseconds is over before the host has launched the next one. So a sample is a
CUDA graph of runs in a row, as many as take about a millisecond: the gaps between them are the
device's own. *Cold* runs take one set of inputs after another, together many times the L2 cache,
which is also filled with other numbers before each sample; *hot* ones take the same set again and
again.

Without CUDA every sample is one run by the wall clock, so that the benchmarks' code runs anywhere.
"""

import collections
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

Run = Callable[[], list[Tensor]]

# Read before a cold sample, and what the input sets together exceed: several L2 caches. Writing
# would leave the cache full of what has still to reach the memory, in the sample's time.
FLUSH_BYTES = 2**28
COPY_BYTES = 2**31
SAMPLE_SECONDS = 1.5e-3
WARM_UP_SECONDS = 0.2
MOST_RUNS = 64


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second, read and written, of a large copy on the device: what a floor is made of."""
    size = COPY_BYTES if device.type == "cuda" else 2**28  # more than any cache has
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(rounds)]
    return 2 * size / median(seconds)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Between events on the device; the wall clock elsewhere."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def sets_of(one: Sequence[Tensor]) -> int:
    """How many sets of inputs like ``one`` it takes to keep the cache cold."""
    size = sum(x.numel() * x.element_size() for x in one)
    return max(4, math.ceil(2 * FLUSH_BYTES / size)) if one[0].is_cuda else 1


class Timed:
    """A contender, ready to be timed again and again.

    Args:
        prepare: a set of inputs to a run on it; what it does itself is not timed.
        sets: of inputs, alike.
        capture: whether a graph may be tried; a run that waits for the host cannot be in one.

    Attributes:
        how: ``graph`` or, with the launches' gaps in it, ``events``; ``clock`` without CUDA.
        first: what the first run returned.
        sample_seconds: about how long a sample takes.
    """

    def __init__(
        self,
        prepare: Callable[[list[Tensor]], Run],
        sets: list[list[Tensor]],
        *,
        capture: bool = True,
    ) -> None:
        self.device = sets[0][0].device
        run = prepare(sets[0])
        self.first = run()
        if self.device.type != "cuda":
            self.count, self.how, self.sample_seconds = 1, "clock", 0.0
            self._samples: dict[str, Callable[[], object]] = {"cold": run, "hot": run}
            return
        torch.cuda.synchronize()
        started, times = time.perf_counter(), []
        while time.perf_counter() - started < WARM_UP_SECONDS or len(times) < 3:
            times.append(seconds_of(run, self.device))
        one = self._seconds_in_a_graph(run) if capture else None
        # By the launches' gaps alone a kernel of 25 us would seem to take 60.
        least = min(times) if one is None else one
        self.count = min(max(math.ceil(SAMPLE_SECONDS / least), 1), MOST_RUNS)
        self.sample_seconds = self.count * least
        used = min(self.count, len(sets))
        runs = [run, *(prepare(inputs) for inputs in sets[1:used])]
        for other in runs[1:]:
            other()
        order = [runs[i % used] for i in range(self.count)]
        loops = {"cold": order, "hot": [run] * self.count}
        self.how, self._samples = "events", {k: _Loop(v) for k, v in loops.items()}
        if capture:
            try:
                self._samples = {k: _captured(v, used) for k, v in loops.items()}
                self.how = "graph"
            except RuntimeError as error:
                print(f"not captured: {str(error).splitlines()[0]}")
        self._flush = torch.rand(FLUSH_BYTES // 4, device=self.device)
        self._sink = torch.empty((), device=self.device)

    def _seconds_in_a_graph(self, run: Run) -> float | None:
        """Of one run without its launches' gaps; None where it cannot be captured."""
        try:
            replay = _captured([run], 1)
        except RuntimeError:
            return None
        return min(seconds_of(replay, self.device) for _ in range(5))

    def seconds(self, state: str) -> float:
        """Of one run, from one sample; ``state`` of the caches is ``cold`` or ``hot``."""
        sample = self._samples[state]
        if self.device.type == "cuda":
            # Either also keeps the device busy while the host prepares the sample.
            if state == "cold":
                torch.sum(self._flush, dim=0, out=self._sink)
            else:
                sample()
        return seconds_of(sample, self.device) / self.count


class _Loop:
    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def __call__(self) -> None:
        for run in self.runs:
            run()


def _captured(runs: list[Run], alive: int) -> Callable[[], None]:
    """A graph of ``runs``, in which the last ``alive`` results have memory of their own."""
    graph = torch.cuda.CUDAGraph()
    # A result written where the last one was would find it in the cache.
    results: collections.deque[list[Tensor]] = collections.deque(maxlen=alive)
    # On the current stream: a backward pass runs on its forward's.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for run in runs:
            results.append(run())
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def own_stream(device: torch.device) -> "torch.cuda.StreamContext | _Nothing":
    """A context with a stream that can be captured; nothing without CUDA."""
    if device.type != "cuda":
        return _Nothing()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
