"""Contenders in processes of their own, each of which runs once whenever it is asked.

A process has the memory, the allocator and the threads that its user's would have; several wait
side by side, so that they can be timed in turn.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.record import ROOT
from harness.rounds import synchronise


class Failed(Exception):
    """A process ended instead of answering; the last line that it said."""


class Child:
    """A process that serves one contender.

    Attributes:
        first_seconds: from its start to its first result, its imports left out.
    """

    def __init__(self, process: "subprocess.Popen[str]", said: IO[str]) -> None:
        self._process = process
        self._said = said
        self.first_seconds = float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise Failed(
                (self._said.read().strip().splitlines() or ["it ended without a word"])[-1]
            )
        return json.loads(line)

    def run(self) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def finish(self) -> tuple[float, float]:
        """Peak memory in GB of the process, and of what torch had of the GPU."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        own, gpu = self._answer()
        return own, gpu


@contextmanager
def child(module: str, *arguments: Any) -> Iterator[Child]:
    """A process that serves what ``module.prepare(*arguments)`` returns.

    Args:
        module: by name; importing it is not timed.
        arguments: by their repr.

    Raises:
        Failed: it ends before its first result is there.
    """
    paths = [str(ROOT / "bench"), str(ROOT / "tests")]
    script = (
        f"import sys; sys.path[:0] = {paths!r}; import {module}; from harness.processes import "
        f"serve; serve({module}.prepare, {arguments!r})"
    )
    with (
        tempfile.TemporaryFile("w+") as said,  # a pipe that nobody empties would stop it
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield Child(process, said)
        finally:
            process.kill()


def serve(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    """The child's side: ``prepare`` runs once and returns what runs again; then one run a line."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what the contender itself says
    started = time.perf_counter()
    run = prepare(*arguments)
    synchronise()
    print(json.dumps(time.perf_counter() - started), file=answers, flush=True)
    for _ in sys.stdin:
        synchronise()
        started = time.perf_counter()
        run()
        synchronise()
        print(json.dumps(time.perf_counter() - started), file=answers, flush=True)
    print(json.dumps([peak_gb(), gpu_peak_gb()]), file=answers, flush=True)


def peak_gb() -> float:
    """Largest resident size of this process (``ru_maxrss`` would include its parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith("VmHWM"))) / 1e6


def gpu_peak_gb() -> float:
    """Largest GPU memory that torch had in this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
