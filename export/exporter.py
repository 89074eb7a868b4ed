"""One export from start to end: read, trace, check, verify, and only then write."""

import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulae_rt.engines.backends import OnnxRuntimeBackend
from ulae_rt.errors import OutputError
from ulae_rt.export.config import ExportConfig, check_shape
from ulae_rt.export.onnx import INPUTS, OPSET, OUTPUTS, onnx_from_model
from ulae_rt.export.verify import cases, measure
from ulae_rt.manifest import (
    VERIFIED,
    EngineMetadata,
    Manifest,
    TensorSpec,
    Work,
    manifest_path,
    sha256,
)
from ulae_rt.model import UlaeNet, load_model

STAGES = 5  # how often `progress` is called for one artefact

_LIBRARIES = ("ulae-rt", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """One artefact on disk.

    Attributes:
        path: of the artefact; its manifest lies beside it.
        manifest: its content.
        size_mb: of the artefact, 10^6 bytes.
        seconds: from reading the weights to the written file.
    """

    path: Path
    manifest: Manifest
    size_mb: float
    seconds: float


def export(config: ExportConfig, progress: Callable[[str], None]) -> list[Exported]:
    """Write every artefact that ``config`` asks for, each with its manifest.

    Args:
        config: what to export.
        progress: called with the name of each stage as it begins.

    Raises:
        CheckpointError: if the weights cannot be used.
        UsageError: if the weights were trained on a size that cannot be exported.
        OutputError: if the folder cannot be written, or holds such an artefact already.
        ExportError: if the graph cannot be made; EquivalenceError if it computes something else.
    """
    artefacts = [
        config.folder / f"ulae-net-{precision}.{kind}"
        for kind in config.formats
        for precision in config.precisions
    ]
    for artefact in artefacts:
        _check_writable(artefact, config.overwrite)
    return [_export_onnx(config, artefact, progress) for artefact in artefacts]


def _export_onnx(config: ExportConfig, artefact: Path, progress: Callable[[str], None]) -> Exported:
    start = time.perf_counter()
    progress("reading the weights")
    model = load_model(config.weights)
    shape = config.shape or model.metadata.shape
    check_shape(shape)

    progress("tracing the network")
    proto = onnx_from_model(model, shape)
    content: bytes = proto.SerializeToString()

    errors = []
    for case in cases(model, proto, shape):
        progress(f"verifying on {case.name}")
        # The artefact itself wherever it can be, and not what it was made from.
        same = case.proto is proto
        backend = OnnxRuntimeBackend(content if same else case.proto.SerializeToString(), "cpu")
        errors.append(measure(case, backend))

    progress("writing")
    manifest = Manifest(
        artefact=artefact.name,
        kind="onnx",
        precision="fp32",
        target="any",
        compatibility="none",
        inputs=tuple(_spec(name, shape) for name in INPUTS),
        outputs=tuple(_spec(name, shape) for name in OUTPUTS),
        metadata=_metadata(model, shape),
        preprocessing=(),
        versions={
            "opset": str(OPSET),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        weights_sha256=sha256(config.weights.read_bytes()),
        artefact_sha256=sha256(content),
        work=Work(0.0, 0.0, len(proto.graph.node)),
        types={},
        status=VERIFIED,
        errors=tuple(errors),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    _publish({artefact: content, manifest_path(artefact): manifest.to_json().encode()})
    return Exported(artefact, manifest, len(content) / 1e6, time.perf_counter() - start)


def _spec(name: str, shape: tuple[int, int, int]) -> TensorSpec:
    if name == "disp":
        units = "voxels of the fixed grid; moved(p) = moving(p + disp(p))"
        return TensorSpec(name, (1, 3, *shape), "float32", units, ("d", "h", "w"))
    return TensorSpec(name, (1, 1, *shape), "float32", "intensity in [0, 1]", ("intensity",))


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


def _check_writable(artefact: Path, overwrite: bool) -> None:
    """Before minutes of work, not after them."""
    for path in (artefact, manifest_path(artefact)):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: is there already", "pass --overwrite, or another --out")
    folder = next(parent for parent in artefact.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise OutputError(f"{folder}: is a file, expected a folder", "give another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: no permission to write there", "give another --out")


def _publish(files: dict[Path, bytes]) -> None:
    """Write all files beside their places, then rename them."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_bytes(content)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{error.filename or path}: cannot be written ({error.strerror})",
            "free some space or give another --out",
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
