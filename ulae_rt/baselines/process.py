"""A process of its own for a package that holds Python's lock for minutes, and may crash."""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from ulae_rt.baselines.packages import Job, greedy, syn
from ulae_rt.env import with_itk_threads
from ulae_rt.errors import BaselineError
from ulae_rt.imaging.grid import Displacement

LOG = "log.txt"
# Of what a package said, the end says why it failed.
LOG_CHARACTERS = 400


class PackageProcess:
    """A process that runs one package, job after job; started by the first, and again if it ends.

    Its files lie in a temporary folder that goes with it, whichever of the two processes ends
    first.

    Args:
        name: ``syn`` or ``greedy``.
        threads: of the package.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._threads = threads
        self._turn = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], Path] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def run(self, job: Job) -> Displacement:
        """Register one pair.

        Returns:
            (X, Y, Z, 3) float32 u on the fixed grid, RAS mm: the fixed point x comes from the
            moving point affine (x + u(x)).

        Raises:
            BaselineError: the package failed or crashed.
        """
        with self._turn:
            process, folder = self._running or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                pickle.dump(job, process.stdin, protocol=5)
                process.stdin.flush()
                answer = pickle.load(process.stdout)  # noqa: S301 - our own process wrote it
            except (BrokenPipeError, EOFError):
                status, said = process.wait(), _said(folder)
                self.close()
                raise BaselineError(
                    f"{self._name} ended with status {status}: {said}",
                    "a negative status is a signal: -9 is often too little memory",
                ) from None
            except BaseException:  # Ctrl-C: the answer would be taken for that of the next job
                self.close()
                raise
            if isinstance(answer, str):
                raise BaselineError(
                    f"{self._name} failed: {answer}: {_said(folder)}",
                    "look at the pair: do both scans show one whole brain?",
                )
            found: Displacement = answer
            return found

    def close(self) -> None:
        """End it, whatever it does."""
        if self._end is not None:
            self._end()
        self._running = self._end = None

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        folder = Path(tempfile.mkdtemp(prefix="ulae-rt-"))
        try:
            with open(folder / LOG, "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, self._name, str(self._threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=folder,
                    env=with_itk_threads(self._threads),
                    start_new_session=True,  # Ctrl-C is ours to decide upon
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._end = weakref.finalize(self, _end, process, folder)
        self._running = process, folder
        return self._running


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    shutil.rmtree(folder, ignore_errors=True)


def _said(folder: Path) -> str:
    try:
        text = (folder / LOG).read_text(errors="replace")
    except FileNotFoundError:
        return "it said nothing"
    return " ".join(text.split())[-LOG_CHARACTERS:] or "it said nothing"


def serve(name: str, threads: int, jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Answer jobs until there are no more: with a displacement, or a text that says what failed."""
    register = {"syn": syn, "greedy": greedy}[name]
    while True:
        try:
            job = pickle.load(jobs)  # noqa: S301 - from the process that started this one
        except EOFError:
            return
        answer: Displacement | str
        try:
            answer = register(job, threads)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


def _main() -> None:
    # The packages write to standard output below Python; answers need it for themselves.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
            serve(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, answers)
    finally:
        shutil.rmtree(Path.cwd(), ignore_errors=True)


if __name__ == "__main__":
    _main()
