"""The packager: TensorRT and ONNX Runtime repositories, validated against the contract; what it refuses."""

import ast
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_plans import packaged, write_engines

from mmdit.artifact import Layout, read_manifest
from mmdit.contract import (
    COMPONENTS,
    Precision,
    components,
    ensemble_steps,
    served_models,
)
from mmdit.errors import ArtifactError, RepositoryError
from mmdit.shapes import ShapeSet, SizeRange, shape_set
from mmdit.step_times import StepTimes, write
from serve import model_config, repository
from serve.engine_set import Engines
from serve.repository import check_repository, package

ROOT = Path(__file__).resolve().parents[2]


def test_a_build_from_before_previews_is_told_what_to_run(hopper):
    """The projection is an artifact of its own: nothing else is exported anew."""
    shutil.rmtree(hopper.preview)
    with pytest.raises(ArtifactError, match="onnx/preview is not there yet: run `make onnx MODEL=large`"):
        Engines(hopper, "hopper", Precision.FP8)


def test_a_tensorrt_repository_agrees_with_the_contract(hopper, large):
    """Names, dtypes, dims and rows are the contract's; each engine is a plan on the GPU."""
    shapes = shape_set(large, "square-1024")
    folder = packaged(hopper)
    signatures = components(large, shapes) | served_models(large)
    assert {path.parent.name for path in folder.glob("*/config.pbtxt")} == signatures.keys()
    for name, signature in signatures.items():
        config = model_config.written(folder / name / "config.pbtxt")
        for field, tensors in (("input", signature.inputs), ("output", signature.outputs)):
            dims = [tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims) for tensor in tensors]
            assert [tuple(tensor.dims) for tensor in getattr(config, field)] == dims
            assert [tensor.name for tensor in getattr(config, field)] == [tensor.name for tensor in tensors]
        assert config.max_batch_size == signature.max_rows <= shapes.max_rows
        if name in COMPONENTS:
            assert config.backend == "tensorrt"
            assert (folder / name / "1/model.plan").is_file()
            assert not (folder / name / "1/model.py").exists()
            assert {group.kind for group in config.instance_group} == {1}  # KIND_GPU
        elif name != "text_to_image":
            assert config.backend == "python"
            assert {group.kind for group in config.instance_group} == {2}  # KIND_CPU


def test_with_several_size_ranges_the_plan_gets_all_its_profiles(large, tmp_path):
    """Triton loads profile 0 alone unless the instance group names the others."""
    low, high = ((512, 512),) * 3, ((1024, 1024),) * 3
    ranges = tuple(
        SizeRange(min=a, opt=b, max=c, max_rows=rows) for (a, b, c), rows in ((low, 16), (high, 8))
    )
    shapes = ShapeSet(name="two", multiple=16, ranges=ranges)
    layout = Layout("large", tmp_path)
    write_engines(layout, large, shapes)
    config = model_config.written(packaged(layout) / "mmdit/config.pbtxt")
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.max_batch_size == 16


def test_a_repository_carries_all_that_its_python_models_import(hopper):
    """Beyond numpy: the code in `inside`, the tokenizers and their library; no path leads out of it."""
    folder = packaged(hopper)
    for name in ("text_encoder", "prompt_encoder", "denoiser", "picture", "text_to_image_stream"):
        assert (folder / name / "1/inside/triton.py").is_file()
        json.loads((folder / name / "1/settings.json").read_text())
    assert (folder / "prompt_encoder/1/tokenizers/__init__.py").is_file()
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    allowed = {"numpy", "tokenizers", "triton_python_backend_utils", "inside", *sys.stdlib_module_names}
    for path in folder.rglob("*.py"):
        if "tokenizers" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for imported in names:
                assert imported.split(".")[0] in allowed, f"{path} imports {imported}"


def test_every_call_to_another_model_asks_for_cpu_memory():
    """Without it an engine's output stays on the GPU, where numpy cannot read it."""
    files = [*(ROOT / "model_repository").rglob("*.py"), *(ROOT / "serve").rglob("*.py")]
    found = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceRequest"):
                found += 1
                memory = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert "MEMORY_CPU" in memory.get("preferred_memory", ""), f"{path}:{node.lineno}"
    assert found == 1  # in serve/inside/triton.py


def test_the_ensemble_is_linear_and_names_nothing_twice(large):
    """Each step takes only what the request or an earlier step gives; input and output names differ."""
    known = {tensor.name for tensor in served_models(large)["text_to_image"].inputs}
    for _, inputs, outputs in ensemble_steps(large):
        assert set(inputs.values()) <= known
        assert not known & set(outputs.values())
        known |= set(outputs.values())


@pytest.mark.slow
def test_packaging_twice_writes_once(hopper):
    """Nothing changed: nothing is written; a changed policy is noticed."""
    engines = [Engines(hopper, "hopper", Precision.FP8)]
    output = packaged(hopper)
    assert package(engines, output, accept_quality=True) is None
    times = StepTimes(
        gpu="a GPU", model="large", precision="fp8", size=(64, 64), source="measured", milliseconds={2: 9.0}
    )
    assert "step_times" in str(package(engines, output, accept_quality=True, step_times=[times]))
    kept = json.loads((output / "denoiser/1/settings.json").read_text())["step_times"]
    assert [StepTimes.model_validate(each) for each in kept] == [times]
    package(engines, output, accept_quality=True)
    (output / "denoiser/config.pbtxt").write_text("")
    assert "changed on disk" in package(engines, output, accept_quality=True)


TIMES = StepTimes(
    gpu="a card of hopper",
    model="large",
    precision="fp8",
    size=(1024, 1024),
    source="measured",
    milliseconds={2: 9.0, 4: 10.0},
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "medium"}, "step times of medium, and these engines are of large"),
        ({"source": "roofline"}, "lower bounds grow in proportion .*`make gpu-check`"),
    ],
)
def test_step_times_that_tell_nothing_of_these_engines_are_refused(hopper, changed, message):
    """The earlier repository stays."""
    before = (packaged(hopper) / "manifest.json").read_bytes()
    output, times = hopper.repository("hopper", Precision.FP8), TIMES.model_copy(update=changed)
    with pytest.raises(RepositoryError, match=message):
        package(
            [Engines(hopper, "hopper", Precision.FP8)], output, accept_quality=True, step_times=[TIMES, times]
        )
    assert (output / "manifest.json").read_bytes() == before


def test_step_times_of_another_gpu_are_taken_with_a_warning(hopper, tmp_path):
    """As the command line and as make give them, a path with an apostrophe included."""
    tables = [tmp_path / "it's.json", tmp_path / "own.json"]
    write(TIMES.model_copy(update={"gpu": "NVIDIA L4"}), tables[0])
    write(TIMES, tables[1])
    make = ["make", "-n", "repository", "MODEL=large", "TARGET=hopper", "ACCEPT_QUALITY=1"]
    told = subprocess.run(
        [*make, f"STEP_TIMES={tables[0]} {tables[1]}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = (line for line in told.splitlines() if "serve package" in line)
    words = shlex.split(line)[1:]
    done = subprocess.run(
        [sys.executable, *words, f"--build={hopper.root.parent}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step times measured on NVIDIA L4, and the plans were built on a card of hopper" in done.stderr
    assert done.stderr.count("step times") == 1
    output = hopper.repository("hopper", Precision.FP8)
    assert [each["gpu"] for each in read_manifest(output).settings["step_times"]] == [
        "NVIDIA L4",
        "a card of hopper",
    ]


def test_engines_of_another_model_are_refused(hopper, large):
    """An MMDiT made from another checkpoint cannot be served with these encoders."""
    write_engines(hopper, large, shape_set(large, "square-1024"), checkpoint="two", only=["mmdit"])
    with pytest.raises(RepositoryError, match="made from another checkpoint than the mmdit engine"):
        packaged(hopper)
    assert not hopper.repository("hopper", Precision.FP8).exists()


def test_engines_of_another_shape_set_are_refused(hopper, large):
    """The scheduler would send shapes that the plan does not take."""
    write_engines(hopper, large, shape_set(large, "square-512"), only=["vae_decoder"])
    with pytest.raises(RepositoryError, match="vae_decoder: made from another shapes"):
        packaged(hopper)


def test_a_missing_engine_is_named_with_the_command_that_makes_it(hopper):
    """`make engines` with the model and the target."""
    shutil.rmtree(hopper.engine("hopper", "t5", Precision.FP16))
    with pytest.raises(ArtifactError, match="t5-fp16 is not there yet: run `make engines MODEL=large"):
        packaged(hopper)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instance_group [ { count: } ]", "no valid config.pbtxt"),
        ("instanse_group [ { count: 1 } ]", "instanse_group"),
        ("max_batch_size: 64", "sets max_batch_size: that comes from the contract"),
        ('input [ { name: "x" } ]', "sets input"),
        ("instance_group [ { kind: KIND_CPU } ]", "cannot have an instance on the CPU"),
    ],
)
def test_a_policy_that_would_not_be_right_is_refused(hopper, tmp_path, monkeypatch, text, message):
    """A syntax error, an unknown field, what the contract decides, a plan on the CPU."""
    policies = tmp_path / "model_repository"
    shutil.copytree(ROOT / "model_repository", policies)
    (policies / "mmdit/config.pbtxt").write_text(text)
    monkeypatch.setattr(repository, "POLICIES", policies)
    with pytest.raises(RepositoryError, match=message):
        packaged(hopper)
    assert not hopper.repository("hopper", Precision.FP8).exists()


def test_the_check_notices_a_tensor_that_drifted(hopper, large):
    """A dtype, a dim, a name, a map: each edit of a written repository is refused."""
    shapes = shape_set(large, "square-1024")
    folder = packaged(hopper)
    check_repository(folder, large, shapes)
    edits = {
        "mmdit": ("TYPE_FP32", "TYPE_FP16"),
        "t5": ("dims: 4096", "dims: 4095"),
        "denoiser": ('name: "seed"', 'name: "sead"'),
        "text_to_image": ('value: "vae_latent"', 'value: "latents"'),
    }
    for name, (old, new) in edits.items():
        path = folder / name / "config.pbtxt"
        original = path.read_text()
        assert old in original
        path.write_text(original.replace(old, new, 1))
        with pytest.raises(RepositoryError, match=name):
            check_repository(folder, large, shapes)
        path.write_text(original)


def test_an_operators_policy_is_kept(hopper, tmp_path, monkeypatch):
    """Queue limits, parameters and counts go through as they are written."""
    policies = tmp_path / "model_repository"
    shutil.copytree(ROOT / "model_repository", policies)
    text = """
        instance_group [ { count: 2 gpus: [ 1 ] } ]
        parameters { key: "max_requests" value { string_value: "3" } }
    """
    (policies / "mmdit/config.pbtxt").write_text(text)
    monkeypatch.setattr(repository, "POLICIES", policies)
    config = model_config.written(packaged(hopper) / "mmdit/config.pbtxt")
    assert config.instance_group[0].count == 2
    assert list(config.instance_group[0].gpus) == [1]
    assert config.parameters["max_requests"].string_value == "3"


def test_the_cpu_repository_holds_the_onnx_files(fp16_repository, fp8_repository):
    """ONNX Runtime engines are Python models beside their ONNX file; FP8 graphs are optimized less."""
    for folder, level in ((fp16_repository, "ORT_ENABLE_ALL"), (fp8_repository, "ORT_DISABLE_ALL")):
        assert (folder / "mmdit/1/model.onnx").is_file()
        settings = json.loads((folder / "mmdit/1/settings.json").read_text())
        assert settings["graph_optimization_level"] == level
    assert read_manifest(fp8_repository).settings["precisions"] == {"cpu": "fp8"}


def test_packaging_what_is_not_built_ends_with_status_2(tmp_path):
    """One line, the way out, no traceback."""
    command = [sys.executable, "-m", "serve", "package", "--target", "hopper", "--build", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "run `make engines MODEL=miniature TARGET=hopper PRECISION=fp8` first" in done.stderr
    assert len(done.stderr.splitlines()) == 1
