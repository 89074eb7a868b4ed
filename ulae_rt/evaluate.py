"""Measure registrations against label maps and landmarks, beside doing nothing."""

import argparse
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ulae_rt import __version__
from ulae_rt.batching.pairs import Pair, read_pairs
from ulae_rt.batching.pipeline import processors, threads_of_its_own
from ulae_rt.batching.results import Row, read_results
from ulae_rt.errors import BatchError, EvaluationError, UsageError
from ulae_rt.evaluation.measures import (
    Case,
    Failure,
    Registration,
    check_measurable,
    evaluate_pair,
)
from ulae_rt.evaluation.protocol import PROTOCOLS, Protocol, read_protocol
from ulae_rt.evaluation.tables import (
    cases_csv,
    compared,
    labels_csv,
    learn2reg_json,
    markdown,
    summarised,
    without_nan,
)
from ulae_rt.imaging.nifti import Outputs, output_error
from ulae_rt.optional import require

if TYPE_CHECKING:
    from ulae_rt.cli import Report

logger = logging.getLogger(__name__)

# The two that stand beside every method: images as they lie in the world, and the matrix alone.
ZERO, AFFINE = "zero-displacement", "affine-only"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,99}")
# Of the pairs left out, so many are named.
SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt evaluate``."""
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS",
        help="folder that 'batch' wrote, one a method: DIR, or NAME=DIR to call it NAME; or a "
        "list of pairs (.csv, .json), to measure how its images lie as they are",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR",
        help="written: table.md, cases.csv, labels.csv, evaluation-METHOD.json (as Learn2Reg's)",
    )  # fmt: skip
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--protocol", metavar="NAME|FILE",
        help=f"labels and areas: {', '.join(PROTOCOLS)}, or a .toml file like theirs",
    )  # fmt: skip
    labels.add_argument(
        "--labels", metavar="all|N[,N...]", default="all",
        help="labels that count (%(default)s: that both maps have)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N", help="pairs at once (one for each processor)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR")


@dataclass(frozen=True, eq=False)
class _Method:
    """One RESULTS: a name and its rows by id."""

    name: str
    folder: Path
    rows: Mapping[str, Row]


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Measure every pair by every method, write the tables and print them."""
    require("scipy", "evaluate")
    workers = processors() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise UsageError(
            f"--workers is {workers}, expected at least 1",
            "leave --workers out for one for each processor",
        )
    protocol = _protocol(arguments)
    pairs, methods = _opened(arguments.results)
    check_measurable(pairs)
    jobs = [(pair, _registrations(pair, methods)) for pair in pairs]
    names = list(dict.fromkeys(each.method for _, registered in jobs for each in registered))
    with _outputs(arguments.out, names, arguments.overwrite) as outputs:
        report(f"protocol    {protocol.title}")
        report(f"pairs       {len(pairs)}")
        unregistered = _unregistered(methods)
        for name, ids in unregistered.items():
            report(f"left out    {name}: {len(ids)} pairs were not registered: {_some(ids)}")
        found = _evaluated(jobs, protocol, workers)
        failures = [each for each in found if isinstance(each, Failure)]
        cases = sorted(
            (each for each in found if isinstance(each, Case)),
            key=lambda case: names.index(case.method),
        )
        if not cases:
            raise EvaluationError(f"{failures[0].id}: {failures[0].error}", failures[0].hint)
        if arguments.protocol is None and protocol.labels is not None:
            _check_labels(protocol.labels, cases, whole=not failures)
        summary, comparisons = summarised(cases, protocol), compared(cases)
        texts = _texts(cases, protocol, markdown(summary, comparisons, protocol))
        for name, text in texts.items():
            _write(outputs, arguments.out / name, text)
        written = outputs.commit()
    report()
    report(texts["table.md"])
    for path in written:
        report(f"written     {path}")
    result: dict[str, Any] = without_nan(
        {
            "version": __version__,
            "protocol": protocol.title,
            "pairs": len(pairs),
            "not_registered": unregistered,
            "failures": [asdict(failure) for failure in failures],
            "methods": {
                name: {measure: asdict(spread) for measure, spread in spreads.items()}
                for name, spreads in summary.items()
            },
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "written": [str(path) for path in written],
        }
    )
    if failures:
        first = failures[0]
        raise BatchError(
            f"{len(failures)} of {len(found)} registrations could not be measured and are not in "
            f"the tables; the first, {first.id} by {first.method}: {first.error}",
            first.hint,
            result,
        )
    return result


def _protocol(arguments: argparse.Namespace) -> Protocol:
    if arguments.protocol is not None:
        return read_protocol(arguments.protocol)
    if arguments.labels == "all":
        return Protocol.of_labels()
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", arguments.labels):
        raise UsageError(
            f"--labels is {arguments.labels!r}, expected all, or whole numbers from 1 with commas",
            "give for example --labels 2,4,17, or leave it out",
        )
    return Protocol.of_labels([int(label) for label in arguments.labels.split(",")])


def _check_labels(labels: Sequence[int], cases: Sequence[Case], *, whole: bool) -> None:
    """Warn of labels asked for that were measured nowhere.

    Args:
        labels: asked for.
        cases: what was measured.
        whole: nothing failed, so that they are all there is.

    Raises:
        EvaluationError: no label was measured, and all maps were read.
    """
    there = {label for case in cases for label, dice in case.dice.items() if not math.isnan(dice)}
    absent = [str(label) for label in labels if label not in there]
    if whole and len(absent) == len(labels):
        raise EvaluationError(
            f"--labels is {','.join(absent)}, and no pair has any of them in both label maps",
            "give labels that the maps have, or leave --labels out",
        )
    if absent:
        logger.warning(
            "label %s: no pair that was measured has it in both of its label maps",
            ", ".join(absent),
        )


def _opened(sources: Sequence[str]) -> tuple[list[Pair], list[_Method]]:
    """The pairs to measure, and the methods that registered them."""
    lists = [source for source in sources if Path(source).suffix.lower() in (".csv", ".json")]
    if lists:
        if len(sources) > 1:
            raise UsageError(
                f"{lists[0]} is a list of pairs, expected nothing beside it",
                "give it alone, or folders that 'ulae-rt batch' wrote",
            )
        return read_pairs(Path(lists[0])), []
    methods: list[_Method] = []
    pairs: dict[str, Pair] = {}
    for source in sources:
        name, path = _named(source)
        if name in (ZERO, AFFINE, *(method.name for method in methods)):
            raise UsageError(f"two methods are called {name}", f"write NAME={path}")
        rows = {row.id: row for row in read_results(path)}
        for id_, row in rows.items():
            if (pair := pairs.setdefault(id_, row.pair)) != row.pair:
                other = [
                    key for key, file in pair.paths().items() if row.pair.paths().get(key) != file
                ]
                raise EvaluationError(
                    f"{path}: the pair {id_} has another {(other or ['file'])[0]} than in the "
                    "results named before",
                    "compare methods on results of one list of pairs",
                )
        methods.append(_Method(name, path if path.is_dir() else path.parent, rows))
    there = [pair for pair in pairs.values() if any(_done(pair, method) for method in methods)]
    if not there:
        raise EvaluationError(
            "no pair is registered",
            "results.jsonl says why; mend the pairs and run 'ulae-rt batch' with --resume",
        )
    return there, methods


def _named(source: str) -> tuple[str, Path]:
    """NAME=DIR, or DIR, which is its own name."""
    path = Path(source)
    name, equals, rest = source.partition("=")
    if equals and not path.exists():
        path = Path(rest)
    else:
        name = (path if path.is_dir() else path.parent).resolve().name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a method",
            f"write NAME={path}, with letters, digits and _ . - + @ in NAME",
        )
    return name, path


def _registrations(pair: Pair, methods: Sequence[_Method]) -> list[Registration]:
    """Doing nothing, the first affine there is, and what each method found."""
    rows = {method: row for method in methods if (row := _done(pair, method))}
    found = [Registration(ZERO, affine=np.eye(4))]
    affines = [row.affine for row in rows.values() if row.affine is not None]
    if affines:
        found.append(Registration(AFFINE, affine=np.array(affines[0])))
    for method, row in rows.items():
        warp, inverse = (
            method.folder / row.outputs[kind] if kind in row.outputs else None
            for kind in ("warp", "inverse_warp")
        )
        seconds = sum(row.seconds.values()) if row.seconds else math.nan
        found.append(Registration(method.name, warp=warp, inverse_warp=inverse, seconds=seconds))
    return found


def _done(pair: Pair, method: _Method) -> Row | None:
    """The row of a pair that the method registered."""
    row = method.rows.get(pair.id)
    return row if row is not None and row.status == "done" else None


def _unregistered(methods: Sequence[_Method]) -> dict[str, list[str]]:
    """Ids that a method has no registration of, though it or another was asked for one."""
    ids = dict.fromkeys(id_ for method in methods for id_ in method.rows)
    missing = {
        method.name: [
            id_ for id_ in ids if id_ not in method.rows or method.rows[id_].status != "done"
        ]
        for method in methods
    }
    return {name: each for name, each in missing.items() if each}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def _outputs(folder: Path, methods: Sequence[str], overwrite: bool) -> Outputs:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    names = ["table.md", "cases.csv", "labels.csv", *(f"evaluation-{m}.json" for m in methods)]
    paths = [folder / name for name in names]
    return Outputs(paths, overwrite=overwrite, suffixes={path: (path.suffix,) for path in paths})


def _texts(cases: Sequence[Case], protocol: Protocol, table: str) -> dict[str, str]:
    """The report's files by name."""
    by_method: dict[str, list[Case]] = {}
    for case in cases:
        by_method.setdefault(case.method, []).append(case)
    return {
        "table.md": table,
        "cases.csv": cases_csv(cases, protocol),
        "labels.csv": labels_csv(cases, protocol),
        **{
            f"evaluation-{name}.json": learn2reg_json(each, protocol.title)
            for name, each in by_method.items()
        },
    }


def _write(outputs: Outputs, path: Path, text: str) -> None:
    try:
        outputs.temporary(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise output_error(path, error) from None


def _evaluated(
    jobs: Sequence[tuple[Pair, list[Registration]]], protocol: Protocol, workers: int
) -> list[Case | Failure]:
    found: list[Case | Failure] = []
    with (
        ThreadPoolExecutor(workers, initializer=threads_of_its_own) as pool,
        tqdm(total=len(jobs), unit="pair", disable=None, file=sys.stderr) as bar,
    ):
        for results in pool.map(lambda job: evaluate_pair(job[0], job[1], protocol), jobs):
            found += results
            bar.update()
    return found


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("evaluate"))
