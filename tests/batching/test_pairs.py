"""The list of pairs: every way in which people write one, and every way to get it wrong."""

import json
import os

import pytest

from ulae_rt.batching.pairs import Pair, Shard, outside, read_pairs
from ulae_rt.errors import PairsError, UsageError


def write(tmp_path, text, name="pairs.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_labels_and_columns_of_others(tmp_path):
    text = (
        "\ufeffid , moving,fixed,moving_labels,fixed_labels,age\r\n"
        'a,"m,1.nii.gz",sub/f.nii.gz,,fl.nii.gz,70\r\n'
        "\r\n"
        "b,/abs/m.nii,f.nii,ml.nii.gz,fl.nii.gz,\r\n"
    )
    pairs = read_pairs(write(tmp_path, text))
    assert pairs == [
        Pair("a", tmp_path / "m,1.nii.gz", tmp_path / "sub/f.nii.gz", None, tmp_path / "fl.nii.gz"),
        Pair(
            "b",
            tmp_path.__class__("/abs/m.nii"),
            tmp_path / "f.nii",
            tmp_path / "ml.nii.gz",
            tmp_path / "fl.nii.gz",
        ),
    ]
    assert list(pairs[0].paths()) == ["moving", "fixed", "fixed_labels"]
    assert Pair.from_paths("a", {n: str(p) for n, p in pairs[0].paths().items()}) == pairs[0]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"pairs": rows, "note": 1}])
def test_json(tmp_path, wrap):
    rows = [{"id": 7, "moving": "m.nii", "fixed": "f.nii", "fixed_labels": None}]
    path = write(tmp_path, json.dumps(wrap(rows)), "pairs.json")
    assert read_pairs(path) == [Pair("7", tmp_path / "m.nii", tmp_path / "f.nii")]


BAD_CSV = {
    "": "has no id and no moving and no fixed, found nothing",
    "id,moving,fixed\n": "has no pairs",
    "id,moving\na,b\n": "has no fixed, found id, moving",
    "id,moving,fixed,fixed\na,b,c,d\n": "has the column fixed twice",
    "id,moving,fixed,moving_label\na,b,c,d\n": "the column 'moving_label' is unknown",
    "id,moving,fixed\na,b\n": "line 2: has 2 columns, expected 3",
    "id,moving,fixed\na,b,c\nd,,f\n": "line 3: has no moving",
    'id,moving,fixed\na,"b,c\n': "line 2: is no CSV: unexpected end of data",
    'id,moving,fixed\na,"b"x,c\n': "line 2: is no CSV: .*expected after",
    'id,moving,fixed\na,"b,c\nd,e",f\n': "line 3: a field goes over several lines; is a quote",
    "id,moving,fixed\na,b\0,c\n": "it has a zero byte in line 2",
    "id,moving,fixed\na,b\x07,c\n": "moving has a control character in it",
    f"id,moving,fixed\na,{'b' * 140_000},c\n": "line 2: is no CSV: field larger than field limit",
    "id;moving;fixed\na;b;c\n": "line 1: its columns are separated by semicolons, expected commas",
    "id\tmoving\tfixed\na\tb\tc\n": "its columns are separated by tabs, expected commas",
    "id,moving,fixed\n../a,b,c\n": r"the id '../a' cannot name a folder",
    "id,moving,fixed\n.a,b,c\n": r"the id '.a' cannot name a folder",
    "id,moving,fixed\na,b,c\nx,b,c\nA,b,c\n": "2 rows share an id with another, the first is 'a'",
    f"id,moving,fixed\n{'a' * 201},b,c\n": "cannot name a folder",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv_names_the_line(tmp_path, text):
    with pytest.raises(PairsError, match=BAD_CSV[text]):
        read_pairs(write(tmp_path, text))


BAD_JSON = {
    "[": "is no JSON",
    "[" * 100_000: "is no JSON: it is nested too deep",
    '{"pairs": [], "pairs": []}': "is no JSON: the key 'pairs' is there twice",
    '[{"id": "a", "moving": "b", "fixed": "c", "fixed": "d"}]': "the key 'fixed' is there twice",
    '[{"id": NaN, "moving": "b", "fixed": "c"}]': "is no JSON: NaN is no number",
    '[{"id": 1e400, "moving": "b", "fixed": "c"}]': "is no JSON: the number 1e400 is too large",
    '[{"id": "a", "moving": "b\\nc", "fixed": "c"}]': "moving has a control character in it",
    '[{"id": "a", "moving": "b\\u0000", "fixed": "c"}]': "moving has a control character in it",
    "{}": "holds no array of pairs",
    "[]": "has no pairs",
    "[1]": "pair 1: is 1, expected an object",
    '[{"id": "a", "moving": "b"}]': "pair 1: has no fixed, found id, moving",
    '[{"id": true, "moving": "b", "fixed": "c"}]': "id is True, expected text",
    '[{"id": "a", "moving": ["b"], "fixed": "c"}]': "moving is .'b'., expected text",
    '[{"id": "a", "moving": "b", "fixed": "c", "fixed_lables": "d"}]': "'fixed_lables' is unknown",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:20])
def test_bad_json_names_the_pair(tmp_path, text):
    with pytest.raises(PairsError, match=BAD_JSON[text]):
        read_pairs(write(tmp_path, text, "pairs.json"))


def test_files_that_are_no_list(tmp_path):
    with pytest.raises(PairsError, match=r"is no list of pairs, expected \.csv or \.json"):
        read_pairs(tmp_path / "pairs.xlsx")
    with pytest.raises(PairsError, match="does not exist"):
        read_pairs(tmp_path / "pairs.csv")
    (tmp_path / "utf16.csv").write_bytes("id,moving,fixed\na,b,c\n".encode("utf-16"))
    with pytest.raises(PairsError, match="it is UTF-16 text, expected UTF-8"):
        read_pairs(tmp_path / "utf16.csv")
    (tmp_path / "latin.csv").write_bytes("id,moving,fixed\na,ä,c\n".encode("latin-1"))
    with pytest.raises(PairsError, match="it is not UTF-8 text: line 2"):
        read_pairs(tmp_path / "latin.csv")
    (tmp_path / "link.csv").symlink_to("gone.csv")
    with pytest.raises(PairsError, match=r"link\.csv is a link to gone\.csv, which does not exist"):
        read_pairs(tmp_path / "link.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PairsError, match="cannot be read: Is a directory"):
        read_pairs(tmp_path / "folder.csv")


def test_ten_thousand_rows_in_parts_that_are_all_of_it(tmp_path):
    lines = "".join(f"{i},m{i}.nii,f.nii\n" for i in range(10_000))
    pairs = read_pairs(write(tmp_path, "id,moving,fixed\n" + lines))
    parts = [Shard(i, 7).of(pairs) for i in range(1, 8)]
    assert sorted(len(part) for part in parts) == [1428] * 3 + [1429] * 4
    assert sorted(int(p.id) for part in parts for p in part) == list(range(10_000))


def test_shards_by_their_text():
    assert Shard.parse("2/8") == Shard(2, 8)
    for text in ("0/8", "9/8", "1/0", "1", "-1/2", "a/b", "1/2/3", ""):
        with pytest.raises(UsageError, match="expected I/N with I from 1 to N"):
            Shard.parse(text)


def test_files_elsewhere_are_found_behind_dots_and_links(tmp_path):
    folder, other = tmp_path / "list", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (other / "scan.nii").touch()
    (folder / "link.nii").symlink_to(other / "scan.nii")
    text = "id,moving,fixed\na,in.nii,link.nii\nb,../other/scan.nii,link.nii\n"
    pairs = read_pairs(write(folder, text))
    assert outside(pairs, folder) == [folder / "link.nii", folder / "../other/scan.nii"]


def test_fields_quoted_after_a_space(tmp_path):
    text = 'id, moving, fixed\na, "b,1.nii.gz", "c.nii.gz"\n'
    (pair,) = read_pairs(write(tmp_path, text))
    assert (pair.moving, pair.fixed) == (tmp_path / "b,1.nii.gz", tmp_path / "c.nii.gz")


def test_hints_of_lists_work(tmp_path):
    """Each followed from a list that fails."""
    right = [Pair("a", tmp_path / "b,1.nii", tmp_path / "c.nii")]
    for wrong, hint, mended in (
        ("id,moving,fixed\na,b,1.nii,c.nii\n", "quote paths with a comma in them",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
        ("id;moving;fixed\na;b,1.nii;c.nii\n", "save it as CSV with commas",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
        ("id,moving,fixed,fixed\na,x,y,z\n", "remove one",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
        ("id,moving,fixed,moving_label\na,x,y,z\n", "write it moving_labels, or rename it",
         'id,moving,fixed,age\na,"b,1.nii",c.nii,70\n'),
        ("id,moving,fixed\na,b,c\nA,b,c\n", "give every pair an id of its own",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
        ("id,moving,fixed\na/b,b,c\n", "use up to 200 letters, digits and _ . - + = @",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
        ("a,b,c\n", "give a CSV file with the columns id,moving,fixed",
         'id,moving,fixed\na,"b,1.nii",c.nii\n'),
    ):  # fmt: skip
        with pytest.raises(PairsError) as caught:
            read_pairs(write(tmp_path, wrong))
        assert hint in caught.value.hint
        assert read_pairs(write(tmp_path, mended)) == right
    path = tmp_path / "pairs.csv"
    path.write_bytes(mended.encode("utf-16"))
    with pytest.raises(PairsError) as caught:
        read_pairs(path)
    assert "save it as UTF-8" in caught.value.hint
    path.write_bytes(b"\xef\xbb\xbf" + mended.encode())  # as Excel's 'CSV UTF-8'
    assert read_pairs(path) == right
    assert Shard.parse("8/8").of(list(range(8))) == [7]  # of an array job that begins at 0: add 1


@pytest.mark.follows(
    "an array job of 8 gives 1/8 to 8/8; SLURM_ARRAY_TASK_ID may begin at 0: add 1"
)
def test_an_array_job_that_begins_at_0_adds_1(monkeypatch):
    pairs = list(range(20))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(UsageError) as caught:
        Shard.parse(f"{os.environ['SLURM_ARRAY_TASK_ID']}/8")
    assert "SLURM_ARRAY_TASK_ID may begin at 0: add 1" in caught.value.hint
    found = []
    for task in range(8):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        found += Shard.parse(f"{int(os.environ['SLURM_ARRAY_TASK_ID']) + 1}/8").of(pairs)
    assert sorted(found) == pairs
