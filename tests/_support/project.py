"""The repository as the meta tests see it."""

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders() -> dict[str, Path]:
    """Every package folder on disk, by its import name."""
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    found = {}
    for package, folder in mapping.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *parts])] = file.parent
    return found


def modules() -> dict[str, Path]:
    """Every module on disk, by its import name; a package by its ``__init__``."""
    found = {}
    for package, folder in folders().items():
        for file in folder.glob("*.py"):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            found[name] = file
    return found


@dataclass(frozen=True)
class Import:
    """One imported name, and whether the module's own import already runs it."""

    module: str
    eager: bool
    line: int


def imports(source: str) -> Iterator[Import]:
    """Every absolute import in a module, those for type checkers left out."""
    yield from _imports(ast.parse(source), eager=True)


def _imports(node: ast.AST, *, eager: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, eager, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            # `from a import b` may be the module a.b: a reader of layers has to see both.
            yield Import(child.module or "", eager, child.lineno)
            yield from (
                Import(f"{child.module}.{alias.name}", eager, child.lineno) for alias in child.names
            )
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), eager=eager)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, eager=eager and not inside)
