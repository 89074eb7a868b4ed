"""Reading, preparing, registering and writing many pairs, all at the same time."""

import datetime
import os
import socket
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulae_rt.batching.pairs import Pair
from ulae_rt.batching.results import ResultsFolder, Row
from ulae_rt.clock import Clock
from ulae_rt.errors import DiskFull, EngineMismatch, UlaeError
from ulae_rt.imaging.warpfile import WarpFormat
from ulae_rt.messages import collected, collecting, libraries_redirected

if TYPE_CHECKING:
    from ulae_rt.imaging.transform import Deformation
    from ulae_rt.registration.registrar import Method, Prepared, Target

# Fixed scans that are kept: that of the pairs in hand, and the next one.
TARGETS = 2
# So many failures of the network one after the other are not the scans' fault.
NETWORK_FAILURES = 5
OUTPUTS = ("moved", "warp", "moved_labels", "inverse_warp", "jacobian")
USUAL = OUTPUTS[:3]

_DEFECT = "a defect of ulae_rt or of this machine: report it with the traceback in this row"


@dataclass(frozen=True)
class Wanted:
    """What is written of every pair.

    Attributes:
        outputs: of `OUTPUTS`; moved labels where the pair has labels.
        warp_format: see `ulae_rt.imaging.warpfile.warp_to_image`.
    """

    outputs: tuple[str, ...] = USUAL
    warp_format: WarpFormat = "itk"


@dataclass
class Usage:
    """How the network was used, seconds: the time between its first pair and its last.

    Attributes:
        busy: it ran.
        idle: it waited for a pair.
    """

    busy: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class _Ready:
    pair: Pair
    prepared: "Prepared"
    warnings: list[str]


@dataclass(frozen=True)
class _Failed:
    """Why a pair failed."""

    pair: Pair
    error: Exception
    warnings: list[str] = field(default_factory=list)

    def row(self) -> Row:
        known = isinstance(self.error, UlaeError)
        said = " ".join(str(self.error).split())
        trace = "" if known else "".join(traceback.format_exception(self.error))
        return _signed(
            Row(
                self.pair.id,
                "failed",
                {name: str(path) for name, path in self.pair.paths().items()},
                warnings=self.warnings,
                error=said if known else f"{type(self.error).__name__}: {said}",
                hint=self.error.hint if isinstance(self.error, UlaeError) else _DEFECT,
                traceback=trace,
            )
        )


def _signed(row: Row) -> Row:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return replace(row, finished=now, host=socket.gethostname())


class Pipeline:
    """Registers pairs while others are read, prepared and written.

    Of everything that takes memory there is a limited number at a time, whatever the length of
    the list. The network runs in the thread that iterates.

    Args:
        method: registers them.
        folder: takes the files; rows are returned, not written to it.
        wanted: what is written.
        workers: threads that read, prepare and write.
        batch_size: pairs that the network is given together, at most.
    """

    def __init__(
        self,
        method: "Method",
        folder: ResultsFolder,
        wanted: Wanted,
        *,
        workers: int,
        batch_size: int,
    ) -> None:
        self.usage = Usage()
        self._method = method
        self._folder = folder
        self._wanted = wanted
        self._workers = workers
        self._batch_size = batch_size
        self._targets = _Targets(method)
        self._failures = 0

    def run(self, pairs: Sequence[Pair], stop: threading.Event) -> Iterator[Row]:
        """Register ``pairs`` and give a row for each, in the order in which they are done.

        Args:
            pairs: those with the same fixed scan are best one after the other.
            stop: once it is set no further pair is begun; those in hand are finished.

        Raises:
            DiskFull: nothing more can be written; pairs in hand are lost.
            EngineMismatch: the network fails every time.
        """
        coming = iter(pairs)
        waiting: deque[Future[_Ready | _Failed]] = deque()
        writing: set[Future[Row]] = set()
        # Enough that the network finds a full batch, and that every worker has something to do.
        ahead = self._batch_size + self._workers
        ran_until: float | None = None
        with (
            libraries_redirected(),
            collecting(),
            ThreadPoolExecutor(self._workers, "pair", threads_of_its_own) as pool,
        ):
            try:
                while True:
                    while len(waiting) < ahead and not stop.is_set():
                        if (pair := next(coming, None)) is None:
                            break
                        waiting.append(pool.submit(self._prepare, pair))
                    if stop.is_set():
                        waiting = deque(each for each in waiting if not each.cancel())
                    if not waiting and not writing:
                        return
                    room = len(writing) < ahead
                    ready = self._ready(waiting) if room else []
                    if ready:
                        started = time.perf_counter()
                        if ran_until is not None:
                            self.usage.idle += started - ran_until
                        for each in self._deform(ready):
                            if isinstance(each, _Failed):
                                yield each.row()
                            else:
                                writing.add(pool.submit(self._finish, *each))
                        ran_until = time.perf_counter()
                        self.usage.busy += ran_until - started
                    else:
                        wait(
                            [*(writing if not room else [*waiting, *writing])],
                            None,
                            FIRST_COMPLETED,
                        )
                    for failed in self._failed(waiting):
                        yield failed.row()
                    for done in [each for each in writing if each.done()]:
                        writing.remove(done)
                        yield done.result()
            finally:
                for future in waiting:
                    future.cancel()

    def _ready(self, waiting: deque[Future[_Ready | _Failed]]) -> list[_Ready]:
        """Take what is prepared, whichever was first."""
        ready: list[_Ready] = []
        for future in list(waiting):
            if len(ready) < self._batch_size and future.done():
                result = future.result()
                if isinstance(result, _Ready):
                    waiting.remove(future)
                    ready.append(result)
        return ready

    @staticmethod
    def _failed(waiting: deque[Future[_Ready | _Failed]]) -> Iterator[_Failed]:
        for future in list(waiting):
            if future.done() and isinstance(result := future.result(), _Failed):
                waiting.remove(future)
                yield result

    def _prepare(self, pair: Pair) -> _Ready | _Failed:
        with collected() as warnings:
            try:
                target, said, seconds = self._targets.get(pair.fixed)
                prepared = self._method.prepare(pair.moving, target, labels=pair.moving_labels)
            except Exception as error:  # whatever a file can do, the other pairs go on
                return _Failed(pair, error, warnings)
        if seconds:  # this pair was the one that read it
            prepared.seconds["read fixed"] = seconds
        return _Ready(pair, prepared, [*said, *warnings])

    def _deform(self, ready: Sequence[_Ready]) -> "list[_Failed | tuple[_Ready, Deformation]]":
        start = time.perf_counter()
        try:
            found = self._method.deform([each.prepared for each in ready])
        except Exception as error:
            if len(ready) > 1:  # one may have spoilt it for the others
                return [result for each in ready for result in self._deform([each])]
            self._failures += 1
            if self._failures >= NETWORK_FAILURES:
                raise EngineMismatch(
                    f"{self._method.description} failed {self._failures} pairs one after the "
                    f"other, the last {ready[0].pair.id}: {error}",
                    getattr(error, "hint", "") or "see 'ulae-rt doctor'",
                ) from error
            return [_Failed(ready[0].pair, error, ready[0].warnings)]
        self._failures = 0
        took = time.perf_counter() - start
        for each, deformation in zip(ready, found, strict=True):
            if deformation.refinement is not None:
                each.prepared.seconds["refine"] = deformation.refinement.seconds
                took -= deformation.refinement.seconds
        for each in ready:
            each.prepared.seconds["network"] = took / len(ready)
        return list(zip(ready, found, strict=True))

    def _finish(self, ready: _Ready, deformation: "Deformation") -> Row:
        pair = ready.pair
        from ulae_rt.registration.registrar import finish  # loaded with the method

        with collected() as warnings:
            try:
                result = finish(ready.prepared, deformation)
                clock = Clock(seconds=result.stats.seconds)
                back = None
                if "inverse_warp" in self._wanted.outputs:
                    with clock("inverse"):
                        back = result.inverse_consistency.mean_mm
                with clock("write"):
                    part = self._folder.part(pair)
                    outputs = self._outputs(pair)
                    files: dict[str, Any] = {k: part / Path(p).name for k, p in outputs.items()}
                    result.save(**files, warp_format=self._wanted.warp_format)
                stats, how = result.stats, result.stats.refinement
                row = _signed(
                    Row(
                        pair.id,
                        "done",
                        {name: str(path) for name, path in pair.paths().items()},
                        outputs,
                        {stage: round(taken, 4) for stage, taken in clock.seconds.items()},
                        stats.similarity_before,
                        stats.similarity_after,
                        stats.folding_percent,
                        stats.folding_image_percent,
                        back,
                        result.affine.tolist(),
                        None if how is None else how.lncc_before,
                        None if how is None else how.lncc_after,
                        [*ready.warnings, *warnings],
                        overlap=stats.overlap,
                        verdict=stats.verdict,
                    )
                )
                self._folder.keep(row)
                return row
            except DiskFull:
                self._folder.drop(pair)
                raise
            except Exception as error:
                self._folder.drop(pair)
                return _Failed(pair, error, [*ready.warnings, *warnings]).row()

    def _outputs(self, pair: Pair) -> dict[str, str]:
        kinds = [k for k in self._wanted.outputs if k != "moved_labels" or pair.moving_labels]
        return {kind: f"pairs/{pair.id}/{kind}.nii.gz" for kind in kinds}


class _Targets:
    """Fixed scans, each read once by whichever pair comes first."""

    def __init__(self, method: "Method") -> None:
        self._method = method
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, Future[tuple[Target, list[str]]]] = OrderedDict()

    def get(self, path: Path) -> "tuple[Target, list[str], float]":
        """The scan, what was worth saying about it, and the seconds if it was read just now."""
        with self._lock:
            future = self._kept.get(path)
            mine = future is None
            if future is None:
                future = self._kept[path] = Future()
                while len(self._kept) > TARGETS:
                    self._kept.popitem(last=False)
        seconds = 0.0
        if mine:
            start = time.perf_counter()
            try:
                with collected() as warnings:
                    target = self._method.target(path)
                future.set_result((target, warnings))
            except BaseException as error:
                future.set_exception(error)
            seconds = time.perf_counter() - start
        target, said = future.result()
        return target, said, seconds


def grouped(pairs: Sequence[Pair]) -> list[Pair]:
    """``pairs`` with those of one fixed scan after each other, otherwise in their order."""
    first: dict[Path, int] = {}
    for number, pair in enumerate(pairs):
        first.setdefault(pair.fixed, number)
    return sorted(pairs, key=lambda pair: first[pair.fixed])


def threads_of_its_own() -> None:
    """Called in a thread that has a pair of its own: more threads would only wait for others."""
    import torch

    torch.set_num_threads(1)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))
