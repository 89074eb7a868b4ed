"""`ulae-rt batch` as a server runs it: killed, stopped, gone on with, and given nonsense."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from _support.brains import GEOMETRIES, save_brain
from _support.networks import FakeNetwork
from ulae_rt import options
from ulae_rt.batching.results import read_results
from ulae_rt.cli import main
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")

BAD = ("gone", "cut")


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A list of nine pairs of two fixed scans, two of them bad."""
    folder = tmp_path_factory.mktemp("listed")
    for name in ("RAS", "LIA", "oblique"):
        save_brain(folder / f"{name}.nii.gz", *GEOMETRIES[name])
    (folder / "cut.nii.gz").write_bytes((folder / "LIA.nii.gz").read_bytes()[:5000])
    lines = ["id,moving,fixed,moving_labels"]
    for number in range(7):
        fixed, moving = (("RAS", "LIA"), ("LIA", "oblique"))[number % 2]
        lines.append(f"p{number},{moving}.nii.gz,{fixed}.nii.gz,{moving}.nii.gz")
    lines.insert(3, "gone,none.nii.gz,RAS.nii.gz,")
    lines.insert(6, "cut,LIA.nii.gz,cut.nii.gz,")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from _support.networks import FakeNetwork
from ulae_rt import cli
from ulae_rt.registration import registrar

class Slow(FakeNetwork):
    def displacement(self, moving, fixed):
        time.sleep({seconds})
        return super().displacement(moving, fixed)

registrar.load_network = lambda *_, **__: Slow(shift=(0.5, -0.25, 0.75))
registrar.pose_of = lambda _: None
sys.exit(cli.main(sys.argv[1:]))
"""


def start(listed, out, *flags, seconds=0.0):
    tests = str(Path(__file__).parents[1])
    code = RUN.format(tests=tests, seconds=seconds)
    command = [sys.executable, "-c", code, "batch", str(listed), "-o", str(out), *flags]
    command += ["--affine", "com", "--workers", "2", "--pictures", "0", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(listed, out, *flags, **more):
    process = start(listed, out, *flags, **more)
    said, errors = process.communicate(timeout=120)
    return process.returncode, said, errors


def wait_for_lines(path, count):
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(out):
    """Every image by its place."""
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.nii.gz"))}


def comparable(row):
    """A row without what differs between two runs: when, where and how long."""
    return {
        **vars(row),
        "seconds": sorted(set(row.seconds) - {"read fixed"}),
        "finished": "",
        "host": "",
    }


def compare(out, whole):
    assert files(out) == files(whole)
    rows = {row.id: comparable(row) for row in read_results(out)}
    expected = {row.id: comparable(row) for row in read_results(whole)}
    for id_, row in rows.items():  # one by one, so that a failure says which value differs
        assert row == expected[id_]
    assert rows.keys() == expected.keys()
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) == 9  # each exactly once


@pytest.fixture(scope="module")
def whole(listed, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, said, errors = run(listed, out)
    assert status == 1
    summary = json.loads(said)
    written = json.loads((out / "summary.json").read_text())
    assert summary == {**written, "warnings": []}
    assert (summary["done"], summary["failed"], summary["missing"]) == (7, 2, 0)
    assert {each["id"] for each in summary["failures"]} == set(BAD)
    assert "error: 2 of 9 pairs failed: " in errors
    assert "failed: gone: " in errors
    assert "Traceback" not in errors
    return out


def test_killed_and_gone_on_with(listed, whole, tmp_path):
    out = tmp_path / "out"
    for lines in (2, 5):
        process = start(listed, out, *(["--resume"] if out.exists() else []), seconds=0.3)
        wait_for_lines(out / "results.jsonl", lines)
        process.kill()
        process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.glob("pairs/*/result.json")}
    assert 0 < len(done) < 7
    status, _, errors = run(listed, out, "--resume")
    assert (status, "2 of 9 pairs failed" in errors) == (1, True)
    for path, changed in done.items():
        assert path.stat().st_mtime_ns == changed  # nothing twice
    compare(out, whole)


@pytest.mark.follows("go on with --resume")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_after_what_was_in_hand(listed, whole, tmp_path, stop):
    out = tmp_path / "out"
    process = start(listed, out, seconds=0.5)
    wait_for_lines(out / "results.jsonl", 1)
    process.send_signal(stop)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    summary = json.loads(said)
    assert summary["missing"] > 0
    assert f"stopped: {summary['missing']} of 9 pairs are missing" in errors
    assert "hint: go on with --resume" in errors
    assert not list(out.glob(".part*/*"))
    assert run(listed, out, "--resume")[0] == 1
    compare(out, whole)


def test_shards_together_give_the_same(listed, whole, tmp_path):
    out = tmp_path / "out"
    processes = [start(listed, out, "--shard", f"{part}/3") for part in (1, 2, 3)]
    for process in processes:
        process.communicate(timeout=120)
    assert files(out) == files(whole)
    rows = {row.id: comparable(row) for row in read_results(out)}
    assert rows == {row.id: comparable(row) for row in read_results(whole)}
    assert sorted(path.name for path in out.glob("results*")) == [
        f"results-{part}-of-3.jsonl" for part in (1, 2, 3)
    ]


def test_a_second_run_on_one_folder_is_refused(listed, tmp_path):
    out = tmp_path / "out"
    first = start(listed, out, seconds=0.5)
    wait_for_lines(out / "results.jsonl", 1)
    status, _, errors = run(listed, out, "--resume")
    first.kill()
    first.communicate()
    assert status == 1
    assert f"error: another run is writing to {out}" in errors


@pytest.fixture
def network(monkeypatch):
    """The network that every command of this process opens."""
    fake = FakeNetwork()
    monkeypatch.setattr(
        options.NetworkOptions,
        "open",
        lambda self: Registrar(fake, affine=self.affine, refine=self.refine),
    )
    return fake


def call(capsys, *flags):
    status = main(["batch", *map(str, flags), "--pictures", "0"])
    return status, capsys.readouterr().err


def test_mistakes_are_said_before_any_work(listed, network, tmp_path, capsys):
    for flags, expected, said in (
        ((tmp_path / "no.csv", "-o", tmp_path / "o"), 1, "no.csv does not exist"),
        ((listed, "-o", tmp_path / "o", "--shard", "3/2"), 2, "--shard is '3/2', expected I/N"),
        ((listed, "-o", tmp_path / "o", "--device", "gpu"), 2, "--device is 'gpu'"),
        ((listed, "-o", listed), 1, "cannot be written"),
    ):
        status, errors = call(capsys, *flags)
        assert (status, said in errors) == (expected, True), errors
        assert "Traceback" not in errors
    assert not (tmp_path / "o").exists()
    for flags in (("--batch-size", "0"), ("--workers", "x"), ("--outputs", "all")):
        with pytest.raises(SystemExit) as stopped:
            call(capsys, listed, "-o", tmp_path / "o", *flags)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("flag", "least"), [("--batch-size", 1), ("--workers", 1), ("--pictures", 0)]
)
@pytest.mark.parametrize("value", ["-1", "-2", "1.5", "x"])
def test_what_is_no_count_is_told_where_counts_begin(tmp_path, capsys, flag, least, value):
    with pytest.raises(SystemExit):
        main(["batch", "pairs.csv", "-o", str(tmp_path / "o"), f"{flag}={value}"])
    assert f"'{value}', expected a whole number from {least}" in capsys.readouterr().err


def test_files_outside_the_lists_folder_are_shown(listed, network, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text(
        f"id,moving,fixed\na,{os.path.relpath(listed.parent, tmp_path)}/LIA.nii.gz,"
        f"{listed.parent}/RAS.nii.gz\n"
    )
    out = tmp_path / "out"
    assert main(["batch", str(tmp_path / "pairs.csv"), "-o", str(out), "--affine", "none"]) == 0
    said = capsys.readouterr().out
    assert f"page        {out / 'summary.html'}" in said
    assert "data:image" in (out / "summary.html").read_text()
    assert "outside     2 files lie outside the list's folder: " in said
    assert str(out / "results.jsonl") in said


def test_a_folder_with_results_wants_resume_and_the_same_settings(
    listed, network, tmp_path, capsys
):
    (listed.parent / "one.csv").write_text("id,moving,fixed\na,LIA.nii.gz,RAS.nii.gz\n")
    flags = (listed.parent / "one.csv", "-o", tmp_path / "out", "--affine", "none")
    assert call(capsys, *flags)[0] == 0
    assert "give --resume to do what is missing" in call(capsys, *flags)[1]
    assert call(capsys, *flags, "--resume")[0] == 0
    status, errors = call(capsys, *flags[:-1], "com", "--resume")
    assert (status, "was begun with affine none, now it is com" in errors) == (1, True)


def test_refined_pairs_say_what_it_took(listed, network, tmp_path, capsys):
    (listed.parent / "one.csv").write_text("id,moving,fixed\na,LIA.nii.gz,RAS.nii.gz\n")
    flags = (listed.parent / "one.csv", "--affine", "com")
    network.shift = (0.0, 0.7, 0.0)
    said = {}
    for folder, more in (("alone", ()), ("refined", ("--refine", "5"))):
        assert main(["batch", *map(str, flags), "-o", str(tmp_path / folder), *more]) == 0
        said[folder] = capsys.readouterr().out
    alone, refined = (read_results(tmp_path / each)[0] for each in ("alone", "refined"))
    assert "refine" not in alone.seconds
    assert (alone.lncc_network, alone.lncc_refined) == (None, None)
    assert refined.lncc_refined > refined.lncc_network
    assert "refined     local correlation 0." in said["refined"]
    assert "refined  " not in said["alone"]
    assert " refined to 0." in (tmp_path / "refined/summary.html").read_text()
    assert " refined to " not in (tmp_path / "alone/summary.html").read_text()
    assert refined.seconds["refine"] > refined.seconds["network"] > 0
    assert refined.similarity_after > alone.similarity_after
    assert json.loads((tmp_path / "refined" / "run.json").read_text())["refine"] == 5
    network.shift = (0.0, 0.0, 0.0)
    assert call(capsys, *flags, "-o", tmp_path / "no gain", "--refine", "5")[0] == 0
    assert "the network's displacement is kept" in read_results(tmp_path / "no gain")[0].warnings[0]
    status, errors = call(capsys, *flags, "-o", tmp_path / "refined", "--resume")
    assert (status, "was begun with refine 5, now it is 0" in errors) == (1, True)


@pytest.mark.follows("; then go on with --resume")
def test_a_disk_that_fills_up_stops_cleanly(listed, network, tmp_path, capsys, monkeypatch):
    from ulae_rt.errors import DiskFull
    from ulae_rt.registration import result

    save, calls = result.save_image, []

    def full(image, path):
        calls.append(path)
        if len(calls) > 4:
            raise DiskFull(f"{path} cannot be written: the disk is full", "free some of it")
        save(image, path)

    flags = (listed, "-o", tmp_path / "out", "--affine", "none", "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(result, "save_image", full)
        status, errors = call(capsys, *flags)
    assert (status, "the disk is full" in errors) == (1, True)
    assert "; then go on with --resume" in errors
    assert call(capsys, *flags, "--resume")[0] == 1  # the two bad ones
    rows = {row.id: row.status for row in read_results(tmp_path / "out")}
    assert sorted(id_ for id_, status in rows.items() if status == "failed") == sorted(BAD)
    assert len(rows) == 9


def test_memory_is_flat_in_the_number_of_calls():
    """A registrar that is kept warm holds on to nothing of the pairs it has seen."""
    script = """
import resource, sys
sys.path.insert(0, {tests!r})
import numpy as np
from _support.networks import FakeNetwork
from ulae_rt.registration import registrar as module
module.pose_of = lambda _: None
registrar = module.Registrar(FakeNetwork(), affine="none")
image = np.zeros((60, 70, 60), np.float32)
image[5:-5, 5:-5, 5:-5] = np.random.default_rng(0).random((50, 60, 50)) + 1
def peak(calls):
    for _ in range(calls):
        registrar((image, np.eye(4)), (image + 1e-3, np.eye(4)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(4), peak(16))
"""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script.format(tests=tests)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    # One pair's images are 10 MB; 1 KB blocks.
    assert after - before < 10_000


def test_a_registrar_serves_several_threads(listed):
    from concurrent.futures import ThreadPoolExecutor

    registrar = Registrar(FakeNetwork(shift=(0.5, 0, 0)), affine="none")
    scans = [listed.parent / f"{name}.nii.gz" for name in ("RAS", "LIA", "oblique")]
    pairs = [(moving, fixed) for moving in scans for fixed in scans if moving != fixed]
    alone = [registrar(*pair).warp.disp for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: registrar(*pair).warp.disp, pairs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def one(listed):
    """A list of one pair, and how it is registered quickly."""
    (listed.parent / "one.csv").write_text("id,moving,fixed\na,LIA.nii.gz,RAS.nii.gz\n")
    return (listed.parent / "one.csv", "--affine", "none")


@pytest.mark.follows("add warp or inverse_warp to --outputs, or leave --warp-format out")
@pytest.mark.parametrize("remedy", ["warp", "inverse_warp", None])
def test_a_format_of_no_warp_gets_a_warp_or_is_left_out(one, network, tmp_path, capsys, remedy):
    flags = [*one, "-o", tmp_path / "out", "--outputs", "moved"]
    status, errors = call(capsys, *flags, "--warp-format", "ras")
    assert (status, "hint: add warp or inverse_warp to --outputs" in errors) == (2, True)
    if remedy:
        assert call(capsys, *flags, remedy, "--warp-format", "ras")[0] == 0
        assert (tmp_path / "out" / "pairs" / "a" / f"{remedy}.nii.gz").exists()
    else:
        assert call(capsys, *flags)[0] == 0


@pytest.mark.follows("fill the column moving_labels of the list, or add moved or warp to --outputs")
@pytest.mark.parametrize("labelled", [0, 1])
def test_labels_alone_of_pairs_without_labels_are_refused(
    listed, network, tmp_path, capsys, labelled
):
    path = listed.parent / "bare.csv"
    lines = ["id,moving,fixed,moving_labels"]
    lines += [f"p{n},LIA.nii.gz,RAS.nii.gz," + "LIA.nii.gz" * (n < labelled) for n in range(2)]
    path.write_text("\n".join(lines))
    flags = (path, "--affine", "none", "--outputs", "moved_labels")
    status, errors = call(capsys, *flags, "-o", tmp_path / "o")
    assert status == 2
    assert f"writes nothing for {2 - labelled} of 2 pairs, which have no moving_labels: p" in errors
    assert "hint: fill the column moving_labels" in errors
    assert not (tmp_path / "o").exists()
    for kind in ("moved", "warp"):
        assert call(capsys, *flags, kind, "-o", tmp_path / kind)[0] == 0
        assert (tmp_path / kind / "pairs" / "p1" / f"{kind}.nii.gz").exists()
    full = [f"p{n},LIA.nii.gz,RAS.nii.gz,LIA.nii.gz" for n in range(2)]
    path.write_text("\n".join([lines[0], *full]))
    assert call(capsys, *flags, "-o", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / "pairs" / "p1" / "moved_labels.nii.gz").exists()


@pytest.mark.follows("says why; mend them and give --resume")
def test_a_pair_that_failed_is_mended_and_gone_on_with(one, listed, network, tmp_path, capsys):
    scan = listed.parent / "late.nii.gz"
    one[0].write_text("id,moving,fixed\na,LIA.nii.gz,RAS.nii.gz\nb,late.nii.gz,RAS.nii.gz\n")
    flags = (*one, "-o", tmp_path / "out")
    status, errors = call(capsys, *flags)
    assert status == 1
    where = tmp_path / "out" / "results.jsonl"
    assert f"hint: {where} says why; mend them and give --resume" in errors
    assert "late.nii.gz does not exist" in where.read_text()
    save_brain(scan, *GEOMETRIES["LIA"])
    assert call(capsys, *flags, "--resume")[0] == 0
    assert {row.status for row in read_results(where)} == {"done"}
    scan.unlink()


@pytest.mark.follows("see 'ulae-rt doctor'")
def test_a_network_that_fails_every_pair_sends_to_the_doctor(
    listed, network, tmp_path, capsys, monkeypatch
):
    flags = (listed, "-o", tmp_path / "out", "--affine", "none")
    network.answer = RuntimeError("no such kernel")
    status, errors = call(capsys, *flags)
    assert status == 1
    assert "pairs one after the other" in errors
    assert "hint: see 'ulae-rt doctor'; then go on with --resume" in errors
    monkeypatch.setattr("ulae_rt.doctor._gpus", lambda: [])
    assert main(["doctor"]) == 0
    assert "--backend torch" in capsys.readouterr().out
    network.answer = None
    assert call(capsys, *flags, "--resume")[0] == 1
    assert {row.id for row in read_results(tmp_path / "out") if row.status == "failed"} == set(BAD)


def page_of(capsys, *flags):
    main(["batch", *map(str, flags), "--pictures", "1"])
    capsys.readouterr()
    return (Path(flags[-1]) / "summary.html").read_text()


@pytest.mark.follows("its warp was not kept: add warp to --outputs")
def test_a_pair_without_a_warp_gets_a_picture_with_one(one, network, tmp_path, capsys):
    page = page_of(capsys, *one, "--outputs", "moved", "-o", tmp_path / "without")
    assert "No picture: its warp was not kept: add warp to --outputs" in page
    assert "data:image" not in page
    page = page_of(capsys, *one, "--outputs", "moved", "warp", "-o", tmp_path / "with")
    assert "data:image" in page


@pytest.mark.follows("register the pair again, into another folder")
def test_a_scan_that_was_replaced_is_registered_again(network, tmp_path, capsys):
    moving, fixed = (tmp_path / f"{name}.nii.gz" for name in ("moving", "fixed"))
    for path in (moving, fixed):
        save_brain(path, *GEOMETRIES["RAS"])
    (tmp_path / "pairs.csv").write_text(f"id,moving,fixed\na,{moving},{fixed}\n")
    flags = (tmp_path / "pairs.csv", "--affine", "none")
    assert "data:image" in page_of(capsys, *flags, "-o", tmp_path / "first")
    save_brain(fixed, *GEOMETRIES["LIA"])
    page = page_of(capsys, *flags, "--resume", "-o", tmp_path / "first")
    assert "(register the pair again, into another folder)" in page
    assert "data:image" in page_of(capsys, *flags, "-o", tmp_path / "second")
