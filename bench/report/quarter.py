"""The evidence of a quarter of an hour on a GPU as a page: ``python bench/report/quarter.py DIR``.

Made from ``evidence.jsonl`` alone, on any machine, of a run that was killed as of a whole one.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.evidence import rows

Row = dict[str, Any]


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
    machines = _of(evidence, "facts", "machine")
    machine = machines[0] if machines else {}
    yield f"# A quarter of an hour on {machine.get('title', 'an unknown machine')}"
    yield ""
    begun = _of(evidence, "run", "begun")
    date = begun[0]["at"][:10] if begun else "unknown"
    rehearsal = " **Rehearsal: no figure says how fast anything is.**" if any(
        row.get("small") for row in begun
    ) else ""  # fmt: skip
    commit = begun[0].get("commit", "unknown") if begun else "unknown"
    changed = ", with files changed" if begun and begun[0].get("dirty") else ""
    yield f"{date}, commit {commit}{changed}.{rehearsal}"
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
    missing = {name for row in begun for name in row["stages"]} - {row["stage"] for row in ended}
    body += [(name, "not ended", "", "", "", "") for name in sorted(missing)]
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
        (row["what"], row["how"], _time(row["median"]), _time(min(row["seconds"])),
         f"{row['voxels_off_mean']:.2g}, {row['voxels_off_largest']:.2g}")
        for row in network
        if "voxels_off_mean" in row
    ]  # fmt: skip
    header = ("one pair", "", "median", "least", "voxels off: mean, largest")
    yield from _table("The network, device to device", header, body)
    shapes = sorted(
        (row for row in network if row["what"].startswith("convolution")),
        key=lambda row: -row["median"] * row["count"],
    )
    body = [
        (row["what"], "x".join(map(str, row["image"])), "x".join(map(str, row["weight"])),
         " ".join(f"{name} {value}" for name, value in row["options"].items()), row["count"],
         _time(row["median"]), row["kernel"][:60])
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
            result = _time(row["median"]) if row["median"] else f"{row['status']}: {row['why']}"
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


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with evidence.jsonl")
    parser.add_argument("-o", "--out", type=Path, help="Markdown file (standard output)")
    arguments = parser.parse_args()
    text = page(rows(arguments.folder))
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
