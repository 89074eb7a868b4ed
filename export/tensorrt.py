"""ONNX to TensorRT and TensorRT-RTX engines that are shown to compute in the types of their graph.

Both libraries have one interface. TensorRT times kernels on the GPU it builds for and needs it;
TensorRT-RTX builds for a named architecture without any, and the machine that runs the engine
compiles its kernels. What they parsed and what they built is read back.
"""

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ulae_rt.engines.backends.tensorrt import library_logger
from ulae_rt.engines.machine import gpus
from ulae_rt.errors import BackendUnavailable, ExportError, UsageError
from ulae_rt.export.config import COMPATIBILITIES, Missing
from ulae_rt.export.proof import (
    TYPES_UNKNOWN_HINT,
    census_of_inspection,
    census_of_plan,
    check_precision,
    convolutions_of,
    prove,
)
from ulae_rt.optional import require

_log = logging.getLogger(__name__)


class _Library(NamedTuple):
    """A library that builds engines."""

    name: str
    module: str
    extra: str
    oldest: tuple[int, int]
    why: str  # not an older one


_LIBRARIES = {
    "tensorrt": _Library(
        "TensorRT", "tensorrt", "tensorrt", (11, 2), "the first that samples volumes (GridSample)"
    ),
    "tensorrt-rtx": _Library(
        "TensorRT-RTX",
        "tensorrt_rtx",
        "tensorrt-rtx",
        (1, 7),
        "older ones sample volumes at the nearest voxel",
    ),
}
KINDS = tuple(_LIBRARIES)

# What TensorRT-RTX builds this network for. It knows sm75 too, but "FP32 3D convolution is not
# supported" there, and the displacement heads are float32 in every precision.
RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
_AMPERE = 80


class BuiltEngine(NamedTuple):
    """An engine that has been built and proved.

    Attributes:
        content: the file.
        types: how many convolutions compute and how many tensors are stored in each type.
        gigabytes: 10^9 bytes that its kernels read and write in one run, every tensor once a
            kernel.
        device_bytes: working memory of one run on the GPU; None if the library does not say.
        versions: of what built it.
    """

    content: bytes
    types: dict[str, int]
    gigabytes: float
    device_bytes: int | None
    versions: dict[str, str]


def target_here() -> str | None:
    """Architecture of this machine's first GPU, ``"sm90"``; None without one."""
    return f"sm{gpus()[0].sm}" if gpus() else None


def missing(kind: str, target: str, compatibility: str = "none") -> Missing | None:
    """What a build lacks on this machine, found without any work; None if nothing.

    Args:
        kind: of :data:`KINDS`.
        target: GPU architecture, ``"sm89"``.
        compatibility: of :data:`COMPATIBILITIES`.

    Raises:
        UsageError: for a kind, target or compatibility that does not exist.
    """
    for what, value, known in (
        ("kind", kind, KINDS),
        ("compatibility", compatibility, COMPATIBILITIES),
    ):
        if value not in known:
            raise UsageError(f"{what} is {value!r}, expected one of {', '.join(known)}")
    if not re.fullmatch(r"sm\d{2,3}", target):
        raise UsageError(
            f"target is {target!r}, expected a GPU architecture such as sm89",
            "sm80: A100, sm86: RTX 30, sm89: RTX 40, sm90: H100 and H200, sm120: RTX 50",
        )
    for reason in (
        _missing_library(kind),
        _missing_for_rtx(target, compatibility)
        if kind == "tensorrt-rtx"
        else _missing_for_tensorrt(target, compatibility),
    ):
        if reason is not None:
            return reason
    return None


def _missing_library(kind: str) -> Missing | None:
    library = _LIBRARIES[kind]
    try:
        version = require(library.module, library.extra).__version__
    except BackendUnavailable as error:
        return Missing(f"{library.name} engines cannot be built: {error}", error.hint)
    if _numbers(version) < library.oldest:
        oldest = ".".join(map(str, library.oldest))
        return Missing(
            f"{library.name} is {version}, expected {oldest} or later, {library.why}",
            f"pip install --upgrade 'ulae-rt[{library.extra}]'",
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _missing_for_rtx(target: str, compatibility: str) -> Missing | None:
    if target not in RTX_TARGETS:
        hint = "use the ONNX artefact there"
        if target in ("sm90", "sm100", "sm103"):
            hint = f"{target} is a data centre GPU: build kind tensorrt on it"
        return Missing(
            f"TensorRT-RTX cannot build this network for {target}, expected one of "
            f"{', '.join(RTX_TARGETS)}",
            hint,
        )
    if compatibility == "same-capability":
        return Missing(
            "TensorRT-RTX has no compatibility 'same-capability'",
            f"leave it out: an engine for {target} runs on every GPU of {target}",
        )
    if compatibility == "ampere-plus" and target != f"sm{_AMPERE}":
        return Missing(
            f"a TensorRT-RTX engine with compatibility 'ampere-plus' is one for sm{_AMPERE} and "
            f"later, got target {target}",
            f"ask for target sm{_AMPERE}, or for {target} alone without compatibility",
        )
    return None


def _missing_for_tensorrt(target: str, compatibility: str) -> Missing | None:
    here = target_here()
    if here is None:
        return Missing(
            "TensorRT times kernels on the GPU it builds for, and the driver names none here",
            "export on the GPU's machine; engines of kind tensorrt-rtx are built without a GPU",
        )
    if target != here:
        return Missing(
            f"TensorRT builds for the GPU it runs on, which is {here}, got target {target}",
            f"export on the other machine, or leave out the target to build for {here}",
        )
    if compatibility == "ampere-plus" and int(here.removeprefix("sm")) < _AMPERE:
        return Missing(
            f"compatibility 'ampere-plus' needs a GPU of sm{_AMPERE} or later, this one is {here}",
            "leave it out",
        )
    return None


def build(
    proto_bytes: bytes,
    *,
    kind: str,
    precision: str,
    target: str,
    compatibility: str = "none",
    timing_cache: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> BuiltEngine:
    """Build an engine and prove its types. Nothing is written but the timing cache.

    Ctrl-C stops the build within a step of it and is raised as ever.

    Args:
        proto_bytes: a serialised ``onnx.ModelProto`` of fixed sizes.
        kind: of :data:`KINDS`.
        precision: ``fp32`` or ``fp16``: what the graph's features are to be.
        target: GPU architecture, ``"sm89"``.
        compatibility: of :data:`COMPATIBILITIES`.
        timing_cache: folder for the measured times of kernels, by which a later build is faster;
            TensorRT only.
        progress: called with the part that is done, 0 to 1, rising; from another thread.

    Raises:
        UsageError: for a kind, target or compatibility that does not exist.
        BackendUnavailable: if something is :func:`missing`.
        ExportError: if the graph is not of the precision or cannot be built, or if the engine is
            not what the graph is.
    """
    if reason := missing(kind, target, compatibility):
        raise BackendUnavailable(reason.message, reason.hint)
    library = _LIBRARIES[kind]
    trt = require(library.module, library.extra)
    onnx = require("onnx", "export")
    proto = onnx.ModelProto.FromString(proto_bytes)
    expected = convolutions_of(proto)
    check_precision(expected, precision)

    logger = library_logger(trt)
    logger.errors.clear()
    # Without a usable driver, TensorRT's constructor gives no object, a TypeError to Python.
    try:
        builder = trt.Builder(logger)
    except TypeError as error:
        raise _failure(library, "cannot start on this machine", logger.errors) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto_bytes):
        problems = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _failure(library, "cannot read the graph", problems or logger.errors)
    check_network(trt, network, proto)

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the types are not told
    _aim(trt, config, kind, target, compatibility)
    cache = None
    if timing_cache is not None and kind == "tensorrt-rtx":
        _log.warning("the timing cache is not used: TensorRT-RTX times no kernels when it builds")
    elif timing_cache is not None:
        cache = timing_cache / f"{library.module}-{trt.__version__}-{target}.timing"
        read_timing_cache(config, cache, logger)
    logger.errors.clear()
    content = _run(trt, builder, network, config, progress)
    if content is None:
        raise _failure(library, f"cannot build for {target}", logger.errors)
    for text in logger.errors:
        _log.warning("%s: %s", library.name, text)
    if cache is not None:
        write_timing_cache(config, cache)

    if kind == "tensorrt-rtx":
        census = census_of_plan(content, target, compatibility)
    else:
        census = census_of_inspection(_inspected(trt, content, logger))
    prove(census, expected)
    types = Counter(f"convolution {each.input}" for each in census.convolutions)
    types.update({f"tensor {name}": count for name, count in census.tensors.items()})
    return BuiltEngine(
        content,
        dict(sorted(types.items())),
        census.nbytes / 1e9,
        census.device_bytes,
        {library.module: trt.__version__},
    )


def _aim(trt: ModuleType, config: Any, kind: str, target: str, compatibility: str) -> None:
    if kind == "tensorrt-rtx":
        # With no architecture named, the engine is for sm80 and runs on all later ones too. The
        # compatibility levels exist, and are "unsupported in TensorRT-RTX".
        if compatibility == "none":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    elif compatibility != "none":
        level = compatibility.upper().replace("-", "_").replace("SAME_", "SAME_COMPUTE_")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def check_network(trt: ModuleType, network: Any, proto: Any) -> None:
    """The library understood the graph: inputs, outputs, and every GridSample.

    Parsers before TensorRT 11.2 and TensorRT-RTX 1.7 took ``linear`` for nearest without a word.

    Args:
        trt: the library.
        network: what it parsed.
        proto: the ``onnx.ModelProto`` that it was given.

    Raises:
        ExportError: naming what differs.
    """
    for what, count, get, values in (
        ("inputs", network.num_inputs, network.get_input, proto.graph.input),
        ("outputs", network.num_outputs, network.get_output, proto.graph.output),
    ):
        tensors = [get(index) for index in range(count)]
        found = [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        expected = [(value.name, _sizes(value), trt.DataType.FLOAT) for value in values]
        if any(-1 in sizes for _, sizes, _ in expected):
            raise ExportError(
                f"the {what} of the graph have an open size, expected a fixed batch",
                "export an ONNX graph of one batch size for each engine",
            )
        if found != expected:
            raise ExportError(
                f"the {what} were read as {found}, expected {expected}", TYPES_UNKNOWN_HINT
            )
    samplers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.GRID_SAMPLE:
            layer.__class__ = trt.IGridSampleLayer  # the bindings' own way to a layer's settings
            samplers.append(layer)
    expected_count = sum(node.op_type == "GridSample" for node in proto.graph.node)
    if len(samplers) != expected_count:
        raise ExportError(
            f"the library read {len(samplers)} GridSample layers, expected {expected_count}",
            TYPES_UNKNOWN_HINT,
        )
    linear = (trt.InterpolationMode.LINEAR, trt.SampleMode.FILL, False)
    for layer in samplers:
        settings = (layer.interpolation_mode, layer.sample_mode, layer.align_corners)
        if settings != linear:
            told = ", ".join(str(each).rpartition(".")[2] for each in settings)
            raise ExportError(
                f"the library reads {layer.name} as ({told}), expected (LINEAR, FILL, False): "
                "linear, zeros outside, corners not aligned",
                "this engine is not written; another version of the library is needed, see "
                "constraints.txt",
            )


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)


def _inspected(trt: ModuleType, content: bytes, logger: Any) -> str:
    """What TensorRT's inspector says about an engine, JSON."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise _failure(_LIBRARIES["tensorrt"], "cannot open what it built", logger.errors)
    text: str = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    return text


def _run(
    trt: ModuleType,
    builder: Any,
    network: Any,
    config: Any,
    progress: Callable[[float], None] | None,
) -> bytes | None:
    """Build in another thread, so that this one can be interrupted."""
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1, "build") as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            while not future.done():
                wait([future], timeout=0.1)
        except KeyboardInterrupt:
            monitor.stop.set()  # leaving the pool waits for the library to notice
            raise
    if monitor.failure is not None:
        raise monitor.failure
    try:
        plan = future.result()
        content = None if plan is None else bytes(plan)
    except MemoryError as error:
        raise ExportError(*_OUT_OF_MEMORY) from error
    if progress is not None and content is not None:
        progress(1.0)
    return content


def _monitor(trt: ModuleType, progress: Callable[[float], None] | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Adds up nested phases, and stops the build when told."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stop = threading.Event()
            self.failure: BaseException | None = None
            self._phases: dict[str, list[Any]] = {}  # name: parent, steps, steps done
            self._told = 0.0
            self._lock = threading.Lock()  # the library calls from any of its threads

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases[name] = [parent, steps, 0]

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name in self._phases:
                    self._phases[name][2] = step + 1
                part = self._part(None)
                if progress is not None and part >= self._told + 0.01 and self.failure is None:
                    self._told = part
                    try:
                        progress(part)
                    except BaseException as error:  # which must not pass through the library
                        self.failure = error
                return not self.stop.is_set() and self.failure is None

        def _part(self, parent: str | None) -> float:
            """Of the steps of a phase, those within it counted in part."""
            parts = [
                (done + self._part(name)) / steps
                for name, (above, steps, done) in self._phases.items()
                if above == parent
            ]
            return min(1.0, max(parts, default=0.0))

    return Monitor()


def _told(error: Any) -> str:
    """A parser's error and the node it is about."""
    about = " ".join(filter(None, (error.node_operator(), error.node_name())))
    return f"{error.desc()} ({about})" if about else str(error.desc())


_OUT_OF_MEMORY = (
    "out of memory while building the engine",
    "close other programs, or export a smaller batch or grid",
)


def _failure(library: _Library, what: str, problems: list[str]) -> ExportError:
    """One line out of all the library said."""
    told = " ".join(problems[0].split()) if problems else "it gives no reason"
    everything = " ".join(problems)
    if re.search(r"out ?of ?memory|bad_alloc|MEM_ALLOC", everything, re.IGNORECASE):
        message, hint = _OUT_OF_MEMORY
        return ExportError(f"{message}: {told}", hint)
    if "No space left" in everything:
        return ExportError(
            f"{library.name} {what}: {told}",
            "free some space where temporary files go (TMPDIR)",
        )
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ExportError(
        f"{library.name} {what}: {told}{more}",
        "this engine is not written; install the versions of constraints.txt, and report it if "
        "they are installed",
    )


def read_timing_cache(config: Any, path: Path, logger: Any) -> None:
    """Give a build the times that earlier ones measured. A cache that does not fit is left out.

    Args:
        config: ``IBuilderConfig``.
        path: of the cache, which need not exist.
        logger: of :func:`library_logger`; tells what the library thinks of the cache.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        _log.warning("%s: the timing cache is not used: %s", path, error.strerror)
        content = b""
    logger.errors.clear()
    cache = config.create_timing_cache(content)
    if cache is None or logger.errors or not config.set_timing_cache(cache, False):
        if content:
            reason = logger.errors[0] if logger.errors else "of another GPU or library, or damaged"
            _log.warning("%s: the timing cache is not used: %s", path, reason)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def write_timing_cache(config: Any, path: Path) -> None:
    """Keep the measured times for later builds. An engine is not given up because that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(bytes(config.get_timing_cache().serialize()))
        part.replace(path)
    except OSError as error:
        _log.warning("%s: the timing cache is not kept: %s", path, error.strerror)
    finally:
        part.unlink(missing_ok=True)
