"""The same list on more machines: Ray Data hands its blocks of pairs to workers anywhere."""

import contextlib
import json
import logging
import math
import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ulae_rt.allocator import keep_freed_memory
from ulae_rt.batching.pairs import Pair
from ulae_rt.batching.pipeline import Pipeline, Wanted, processors
from ulae_rt.batching.results import ResultsFolder, Row
from ulae_rt.env import let_torch_threads_sleep, silence_ray_usage_report
from ulae_rt.errors import BackendUnavailable, UlaeError, UsageError
from ulae_rt.optional import require

if TYPE_CHECKING:
    from ulae_rt.registration.registrar import Method

# Starts a Ray on this machine, for this run.
LOCAL = "local"
# The Ray that runs on this machine.
AUTO = "auto"
CONNECT_S = 5.0
_START = "start it with 'ray start --head', or give --ray without an address"
# Ray gives its token to a Ray that it finds itself, not to one at an address.
_TOKEN = (
    "give --ray auto on its own machine; elsewhere set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
    "what 'ray get-auth-token' says there"
)
_OWN = "Ray's logs may say why; or start one with 'ray start --head' and give --ray auto"
# Only lists of paths and rows of results go through Ray; the scans are on the shared disk. Ray
# takes no less than 75 MB.
OBJECT_STORE_BYTES = 100_000_000
# Pairs handed out at once: enough that reading and writing overlap with the network, few enough
# that all workers end together and that the progress moves.
ON_GPU, ON_CPU = 32, 8
BLOCKS_EACH = 4
# Ray starts a worker that died again and gives it its block again, for ever; a scan that kills
# whoever reads it is begun no more often than this.
ATTEMPTS = 3
WAIT_S = 0.2


class Opener(Protocol):
    """What a worker opens its method with; sent to it."""

    @property
    def on_gpu(self) -> bool:
        """Whether it uses a GPU where there is one."""

    def open(self) -> "Method":
        """Open it."""


@dataclass(frozen=True)
class Share:
    """How a cluster is shared out.

    Attributes:
        workers: how many.
        cpus, gpus: of each.
    """

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, machines: Sequence[dict[str, float]], on_gpu: bool, cpus: int | None) -> Self:
        """One worker for each GPU; if there is none, one for each machine or each ``cpus`` cores.

        A machine of its own for each worker, because a network on the CPU takes all of its cores
        and much of its memory.

        Args:
            machines: of each its resources, as ``ray.nodes()`` says them.
            on_gpu: whether GPUs are of use.
            cpus: of each worker; None: as many as the least machine has for it.

        Raises:
            BackendUnavailable: nothing to work with.
        """
        gpus = [each for each in machines if on_gpu and each.get("GPU", 0) >= 1]
        used = gpus or [each for each in machines if each.get("CPU", 0) >= 1]
        places = [each.get("GPU", 1) if gpus else 1 for each in used]
        least = min(
            (each.get("CPU", 0) // n for each, n in zip(used, places, strict=True)), default=0
        )
        cpus = cpus or max(1, int(least))
        fit = [int(each.get("CPU", 0) // cpus) for each in used]
        if gpus:
            fit = [min(n, int(places[i])) for i, n in enumerate(fit)]
        if not sum(fit):
            raise BackendUnavailable(
                f"no machine of the Ray cluster has {cpus} CPU cores for a worker",
                "give fewer --workers, or start Ray with more --num-cpus",
            )
        return cls(sum(fit), cpus, 1 if gpus else 0)


class Cluster:
    """A Ray cluster that registers pairs; use as a context manager.

    Args:
        address: ``HOST:PORT`` of a running Ray, `AUTO` or `LOCAL`.
        opener: of the method.
        workers: CPU cores of each worker; None: see `Share.of`.
        batch_size: pairs that the network is given together; None: what it is best given.

    Attributes:
        description, settings: of the method, as a worker has opened it.
    """

    def __init__(
        self, address: str, opener: Opener, *, workers: int | None, batch_size: int | None
    ) -> None:
        self._ray = require("ray", "ray")
        require("ray.data", "ray")
        self._address = address
        self._opener = opener
        self._cpus = workers
        self._batch_size = batch_size
        self.description = ""
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._connect()
        try:
            machines = [each["Resources"] for each in self._ray.nodes() if each["Alive"]]
            self._share = Share.of(machines, self._opener.on_gpu, self._cpus)
            # A process of its own, so that its memory is free again for the workers.
            describe = self._ray.remote(max_calls=1)(_describe).options(
                num_cpus=self._share.cpus, num_gpus=self._share.gpus
            )
            self.description, self.settings = self._ray.get(describe.remote(self._opener))
        except BaseException as error:
            self._ray.shutdown()
            cause = getattr(error, "cause", None)
            if isinstance(cause, UlaeError):  # as the worker said it, without Ray's trace
                raise cause from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ray.shutdown()

    def _check_address(self) -> None:
        """Refuse at once what Ray itself would try for minutes."""
        if self._address in (LOCAL, AUTO):
            return
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdecimal() and int(port) < 1 << 16):
            raise UsageError(
                f"--ray is {self._address!r}, expected HOST:PORT, {AUTO} or nothing",
                "'ray start --head' says the address",
            )
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise BackendUnavailable(
                f"nothing answers at {self._address}: {error.strerror or error}", _START
            ) from None

    def _connect(self) -> None:
        self._check_address()
        local: dict[str, Any] = {
            "num_cpus": processors(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        silence_ray_usage_report()
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(
                address=self._address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **(local if self._address == LOCAL else {}),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            message = f"Ray at {self._address} cannot be used: {said}"
            if self._address == LOCAL:
                raise BackendUnavailable(message, _OWN) from error
            if self._address == AUTO:
                raise BackendUnavailable(message, _START) from error
            raise BackendUnavailable(message, _TOKEN) from error
        finally:
            signal.signal(signal.SIGTERM, terminate)  # Ray's own would end without cleaning up

    def run(
        self, pairs: Sequence[Pair], folder: ResultsFolder, wanted: Wanted, stop: threading.Event
    ) -> Iterator[Row]:
        """Register ``pairs`` and give a row for each, in the order in which blocks are done.

        A pair that is complete in ``folder`` is taken over; so nothing is registered again when
        a worker or a machine is lost and Ray tries its block again.

        Args:
            pairs: those with the same fixed scan are best one after the other.
            folder: on a disk that all machines share.
            wanted: what is written.
            stop: once it is set no further pair is begun; those in hand are finished.

        Raises:
            UlaeError: what stopped a worker, such as `DiskFull`.
        """
        if not pairs:
            return
        stopped: Exception | None = None
        with self._stop_file(folder, stop) as stopping:
            for rows, error in self._blocks(pairs, folder, wanted):
                for text in json.loads(rows):
                    yield Row.from_json(text)
                if error:
                    stopped = stopped or pickle.loads(error)  # noqa: S301 - a worker's
                    stopping.touch()
        if stopped is not None:
            raise stopped

    def usage(self) -> dict[str, float]:
        """Nothing: how its networks were used, only the workers know."""
        return {}

    def _blocks(
        self, pairs: Sequence[Pair], folder: ResultsFolder, wanted: Wanted
    ) -> Iterator[tuple[str, bytes]]:
        data = self._ray.data
        share = self._share
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the bar is ours
        most = ON_GPU if share.gpus else ON_CPU
        size = max(1, min(most, math.ceil(len(pairs) / (BLOCKS_EACH * share.workers))))
        blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        items = [
            {"pairs": json.dumps({each.id: _files(each) for each in block})} for block in blocks
        ]
        found = data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_args=(
                self._opener, folder.of_worker(""), wanted, share.cpus, self._batch_size,
            ),
            batch_size=None,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(
                size=min(share.workers, len(items)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )  # fmt: skip
        try:
            for batch in found.iter_batches(
                batch_size=None, batch_format="numpy", prefetch_batches=0
            ):
                yield from zip(batch["rows"], batch["error"], strict=True)
        except self._ray.exceptions.RayError as error:
            raise BackendUnavailable(
                f"Ray gave up: {' '.join(str(error).split())[:200]}",
                "Ray's logs may say why; go on with --resume",
            ) from error

    @contextlib.contextmanager
    def _stop_file(self, folder: ResultsFolder, stop: threading.Event) -> Iterator[Path]:
        """Carries ``stop`` to the workers, by a file that they look for."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WAIT_S):
                if stop.is_set():
                    folder.stop_file.touch()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield folder.stop_file
        finally:
            over.set()
            watcher.join()


def _files(pair: Pair) -> dict[str, str]:
    return {name: str(path) for name, path in pair.paths().items()}


def _describe(opener: Opener) -> tuple[str, dict[str, Any]]:
    method = opener.open()
    return method.description, method.settings


class _Worker:
    """One process of the cluster: opens the method once, then registers block after block."""

    def __init__(
        self,
        opener: Opener,
        folder: ResultsFolder,
        wanted: Wanted,
        workers: int,
        batch_size: int | None,
    ) -> None:
        keep_freed_memory()
        let_torch_threads_sleep()
        method = opener.open()
        self._folder = folder.of_worker(f"{socket.gethostname()}-{os.getpid()}")
        self._stop = _FileEvent(folder.stop_file)
        self._pipeline = Pipeline(
            method,
            self._folder,
            wanted,
            workers=workers,
            batch_size=batch_size or method.at_once,
        )

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """Rows of every pair, and what stopped it if something did."""
        rows: list[Row] = []
        error = b""
        try:
            for text in block["pairs"]:
                for row in self._register(
                    [Pair.from_paths(id_, files) for id_, files in json.loads(text).items()]
                ):
                    rows.append(row)
        except Exception as stopped:  # the driver's to tell, with the rows that are there
            error = pickle.dumps(stopped)
        return {"rows": [json.dumps([row.to_json() for row in rows])], "error": [error]}

    def _register(self, pairs: Sequence[Pair]) -> Iterator[Row]:
        """Together, but those that a worker has died with one by one: only one of them did it."""
        once, again = [], []
        for pair in pairs:
            row = self._folder.finished(pair.id)
            if row is not None and row.pair == pair:
                yield row
            elif self._folder.attempts(pair):
                again.append(pair)
            else:
                self._folder.add_attempt(pair)
                once.append(pair)
        yield from self._pipeline.run(once, self._stop)
        for pair in again:
            if self._folder.attempts(pair) >= ATTEMPTS:
                yield Row(
                    pair.id,
                    "failed",
                    _files(pair),
                    error=f"its worker died {ATTEMPTS} times",
                    hint="too little memory, or a damaged file: see Ray's logs",
                )
            elif not self._stop.is_set():
                self._folder.add_attempt(pair)
                yield from self._pipeline.run([pair], self._stop)


class _FileEvent(threading.Event):
    """Set while a file is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def is_set(self) -> bool:
        return self._path.exists()
