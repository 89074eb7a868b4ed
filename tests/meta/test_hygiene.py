"""Nothing tracked names one machine's folders or a package index's address."""

import re
import subprocess

import pytest

from _support.project import ROOT

BINARY = (".pb", ".gz", ".png", ".safetensors", ".pt", ".onnx")

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|tmp|opt|mnt|data|scratch)" + r"/\w")
INDEX = re.compile(
    r"--(?:extra-)?index-url[ =]\S|--find-links[ =]\S|files\.pythonhosted|pypi\.(?:org|python)"
    r"|download\.pytorch|pypi\.nvidia",
    re.IGNORECASE,
)
ALLOWED = {"tests/meta/test_hygiene.py"}


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name]


def findings(text: str) -> list[str]:
    return [
        line.strip()
        for line in text.splitlines()
        if MACHINE_PATH.search(line) or INDEX.search(line)
    ]


def test_no_machine_path_and_no_index_address() -> None:
    found = {}
    for name in set(tracked()) - ALLOWED:
        path = ROOT / name
        if not path.is_file() or path.is_symlink() or name.endswith(BINARY):
            continue
        if lines := findings(path.read_text()):
            found[name] = lines
    assert not found


@pytest.mark.parametrize(
    "text",
    ["cd /home/somebody/ulae", "open('/tmp/x')", "pip install --index-url https://x torch"],
)
def test_the_guard_sees(text: str) -> None:
    assert findings(text)


def test_nothing_built_or_large_is_tracked() -> None:
    built = re.compile(r"(^|/)(__pycache__|build|dist|demo_out|runs|\.venv)/|\.egg-info/|\.pyc$")
    names = [name for name in tracked() if (ROOT / name).is_file()]
    assert not [name for name in names if built.search(name)]
    assert not [name for name in names if (ROOT / name).stat().st_size > 4.2e6]


def test_no_environment_variable_is_read_outside_env() -> None:
    reads = re.compile(r"os\.(?:getenv|environ)")
    package = ("ulae_rt/", "kernels/", "export/", "engines/")
    assert not [
        name
        for name in tracked()
        if name.startswith(package)
        and name.endswith(".py")
        and name != "ulae_rt/env.py"
        and (ROOT / name).is_file()
        and reads.search((ROOT / name).read_text())
    ]
