"""A quarter of an hour on a GPU: the most valuable evidence first, whatever is killed on the way.

``make gpu-quarter OUT=DIR`` runs the first call's stages, ``CALL=2`` the second's. Each stage is a
process with a budget; one that fails or takes too long never stops the next. Every fact is a line
of ``DIR/evidence.jsonl`` as soon as it is known, what the stages print is in ``DIR/log.txt``.
``--small`` rehearses all stages on a CPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from harness import carried
from harness.checkout import VARIABLE, commit
from harness.evidence import Evidence

LOG = "log.txt"
# Between asking a stage to end and ending it.
GRACE_SECONDS = 5


class Stage(NamedTuple):
    """One of the run's processes.

    Attributes:
        name: of its function in `stages`.
        call: 1 or 2, the command it belongs to.
        seconds: it may take on a GPU; a rehearsal on a CPU has its own.
        shows: what it is for.
    """

    name: str
    call: int
    seconds: int
    shows: str


STAGES = (
    Stage("facts", 1, 15, "the machine's ceilings"),
    Stage("ops", 1, 80, "every op at full size against float64, and its bits repeated"),
    Stage("tests", 1, 70, "the kernels' tests"),
    Stage("network", 1, 110, "the network and each of its convolutions, by device events"),
    Stage("goals", 1, 110, "the kernels that have a goal, beside what a user has today"),
    Stage("training", 1, 70, "a training step, its speed and memory"),
    Stage("counters", 1, 75, "what the hardware counts in ten kernels"),
    Stage("program", 2, 75, "the .pt2 program, built and timed"),
    Stage("refinement", 2, 25, "a pair refined on the device"),
    Stage("large", 2, 35, "more than 2^31 elements"),
    Stage("goals", 2, 45, "the goals once more"),
)
REHEARSAL_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="evidence goes to")
    parser.add_argument("--call", type=int, choices=(1, 2), help="of the two commands (both)")
    parser.add_argument("--small", action="store_true", help="rehearse, small and on any machine")
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this one; repeated")
    arguments = parser.parse_args()
    chosen = [
        stage
        for stage in STAGES
        if arguments.call in (None, stage.call)
        and (arguments.stage is None or stage.name in arguments.stage)
    ]
    if not chosen:
        names = dict.fromkeys(
            stage.name for stage in STAGES if arguments.call in (None, stage.call)
        )
        parser.error(f"no such stage; there are {', '.join(names)}")
    try:
        source, changed = commit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # The stage in hand ends too; a command in the background of a shell would not see Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    if source == "unknown":
        print(f"warning: the commit is unknown; set {VARIABLE}, or the figures cannot be committed")
    try:
        run = Evidence(arguments.out, "run")
    except OSError as error:
        print(f"error: --out {arguments.out}: {error.strerror}; give a new folder", file=sys.stderr)
        return 1
    names = [stage.name for stage in chosen]
    run.add(
        "begun", small=arguments.small, stages=names, commit=source, dirty=changed,
        kernels_carried=carried.use(carried.CACHE),
    )  # fmt: skip
    try:
        for stage in chosen:
            run_stage(stage, arguments.out, arguments.small)
    except KeyboardInterrupt:
        run.add("interrupted")
        return 130
    run.add("ended")
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def run_stage(stage: Stage, folder: Path, small: bool) -> str:
    """Run one stage's process to its end or its budget's; how it ended."""
    evidence = Evidence(folder, stage.name)
    budget = REHEARSAL_SECONDS if small else stage.seconds
    command = [sys.executable, str(Path(__file__).with_name("stages.py")), stage.name, str(folder)]
    command += ["--small"] if small else []
    print(f"{stage.name}: {stage.shows} ({budget} s at most)", flush=True)
    before, started = carried.folders(carried.CACHE), time.monotonic()
    with (folder / LOG).open("ab") as log:
        log.write(f"\n=== {stage.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(budget)
            how = "done" if status == 0 else f"failed, status {status}"
        except subprocess.TimeoutExpired:
            how = "out of time"
        finally:
            _end(process)
    seconds = time.monotonic() - started
    evidence.add(
        "stage", how=how, seconds=round(seconds, 2), budget=budget,
        compiled_anew=len(carried.folders(carried.CACHE) - before),
    )  # fmt: skip
    print(f"{stage.name}: {how}, {seconds:.1f} s", flush=True)
    return how


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
