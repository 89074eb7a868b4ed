"""Every field of a manifest changed into anything: read with the same meaning, or refused."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from _support.engines import write_engine
from ulae_rt.engines import load_engine, survey
from ulae_rt.errors import EngineMismatch
from ulae_rt.imaging import preprocess
from ulae_rt.manifest import NORMALISATIONS, VARIANTS, Manifest
from ulae_rt.model import ulae_net

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2, 16, 2**63, 10**400, 0.5, -0.5, 1e308, "", "cpu", "\ud800", "."])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in nested JSON, but to the whole of it."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    below = [place for key, item in items for place in places(item, (*path, key))]
    return ([path] if path else []) + below


def changed(values: Any, place: tuple[Any, ...], value: Any, remove: bool) -> Any:
    values = copy.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_engine(tmp_path_factory.mktemp("engine"))


@QUICK
@given(data=st.data())
def test_a_changed_manifest_means_the_same_or_is_refused(folder, data):
    path = folder / "ulae-net-fp32.json"
    original = path.read_text()
    values = json.loads(original)
    place = data.draw(st.sampled_from(places(values)))
    value = data.draw(ANYTHING)
    mutated = changed(values, place, value, data.draw(st.booleans()))
    try:
        path.write_text(json.dumps(mutated))
        manifest = refusal = None
        try:
            manifest = Manifest.read(path)
        except EngineMismatch as error:
            refusal = error
        if manifest is None:
            assert refusal.hint
        else:
            # Compared as JSON, where 1 and 1.0 are one number.
            assert json.loads(manifest.to_json()) == mutated
        for candidate in survey(folder) if path.is_file() else ():
            assert candidate.refusal is None or candidate.refusal.hint
    finally:
        path.write_text(original)


@QUICK
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_refused(folder, content):
    path = folder / "ulae-net-fp32.json"
    original = path.read_text()
    try:
        path.write_bytes(content)
        with pytest.raises(EngineMismatch):
            Manifest.read(path)
    finally:
        path.write_text(original)


def test_names_are_those_of_the_model_and_of_the_images():
    assert VARIANTS == ulae_net.VARIANTS
    assert NORMALISATIONS == preprocess.NORMALISATIONS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"spacing_mm": 2.0}}, "preprocessing contradicts its metadata"),
        ({"metadata": {"normalisation": "p99.9"}}, "preprocessing contradicts its metadata"),
        ({"preprocessing": ["as you like"]}, "preprocessing contradicts its metadata"),
        ({"preprocessing": []}, "preprocessing contradicts its metadata"),
    ],
)
def test_what_a_scan_is_to_be_like_is_said_once_and_the_same(tmp_path, change, words):
    path = write_engine(tmp_path) / "ulae-net-fp32.json"
    values = json.loads(path.read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(EngineMismatch, match=words):
        load_engine(tmp_path, device="cpu")


def test_units_that_are_others_are_refused(tmp_path):
    path = write_engine(tmp_path) / "ulae-net-fp32.json"
    values = json.loads(path.read_text())
    values["outputs"][1]["units"] = "mm"
    path.write_text(json.dumps(values))
    with pytest.raises(EngineMismatch, match="the units of 'disp' are 'mm'"):
        load_engine(tmp_path, device="cpu")
