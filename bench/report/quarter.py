"""The evidence of a quarter of an hour on a GPU as a page, and as the README's rows.

    python bench/report/quarter.py DIR...                              the page, on standard output
    python bench/report/quarter.py DIR... --commit-to bench/results    both, to be committed

Each DIR is one command's; made from their ``evidence.jsonl`` alone, on any machine, of a run that
was killed as of a whole one.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.case import PACKAGE
from harness.checkout import VARIABLE
from harness.evidence import read, rows
from harness.files import write_whole
from harness.record import RESULTS
from report import words

Row = dict[str, Any]
NO_FIGURE = "No GPU figure exists yet."
# Of the ways of `stages.ways` those that a user has, and what the table adds to their names.
NETWORK = {"program": "", "host to host": ", host to host"}
GOALS = {"program, fp16": "3 ms"}


def page(evidence: Sequence[Row]) -> str:
    """Markdown."""
    parts = (_head, _stages, _ops, _tests, _network, _timed, _others)
    return "\n".join(line for part in parts for line in part(evidence)) + "\n"


def _of(evidence: Sequence[Row], stage: str, what: str = "") -> list[Row]:
    return [
        row for row in evidence
        if row["stage"] == stage and row["what"] != "stage" and what in ("", row["what"])
    ]  # fmt: skip


def _head(evidence: Sequence[Row]) -> Iterator[str]:
    machine = _machine(evidence)
    yield f"# A quarter of an hour on {machine.get('title', 'an unknown machine')}"
    yield ""
    begun = _of(evidence, "run", "begun")
    rehearsal = " **Rehearsal: no figure says how fast anything is.**" if any(
        row.get("small") for row in begun
    ) else ""  # fmt: skip
    date, commit, dirty = _source(evidence)
    yield f"{date}, commit {commit}{', with files changed' * dirty}.{rehearsal}"
    copies = _of(evidence, "facts", "copy")
    if copies:
        rates = ", ".join(
            f"{row['precision']} {row['flops_per_second'] / 1e12:.3g} TFLOP/s"
            for row in _of(evidence, "facts", "matmul")
        )
        for row in _of(evidence, "facts", "carried kernels"):
            kernels = begun[0]["kernels_carried"] if begun else "unknown"
            differ = row.get("why") or ", ".join(row["differ"])
            state = "of use" if row["same"] else f"**of no use** ({differ})"
            yield f"Kernels carried: {kernels}, {state}."
        yield f"Copies {copies[0]['bytes_per_second'] / 1e9:.4g} GB/s; large products {rates}."


def _machine(evidence: Sequence[Row]) -> Row:
    machines = _of(evidence, "facts", "machine")
    return machines[0] if machines else {}


def _source(evidence: Sequence[Row]) -> tuple[str, str, bool]:
    """Day, commit, and whether files differed from it."""
    begun = _of(evidence, "run", "begun")
    if not begun:
        return "unknown", "unknown", False
    return begun[0]["at"][:10], begun[0]["commit"], begun[0]["dirty"]


def _table(title: str, header: Sequence[str], body: Sequence[Sequence[object]]) -> Iterator[str]:
    if not body:
        return
    yield ""
    yield f"## {title}"
    yield ""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for cells in body:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _stages(evidence: Sequence[Row]) -> Iterator[str]:
    ended = [row for row in evidence if row["what"] == "stage"]
    failures = {row["stage"]: row["error"] for row in evidence if row["what"] == "failed"}
    body = [
        (row["stage"], row["how"], row["seconds"], row["budget"], row["compiled_anew"],
         failures.get(row["stage"], ""))
        for row in ended
    ]  # fmt: skip
    begun = [row for row in evidence if row["what"] == "begun"]
    missing = Counter(name for row in begun for name in row["stages"])
    missing -= Counter(row["stage"] for row in ended)
    body += [(name, "not ended", "", "", "", "") for name in sorted(missing.elements())]
    header = ("stage", "how it ended", "s", "of", "compiled anew", "error")
    yield from _table("Stages", header, body)


def _ops(evidence: Sequence[Row]) -> Iterator[str]:
    body = [
        (
            row["what"],
            " ".join(f"{error:.1e}" for error in row["kernel_rms"]),
            " ".join(f"{error:.1e}" for error in row["reference_rms"]),
            "yes" if row["same_bits_again"] else "**no**",
        )
        for row in _of(evidence, "ops")
        if "kernel_rms" in row
    ]
    header = ("op", "kernel", "plain float32", "same bits again")
    yield from _table("Relative RMS errors against float64, results then gradients", header, body)


def _tests(evidence: Sequence[Row]) -> Iterator[str]:
    counts = [row for row in evidence if row["what"] in ("tests", "tests so far")]
    last = {row["stage"]: row for row in counts}
    body: list[Sequence[object]] = [
        (stage, row.get("passed", 0), row.get("failed", 0), row.get("skipped", 0),
         "" if row["what"] == "tests" else "so far")
        for stage, row in last.items()
    ]  # fmt: skip
    yield from _table("Tests", ("stage", "passed", "failed", "skipped", ""), body)
    for row in evidence:
        if row["what"] == "failed test":
            yield f"- failed: `{row['test']}`"


def _network(evidence: Sequence[Row]) -> Iterator[str]:
    network = _of(evidence, "network")
    body: list[Sequence[object]] = [
        (row["what"], row["how"], words.seconds(row["median"]), words.seconds(min(row["seconds"])),
         f"{row['voxels_off_mean']:.2g}, {row['voxels_off_largest']:.2g}",
         "" if row["right"] else "**wrong**")
        for row in network
        if "voxels_off_mean" in row
    ]  # fmt: skip
    header = ("one pair", "how", "median", "least", "voxels off: mean, largest", "")
    yield from _table("The network, device to device but where it says host", header, body)
    shapes = sorted(
        (row for row in network if row["what"].startswith("convolution")),
        key=lambda row: -row["median"] * row["count"],
    )
    body = [
        (row["what"], "x".join(map(str, row["image"])), "x".join(map(str, row["weight"])),
         " ".join(f"{name} {value}" for name, value in row["options"].items()), row["count"],
         words.seconds(row["median"]), row["kernel"][:60])
        for row in shapes
    ]  # fmt: skip
    header = ("", "image", "weight", "options", "times", "median", "kernel")
    yield from _table("Its convolutions, each alone, the most expensive first", header, body)
    for row in network:
        if row["what"].startswith("kernels"):
            body = [(name, f"{spent:.0f} us", count) for name, spent, count in row["longest"]]
            total = f"{row['microseconds'] / 1e3:.3g} ms in {row['launches']} launches"
            yield from _table(f"{row['what']}: {total}", ("kernel", "", "times"), body)


def _timed(evidence: Sequence[Row]) -> Iterator[str]:
    for stage, title in (("goals", "Kernels that have a goal"), ("training", "A training step")):
        body: list[Sequence[object]] = []
        copies = _of(evidence, "facts", "copy")
        for row in _of(evidence, stage):
            if "contender" not in row:
                body.append((row["what"], "", row.get("failed", ""), "", "", ""))
                continue
            floor = ""
            if row.get("bytes") and copies and row["median"]:
                floor = f"{row['median'] * copies[0]['bytes_per_second'] / row['bytes']:.2f} x"
            memory = f"{row['gpu_peak_gb']:.2f} GB" if row.get("gpu_peak_gb") else ""
            result = (
                words.seconds(row["median"]) if row["median"] else f"{row['status']}: {row['why']}"
            )
            body.append((row["what"], row["contender"], result, floor, row.get("goal", ""), memory))
        header = ("", "contender", "median", "of the floor", "goal", "peak memory")
        yield from _table(title, header, body)


def _others(evidence: Sequence[Row]) -> Iterator[str]:
    body: list[Sequence[object]] = []
    for stage in ("program", "refinement", "counters"):
        for row in _of(evidence, stage):
            values = {k: v for k, v in row.items() if k not in ("stage", "what", "at", "seconds")}
            seconds = row.get("seconds")
            if isinstance(seconds, float):
                values["seconds"] = f"{seconds:.4g}"
            words = ", ".join(f"{name} {value}" for name, value in values.items())
            body.append((stage, row["what"], words[:200]))
    yield from _table("The rest", ("stage", "", ""), body)


def newest(folder: Path = RESULTS) -> list[Row]:
    """The evidence that was committed last; empty where none was."""
    found = [list(read(path)) for path in folder.glob("quarter-*.jsonl")]
    return max(found, key=lambda evidence: _of(evidence, "run", "begun")[0]["at"], default=[])


def section(evidence: Sequence[Row]) -> str:
    """The README's table; without evidence, that there is none."""
    body = [*_network_rows(evidence), *_goal_rows(evidence), *_training_rows(evidence)]
    if not body:
        return NO_FIGURE
    date, commit, dirty = _source(evidence)
    machine = _machine(evidence).get("title", "an unknown machine")
    title = f"**{machine}**, {date}, {commit}{', with files changed' * dirty}:"
    lines = ["| | median | goal | beside | peak memory |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell or words.NONE for cell in row)} |" for row in body]
    return f"{title}\n\n" + "\n".join(lines)


def _network_rows(evidence: Sequence[Row]) -> Iterator[Sequence[str]]:
    """One pair as weights are run, on the device and with the copies, beside the network eager."""
    timed = {row["what"]: row for row in _of(evidence, "network") if "how" in row}
    for what, row in timed.items():
        kind, precision = what.split(", ")
        if kind not in NETWORK:
            continue
        name = f"Network, one pair, {precision}{NETWORK[kind]}"
        if not row["right"]:
            off = f"wrong: {row['voxels_off_mean']:.2g} voxel off in the mean"
            yield name, off, GOALS.get(what, ""), "", ""
            continue
        eager = timed.get(f"eager, {precision}")
        beside = ""
        if eager and eager["right"]:
            ratio = words.times(eager["median"] / row["median"])
            beside = f"{ratio} eager ({words.seconds(eager['median'])})"
        yield name, words.seconds(row["median"]), GOALS.get(what, ""), beside, ""


def _goal_rows(evidence: Sequence[Row]) -> Iterator[Sequence[str]]:
    copies = _of(evidence, "facts", "copy")
    for what, timed in _contenders(evidence, "goals").items():
        own = timed.pop(PACKAGE, None)
        if own is None:
            continue
        goal = own["goal"]
        if own["bytes"] and copies and goal.endswith("floor"):
            floors = own["median"] * copies[0]["bytes_per_second"] / own["bytes"]
            goal = f"{floors:.2f} x, asked for {goal}"
        yield f"Kernel, {what}", words.seconds(own["median"]), goal, _beside(own, timed), ""


def _training_rows(evidence: Sequence[Row]) -> Iterator[Sequence[str]]:
    for timed in _contenders(evidence, "training").values():
        own = {name: row for name, row in timed.items() if name.startswith(PACKAGE)}
        others = {name: row for name, row in timed.items() if name not in own}
        for name, row in own.items():
            peak = words.size(row["gpu_peak_gb"] * 1e9) if row["gpu_peak_gb"] else ""
            median = words.seconds(row["median"])
            yield f"Training step, one pair: {name}", median, "", _beside(row, others), peak


def _contenders(evidence: Sequence[Row], stage: str) -> dict[str, dict[str, Row]]:
    """The rows that were timed, by what was and by contender; of two runs the later."""
    found: dict[str, dict[str, Row]] = {}
    for row in _of(evidence, stage):
        if row.get("status") == "timed":
            found.setdefault(row["what"], {})[row["contender"]] = row
    return found


def _beside(own: Row, others: dict[str, Row]) -> str:
    """How many times as fast as the fastest of the others."""
    if not others:
        return ""
    name, best = min(others.items(), key=lambda item: float(item[1]["median"]))
    times = words.times(best["median"] / own["median"])
    return f"{times} {name} ({words.seconds(best['median'])})"


def commit_to(folder: Path, evidence: Sequence[Row]) -> list[Path]:
    """Write the evidence and its page under a name of their own.

    Raises:
        ValueError: nothing in it is of a GPU, or of a commit.
    """
    machine = _machine(evidence)
    begun = _of(evidence, "run", "begun")
    if not machine.get("gpu") or not begun or any(row["small"] for row in begun):
        raise ValueError(
            "the evidence is a rehearsal's or of no known GPU, expected that of make gpu-quarter "
            "on one; only the page can be made of it: leave --commit-to out"
        )
    date, commit, dirty = _source(evidence)
    if commit == "unknown":
        raise ValueError(
            "the evidence does not say its commit, expected that of a checkout or of "
            f"{VARIABLE}; where you know it, write it into 'commit' of the row 'begun'"
        )
    stem = f"quarter-{machine['name']}-{date}-{commit}{'-dirty' * dirty}"
    texts = {
        "jsonl": "".join(f"{json.dumps(row)}\n" for row in evidence), "md": page(evidence)
    }  # fmt: skip
    paths = [folder / f"{stem}.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_whole(path, text)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="with evidence.jsonl")
    parser.add_argument("--commit-to", type=Path, metavar="DIR", help="bench/results")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        if not rows(folder):
            print(f"error: {folder}: no evidence.jsonl with a row in it, expected the OUT of make "
                  "gpu-quarter; give that folder", file=sys.stderr)  # fmt: skip
            return 1
    evidence = [row for folder in arguments.folders for row in rows(folder)]
    if arguments.commit_to is None:
        sys.stdout.write(page(evidence))
        return 0
    try:
        print(*commit_to(arguments.commit_to, evidence), sep="\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("now rewrite the README's rows: python bench/report/readme.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
