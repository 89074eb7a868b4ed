"""One export from start to end: read, rewrite, build, verify, and only then write."""

import datetime
import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ulae_rt.conventions import SIZE_MULTIPLE
from ulae_rt.engines.backends import Backend, open_backend
from ulae_rt.engines.machine import devices_for
from ulae_rt.errors import (
    BackendUnavailable,
    EngineMismatch,
    ExportError,
    OutputError,
    UsageError,
)
from ulae_rt.export import pt2, tensorrt
from ulae_rt.export.cases import Case, canary_case, canary_heads, sample_case
from ulae_rt.export.census import types_of, work_of
from ulae_rt.export.config import MAX_VOXELS, ExportConfig, Tolerance, check_shape
from ulae_rt.export.files import check_folder, check_writable, publish
from ulae_rt.export.graph import check_rewriting
from ulae_rt.export.onnx import INPUTS, OPSET, OUTPUTS, onnx_from_model, with_heads_of
from ulae_rt.export.plan import Item, Plan, plan
from ulae_rt.export.report import REPORT, report_of
from ulae_rt.export.serving import check_repository
from ulae_rt.export.verify import verify
from ulae_rt.manifest import (
    ANY_BATCH,
    NOT_RUN,
    TENSORS,
    UNITS,
    VERIFIED,
    EngineMetadata,
    Manifest,
    Measured,
    TensorSpec,
    Work,
    manifest_path,
    preprocessing_of,
    sha256,
)
from ulae_rt.model import UlaeNet, load_model
from ulae_rt.model.checkpoint import DEFAULT_WEIGHTS

# Whose versions are kept in a manifest.
_LIBRARIES = ("ulae-rt", "torch", "onnx", "onnxscript", "onnxruntime")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """One artefact on disk.

    Attributes:
        path: of the artefact; its manifest lies beside it.
        manifest: its content.
        size_mb: of the artefact, 10^6 bytes.
        seconds: to build, verify and write it.
        not_run: why it was not verified; empty if it was.
    """

    path: Path
    manifest: Manifest
    size_mb: float
    seconds: float
    not_run: str


class _Built(NamedTuple):
    """An artefact in memory."""

    content: bytes
    types: dict[str, int]
    versions: dict[str, str]


class LeftOut(NamedTuple):
    """An artefact of the default set that was not made, and why."""

    name: str
    reason: str
    hint: str


class Prepared(NamedTuple):
    """Everything that is known and checked before the first artefact is built.

    Attributes:
        plan: what is to be made.
        path: of the weights.
        model: the network.
        shape: (D, H, W) of the engines' grid.
        weights_sha256: of the weights.
    """

    plan: Plan
    path: Path
    model: UlaeNet
    shape: tuple[int, int, int]
    weights_sha256: str


def prepare(config: ExportConfig) -> Prepared:
    """Read the weights, and make every check that needs no artefact; nothing is written.

    Raises:
        UsageError: if what is asked for does not exist, or the weights' size cannot be exported.
        BackendUnavailable: if this machine lacks what a named format needs.
        CheckpointError: if the weights cannot be used.
        OutputError: if a folder cannot be written, or holds such an artefact already, or those of
            another network.
    """
    decided = plan(config)
    check_writable(_places(config, decided.items), config.overwrite)
    if config.timing_cache is not None:
        check_folder(config.timing_cache, "--timing-cache")
    if config.triton_repository is not None:
        named = [(item.name, item.kind) for item in decided.items]
        check_repository(config.triton_repository, named, config.overwrite)
    path = DEFAULT_WEIGHTS if config.weights is None else config.weights
    model = load_model(path)
    shape = config.shape or model.metadata.shape
    check_shape(shape)
    if model.metadata.spacing_mm % 1:
        raise UsageError(
            f"{path}: its grid has {model.metadata.spacing_mm:g} mm, expected a whole number",
            "train it again, with data.pool = 1 or 2 in the configuration",
        )
    check_batches(shape, config.batches)
    weights_sha256 = sha256(path.read_bytes())
    prepared = Prepared(decided, path, model, shape, weights_sha256)
    replaced = {item.name for item in decided.items} if config.overwrite else set()
    _check_network(config.folder, _network_of(prepared), replaced)
    return prepared


def export(config: ExportConfig, progress: Progress) -> tuple[list[Exported], list[LeftOut]]:
    """Write every artefact that ``config`` asks for, each with its manifest, and a report.

    Each is written as soon as it is verified; an error leaves those before it. An artefact whose
    precision was not asked for by name and that does not hold its tolerance is left out, as long
    as its format, where that was named, is met by another.

    Args:
        config: what to export.
        progress: called with the name of each stage as it begins.

    Returns:
        What was made, and what was left out of the defaults.

    Raises:
        UsageError, BackendUnavailable, CheckpointError, OutputError: see `prepare`.
        ExportError: if an artefact cannot be made; EquivalenceError if it computes something else.
    """
    progress("reading the weights")
    prepared = prepare(config)
    wanted = prepared.plan.items
    progress("checking the rewritten graph in float64")
    check_rewriting(prepared.model)
    network = _Network(prepared.model, prepared.shape, wanted, prepared.weights_sha256, progress)
    left_out = [
        LeftOut(item.name, missing.message, missing.hint)
        for item, missing in prepared.plan.left_out
    ]
    exported: list[Exported] = []
    failures: dict[Item, ExportError] = {}
    for item in wanted:
        try:
            exported.append(_export(network, item, prepared, config, left_out))
        except ExportError as error:
            hint = error.hint + ill_conditioned(prepared.shape)
            named = type(error)(f"{item.name}: {error}", hint)
            if item.precision in (config.precisions or ()):
                raise named from error
            failures[item] = named
            left_out.append(LeftOut(item.name, str(named), named.hint))
    made = {artefact.manifest.kind for artefact in exported}
    for item, failure in failures.items():
        if not exported or (item.kind in (config.formats or ()) and item.kind not in made):
            raise failure
    if failures:
        write_report(config.folder, left_out)
    return exported, left_out


def ill_conditioned(shape: tuple[int, int, int]) -> str:
    """Words for a grid on which rounding alone may exceed a tolerance; empty for any other.

    Of 32x16x16 the coarsest level has two voxels, and normalising two values that are nearly equal
    enlarges their rounding: with the shipped weights to 4.6e-4 voxel in the mean of fp32, against
    1e-6 at 16x16x16, 32x32x16 and 32x32x32.
    """
    if math.prod(shape) != 2 * SIZE_MULTIPLE**3:
        return ""
    return (
        f". A grid of {' x '.join(map(str, shape))} has two voxels at its coarsest level, whose "
        "normalisation enlarges rounding: take --shape 32 32 16 or larger"
    )


def write_report(folder: Path, left_out: list[LeftOut]) -> None:
    """Write REPORT.md anew, of what is in the folder now."""
    publish(folder, {}, lambda: None, lambda: _report(folder, left_out))


def _report(folder: Path, left_out: list[LeftOut]) -> dict[str, bytes]:
    reasons = {artefact.name: artefact.reason for artefact in left_out}
    return {REPORT: report_of(folder, reasons).encode()}


def _places(config: ExportConfig, items: tuple[Item, ...]) -> list[Path]:
    artefacts = [config.folder / item.name for item in items]
    return [path for artefact in artefacts for path in (artefact, manifest_path(artefact))]


def check_batches(shape: tuple[int, int, int], batches: tuple[int, ...]) -> None:
    """Refuse batches whose widest tensor could not be counted."""
    voxels = shape[0] * shape[1] * shape[2]
    if (largest := max(batches)) * voxels > MAX_VOXELS:
        raise UsageError(
            f"batch {largest} of {' x '.join(map(str, shape))} has {largest * voxels} voxels, "
            f"expected at most {MAX_VOXELS}",
            f"the largest batch of this size is {MAX_VOXELS // voxels}",
        )


def _network_of(prepared: Prepared) -> dict[str, Any]:
    """What two engines of one network have in common."""
    metadata = _metadata(prepared.model, prepared.shape)
    return {"weights_sha256": prepared.weights_sha256, **asdict(metadata)}


def _check_network(folder: Path, network: dict[str, Any], replaced: set[str]) -> None:
    """One folder, one network and grid: any engine of it may be the one that is opened.

    Args:
        folder: which need not be there.
        network: of `_network_of`.
        replaced: names of artefacts whose manifests need not be readable, since they go.
    """
    for path in sorted(folder.glob("ulae-net-*.json")):
        try:
            there = Manifest.read(path)
        except EngineMismatch as error:
            if path.stem in {Path(name).stem for name in replaced}:
                continue
            raise OutputError(str(error), "give another --out, or remove that file") from error
        values = {"weights_sha256": there.weights_sha256, **asdict(there.metadata)}
        for name, value in network.items():
            if values[name] != value:
                raise OutputError(
                    f"{folder}: holds engines of other weights or another size: {name} of "
                    f"{there.artefact} is {values[name]!r}, and would be {value!r}",
                    "give another --out, or remove them",
                )


class _Network:
    """One network and everything about it that several artefacts share, made when first needed."""

    def __init__(
        self,
        model: UlaeNet,
        shape: tuple[int, int, int],
        wanted: tuple[Item, ...],
        weights_sha256: str,
        progress: Progress,
    ) -> None:
        self.model = model
        self.canary = canary_heads(model)
        self.shape = shape
        self.weights_sha256 = weights_sha256
        self.progress = progress
        self._both_ways = any(item.batch != 1 for item in wanted)
        self.proto = functools.cache(self._proto)

    def _proto(self, precision: str, batch: int) -> Any:
        """The network as an ONNX model."""
        self.progress(f"tracing the network, {precision}")
        size = None if batch == ANY_BATCH else batch
        return onnx_from_model(self.model, self.shape, precision=precision, batch=size)

    @functools.cached_property
    def sample(self) -> Case:
        """The sample pair and what it must give."""
        self.progress("registering the sample pair in float64")
        return sample_case(self.model, self.shape, self._both_ways)

    @functools.cached_property
    def noise(self) -> Case:
        """The canary's pair and what it must give."""
        self.progress("registering the canary in float64")
        return canary_case(self.canary, self.shape, self._both_ways)


def _export(
    network: _Network,
    item: Item,
    prepared: Prepared,
    config: ExportConfig,
    left_out: list[LeftOut],
) -> Exported:
    start = time.perf_counter()
    folder, artefact = config.folder, config.folder / item.name
    built = _build(network, item, config)
    manifest = _manifest(network, item, built, config.tolerance(item.precision))
    errors, not_run = _verified(network, item, built, manifest, config)
    manifest = replace(manifest, status=VERIFIED if errors else NOT_RUN, errors=tuple(errors))
    network.progress(f"{item.name}: writing")
    files = {
        artefact.name: built.content,
        manifest_path(artefact).name: manifest.to_json().encode(),
    }

    def check() -> None:
        # Again, since another export may have written here in the meantime.
        _check_network(folder, _network_of(prepared), {item.name} if config.overwrite else set())
        check_writable([folder / name for name in files], config.overwrite)

    publish(folder, files, check, lambda: _report(folder, left_out))
    return Exported(
        artefact, manifest, len(built.content) / 1e6, time.perf_counter() - start, not_run
    )


def _build(network: _Network, item: Item, config: ExportConfig) -> _Built:
    if item.kind == "pt2":
        return _program(network, item, network.model)
    proto = network.proto(item.precision, item.batch)
    if item.kind == "onnx":
        return _Built(proto.SerializeToString(), types_of(proto), {"opset": str(OPSET)})
    return _engine(network, item, proto, config)


def _canary(network: _Network, item: Item, built: _Built, config: ExportConfig) -> bytes:
    """The artefact with the canary's heads, its weights otherwise and its operators the same."""
    if item.kind == "pt2":
        if item.target == "cpu":
            return pt2.with_heads_of(network.canary, built.content)
        return _program(network, item, network.canary).content
    proto = with_heads_of(network.canary, network.proto(item.precision, item.batch))
    if item.kind == "onnx":
        content: bytes = proto.SerializeToString()
        return content
    return _engine(network, item, proto, config).content


def _program(network: _Network, item: Item, model: UlaeNet) -> _Built:
    network.progress(f"{item.name}: building")
    program = pt2.build(
        model, network.shape, precision=item.precision, batch=item.batch, target=item.target
    )
    return _Built(program.content, program.types, program.versions)


def _engine(network: _Network, item: Item, proto: Any, config: ExportConfig) -> _Built:
    engine = tensorrt.build(
        proto.SerializeToString(),
        kind=item.kind,
        precision=item.precision,
        target=item.target,
        compatibility=item.compatibility,
        timing_cache=config.timing_cache,
        progress=lambda part: network.progress(f"{item.name}: building, {100 * part:.0f} %"),
    )
    return _Built(engine.content, engine.types, engine.versions)


def _verified(
    network: _Network, item: Item, built: _Built, manifest: Manifest, config: ExportConfig
) -> tuple[list[Measured], str]:
    """What was measured on every device at hand; or nothing, and why."""
    tolerance = config.tolerance(item.precision)
    errors: list[Measured] = []
    for device in devices_for(manifest):
        try:
            backend = open_backend(manifest, built.content, device)
        except BackendUnavailable as error:
            return [], str(error)
        errors.append(_verify(network, item, backend, network.sample, tolerance))
        # Made only where it can be run, since an engine's takes as long as the engine itself.
        backend = open_backend(manifest, _canary(network, item, built, config), device)
        errors.append(_verify(network, item, backend, network.noise, tolerance))
    return errors, ""


def _verify(
    network: _Network, item: Item, backend: Backend, case: Case, tolerance: Tolerance
) -> Measured:
    network.progress(f"{item.name}: verifying on the {case.name}, {backend.device}")
    try:
        return verify(backend, item.batch, case, tolerance)
    finally:
        backend.close()


def _manifest(network: _Network, item: Item, built: _Built, tolerance: Tolerance) -> Manifest:
    return Manifest(
        artefact=item.name,
        kind=item.kind,
        precision=item.precision,
        target=item.target,
        compatibility=item.compatibility,
        inputs=tuple(_spec(name, item.batch, network.shape) for name in INPUTS),
        outputs=tuple(_spec(name, item.batch, network.shape) for name in OUTPUTS),
        metadata=_metadata(network.model, network.shape),
        preprocessing=preprocessing_of(
            network.model.metadata.spacing_mm, network.model.metadata.normalisation
        ),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            **built.versions,
        },
        work=_work(network, item),
        types=built.types,
        weights_sha256=network.weights_sha256,
        artefact_sha256=sha256(built.content),
        status=NOT_RUN,
        tolerance=tolerance,
        errors=(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _work(network: _Network, item: Item) -> Work:
    # ONNX has no bf16 twin; fp16 moves the same bytes.
    if item.precision == "fp32":
        return work_of(network.proto("fp32", 1))
    try:
        return work_of(network.proto("fp16", 1))
    except ExportError:  # bf16 holds weights that fp16 does not: the same nodes, half the bytes
        work = work_of(network.proto("fp32", 1))
        return replace(work, gigabytes=work.gigabytes / 2)


def _spec(name: str, batch: int, shape: tuple[int, int, int]) -> TensorSpec:
    components = TENSORS[name]
    return TensorSpec(name, (batch, len(components), *shape), "float32", UNITS[name], components)


def _metadata(model: UlaeNet, shape: tuple[int, int, int]) -> EngineMetadata:
    metadata = model.metadata
    return EngineMetadata(
        variant=metadata.variant,
        shape=shape,
        spacing_mm=metadata.spacing_mm,
        normalisation=metadata.normalisation,
        training_data=metadata.training_data,
        licence=metadata.licence,
    )
