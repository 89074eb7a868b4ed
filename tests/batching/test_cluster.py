"""A list on a cluster: the same files as on one machine, whoever dies."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from _support import engines
from _support.brains import GEOMETRIES, save_brain
from _support.networks import FakeNetwork
from ulae_rt.batching import cluster
from ulae_rt.batching.cluster import ATTEMPTS, Cluster, Share, _Worker
from ulae_rt.batching.pairs import Pair
from ulae_rt.batching.pipeline import Wanted
from ulae_rt.batching.results import ResultsFolder, Row, read_results
from ulae_rt.cli import run_command
from ulae_rt.errors import BackendUnavailable, EngineMismatch, UsageError
from ulae_rt.manifest import EngineMetadata
from ulae_rt.options import NetworkOptions
from ulae_rt.registration.registrar import Registrar

pytestmark = pytest.mark.usefixtures("upright")

BIG, SMALL = {"CPU": 16.0, "memory": 1e9}, {"CPU": 6.0}
GPUS = {"CPU": 32.0, "GPU": 4.0}
HEAD = {"CPU": 0.0, "memory": 1e9}
TOKEN = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("machines", "on_gpu", "cpus", "expected"),
    [
        ([BIG], True, None, Share(1, 16, 0)),
        ([BIG, SMALL, HEAD], True, None, Share(1 * 2 + 1, 6, 0)),
        ([BIG, SMALL], True, 4, Share(4 + 1, 4, 0)),
        ([GPUS, BIG], True, None, Share(4, 8, 1)),
        ([GPUS, {"CPU": 4.0, "GPU": 2.0}], True, None, Share(4 + 2, 2, 1)),
        ([GPUS], True, 16, Share(2, 16, 1)),
        ([GPUS], False, None, Share(1, 32, 0)),
    ],
)
def test_a_worker_for_each_gpu_or_machine(machines, on_gpu, cpus, expected):
    assert Share.of(machines, on_gpu, cpus) == expected


@pytest.mark.parametrize(("machines", "cpus"), [([HEAD], None), ([SMALL], 7), ([], None)])
def test_a_cluster_without_room(machines, cpus):
    with pytest.raises(BackendUnavailable, match="no machine of the Ray cluster has") as caught:
        Share.of(machines, True, cpus)
    assert "--workers" in caught.value.hint


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match="ray is not installed") as caught:
        Cluster("local", Opener(), workers=None, batch_size=None)
    assert caught.value.hint == "pip install 'ulae-rt[ray]'"


def test_an_address_that_nothing_answers_at():
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(BackendUnavailable, match=f"nothing answers at {address}"),
            Cluster(address, Opener(), workers=None, batch_size=None),
        ):
            pass


@pytest.mark.parametrize("address", ["pairs.csv", "head", "head:", ":6379", "head:99999"])
def test_an_address_that_is_none(address):
    pytest.importorskip("ray")
    with (
        pytest.raises(UsageError, match=f"--ray is '{address}', expected HOST:PORT, auto"),
        Cluster(address, Opener(), workers=None, batch_size=None),
    ):
        pass


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for name in ("RAS", "LIA", "oblique"):
        save_brain(folder / f"{name}.nii.gz", *GEOMETRIES[name])
    rows = [f"p{n},LIA.nii.gz,{('RAS', 'oblique')[n % 2]}.nii.gz" for n in range(7)]
    rows.insert(3, "bad,none.nii.gz,RAS.nii.gz")
    (folder / "pairs.csv").write_text("\n".join(["id,moving,fixed", *rows]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "SHAPE", (48, 64, 48))
        metadata = EngineMetadata("paper", engines.SHAPE, 2.0, "p99.9", "none", "CC0")
        engines.write_engine(folder / "engine", metadata=metadata)
    return folder


@dataclass
class Opener:
    answer: BaseException | None = None
    on_gpu = False

    def open(self):
        return Registrar(FakeNetwork(answer=self.answer), affine="none")


def pairs_of(scans, count):
    return [Pair(f"p{n}", scans / "LIA.nii.gz", scans / "RAS.nii.gz") for n in range(count)]


@pytest.fixture
def folder(tmp_path):
    with ResultsFolder(tmp_path / "out", None, {}) as folder:
        yield folder


def ask(worker, pairs):
    files = {pair.id: {name: str(path) for name, path in pair.paths().items()} for pair in pairs}
    answer = worker({"pairs": [json.dumps(files)]})
    return [Row.from_json(row) for row in json.loads(answer["rows"][0])], answer["error"][0]


def worker_of(folder, opener=None):
    return _Worker(opener or Opener(), folder.of_worker(""), Wanted(("moved",)), 2, None)


def test_what_another_worker_completed_is_taken_over(scans, folder):
    pairs = pairs_of(scans, 3)
    first, _ = ask(worker_of(folder), pairs[:2])
    written = [(folder.path / row.outputs["moved"]).stat().st_mtime_ns for row in first]
    again, error = ask(worker_of(folder), pairs)
    assert error == b""
    assert again[:2] == sorted(first, key=lambda row: row.id)
    assert [row.status for row in again] == ["done"] * 3
    now = [(folder.path / row.outputs["moved"]).stat().st_mtime_ns for row in first]
    assert now == written


def test_a_pair_that_kills_its_workers_is_given_up_and_no_other(scans, folder, monkeypatch):
    pairs = pairs_of(scans, 4)

    class Died(BaseException):
        """SIGKILL, as far as a process can live through it."""

    class Deadly(Registrar):
        def prepare(self, moving, fixed, *, labels=None):
            if moving.name == "deadly.nii.gz":
                raise Died
            return super().prepare(moving, fixed, labels=labels)

    deadly = Pair("deadly", scans / "deadly.nii.gz", scans / "RAS.nii.gz")
    block = [*pairs[:2], deadly, *pairs[2:]]
    monkeypatch.setattr(Opener, "open", lambda _: Deadly(FakeNetwork(), affine="none"))
    for _ in range(ATTEMPTS):
        with pytest.raises(Died):
            ask(worker_of(folder), block)
    rows, error = ask(worker_of(folder), block)
    assert error == b""
    assert {row.id: row.status for row in rows} == {
        **dict.fromkeys(("p0", "p1", "p2", "p3"), "done"), "deadly": "failed",
    }  # fmt: skip
    failed = next(row for row in rows if row.status == "failed")
    assert failed.error == f"its worker died {ATTEMPTS} times"
    assert failed.pair == deadly


def test_what_stops_a_worker_comes_with_the_rows_that_are_there(scans, folder):
    pairs = pairs_of(scans, 9)
    rows, _ = ask(worker_of(folder), pairs[:1])
    answer, error = ask(worker_of(folder, Opener(EngineMismatch("CUDA is gone", "restart"))), pairs)
    assert rows[0] in answer
    assert {row.status for row in answer} == {"done", "failed"}
    found = pickle.loads(error)  # noqa: S301 - the worker of this test wrote it
    assert isinstance(found, EngineMismatch)
    assert "CUDA is gone" in str(found)
    assert found.hint == "restart"


def test_a_stop_reaches_workers(scans, folder):
    folder.stop_file.touch()
    assert ask(worker_of(folder), pairs_of(scans, 3)) == ([], b"")


@pytest.fixture(scope="module")
def here(scans, tmp_path_factory):
    out = tmp_path_factory.mktemp("here") / "out"
    assert run_command("batch", arguments(scans, out)) == 1  # one pair is bad
    return out


def arguments(scans, out, *more):
    engine = ["--engine", str(scans / "engine"), "--affine", "none"]
    return [str(scans / "pairs.csv"), "-o", str(out), *engine, *more]


class OnRay:
    """A run on a Ray of its own, with two workers; no process of it may be left."""

    home: ClassVar[dict[str, str]] = {}

    def __init__(self, scans, out):
        pytest.importorskip("ray")
        # Not pytest's folder: names of sockets may have 107 characters.
        self.folder = tempfile.mkdtemp(prefix="ray-")
        self.command = [sys.executable, "-P", "-m", "ulae_rt.batch"]
        self.command += arguments(scans, out, "--workers", "1", "--ray")

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command,
            env={
                **os.environ,
                "RAY_TMPDIR": self.folder,
                "RAY_ADDRESS": "nowhere:1",
                **self.home,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def left(self):
        found = {}
        for each in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.folder.encode() in each.read_bytes():
                    found[int(each.parent.name)] = (each.parent / "cmdline").read_text()[:80]
            except OSError:
                pass  # it has ended, or is another user's
        return found

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        until = time.monotonic() + 30
        while (left := self.left()) and time.monotonic() < until:
            time.sleep(0.2)
        for number in left:
            os.kill(number, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left


class Head(OnRay):
    """What the hint starts; ``--block`` keeps it where it can be ended without `ray stop`."""

    def __init__(self):
        pytest.importorskip("ray")
        self.folder = tempfile.mkdtemp(prefix="ray-")
        # A user who has run Ray before has a token, and a Ray that wants it.
        self.home = {"HOME": self.folder}
        (Path(self.folder) / ".ray").mkdir()
        (Path(self.folder) / ".ray" / "auth_token").write_text(TOKEN)
        start = "from ray.scripts.scripts import main; main()"
        self.command = [sys.executable, "-P", "-c", start, "start", "--head", "--block"]
        self.command += ["--port", "0", "--num-cpus", "2", "--include-dashboard", "false"]
        self.command += ["--object-store-memory", "100000000"]

    def __exit__(self, *_):
        for number in self.left():  # nothing else ends all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        super().__exit__()

    def address(self):
        """As it says it."""
        for line in self.process.stdout:
            if said := re.search(r"--address='([^']+)'", line):
                return said[1]
        pytest.fail(f"it says no address: {self.process.stderr.read()[-2000:]}")


@pytest.mark.slow
@pytest.mark.follows("'ray start --head' says the address", "give --ray auto on its own machine; ")
def test_a_ray_that_runs_is_found_at_the_address_it_says(scans, here, tmp_path):
    with Head() as head:

        def batch(address, name, **more):
            command = [sys.executable, "-P", "-m", "ulae_rt.batch"]
            command += arguments(scans, tmp_path / name, "--workers", "1", "--ray", address)
            environment = {**os.environ, "RAY_TMPDIR": head.folder, **head.home, **more}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=180
            )
            return done.returncode, done.stderr

        status, said = batch("head", "none")
        assert (status, "hint: 'ray start --head' says the address" in said) == (2, True)
        address = head.address()
        status, said = batch(address, "refused")
        assert status == 1
        assert "hint: give --ray auto on its own machine; elsewhere set RAY_AUTH_MODE=token" in said
        _, said = batch("auto", "auto")
        assert "error: 1 of 8 pairs failed: bad" in said
        elsewhere = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        _, said = batch(address, "token", **elsewhere)
        assert "error: 1 of 8 pairs failed: bad" in said
    assert_same(tmp_path / "auto", here)
    assert_same(tmp_path / "token", here)


def wait_for(found, run, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until and run.process.poll() is None:
        if answer := found():
            return answer
        time.sleep(0.002)
    pytest.fail(f"ended, or nothing happened: {run.process.stderr.read()[-2000:]}")


def assert_same(out, here):
    lines = (out / "results.jsonl").read_text().splitlines()
    expected = {row.id: row for row in read_results(here)}
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(expected)
    for row in read_results(out):
        same = expected[row.id]
        assert (row.status, row.outputs, row.error) == (same.status, same.outputs, same.error)
        assert row.similarity_after == same.similarity_after
        for path in row.outputs.values():
            assert (out / path).read_bytes() == (here / path).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in here.iterdir())
    assert json.loads((out / "run.json").read_text()) == json.loads((here / "run.json").read_text())


@pytest.mark.slow  # a Ray takes ten seconds to start
def test_a_worker_that_is_killed_changes_nothing(scans, here, tmp_path):
    out = tmp_path / "out"
    with OnRay(scans, out) as run:

        def kill() -> str:
            for begun in (out / ".part").glob(".begun-p*"):
                if found := re.fullmatch(r".*-(\d+)\n", begun.read_text()):
                    os.kill(int(found[1]), signal.SIGKILL)
                    return begun.name.partition("begun-")[2]
            return ""

        killed = wait_for(kill, run)
        assert not (out / "pairs" / killed).exists()  # it was in hand
        begun = out / ".part" / f".begun-{killed}"
        workers = wait_for(lambda: set(texts(begun)) if len(texts(begun)) > 1 else None, run)
        assert len(workers) == 2  # another began it again
        said, complained = run.process.communicate(timeout=120)
        assert run.process.returncode == 1, complained
        assert "8, 0 of them done already" in said
        assert "error: 1 of 8 pairs failed: bad" in complained
    assert_same(out, here)


def texts(path):
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_nothing_and_goes_on(scans, here, tmp_path):
    out = tmp_path / "out"
    with OnRay(scans, out) as run:
        wait_for(lambda: list((out / ".part").glob(".begun-*")), run)
        run.process.send_signal(signal.SIGTERM)
        _, complained = run.process.communicate(timeout=120)
        assert run.process.returncode == 1
        assert "error: stopped: " in complained
        assert "Traceback" not in complained
    assert not (out / ".part").exists()
    finished = {path.name for path in (out / "pairs").iterdir()}
    assert finished == {row.id for row in read_results(out) if row.status == "done"}
    assert len(finished) < 7
    assert run_command("batch", arguments(scans, out, "--resume")) == 1
    assert_same(out, here)


class PretendedRay:
    """A cluster whose workers are this process, as far as `Cluster` asks.

    Args:
        machines: resources of each, as ``ray.nodes()`` says them.
        dies_after: blocks, after which it gives up; None: never.
    """

    def __init__(self, machines, dies_after=None):
        self.machines, self.dies_after = machines, dies_after
        self.addresses, self.shares = [], []
        self.data = self.exceptions = self
        self.RayError = type("RayError", (Exception,), {})
        self.DataContext = SimpleNamespace(get_current=SimpleNamespace)

    def init(self, address, **_):
        if not self.machines:
            raise ConnectionError("no Ray here")
        self.addresses.append(address)

    def nodes(self):
        return [{"Resources": each, "Alive": True} for each in self.machines]

    def shutdown(self):
        pass

    def remote(self, **_):
        return lambda function: SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *arguments: function(*arguments))
        )

    def get(self, answer):
        return answer

    def ActorPoolStrategy(self, **_):
        pass

    def from_items(self, items, **_):
        self.items = items
        return self

    def map_batches(self, worker, fn_constructor_args, num_gpus, num_cpus, **_):
        self.shares.append((num_cpus, num_gpus))
        self.worker = worker(*fn_constructor_args)
        return self

    def iter_batches(self, **_):
        for number, item in enumerate(self.items):
            if number == self.dies_after:
                raise self.RayError("a machine is gone")
            yield self.worker({"pairs": [item["pairs"]]})


@pytest.fixture
def on_ray(scans, tmp_path, monkeypatch, capsys):
    """`ulae-rt batch` of two pairs on a pretended Ray: its status, and what it says."""
    pairs = tmp_path / "pairs.csv"
    lines = [f"p{n},{scans / 'LIA.nii.gz'},{scans / 'RAS.nii.gz'}" for n in range(2)]
    pairs.write_text("\n".join(["id,moving,fixed", *lines]))
    monkeypatch.setattr(NetworkOptions, "open", lambda _: Registrar(FakeNetwork(), affine="none"))

    def run(ray, *more):
        monkeypatch.setattr(cluster, "require", lambda *_: ray)
        flags = ["-o", str(tmp_path / "out"), "--outputs", "moved", "--pictures", "0"]
        status = run_command("batch", [str(pairs), *flags, *more])
        return status, capsys.readouterr().err

    return run


def assert_all_done(folder):
    assert [row.status for row in read_results(folder)] == ["done"] * 2


@pytest.mark.follows("give fewer --workers, or start Ray with more --num-cpus")
def test_room_is_made_with_fewer_workers_or_more_processors(on_ray, tmp_path):
    status, said = on_ray(PretendedRay([SMALL]), "--ray", "auto", "--workers", "7")
    assert status == 1
    assert "hint: give fewer --workers, or start Ray with more --num-cpus" in said
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert on_ray(PretendedRay([SMALL]), "--ray", "auto", "--workers", "3")[0] == 0
    assert_all_done(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert on_ray(PretendedRay([BIG]), "--ray", "auto", "--workers", "7")[0] == 0
    assert_all_done(tmp_path / "out")


@pytest.mark.follows("or give --ray without an address")
def test_without_an_address_a_ray_of_its_own_is_started(on_ray, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, said = on_ray(PretendedRay([SMALL]), "--ray", address)
    assert status == 1
    assert "hint: start it with 'ray start --head', or give --ray without an address" in said
    ray = PretendedRay([SMALL])
    assert on_ray(ray, "--ray")[0] == 0
    assert ray.addresses == ["local"]
    assert_all_done(tmp_path / "out")


@pytest.mark.follows(
    "Ray's logs may say why; or start one with 'ray start --head' and give --ray auto"
)
def test_where_no_ray_can_be_started_one_that_runs_is_taken(on_ray, tmp_path):
    status, said = on_ray(PretendedRay([]), "--ray")
    assert status == 1
    assert "hint: Ray's logs may say why; or start one with 'ray start --head' and give" in said
    assert on_ray(PretendedRay([SMALL]), "--ray", "auto")[0] == 0
    assert_all_done(tmp_path / "out")


@pytest.mark.follows("Ray's logs may say why; go on with --resume")
def test_a_ray_that_gave_up_is_gone_on_with(on_ray, tmp_path):
    status, said = on_ray(PretendedRay([SMALL], dies_after=1), "--ray")
    assert status == 1
    assert "error: Ray gave up: a machine is gone" in said
    assert "hint: Ray's logs may say why; go on with --resume" in said
    assert len(read_results(tmp_path / "out")) == 1
    assert on_ray(PretendedRay([SMALL]), "--ray", "--resume")[0] == 0
    assert_all_done(tmp_path / "out")


@pytest.mark.follows("give --device cuda")
def test_which_gpu_a_worker_has_is_left_to_ray(on_ray, tmp_path):
    ray = PretendedRay([GPUS])
    status, said = on_ray(ray, "--ray", "--device", "cuda:1")
    assert (status, "hint: give --device cuda\n" in said) == (2, True)
    assert on_ray(ray, "--ray", "--device", "cuda")[0] == 0
    assert ray.shares == [(8, 1)]
    assert_all_done(tmp_path / "out")
