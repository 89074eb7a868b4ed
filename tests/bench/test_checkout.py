"""The commit that is measured: of git, or of the environment where there is none."""

import subprocess
from pathlib import Path

import pytest

from harness import checkout


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files without their history."""
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(checkout.VARIABLE, raising=False)


@pytest.mark.usefixtures("copy")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0123abcde", ("0123abcde", False)),
        ("0123abcde-dirty", ("0123abcde", True)),
        ("", ("unknown", False)),
    ],
)
def test_a_copy_takes_it_from_the_environment(
    text: str, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.commit() == ("unknown", False)
    monkeypatch.setenv(checkout.VARIABLE, text)
    assert checkout.commit() == expected


@pytest.mark.usefixtures("copy")
def test_where_there_is_no_git_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(checkout.VARIABLE, "0123abcde")
    assert checkout.commit() == ("0123abcde", False)


def test_a_checkout_knows_it_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "One"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv(checkout.VARIABLE, "fffffffff")
    commit, dirty = checkout.commit()
    assert len(commit) == 9
    assert commit != "fffffffff"
    assert not dirty


@pytest.mark.usefixtures("copy")
@pytest.mark.parametrize("text", ["main", "0123abc dirty", "../0123abcde", "0123ABCDE"])
def test_anything_else_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checkout.VARIABLE, text)
    with pytest.raises(ValueError, match=r"ULAE_RT_COMMIT is .*, expected a commit's hash.*; set"):
        checkout.commit()
