"""Register every pair of a list: read, prepared, registered and written at the same time."""

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import SimpleITK as sitk
from tqdm import tqdm

from ulae_rt import __version__
from ulae_rt.allocator import keep_freed_memory
from ulae_rt.batching.pairs import Pair, Shard, outside, read_pairs
from ulae_rt.batching.pipeline import OUTPUTS, USUAL, Pipeline, Wanted, grouped, processors
from ulae_rt.batching.results import ResultsFolder, read_results
from ulae_rt.batching.summary import summary_of
from ulae_rt.errors import BatchError, DiskFull, EngineMismatch
from ulae_rt.imaging.warpfile import WARP_FORMATS
from ulae_rt.options import NetworkOptions

if TYPE_CHECKING:
    from ulae_rt.cli import Report

WAIT_S = 0.2
# Of the list's pairs, so many names are shown.
SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt batch``."""
    parser.add_argument(
        "pairs", type=Path, metavar="PAIRS",
        help="CSV or JSON list: id,moving,fixed[,moving_labels,fixed_labels], paths relative to it",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR",
        help="written: pairs/ID/ for every pair, results.jsonl, summary.json, summary.html",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on: only what is missing in DIR")
    parser.add_argument("--shard", metavar="I/N", help="part I (from 1) of N of the list")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="B",
        help="pairs given to the network at once (what it is best given)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_positive, metavar="N",
        help="threads that read, align and write (one for each processor)",
    )  # fmt: skip
    parser.add_argument(
        "--outputs", nargs="+", choices=OUTPUTS, metavar="KIND",
        default=list(USUAL),
        help=f"of every pair, of {', '.join(OUTPUTS)} (the first {len(USUAL)})",
    )  # fmt: skip
    parser.add_argument(
        "--warp-format", choices=WARP_FORMATS, default="itk", help="see register -h (%(default)s)"
    )
    NetworkOptions.add_to(parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Register what is missing, pass over what cannot be, and say how it went."""
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    options = NetworkOptions.of(arguments)
    wanted = Wanted(tuple(dict.fromkeys(arguments.outputs)), arguments.warp_format)
    pairs = read_pairs(arguments.pairs)
    if shard is not None:
        pairs = shard.of(pairs)
    _show_outside(pairs, arguments.pairs.parent, report)
    keep_freed_memory()
    # Every worker has a pair of its own: threads within one would only wait for each other.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    registrar = options.open()
    settings = {
        "weights_sha256": registrar.network.weights_sha256,
        "precision": registrar.network.precision,
        "spacing_mm": registrar.network.metadata.spacing_mm,
        "affine": options.affine,
        "outputs": list(wanted.outputs),
        "warp_format": wanted.warp_format,
    }
    with ResultsFolder(arguments.out, shard, settings) as folder:
        done = folder.begin(pairs, resume=arguments.resume)
        finished = {row.id for row in done}
        missing = grouped([pair for pair in pairs if pair.id not in finished])
        report(f"network     {registrar.network.description}")
        report(f"pairs       {len(pairs)}, {len(done)} of them done already")
        pipeline = Pipeline(
            registrar,
            folder,
            wanted,
            workers=arguments.workers or processors(),
            batch_size=arguments.batch_size or registrar.at_once,
        )
        started = time.monotonic()
        with _stopping() as stop:
            try:
                _register(pipeline, folder, missing, stop)
            except (DiskFull, EngineMismatch) as error:  # the end of every further pair
                raise type(error)(str(error), f"{error.hint}; then go on with --resume") from error
        rows = read_results(folder.results)
        summary = {
            "version": __version__,
            "network": registrar.network.description,
            "settings": settings,
            "list": str(arguments.pairs),
            "missing": len(pairs) - len(rows),
            **summary_of(rows),
            "this_run": {
                "pairs": len(rows) - len(done),
                "seconds": time.monotonic() - started,
                "network_busy_seconds": pipeline.usage.busy,
                "network_idle_seconds": pipeline.usage.idle,
            },
        }
        folder.write_summary(summary)
        report(f"results     {folder.results}")
        report(f"summary     {folder.summary}")
        return _judged(summary, folder)


def _register(
    pipeline: Pipeline[Any, Any], folder: ResultsFolder, pairs: list[Pair], stop: threading.Event
) -> None:
    """Write a line for every pair as it is done."""
    failed = 0
    with tqdm(total=len(pairs), unit="pair", disable=None, file=sys.stderr) as bar:
        for row in pipeline.run(pairs, stop):
            folder.add(row)
            if row.status == "failed":
                failed += 1
                bar.set_postfix(failed=failed)
                tqdm.write(f"failed: {row.id}: {row.error}", file=sys.stderr)
            bar.update()


def _judged(summary: dict[str, Any], folder: ResultsFolder) -> dict[str, Any]:
    """The summary; as an error where pairs failed or are missing."""
    if summary["missing"]:
        raise BatchError(
            f"stopped: {summary['missing']} of {summary['missing'] + summary['pairs']} pairs are "
            f"missing, {summary['failed']} failed",
            "go on with --resume",
            summary,
        )
    if summary["failed"]:
        names = ", ".join(each["id"] for each in summary["failures"][:SHOWN])
        raise BatchError(
            f"{summary['failed']} of {summary['pairs']} pairs failed: {names}"
            + (", ..." if summary["failed"] > SHOWN else ""),
            f"{folder.results} says why; mend them and give --resume",
            summary,
        )
    return summary


def _show_outside(pairs: list[Pair], folder: Path, report: "Report") -> None:
    if elsewhere := outside(pairs, folder):
        names = ", ".join(str(path) for path in elsewhere[:SHOWN])
        report(
            f"outside     {len(elsewhere)} files lie outside the list's folder: {names}"
            + (", ..." if len(elsewhere) > SHOWN else "")
        )


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the second is as ever."""
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        tqdm.write("stopping after the pairs in hand; once more stops at once", file=sys.stderr)

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("batch"))
