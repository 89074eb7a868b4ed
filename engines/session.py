"""Running an engine: what is fed is checked, one run at a time, now or in the background."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from ulae_rt.engines.backends.base import Array, Backend, failure
from ulae_rt.errors import (
    DtypeError,
    EngineMismatch,
    IntensityError,
    OutOfMemory,
    ShapeError,
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
# How far beyond 0 and 1 an intensity may lie: the rounding of a division or of an interpolation in
# half precision. The network's answer to it is that to the nearest of 0 and 1.
RANGE_SLACK = 1e-3
_LOWEST, _HIGHEST = np.float32(-RANGE_SLACK), np.float32(1 + RANGE_SLACK)
_ONE = int(np.float32(1).view(np.uint32))


class EngineOutput(NamedTuple):
    """What registration gives.

    Attributes:
        moved: the moving image on the fixed one, (B, 1, D, H, W) float32.
        disp: (B, 3, D, H, W) float32, voxels, see :mod:`ulae_rt.conventions`.
    """

    moved: Array
    disp: Array


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

    def run(self, moving: Any, fixed: Any) -> EngineOutput:
        """Register ``moving`` to ``fixed``, part by part if they are more than it takes at once.

        Where memory does not suffice for a part and the engine takes any number, halves of it are
        tried, and from then on no part is larger.

        Args:
            moving: (B, 1, D, H, W) float32 in [0, 1] up to `RANGE_SLACK`, D, H, W those of
                `metadata`; an array, or a torch tensor on the CPU.
            fixed: the same.

        Returns:
            New arrays that belong to the caller, every value of them finite.

        Raises:
            ShapeError: for any other shape, or batches that differ or that it cannot be fed.
            DtypeError: for any other type, or a tensor on a GPU.
            IntensityError: for a value outside [0, 1], NaN or infinity, with the pair it is in.
            EngineMismatch: if the library fails, or gives NaN or infinity; OutOfMemory: if memory
                does not suffice.
            UsageError: if it is closed.
        """
        results = self._register(moving, fixed, ("moved", "disp"))
        return EngineOutput(results["moved"], results["disp"])

    def displacement(self, moving: Any, fixed: Any) -> Array:
        """The displacement of `run` alone: the moved image is neither computed nor copied.

        Args:
            moving: as for `run`.
            fixed: as for `run`.

        Returns:
            (B, 3, D, H, W) float32, voxels, with the errors of `run`.
        """
        return self._register(moving, fixed, ("disp",))["disp"]

    def _register(self, moving: Any, fixed: Any, outputs: Sequence[str]) -> dict[str, Array]:
        images = {"moving": _array("moving", moving), "fixed": _array("fixed", fixed)}
        self._check(images)
        self._check_values(images)
        batch = len(images["moving"])
        parts: list[dict[str, Array]] = []
        start = 0
        try:
            while start < batch:
                stop = min(start + self._at_once, batch)
                part = {n: np.ascontiguousarray(i[start:stop]) for n, i in images.items()}
                try:
                    results = self._execute(part, outputs)
                except OutOfMemory as error:
                    if stop - start <= self.batch:
                        raise
                    self._halve(stop - start, error)
                else:
                    self._check_results(results, start, batch)
                    parts.append(results)
                    start = stop
            if len(parts) == 1:
                return parts[0]
            return {name: np.concatenate([part[name] for part in parts]) for name in outputs}
        except MemoryError as error:
            raise failure(f"registering {batch} pairs at once", error) from error

    def submit(self, moving: Any, fixed: Any) -> "Future[EngineOutput]":
        """Register in the background, so that the next pair can be read meanwhile.

        Pairs run one after the other in the order they came. While one runs two more may wait; a
        further call waits for a place, so that results nobody fetched are all that can pile up.
        The images must stay as they are until the result is there.

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
                result = self._worker.submit(self.run, moving, fixed)
        except BaseException:
            self._places.release()
            raise
        result.add_done_callback(lambda _: self._places.release())
        return result

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

    def _execute(self, feeds: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with self._turn:
            if self._closed:
                raise _closed()
            return self._backend.run(feeds, outputs)

    def _halve(self, tried: int, error: OutOfMemory) -> None:
        self._at_once = max(self.batch, tried // 2)
        _log.warning("%s; from here on %d at once instead of %d", error, self._at_once, tried)

    def _check(self, images: dict[str, Array]) -> None:
        for name, image in images.items():
            batch, *sizes = self._backend.inputs[name]
            if image.ndim != len(sizes) + 1 or list(image.shape[1:]) != sizes or not len(image):
                wanted = "B" if batch == ANY_BATCH else batch
                raise ShapeError(
                    f"{name} has shape {image.shape}, expected "
                    f"({wanted}, {', '.join(map(str, sizes))}) for this engine",
                    "resample to its grid (engine.metadata), or export with --shape",
                )
            if image.dtype != np.float32:
                raise DtypeError(
                    f"{name} is {image.dtype}, expected float32", f"{name}.astype('float32')"
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

    def _check_values(self, images: dict[str, Array]) -> None:
        """Intensities in [0, 1], in one pass over each image (0.5 ms at 160x192x160)."""
        for name, image in images.items():
            # Read as integers, what is negative, infinite or NaN is above 1.0 too.
            if image.view(np.uint32).max() <= _ONE:
                continue
            for number, pair in enumerate(image):
                low, high = pair.min(), pair.max()  # NaN, if there is one
                if low >= _LOWEST and high <= _HIGHEST:
                    continue
                where = f"{name} of pair {_place(number, len(image))}"
                unusable = pair.size - int(np.isfinite(pair).sum())
                if unusable:
                    raise IntensityError(
                        f"{where}: {unusable} of its {pair.size} voxels "
                        f"{'is' if unusable == 1 else 'are'} NaN or infinite, expected 0 to 1",
                        "find out where they come from; to take them for background: "
                        f"np.nan_to_num({name}, posinf=0, neginf=0)",
                    )
                raise IntensityError(
                    f"{where}: has values from {low:.6g} to {high:.6g}, expected 0 to 1",
                    f"normalise each scan as engine.metadata.normalisation says "
                    f"({self.metadata.normalisation!r}): divide by the scan's own maximum, or by "
                    "its 99.9th percentile and clip",
                )

    def _check_results(self, results: dict[str, Array], first: int, batch: int) -> None:
        """Every value is a number, in one pass over each result (3 ms at 160x192x160).

        Args:
            results: of one part.
            first: the place of its first pair among those that `run` was given.
            batch: how many those are.
        """
        for name, values in results.items():
            flat = np.ravel(values)
            # A sum of squares is NaN or infinite if a value is, and else only for values of 1e19.
            with np.errstate(all="ignore"):
                if np.isfinite(np.dot(flat, flat)):
                    continue
            for number, pair in enumerate(values, start=first):
                if unusable := pair.size - int(np.isfinite(pair).sum()):
                    raise EngineMismatch(
                        f"{self.description}: {name} of pair {_place(number, batch)} has "
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


def _array(name: str, image: Any) -> Array:
    place = str(getattr(image, "device", "cpu"))
    if place != "cpu":
        raise DtypeError(
            f"{name} is on {place}, expected it on the CPU; an engine copies it where it runs",
            f"{name}.cpu()",
        )
    if np.ma.isMaskedArray(image):
        raise DtypeError(
            f"{name} is a masked array, and what is masked would count", f"{name}.filled(0)"
        )
    try:
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch and numpy raise for theirs
        raise DtypeError(
            f"{name} cannot be read as an array: {error}",
            f"give a float32 array; of a torch tensor {name}.detach().float()",
        ) from error


def _place(number: int, batch: int) -> str:
    """Which pair, for people."""
    return "0" if batch == 1 else f"{number} (counted from 0, of {batch})"


def _closed() -> UsageError:
    return UsageError("the engine is closed", "open it again with load_engine")
