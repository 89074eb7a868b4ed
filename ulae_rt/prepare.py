"""Bring scans to the training grid: affine to a template, 1 mm, cropped, intensities in [0, 1]."""

import argparse
import difflib
import json
import logging
import os
import re
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ulae_rt.batching.pipeline import threads_of_its_own
from ulae_rt.conventions import AFFINE_MODES, AffineMode
from ulae_rt.errors import ImageError, OutputError, UlaeError, UsageError
from ulae_rt.files import locked_run
from ulae_rt.imaging.affine import register_affine
from ulae_rt.imaging.grid import Grid
from ulae_rt.imaging.image import Image, as_array, image_of, labels_of, resample
from ulae_rt.imaging.labelmap import check_labels, refuse_empty
from ulae_rt.imaging.nifti import (
    SUFFIXES,
    Outputs,
    Volume,
    image_on_grid,
    output_error,
    read_volume,
    save_image,
)
from ulae_rt.imaging.preprocess import (
    CUT_OFF,
    NO_OVERLAP,
    NORMALISATION,
    WORKING_SHAPE,
    cut_off,
    network_input,
    warn_cut_off,
    with_background,
    working_grid,
)
from ulae_rt.imaging.similarity import correlation
from ulae_rt.messages import about, collected, collecting, libraries_redirected
from ulae_rt.registration.verdict import affine_reason, tell, unlike_reason
from ulae_rt.strict_csv import csv_rows, decode_text, separator

if TYPE_CHECKING:
    from ulae_rt.cli import Report

logger = logging.getLogger(__name__)

MANIFEST = "prepared.json"
LABEL_WORDS = re.compile(r"[_-](labels?|seg|dseg|aseg|parc|mask)(?=$|[_.-])", re.IGNORECASE)
# A scan's files are called by its name, in the folder and with room for an end.
SCAN_NAME = re.compile(r"[^/.\x00-\x1f][^/\x00-\x1f]{0,199}")
LABELS_END = "_labels"
COLUMNS = ("id", "image", "labels")
MODALITY = re.compile(r"[_-](t1w?|brain)$", re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """One scan to prepare: its name, its file and, where there is one, its label map."""

    name: str
    image: Path
    labels: Path | None


@dataclass(frozen=True)
class _Job:
    scan: Scan
    template: Path
    grid: Grid
    folder: Path
    affine: AffineMode
    overwrite: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt prepare``."""
    parser.add_argument(
        "scans",
        type=Path,
        metavar="SCANS",
        help="a folder of skull-stripped scans (ID_t1.nii.gz or ID.nii.gz, label maps beside them "
        "as ID_labels.nii.gz), or a text or CSV list: image[,labels] on each row, or the columns "
        "id,image,labels",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--template", type=Path, required=True, metavar="IMAGE", help="the brain all align to"
    )
    parser.add_argument("--affine", choices=AFFINE_MODES, default="affine", help="(%(default)s)")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=WORKING_SHAPE, metavar=("D", "H", "W"),
        help="voxels of 1 mm along R, A, S (160 192 160)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Prepare every scan; a bad one is reported and the rest go on.

    Raises:
        UsageError: nonsense in the arguments or the list.
        ImageError: at the end, when at least one scan failed.
    """
    if arguments.workers < 1:
        raise UsageError(
            f"--workers is {arguments.workers}, expected 1 or more", "give --workers 1"
        )
    shape = tuple(arguments.shape)
    if any(n < 16 or n % 16 or n > 512 for n in shape):
        raise UsageError(
            f"--shape is {shape}, expected multiples of 16 up to 512", "use --shape 160 192 160"
        )
    scans = find_scans(arguments.scans)
    _check_apart(scans, arguments.out)
    template = with_background(image_of(read_volume(arguments.template)))
    grid, lost = working_grid(template, shape)
    if lost > NO_OVERLAP:
        raise _too_small(template, shape, lost)
    warn_cut_off(lost, template.name, grid)
    with locked_run(arguments.out):
        _check_folder(arguments.out, arguments.overwrite)
        jobs = [
            _Job(
                scan,
                arguments.template,
                grid,
                arguments.out,
                arguments.affine,
                arguments.overwrite,
            )
            for scan in scans
        ]
        done, failed = _run_all(jobs, arguments.workers, report)
        result = {
            "template": str(arguments.template),
            "shape": list(grid.shape),
            "spacing_mm": 1.0,
            "grid_affine": grid.affine.tolist(),
            "normalisation": NORMALISATION,
            "affine_mode": arguments.affine,
            "affine_direction": "template RAS mm -> scan RAS mm",
            "scans": done,
            "failed": failed,
        }
        manifest = arguments.out / MANIFEST
        _write_json(manifest, result)
        report(f"{len(done)} of {len(scans)} scans prepared in {arguments.out}, see {manifest}")
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(scans)} scans failed: {', '.join(failed)}",
            f"the reasons are above and in {manifest}; the others are prepared"
            if done
            else f"the reasons are above and in {manifest}",
        )
    return result


def find_scans(source: Path) -> list[Scan]:
    """The scans of a folder or of a text or CSV list, sorted by name.

    Raises:
        UsageError: nothing there, or two scans of one name.
    """
    if source.is_dir():
        scans = _scans_of_folder(source)
    elif source.is_file() and not source.name.lower().endswith(SUFFIXES):
        scans = _scans_of_list(source)
    elif source.is_file():
        scans = [Scan(_name(source), source, _labels_beside(source))]
    else:
        raise UsageError(f"{source} does not exist", "give a folder of scans or a list of them")
    if not scans:
        raise UsageError(f"{source} names no .nii or .nii.gz scan", "check the path")
    names = [scan.name for scan in scans]
    for name in names:
        if not SCAN_NAME.fullmatch(name):
            raise UsageError(
                f"{source} has a scan named {name[:210]!r}, which cannot name its files",
                "give a CSV list with the columns id,image,labels; an id has up to 200 characters, "
                "no / and no . at its beginning",
            )
        if name.endswith(LABELS_END):
            raise UsageError(
                f"{source} has a scan named {name}, as a label map is called",
                "give a CSV list with the columns id,image,labels and another id",
            )
    # Without regard to case: some file systems have none.
    folded = [name.casefold() for name in names]
    twice = sorted(name for name in names if folded.count(name.casefold()) > 1)
    if twice:
        raise UsageError(
            f"{source} has more than one scan named {', '.join(dict.fromkeys(twice))}",
            "give a CSV list with the columns id,image,labels",
        )
    return sorted(scans, key=lambda scan: scan.name)


def _stem(path: Path) -> str:
    name = path.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def _name(path: Path) -> str:
    """``1000_t1.nii.gz`` and ``1000_T1w_brain.nii`` are both scan 1000."""
    name = _stem(path)
    while MODALITY.search(name):
        name = MODALITY.sub("", name)
    return name


def _is_labels(path: Path) -> bool:
    return LABEL_WORDS.search(_stem(path)) is not None


def _scans_of_folder(folder: Path) -> list[Scan]:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    )
    return [Scan(_name(path), path, _labels_beside(path)) for path in files if not _is_labels(path)]


def _labels_beside(image: Path) -> Path | None:
    """The label map of the same scan, masks aside."""
    found = [
        path
        for path in sorted(image.parent.glob(f"{_name(image)}[_-]*"))
        if path.name.lower().endswith(SUFFIXES) and _is_labels(path)
        and "mask" not in path.name.lower()
        and _name(Path(LABEL_WORDS.sub("", _stem(path)))) == _name(image)
    ]  # fmt: skip
    return found[0] if found else None


def _scans_of_list(source: Path) -> list[Scan]:
    try:
        rows = list(csv_rows(decode_text(source.read_bytes())))
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}", "check the file") from None
    except ValueError as error:
        raise UsageError(
            f"{source} is no readable list: {error}", "give UTF-8 text or CSV with commas"
        ) from None
    rows = [(line, cells) for line, cells in rows if not cells[0].startswith("#")]
    columns = {"image": 0, "labels": 1}
    if rows and set(COLUMNS) & set(rows[0][1]):
        columns = _columns(source, rows.pop(0)[1])
    elif rows and len(rows[0][1]) == 1 and (sign := separator(rows[0][1][0])):
        raise UsageError(
            f"{source}, line {rows[0][0]}: its columns are separated by {sign}, expected commas",
            "save it as CSV with commas",
        )
    scans = []
    for line, row in rows:
        if len(row) > max(columns.values()) + 1 and any(row[max(columns.values()) + 1 :]):
            raise UsageError(
                f"{source}, line {line}: has {len(row)} columns, expected "
                f"{max(columns.values()) + 1} at most",
                "quote paths with a comma in them",
            )
        cells = {key: row[i] for key, i in columns.items() if i < len(row) and row[i]}
        if "image" not in cells:
            raise UsageError(
                f"{source}, line {line}: has a row without an image: {row}", "fill or remove it"
            )
        image = source.parent / cells["image"]
        labels = source.parent / cells["labels"] if "labels" in cells else _labels_beside(image)
        scans.append(Scan(cells.get("id", _name(image)), image, labels))
    return scans


def _columns(source: Path, header: list[str]) -> dict[str, int]:
    """The places of a list's columns by name; those of others are left to them."""
    if "image" not in header:
        raise UsageError(
            f"{source}: has no column image, found {', '.join(header)}",
            "give the columns id,image,labels",
        )
    if repeated := [name for name in COLUMNS if header.count(name) > 1]:
        raise UsageError(f"{source}: has the column {repeated[0]} twice", "remove one")
    for name in header:
        # A slip of the pen would leave labels behind in silence.
        if name not in COLUMNS and (
            meant := difflib.get_close_matches(name.lower(), COLUMNS, 1, 0.8)
        ):
            raise UsageError(
                f"{source}: the column {name!r} is unknown", f"write it {meant[0]}, or rename it"
            )
    # Every column's place counts, also of those that are not read.
    return {name: place for place, name in enumerate(header)}


def _too_small(template: Image, shape: tuple[int, ...], lost: float) -> UsageError:
    """That ``shape`` is too small for the template, with one that holds it."""
    fits = _fitting(template)
    return UsageError(
        f"--shape {' '.join(map(str, shape))} is too small for the brain of {template.name}: "
        f"{100 * lost:.3g} % of it lies outside",
        f"give --shape {' '.join(map(str, fits))}, which holds it"
        if fits
        else "check the unit of its header, mm, and how it was masked",
    )


def _fitting(template: Image) -> tuple[int, int, int] | None:
    """The smallest shape in steps of 16 that holds a template's brain; None beyond 512."""
    points = template.affine[:3, :3] @ (template.voxels[0, 0] > 0).nonzero().t().numpy()
    # Specks far from the head do not count.
    low, high = np.quantile(points, [CUT_OFF / 10, 1 - CUT_OFF / 10], axis=1)
    sizes = (np.ceil((high - low + 1) / 16) * 16).astype(int)
    while sizes.max() <= 512:
        right, front, up = sizes.tolist()
        if working_grid(template, (right, front, up))[1] <= CUT_OFF:
            return right, front, up
        sizes += 16
    return None


def _check_apart(scans: list[Scan], folder: Path) -> None:
    """Refuse to write among the scans, where what is prepared would be taken for scans.

    Raises:
        UsageError: a scan or its label map lies in ``folder``.
    """
    there = folder.resolve()
    for scan in scans:
        for path in (scan.image, scan.labels):
            if path is not None and path.parent.resolve() == there:
                raise UsageError(
                    f"{folder} is the folder of {path.name}, expected one without the scans",
                    "give another folder to -o",
                )


def _check_folder(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder / MANIFEST) and not overwrite:
        raise OutputError(
            f"{folder} holds prepared scans already", "give --overwrite to replace them"
        )


def _run_all(
    jobs: list[_Job], workers: int, report: "Report"
) -> tuple[dict[str, Any], dict[str, str]]:
    done: dict[str, Any] = {}
    failed: dict[str, str] = {}
    # spawn: a forked child of a process whose ITK threads have run may hang
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    futures: list[Future[dict[str, Any]] | None] = [
        pool.submit(prepare_scan, job) if pool else None for job in jobs
    ]
    try:
        bar = tqdm(total=len(jobs), desc="prepare", unit="scan", disable=None, file=sys.stderr)
        with bar:
            for job, future in zip(jobs, futures, strict=True):
                try:
                    done[job.scan.name] = future.result() if future else prepare_scan(job)
                    for message in done[job.scan.name]["warnings"]:
                        logger.warning("%s", message)
                except UlaeError as error:
                    reason = f"{error} ({error.hint})" if error.hint else str(error)
                    failed[job.scan.name] = reason
                    logger.warning("%s left out: %s", job.scan.name, reason)
                bar.update()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    for name, entry in done.items():
        report(f"{name}: {entry['cut_off_percent']:.2g} % of the brain cut off")
    return done, failed


def prepare_scan(job: _Job) -> dict[str, Any]:
    """Align, resample once, normalise and write one scan; returns its entry of the manifest."""
    threads_of_its_own()
    with libraries_redirected(), collecting(), collected() as warnings, about(str(job.scan.image)):
        entry = _prepare_scan(job)
    return {**entry, "warnings": warnings}


def _prepare_scan(job: _Job) -> dict[str, Any]:
    scan, grid = job.scan, job.grid
    paths = {
        "image": job.folder / f"{scan.name}.nii.gz",
        "affine": job.folder / f"{scan.name}_affine.txt",
    }
    if scan.labels:
        paths["labels"] = job.folder / f"{scan.name}_labels.nii.gz"
    inputs = [scan.image, job.template, *([scan.labels] if scan.labels else [])]
    suffixes = {paths["affine"]: (".txt",)}
    with Outputs(paths.values(), overwrite=job.overwrite, inputs=inputs, suffixes=suffixes) as out:
        target = read_volume(job.template)
        template = with_background(image_of(target))
        volume = read_volume(scan.image)
        moving = with_background(image_of(volume))
        labels = read_volume(scan.labels, kind="labels") if scan.labels else None
        if labels is not None:
            check_labels(labels, replace(volume, data=as_array(moving.voxels)))
        matrix = register_affine(moving, template, job.affine)
        lost = cut_off(moving, grid, np.asarray(np.linalg.inv(matrix)))
        warn_cut_off(lost, moving.name, grid)
        on_grid = Volume(np.zeros(0), grid.affine, target.header, target.name)
        data = network_input(moving, grid, matrix, NORMALISATION)
        expected = network_input(template, grid, None, NORMALISATION)
        brain = expected > 0
        alike = correlation(expected[brain], data[brain])
        reasons = (
            affine_reason(matrix, moving.name, template.name),
            unlike_reason(alike, None, moving.name, template.name),
        )
        tell([reason for reason in reasons if reason])
        save_image(
            image_on_grid(data[0, 0].numpy(), on_grid, grid.affine), out.temporary(paths["image"])
        )
        if labels is not None:
            carried = _unsigned(
                resample(labels_of(labels), grid, matrix, "nearest")[0, 0].numpy(), labels.name
            )
            refuse_empty(carried, labels.name)
            image = image_on_grid(carried, on_grid, grid.affine)
            save_image(image, out.temporary(paths["labels"]))
        try:
            np.savetxt(
                out.temporary(paths["affine"]),
                matrix,
                fmt="%.9f",
                header="template world RAS mm -> scan world RAS mm (pull-back), 4x4",
            )
        except OSError as error:
            raise output_error(paths["affine"], error) from None
        out.commit()
    return {
        "source": str(scan.image),
        "source_labels": str(scan.labels) if scan.labels else None,
        "image": paths["image"].name,
        "labels": paths["labels"].name if scan.labels else None,
        "affine": matrix.tolist(),
        "cut_off_percent": round(100 * lost, 4),
        "similarity": round(alike, 4),
    }


def _unsigned(labels: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
        raise ImageError(
            f"{name} has labels from {labels.min()} to {labels.max()}, expected 0 to 65535",
            "renumber them",
        )
    return labels.astype(np.uint16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with Outputs([path], overwrite=True, suffixes={path: (".json",)}) as outputs:
        try:
            outputs.temporary(path).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise output_error(path, error) from None
        outputs.commit()


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("prepare"))
