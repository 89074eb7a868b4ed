"""The page of a batch: whole, self-contained, safe to open, and right about what stands out."""

import base64
import hashlib
import io
import math
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from PIL import Image

from _support.brains import GEOMETRIES, save_brain
from _support.networks import FakeNetwork
from ulae_rt.batching.page import GROUP, LISTED, SHOWN, write_page
from ulae_rt.batching.ranking import ENOUGH, rank
from ulae_rt.batching.results import ResultsFolder, Row
from ulae_rt.errors import OutputError
from ulae_rt.imaging.image import image_of
from ulae_rt.imaging.qc import qc_jpeg
from ulae_rt.imaging.transform import as_displacement
from ulae_rt.registration.registrar import Registrar, finish

VOID = {"meta", "img", "input", "br"}
ODD = "<script>alert('1')</script> & \"x\" onload='y' {{ 7 * 7 }} \ud83e\udde0 \udcff"


class Page(HTMLParser):
    """What a page holds; fails where an element is not closed as it was opened."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.source = file.read_text(encoding="utf-8")
        self.open, self.attributes, self.scripts = [], [], []
        self.rows, self.lists, self.pieces = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.pieces)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.lists.append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.pieces.append(data)
            if "tr" in self.open and self.rows[-1]:
                self.rows[-1][-1] += data
            elif "li" in self.open:
                self.lists[-1] += data

    def all(self, name):
        return [value for _, each, value in self.attributes if each == name]

    def pairs(self):
        """Rows of the table of pairs, by id."""
        return {row[0]: row for row in self.rows if len(row) >= 10 and row[0] != "pair"}


def done(id_="a", **values):
    figures = {
        "similarity_before": 0.5,
        "similarity_after": 0.85,
        "folding_percent": 0.125,
        "folding_image_percent": 0.03,
        "seconds": {"read": 0.5, "network": 1.5},
        "finished": "2026-11-23T01:06:32+00:00",
        "host": "vm",
    }
    return Row(id_, "done", {"moving": "/m.nii", "fixed": "/f.nii"}, **{**figures, **values})


def failed(id_="b", error="/m.nii does not exist", hint="check the path", **values):
    return Row(
        id_, "failed", {"moving": "/m.nii", "fixed": "/f.nii"}, error=error, hint=hint, **values
    )


def summary(rows, **values):
    return {
        "version": "0.1.0",
        "method": "torch, cpu, fp32",
        "settings": {"weights_sha256": "0", "spacing_mm": 2.0, "outputs": ["moved", "warp"]},
        "list": "pairs.csv",
        "missing": 0,
        "pairs": len(rows),
        "done": sum(row.status == "done" for row in rows),
        "failed": sum(row.status == "failed" for row in rows),
        "hosts": dict(Counter(row.host for row in rows)),
        "this_run": {
            "pairs": len(rows),
            "seconds": 1800.0,
            "network_busy_seconds": 9.0,
            "network_idle_seconds": 1.0,
        },
        **values,
    }


def write(path, rows, worst=0, **values):
    return Page(write_page(ResultsFolder(path, None, {}), rows, summary(rows, **values), worst))


BATCHES = {
    "none": [],
    "one": [done()],
    "one failed": [failed()],
    "none failed": [done(f"a{i}") for i in range(20)],
    "both": [*[done(f"a{i}") for i in range(20)], failed(), done("w", warnings=["cut off"])],
    "no folding": [done(folding_percent=None, folding_image_percent=None)],
    "no figures": [Row("a", "done", {"moving": "/m"})],
    "inverse": [done(f"a{i}", inverse_consistency_mm=0.1 * i) for i in range(3)],
    "more than are shown": [done(f"a{i}") for i in range(SHOWN + 3)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_page_is_whole_and_needs_nothing_else(tmp_path, name):
    rows = BATCHES[name]
    page = write(tmp_path, rows, worst=3)
    assert page.pairs().keys() == {row.id for row in rows}
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    for link in page.all("href") + page.all("xlink:href"):
        assert link == "results.jsonl" or (link[0] == "#" and link[1:] in ids)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.all("src"))
    used = re.findall(r"url\((#?)(\w*)", page.source)
    assert all(mark and target in ids for mark, target in used)
    assert "@import" not in page.source
    assert [*tmp_path.iterdir()] == [tmp_path / "summary.html"]


def test_a_browser_runs_the_page_s_own_script_only(tmp_path):
    page = write(tmp_path, [done()])
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [text for text in page.all("content") if "default-src" in text]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_others_wrote_is_text(tmp_path):
    rows = [
        done(ODD, warnings=[ODD], outputs={ODD: ODD}, seconds={ODD: 1.0}, host=ODD, finished=ODD),
        failed(f"f{ODD}", ODD, ODD, traceback=ODD),
    ]
    page = write(tmp_path, rows, worst=1, network=ODD, list=ODD, settings={ODD: ODD})
    assert len(page.scripts) == 1
    assert "{{ 7 * 7 }}" in page.scripts[0] + page.text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = ODD.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert page.text.count("<script>alert('1')</script> & \"x\" onload='y' {{ 7 * 7 }}") >= 12, (
        shown
    )


def test_every_failed_pair_is_there_with_its_error_and_what_to_do(tmp_path):
    rows = [failed(f"sub-{i}", f"/scan-{i} does not exist") for i in range(3 * GROUP)]
    rows += [failed("cut", "/cut is truncated", "copy it again", traceback="Traceback: here")]
    page = write(tmp_path, rows)
    listed = {" ".join(text.split()) for text in page.lists}
    assert {f"{row.id} {row.error}" for row in rows} <= listed
    assert "What to do: copy it again 1 pair" in " ".join(page.text.split())
    assert f"check the path {3 * GROUP} pairs" in " ".join(page.text.split())
    assert "Traceback: here" in page.text


def test_the_top_says_what_happened(tmp_path):
    rows = [done("a"), done("b", similarity_after=0.4), failed("c"), done("w", warnings=["odd"])]
    page = write(tmp_path, rows, missing=1200)
    text = " ".join(page.text.split())
    assert "3 of 1,204 pairs registered, 1 failed" in text  # the title
    assert "1 failed 1,200 missing 1 to look at 1 with warnings" in text
    assert "Pairs per hour 8 This run 4 pairs in 30 min 0 s" in text
    assert "Network busy 90 % of the time" in text
    assert "2026-11-23 01:06 to 01:06 UTC" in text
    assert "not a medical device" in text
    # id, status, before, after, gain, folding (brain, image), seconds; b's median is 0.850.
    assert page.pairs()["b"][:8] == [
        "b",
        "look",
        "0.500",
        "0.400",
        "−0.100",
        "0.125",
        "0.030",
        "2.0",
    ]
    assert page.pairs()["b"][9] == "similarity did not rise"
    assert page.pairs()["w"][9] == "warning: odd"


def test_small_numbers_are_not_said_to_be_none(tmp_path):
    page = write(tmp_path, [done(folding_percent=2e-5, folding_image_percent=0.0)])
    assert page.pairs()["a"][5:7] == ["<0.001", "0.000"]


def test_ranks_by_hand():
    # Median 0.85, absolute deviations 0.02 in the middle: z = (0.85 - x) / (1.4826 * 0.02).
    after = [0.81, 0.82, 0.83, 0.84, 0.85, 0.85, 0.86, 0.87, 0.88, 0.89, 0.6]
    rows = [done(str(x), similarity_after=x, similarity_before=x - 0.3) for x in after]
    ranked = rank([*rows, failed()])
    assert [each.row.id for each in ranked[:3]] == ["0.6", "0.81", "0.82"]
    assert ranked[0].z == pytest.approx(0.25 / (1.4826 * 0.02))
    assert [(flag.measure.name, flag.value) for flag in ranked[0].flags] == [
        ("similarity after", 0.6)
    ]
    assert not any(each.flagged for each in ranked[1:])
    assert len(ranked) == len(rows)


def test_each_figure_is_flagged_on_its_bad_side_only():
    usual = [done(str(i), inverse_consistency_mm=0.3) for i in range(ENOUGH)]
    bad = {
        "gain": {"similarity_before": 0.8},
        "similarity after": {"similarity_before": 0.2, "similarity_after": 0.6},
        "folding in the brain": {"folding_percent": 0.9},
        "inverse consistency": {"inverse_consistency_mm": 2.0},
    }
    for name, values in bad.items():
        first, *others = rank([*usual, done("x", **values)])
        assert first.row.id == "x"
        assert first.flags[0].measure.name == name
        assert not any(each.flagged for each in others)
    good = done(similarity_before=0.1, similarity_after=0.99, folding_percent=0.0)
    assert not any(each.flagged for each in rank([*usual, replace(good, inverse_consistency_mm=0)]))


def test_pairs_that_hardly_differ_are_not_flagged():
    rows = [done(str(i)) for i in range(50)]  # their median absolute deviation is 0
    near = done("x", similarity_after=0.84, similarity_before=0.49, folding_percent=0.2)
    assert not any(each.flagged for each in rank([*rows, near]))


def test_few_pairs_are_flagged_only_where_similarity_did_not_rise():
    far = done("far", similarity_after=0.55)
    few = [done(str(i)) for i in range(ENOUGH - 2)]
    assert rank([*few, far])[0].row.id == "far"
    assert not rank([*few, far])[0].flagged
    assert rank([*few, done("more"), far])[0].flagged
    worse = rank([*few, done("same", similarity_after=0.5)])[0]
    assert worse.worse
    assert worse.flagged


def test_what_has_no_figures_is_last():
    rows = [done("nan", similarity_after=math.nan, folding_percent=math.inf), done(), done("c")]
    assert [each.z for each in rank(rows)][:2] == [0.0, 0.0]
    blank = Row("blank", "done", {})
    assert {each.row.id for each in rank([blank, *rows])[-2:]} == {"blank", "nan"}
    assert rank([blank])[0].z is None


@pytest.mark.parametrize("seed", range(5))
def test_any_rows_give_a_page(tmp_path, seed):
    rng = random.Random(seed)
    similarity = [None, math.nan, -1.0, 0.0, 1.0, 5e-324, 0.85, 0.8500000001, -math.inf]
    percent = [None, math.nan, 0.0, 100.0, 1e-300, 0.1, math.inf]
    texts = ["", ODD, "x" * 5000, "\0\x1b[31m\r\n", "%s {} {% raw %}", "--> ]]> </template>"]
    rows = [
        Row(
            f"{i}{rng.choice(texts)}",
            rng.choice(["done", "done", "failed"]),
            {"moving": rng.choice(texts), "fixed": "/f"},
            rng.choice([{}, {"warp": rng.choice(texts)}]),
            rng.choice([{}, {"read": 1e-9}, {rng.choice(texts): math.nan, "warp": 1e9}]),
            rng.choice(similarity),
            rng.choice(similarity),
            rng.choice(percent),
            rng.choice(percent),
            rng.choice(percent),
            rng.choice([None, [], [[1.0, 0, 0, 0]], np.eye(4).tolist(), np.zeros((4, 4)).tolist()]),
            rng.choice(similarity),
            rng.choice(similarity),
            rng.choice([[], [rng.choice(texts)] * 3]),
            *rng.choices(texts, k=5),
        )
        for i in range(rng.choice([1, 2, 15, 60]))
    ]
    page = write(tmp_path, rows, worst=4)
    assert len(page.scripts) == 1
    assert len([row for row in page.rows if len(row) >= 10]) - 1 == len(rows)


def test_ten_thousand_pairs_are_a_small_page(tmp_path):
    rows = [done(f"sub-{i}", finished="") for i in range(LISTED // 2)]
    rows += [failed(f"bad-{i}", "e" * 1000, traceback="t" * 10**4) for i in range(LISTED // 2 + 1)]
    page = write(tmp_path, rows)
    # Twelve pictures of 200 kB come to this.
    assert len(page.source) < 10e6 - 12 * 200e3 * 4 / 3
    assert len(page.pairs()) == LISTED
    assert f"{LISTED:,} of {LISTED + 1:,} pairs that need a look most" in page.text
    assert sum("bad-" in text for text in page.lists) == LISTED // 2 + 1
    assert page.open == []


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A pair on two grids, registered: its folder, its row and what was in memory."""
    path = tmp_path_factory.mktemp("registered")
    affine = from_matvec(euler2mat(0.15, -0.1, 0.05) * 0.9, (9, -6, 4))
    save_brain(path / "moving.nii.gz", *GEOMETRIES["LIA"], pull=np.linalg.inv(affine))
    save_brain(path / "fixed.nii.gz", *GEOMETRIES["oblique"])
    registrar = Registrar(FakeNetwork(shift=(2.0, -1.0, 0.5)), affine="none")
    with pytest.MonkeyPatch.context() as patch:
        # Blobs have no pose, and the shift is along R, A and S.
        patch.setattr("ulae_rt.registration.registrar.pose_of", lambda _: None)
        pair = registrar.prepare(path / "moving.nii.gz", path / "fixed.nii.gz")
    pair = replace(pair, affine=affine)
    result = finish(pair, registrar.deform([pair])[0])
    (path / "pairs" / "p").mkdir(parents=True)
    result.save(warp=path / "pairs" / "p" / "warp.nii.gz")
    row = replace(
        done("p"),
        inputs={kind: str(path / f"{kind}.nii.gz") for kind in ("moving", "fixed")},
        outputs={"warp": "pairs/p/warp.nii.gz"},
        affine=result.affine.tolist(),
    )
    return path, row, result


def test_pictures_are_made_from_the_files(registered):
    path, row, result = registered
    (source,) = write(path, [row], worst=1).all("src")
    drawn = base64.b64decode(source.partition(",")[2])
    assert len(drawn) < 200e3
    expected = qc_jpeg(
        fixed=result.fixed.data,
        before=result.before,
        after=np.asarray(result.moved.dataobj),
        disp=as_displacement(result.deformation.network_part(image_of(result.fixed).grid)),
        jacobian=result.jacobian,
        affine=result.fixed.affine,
        caption="p",
    )
    pixels = [np.asarray(Image.open(io.BytesIO(each)), float) for each in (drawn, expected)]
    assert pixels[0].std() > 20
    # The warp's float32 and JPEG: nobody sees one grey level.
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.5


def test_only_the_worst_have_pictures(registered):
    path, row, _ = registered
    rows = [row, replace(row, id="q", similarity_after=0.1), replace(row, id="r")]
    page = write(path, rows, worst=1)
    assert page.all("alt")[0].startswith("q,")
    assert len(page.all("src")) == 1


def test_what_has_gone_since_is_said(tmp_path, registered, caplog):
    path, row, _ = registered
    other = tmp_path / "other.nii.gz"
    save_brain(other, *GEOMETRIES["LIA"])
    (tmp_path / "cut.nii.gz").write_bytes(other.read_bytes()[:3000])
    # The same grid 5 mm off, with a header worth a warning.
    there = nib.load(row.inputs["fixed"])
    shifted = nib.Nifti1Image(there.dataobj, from_matvec(np.eye(3), (5, 0, 0)) @ there.affine)
    shifted.set_qform(there.affine, 1)
    nib.save(shifted, tmp_path / "shifted.nii.gz")
    rows = [
        row,
        replace(row, id="gone", inputs={**row.inputs, "moving": "/no/such.nii.gz"}),
        replace(row, id="cut", inputs={**row.inputs, "fixed": str(tmp_path / "cut.nii.gz")}),
        replace(row, id="other", inputs={**row.inputs, "fixed": str(other)}),
        replace(
            row, id="shifted", inputs={**row.inputs, "fixed": str(tmp_path / "shifted.nii.gz")}
        ),
        replace(row, id="kept", outputs={"moved": "pairs/p/moved.nii.gz"}),
        replace(row, id="flat", affine=np.zeros((4, 4)).tolist()),
    ]
    page = write(path, rows, worst=7)
    assert len(page.all("src")) == 1
    for said in (
        "No picture: /no/such.nii.gz does not exist",
        "cut.nii.gz is truncated",
        "other.nii.gz does not lie on the grid of the warp any more",
        "shifted.nii.gz does not lie on the grid of the warp any more",
        "its warp was not kept",
        "No picture: LinAlgError: Singular matrix",
    ):
        assert said in page.text
    assert not caplog.records


def test_a_page_that_cannot_be_written_is_the_callers_error(tmp_path, monkeypatch):
    (tmp_path / "summary.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path, [done()])
    (tmp_path / "summary.html").rmdir()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_page(ResultsFolder(tmp_path, None, {}), [done()], summary([done()]), 0)
    assert not [*tmp_path.iterdir()]


def test_plots_take_the_page_s_colours_and_say_where_the_tail_is(tmp_path):
    rows = [done(str(i), folding_percent=0.1 + 0.001 * i) for i in range(40)]
    page = write(tmp_path, [*rows, done("x", folding_percent=30.0)])
    plots = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        assert not re.findall(r"#[0-9a-fA-F]{6}|DejaVu", plot)
        assert {"var(--ink)", "var(--quiet)", "var(--line)"} <= set(re.findall(r"var\(.*?\)", plot))
    assert "Values above 0.414 % are counted in the last bar: 1 of 41." in page.text
