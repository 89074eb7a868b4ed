"""Which artefacts one export makes, decided before any work starts."""

import itertools
import re
from typing import NamedTuple

from ulae_rt.engines.machine import BF16_FLAGS, gpus, processor
from ulae_rt.errors import BackendUnavailable, UsageError
from ulae_rt.export import pt2, tensorrt
from ulae_rt.export.config import ExportConfig, Missing
from ulae_rt.manifest import ANY_BATCH

# What each kind can be, and what it is where no precision is named. ONNX has no bf16 convolution
# before opset 22, and what runs the files would only widen it; an engine in fp32 is the exception.
_PRECISIONS = {
    "onnx": (("fp32", "fp16"), ("fp32", "fp16")),
    "tensorrt": (("fp32", "fp16"), ("fp16",)),
    "tensorrt-rtx": (("fp32", "fp16"), ("fp16",)),
    "pt2 cpu": (("fp32", "bf16"), ("fp32", "bf16")),
    "pt2 cuda": (("fp32", "fp16", "bf16"), ("fp16",)),
}
_SHORT = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}


class Item(NamedTuple):
    """One artefact to make.

    Attributes:
        kind, precision, target, compatibility: as in the manifest.
        batch: pairs a run takes, or ``ANY_BATCH``.
    """

    kind: str
    precision: str
    target: str
    batch: int
    compatibility: str

    @property
    def name(self) -> str:
        """Of the file: precision, then what builds it, architecture and batch where they matter."""
        parts = ["ulae-net", self.precision]
        if self.kind in _SHORT:
            parts.append(_SHORT[self.kind])
        if self.target != "any":
            parts.append(self.target)
        if self.compatibility != "none":
            parts.append(self.compatibility)
        if self.batch == ANY_BATCH:
            parts.append("bN")
        elif self.batch != 1:
            parts.append(f"b{self.batch}")
        suffix = {"onnx": ".onnx", "pt2": ".pt2"}.get(self.kind, ".engine")
        return "-".join(parts) + suffix

    @property
    def missing(self) -> Missing | None:
        """What this machine lacks to make it; None if nothing."""
        if self.kind == "onnx":
            return None
        if self.kind == "pt2":
            return pt2.missing(self.target)
        return tensorrt.missing(self.kind, self.target, self.compatibility)


class Plan(NamedTuple):
    """What one export makes.

    Attributes:
        items: the artefacts, in the order in which they are made.
        left_out: what the defaults would have made if the machine had what it takes, and the
            format could be what was asked for.
    """

    items: tuple[Item, ...]
    left_out: tuple[tuple[Item, Missing], ...]


def plan(config: ExportConfig) -> Plan:
    """Decide what an export makes.

    Without formats: ONNX, which everything reads, and ``.pt2`` for the CPU; on a machine with a GPU
    also what runs fastest on it and can be built here.

    Raises:
        UsageError: for a combination that does not exist.
        BackendUnavailable: if this machine lacks what a named format needs.
    """
    if config.targets and not config.formats:
        raise UsageError(
            "--target needs --format: it is what engines and .pt2 files are built for",
            "e.g. --format tensorrt-rtx --target sm89",
        )
    impossible: list[tuple[Item, Missing]] = []
    made = _named(config) if config.formats else _default(config, impossible)
    chosen = list(dict.fromkeys(made))
    if not chosen:
        raise UsageError(
            f"no default format has precision {', '.join(config.precisions or ())} with batch "
            "dynamic",
            "leave out --batch dynamic, or take --precision fp32 or fp16",
        )
    _check_effect(config, chosen)
    lacking = [(item, item.missing) for item in chosen]
    left_out = tuple((item, missing) for item, missing in lacking if missing is not None)
    if config.formats and left_out:
        item, missing = left_out[0]
        raise BackendUnavailable(f"{item.name}: {missing.message}", missing.hint)
    items = tuple(item for item, missing in lacking if missing is None)
    return Plan(items, (*impossible, *left_out))


_ADD_TENSORRT = "leave it out, or add --format tensorrt on a machine with the GPU"


def _check_effect(config: ExportConfig, chosen: list[Item]) -> None:
    """Refuse options that nothing of what is made heeds."""
    kinds = {item.kind for item in chosen}
    if config.compatibility != "none" and not kinds & _SHORT.keys():
        raise UsageError(
            f"--hardware-compatibility {config.compatibility} has no effect: it is of TensorRT "
            "engines, and none is made",
            "leave it out, or add --format tensorrt-rtx --target sm80"
            if config.compatibility == "ampere-plus"
            else _ADD_TENSORRT,
        )
    if config.timing_cache is not None and "tensorrt" not in kinds:
        raise UsageError(
            "--timing-cache has no effect: only TensorRT times kernels as it builds, and no engine "
            "of it is made",
            _ADD_TENSORRT,
        )


def _named(config: ExportConfig) -> list[Item]:
    made, used = [], set()
    for kind in config.formats or ():
        targets = [target for target in config.targets or () if _fits(kind, target)]
        used.update(targets)
        for target in targets or _targets_here(kind, bool(config.targets)):
            made += _of(config, kind, target)
    if unused := [target for target in config.targets or () if target not in used]:
        raise UsageError(
            f"target {unused[0]} fits none of the formats {', '.join(config.formats or ())}",
            "engines are built for smNN, .pt2 for cpu or the smNN of this machine, ONNX for any",
        )
    return made


def _default(config: ExportConfig, impossible: list[tuple[Item, Missing]]) -> list[Item]:
    kinds = [("onnx", "any"), ("pt2", "cpu")]
    if gpus():
        here = f"sm{gpus()[0].sm}"
        kinds += [(kind, here) for kind in ("tensorrt", "tensorrt-rtx", "pt2")]
    return [item for kind, target in kinds for item in _of(config, kind, target, impossible)]


def _fits(kind: str, target: str) -> bool:
    if target == "cpu":
        return kind == "pt2"
    if not re.fullmatch(r"sm\d{2,3}", target):
        raise UsageError(
            f"target is {target!r}, expected cpu or a GPU architecture such as sm89",
            "sm80: A100, sm86: RTX 30, sm89: RTX 40, sm90: H100 and H200, sm120: RTX 50",
        )
    return kind != "onnx"


def _targets_here(kind: str, others_named: bool) -> list[str]:
    """What a format is built for when nothing was said about it."""
    if kind == "onnx":
        return ["any"]
    here = [f"sm{gpus()[0].sm}"] if gpus() else []
    if kind == "pt2":
        return [] if others_named else ["cpu", *here]
    if not here:
        raise UsageError(
            f"format {kind} needs a target: this machine has no GPU to build for",
            "name the GPU's architecture: --target sm80, sm86, sm89 or sm120",
        )
    return here


def _of(
    config: ExportConfig,
    kind: str,
    target: str,
    impossible: list[tuple[Item, Missing]] | None = None,
) -> list[Item]:
    """Every precision and batch of one kind.

    Args:
        config: of the export.
        kind: of artefact.
        target: it is for.
        impossible: gets what the kind cannot be and why; None: that is an error.

    Raises:
        UsageError: for what the kind cannot be.
    """
    known, usual = _PRECISIONS[kind if kind != "pt2" else _pt2(target)]
    precisions = config.precisions or tuple(p for p in usual if p != "bf16" or _has_bf16())
    compatibility = config.compatibility if kind in _SHORT else "none"
    made = []
    for precision, batch in itertools.product(precisions, config.batches):
        reason = None
        if precision not in known:
            reason = Missing(
                f"{kind}{'' if target == 'any' else f' for {target}'} cannot be {precision}, "
                f"expected one of {', '.join(known)}",
                "leave out --precision to get what pays in each format",
            )
        elif batch == ANY_BATCH and kind != "onnx":
            reason = Missing(
                f"{kind} has one batch size an artefact, got a dynamic one",
                "name the sizes: --batch 1 2 4 8",
            )
        item = Item(kind, precision, target, batch, compatibility)
        if reason is None:
            made.append(item)
        elif impossible is None:
            raise UsageError(*reason)
        else:
            impossible.append((item, reason))
    return made


def _pt2(target: str) -> str:
    return "pt2 cpu" if target == "cpu" else "pt2 cuda"


def _has_bf16() -> bool:
    return bool(processor()[1] & BF16_FLAGS)
