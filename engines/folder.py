"""A folder of artefacts: which of them can run on this machine, and which is the fastest."""

import itertools
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ulae_rt.arguments import check_choice, parse_device, path_of, what_is_at
from ulae_rt.engines.backends import BACKENDS, backend_of, open_backend
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.machine import (
    BF16_FLAGS,
    check,
    devices_for,
    machine_name,
    processor,
)
from ulae_rt.engines.session import ExportedEngine
from ulae_rt.errors import BackendUnavailable, EngineMismatch, UlaeError
from ulae_rt.manifest import (
    EXPORT_AGAIN_HINT,
    SUFFIX_OF,
    TOLERANCES,
    VERIFIED,
    Manifest,
    manifest_path,
    network_differences,
    sha256,
)
from ulae_rt.manifest import PRECISIONS as MADE_PRECISIONS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", *MADE_PRECISIONS)
SUFFIXES = tuple(dict.fromkeys(SUFFIX_OF.values()))

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
    path: str | os.PathLike[str],
    device: "str | torch.device" = "auto",
    backend: str = "auto",
    precision: str = "auto",
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
        EngineMismatch: if there is no artefact at all, none of that backend and precision, or if
            those of a folder are of different networks.
        UsageError: for a path, device, backend or precision that is none.
    """
    path = path_of(path)
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)
    kind, index = parse_device(device)
    found = [_read(artefact) for artefact in _artefacts(path)]
    manifests = [candidate.manifest for candidate in found if candidate.manifest]
    if path.is_dir():
        _check_one_network(path, manifests)
    manifests = _wanted(path, manifests, backend, precision if path.is_dir() else "auto")
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
    path: str | os.PathLike[str],
    device: "str | torch.device" = "auto",
    backend: str = "auto",
    precision: str = "auto",
) -> ExportedEngine:
    """Open an engine that the exporter wrote: of a folder the fastest that this machine can run.

    Its manifest is checked before the file is opened, and the bytes that are opened are those
    whose hash was compared. An engine that was built, but never run and compared, is opened only
    where its file or its backend is named, and a warning says so, as it does of one that was
    verified with a looser tolerance than the standard. The engines of a folder have to be of one
    network, since any of them may be the one that is opened.

    Args:
        path: the folder the exporter wrote, or one artefact in it, its manifest beside it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or a ``torch.device``.
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
    place = what_is_at(path)
    if place == "not there":
        raise EngineMismatch(
            f"{path}: no such engine", "give the folder that export wrote, or a file in it"
        )
    if place not in ("file", "folder"):
        raise EngineMismatch(f"{path}: {place}", "give the folder that export wrote")
    if place == "file":
        if path.suffix.lower() not in SUFFIXES:
            raise EngineMismatch(
                f"{path}: is no engine, expected a folder or a file {', '.join(SUFFIXES)}",
                "give the folder that export wrote; weights are opened with load_network, or "
                "--weights",
            )
        return [path]
    try:
        entries = list(path.iterdir())
    except OSError as error:
        raise EngineMismatch(
            f"{path}: cannot be listed ({error.strerror})", "check the folder's permissions"
        ) from error
    files = {file for file in entries if file.suffix.lower() in SUFFIXES}
    described = {manifest_path(file) for file in files}
    for entry in entries:
        if entry.match("ulae-net-*.json") and entry not in described:
            files.add(entry)
    if not files:
        raise EngineMismatch(
            f"{path}: holds no engine, expected an export's folder", EXPORT_AGAIN_HINT
        )
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
    """That the manifest is the artefact's."""
    if manifest.artefact != artefact.name:
        raise EngineMismatch(
            f"{manifest_path(artefact)}: is the manifest of {manifest.artefact}, expected "
            f"{artefact.name}",
            "an artefact keeps the name its export gave it",
        )


def _check_one_network(folder: Path, manifests: list[Manifest]) -> None:
    """Of two networks the faster one would decide what the images become."""
    for one, other in itertools.pairwise(manifests):
        if difference := network_differences(one, other):
            raise EngineMismatch(
                f"{folder}: holds engines of two networks, {one.artefact} and {other.artefact}: "
                f"{difference}",
                "name one file to open it, or keep the engines of each network in a folder of "
                "their own",
            )


def _wanted(path: Path, manifests: list[Manifest], backend: str, precision: str) -> list[Manifest]:
    """Those of the backend and precision that were asked for."""
    wanted = [
        manifest
        for manifest in manifests
        if backend in ("auto", backend_of(manifest)) and precision in ("auto", manifest.precision)
    ]
    if wanted or not manifests:
        return wanted
    if not path.is_dir():
        raise EngineMismatch(
            f"{path}: is opened by {backend_of(manifests[0])}, not by backend {backend}",
            f"use --backend auto or {backend_of(manifests[0])}",
        )
    if backend == "auto":
        asked = f"precision {precision}"
    else:
        asked = f"backend {backend}" + (f" in {precision}" if precision != "auto" else "")
    precisions: dict[str, set[str]] = {}
    for manifest in manifests:
        precisions.setdefault(backend_of(manifest), set()).add(manifest.precision)
    there = "; ".join(
        f"{name} in {', '.join(sorted(precisions[name]))}" for name in sorted(precisions)
    )
    raise EngineMismatch(
        f"{path}: holds no engine of {asked}; it holds {there}",
        "ask for what is there, or export what is not; --backend and --precision auto take the "
        "fastest",
    )


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
        place = what_is_at(path)
        if place != "file":
            reason = "it is a folder" if place == "folder" else place
            raise EngineMismatch(f"{path}: cannot be read ({reason})", EXPORT_AGAIN_HINT)
        content = path.read_bytes()
    except OSError as error:
        raise EngineMismatch(
            f"{path}: cannot be read ({error.strerror})", "check the file's permissions"
        ) from error
    except MemoryError as error:
        raise failure(f"reading {path}", error) from error
    if (found := sha256(content)) != manifest.artefact_sha256:
        raise EngineMismatch(
            f"{path}: SHA-256 {found[:12]}..., expected {manifest.artefact_sha256[:12]}... "
            "by its manifest; it was changed or damaged after it was verified",
            EXPORT_AGAIN_HINT,
        )
    if manifest.status != VERIFIED:
        logger.warning("%s is %s: nothing is known of its errors", path.name, manifest.status)
    if loose := loosened(manifest):
        logger.warning(
            "%s was verified with a looser tolerance than the standard of %s: %s",
            path.name, manifest.precision, loose,
        )  # fmt: skip
    return ExportedEngine(manifest, open_backend(manifest, content, candidate.device))


def loosened(manifest: Manifest) -> str:
    """What of its tolerance is looser than the standard (in brackets); empty if nothing is."""
    standard = TOLERANCES[manifest.precision]
    return ", ".join(
        f"{name} {getattr(manifest.tolerance, name):g} ({getattr(standard, name):g})"
        for name in manifest.tolerance.looser_than_standard(manifest.precision)
    )
