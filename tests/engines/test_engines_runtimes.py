"""The table of runtimes: a row and a package of five functions make another one; a lacking one is refused."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import ROOT

from engines.__main__ import main
from engines.engine import Build, engine
from engines.runner import runner
from engines.runtimes import FUNCTIONS, RUNTIMES, Runtime
from engines.source import sources
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import EngineError
from mmdit.shapes import shape_set
from mmdit.target import Target

ECHO = """
import contextlib
from engines.runtimes import ModelFiles

def build(source, folder, job):
    (folder / "model.echo").write_text(source.component)
    return {"engine_bytes": 1}

@contextlib.contextmanager
def open(folder, manifest):
    yield lambda inputs: inputs

def check(found, job):
    return {source.component: {"checked": True} for source in found}

def triton_config(configs, folders, model):
    return ModelFiles({})

def loadable(repository, manifest, version):
    return [], {}
"""


def add(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, code: str) -> None:
    """A package in `folder`, and its row."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(RUNTIMES, name, Runtime(name, package=name, file="model.echo", tools=("onnx",)))


def test_another_runtime_is_a_package_and_a_row(
    tiny_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, tmp_path, "echo_runtime", ECHO)
    layout = Layout("tiny", tiny_build)
    found, family = sources(layout, "tiny", Precision.FP16)
    job = Build(layout, family, shape_set(family), Target("echo", "echo_runtime", None, fp8=True))
    checked = RUNTIMES["echo_runtime"].functions.check(found, job)
    file = engine(found[0], job, checked[found[0].component])
    assert (file.name, file.read_text()) == ("model.echo", found[0].component)
    manifest = read_manifest(file.parent)
    assert manifest.settings["runtime"] == "echo_runtime"
    assert manifest.findings["checked"]
    with runner(file.parent) as run:
        assert run({}) == {}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_runtime_that_lacks_a_function_is_refused_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = f"lacks_{name}"
    add(monkeypatch, tmp_path, lacking, ECHO.replace(f"def {name}(", f"def not_{name}("))
    with pytest.raises(EngineError, match=rf"runtime '{lacking}': {lacking} lacks {name}; "):
        main(["build"])


def test_a_runtime_without_its_package_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "gone", Runtime("gone", package="engines.gone", file="", tools=()))
    with pytest.raises(EngineError, match="runtime 'gone': No module named 'engines.gone'"):
        main(["build"])


def test_the_table_loads_no_heavy_library() -> None:
    """With the packages of all runtimes, which are imported to look for their functions."""
    code = (
        "import sys; from engines.runtimes import check_runtimes; check_runtimes(); "
        "heavy = {'onnx', 'onnxruntime', 'polygraphy', 'tensorrt', 'torch', 'tritonclient'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_code_outside_a_runtimes_package_compares_its_name() -> None:
    """Facts about a runtime are fields of its row."""
    comparing = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        place = str(path.relative_to(ROOT))
        if re.match(r"tests|build|\.|shared|engines/(tensorrt|onnxruntime)/", place):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = (node.left, *node.comparators)
                values = [value for side in sides for value in (side, *getattr(side, "elts", ()))]
                if any(isinstance(value, ast.Constant) and value.value in RUNTIMES for value in values):
                    comparing.append(f"{place}:{node.lineno}")
    assert comparing == []
