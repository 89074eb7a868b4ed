"""What a report says in words, the same in Markdown and on the page."""

from harness.record import CaseRecord, Record
from report import words
from report.figures import is_timed, untimed
from report.headlines import Headline
from report.tables import problem

SMALL = "This was a small run: nothing in it says how fast anything is."
# What was done, point by point; in the past tense, since it is true of this record.
METHOD = (
    "Every result was checked before it was timed. What was off is a row that says so, without a "
    "time; the error of what was timed stands beside it.",
    "The contenders of a case ran in turn, one round of each after the other, so that a machine "
    "that drifts drifts for all alike.",
    "A time is the median of the rounds. “× as fast” is the median of the ratio within a round "
    "where both ran in every round, else the ratio of the medians.",
    "p95 stands only where there are 20 rounds, p99 where there are 100; fastest and slowest are "
    "those of all rounds, none was thrown away.",
    "The floor is what this machine needs at least: the bytes that must move, each once, at the "
    "bandwidth of a large copy, or the FLOP at the rate of large matrices in that precision (in "
    "fp32 where there is none for it), whichever takes longer. Both ceilings were measured in the "
    "same run.",
    "The exponent of a series is the slope of log seconds on log size, by least squares, with its "
    "standard error.",
)
METHOD_GPU = (
    "On the GPU a time is with cold caches: the inputs were many times the cache, in turn, and the "
    "cache was overwritten before. “hot” is with the input in the caches. Short runs were timed "
    "as many in one captured graph, between events of the device."
)
# Ends of the names of a machine's facts.
UNITS = {"gb": "GB", "mhz": "MHz", "w": "W"}
# What a suite shows, above its table.
INTRODUCTIONS = {
    "kernels": "Every operation alone, against what its user has without the package and against "
    "the bytes that it must move.",
    "network": "Both images in, the displacement and the moved image out.",
    "engines": "The exported network in everything that can run it, each in a process of its own, "
    "host to host.",
    "training": "One step: forward, losses, backward, optimiser.",
    "files": "From scans on disk to results on disk, everything in between included.",
    "scaling": "How the time grows with the size of the work.",
}


def summary(record: Record) -> str:
    """How much there is, on one line."""
    timed = sum(is_timed(o) for case in record.cases for o in case.contenders.values())
    parts = [words.count(len(record.cases), "case"), words.count(timed, "contender") + " timed"]
    found = untimed(record)
    for status in ("wrong", "failed", "left out"):
        number = sum(outcome.status == status for _, _, outcome in found)
        if number:
            parts.append(f"{number} {status}")
    if record.left_out:
        parts.append(words.count(len(record.left_out), "suite") + " left out")
    return ", ".join(parts)


def method(record: Record) -> list[str]:
    """How it was done, point by point."""
    return [*METHOD, METHOD_GPU] if record.machine.get("gpu") else list(METHOD)


def moment(record: Record) -> str:
    """``2026-11-23 01:06 UTC``."""
    return f"{record.started[:16].replace('T', ' ')} UTC"


def ceilings(record: Record) -> list[tuple[str, str]]:
    """What this machine can do at most, as measured in the run."""
    found = []
    if record.copy_bytes_per_second:
        found.append(("copy", words.bandwidth(record.copy_bytes_per_second)))
    for precision, rate in record.matmul_flops_per_second.items():
        found.append((f"matrices, {precision}", words.arithmetic(rate)))
    return found


def problems(record: Record) -> list[tuple[str, str]]:
    """(what, why) of all that is without a time: suites first, then wrong, failed, left out.

    A contender that is missing for the same reason in many cases is said once, with their number.
    """
    found = [(f"the suite {name}", why) for name, why in record.left_out.items()]
    alike: dict[tuple[str, str, str], list[CaseRecord]] = {}
    for case, name, outcome in untimed(record):
        alike.setdefault((case.suite, name, problem(outcome)), []).append(case)
    for (suite, name, why), cases in alike.items():
        where = cases[0].name if len(cases) == 1 else words.count(len(cases), "case")
        found.append((f"{suite}, {where}: {name}", why))
    return found


def machine(record: Record) -> list[tuple[str, str]]:
    """All that is known of the machine."""
    found = []
    for key, value in record.machine.items():
        if value is None or key in ("name", "title"):
            continue
        said = f"{value:.1f}" if isinstance(value, float) else str(value)
        name, _, last = key.rpartition("_")
        if last in UNITS:
            found.append((name.replace("_", " "), f"{said} {UNITS[last]}"))
        else:
            found.append((key.replace("_", " "), said))
    return found


def versions(record: Record) -> tuple[list[tuple[str, str]], list[str]]:
    """Of what is installed; names of what is not."""
    present = [(name, value) for name, value in record.versions.items() if value is not None]
    return present, [name for name, value in record.versions.items() if value is None]


def against(headline: Headline) -> str:
    """What a headline's figures are compared with."""
    if headline.mean is not None:
        return "as fast as " + " and ".join(headline.mean.baselines)
    if headline.baseline is None:
        return "nothing to compare with"
    name, found = headline.baseline
    return f"as fast as {name} ({words.seconds(found.median)})"


def extremes(headline: Headline) -> str:
    """From the worst case of a mean to its best, and how far it is from the hardware's limit."""
    found = headline.mean
    if found is None:
        return ""
    text = f"{words.times(found.least)} to {words.times(found.most)}"
    if found.floors is not None:
        text += f"; {words.digits(found.floors)} times the hardware’s floor (median)"
    return text
