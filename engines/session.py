"""Running an engine: what is fed is checked, one run at a time, now or in the background."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self

import numpy as np

from ulae_rt.engines import values
from ulae_rt.engines.backends.base import Backend, failure
from ulae_rt.engines.values import ValuesT
from ulae_rt.errors import (
    EngineMismatch,
    IntensityError,
    OutOfMemory,
    ShapeError,
    UlaeError,
    UsageError,
)
from ulae_rt.manifest import ANY_BATCH, EXPORT_AGAIN_HINT, Manifest

_log = logging.getLogger(__name__)

# Pairs that an engine which takes any number is given at once. On a GPU more of them fill it; the
# CPU is full with one, and a second would only take its memory again.
AT_ONCE = {"cpu": 1, "cuda": 8}
# Pairs (or batches) that wait in `Engine.submit`: enough that the engine never does, and no more
# than fit in memory.
WAITING = 2


class EngineOutput(NamedTuple, Generic[ValuesT]):
    """What registration gives: arrays of arrays, and torch tensors of torch tensors.

    Attributes:
        moved: the moving image on the fixed one, (B, 1, D, H, W) float32.
        disp: (B, 3, D, H, W) float32, voxels, see :mod:`ulae_rt.conventions`.
    """

    moved: ValuesT
    disp: ValuesT


class Metadata(Protocol):
    """What a network was made for; the fields of a checkpoint's and of an engine's metadata."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) of its grid."""

    @property
    def spacing_mm(self) -> float:
        """Spacing of its grid, a whole number of mm."""

    @property
    def normalisation(self) -> str:
        """How intensities become [0, 1]; see `ulae_rt.imaging.grid.intensity_scale`."""


class Engine:
    """Something that registers, whatever runs it: an exported file, or weights in torch.

    Any thread may call it; runs take their turn, since they share the memory that was set aside
    when it was opened. It is a context manager, and closes at its end.

    Args:
        backend: what executes it. It belongs to the engine from now on.
        metadata: what the network was made for.
        precision: fp32, fp16 or bf16.
        weights_sha256: of the file of weights that it was made from.
    """

    def __init__(
        self, backend: Backend, metadata: Metadata, precision: str, weights_sha256: str = ""
    ) -> None:
        self.metadata = metadata
        self.precision = precision
        self.weights_sha256 = weights_sha256
        self._backend = backend
        open_batch = backend.inputs["moving"][0] == ANY_BATCH
        self._at_once = AT_ONCE[self.device.partition(":")[0]] if open_batch else self.batch
        self._turn = threading.Lock()  # to use the backend
        self._closed = False
        self._change = threading.Lock()  # of the worker
        self._closing = False
        self._worker: ThreadPoolExecutor | None = None
        self._places = threading.BoundedSemaphore(WAITING + 1)  # and one that runs

    @property
    def backend(self) -> str:
        """The library that runs it."""
        return self._backend.name

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
        return self._backend.device

    @property
    def description(self) -> str:
        """Backend, device and precision, for people."""
        return f"{self.backend}, {self.device}, {self.precision}"

    @property
    def batch(self) -> int:
        """What the number of pairs must be a multiple of."""
        return max(1, self._backend.inputs["moving"][0])

    @property
    def at_once(self) -> int:
        """How many pairs it is best given, a multiple of `batch`; it takes any such number."""
        return self._at_once

    def run(self, moving: ValuesT, fixed: ValuesT) -> EngineOutput[ValuesT]:
        """Register ``moving`` to ``fixed``, part by part if they are more than it takes at once.

        Where memory does not suffice for a part and the engine takes any number, halves of it are
        tried, and from then on no part is larger.

        Arrays lie in the host's memory, whatever the engine runs on. Torch tensors lie on the
        engine's own `device`, and nothing of them goes through the host: on the CPU their memory
        is read as it is, and on a GPU the engine's work is queued between what the caller's
        current stream has to do and what it gets later. The host waits twice, for the values of
        the images and of the results to be checked.

        Args:
            moving: (B, 1, D, H, W) float32 in [0, 1] up to `values.RANGE_SLACK`, D, H, W those of
                `metadata`; an array, or a torch tensor on `device` that requires no gradient.
            fixed: the same, of the same kind.

        Returns:
            New arrays, or new tensors on `device`, that belong to the caller, every value of them
            finite.

        Raises:
            ShapeError: for any other shape, or batches that differ or that it cannot be fed.
            DtypeError: for any other type, one array and one tensor, or a tensor on another device
                than the engine.
            IntensityError: for a value outside [0, 1], NaN or infinity, with the pair it is in.
            EngineMismatch: if the library fails, or gives NaN or infinity; OutOfMemory: if memory
                does not suffice.
            UsageError: if it is closed.
        """
        results = self._register(moving, fixed, ("moved", "disp"))
        return EngineOutput(results["moved"], results["disp"])

    def displacement(self, moving: ValuesT, fixed: ValuesT) -> ValuesT:
        """The displacement of `run` alone: the moved image is neither computed nor copied.

        Args:
            moving: as for `run`, an array or a torch tensor on `device`.
            fixed: as for `run`.

        Returns:
            (B, 3, D, H, W) float32, voxels, of the kind of the images, with the errors of `run`.
        """
        disp: ValuesT = self._register(moving, fixed, ("disp",))["disp"]
        return disp

    def _register(self, moving: Any, fixed: Any, outputs: Sequence[str]) -> dict[str, Any]:
        images = values.read_images(moving, fixed, self.device)
        self._check_shapes(images)
        batch = len(images["moving"])
        parts: list[dict[str, Any]] = []
        start = 0
        try:
            self._check_values(images)
            while start < batch:
                stop = min(start + self._at_once, batch)
                part = {n: values.contiguous(i[start:stop]) for n, i in images.items()}
                try:
                    results = self._execute(part, outputs)
                except OutOfMemory as error:
                    if stop - start <= self.batch:
                        raise
                    self._halve(stop - start, error)
                else:
                    parts.append(results)
                    start = stop
            results = values.joined(parts)
            self._check_results(results)
        except (MemoryError, RuntimeError) as error:  # torch has no narrower one for a GPU's
            if isinstance(error, UlaeError):
                raise
            raise failure(f"registering {batch} pairs at once", error) from error
        if values.is_tensor(moving) and self.device == "cpu":
            return values.as_tensors(results)
        return results

    def submit(self, moving: ValuesT, fixed: ValuesT) -> "Future[EngineOutput[ValuesT]]":
        """Register in the background, so that the next pair can be read meanwhile.

        Pairs run one after the other in the order they came. While one runs two more may wait; a
        further call waits for a place, so that results nobody fetched are all that can pile up.
        The images must stay as they are until the result is there. Tensors on a GPU are worked on
        in the order of the stream that is current here, as in `run`.

        Args:
            moving: as for `run`.
            fixed: as for `run`.

        Returns:
            The output of `run` when it is there, or its error.

        Raises:
            UsageError: if it is closed.
        """
        self._places.acquire()
        try:
            with self._change:
                if self._closing:
                    raise _closed()
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
                stream = values.callers_stream(moving)
                result = self._worker.submit(self._run_on, stream, moving, fixed)
        except BaseException:
            self._places.release()
            raise
        result.add_done_callback(lambda _: self._places.release())
        return result

    def _run_on(
        self, stream: AbstractContextManager[Any], moving: ValuesT, fixed: ValuesT
    ) -> EngineOutput[ValuesT]:
        with stream:
            return self.run(moving, fixed)

    def close(self) -> None:
        """Wait for what was submitted, then free the engine. A second time does nothing."""
        with self._change:
            self._closing = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._turn:
            self._closed = True
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _execute(self, feeds: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        with self._turn:
            if self._closed:
                raise _closed()
            return self._backend.run(feeds, outputs)

    def _halve(self, tried: int, error: OutOfMemory) -> None:
        self._at_once = max(self.batch, tried // 2)
        _log.warning("%s; from here on %d at once instead of %d", error, self._at_once, tried)

    def _check_shapes(self, images: dict[str, Any]) -> None:
        for name, image in images.items():
            batch, *sizes = self._backend.inputs[name]
            shape = tuple(image.shape)
            if list(shape[1:]) != sizes or not shape[0]:
                wanted = "B" if batch == ANY_BATCH else batch
                raise ShapeError(
                    f"{name} has shape {shape}, expected "
                    f"({wanted}, {', '.join(map(str, sizes))}) for this engine",
                    "resample to its grid (engine.metadata), or export with --shape",
                )
        batches = {name: len(image) for name, image in images.items()}
        if len(set(batches.values())) != 1:
            raise ShapeError(
                f"the batches are {batches}, expected the same",
                "give one fixed image for each moving one",
            )
        if batches["moving"] % self.batch:
            raise ShapeError(
                f"{batches['moving']} pairs were given, expected a multiple of {self.batch}, which "
                "this engine was built for",
                "fill up with pairs that are there already, or export with --batch 1",
            )

    def _check_values(self, images: dict[str, Any]) -> None:
        """Intensities in [0, 1], in one pass over each image (0.5 ms at 160x192x160)."""
        for name in values.beyond_range(images):
            image = images[name]
            for number in range(len(image)):
                pair = values.on_host(image[number])
                low, high = pair.min(), pair.max()  # NaN, if there is one
                if low >= values.LOWEST and high <= values.HIGHEST:
                    continue
                where = f"{name} of pair {_place(number, len(image))}"
                unusable = pair.size - int(np.isfinite(pair).sum())
                if unusable:
                    raise IntensityError(
                        f"{where}: {unusable} of its {pair.size} voxels "
                        f"{'is' if unusable == 1 else 'are'} NaN or infinite, expected 0 to 1",
                        "find out where they come from; to take them for background: "
                        f"nan_to_num({name}, posinf=0, neginf=0), of numpy or of torch",
                    )
                raise IntensityError(
                    f"{where}: has values from {low:.6g} to {high:.6g}, expected 0 to 1",
                    f"normalise each scan as engine.metadata.normalisation says "
                    f"({self.metadata.normalisation!r}): divide by the scan's own maximum, or by "
                    "its 99.9th percentile and clip",
                )

    def _check_results(self, results: dict[str, Any]) -> None:
        """Every value is a number, in one pass over each result (3 ms at 160x192x160)."""
        for name in values.not_finite(results):
            result = results[name]
            for number in range(len(result)):
                pair = values.on_host(result[number])
                if unusable := pair.size - int(np.isfinite(pair).sum()):
                    raise EngineMismatch(
                        f"{self.description}: {name} of pair {_place(number, len(result))} has "
                        f"{unusable} of {pair.size} values NaN or infinite",
                        "its weights give no numbers for these images: use others, or train again"
                        if self.precision == "fp32"
                        else f"{self.precision} overflows with these images: open the weights or "
                        "the folder of engines with precision='fp32'",
                    )


class ExportedEngine(Engine):
    """An artefact that the exporter wrote, opened.

    Args:
        manifest: of the artefact.
        backend: the loaded artefact. It belongs to the engine from now on.

    Raises:
        EngineMismatch: if the artefact's inputs or outputs are not those of the manifest.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        for what, specs, found in (
            ("inputs", manifest.inputs, backend.inputs),
            ("outputs", manifest.outputs, backend.outputs),
        ):
            expected = {spec.name: spec.shape for spec in specs}
            if found != expected:
                backend.close()
                raise EngineMismatch(
                    f"{manifest.artefact}: its {what} are {found}, expected {expected} by its "
                    "manifest",
                    EXPORT_AGAIN_HINT,
                )
        super().__init__(backend, manifest.metadata, manifest.precision, manifest.weights_sha256)
        self.manifest = manifest

    @property
    def description(self) -> str:
        """Backend, device, precision and file, for people."""
        return f"{super().description} ({self.manifest.artefact})"


def _place(number: int, batch: int) -> str:
    """Which pair, for people."""
    return "0" if batch == 1 else f"{number} (counted from 0, of {batch})"


def _closed() -> UsageError:
    return UsageError("the engine is closed", "open it again with load_engine")
