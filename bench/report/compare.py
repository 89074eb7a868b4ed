"""Two records of one machine: what of the package became slower, by more than the noise.

    python bench/report/compare.py OLD.json NEW.json

Ends with 1 where something became slower or does not run any more, with 0 where nothing did, with
2 where the two cannot be compared.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.record import CaseRecord, Record
from report import words
from report.figures import is_timed, quartiles

# Beyond the quartiles, which are the noise within a run; between runs there is a little more.
MARGIN = 1.05
Verdict = Literal["slower", "lost", "faster", "same"]
ORDER: tuple[Verdict, ...] = ("lost", "slower", "faster", "same")
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Change:
    """One of the package's contenders in both records.

    Attributes:
        case: its id.
        contender: its name.
        absolute: whether seconds were compared; else seconds by the baseline's.
        old: lower quartile, median and upper quartile.
        new: likewise; None of what does not run any more.
        verdict: ``lost``: it was timed, and now it failed or was wrong.
        why: it was lost.
    """

    case: str
    contender: str
    absolute: bool
    old: Spread
    new: Spread | None
    verdict: Verdict
    why: str = ""

    @property
    def slowdown(self) -> float | None:
        """New median by the old one."""
        return None if self.new is None else self.new[1] / self.old[1]


def compared(old: Record, new: Record) -> list[Change]:
    """What became of every contender of the package that the old record timed.

    On a GPU seconds are compared. A CPU's drift by a third within the hour, so there it is each
    round's ratio to the baseline of the case, and seconds only where there is no baseline. Slower
    is what has its new lower quartile above 1.05 times its old upper one; faster the reverse.

    Raises:
        ValueError: the records are of two machines, or one of them is of a small run.
    """
    names = [record.machine["name"] for record in (old, new)]
    if names[0] != names[1]:
        raise ValueError(
            f"records of two machines cannot be compared: expected {names[0]!r}, as in the old "
            f"one, got {names[1]!r}; run both commits on one machine"
        )
    for which, record in (("old", old), ("new", new)):
        if record.small:
            raise ValueError(
                f"the {which} record is of a small run, which says nothing about speed: expected "
                f"a full one, got {record.command!r}; run it without the option for small sizes"
            )
    on_gpu = new.machine.get("gpu") is not None
    before = {case.id: case for case in old.cases}
    found = []
    for case in new.cases:
        earlier = before.get(case.id)
        for name in case.own if earlier else ():
            change = earlier and _change(earlier, case, name, on_gpu)
            if change:
                found.append(change)
    return found


def _change(old: CaseRecord, new: CaseRecord, name: str, on_gpu: bool) -> Change | None:
    before, after = old.contenders.get(name), new.contenders.get(name)
    if before is None or after is None or not is_timed(before):
        return None
    usable = [
        case.baseline == new.baseline != name and is_timed(case.contenders.get(case.baseline))
        for case in (old, new)
    ]
    absolute = on_gpu or not all(usable)
    first = quartiles(_values(old, name, absolute))
    if not is_timed(after):
        if after.status == "left out":  # its library is not there: no change of the package
            return None
        return Change(new.id, name, absolute, first, None, "lost", f"{after.status}: {after.why}")
    second = quartiles(_values(new, name, absolute))
    return Change(new.id, name, absolute, first, second, _verdict(first, second))


def _values(case: CaseRecord, name: str, absolute: bool) -> list[float]:
    """What is compared, of every round."""
    seconds = case.contenders[name].seconds
    if absolute:
        return seconds
    base = case.contenders[case.baseline].seconds
    if len(base) == len(seconds):
        return [a / b for a, b in zip(seconds, base, strict=True)]
    middle = quartiles(base)[1]
    return [value / middle for value in seconds]


def _verdict(old: Spread, new: Spread) -> Verdict:
    if new[0] > MARGIN * old[2]:
        return "slower"
    return "faster" if MARGIN * new[2] < old[0] else "same"


def in_order(changes: Sequence[Change]) -> list[Change]:
    """What is lost, then what became slower, the worst first, then the others."""
    return sorted(changes, key=lambda each: (ORDER.index(each.verdict), -(each.slowdown or 0.0)))


def spread(values: Spread | None, absolute: bool) -> str:
    """Median and quartiles, of seconds or of a ratio to the baseline."""
    if values is None:
        return words.NONE
    low, middle, high = map(words.seconds if absolute else words.digits, values)
    return f"{middle} [{low} to {high}]"


def difference(change: Change) -> str:
    """In percent; why there is none of what was lost."""
    if change.slowdown is None:
        return change.why
    return f"{change.slowdown - 1:+.0%}".replace("-", "−").replace("%", " %")


def quantity(change: Change) -> str:
    """What was compared."""
    return "seconds (absolute)" if change.absolute else "time by the baseline's"


def differences(old: Record, new: Record) -> list[str]:
    """What else differs between the two records, besides the package."""
    found = [
        f"{name} {old.versions.get(name) or 'not installed'} → "
        f"{new.versions.get(name) or 'not installed'}"
        for name in dict.fromkeys((*old.versions, *new.versions))
        if old.versions.get(name) != new.versions.get(name)
    ]
    found += [
        f"{key.replace('_', ' ')} {old.machine.get(key)} → {new.machine.get(key)}"
        for key in dict.fromkeys((*old.machine, *new.machine))
        if old.machine.get(key) != new.machine.get(key)
    ]
    ids = [{case.id for case in record.cases} for record in (old, new)]
    for which, only in (("old", ids[0] - ids[1]), ("new", ids[1] - ids[0])):
        if only:
            found.append(f"{words.count(len(only), 'case')} only in the {which} record")
    return found


def text(old: Record, new: Record, changes: Sequence[Change]) -> str:
    """The comparison for a terminal, of what `compared` found."""
    lines = [
        f"{new.machine['title']}: {_label(old)} → {_label(new)}",
        *(f"also changed: {each}" for each in differences(old, new)),
    ]
    for change in in_order(changes):
        before, after = (spread(each, change.absolute) for each in (change.old, change.new))
        lines.append(f"{change.verdict:<7}{change.case}, {change.contender}")
        lines.append(f"       {quantity(change)}: {before} → {after}: {difference(change)}")
    lines.append(", ".join(f"{number} {verdict}" for verdict, number in counts(changes).items()))
    return "\n".join(lines)


def counts(changes: Sequence[Change]) -> dict[Verdict, int]:
    """How many of each verdict, the worst first."""
    return {each: sum(change.verdict == each for change in changes) for each in ORDER}


def _label(record: Record) -> str:
    return f"{record.date} {record.commit}{' (files changed)' * record.dirty}"


def main(arguments: Sequence[str]) -> int:
    """Say what changed between two files."""
    if len(arguments) != 2:
        print("usage: python bench/report/compare.py OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = (Record.read(Path(name)) for name in arguments)
        changes = compared(old, new)
        print(text(old, new, changes))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any(change.verdict in ("slower", "lost") for change in changes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
