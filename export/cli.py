"""Turn weights into inference engines, each verified against the network before it is written.

Writes the artefact and a JSON manifest beside it that says what it is, what to feed it with and
how far it is from the reference.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ulae_rt.cli import Report
from ulae_rt.export.config import DEFAULT_FOLDER, FORMATS, PRECISIONS, ExportConfig
from ulae_rt.optional import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ulae-rt export``."""
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="what to export"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"default: {DEFAULT_FOLDER}/<name of the weights>"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("D", "H", "W"),
        help="grid of the engine, multiples of 16; default: the one the weights were trained on",
    )
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: onnx")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Export, saying one line per artefact."""
    config = ExportConfig(
        weights=arguments.weights,
        out=arguments.out,
        shape=tuple(arguments.shape) if arguments.shape else None,
        formats=_chosen(arguments.format, FORMATS),
        precisions=_chosen(arguments.precision, PRECISIONS),
        overwrite=arguments.overwrite,
    )
    for library in ("torch", "safetensors", "onnx", "onnxscript"):
        require(library, "export")
    from tqdm import tqdm

    from ulae_rt.export.exporter import STAGES, export

    stages = STAGES * len(config.formats) * len(config.precisions)
    with tqdm(total=stages, bar_format="{desc} |{bar}| {elapsed}", disable=None) as bar:
        begun = False

        def progress(stage: str) -> None:
            nonlocal begun
            bar.update(1 if begun else 0)
            begun = True
            bar.set_description_str(stage)

        exported = export(config, progress)
        bar.update(1)
    artefacts = []
    for item in exported:
        worst = max(item.manifest.errors, key=lambda measured: measured.disp_max)
        report(
            f"{item.path}  {item.size_mb:.1f} MB  {item.seconds:.0f} s  displacement within "
            f"{worst.disp_max:.1e} voxel of torch, moved image within {worst.moved_max:.1e}"
        )
        artefacts.append(
            {
                "path": str(item.path),
                "size_mb": item.size_mb,
                "seconds": item.seconds,
                "manifest": dataclasses.asdict(item.manifest),
            }
        )
    return {"artefacts": artefacts}


def _chosen(values: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Each once, in the order given."""
    return tuple(dict.fromkeys(values)) if values else default
