"""Many pairs at once: none lost, none twice, never more than a few in memory."""

import threading
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from _support.brains import GEOMETRIES, save_brain
from _support.networks import FakeNetwork
from ulae_rt.batching.pairs import Pair
from ulae_rt.batching.pipeline import NETWORK_FAILURES, Pipeline, Wanted, grouped
from ulae_rt.batching.results import ResultsFolder
from ulae_rt.errors import DiskFull, EngineMismatch
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for name in ("RAS", "LIA", "oblique", "anisotropic"):
        save_brain(folder / f"{name}.nii.gz", *GEOMETRIES[name])
    labels = nib.load(folder / "LIA.nii.gz")
    values = (np.asarray(labels.dataobj) > 60).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, labels.affine), folder / "labels.nii.gz")
    (folder / "cut.nii.gz").write_bytes((folder / "LIA.nii.gz").read_bytes()[:5000])
    return folder


def pairs_of(scans, count, fixed="RAS", moving="LIA"):
    return [
        Pair(f"p{i}", scans / f"{moving}.nii.gz", scans / f"{fixed}.nii.gz") for i in range(count)
    ]


class Batches(FakeNetwork):
    """Takes its time, and remembers how many pairs came at once."""

    at_once = 4

    def __init__(self, seconds=0.0, **more):
        super().__init__(**more)
        self.seconds, self.sizes = seconds, []

    def displacement(self, moving, fixed):
        self.sizes.append(len(moving))
        time.sleep(self.seconds)
        return super().displacement(moving, fixed)


def run(tmp_path, pairs, network=None, stop=None, batch_size=1, wanted=None, workers=2):
    registrar = Registrar(network or FakeNetwork(), affine="none")
    with ResultsFolder(tmp_path / "out", None, {}) as folder:
        folder.begin(pairs, resume=True)
        pipeline = Pipeline(
            registrar, folder, wanted or Wanted(), workers=workers, batch_size=batch_size
        )
        rows = []
        for row in pipeline.run(pairs, stop or threading.Event()):
            folder.add(row)
            rows.append(row)
    return {row.id: row for row in rows}, pipeline


def test_every_pair_gets_its_files_and_its_row(scans, tmp_path):
    pairs = [
        Pair("near", scans / "LIA.nii.gz", scans / "RAS.nii.gz", scans / "labels.nii.gz"),
        Pair("far", scans / "oblique.nii.gz", scans / "anisotropic.nii.gz"),
    ]
    wanted = Wanted(("warp", "inverse_warp", "moved", "moved_labels", "jacobian"), "ras")
    network = FakeNetwork(shift=(0.5, 0.25, -0.5))
    rows, _ = run(tmp_path, pairs, network, wanted=wanted)
    registrar = Registrar(network, affine="none")
    for pair in pairs:
        row = rows[pair.id]
        kinds = [kind for kind in wanted.outputs if kind != "moved_labels" or pair.moving_labels]
        assert row.outputs == {kind: f"pairs/{pair.id}/{kind}.nii.gz" for kind in kinds}
        alone = registrar(pair.moving, pair.fixed, labels=pair.moving_labels)
        expected = tmp_path / pair.id
        expected.mkdir()
        files = {kind: expected / f"{kind}.nii.gz" for kind in kinds}
        alone.save(**files, warp_format="ras")
        for kind, path in files.items():
            assert (tmp_path / "out" / row.outputs[kind]).read_bytes() == path.read_bytes()
        assert row.similarity_after == alone.stats.similarity_after
        assert row.folding_percent == alone.stats.folding_percent
        np.testing.assert_array_equal(row.affine, alone.affine)
        assert row.inverse_consistency_mm == alone.inverse_consistency.mean_mm
        assert {"read", "affine", "preprocess", "network", "warp", "write"} <= row.seconds.keys()
        assert row.pair == pair
        assert row.finished
        assert row.host
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".lock", "results.jsonl", "run.json", "pairs"}


def test_bad_pairs_among_good_ones(scans, tmp_path):
    good = pairs_of(scans, 3)
    bad = [
        replace(good[0], id="missing", moving=scans / "none.nii.gz"),
        replace(good[0], id="cut", fixed=scans / "cut.nii.gz"),
        replace(good[0], id="cut too", fixed=scans / "cut.nii.gz"),
        replace(good[0], id="fractions", moving_labels=tmp_path / "half.nii.gz"),
    ]
    half = nib.Nifti1Image(np.full((9, 9, 9), 0.5, np.float32), np.eye(4))
    nib.save(half, tmp_path / "half.nii.gz")
    rows, _ = run(tmp_path, [bad[0], good[0], bad[1], good[1], bad[2], bad[3], good[2]])
    assert len(rows) == 7
    assert {row.id for row in rows.values() if row.status == "done"} == {"p0", "p1", "p2"}
    assert rows["missing"].error.endswith("none.nii.gz does not exist")
    assert rows["missing"].hint == "check the path"
    assert "is truncated or damaged" in rows["cut"].error
    assert rows["cut too"].error == rows["cut"].error
    assert "holds fractions, expected whole-number labels" in rows["fractions"].error
    assert not any(row.traceback for row in rows.values())
    assert {p.name for p in (tmp_path / "out" / "pairs").iterdir()} == {"p0", "p1", "p2"}


def test_warnings_are_the_pairs_own(scans, tmp_path, caplog):
    pairs = pairs_of(scans, 2)
    same = replace(pairs[0], id="same", moving=pairs[0].fixed)
    rows, _ = run(tmp_path, [*pairs, same])
    assert [row.warnings for row in rows.values() if row.id != "same"] == [[], []]
    assert rows["same"].warnings == [
        "moving and fixed are the same image: there is nothing to align"
    ]
    assert not caplog.records  # the terminal has a progress bar


def test_what_is_said_of_a_shared_scan_is_said_of_each_pair(scans, tmp_path):
    image = nib.load(scans / "RAS.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 5
    image.set_qform(moved, code=1)
    nib.save(image, tmp_path / "two.nii.gz")
    rows, _ = run(tmp_path, [replace(p, fixed=tmp_path / "two.nii.gz") for p in pairs_of(scans, 3)])
    assert ["sform and qform differ" in row.warnings[0] for row in rows.values()] == [True] * 3


def test_the_network_is_given_full_batches(scans, tmp_path, monkeypatch):
    prepared, prepare = threading.Semaphore(0), Registrar.prepare

    def counted(self, *arguments, **more):
        pair = prepare(self, *arguments, **more)
        prepared.release()
        return pair

    class Held(Batches):
        """Its first run takes until a full batch has been prepared beside it."""

        def displacement(self, moving, fixed):
            if not self.sizes:
                for _ in range(min(len(moving) + 4, 7)):  # seven are prepared ahead at most
                    assert prepared.acquire(timeout=60)
                time.sleep(0.2)  # from prepared to handed over
            return super().displacement(moving, fixed)

    monkeypatch.setattr(Registrar, "prepare", counted)
    network = Held()
    rows, _ = run(tmp_path, pairs_of(scans, 12), network, batch_size=4, workers=3)
    assert {row.status for row in rows.values()} == {"done"}
    assert sum(network.sizes) == 12
    assert max(network.sizes) == 4


def test_a_pair_that_spoils_a_batch_fails_alone(scans, tmp_path):
    class Spoilt(Batches):
        def displacement(self, moving, fixed):
            super().displacement(moving, fixed)
            if (fixed.shape[0] > 1) or (self.sizes.count(1) == 2):
                raise EngineMismatch("failed running it", "try again")
            return FakeNetwork.displacement(self, moving, fixed)

    rows, _ = run(tmp_path, pairs_of(scans, 4), Spoilt(seconds=0.3), batch_size=4)
    failed = [row for row in rows.values() if row.status == "failed"]
    assert len(rows) == 4
    assert [(row.error, row.hint) for row in failed] == [("failed running it", "try again")]


def test_a_network_that_always_fails_stops_the_run(scans, tmp_path):
    network = FakeNetwork(answer=EngineMismatch("CUDA is gone", "restart"))
    with pytest.raises(EngineMismatch, match=f"failed {NETWORK_FAILURES} pairs .*: CUDA is gone"):
        run(tmp_path, pairs_of(scans, 9), network)


def test_a_fault_that_is_not_the_files_has_its_traceback(scans, tmp_path, monkeypatch):
    def fault(*_, **__):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("ulae_rt.registration.registrar.finish", fault)
    rows, _ = run(tmp_path, pairs_of(scans, 1))
    assert rows["p0"].error == "ZeroDivisionError: oh"
    assert "in fault" in rows["p0"].traceback
    assert "report it" in rows["p0"].hint


def test_a_full_disk_stops_the_run(scans, tmp_path, monkeypatch):
    from ulae_rt.registration import result

    save, calls = result.save_image, []

    def full(image, path):
        calls.append(path)
        if len(calls) > 3:
            raise DiskFull("the disk is full", "free some of it")
        save(image, path)

    monkeypatch.setattr(result, "save_image", full)
    with pytest.raises(DiskFull):
        run(tmp_path, pairs_of(scans, 20), workers=1)
    assert len(calls) < 20
    done = sorted((tmp_path / "out" / "pairs").iterdir())
    assert [path.name for path in done] == ["p0", "p1", "p2"]  # the moved images of three fit
    for path in done:
        assert {p.name for p in path.iterdir()} == {"moved.nii.gz", "result.json", "warp.nii.gz"}


def test_stopping_finishes_what_is_in_hand(scans, tmp_path):
    stop = threading.Event()

    class Stopping(FakeNetwork):
        def displacement(self, moving, fixed):
            stop.set()
            return super().displacement(moving, fixed)

    rows, _ = run(tmp_path, pairs_of(scans, 50), Stopping(), stop)
    assert 1 <= len(rows) <= 6
    assert all(row.status == "done" for row in rows.values())
    assert len(list((tmp_path / "out" / "pairs").iterdir())) == len(rows)


def test_no_more_pairs_in_memory_however_long_the_list(scans, tmp_path):
    alive, most = 0, 0
    lock = threading.Lock()

    class Counting(Registrar):
        def prepare(self, *arguments, **more):
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return super().prepare(*arguments, **more)

    registrar = Counting(Batches(seconds=0.01), affine="none")
    pairs = pairs_of(scans, 30)
    with ResultsFolder(tmp_path, None, {}) as folder:
        folder.begin(pairs, resume=False)
        pipeline = Pipeline(registrar, folder, Wanted(("moved",)), workers=2, batch_size=2)
        for _ in pipeline.run(pairs, threading.Event()):
            with lock:
                alive -= 1
    assert most <= 2 * (2 + 2) + 2


def test_pairs_of_one_fixed_scan_read_it_once(scans, tmp_path, monkeypatch):
    read = []
    registrar = Registrar(FakeNetwork(), affine="none")
    target = registrar.target
    monkeypatch.setattr(registrar, "target", lambda fixed: read.append(fixed.name) or target(fixed))
    pairs = [*pairs_of(scans, 6), *pairs_of(scans, 6, "LIA", "RAS")]
    pairs = grouped([replace(pair, id=f"p{n}") for n, pair in enumerate(pairs[::2] + pairs[1::2])])
    assert [pair.fixed.name for pair in pairs] == ["RAS.nii.gz"] * 6 + ["LIA.nii.gz"] * 6
    with ResultsFolder(tmp_path, None, {}) as folder:
        folder.begin(pairs, resume=False)
        pipeline = Pipeline(registrar, folder, Wanted(("moved",)), workers=2, batch_size=1)
        assert len(list(pipeline.run(pairs, threading.Event()))) == 12
    assert read == ["RAS.nii.gz", "LIA.nii.gz"]


def test_the_network_is_counted_idle_when_it_waits(scans, tmp_path, monkeypatch):
    prepare = Registrar.prepare

    def slow(self, *arguments, **more):
        time.sleep(0.5)
        return prepare(self, *arguments, **more)

    monkeypatch.setattr(Registrar, "prepare", slow)
    _, pipeline = run(tmp_path, pairs_of(scans, 4), workers=1)
    assert pipeline.usage.idle > 1.0
    assert pipeline.usage.busy < 0.5
