"""Write the list of every ordered pair of the scans in a folder."""

import argparse
import csv
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulae_rt.batching.pairs import read_pairs
from ulae_rt.errors import PairsError, UsageError
from ulae_rt.evaluation.protocol import PROTOCOLS, read_protocol
from ulae_rt.imaging.nifti import Outputs, output_error

if TYPE_CHECKING:
    from ulae_rt.cli import Report

ID = "{id}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``ulae-rt pairs``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the scans are")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="CSV", help="the list (written)"
    )
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument(
        "--protocol", metavar="NAME|FILE",
        help=f"files as this data set names them: {', '.join(PROTOCOLS)}, or a .toml file",
    )  # fmt: skip
    names.add_argument(
        "--scans", metavar="PATTERN", help=f"e.g. '{ID}_t1.nii.gz' or '{ID}/brain.nii.gz'"
    )
    parser.add_argument(
        "--label-maps", metavar="PATTERN", help=f"with --scans, e.g. '{ID}_labels.nii.gz'"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace CSV")


def run(arguments: argparse.Namespace, report: "Report") -> dict[str, Any]:
    """Find the scans, pair each with each other, write the list."""
    scans, label_maps = arguments.scans, arguments.label_maps
    if arguments.protocol is not None:
        if label_maps is not None:
            raise UsageError("--protocol names the label maps already", "give --scans instead")
        protocol = read_protocol(arguments.protocol)
        scans, label_maps = protocol.scans, protocol.label_maps or None
    patterns = {"": scans} | ({"_labels": label_maps} if label_maps is not None else {})
    with Outputs(
        [arguments.out], overwrite=arguments.overwrite, suffixes={arguments.out: (".csv",)}
    ) as outputs:
        people = _people(arguments.folder, patterns)
        pairs = list(itertools.permutations(people, 2))
        text = _list(arguments.out.resolve().parent, people, pairs)
        hidden = outputs.temporary(arguments.out)
        try:
            hidden.write_text(text, encoding="utf-8")
            read_pairs(hidden)
        except PairsError as error:  # a person's name that names no folder
            message = str(error).replace(str(hidden), str(arguments.out))
            raise PairsError(message, error.hint) from None
        except OSError as error:
            raise output_error(arguments.out, error) from None
        outputs.commit()
    report(f"people      {len(people)}")
    report(f"pairs       {len(pairs)}")
    report(f"list        {arguments.out}")
    return {"people": list(people), "pairs": len(pairs), "list": str(arguments.out)}


_People = Mapping[str, Mapping[str, Path]]


def _people(folder: Path, patterns: Mapping[str, str]) -> _People:
    """Each person's files by the ending of their columns, people in order."""
    for pattern in patterns.values():
        if ID not in pattern:
            raise UsageError(
                f"the pattern {pattern!r} has no {ID}", f"write {ID} where the person's name is"
            )
    scans = patterns[""]
    name = re.compile(
        re.escape(scans)
        .replace(re.escape(ID), "(?P<id>[^/]+)", 1)
        .replace(re.escape(ID), "(?P=id)")
    )
    found = (
        name.fullmatch(path.relative_to(folder).as_posix())
        for path in sorted(folder.glob(scans.replace(ID, "*")))
    )
    people = {
        match["id"]: {
            end: (folder / pattern.replace(ID, match["id"])).resolve()
            for end, pattern in patterns.items()
        }
        for match in found
        if match
    }
    if len(people) < 2:
        raise PairsError(
            f"{folder} has {len(people)} scans called {scans}, expected two or more",
            "check the folder, or give --scans with another pattern",
        )
    missing = [path for files in people.values() for path in files.values() if not path.is_file()]
    if missing:
        raise PairsError(f"{missing[0]} does not exist", "every scan needs its label map beside it")
    return people


def _list(folder: Path, people: _People, pairs: Sequence[tuple[str, str]]) -> str:
    """The CSV; paths below ``folder`` relative to it, so that both can be moved together."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    ends = list(next(iter(people.values())))
    roles = [(role, end) for end in ends for role in (0, 1)]
    writer.writerow(["id", *(f"{('moving', 'fixed')[role]}{end}" for role, end in roles)])
    for pair in pairs:
        files = [people[pair[role]][end] for role, end in roles]
        paths = [
            path.relative_to(folder) if path.is_relative_to(folder) else path for path in files
        ]
        writer.writerow(["-".join(pair), *paths])
    return text.getvalue()


if __name__ == "__main__":
    from ulae_rt.cli import run_command

    sys.exit(run_command("pairs"))
