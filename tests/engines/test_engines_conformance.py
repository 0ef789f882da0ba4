"""Every name of TensorRT's that our code uses exists in the bindings of the newest and the oldest version.

What is written as `trt.…` is looked up as it stands. For TensorRT's objects a convention serves: in a file
that imports TensorRT, or Polygraphy's part for it, a variable of a name in _CLASSES is of that class.
"""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stand_in import VERSIONS, real_bindings, told_by
from tiny_model import ROOT

_CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig ISerializationConfig IRuntimeConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser OnnxParserRefitter",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "timings": "ITimingCache",
    "cache": "ITimingCache",
    "others": "ITimingCache",
}
# Variables of those names that hold something else: (file, variable).
_OTHERS = {
    ("engines/tensorrt/plan_from_onnx.py", "profile"),  # Polygraphy's
    ("engines/tensorrt/plan_from_onnx.py", "cache"),  # a TimingCache
    ("mmdit/target.py", "tensorrt"),  # a version
}
_FOR_TENSORRT = re.compile(r"import tensorrt|backend\.trt|timing_cache\b|IProgressMonitor")


def uses_tensorrt() -> list[Path]:
    """The files of the program, not its tests, that speak to TensorRT."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    files = (path for package in packages for path in sorted(package.rglob("*.py")))
    return [path for path in files if _FOR_TENSORRT.search(path.read_text())]


def names(source: str, file: str = "") -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(the classes that may have it, dotted name, keywords of the call) of all that a file asks TensorRT for.

    The classes are "" for names of the module.
    """
    tree = ast.parse(source)
    calls = {
        id(node.func): tuple(each.arg for each in node.keywords if each.arg)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        dotted = ast.unparse(node)
        if re.fullmatch(r"(trt|tensorrt)(\.\w+)+", dotted):
            if id(node) not in inner and (file, dotted.split(".")[0]) not in _OTHERS:
                yield "", dotted.split(".", 1)[1], calls.get(id(node), ())
            continue
        owner = ast.unparse(node.value).split(".")[-1].lstrip("_")
        if owner in _CLASSES and (file, owner) not in _OTHERS:
            yield _CLASSES[owner], node.attr, calls.get(id(node), ())


def gone(trt: Any, source: str, file: str = "") -> list[str]:
    """The names and keywords that these bindings do not have."""
    wrong = []
    for classes, name, keywords in names(source, file):
        owners = [getattr(trt, each) for each in classes.split() if hasattr(trt, each)] if classes else [trt]
        holders = []
        for owner in owners:
            found = owner
            for part in name.split("."):
                found = getattr(found, part, None) if part in dir(found) else None
            if found is not None:
                holders.append(found)
        if not holders:
            wrong.append(f"{classes or 'trt'}: {name}")
        for keyword in keywords:
            docs = " ".join(
                f"{holder.__doc__} {getattr(holder, '__init__', holder).__doc__}" for holder in holders
            )
            if not re.search(rf"\b{keyword}: ", docs):
                wrong.append(f"{classes or 'trt'}: {name}({keyword}=…)")
    return wrong


def run_scenarios(folder: Path) -> None:
    """In the child process: look everything up, print what is gone as JSON."""
    trt = real_bindings(folder)
    files = {str(path.relative_to(ROOT)): path.read_text() for path in uses_tensorrt()}
    mutations = [
        "trt.BuilderFlag.FP9",
        "trt.IBuilderConfigs",
        "engine.no_such_name",
        "self._engine.no_such_name",
        "config.set_timing_cache(x, no_such_keyword=False)",
        "trt.Runtime(loggers=x)",
    ]
    kept = [
        "trt.BuilderFlag.STRIP_PLAN",
        "engine.get_tensor_name(0)",
        "config.set_timing_cache(x, ignore_mismatch=False)",
        "trt.Runtime(logger=x)",
    ]
    found: dict[str, Any] = {
        "version": trt.__version__,
        "gone": {file: gone(trt, source, file) for file, source in files.items()},
        "used": {file: len(list(names(source, file))) for file, source in files.items()},
        "caught": [bool(gone(trt, mutation)) for mutation in mutations],
        "kept": [gone(trt, each) for each in kept],
    }
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(request.param, "test_engines_conformance", tmp_path_factory.mktemp("tensorrt"))


def test_every_name_and_keyword_that_we_use_is_there(told: dict[str, Any]) -> None:
    assert told["gone"] == {file: [] for file in told["gone"]}


def test_the_files_that_build_run_and_refit_are_looked_at(told: dict[str, Any]) -> None:
    for file in (
        "engines/tensorrt/plan_from_onnx",
        "engines/tensorrt/refit",
        "engines/tensorrt/monitor",
        "measure/plan",
    ):
        assert told["used"][f"{file}.py"] > 0


def test_a_name_or_keyword_that_is_gone_is_caught(told: dict[str, Any]) -> None:
    assert told["caught"] == [True] * len(told["caught"])
    assert told["kept"] == [[]] * len(told["kept"])


def test_what_we_take_from_polygraphy_is_there() -> None:
    pytest.importorskip("polygraphy")
    for path in uses_tensorrt():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polygraphy"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{path}: {node.module}.{alias.name}"
