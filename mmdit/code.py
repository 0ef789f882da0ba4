"""Which code made an artifact: the function that makes it, and every first-party module that it imports.

The modules are found in the source with `ast`, without importing any of them, so nothing heavy is loaded to
learn that an artifact is up to date. Imports inside of functions count: stages import heavy libraries late.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_QUOTED = re.compile(r"""["']([\w./-]+)["']""")


def code_of(*functions: Callable[..., Any], root: Path = ROOT) -> dict[str, str]:
    """The code that `functions` run: its place below `root` → SHA-256.

    In a function's own module only what it uses counts: its text, and the text of the functions, classes,
    constants and methods of `self` that it names. The modules imported there count whole, and so do the
    modules that these import. A file that is read (a template, a table) counts when one of the modules names
    it and it lies in the folder of one of them.
    """
    found: dict[str, str] = {}
    modules: set[Path] = set()
    for function in functions:
        code: CodeType = function.__code__
        path = Path(code.co_filename).resolve()
        text, imported = _used_in(path, code.co_firstlineno, code.co_name, root)
        place = path.relative_to(root) if path.is_relative_to(root) else path.name  # a runtime from elsewhere
        found[f"{place}:{function.__qualname__}"] = _sha256(text.encode())
        modules |= imported
    closure = _closure(modules, root)
    for path in closure | _data_files(closure, root):
        found[str(path.relative_to(root))] = _sha256(path.read_bytes())
    return dict(sorted(found.items()))


def _used_in(path: Path, line: int, name: str, root: Path) -> tuple[str, set[Path]]:
    """The text of what one function of a module uses there, and the first-party modules that it imports."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    defined = {name: node for node in tree.body for name in _names_defined(node)}
    function, methods = _function_at(tree, line, name)
    taken: list[ast.stmt] = []
    imports: list[ast.stmt] = []
    waiting: list[ast.stmt] = [function]
    while waiting:
        node = waiting.pop()
        if node in taken or node in imports:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
            continue
        taken.append(node)
        for part in ast.walk(node):
            if isinstance(part, ast.Import | ast.ImportFrom):
                waiting.append(part)
            elif isinstance(part, ast.Name) and part.id in defined:
                waiting.append(defined[part.id])
            elif _is_of_self(part) and part.attr in methods:  # type: ignore[attr-defined]
                waiting.append(methods[part.attr])  # type: ignore[attr-defined]
    taken.sort(key=lambda node: node.lineno)
    text = "\n".join(line for node in taken for line in lines[_first_line(node) - 1 : node.end_lineno])
    return text, {module for node in imports for module in _imported(node, path, root)}


def _names_defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    else:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def _function_at(tree: ast.Module, line: int, name: str) -> tuple[ast.stmt, dict[str, ast.stmt]]:
    """The function that begins at `line`, and the methods of the class that it stands in."""
    methods: dict[str, ast.stmt] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.lineno <= line <= (node.end_lineno or line):
            methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name and _first_line(node) == line:
            return node, methods
    raise LookupError(f"no function {name} begins at line {line}")


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _closure(modules: set[Path], root: Path) -> set[Path]:
    """The modules, and all that they import, whether at their top or inside of functions."""
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports_of(path, path.stat().st_mtime_ns, root)
    return found


@cache
def _imports_of(path: Path, _changed: int, root: Path) -> frozenset[Path]:
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found: set[Path] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            waiting += node.orelse  # what is for type checkers alone is never imported
        else:
            found |= set(_imported(node, path, root))
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def _imported(node: ast.AST, importer: Path, root: Path) -> Iterator[Path]:
    """The first-party files that an import statement loads; none for any other node."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _files(root, alias.name)
    elif isinstance(node, ast.ImportFrom):
        folder = root
        if node.level:
            folder = importer.parents[node.level - 1]
        parts = node.module or ""
        yield from _files(folder, parts)
        for alias in node.names:
            yield from _files(folder, f"{parts}.{alias.name}".strip("."))


def _files(folder: Path, module: str) -> Iterator[Path]:
    """A module's file and the `__init__.py` of each package above it, as far as they are below `folder`."""
    parts = module.split(".") if module else []
    for depth in range(len(parts) + 1):
        init = folder.joinpath(*parts[:depth], "__init__.py")
        if init.is_file():
            yield init
    if parts and (file := folder.joinpath(*parts).with_suffix(".py")).is_file():
        yield file


def _data_files(modules: set[Path], root: Path) -> set[Path]:
    """The files that the modules, or such files themselves, name in quotes and that lie beside a module."""
    folders = {path.parent for path in modules}
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        text = waiting.pop().read_text(encoding="utf-8", errors="replace")
        for name in set(_QUOTED.findall(text)):
            for folder in folders:
                path = (
                    folder / name
                ).resolve()  # a name may lead out of the checkout, which is no code of ours
                if path not in found and path.suffix and path.is_relative_to(root) and path.is_file():
                    found.add(path)
                    waiting.append(path)
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
