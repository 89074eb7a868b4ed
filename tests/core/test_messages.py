"""What other libraries print comes in through one door: told once, with the file's name."""

import json
import logging
import subprocess
import sys
import threading
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from _support.brains import GEOMETRIES, save_brain
from ulae_rt import cli, messages
from ulae_rt.errors import BatchError
from ulae_rt.imaging.nifti import read_volume
from ulae_rt.messages import (
    Messages,
    Once,
    about,
    collected,
    collecting,
    libraries_redirected,
    redirect_itk,
    tell,
)


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_is_said_about_a_file_is_told_once_with_its_name(caplog):
    with about("a.nii"):
        for _ in range(500):
            tell("ITK", "collected\n only   zero points")
        tell("ITK", "something else")
    with about("b.nii"):
        tell("ITK", "collected only zero points")
    tell("ITK", "about nothing")
    tell("ITK", "")
    assert warned(caplog) == [
        "a.nii: ITK says: collected only zero points",
        "a.nii: ITK says: something else",
        "b.nii: ITK says: collected only zero points",
    ]


def test_python_s_warnings_come_without_a_line_of_source(caplog):
    with libraries_redirected(), warnings.catch_warnings(), about("a.nii"):
        warnings.simplefilter("always")
        warnings.showwarning = messages._show_warning
        warnings.warn("overflow encountered", RuntimeWarning, stacklevel=1)
        np.float32(1e30) * np.float32(1e30)
    assert "a.nii: Python says: overflow encountered" in warned(caplog)
    assert all("\n" not in message and ".py" not in message for message in warned(caplog))


def test_nibabel_s_log_has_one_handler_less_and_gets_it_back(caplog, capsys):
    log = logging.getLogger("nibabel.global")
    before = log.handlers[:]
    with libraries_redirected(), about("a.nii"):
        log.warning("vox offset not divisible by 16")
    assert warned(caplog) == ["a.nii: nibabel says: vox offset not divisible by 16"]
    assert capsys.readouterr().err == ""
    assert log.handlers == before


ITK_WARNS = """
import logging, sys
import numpy as np, SimpleITK as sitk
from ulae_rt.messages import about, redirect_itk
logging.basicConfig(format="%(message)s")
redirect_itk(sitk)
redirect_itk(sitk)
fixed = sitk.GetImageFromArray(np.random.default_rng(0).random((9, 9, 9), np.float32))
moving = sitk.Image(fixed)
moving.SetOrigin((500, 0, 0))
method = sitk.ImageRegistrationMethod()
method.SetMetricAsCorrelation()
method.SetOptimizerAsGradientDescent(1.0, 5)
method.SetInitialTransform(sitk.TranslationTransform(3), inPlace=True)
with about("far.nii"):
    try:
        for _ in range(20):
            method.MetricEvaluate(fixed, moving)
    except RuntimeError as error:
        print("refused", file=sys.stderr)
"""


def test_itk_s_pages_become_one_line_each():
    done = subprocess.run([sys.executable, "-P", "-c", ITK_WARNS], capture_output=True, text=True)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line != "refused"]
    assert lines
    assert len(set(lines)) == len(lines)
    assert all(line.startswith("far.nii: ITK says: ") for line in lines)
    assert "0x" not in done.stderr
    assert "WARNING" not in done.stderr


def test_itk_may_warn_from_any_thread(caplog):
    """Its filters run without Python's lock; what they log has to take it."""
    redirect_itk(sitk)
    results = []

    def filtered():
        image = sitk.GetImageFromArray(np.ones((30, 30, 30), np.float32))
        results.append(sitk.SmoothingRecursiveGaussian(image, 2.0).GetSize())

    threads = [threading.Thread(target=filtered) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [(30, 30, 30)] * 4


def test_collected_warnings_are_the_thread_s_own(caplog):
    log = logging.getLogger("ulae_rt.somewhere")
    with collecting(), collected() as mine:
        thread = threading.Thread(target=lambda: log.warning("from another thread"))
        thread.start()
        thread.join()
        log.warning("mine")
        log.warning("mine")
        log.debug("for developers")
    assert mine == ["mine"]
    assert "from another thread" in caplog.text
    assert "mine" not in caplog.text


def test_each_message_once():
    record = logging.LogRecord("ulae_rt.x", logging.WARNING, "", 0, "twice", (), None)
    other = logging.LogRecord("elsewhere", logging.WARNING, "", 0, "not ours", (), None)
    kept, once = Messages(), Once()
    for each in (record, record, other):
        kept.emit(each)
    assert kept.messages == ["twice"]
    assert [once.filter(record), once.filter(record), once.filter(other)] == [True, False, True]


class Command:
    """A command that warns twice, and then ends as it is told."""

    def __init__(self, error=None):
        self.error = error

    def run(self, arguments, report):
        for _ in range(2):
            logging.getLogger("ulae_rt.x").warning("look at this")
        if self.error:
            raise self.error
        return {"a": 1}


@pytest.mark.parametrize("error", [None, BatchError("one failed", "see", {"a": 1})])
def test_json_carries_the_warnings_that_are_shown(error, monkeypatch, capsys):
    module = type(sys)("module")
    module.add_arguments = lambda parser: None
    module.run = Command(error).run
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("module", ""))
    monkeypatch.setitem(sys.modules, "module", module)
    status = cli.run_command("doctor", ["--json"])
    assert status == (0 if error is None else 1)
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"a": 1, "warnings": ["look at this"]}


def test_a_bad_pair_is_refused_without_pages_of_itk(tmp_path):
    """Two voxels that ITK finds no overlap for: 1,700 lines before there was a door."""
    shape, affine = GEOMETRIES["RAS"]
    fixed = save_brain(tmp_path / "fixed.nii.gz", shape, affine)
    data = np.zeros(shape, np.int16)
    data[30, 40, 20:22] = (5, 7)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "moving.nii.gz")
    files = ["-m", str(tmp_path / "moving.nii.gz"), "-f", str(fixed)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ulae_rt", "register", *files, "-o", "moved.nii.gz"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) < 8, done.stderr
    assert lines[-2].startswith("error: affine alignment of ")
    assert not [line for line in lines if ".h" in line.split() or "0x" in line]
    assert all(line.startswith(("warning: ", "error: ", "hint: ")) for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        ["register", "-m", "", "-f", "f.nii", "-o", "o.nii"],
        ["batch", "pairs.csv", "-o", ""],
        ["batch", "pairs.csv", "--out="],
        ["evaluate", "results", "-o", " "],
        ["prepare", "", "-o", "x", "--template", "t.nii"],
        ["export", "--out", ""],
        ["apply", "-i", "a.nii", "-r", "r.nii", "-t", "", "-o", "o.nii"],
        ["train", ""],
    ],
)
def test_an_empty_argument_is_not_the_current_folder(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    assert caught.value.code == 2
    assert "is empty: is it a variable that is not set?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_reader_says_of_a_file_comes_with_its_name(tmp_path, caplog):
    """nibabel notes an offset that SPM could not read, in a log of its own."""
    shape, affine = GEOMETRIES["RAS"]
    place = save_brain(tmp_path / "a.nii", shape, affine)
    content = bytearray(place.read_bytes())
    content[108:112] = np.float32(360).tobytes()  # vox_offset
    place.write_bytes(content[:352] + bytes(8) + content[352:])
    with libraries_redirected():
        read_volume(place)
    assert [m for m in warned(caplog) if m.startswith(f"{place}: nibabel says: vox offset")]


def test_json_that_cannot_be_printed_is_said(tmp_path):
    command = [sys.executable, "-P", "-m", "ulae_rt", "doctor", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_ctrl_c_while_a_command_is_imported_is_an_interruption(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["apply", "-h"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")
