"""The README holds nothing untrue that a program can check."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest

from _support.project import ROOT, pyproject
from ulae_rt import env
from ulae_rt.cli import COMMANDS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\S*/)?(?:ulae-rt|python3? -m ulae_rt(?:\.| ))\s*(\w+)(.*)$")


def shell_lines() -> list[str]:
    text = "\n".join(body for language, body in BLOCKS if language in ("", "bash", "sh", "console"))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip()]


def usages() -> list[tuple[str, str]]:
    """(command, its arguments) of every call in a block or in backticks."""
    inline = [" ".join(text.split()) for text in re.findall(r"`([^`\n]+)`", README)]
    found = [COMMAND.match(line) for line in [*shell_lines(), *inline]]
    return [(match[1], match[2].split("#")[0]) for match in found if match]


@cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"ulae_rt.{command}", "--help"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_length() -> None:
    # But for the rows of a GPU, which `bench/report` adds once there are any.
    written = re.sub(r"(?<=<!-- gpu -->\n).*?(?=<!-- /gpu -->)", "", README, flags=re.DOTALL)
    assert len(written.splitlines()) < 150


def test_commands_are_used_at_all() -> None:
    assert {"register", "export"} <= {command for command, _ in usages()}


@pytest.mark.parametrize(("command", "arguments"), usages())
def test_every_command_and_flag_exists(command: str, arguments: str) -> None:
    assert command in COMMANDS
    for word in shlex.split(arguments.replace("[", " ").replace("]", " ").replace("|", " ")):
        flag = word.split("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]*", flag):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(command)), flag


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([\w-]+)", "\n".join(shell_lines()) + README, re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= targets


def test_extras_exist() -> None:
    extras = set(pyproject()["project"]["optional-dependencies"])
    named = re.findall(r"(?:ulae-rt|-e ['\"]?\.)\[([\w,-]+)\]", README)
    assert named
    assert {extra for group in named for extra in group.split(",")} <= extras


def test_python_blocks_compile_and_import_what_exists() -> None:
    sources = [body for language, body in BLOCKS if language == "python"]
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ulae_rt"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ulae_rt":
                assert hasattr(importlib.import_module("ulae_rt"), node.attr)


def test_environment_variables_are_all_listed() -> None:
    read = set(re.findall(r"\bULAE_RT_[A-Z_]+\b", (ROOT / "ulae_rt/env.py").read_text()))
    assert env.kernels() in env.KERNEL_CHOICES
    assert set(re.findall(r"\bULAE_RT_[A-Z_]+\b", README)) == read


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
