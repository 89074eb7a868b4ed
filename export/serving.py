"""A model repository for NVIDIA Triton Inference Server out of exported artefacts.

One folder for each model: ``<name>/config.pbtxt``, which is the server's ``ModelConfig`` message as
text, and ``<name>/1/model.onnx`` or ``model.plan``.
"""

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ulae_rt.errors import EngineMismatch, OutputError, UsageError
from ulae_rt.export.files import check_folder
from ulae_rt.files import locked_folders
from ulae_rt.manifest import (
    ANY_BATCH,
    EXPORT_AGAIN_HINT,
    VERIFIED,
    Manifest,
    TensorSpec,
    sha256,
)

_log = logging.getLogger(__name__)

# Kind of artefact -> the server's word for what opens it, and the file name it looks for.
_PLATFORMS = {
    "onnx": ("onnxruntime_onnx", "model.onnx"),
    "tensorrt": ("tensorrt_plan", "model.plan"),
}
_WHY_NOT = {
    "tensorrt-rtx": "the server has no backend for TensorRT-RTX, use kind tensorrt",
    "pt2": "the server's torch is not the one that made it, use kind onnx or tensorrt",
}
_TYPES = {"float32": "TYPE_FP32"}

# Of an artefact that takes any batch. Pairs of the usual size take some milliseconds each, so that
# this delay finds company for a pair without being felt.
BATCHES = (1, 2, 4, 8)
_QUEUE_DELAY_MICROSECONDS = 2000


def write_repository(
    folder: Path, artefacts: Sequence[tuple[Path, Manifest]], overwrite: bool
) -> list[Path]:
    """Write one model for each artefact that the server can open; the log names the others.

    Models that the folder holds already stay, but those of the same names.

    Args:
        folder: the repository; made where it is not there.
        artefacts: paths and their manifests.
        overwrite: replace models of the same names.

    Returns:
        The models' folders.

    Raises:
        UsageError: if the server can open none of the artefacts.
        EngineMismatch: if an artefact is not the one its manifest is of.
        OutputError: if a model is there already, or cannot be written; then nothing is changed.
    """
    served = []
    for path, manifest in artefacts:
        if reason := _refusal(manifest):
            _log.warning("%s is not in the model repository: %s", manifest.artefact, reason)
        else:
            served.append((path, manifest))
    names = [path.name for path, _ in served]
    _places(folder, names, overwrite)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as place:
            beside = Path(place)
            for path, manifest in served:
                _write_model(beside / path.stem, path, manifest)
            with locked_folders([folder]):
                # Again, since another export may have written here in the meantime.
                models = _places(folder, names, overwrite)
                _check_network(folder, models, beside / models[0].name)
                _exchange(beside, models)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror})",
            "free some space or give another --triton-repository",
        ) from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty
    return models


def _check_network(folder: Path, models: Sequence[Path], new: Path) -> None:
    """One repository, one network and grid: clients choose a model by its precision alone."""
    network = _network_of(new)
    for model in sorted(folder.glob("ulae-net-*")):
        if model not in models and _network_of(model) != network:
            raise OutputError(
                f"{model}: is of another network or grid: {_network_of(model)}, and this one is "
                f"of {network}",
                "give another --triton-repository, or remove it",
            )


def _network_of(model: Path) -> str:
    """The weights and the grid of a model in a repository, as its configuration has them."""
    try:
        text = (model / "config.pbtxt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    weights = re.search(r'"ulae_rt.weights_sha256" value \{ string_value: "(\w+)"', text)
    dims = re.search(r"^input .*dims: \[.*?(\d+, \d+, \d+)\]", text, re.MULTILINE)
    if not weights or not dims:
        return "unknown weights"
    return f"weights {weights[1][:12]}, grid {dims[1].replace(', ', ' x ')}"


def check_repository(folder: Path, artefacts: Sequence[tuple[str, str]], overwrite: bool) -> None:
    """What :func:`write_repository` would refuse, before the artefacts are there.

    Args:
        folder: the repository.
        artefacts: file name and kind of each that will be made.
        overwrite: replace models of the same names.

    Raises:
        UsageError: if the server can open none of them.
        OutputError: if a model is there already.
    """
    check_folder(folder, "--triton-repository")
    _places(folder, [name for name, kind in artefacts if kind in _PLATFORMS], overwrite)


def _places(folder: Path, served: Sequence[str], overwrite: bool) -> list[Path]:
    """The models' folders, free to be written."""
    if not served:
        raise UsageError(
            "none of the artefacts is one that NVIDIA Triton Inference Server can open",
            "add --format onnx, or --format tensorrt on the server's GPU",
        )
    models = [folder / Path(name).stem for name in served]
    for model in models:
        if model.exists() and not overwrite:
            raise OutputError(
                f"{model}: is there already", "pass --overwrite, or another --triton-repository"
            )
    return models


def _refusal(manifest: Manifest) -> str | None:
    """Why the server does not get this artefact."""
    if manifest.kind not in _PLATFORMS:
        return _WHY_NOT[manifest.kind]
    if manifest.status != VERIFIED:
        return f"it is {manifest.status}: export it where it can be run"
    return None


def _write_model(model: Path, path: Path, manifest: Manifest) -> None:
    content = path.read_bytes()
    if sha256(content) != manifest.artefact_sha256:
        raise EngineMismatch(
            f"{path}: is not the file its manifest is of",
            EXPORT_AGAIN_HINT,
        )
    version = model / "1"
    version.mkdir(parents=True)
    (version / _PLATFORMS[manifest.kind][1]).write_bytes(content)
    (model / "config.pbtxt").write_text(config_of(path.stem, manifest), encoding="utf-8")


def _exchange(beside: Path, models: list[Path]) -> None:
    """Put the written models in their places, all or none."""
    done: list[Path] = []
    old = beside / "old"
    old.mkdir()
    try:
        for model in models:
            if model.exists():
                model.rename(old / model.name)
            done.append(model)
            (beside / model.name).rename(model)
    except BaseException:
        for model in done:
            if (old / model.name).exists():
                shutil.rmtree(model, ignore_errors=True)
                (old / model.name).rename(model)
            elif not (beside / model.name).exists():
                shutil.rmtree(model)
        raise


def config_of(name: str, manifest: Manifest) -> str:
    """``config.pbtxt`` of one model.

    An artefact of one batch size is a model that does not batch (``max_batch_size: 0``), whose
    tensors have the batch for their first axis. For one that takes any, the server batches, and
    adds that axis itself.

    Args:
        name: of the model, which is that of its folder.
        manifest: of the artefact.
    """
    return "\n".join(_lines(name, manifest)) + "\n"


def _lines(name: str, manifest: Manifest) -> Iterator[str]:
    batched = manifest.batch == ANY_BATCH
    yield f"# {manifest.artefact}, {manifest.precision}; written by ulae_rt"
    yield f"name: {_quoted(name)}"
    yield f"platform: {_quoted(_PLATFORMS[manifest.kind][0])}"
    yield f"max_batch_size: {max(BATCHES) if batched else 0}"
    for what, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            yield (
                f"{what} {{ name: {_quoted(spec.name)} data_type: {_TYPES[spec.dtype]} "
                f"dims: {_dims(spec)} }}"
            )
    if batched:
        preferred = ", ".join(str(batch) for batch in BATCHES if batch > 1)
        yield (
            f"dynamic_batching {{ preferred_batch_size: [{preferred}] "
            f"max_queue_delay_microseconds: {_QUEUE_DELAY_MICROSECONDS} }}"
        )
    if manifest.kind == "tensorrt":
        yield "instance_group { count: 1 kind: KIND_GPU }"
        yield "optimization { cuda { graphs: true } }"
    else:
        yield "instance_group { count: 1 kind: KIND_AUTO }  # a GPU where the server has one"
    # The first run of a size allocates, chooses kernels and records CUDA graphs: not for a client.
    for batch in BATCHES if batched else (1,):
        yield f'model_warmup {{ name: "batch {batch if batched else manifest.batch}"'
        yield f"  batch_size: {batch}"
        for spec in manifest.inputs:
            yield (
                f"  inputs {{ key: {_quoted(spec.name)} value {{ data_type: {_TYPES[spec.dtype]} "
                f"dims: {_dims(spec)} zero_data: true }} }}"
            )
        yield "}"
    for key, value in _parameters(manifest):
        yield (
            f"parameters {{ key: {_quoted(f'ulae_rt.{key}')} "
            f"value {{ string_value: {_quoted(value)} }} }}"
        )


def _dims(spec: TensorSpec) -> str:
    return str(list(spec.shape[1:] if spec.shape[0] == ANY_BATCH else spec.shape))


def _parameters(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "weights_sha256", manifest.weights_sha256
    yield "artefact_sha256", manifest.artefact_sha256
    yield "precision", manifest.precision
    yield "target", manifest.target
    yield "spacing_mm", f"{manifest.metadata.spacing_mm:g}"
    yield "licence", manifest.metadata.licence
    for step, sentence in enumerate(manifest.preprocessing, 1):
        yield f"preprocessing.{step}", sentence
    for spec in (*manifest.inputs, *manifest.outputs):
        yield f"{spec.name}.units", spec.units
        yield f"{spec.name}.components", ", ".join(spec.components)
    if manifest.kind == "tensorrt":
        # A plan opens with no other version: the server's container is chosen by it.
        yield "tensorrt_version", manifest.versions["tensorrt"]


def _quoted(text: str) -> str:
    """As a string of protobuf's text format."""
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n")):
        text = text.replace(character, escaped)
    return f'"{text}"'
