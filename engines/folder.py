"""A folder of artefacts: which of them can run on this machine, and which is the fastest."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ulae_rt.engines.backends import BACKENDS, backend_of, open_backend
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.machine import (
    BF16_FLAGS,
    check,
    devices_for,
    machine_name,
    parse_device,
    processor,
)
from ulae_rt.engines.session import ExportedEngine
from ulae_rt.errors import BackendUnavailable, EngineMismatch, UlaeError, UsageError
from ulae_rt.manifest import VERIFIED, Manifest, manifest_path, sha256

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
_TENSORS = (("moving", 1), ("fixed", 1), ("moved", 1), ("disp", 3))  # and their channels
SUFFIXES = (".onnx", ".engine", ".pt2")

_AGAIN = "export the weights again: python -m ulae_rt.export --weights FILE"

# What is faster where nothing was measured. On the CPU ONNX Runtime has fp16 only in name: it
# casts every operand to fp32 and every result back.
_CUDA_KINDS = ("tensorrt", "tensorrt-rtx", "pt2", "onnx")
_CUDA_PRECISIONS = ("fp16", "bf16", "fp32")
_CPU = (("pt2", "fp32"), ("onnx", "fp32"), ("pt2", "bf16"), ("onnx", "bf16"), ("pt2", "fp16"))


@dataclass(frozen=True)
class Candidate:
    """One artefact of a folder, on one device.

    Attributes:
        artefact: its path.
        manifest: None where it cannot be read.
        device: ``cpu`` or ``cuda:N``.
        seconds: for one pair, as its export measured it on this very processor or GPU; or None.
        refusal: why it cannot be used here; None where it can.
        chosen: whether it is the one that ``auto`` takes.
    """

    artefact: Path
    manifest: Manifest | None = None
    device: str = ""
    seconds: float | None = None
    refusal: UlaeError | None = None
    chosen: bool = False


def survey(
    path: str | Path, device: str = "auto", backend: str = "auto", precision: str = "auto"
) -> list[Candidate]:
    """What `load_engine` has to choose from, in the order in which it would.

    First what can be used, the fastest first: by the seconds that were measured on this machine,
    what was measured before what was not, and otherwise by kind and precision. A GPU comes before
    the CPU, an engine for single pairs before one for several at once.

    Args:
        path: the folder the exporter wrote, or one artefact in it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: one of ``BACKENDS``.
        precision: one of `PRECISIONS`, of a folder; a file is what it is.

    Raises:
        EngineMismatch: if there is no artefact at all, or none of that backend or precision.
        UsageError: for an unknown device, backend or precision.
    """
    path = Path(path)
    for name, value, choices in (
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in choices:
            raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    kind, index = parse_device(device)
    found = [_read(artefact) for artefact in _artefacts(path)]
    manifests = [candidate.manifest for candidate in found if candidate.manifest]
    if path.is_dir():
        manifests = _wanted(path, manifests, "precision", precision, lambda m: m.precision)
    manifests = _wanted(path, manifests, "backend", backend, backend_of)
    candidates = [candidate for candidate in found if candidate.refusal]
    folder, named = (path, backend != "auto") if path.is_dir() else (path.parent, True)
    place = "cpu" if kind == "cpu" else f"cuda:{index}"
    for manifest in manifests:
        for name in devices_for(manifest) if kind == "auto" else (place,):
            candidates.append(_judge(Candidate(folder / manifest.artefact, manifest, name), named))
    candidates.sort(key=_order)
    if candidates[0].refusal is None:
        candidates[0] = replace(candidates[0], chosen=True)
    return candidates


def load_engine(
    path: str | Path, device: str = "auto", backend: str = "auto", precision: str = "auto"
) -> ExportedEngine:
    """Open an engine that the exporter wrote: of a folder the fastest that this machine can run.

    Its manifest is checked before the file is opened, and the bytes that are opened are those
    whose hash was compared. An engine that was built, but never run and compared, is opened only
    where its file or its backend is named, and a warning says so.

    Args:
        path: the folder the exporter wrote, or one artefact in it, its manifest beside it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: ``auto``, ``onnxruntime``, ``tensorrt``, ``tensorrt-rtx`` or ``pt2``.
        precision: ``auto``, ``fp32``, ``fp16`` or ``bf16``, of a folder; a file is what it is.

    Returns:
        The engine, ready to run.

    Raises:
        EngineMismatch: if a file is missing, is not what its manifest says, was made by another
            version, or cannot be loaded.
        BackendUnavailable: if the backend or the device cannot be had here.
        UsageError: for an unknown device, backend or precision.
    """
    candidates = survey(path, device, backend, precision)
    usable = [candidate for candidate in candidates if candidate.refusal is None]
    refusals = {c.artefact.name: c.refusal for c in candidates if c.refusal is not None}
    for candidate in candidates:
        if candidate.manifest is None and usable:
            logger.warning("left out: %s", candidate.refusal)
    for candidate in usable:
        try:
            return _open(candidate)
        except BackendUnavailable as error:
            # What could not be known without trying: a library that does not load, or no driver.
            refusals[candidate.artefact.name] = error
            if candidate is not usable[-1]:
                logger.warning("%s: %s; the next is tried", candidate.artefact.name, error)
    if len(refusals) == 1:
        raise next(iter(refusals.values()))
    unavailable = any(isinstance(error, BackendUnavailable) for error in refusals.values())
    raise (BackendUnavailable if unavailable else EngineMismatch)(
        f"{path}: none of its engines can be used here: {'; '.join(map(str, refusals.values()))}",
        next(iter(refusals.values())).hint,
    )


def _artefacts(path: Path) -> list[Path]:
    """The files to look at; of a folder also those that only a manifest speaks of."""
    if not path.is_dir():
        if not path.is_file():
            raise EngineMismatch(
                f"{path}: no such engine", "give the folder that export wrote, or a file in it"
            )
        return [path]
    files = {file for file in path.iterdir() if file.suffix in SUFFIXES}
    described = {manifest_path(file) for file in files}
    for manifest in sorted(path.glob("ulae-net-*.json")):
        if manifest not in described:
            files.add(manifest)
    if not files:
        raise EngineMismatch(f"{path}: holds no engine, expected an export's folder", _AGAIN)
    return sorted(files)


def _read(artefact: Path) -> Candidate:
    """The manifest of a file, or why there is none that speaks of it."""
    try:
        manifest = Manifest.read(manifest_path(artefact))
    except EngineMismatch as error:
        return Candidate(artefact, refusal=error)
    missing = artefact.with_name(manifest.artefact)
    if artefact.suffix == ".json" and manifest_path(missing) == artefact:
        artefact = missing  # opening it will say so
    try:
        _check_names(manifest, artefact)
    except EngineMismatch as error:
        return Candidate(artefact, refusal=error)
    return Candidate(artefact, manifest)


def _check_names(manifest: Manifest, artefact: Path) -> None:
    """That the manifest is the artefact's, and promises what an `Engine` feeds and gives."""
    if manifest.artefact != artefact.name:
        raise EngineMismatch(
            f"{manifest_path(artefact)}: is the manifest of {manifest.artefact}, expected "
            f"{artefact.name}",
            "an artefact keeps the name its export gave it",
        )
    if manifest.precision not in PRECISIONS[1:]:
        raise EngineMismatch(
            f"{manifest_path(artefact)}: precision is {manifest.precision!r}, expected one of "
            f"{', '.join(PRECISIONS[1:])}",
            f"a newer version of ulae_rt wrote it; install that version, or {_AGAIN}",
        )
    found = [(spec.name, spec.dtype, spec.shape) for spec in (*manifest.inputs, *manifest.outputs)]
    expected = [
        (name, "float32", (manifest.batch, channels, *manifest.metadata.shape))
        for name, channels in _TENSORS
    ]
    if found != expected:
        raise EngineMismatch(
            f"{manifest_path(artefact)}: its inputs and outputs are {found}, expected {expected}",
            _AGAIN,
        )


def _wanted(
    path: Path, manifests: list[Manifest], name: str, value: str, of: Callable[[Manifest], str]
) -> list[Manifest]:
    """Those whose ``name`` is the ``value`` that was asked for."""
    if value == "auto" or not manifests:
        return manifests
    wanted = [manifest for manifest in manifests if of(manifest) == value]
    if not wanted:
        there = ", ".join(sorted({of(manifest) for manifest in manifests}))
        raise EngineMismatch(
            f"{path}: holds no engine of {name} {value}, only {there}",
            f"ask for one that is there, or export with it; --{name} auto takes the fastest",
        )
    return wanted


def _judge(candidate: Candidate, named: bool) -> Candidate:
    """The candidate with what it takes here, or with why it cannot be used."""
    manifest = candidate.manifest
    assert manifest is not None
    try:
        check(manifest, candidate.device)
    except UlaeError as error:
        return replace(candidate, refusal=error)
    if manifest.status != VERIFIED and not named:
        unknown = EngineMismatch(
            f"{manifest.artefact}: is {manifest.status}, so nobody knows that it is right",
            "export on this machine, which verifies it; or name the file, or its backend",
        )
        return replace(candidate, refusal=unknown)
    here = machine_name(candidate.device)
    seconds = [e.seconds for e in manifest.errors if e.machine == here and e.seconds > 0]
    if not seconds:
        return candidate
    # Other work on the machine only ever makes a run slower.
    return replace(candidate, seconds=min(seconds) / max(1, manifest.batch))


def _order(candidate: Candidate) -> tuple[object, ...]:
    manifest = candidate.manifest
    if candidate.refusal is not None or manifest is None:
        return (True, candidate.artefact.name, candidate.device)
    return (
        False,
        manifest.status != VERIFIED,
        manifest.batch > 1,
        candidate.device == "cpu",
        candidate.seconds is None,
        candidate.seconds or 0.0,
        _rank(manifest, candidate.device),
        manifest.artefact,
    )


def _rank(manifest: Manifest, device: str) -> int:
    if device != "cpu":
        kinds, precisions = _CUDA_KINDS, _CUDA_PRECISIONS
        return 10 * kinds.index(manifest.kind) + precisions.index(manifest.precision)
    key = (manifest.kind, manifest.precision)
    if key == ("pt2", "bf16") and processor()[1] & BF16_FLAGS:
        return -1
    return _CPU.index(key) if key in _CPU else len(_CPU)


def _open(candidate: Candidate) -> ExportedEngine:
    manifest, path = candidate.manifest, candidate.artefact
    assert manifest is not None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineMismatch(f"{path}: cannot be read ({error.strerror})", _AGAIN) from error
    except MemoryError as error:
        raise failure(f"reading {path}", error) from error
    if (found := sha256(content)) != manifest.artefact_sha256:
        raise EngineMismatch(
            f"{path}: SHA-256 {found[:12]}..., expected {manifest.artefact_sha256[:12]}... "
            "by its manifest; it was changed or damaged after it was verified",
            _AGAIN,
        )
    if manifest.status != VERIFIED:
        logger.warning("%s is %s: nothing is known of its errors", path.name, manifest.status)
    return ExportedEngine(manifest, open_backend(manifest, content, candidate.device))
