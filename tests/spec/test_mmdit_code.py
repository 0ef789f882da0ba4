"""Which code an artifact's key covers: in small trees, and for each stage of this checkout."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit.artifact import Layout, read_manifest
from mmdit.code import code_of
from mmdit.contract import COMPONENTS, Precision

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "mmdit", "pages", "export", "engines", "serve", "quality", "measure", "miniature", "model_repository",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """A small checkout: `stage.py` makes something with `used`, and never imports `other`."""
    files = {
        "stage.py": (
            "from lib.used import helper\nfrom lib.other import unused\nLIMIT = 3\nSPARE = 4\n\n"
            "class Stage:\n    def make(self):\n        import late\n"
            "        return helper(LIMIT), self.inner()\n\n"
            "    def inner(self):\n        return 1\n\n    def neighbour(self):\n        return unused()\n"
        ),
        "lib/__init__.py": "",
        "lib/used.py": "from .deep import value\nT = 'table.toml'\ndef helper(limit):\n    return value\n",
        "lib/deep.py": "value = 1\n",
        "lib/other.py": "def unused():\n    return 2\n",
        "lib/table.toml": "a = 1\n",
        "lib/spare.toml": "b = 1\n",
        "late.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def key_of(tree: Path) -> dict[str, str]:
    """The key of `Stage.make`, without importing anything that it imports."""
    source = (tree / "stage.py").read_text()
    without_imports = source.replace("from lib", "# from lib")
    module = {"__name__": "stage"}
    exec(compile(without_imports, str(tree / "stage.py"), "exec"), module)
    return code_of(module["Stage"].make, root=tree)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", "helper(LIMIT)", "helper(LIMIT + 1)"),
        ("stage.py", "LIMIT = 3", "LIMIT = 5"),
        ("stage.py", "return 1", "return 9"),
        ("lib/__init__.py", "", "# a comment"),
        ("lib/used.py", "value", "value  # a comment"),
        ("lib/deep.py", "1", "2"),
        ("lib/table.toml", "1", "2"),
        ("late.py", "1", "2"),
    ],
)
def test_editing_what_a_stage_uses_changes_its_key(tree, file, old, new):
    before = key_of(tree)
    text = (tree / file).read_text()
    (tree / file).write_text(text.replace(old, new) if old else new)
    assert key_of(tree) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", "SPARE = 4", "SPARE = 5"),
        ("stage.py", "return unused()", "return 0"),
        ("lib/other.py", "return 2", "return 3"),
        ("lib/spare.toml", "1", "2"),
    ],
)
def test_editing_what_a_stage_does_not_use_keeps_its_key(tree, file, old, new):
    before = key_of(tree)
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))
    assert key_of(tree) == before


def test_a_file_outside_the_checkout_is_not_part_of_a_key(tree):
    """A module may name any file of the machine."""
    outside = tree.parent / "outside.toml"
    outside.write_text("c = 1\n")
    before = key_of(tree)
    used = tree / "lib/used.py"
    used.write_text(used.read_text() + f"OTHER = {str(outside)!r}, '../../outside.toml'\n")
    assert key_of(tree).keys() == before.keys()


@pytest.fixture(scope="module")
def artifacts(build, fp8_repository, fp16_repository) -> dict[str, Path]:
    """Every kind of artifact that the miniature's build has, by a name for the test."""
    folders = {
        "scan": build.scan,
        "tokenizers": build.tokenizers,
        "preview": build.preview,
        "calibration": build.calibration,
        "onnx-fp8": build.onnx("mmdit", Precision.FP8),
        "engine": build.engine("cpu", "clip_l", Precision.FP16),
        "repository": fp8_repository,
    }
    return folders | {component: build.onnx(component) for component in COMPONENTS}


def test_a_key_covers_all_that_the_stage_loads(artifacts):
    """Python's own importer is the judge: what the named modules load lies in the key."""
    from engines.runtimes import runtime
    from quality import gate, report

    codes = {name: read_manifest(folder).code for name, folder in artifacts.items()}
    codes |= {
        "gate": code_of(gate._measured, runtime("onnxruntime").functions.open),
        "verdict": code_of(gate._verdict),
    }
    codes |= {"report": code_of(report._write)}
    program = f"""
import importlib, json, sys
roots = {[f"{ROOT / package}/" for package in PACKAGES]!r}
def first_party():
    files = {{name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}}
    return {{name: file for name, file in files.items() if file.startswith(tuple(roots))}}
loaded = {{}}
for name, files in json.load(sys.stdin).items():
    for module in first_party():
        del sys.modules[module]
    for file in files:
        importlib.import_module(file[:-3].replace("/", ".").removesuffix(".__init__"))
    loaded[name] = sorted(first_party().values())
print(json.dumps(loaded))
"""
    copied = (
        "engines/onnxruntime/triton_model.py"  # read and copied by the packager, imported by Triton alone
    )
    files = {
        name: [file for file in code if file.endswith(".py") and file != copied]
        for name, code in codes.items()
    }
    assert all(files.values())
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT, input=json.dumps(files), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for name, loaded in json.loads(ended.stdout.splitlines()[-1]).items():
        paths = {str(Path(file).relative_to(ROOT)) for file in loaded}
        assert paths <= codes[name].keys(), (name, paths - codes[name].keys())


def test_a_key_covers_the_runtime_that_is_loaded_by_its_name(artifacts):
    """An import by name is not in any source: the packager adds its runtime's function."""
    files = ("__init__.py:triton_config", "model_files.py", "triton_model.py")
    runtime = {f"engines/onnxruntime/{file}" for file in files}
    assert runtime <= read_manifest(artifacts["repository"]).code.keys()


def remakes(
    checkout: Path, build: Layout, scan: dict[str, int], calibration: dict[str, int]
) -> dict[str, str]:
    """Artifact → why a checkout would remake it, or "" where it is up to date; nothing is made."""
    program = f"""
import json
from pathlib import Path
import export.making, export.stages
from engines.engine import Build, _wanted
from engines.source import sources
from mmdit.artifact import Layout, Manifest, read_manifest
from mmdit.contract import Precision
from mmdit.shapes import shape_set
from mmdit.target import resolve
from serve import repository
from serve.engine_set import Engines

reasons = {{}}
def note(label, folder, manifest, write):
    from mmdit.code import code_of
    manifest.code = code_of(write)
    reasons[label] = manifest.reason_to_rebuild(folder) or ""
export.stages.make = note
build = Path({str(build.root.parent)!r})
stages = export.stages.Export({build.model!r}, build)
stages.onnx(**{scan!r})
stages.fp8(**{calibration!r})
found, family = sources(stages.layout, stages.layout.model, Precision.FP8)
target = resolve("cpu", None, None)[0]
for source in found:
    each = Build(stages.layout, family, shape_set(family), target)
    folder = stages.layout.engine("cpu", source.component, source.precision)
    reasons["engine " + source.component] = _wanted(source, each).reason_to_rebuild(folder) or ""
def judge(manifest, folder):
    reasons["repository"] = Manifest.reason_before(manifest, folder) or ""
Manifest.reason_before = Manifest.reason_to_rebuild
Manifest.reason_to_rebuild = judge
repository.package(
    [Engines(stages.layout, "cpu", Precision.FP8)],
    stages.layout.repository("cpu", Precision.FP8),
    accept_quality=True,
)
print(json.dumps(reasons))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    reasons: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return reasons


def test_each_stage_is_remade_for_what_it_imports_and_for_nothing_else(
    artifacts, build, scan, calibration, tmp_path
):
    """A comment in a module remakes exactly the artifacts whose stage imports it."""
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    codes = {name: set(read_manifest(folder).code) for name, folder in artifacts.items()}
    keyed = set().union(*codes.values())
    modules = {str(path.relative_to(checkout)) for path in checkout.rglob("*.py")}
    copied = {file for file in modules if file.startswith(("serve/inside/", "model_repository/"))}
    names = {
        "onnx-fp8 mmdit": "onnx-fp8",
        **{f"onnx {each}": each for each in COMPONENTS},
        **{f"engine {each}": "engine" for each in COMPONENTS},
    }
    for edited in (
        modules - keyed - copied,
        {"mmdit/placement.py", "export/groups.py"},
        {"serve/inside/fp16.py", "mmdit/contract.py"},
        {
            "export/projection_from_vae.py",
            "export/recorder.py",
            "engines/onnxruntime/session.py",
            "serve/warm_up.py",
        },
    ):
        for file in edited:
            text = (ROOT / file).read_text()
            (checkout / file).write_text(text + "\n# a comment\n")
        for label, reason in remakes(checkout, build, scan, calibration).items():
            imported = edited & codes[names.get(label, label)]
            expected = f"code changed: {', '.join(sorted(imported))}" if imported else ""
            if label == "repository" and edited & copied:
                assert reason.startswith("made_from differ: inside")
            else:
                assert reason == expected, (label, edited)
        for file in edited:
            shutil.copy(ROOT / file, checkout / file)


def test_an_html_page_does_not_throw_a_calibration_away(artifacts):
    """Hours of calibration hang on what calibrates, not on how a page shows it."""
    code = read_manifest(artifacts["calibration"]).code
    assert not [file for file in code if file.startswith("pages/") or "chart" in file or "audit" in file]
    assert "export/calibration.py" in code and "export/quantization.py" in code
