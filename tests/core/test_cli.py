"""What the console says of a wrong call is what to call next."""

import shlex

import pytest

from ulae_rt import cli
from ulae_rt.cli import COMMANDS


def hint_of(capsys):
    (hint,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    return hint


@pytest.mark.follows("hint: see '{} -h'")
@pytest.mark.parametrize("line", [["nonsense"], *([name, "--nonsense"] for name in COMMANDS)])
def test_the_help_that_is_named_is_there(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line)
    assert stopped.value.code == 2
    named = hint_of(capsys).removeprefix("hint: see '").removesuffix("'")
    program, *words = shlex.split(named)
    assert program == "ulae-rt"
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {named.removesuffix(' -h')} ")
