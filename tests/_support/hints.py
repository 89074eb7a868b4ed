"""Every hint of the package, which of them name something to do, and which tests follow them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _support.project import ROOT, modules

# What a text must have to name a command, an option, a function, a setting or a variable.
NAMES = re.compile(
    r"(?<![\w-])--?[a-z]"  # an option, -h
    r"|ulae-rt"  # a command of the package, an extra
    r"|\bpip (?:un)?install"
    r"|\bpython3? -m"
    r"|\bmkdir\b|\bgzip\b|\bnib-diff\b"
    r"|\b[a-z]\w*\("  # a function that is called
    r"|\b(?:data|engine|loss|numpy|nibabel|optimiser|output|run|torch)\.[a-z]"  # a setting
    r"|(?<![\w/.])(?!ulae_rt\b)[A-Za-z0-9]+_\w+"  # an identifier, a program, a variable
    r"|\bTMPDIR\b|\bunset\b"
    r"|\b(?:register|export|train) (?:\w+ ){0,3}again"
)
# Beside the errors, what has a hint to show: at which place it stands among the arguments.
HINT_AT = {"Missing": 1, "Check": 3}


@dataclass(frozen=True)
class Hint:
    """One hint.

    Attributes:
        file: where it stands, from the repository's root.
        line: likewise.
        text: with ``{}`` for what is only known when it is shown.
    """

    file: str
    line: int
    text: str

    @property
    def names_something(self) -> bool:
        """Whether it names a command, an option, a function, a setting or a variable."""
        return bool(NAMES.search(self.text))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Unreadable(ValueError):
    """A hint whose text this reader does not find."""


def errors() -> frozenset[str]:
    """The names of the package's errors."""
    tree = ast.parse((ROOT / "ulae_rt/errors.py").read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef))


def hints() -> list[Hint]:
    """All hints of the package, file by file."""
    sources = {
        str(path.resolve().relative_to(ROOT)): path.read_text() for path in modules().values()
    }
    by_module = {name: sources[str(path.relative_to(ROOT))] for name, path in modules().items()}
    return [
        hint for file, text in sorted(sources.items()) for hint in hints_of(text, file, by_module)
    ]


def hints_of(source: str, file: str, others: dict[str, str] | None = None) -> list[Hint]:
    """The hints of one module.

    Args:
        source: of the module.
        file: its name.
        others: sources of the modules that it may import constants from, by module.

    Raises:
        Unreadable: a hint that is neither text, nor a constant, nor another error's hint.
    """
    return list(_Reader(ast.parse(source), file, others or {}).hints())


class _Reader:
    def __init__(self, tree: ast.Module, file: str, others: dict[str, str]) -> None:
        self._tree = tree
        self._file = file
        self._errors = errors()
        self._constants = _constants(tree, others)
        self._functions = _functions(tree, others)
        self._resolving: list[tuple[ast.AST, str]] = []

    def hints(self) -> Iterator[Hint]:
        for scope, call in _calls(self._tree):
            for node in self._nodes(call, scope):
                for text in dict.fromkeys(self._texts(node, scope)):
                    if text.strip("{} "):
                        yield Hint(self._file, call.lineno, text)
        for function in ast.walk(self._tree):
            # One that is given to other functions, which raise it.
            if isinstance(function, ast.FunctionDef):
                for value in _assigned("hint", function):
                    for text in dict.fromkeys(self._texts(value, function)):
                        if text.strip("{} "):
                            yield Hint(self._file, value.lineno, text)

    def _nodes(self, call: ast.Call, scope: ast.AST) -> Iterator[ast.expr]:
        """The arguments of a call that are hints."""
        names = {node.id for node in ast.walk(call.func) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(call.func) if isinstance(node, ast.Attribute)}
        place = next((HINT_AT[name] for name in names if name in HINT_AT), None)
        made_of_another = ast.unparse(call.func).startswith("type(") and len(call.args) > 1
        if names & self._errors or made_of_another:
            place = 1
        arguments = self._unpacked(call.args)
        if place is not None and len(arguments) > place:
            yield arguments[place]
        for word in call.keywords:
            # A page's `problem` may be the message of an error, whose hint is read elsewhere.
            if word.arg == "hint" or (
                word.arg == "problem" and isinstance(word.value, ast.Constant)
            ):
                yield word.value
        if ast.unparse(call.func).endswith((".warning", "print")) and call.args:
            yield from self._shown(call)

    def _shown(self, call: ast.Call) -> Iterator[ast.expr]:
        """A line that is printed as a hint; a warning, and the constants that it is made of."""
        first = call.args[0]
        if ast.unparse(call.func) == "print":
            if _plain(first).startswith("hint: ") and _plain(first) != "hint: {}":
                yield first
            return
        if NAMES.search(_plain(first)):  # most warnings only say what was found
            yield first
        yield from (
            each
            for each in call.args[1:]
            if isinstance(each, ast.Name) and each.id in self._constants and each.id.isupper()
        )

    def _unpacked(self, arguments: list[ast.expr]) -> list[ast.expr]:
        found: list[ast.expr] = []
        for each in arguments:
            if isinstance(each, ast.Starred) and isinstance(each.value, ast.Name):
                value = self._constants.get(each.value.id)
                found += value.elts if isinstance(value, ast.Tuple) else [each]
            else:
                found.append(each)
        return found

    def _texts(self, node: ast.expr, scope: ast.AST) -> list[str]:
        """What a hint may say, branch by branch; nothing for another error's hint."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.Constant(value=None):
                return []
            case ast.JoinedStr():
                found = [""]
                for part in node.values:
                    found = [before + text for before in found for text in self._part(part, scope)]
                return found
            case ast.IfExp():
                return [*self._texts(node.body, scope), *self._texts(node.orelse, scope)]
            case ast.BoolOp():
                return [text for each in node.values for text in self._texts(each, scope)]
            case ast.BinOp(op=ast.Add()):
                ends = self._texts(node.right, scope)
                return [a + b for a in self._texts(node.left, scope) for b in ends]
            case ast.Attribute(attr="hint" | "message"):
                return []
            case ast.Call() if ast.unparse(node).startswith("getattr("):
                return []
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                function = self._functions[name]
                returned = [each for each in ast.walk(function) if isinstance(each, ast.Return)]
                values = [each.value for each in returned if each.value is not None]
                return [text for each in values for text in self._texts(each, function)]
            case ast.Name():
                if (scope, node.id) in self._resolving:  # hint = f"{hint} and more"
                    return ["{}"]
                if values := [*_assigned(node.id, scope)]:
                    self._resolving.append((scope, node.id))
                    found = [text for each in values for text in self._texts(each, scope)]
                    self._resolving.pop()
                    return found
                if node.id in _parameters(scope):
                    return []  # given by a caller, where it is read
                if node.id in self._constants:
                    return self._texts(self._constants[node.id], scope)
                if (unpacked := _unpacked_from(node.id, scope)) is not None:
                    place, whole = unpacked
                    value = self._constants.get(whole)
                    if isinstance(value, ast.Tuple):
                        return self._texts(value.elts[place], scope)
                    return []  # made somewhere else, and read there
        raise Unreadable(f"{self._file}:{node.lineno}: {ast.unparse(node)}")

    def _part(self, part: ast.expr, scope: ast.AST) -> list[str]:
        if isinstance(part, ast.FormattedValue):
            if not isinstance(part.value, ast.Name):
                return ["{}"]
            try:
                return self._texts(part.value, scope) or ["{}"]
            except Unreadable:  # a value, not a part of the sentence
                return ["{}"]
        return self._texts(part, scope)


def _plain(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_plain(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{}"


def _constants(tree: ast.Module, others: dict[str, str]) -> dict[str, ast.expr]:
    """Of a module, by name; those that it imports from the package as well."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "") in others:
            theirs = ast.parse(others[node.module or ""])
            values = _constants(theirs, {})
            for alias in node.names:
                if alias.name in values:
                    found[alias.asname or alias.name] = values[alias.name]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _functions(tree: ast.Module, others: dict[str, str]) -> dict[str, ast.FunctionDef]:
    """Of a module, by name, and those that it imports from the package."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "") in others:
            theirs = _functions(ast.parse(others[node.module or ""]), {})
            found |= {each.name: theirs[each.name] for each in node.names if each.name in theirs}
    return found


def _calls(node: ast.AST, scope: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Every call, with the function that it stands in."""
    scope = scope or node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _calls(child, child if inside else scope)


def _parameters(scope: ast.AST) -> set[str]:
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    given = scope.args
    return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(scope) if not isinstance(scope, ast.Module) else ():
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            yield node.value


def _unpacked_from(name: str, scope: ast.AST) -> tuple[int, str] | None:
    """Where ``a, b = whole`` gives a name its value: its place, and the whole."""
    for node in ast.walk(scope):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
            continue
        for place, target in enumerate(node.targets[0].elts):
            if isinstance(target, ast.Name) and target.id == name:
                whole = node.value
                return place, whole.id if isinstance(whole, ast.Name) else ""
    return None


@dataclass(frozen=True)
class Follows:
    """A test's word that it follows a hint: ``@pytest.mark.follows("piece of its text")``."""

    file: str
    line: int
    piece: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.piece!r}"


def follows(folder: Path) -> list[Follows]:
    """What the tests of a folder follow."""
    return [
        each
        for path in sorted(folder.rglob("*.py"))
        for each in follows_of(path.read_text(), str(path.relative_to(folder.parent)))
    ]


def follows_of(source: str, file: str) -> list[Follows]:
    """What one file of tests follows.

    Raises:
        Unreadable: a marker without a text, or with one that is computed.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "pytest.mark.follows":
            continue
        for piece in node.args or [node]:
            if not isinstance(piece, ast.Constant) or not isinstance(piece.value, str):
                raise Unreadable(f"{file}:{node.lineno}: expected the text of a hint, written out")
            found.append(Follows(file, node.lineno, piece.value))
    return found


def matching(piece: str, among: list[Hint]) -> list[Hint]:
    """The hints that a piece of text means: those it is, else those it is in."""
    same = [hint for hint in among if hint.text == piece]
    return same or [hint for hint in among if piece in hint.text]
