"""The table of accuracy: every method and baseline on the pairs of OASIS val, one command.

    python bench/accuracy.py [--methods NAME[,NAME...]] [--earlier RECORD] [--out DIR]

needs ``ULAE_RT_DATA``, and of the package what ``evaluate`` and ``baselines`` bring. It registers
the 20 ordered pairs by each method that is not done yet (what was stopped goes on), measures all of
them together, writes ``results/accuracy-<date>-<commit>.csv``, ``.md`` and ``.json``, and from the
newest of these that has the most methods the README's table. On two quiet cores SyN took 16 to 33
minutes, greedy 25 to 36, the network 2 and with 200 iterations 23, all of it an hour and a half to
two. Where only the network changed, ``--methods network,network+10,... --earlier
results/accuracy-....json`` takes the other rows from that record, and the table says so.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.record import ROOT
from harness.registering import Way, data_dir, measure, register
from report import readme

KIND = "accuracy"
UNSUPERVISED = "ulae_rt/model/weights/ulae-oasis.safetensors"
# The affine alone and doing nothing are evaluate's own.
METHODS = {
    "syn": Way("ANTs SyN (antspyx 0.5.3)", ("--method", "syn")),
    "greedy": Way("greedy (picsl-greedy 1.4)", ("--method", "greedy")),
    "network": Way("network"),
    "network+10": Way("network, `--refine 10`", ("--refine", "10")),
    "network+50": Way("network, `--refine 50`", ("--refine", "50")),
    "network+200": Way("network, `--refine 200`", ("--refine", "200")),
    "unsupervised": Way("unsupervised weights", ("--weights", UNSUPERVISED)),
    "unsupervised+50": Way(
        "unsupervised, `--refine 50`", ("--weights", UNSUPERVISED, "--refine", "50")
    ),
}


def main() -> int:
    """Run what is missing, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="which ones (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / KIND, metavar="DIR")
    parser.add_argument(
        "--earlier", type=Path, metavar="RECORD", help="a .json whose other methods are kept"
    )
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method {unknown[0]}, expected some of {', '.join(METHODS)}")
    earlier = arguments.earlier
    if earlier and not all(earlier.with_suffix(f".{kind}").is_file() for kind in ("json", "csv")):
        parser.error(f"--earlier {earlier}: expected a record's .json with its .csv beside it")
    out = arguments.out.resolve()
    ways = {name: way for name, way in METHODS.items() if name in names}
    register(ways, data_dir(parser) / "oasis" / "val", out)
    measure(KIND, ways, out, earlier=earlier)
    readme.write(ROOT / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
