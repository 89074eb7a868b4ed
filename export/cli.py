"""Turn weights into inference engines, each verified against the network before it is written.

Writes artefacts, a JSON manifest beside each that says what it is, what to feed it with and how far
it is from the network in float64, and REPORT.md. Without --format: ONNX, a .pt2 for the CPU, and
what runs fastest on this machine's GPU if there is one.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ulae_rt.cli import Report
from ulae_rt.errors import UsageError
from ulae_rt.export.config import (
    COMPATIBILITIES,
    DEFAULT_FOLDER,
    PRECISIONS,
    TOLERANCES,
    ExportConfig,
)
from ulae_rt.manifest import ANY_BATCH, KINDS, TOLERANCE_NAMES, VERIFIED
from ulae_rt.optional import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ulae-rt export``."""
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="what to export; default: the shipped weights"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"default: {DEFAULT_FOLDER}/<name of the weights>"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("D", "H", "W"),
        help="grid of the engine, multiples of 16 (32 16 16 may not be verified: take 32 32 16 or "
        "larger); default: the one the weights were trained on",
    )
    parser.add_argument("--format", action="append", choices=KINDS, help="may be repeated")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="of the features; may be repeated"
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="smNN",
        help="GPU architecture to build for (or cpu, for pt2); may be repeated; default: this "
        "machine's",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        default=["1"],
        metavar="N",
        help="pairs a run takes, an artefact each; 'dynamic' for ONNX; default: 1",
    )
    parser.add_argument(
        "--hardware-compatibility",
        choices=COMPATIBILITIES,
        default="none",
        help="build TensorRT engines that other GPUs run too, more slowly",
    )
    parser.add_argument(
        "--timing-cache", type=Path, metavar="DIR", help="keep TensorRT's timings for later builds"
    )
    parser.add_argument(
        "--triton-repository",
        type=Path,
        metavar="DIR",
        help="also write a model repository for NVIDIA Triton Inference Server",
    )
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="largest error that passes, in every precision; flips of the determinant's sign pass "
        "by their rate in a million (sign_flips) or by number (sign_flip_count); NAME is one of "
        f"{', '.join(TOLERANCE_NAMES)}",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Export, saying one line per artefact."""
    config = ExportConfig(
        weights=arguments.weights,
        out=arguments.out,
        shape=tuple(arguments.shape) if arguments.shape else None,
        formats=_chosen(arguments.format),
        precisions=_chosen(arguments.precision),
        targets=_chosen(arguments.target),
        batches=tuple(dict.fromkeys(map(_batch, arguments.batch))),
        compatibility=arguments.hardware_compatibility,
        tolerances=_tolerances(arguments.tolerance),
        timing_cache=arguments.timing_cache,
        triton_repository=arguments.triton_repository,
        overwrite=arguments.overwrite,
    )
    for library in ("torch", "safetensors", "onnx", "onnxscript"):
        require(library, "export")
    if not arguments.dry_run:
        return _export(config, report)
    from ulae_rt.export.exporter import prepare

    decided = prepare(config).plan
    left_out = [
        {"artefact": item.name, "reason": missing.message, "hint": missing.hint}
        for item, missing in decided.left_out
    ]
    _say_left_out(left_out, report)
    for item in decided.items:
        report(f"would make {config.folder / item.name}")
    for precision in dict.fromkeys(item.precision for item in decided.items):
        allowed = dataclasses.asdict(config.tolerance(precision)).items()
        report(f"{precision} may be off by {', '.join(f'{k} {v:g}' for k, v in allowed)}")
    return {
        "would_make": [str(config.folder / item.name) for item in decided.items],
        "left_out": left_out,
    }


def _say_left_out(left_out: list[dict[str, str]], report: Report) -> None:
    for item in left_out:
        name = item["artefact"]
        report(f"not made: {name}: {item['reason'].removeprefix(f'{name}: ')} ({item['hint']})")


def _export(config: ExportConfig, report: Report) -> dict[str, Any]:
    from tqdm import tqdm

    from ulae_rt.export.exporter import export
    from ulae_rt.export.serving import write_repository

    with tqdm(bar_format="{elapsed} {desc}", disable=None, leave=False) as bar:

        def progress(stage: str) -> None:
            bar.set_description_str(stage)

        exported, omitted = export(config, progress)
    artefacts = []
    for item in exported:
        line = f"{item.path}  {item.size_mb:.1f} MB  {item.seconds:.0f} s  {item.manifest.status}"
        if item.manifest.status == VERIFIED:
            worst = max(item.manifest.errors, key=lambda measured: measured.disp_max)
            line += (
                f": displacement within {worst.disp_max:.1e} voxel of float64 (mean "
                f"{worst.disp_mean:.1e}), moved image within {worst.moved_max:.1e}"
            )
        else:
            line += f": {item.not_run.removeprefix(f'{item.path.name}: ')}"
        report(line)
        artefacts.append(
            {
                "path": str(item.path),
                "size_mb": item.size_mb,
                "seconds": item.seconds,
                "manifest": dataclasses.asdict(item.manifest),
            }
        )
    left_out = [{"artefact": o.name, "reason": o.reason, "hint": o.hint} for o in omitted]
    _say_left_out(left_out, report)
    result: dict[str, Any] = {"artefacts": artefacts, "left_out": left_out}
    if config.triton_repository is not None:
        models = write_repository(
            config.triton_repository,
            [(item.path, item.manifest) for item in exported],
            config.overwrite,
        )
        for model in models:
            report(f"{model}  for NVIDIA Triton Inference Server")
        result["triton_repository"] = [str(model) for model in models]
    return result


def _chosen(values: list[str] | None) -> tuple[str, ...] | None:
    """Each once, in the order given."""
    return tuple(dict.fromkeys(values)) if values else None


def _batch(text: str) -> int:
    if text == "dynamic":
        return ANY_BATCH
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise UsageError(f"batch is {text!r}, expected a number or 'dynamic'", "e.g. --batch 1 4 8")
    return int(text)


def _tolerances(texts: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for text in texts:
        name, value = _tolerance(text)
        if name in values:
            raise UsageError(
                f"--tolerance {name} is given twice, {values[name]:g} and {value:g}", "give one"
            )
        values[name] = value
    return values


def _tolerance(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise UsageError(
            f"tolerance is {text!r}, expected NAME=VALUE, e.g. disp_max=0.5",
            f"the largest displacement error allowed in fp16 is {TOLERANCES['fp16'].disp_max:g}",
        ) from error
