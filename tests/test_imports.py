"""Imports of the program's packages go one way, along the data: from the contract to what is served."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"tests"}
# package → what of the others it may import; the rest stand at the end of the data's way and may import all
MAY_IMPORT = {
    "mmdit": set(),
    "pages": set(),
    "export": {"mmdit", "pages"},
    "engines": {"mmdit"},
    "serve": {"mmdit", "engines"},
}
# What is known, until it is put right: the preview's file name, and the captions that rank groups of layers.
KNOWN = {
    ("export/projection_from_vae.py", "serve"),
    ("export/sensitivity.py", "miniature"),
}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            yield ".".join(filter(None, (parent, node.module)))


def others(package: str) -> set[tuple[str, str]]:
    """(file, other package of the program that it imports) of a package."""
    return {
        (str(path.relative_to(ROOT)), name.split(".")[0])
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] in PACKAGES - {package}
    }


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_stage_imports_what_stands_before_it(package):
    """And those that are known are still there: who puts one right takes it off the list."""
    wrong = {(file, name) for file, name in others(package) if name not in MAY_IMPORT[package]}
    assert wrong == {(file, name) for file, name in KNOWN if file.startswith(f"{package}/")}


def test_what_runs_in_the_server_imports_itself_alone():
    """It is copied into the repository, and no other package is there."""
    files = sorted((ROOT / "serve/inside").rglob("*.py"))
    assert files
    ours = {(path.name, name) for path in files for name in imported(path) if name.split(".")[0] in PACKAGES}
    assert {(file, name) for file, name in ours if not f"{name}.".startswith("serve.inside.")} == set()


@pytest.mark.parametrize("package", sorted(PACKAGES - {"tests"}))
def test_nothing_imports_the_tests(package):
    assert "tests" not in {name for _, name in others(package)}
