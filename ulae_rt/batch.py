"""Register every pair of a list: read, prepared, registered and written at the same time."""

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ulae_rt import __version__
from ulae_rt.allocator import keep_freed_memory
from ulae_rt.baselines.options import BASELINES, BaselineOptions
from ulae_rt.batching.cluster import LOCAL, Cluster
from ulae_rt.batching.pairs import Pair, Shard, outside, read_pairs
from ulae_rt.batching.pipeline import (
    OUTPUTS,
    USUAL,
    Pipeline,
    Usage,
    Wanted,
    grouped,
    processors,
)
from ulae_rt.batching.results import ResultsFolder, Row, read_results
from ulae_rt.batching.summary import summary_of
from ulae_rt.env import let_torch_threads_sleep
from ulae_rt.errors import BatchError, DiskFull, EngineMismatch, UsageError
from ulae_rt.imaging.warpfile import WARP_FORMATS
from ulae_rt.options import NetworkOptions

if TYPE_CHECKING:
    from ulae_rt.cli import Report
    from ulae_rt.registration.registrar import Method

NETWORK = "network"
# Pairs that the page has pictures of.
WORST = 12
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
    parser.add_argument("--warp-format", choices=WARP_FORMATS, help="see register -h (itk)")
    parser.add_argument(
        "--pictures", type=_count, default=WORST, metavar="N",
        help="pairs shown on the page, the worst first (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=(NETWORK, *BASELINES), default=NETWORK,
        help="what registers; the others are for comparison, from the same affine (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ray", nargs="?", const=LOCAL, metavar="ADDRESS",
        help="on the machines of a Ray cluster, which share the disk: its address, auto, or "
        "nothing for a Ray of this machine alone; --workers is then cores of each worker",
    )  # fmt: skip
    NetworkOptions.add_to(parser)


def _count(text: str) -> int:
    return _whole(text, 0)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from {least}")
    return int(text)


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Register what is missing, pass over what cannot be, and say how it went."""
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    options = _options(arguments)
    outputs = tuple(dict.fromkeys(arguments.outputs))
    if arguments.warp_format and not {"warp", "inverse_warp"} & set(outputs):
        raise UsageError(
            f"--warp-format {arguments.warp_format} is given, and no warp is written",
            "add warp or inverse_warp to --outputs, or leave --warp-format out",
        )
    wanted = Wanted(outputs, arguments.warp_format or "itk")
    pairs = read_pairs(arguments.pairs)
    _check_written(pairs, outputs)
    if shard is not None:
        pairs = shard.of(pairs)
    _show_outside(pairs, arguments.pairs.parent, report)
    keep_freed_memory()
    let_torch_threads_sleep()
    with _runner(options, arguments) as runner:
        return _batch(arguments, report, runner, pairs, wanted, shard)


def _batch(
    arguments: argparse.Namespace,
    report: "Report",
    runner: "_Here | Cluster",
    pairs: list[Pair],
    wanted: Wanted,
    shard: Shard | None,
) -> dict[str, Any]:
    settings = {
        **runner.settings,
        "outputs": list(wanted.outputs),
        "warp_format": wanted.warp_format,
    }
    with ResultsFolder(arguments.out, shard, settings) as folder:
        done = folder.begin(pairs, resume=arguments.resume)
        finished = {row.id for row in done}
        missing = grouped([pair for pair in pairs if pair.id not in finished])
        report(f"method      {runner.description}")
        report(f"pairs       {len(pairs)}, {len(done)} of them done already")
        started = time.monotonic()
        with _stopping() as stop:
            try:
                _register(runner.run(missing, folder, wanted, stop), folder, len(missing))
            except (DiskFull, EngineMismatch) as error:  # the end of every further pair
                raise type(error)(str(error), f"{error.hint}; then go on with --resume") from error
        rows = read_results(folder.results)
        summary = {
            "version": __version__,
            "method": runner.description,
            "settings": settings,
            "list": str(arguments.pairs),
            "missing": len(pairs) - len(rows),
            **summary_of(rows),
            "this_run": {
                "pairs": len(rows) - len(done),
                "seconds": time.monotonic() - started,
                **runner.usage(),
            },
        }
        folder.write_summary(summary)
        from ulae_rt.batching.page import write_page  # draws

        write_page(folder, rows, summary, arguments.pictures)
        if summary["lncc_refined"]:
            before, after = (summary[f"lncc_{of}"]["mean"] for of in ("network", "refined"))
            report(
                f"refined     local correlation {before:.4f} to {after:.4f} in the mean, "
                f"{summary['seconds']['refine']:.1f} s a pair"
            )
        for line in _warned(rows):
            report(line)
        report(f"results     {folder.results}")
        report(f"summary     {folder.summary}")
        report(f"page        {folder.page}")
        return _judged(summary, folder)


def _register(rows: Iterator[Row], folder: ResultsFolder, count: int) -> None:
    """Write a line for every pair as it is done."""
    failed = 0
    with tqdm(total=count, unit="pair", disable=None, file=sys.stderr) as bar:
        for row in rows:
            folder.add(row)
            if row.status == "failed":
                failed += 1
                bar.set_postfix(failed=failed)
                tqdm.write(f"failed: {row.id}: {row.error}", file=sys.stderr)
            bar.update()


def _options(arguments: argparse.Namespace) -> NetworkOptions | BaselineOptions:
    """What registers.

    Raises:
        UsageError: flags that contradict each other.
    """
    options = NetworkOptions.of(arguments)
    if arguments.method == NETWORK:
        if arguments.ray is not None and ":" in options.device:
            raise UsageError(
                f"--device {options.device} with --ray: which GPU a worker has, Ray decides",
                "give --device cuda",
            )
        if arguments.ray is not None and options.source is not None:
            return replace(options, source=options.source.absolute())  # workers are elsewhere
        return options
    if options != NetworkOptions(affine=options.affine):
        raise UsageError(
            f"--method {arguments.method} runs no network",
            "leave out --weights, --engine, --backend, --device, --precision and --refine",
        )
    if arguments.batch_size is not None:
        raise UsageError(
            f"--method {arguments.method} registers one pair after the other",
            "leave out --batch-size",
        )
    return BaselineOptions(arguments.method, options.affine)


def _runner(
    options: NetworkOptions | BaselineOptions, arguments: argparse.Namespace
) -> contextlib.AbstractContextManager["_Here | Cluster"]:
    workers, batch_size = arguments.workers, arguments.batch_size
    if arguments.ray is not None:
        return Cluster(arguments.ray, options, workers=workers, batch_size=batch_size)
    return contextlib.nullcontext(_Here(options.open(), workers, batch_size))


class _Here:
    """This process, with the methods that a `Cluster` has."""

    def __init__(self, method: "Method", workers: int | None, batch_size: int | None) -> None:
        self.description = method.description
        self.settings = method.settings
        self._method = method
        self._workers = workers or processors()
        self._batch_size = batch_size or method.at_once
        self._used = Usage()
        self._cpu_seconds = time.process_time()

    def run(
        self, pairs: Sequence[Pair], folder: ResultsFolder, wanted: Wanted, stop: threading.Event
    ) -> Iterator[Row]:
        pipeline = Pipeline(
            self._method, folder, wanted, workers=self._workers, batch_size=self._batch_size
        )
        self._used = pipeline.usage
        return pipeline.run(pairs, stop)

    def usage(self) -> dict[str, float]:
        from ulae_rt.imaging.transfers import moved  # loaded with the method

        return {
            "network_busy_seconds": self._used.busy,
            "network_idle_seconds": self._used.idle,
            "cpu_seconds": time.process_time() - self._cpu_seconds,
            "bytes_to_device": moved().to_device,
            "bytes_to_host": moved().to_host,
        }


def _warned(rows: Sequence[Row]) -> Iterator[str]:
    """The pairs that have warnings, the first few with their words."""
    warned = [row for row in rows if row.warnings]
    if not warned:
        return
    yield f"warnings    {len(warned)} of {len(rows)} pairs; the page and the results have them all"
    for row in warned[:SHOWN]:
        more = f" (and {len(row.warnings) - 1} more)" if len(row.warnings) > 1 else ""
        yield f"            {row.id}: {row.warnings[0]}{more}"


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


def _check_written(pairs: Sequence[Pair], outputs: tuple[str, ...]) -> None:
    """Whether something is written for each pair: moved labels are only where there are labels.

    Raises:
        UsageError: nothing is, for one at least.
    """
    bare = [pair.id for pair in pairs if pair.moving_labels is None]
    if outputs == ("moved_labels",) and bare:
        names = ", ".join(bare[:SHOWN]) + (", ..." if len(bare) > SHOWN else "")
        raise UsageError(
            f"--outputs moved_labels writes nothing for {len(bare)} of {len(pairs)} pairs, which "
            f"have no moving_labels: {names}",
            "fill the column moving_labels of the list, or add moved or warp to --outputs",
        )


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
