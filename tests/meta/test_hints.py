"""Hints are executed: each that names something to do has a test that does it, and it helps."""

import pytest

from _support.hints import Follows, Hint, Unreadable, follows, follows_of, hints, hints_of, matching
from _support.project import ROOT

# Hints that cannot be followed here: a piece of each, and why.
NOT_FOLLOWED: dict[str, str] = {
    "free some space where temporary files go (TMPDIR)": "needs a disk that fills up while "
    "TensorRT builds an engine",
    "make it ITK's: wb_command -convert-warpfield -from-fnirt": "needs the programs of the "
    "Connectome Workbench and of FSL, which the tests' environment does not have",
    "make it one: reg_transform -ref FIXED -disp IN OUT": "needs NiftyReg's program, "
    "which the tests' environment does not have",
}

# A shorter piece would be found in other hints some day.
SHORTEST = 8


@pytest.fixture(scope="module")
def found() -> list[Hint]:
    return hints()


@pytest.fixture(scope="module")
def markers() -> list[Follows]:
    return follows(ROOT / "tests")


def left_alone(found: list[Hint], pieces: list[str]) -> list[Hint]:
    """Hints that name something to do, which none of the pieces means."""
    covered = {hint for piece in pieces for hint in matching(piece, found)}
    return [hint for hint in found if hint.names_something and hint not in covered]


def vague(piece: str, found: list[Hint]) -> str:
    """Why a piece of text does not mean one hint; nothing if it does."""
    texts = sorted({hint.text for hint in matching(piece, found)})
    if not texts:
        return "no hint says this any more"
    if len(texts) > 1:
        return f"{len(texts)} hints say this: {texts}"
    if len(piece) < SHORTEST and piece != texts[0]:
        return f"it is shorter than {SHORTEST} characters"
    return ""


def test_every_hint_that_names_something_is_followed(
    found: list[Hint], markers: list[Follows]
) -> None:
    pieces = [*(marker.piece for marker in markers), *NOT_FOLLOWED]
    missing = left_alone(found, pieces)
    assert not missing, (
        "mark the test that follows each with @pytest.mark.follows, or list it with the reason "
        "in NOT_FOLLOWED:\n" + "\n".join(map(str, missing))
    )


def test_every_marker_means_one_hint(found: list[Hint], markers: list[Follows]) -> None:
    wrong = [f"{marker}: {why}" for marker in markers if (why := vague(marker.piece, found))]
    assert not wrong, "\n".join(wrong)


def wrong_entries(
    table: dict[str, str], found: list[Hint], markers: list[Follows]
) -> dict[str, str]:
    """What is wrong with the entries of a table like `NOT_FOLLOWED`, by their pieces."""
    followed = {hint.text for each in markers for hint in matching(each.piece, found)}
    wrong = {}
    for piece, reason in table.items():
        if why := vague(piece, found):
            wrong[piece] = why
        elif len(reason.split()) < 3:
            wrong[piece] = "it has no reason"
        elif {hint.text for hint in matching(piece, found)} & followed:
            wrong[piece] = "a test follows it"
    return wrong


def test_what_is_not_followed_is_a_hint_has_a_reason_and_no_test(
    found: list[Hint], markers: list[Follows]
) -> None:
    assert wrong_entries(NOT_FOLLOWED, found, markers) == {}


def test_hints_are_found_in_every_part_of_the_package(found: list[Hint]) -> None:
    parts = {hint.file.split("/")[0] for hint in found}
    assert parts == {"ulae_rt", "kernels", "export", "engines"}
    assert len(found) > 200
    assert sum(hint.names_something for hint in found) > 100


SOURCE = """
from ulae_rt.elsewhere import AGAIN
START = "start it with 'ray start'"
BOTH = ("message", "use --both")

def check(path, error, name, options):
    if path:
        raise UsageError("message", "see -h")
    raise errors.OutputError(f"{path} is there", f"mkdir -p {path}, or {START}")
    raise (BackendUnavailable if name else EngineMismatch)("m", "use --one" if name else AGAIN)
    raise type(error)(str(error), f"{error.hint}; then --resume")
    raise OutOfMemory(*BOTH)
    hint = "pip install 'this'"
    if name:
        hint = "pip install 'that'"
    message, other = BOTH
    return [Missing(message, other), Missing("m", hint), Check(name, False, "m", f"try {hint}")]
    raise EvaluationError("m", options[0].hint)
    raise EngineMismatch("m", getattr(error, "hint", "") or "see 'ulae-rt doctor'")
    raise ValueError("m", "not shown to anybody")
    logger.warning("%s: %s", name, START)
    logger.warning("%s mixes labels: use --interp nearest", name)
    logger.warning("%s is odd", name)
    print(f"hint: see '{name} -h'")
    print(f"hint: {error.hint}")
    Row(name, hint="see the log")
    UlaeError("nothing more to say")
"""
ELSEWHERE = {"ulae_rt.elsewhere": 'AGAIN = "export again"'}


def test_hints_are_read_in_every_form() -> None:
    assert {hint.text for hint in hints_of(SOURCE, "a.py", ELSEWHERE)} == {
        "%s mixes labels: use --interp nearest",
        "export again",
        "hint: see '{} -h'",
        "mkdir -p {}, or start it with 'ray start'",
        "pip install 'that'",
        "pip install 'this'",
        "see -h",
        "see 'ulae-rt doctor'",
        "see the log",
        "start it with 'ray start'",
        "try pip install 'that'",
        "try pip install 'this'",
        "use --both",
        "use --one",
        "{}; then --resume",
    }


@pytest.mark.parametrize("hint", ["chosen(error)", "table[name]", "f'{a}' + unknown"])
def test_a_hint_that_cannot_be_read_is_an_error(hint: str) -> None:
    with pytest.raises(Unreadable, match=r"a\.py:1: "):
        hints_of(f'raise UsageError("message", {hint})', "a.py")


@pytest.mark.parametrize(
    "text",
    [
        "see -h",
        "give --resume",
        "run `ulae-rt prepare` first",
        "pip install onnxruntime",
        "python -m ulae_rt.export",
        "mkdir -p {}",
        "try gzip -t",
        "convert it: {}.float()",
        "set run.compile = false",
        "unset it",
        "set TRITON_INTERPRET=1",
        "free some space (TMPDIR)",
        "convert it first, e.g. with mri_convert",
        "export the weights again",
        "register the pair again",
    ],
)
def test_what_names_something_is_seen(text: str) -> None:
    assert Hint("a.py", 1, text).names_something


@pytest.mark.parametrize(
    "text",
    ["check the path", "rename it", "a defect of ulae_rt", "see results.jsonl", "a .nii.gz file"],
)
def test_what_names_nothing_is_not(text: str) -> None:
    assert not Hint("a.py", 1, text).names_something


HINTS = [
    Hint("a.py", 1, "give --resume"),
    Hint("a.py", 2, "mend them and give --resume"),
    Hint("b.py", 3, "pip install 'x'"),
    Hint("c.py", 4, "pip install 'x'"),
    Hint("c.py", 5, "check the path"),
]


def test_the_guard_sees_what_nobody_follows() -> None:
    assert left_alone(HINTS, []) == HINTS[:4]
    assert left_alone(HINTS, ["pip install"]) == HINTS[:2]
    assert left_alone(HINTS, ["give --resume", "pip install"]) == [HINTS[1]]
    assert left_alone(HINTS, ["give --resume", "mend them", "pip install"]) == []


@pytest.mark.parametrize(
    ("piece", "why"),
    [
        ("give --resume", ""),
        ("mend them and", ""),
        ("pip install 'x'", ""),
        ("--resume", "2 hints say this: "),
        ("give --overwrite", "no hint says this any more"),
        ("mend", "it is shorter than 8 characters"),
    ],
)
def test_the_guard_sees_a_marker_that_means_nothing(piece: str, why: str) -> None:
    found = vague(piece, HINTS)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@pytest.mark.parametrize(
    ("piece", "reason", "why"),
    [
        ("mend them and", "needs a GPU", {}),
        ("mend them and", "", {"mend them and": "it has no reason"}),
        ("give --resume", "needs a GPU", {"give --resume": "a test follows it"}),
        ("give --all", "needs a GPU", {"give --all": "no hint says this any more"}),
    ],
)
def test_the_guard_sees_a_wrong_entry(piece: str, reason: str, why: dict[str, str]) -> None:
    markers = [Follows("t.py", 1, "give --resume")]
    assert wrong_entries({piece: reason}, HINTS, markers) == why


def test_markers_are_read_wherever_they_stand() -> None:
    source = '''
import pytest
pytestmark = pytest.mark.follows("of the file")

@pytest.mark.slow
@pytest.mark.follows("one", "two")
def test_a():
    """@pytest.mark.follows("not this")"""

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.follows("three"))])
def test_b(x): ...
'''
    assert {each.piece for each in follows_of(source, "t.py")} == {
        "of the file", "one", "two", "three",
    }  # fmt: skip


@pytest.mark.parametrize("marker", ["follows()", "follows(HINT)", "follows(f'{a}')", "follows(3)"])
def test_a_marker_without_a_text_is_an_error(marker: str) -> None:
    with pytest.raises(Unreadable, match=r"t\.py:1: expected the text of a hint"):
        follows_of(f"x = pytest.mark.{marker}", "t.py")
