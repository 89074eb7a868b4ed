"""What is to be installed brings what is missing, by the names that pip and Python know."""

import ast
import contextlib
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest

from _support.hints import hints
from _support.project import modules, pyproject
from ulae_rt.baselines.method import PACKAGES
from ulae_rt.engines.machine import TENSORRT_MODULES
from ulae_rt.errors import BackendUnavailable
from ulae_rt.optional import require

EXTRA = re.compile(r"ulae-rt\[([\w-]+)\]")
# What pip calls a module that may not be installed here.
DISTRIBUTIONS = {"ants": "antspyx", "cuda": "cuda-bindings"}
# What the literal hints are said of, which no call shows.
SAID_OF = [
    ("torch", "torch"),
    ("safetensors", "torch"),
    ("triton", "gpu"),
    ("cuda.bindings.runtime", "tensorrt"),
    ("cuda.bindings.runtime", "tensorrt-rtx"),
    *((module, "baselines") for module, _, _ in PACKAGES.values()),
    *((module, kind) for kind, module in TENSORRT_MODULES.items()),
]


def plain(name):
    """A distribution's name as pip compares them."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def named_by(extra):
    """Distributions that an extra names, those of the extras that it takes in with them."""
    found = set()
    for line in pyproject()["project"]["optional-dependencies"][extra]:
        if inner := re.match(r"ulae-rt\[([\w,-]+)\]", line):
            found |= {name for each in inner[1].split(",") for name in named_by(each)}
        else:
            found.add(plain(line))
    return found


def brought_by(extra):
    """Those, and what they need themselves as far as they are installed here."""
    found, todo = set(), list(named_by(extra))
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):
                todo += [plain(line) for line in requires(name) or () if "extra ==" not in line]
    return found


def required():
    """(module, extra) of every call that refuses what is not installed."""
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            if node.func.id == "require" and len(texts) == 2:
                yield tuple(texts)
            elif node.func.id == "_group":
                for module in node.args[1].elts:
                    yield module.value, texts[-1]


def test_calls_are_found():
    assert {("ray.data", "ray"), ("onnxscript", "export"), ("scipy", "evaluate")} <= {*required()}


@pytest.mark.follows(
    "pip install 'ulae-rt[{}]'",
    "pip install 'ulae-rt[torch]'",
    "pip install 'ulae-rt[gpu]'",
    "where there is a GPU: pip install 'ulae-rt[gpu]'",
    "to run TensorRT: pip install 'ulae-rt[tensorrt]'",
    "'syn' and 'greedy' need 'ulae-rt[baselines]'",
)
@pytest.mark.parametrize(("module", "extra"), sorted({*SAID_OF, *required()}))
def test_the_extra_brings_the_module(module, extra):
    top = module.split(".")[0]
    installed = [plain(name) for name in packages_distributions().get(top, [])]
    assert {*installed, DISTRIBUTIONS.get(top, plain(top))} & brought_by(extra)


def test_every_extra_that_a_hint_names_exists():
    named = {name for hint in hints() for name in EXTRA.findall(hint.text)}
    assert {"torch", "gpu"} <= named
    assert named <= {*pyproject()["project"]["optional-dependencies"]}


@pytest.mark.follows("reinstall it: pip install 'ulae-rt[{}]'")
def test_a_module_is_taken_once_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / "a_module_of_an_extra.py"
    for source, expected in (
        (None, "pip install 'ulae-rt[gpu]'"),
        ("raise RuntimeError('no driver')", "reinstall it: pip install 'ulae-rt[gpu]'"),
    ):
        if source:
            place.write_text(source)
        with pytest.raises(BackendUnavailable) as caught:
            require(place.stem, "gpu")
        assert caught.value.hint == expected
    place.write_text("answer = 1  # as whoever packed it meant it")
    assert require(place.stem, "gpu").answer == 1
    del sys.modules[place.stem]
