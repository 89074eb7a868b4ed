"""What is left of a run: one file of JSON with every round of every contender."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from harness.case import Case, Measured, Outcome, Sizes
from harness.files import write_whole

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
FORMAT = 1


@dataclass(frozen=True)
class CaseRecord:
    """A `Case` and its `Measured`, as they are kept; the fields are theirs."""

    suite: str
    name: str
    sizes: Sizes
    batch: int
    precision: str
    baseline: str
    own: tuple[str, ...]
    goal: str
    error_unit: str
    series: str
    x: float | None
    bytes: int | None
    flops: float | None
    contenders: Mapping[str, Outcome]

    @classmethod
    def of(cls, case: Case, measured: Measured) -> Self:
        """Put the two together."""
        kept = {each.name for each in fields(cls)} & {each.name for each in fields(case)}
        return cls(
            **{name: getattr(case, name) for name in kept - {"contenders"}},
            bytes=measured.bytes,
            flops=measured.flops,
            contenders=measured.outcomes,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``asdict``."""
        tuples = {name: tuple(values[name]) for name in ("sizes", "own")}
        outcomes = {name: Outcome(**each) for name, each in values["contenders"].items()}
        return cls(**{**values, **tuples, "contenders": outcomes})

    @property
    def id(self) -> str:
        """As `Case.id`."""
        size = "x".join(map(str, (self.batch, *self.sizes)))
        return f"{self.suite}: {self.name}, {self.precision}, {size}"


@dataclass(frozen=True)
class Record:
    """One run on one machine.

    Attributes:
        machine: ``name`` (for files), ``title`` (for people), processor, GPU, driver, clocks.
        versions: of the packages that matter; None where one is not installed.
        started: ISO 8601, UTC.
        commit: that ran, short.
        dirty: files differed from it.
        command: that was given.
        small: nothing in it says how fast anything is.
        seconds: it took.
        copy_bytes_per_second: read and written, by a large copy on the device.
        matmul_flops_per_second: of large matrices, by precision.
        cases: in the order in which they ran.
        left_out: by suite, why it did not run.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    started: str
    commit: str
    dirty: bool
    command: str
    small: bool
    seconds: float
    copy_bytes_per_second: float
    matmul_flops_per_second: Mapping[str, float]
    cases: Sequence[CaseRecord] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def date(self) -> str:
        """The day, ISO."""
        return self.started[:10]

    @property
    def stem(self) -> str:
        """Of the names of its files."""
        return f"{self.machine['name']}-{self.date}-{self.commit}{'-dirty' * self.dirty}"

    def with_earlier(self, other: "Record") -> "Record":
        """This run with the cases of an earlier one of the same commit and day that it had not."""
        mine = {case.id for case in self.cases}
        kept = [case for case in other.cases if case.id not in mine]
        suites = {case.suite for case in (*kept, *self.cases)}
        reasons = {**other.left_out, **self.left_out}
        return replace(
            self,
            cases=[*kept, *self.cases],
            left_out={name: why for name, why in reasons.items() if name not in suites},
            seconds=self.seconds + other.seconds,
        )

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, default=list)
        write_whole(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            cases = [CaseRecord.from_json(each) for each in values.pop("cases")]
            return cls(cases=cases, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of 'pytest --benchmark': {error!r}") from None


def results_folder(usual: Path = RESULTS) -> Path:
    """Where records go: the folder that ``ULAE_RT_EVIDENCE`` names, or the usual one.

    Of a machine that one has for minutes one folder comes back, and it lies outside the checkout.
    """
    folder = Path(os.environ.get("ULAE_RT_EVIDENCE") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def all_records(folder: Path = RESULTS) -> list[Record]:
    """Those in a folder, the oldest first; other files in it are passed over."""
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(ValueError):
            found.append(Record.read(path))
    return sorted(found, key=lambda record: record.started)


def newest(records: Iterable[Record]) -> dict[str, Record]:
    """The last record of each machine, by its name."""
    return {record.machine["name"]: record for record in records}
