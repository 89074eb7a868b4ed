"""The folder that a batch fills: one folder a pair, one line a pair, and who may write there."""

import contextlib
import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from ulae_rt.batching.pairs import PATHS, Pair, Shard
from ulae_rt.errors import OutputError, PairsError
from ulae_rt.files import LOCK_FILE, lock_file
from ulae_rt.imaging.nifti import output_error
from ulae_rt.reports import VerdictName
from ulae_rt.strict_json import parse_json

PAIRS = "pairs"
PART = ".part"
SETTINGS = "run.json"
RESULT = "result.json"
Status = Literal["done", "failed"]


@dataclass(frozen=True)
class Row:
    """What became of one pair: one line of ``results.jsonl``.

    Attributes:
        id: of the pair.
        status: ``done``, or ``failed`` with an error.
        inputs: its files by the list's columns.
        outputs: what was written, by kind, relative to the folder.
        seconds: by stage.
        similarity_before, similarity_after: `ulae_rt.reports.SIMILARITY`, through the affine alone
            and in the end.
        folding_percent, folding_image_percent: see `ulae_rt.registration.Stats`.
        inverse_consistency_mm: mean of `ulae_rt.registration.Result.inverse_consistency`, where
            the inverse was wanted.
        affine: (4, 4), fixed RAS mm to moving RAS mm.
        lncc_network, lncc_refined: local correlation before and after the refinement, where there
            was one; see `ulae_rt.reports.Refinement`.
        warnings: what was worth saying about its files.
        error, hint: why it failed and what to do.
        traceback: where, if it was no fault of the files'.
        finished: UTC, ISO 8601.
        host: the machine.
        overlap: of the two brains through the affine, Dice.
        verdict: ``good``, ``doubtful`` or ``failed``; see `ulae_rt.registration.verdict`.
    """

    id: str
    status: Status
    inputs: dict[str, str]
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    similarity_before: float | None = None
    similarity_after: float | None = None
    folding_percent: float | None = None
    folding_image_percent: float | None = None
    inverse_consistency_mm: float | None = None
    affine: list[list[float]] | None = None
    lncc_network: float | None = None
    lncc_refined: float | None = None
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    hint: str = ""
    traceback: str = ""
    finished: str = ""
    host: str = ""
    overlap: float | None = None
    verdict: str | None = None

    def to_json(self) -> str:
        """One line; a number that is not finite, which JSON has not, becomes null."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: if it is something else.
        """
        values = parse_json(text)
        known = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or not {"id", "status", "inputs"} <= values.keys() <= known:
            raise ValueError("no row of results")
        for name, value in values.items():
            if not _FIELDS[name](value):
                raise ValueError(f"its {name} is {json.dumps(value)[:40]}")
        return cls(**values)

    @property
    def pair(self) -> Pair:
        """What was registered.

        Raises:
            PairsError: the row does not say it.
        """
        if missing := {"moving", "fixed"} - self.inputs.keys():
            raise PairsError(
                f"the pair {self.id} has no {min(missing)} image in its row of results",
                "give results.jsonl as 'ulae-rt batch' wrote it",
            )
        return Pair.from_paths(self.id, self.inputs)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_inputs(value: Any) -> bool:
    return _is_texts(value) and value.keys() <= set(PATHS)


def _is_matrix(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    return value is None or (
        len(rows) == 4
        and all(
            isinstance(row, list) and len(row) == 4 and all(map(_is_number, row)) for row in rows
        )
    )


# What each field of a row may hold.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "id": lambda value: _is_text(value) and re.fullmatch(r"[^/\0]+", value) and value[0] != ".",
    "status": lambda value: value in get_args(Status),
    "inputs": _is_inputs,
    "outputs": _is_texts,
    "seconds": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "affine": _is_matrix,
    "verdict": lambda value: value is None or value in get_args(VerdictName),
    "warnings": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    **dict.fromkeys(
        (
            "similarity_before", "similarity_after", "overlap", "folding_percent",
            "folding_image_percent", "inverse_consistency_mm", "lncc_network", "lncc_refined",
        ),
        _is_number_or_none,
    ),
    **dict.fromkeys(("error", "hint", "traceback", "finished", "host"), _is_text),
}  # fmt: skip


class ResultsFolder:
    """The output folder of one run, open for writing; one at a time.

    Every pair is written to a hidden folder that is renamed once it is complete, with its row in
    it, and then gets its line: a run that is killed loses what it had in hand and nothing else.

    Use as a context manager, which holds the lock.

    Args:
        path: the folder; it is made.
        shard: the part of the list that is registered; None: all of it.
        settings: what its results depend on; a run that goes on must have the same.
    """

    def __init__(self, path: Path, shard: Shard | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._shard = shard
        self._settings = {**settings, "shards": shard.count if shard else 1}
        self._suffix = f"-{shard.index}-of-{shard.count}" if shard else ""
        self._locks: list[int] = []
        self._worker = ""

    def of_worker(self, name: str) -> "ResultsFolder":
        """The folder as one of several processes of this run writes pairs to it.

        Each has its own place for what is not complete, whatever another left there, and a working
        directory of its own.
        """
        mine = copy.copy(self)
        mine.path = self.path.absolute()
        mine._worker = name
        return mine

    def __enter__(self) -> Self:
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock("", shared=self._shard is not None)
                if self._shard is not None:
                    self._lock(self._suffix, shared=False)
                self._agree()
                (self.path / PAIRS).mkdir(exist_ok=True)
                shutil.rmtree(self._parts, ignore_errors=True)
                self._parts.mkdir()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._parts, ignore_errors=True)
        self._unlock()

    @property
    def results(self) -> Path:
        """The file with one line a pair."""
        return self.path / f"results{self._suffix}.jsonl"

    @property
    def summary(self) -> Path:
        """The file with the figures of the whole."""
        return self.path / f"summary{self._suffix}.json"

    @property
    def page(self) -> Path:
        """The page for people."""
        return self.path / f"summary{self._suffix}.html"

    @property
    def stop_file(self) -> Path:
        """Tells the processes of this run, once it is there, to begin no further pair."""
        return self._parts / ".stop"

    @property
    def _parts(self) -> Path:
        return self.path / f"{PART}{self._suffix}"

    @property
    def _part(self) -> Path:
        return self._parts / self._worker

    def begin(self, pairs: Iterable[Pair], *, resume: bool) -> list[Row]:
        """Which of ``pairs`` are done already.

        The file of results is written anew with their lines: a line that was cut off is dropped,
        as is that of a pair that failed and is tried again, and one that a killed run had not
        written any more is added.

        Raises:
            OutputError: if there are results and ``resume`` is not said.
            PairsError: if a pair is done from other files than the list names.
        """
        done = []
        for pair in pairs:
            row = self.finished(pair.id)
            if row is None:
                continue
            if not resume:
                raise OutputError(
                    f"{self.path} holds results already, of the pair {pair.id} among others",
                    "give --resume to do what is missing, or another folder",
                )
            if row.pair != pair:
                changed = [n for n in {**row.inputs, **pair.paths()} if _differs(row, pair, n)]
                raise PairsError(
                    f"the pair {pair.id} is done in {self.path} with another {changed[0]}: "
                    f"{row.inputs.get(changed[0], 'none')}",
                    "give it another id in the list, or take another folder",
                )
            done.append(row)
        if not resume and self.results.exists():
            raise OutputError(
                f"{self.path} holds results already",
                "give --resume to do what is missing, or another folder",
            )
        self._write(self.results, "".join(f"{row.to_json()}\n" for row in done))
        return done

    def part(self, pair: Pair) -> Path:
        """An empty folder to write a pair's files to."""
        with _disk_errors(self.path):
            folder = self._part / pair.id
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def attempts(self, pair: Pair) -> int:
        """How often the processes of this run have begun a pair."""
        try:
            return len(self._begun(pair).read_text().split())
        except FileNotFoundError:
            return 0

    def add_attempt(self, pair: Pair) -> None:
        """Count that this process begins a pair."""
        with _disk_errors(self.path), open(self._begun(pair), "a", encoding="utf-8") as file:
            file.write(f"{self._worker}\n")

    def _begun(self, pair: Pair) -> Path:
        return self._parts / f".begun-{pair.id}"

    def keep(self, row: Row) -> None:
        """Put a finished pair's folder in its place, complete with its row."""
        with _disk_errors(self.path):
            part, place = self._part / row.id, self.path / PAIRS / row.id
            (part / RESULT).write_text(row.to_json() + "\n")
            if place.exists():  # of a run that lost it half-way through being removed by hand
                shutil.rmtree(place)
            part.rename(place)

    def drop(self, pair: Pair) -> None:
        """Remove what was written of a pair that failed."""
        shutil.rmtree(self._part / pair.id, ignore_errors=True)

    def add(self, row: Row) -> None:
        """Write a pair's line, to the disk itself."""
        with _disk_errors(self.results), open(self.results, "a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the figures of the whole."""
        self._write(self.summary, json.dumps(summary, indent=2) + "\n")

    def finished(self, id_: str) -> Row | None:
        """The row of a pair whose folder is complete."""
        try:
            return Row.from_json((self.path / PAIRS / id_ / RESULT).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def _agree(self) -> None:
        """The folder is of a run with these settings, or becomes so."""
        path = self.path / SETTINGS
        mine = json.dumps(self._settings, indent=2) + "\n"
        hidden = self.path / f".{SETTINGS}.{os.getpid()}"
        hidden.write_text(mine)
        try:
            os.link(hidden, path)  # does not replace, whichever shard comes first
        except FileExistsError:
            pass
        finally:
            hidden.unlink()
        try:
            there = parse_json(path.read_bytes())
            names = [name for name in self._settings if there.get(name) != self._settings[name]]
        except (ValueError, AttributeError):
            raise PairsError(f"{path} is damaged", "remove the folder, or take another") from None
        if self._shard is None:  # alone in the folder, whatever it was parted into
            names = [name for name in names if name != "shards"]
        if names:
            raise PairsError(
                f"{self.path} was begun with {names[0]} {there.get(names[0])}, now it is "
                f"{self._settings[names[0]]}",
                "go on with what it was begun with, or take another folder",
            )

    def _write(self, path: Path, text: str) -> None:
        hidden = path.with_name(f".{path.name}.part")
        with _disk_errors(path):
            hidden.write_text(text, encoding="utf-8")
            os.replace(hidden, path)

    def _lock(self, suffix: str, *, shared: bool) -> None:
        """Held by the open file, so that it goes with the process however that ends."""
        self._locks.append(lock_file(self.path / f"{LOCK_FILE}{suffix}", shared=shared))

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Errors of the file system as the caller's."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise output_error(path, error) from error


def _differs(row: Row, pair: Pair, name: str) -> bool:
    path = pair.paths().get(name)
    return row.inputs.get(name) != (None if path is None else str(path))


_RESULTS = re.compile(r"results(-\d+-of-(\d+))?\.jsonl")


def read_results(path: Path) -> list[Row]:
    """The rows of a batch: of a folder, all its shards together, or of one file of results.

    A pair that is there more than once counts as it ended last; a last line that was cut off is
    left out.

    Raises:
        PairsError: nothing there, a line that is none of results, or the shards of two runs.
    """
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if _RESULTS.fullmatch(each.name))
        _check_one_run(path, files)
    else:
        files = [path] if path.exists() else []
    if not files:
        raise PairsError(
            f"{path} holds no results",
            "give the folder that 'ulae-rt batch' wrote, or results.jsonl",
        )
    rows: dict[str, Row] = {}
    for file in files:
        for row in _rows(file):
            if row.status == "done" or row.id not in rows:
                rows[row.id] = row
    return list(rows.values())


def _check_one_run(folder: Path, files: Sequence[Path]) -> None:
    """Refuse files of results that cannot be of one run, as `ResultsFolder` writes them."""
    matches = [(path.name, _RESULTS.fullmatch(path.name)) for path in files]
    counts = {match[2]: name for name, match in matches if match and match[2]}
    if len(counts) > 1:
        names = sorted(counts.values())
        raise PairsError(
            f"{folder} holds results of two runs: {names[0]} and {names[1]}",
            "move those of one run into a folder of their own",
        )
    settings = folder / SETTINGS
    if not counts or not settings.exists():
        return
    try:
        there = parse_json(settings.read_bytes())
        shards = there.get("shards")  # only of runs of `batch`
    except (OSError, ValueError, AttributeError):
        raise PairsError(
            f"{settings} is damaged", "register into another folder; these results are of no run"
        ) from None
    if shards is not None and str(shards) not in counts:
        raise PairsError(
            f"{folder} holds {next(iter(counts.values()))}, and its run had {shards} shards",
            "move the results of other runs into a folder of their own",
        )


def _rows(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise PairsError(f"{file} cannot be read: {error.strerror}", "check the file") from None
    for number, line in enumerate(lines, 1):
        try:
            if line:
                yield Row.from_json(line)
        except (ValueError, TypeError) as error:
            if number < len(lines):  # the last one has no end: it was being written
                raise PairsError(
                    f"{file}, line {number}: is no row of results: {error}",
                    "give results.jsonl as 'ulae-rt batch' wrote it",
                ) from None
