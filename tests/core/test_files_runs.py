"""A folder is one run's at a time, and its lock goes with the process."""

import subprocess
import sys

import pytest

from ulae_rt.errors import OutputError
from ulae_rt.files import locked_run

HOLD = """
import sys
from pathlib import Path
from ulae_rt.files import locked_run
with locked_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_told_and_one_after_a_kill_is_not(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "made")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(OutputError, match="another run is writing to"),
            locked_run(tmp_path / "made"),
        ):
            pass
        other.kill()
    with locked_run(tmp_path / "made"):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="file cannot be written to: "),
        locked_run(tmp_path / "file"),
    ):
        pass
