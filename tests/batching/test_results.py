"""The folder of a batch: what survives a kill, who may write, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ulae_rt.batching import results
from ulae_rt.batching.pairs import Pair, Shard
from ulae_rt.batching.results import ResultsFolder, Row, read_results
from ulae_rt.errors import DiskFull, OutputError, PairsError

SETTINGS = {"weights_sha256": "0", "affine": "none"}
PAIRS = [Pair(name, Path(f"/scans/{name}"), Path("/scans/f")) for name in "abc"]


def row_of(pair, status="done"):
    return Row(pair.id, status, {name: str(path) for name, path in pair.paths().items()})


FULL = Row(
    "a", "done", {"moving": "m", "fixed": "f"}, {"warp": "pairs/a/warp.nii.gz"}, {"read": 0.5},
    0.1, 0.9, 0.0, 0.2, 0.01, [[1.0, 0, 0, 0]] * 4, warnings=["cut <off>\n"], finished="2026",
    host="h",
)  # fmt: skip


def keep(folder, pair):
    (folder.part(pair) / "moved.nii.gz").write_bytes(b"image")
    folder.keep(row_of(pair))


def fill(path, pairs=PAIRS, shard=None):
    with ResultsFolder(path, shard, SETTINGS) as folder:
        folder.begin(pairs, resume=False)
        for pair in pairs:
            keep(folder, pair)
            folder.add(row_of(pair))
    return folder


def test_rows_come_back_as_they_were():
    assert Row.from_json(FULL.to_json()) == FULL
    assert "\n" not in FULL.to_json()
    for text in ("{}", "[]", "{", '{"id": "a", "status": "done", "inputs": {}, "more": 1}'):
        with pytest.raises(ValueError, match=r"no row of results|Expecting"):
            Row.from_json(text)


def test_a_killed_run_is_gone_on_with(tmp_path):
    with ResultsFolder(tmp_path, None, SETTINGS) as folder:
        assert folder.begin(PAIRS, resume=False) == []
        keep(folder, PAIRS[0])
        folder.add(row_of(PAIRS[0]))
        keep(folder, PAIRS[1])  # killed before its line
        folder.add(replace(row_of(PAIRS[2], "failed"), error="no file"))
        (folder.part(PAIRS[2]) / "moved.nii.gz").write_bytes(b"half")
        part = folder.part(PAIRS[2]).parent
        with open(folder.results, "a") as file:
            file.write('{"id": "c", "sta')  # a line cut off
    part.mkdir()  # a kill removes nothing
    (part / "c").mkdir()
    with ResultsFolder(tmp_path, None, SETTINGS) as folder:
        assert not (part / "c").exists()
        assert folder.begin(PAIRS, resume=True) == [row_of(PAIRS[0]), row_of(PAIRS[1])]
        keep(folder, PAIRS[2])
        folder.add(row_of(PAIRS[2]))
    assert read_results(tmp_path) == [row_of(pair) for pair in PAIRS]
    assert folder.results.read_text().count("\n") == 3
    assert not part.exists()


def test_results_are_not_overwritten(tmp_path):
    fill(tmp_path)
    with ResultsFolder(tmp_path, None, SETTINGS) as folder:
        with pytest.raises(OutputError, match="holds results already, of the pair a among"):
            folder.begin(PAIRS, resume=False)
        with pytest.raises(OutputError, match="holds results already"):
            folder.begin([Pair("new", Path("m"), Path("f"))], resume=False)
    assert len(read_results(tmp_path)) == 3


def test_another_pair_of_the_same_name_is_refused(tmp_path):
    fill(tmp_path)
    other = replace(PAIRS[1], fixed_labels=Path("/scans/labels"))
    said = r"pair b is done in .* with another fixed_labels: none"
    with (
        ResultsFolder(tmp_path, None, SETTINGS) as folder,
        pytest.raises(PairsError, match=said),
    ):
        folder.begin([PAIRS[0], other], resume=True)


def test_settings_must_stay(tmp_path):
    fill(tmp_path)
    with pytest.raises(PairsError, match="was begun with affine none, now it is com"):
        ResultsFolder(tmp_path, None, {**SETTINGS, "affine": "com"}).__enter__()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PairsError, match=r"run.json is damaged"):
        ResultsFolder(tmp_path, None, SETTINGS).__enter__()
    (tmp_path / "run.json").unlink()  # the lock was given back
    with ResultsFolder(tmp_path, None, SETTINGS):
        pass


def test_a_second_run_is_refused_and_shards_are_not(tmp_path):
    first, second = (ResultsFolder(tmp_path, Shard(i, 2), SETTINGS) for i in (1, 2))
    with first, second:
        with pytest.raises(OutputError, match="another run is writing"):
            ResultsFolder(tmp_path, Shard(2, 2), SETTINGS).__enter__()
        with pytest.raises(OutputError, match="another run is writing"):
            ResultsFolder(tmp_path, None, SETTINGS).__enter__()
        with pytest.raises(PairsError, match="was begun with shards 2, now it is 3"):
            ResultsFolder(tmp_path, Shard(3, 3), SETTINGS).__enter__()
    with ResultsFolder(tmp_path, None, SETTINGS), pytest.raises(OutputError, match="another run"):
        ResultsFolder(tmp_path, Shard(1, 2), SETTINGS).__enter__()


HOLD = """
import sys
from pathlib import Path
from ulae_rt.batching.results import ResultsFolder
with ResultsFolder(Path(sys.argv[1]), None, {"weights_sha256": "0", "affine": "none"}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run is writing"):
            ResultsFolder(tmp_path, None, SETTINGS).__enter__()
        other.kill()
    with ResultsFolder(tmp_path, None, SETTINGS):
        pass


def test_shards_are_read_together_and_gone_on_with_as_one(tmp_path):
    fill(tmp_path, PAIRS[::2], Shard(1, 2))
    with ResultsFolder(tmp_path, Shard(2, 2), SETTINGS) as folder:
        folder.begin(PAIRS[1:2], resume=False)
        folder.add(row_of(PAIRS[1], "failed"))
    names = {row.id: row.status for row in read_results(tmp_path)}
    assert names == {"a": "done", "b": "failed", "c": "done"}
    with ResultsFolder(tmp_path, None, SETTINGS) as folder:
        assert [row.id for row in folder.begin(PAIRS, resume=True)] == ["a", "c"]
        keep(folder, PAIRS[1])
        folder.add(row_of(PAIRS[1]))
    assert {row.status for row in read_results(tmp_path)} == {"done"}
    assert len(read_results(tmp_path)) == 3


def test_results_that_are_none(tmp_path):
    with pytest.raises(PairsError, match="holds no results"):
        read_results(tmp_path)
    with pytest.raises(PairsError, match="holds no results"):
        read_results(tmp_path / "results.jsonl")
    path = tmp_path / "results.jsonl"
    path.write_text(f"{row_of(PAIRS[0]).to_json()}\nnonsense\n{row_of(PAIRS[1]).to_json()}\n")
    with pytest.raises(PairsError, match="line 2: is no row of results"):
        read_results(path)
    path.write_text(row_of(PAIRS[0]).to_json() + "\n" + row_of(PAIRS[1]).to_json()[:-9])
    assert read_results(path) == [row_of(PAIRS[0])]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(_handle):
        raise OSError(28, "No space left on device")

    with ResultsFolder(tmp_path, None, SETTINGS) as folder:
        folder.begin(PAIRS, resume=False)
        monkeypatch.setattr(results.os, "fsync", full)
        with pytest.raises(DiskFull, match="the disk is full"):
            folder.add(row_of(PAIRS[0]))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        ResultsFolder(tmp_path / "file", None, SETTINGS).__enter__()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", 7), ("id", ""), ("id", "../a"), ("id", None), ("status", "fine"),
        ("status", ["done"]),
        ("inputs", None), ("inputs", ["m", "f"]),
        ("inputs", {"moving": "m", "fixed": 3}),
        ("inputs", {"moving": "m", "fixed": "f", "x": "y"}),
        ("outputs", ["warp"]), ("outputs", {"warp": None}), ("seconds", {"read": "1"}),
        ("seconds", 3), ("seconds", {"read": None}), ("similarity_before", "0.5"),
        ("similarity_after", True), ("folding_percent", [0]), ("lncc_refined", {}),
        ("affine", [[1, 0, 0, 0]]), ("affine", [["1", 0, 0, 0]] * 4), ("affine", "identity"),
        ("affine", [1, 2, 3, 4]), ("warnings", "cut off"), ("warnings", [3]), ("error", None),
        ("hint", 3), ("traceback", []), ("finished", 2026), ("host", {}),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_no_row(tmp_path, name, value):
    values = json.loads(FULL.to_json())
    Row.from_json(json.dumps(values))
    text = json.dumps({**values, name: value})
    with pytest.raises(ValueError, match=f"its {name} is "):
        Row.from_json(text)
    (tmp_path / "results.jsonl").write_text(f"{text}\n{FULL.to_json()}\n")
    with pytest.raises(PairsError, match=f"line 1: is no row of results: its {name} is"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "it is nested too deep"),
        ('{"id": "a", "id": "b"}', "the key 'id' is there twice"),
        ('{"id": "a", "status": "done", "inputs": {}, "folding_percent": NaN}', "NaN is no number"),
    ],
)
def test_json_that_is_doubtful_is_no_row(tmp_path, text, reason):
    (tmp_path / "results.jsonl").write_text(f"{text}\n{FULL.to_json()}\n")
    with pytest.raises(PairsError, match=f"line 1: is no row of results: {reason}"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"affine": NaN}', '{"a": 1, "a": 2}', "[]", "\xff"]
)
def test_settings_that_are_doubtful_are_damaged(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(PairsError, match=r"run\.json is damaged"):
        ResultsFolder(tmp_path, None, SETTINGS).__enter__()


def test_a_figure_that_is_not_finite_can_be_read_again():
    row = replace(FULL, similarity_before=float("nan"), lncc_network=float("inf"))
    again = Row.from_json(row.to_json())
    assert again == replace(FULL, similarity_before=None, lncc_network=None)


def test_results_of_two_runs_are_not_one(tmp_path):
    for count in (2, 3):
        (tmp_path / f"results-1-of-{count}.jsonl").write_text(FULL.to_json() + "\n")
    with pytest.raises(
        PairsError, match=r"results of two runs: results-1-of-2\.jsonl and"
    ) as caught:
        read_results(tmp_path)
    assert "into a folder of their own" in caught.value.hint
    (tmp_path / "own").mkdir()
    (tmp_path / "results-1-of-3.jsonl").rename(tmp_path / "own" / "results-1-of-3.jsonl")
    assert read_results(tmp_path) == read_results(tmp_path / "own") == [FULL]
    (tmp_path / "run.json").write_text('{"shards": 4}')
    with pytest.raises(PairsError, match=r"results-1-of-2\.jsonl, and its run had 4 shards"):
        read_results(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PairsError, match=r"run\.json is damaged"):
        read_results(tmp_path)


@pytest.mark.follows(
    "give --resume to do what is missing, or another folder",
    "give the folder that 'ulae-rt batch' wrote, or results.jsonl",
)
def test_hints_of_a_results_folder_work(tmp_path):
    place = tmp_path / "out"
    fill(place)
    with ResultsFolder(place, None, SETTINGS) as folder:
        with pytest.raises(OutputError) as caught:
            folder.begin(PAIRS, resume=False)
        assert caught.value.hint == "give --resume to do what is missing, or another folder"
        assert len(folder.begin(PAIRS, resume=True)) == 3
    fill(tmp_path / "another")
    other = [replace(PAIRS[0], fixed=Path("/scans/g"))]
    with ResultsFolder(place, None, SETTINGS) as folder:
        with pytest.raises(PairsError) as caught:
            folder.begin(other, resume=True)
        assert "give it another id in the list" in caught.value.hint
        assert folder.begin([replace(other[0], id="other")], resume=True) == []
    with pytest.raises(PairsError) as caught:
        ResultsFolder(place, None, {**SETTINGS, "affine": "com"}).__enter__()
    assert "go on with what it was begun with, or take another folder" in caught.value.hint
    with ResultsFolder(tmp_path / "third", None, {**SETTINGS, "affine": "com"}):
        pass
    with pytest.raises(PairsError) as caught:
        read_results(tmp_path / "nothing")
    assert "give the folder that 'ulae-rt batch' wrote, or results.jsonl" in caught.value.hint
    assert read_results(tmp_path / "another") == read_results(tmp_path / "another/results.jsonl")


def test_a_row_that_does_not_say_its_images_is_no_pair():
    with pytest.raises(PairsError, match="the pair a has no fixed image in its row"):
        replace(FULL, inputs={"moving": "m"}).pair  # noqa: B018


@pytest.mark.follows("give results.jsonl as 'ulae-rt batch' wrote it")
def test_results_that_were_changed_are_read_as_they_were_written(tmp_path):
    fill(tmp_path)
    path = tmp_path / "results.jsonl"
    written = path.read_text()
    hint = "give results.jsonl as 'ulae-rt batch' wrote it"
    path.write_text(written.replace('"status"', '"state"', 1))
    with pytest.raises(PairsError, match="is no row of results") as caught:
        read_results(path)
    assert caught.value.hint == hint
    path.write_text(written.replace('"moving"', '"moving_labels"'))
    with pytest.raises(PairsError, match="has no moving image") as caught:
        [row.pair for row in read_results(path)]
    assert caught.value.hint == hint
    path.write_text(written)
    assert [row.pair for row in read_results(path)] == PAIRS
