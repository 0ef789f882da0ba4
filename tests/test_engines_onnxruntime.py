"""Engines for ONNX Runtime: five tiny graphs that keep the contract, and graphs that do not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.__main__ import main
from mmdit import artifact, target
from mmdit.artifact import Layout, Manifest, read_manifest, whole
from mmdit.contract import COMPONENTS, Precision, Tensor, components
from mmdit.errors import ArtifactError, EngineError
from mmdit.family import Family
from mmdit.shapes import shape_set

ROOT = Path(__file__).resolve().parent.parent
FAMILY = Family(
    name="tiny",
    variant="custom",
    layers=1,
    clip_l_dim=4,
    clip_l_pooled=3,
    clip_g_dim=6,
    clip_g_pooled=5,
    t5_dim=12,
    t5_tokens=7,
    context_dim=12,
    pooled_dim=8,
    latent_channels=4,
    patch_size=2,
    max_latent=32,
    default_size=128,
    vae_scaling_factor=1.5,
    vae_shift_factor=0.1,
    train_timesteps=1000,
    shift=3.0,
    steps=20,
    guidance_scale=4.5,
)
SIGNATURES = components(FAMILY, shape_set(FAMILY))


def tiny_graph(component: str, precision: Precision = Precision.FP16) -> onnx.ModelProto:
    """The least graph that keeps a component's contract."""
    signature = SIGNATURES[component]
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    def constant(name: str, value: object, dtype: type = np.float16) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    if signature.inputs[0].name == "input_ids":
        node("Cast", ["input_ids"], "ids", to=TensorProto.FLOAT16)  # [rows, tokens]
        node("Unsqueeze", ["ids", constant("last", [2], np.int64)], "column")  # [rows, tokens, 1]
        width = signature.outputs[0].dims[-1]
        node("MatMul", ["column", constant("to_hidden", np.ones((1, width)))], "hidden")
        if len(signature.outputs) == 2:
            node("ReduceMean", ["ids"], "mean", axes=[1], keepdims=1)  # [rows, 1]
            pooled = constant("to_pooled", np.ones((1, signature.outputs[1].dims[0])))
            node("MatMul", ["mean", pooled], "pooled")
    elif component == "mmdit" and precision is Precision.FP8:
        channels = FAMILY.latent_channels
        scale = constant("scale", 0.1)
        fp8 = TensorProto.FLOAT8E4M3FN
        constants.append(helper.make_tensor("zero", fp8, [], [0.0]))
        constants.append(helper.make_tensor("weight", fp8, [channels, channels], [1.0] * channels**2))
        node("Transpose", ["latent"], "tokens", perm=[0, 2, 3, 1])  # [rows, h, w, channels]
        node("QuantizeLinear", ["tokens", scale, "zero"], "quantized")
        node("DequantizeLinear", ["quantized", scale, "zero"], "dequantized")
        node("DequantizeLinear", ["weight", scale, "zero"], "dequantized_weight")
        node("MatMul", ["dequantized", "dequantized_weight"], "product")
        node("Transpose", ["product"], "velocity", perm=[0, 3, 1, 2])
    elif component == "mmdit":
        bias = constant("bias", np.ones((1, FAMILY.latent_channels, 1, 1)))
        node("Add", ["latent", bias], "velocity")
    else:
        kernel = constant("kernel", np.ones((FAMILY.latent_channels, 3, 8, 8)))
        node("ConvTranspose", ["latent", kernel], "image", strides=[8, 8])
    graph = helper.make_graph(
        nodes,
        component,
        [_value(tensor) for tensor in signature.inputs],
        [_value(tensor) for tensor in signature.outputs],
        constants,
    )
    opset = 17 if component in ("clip_l", "clip_g") else 20  # 18 moved ReduceMean's axes
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _value(tensor: Tensor) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype.numpy))
    return helper.make_tensor_value_info(tensor.name, dtype, ["rows", *tensor.dims])


def save_source(
    build: Path,
    component: str,
    precision: Precision = Precision.FP16,
    *,
    model: onnx.ModelProto | None = None,
    checkpoint: str = "c0ffee",
    family: Family = FAMILY,
) -> None:
    """Write a component's ONNX artifact as the export stage does; the MMDiT's weights lie outside."""
    manifest = Manifest(
        kind="onnx",
        checkpoint=checkpoint,
        made_from={},
        settings={"family": family.model_dump(), "component": component},
        versions={},
    )
    with whole(Layout("tiny", build).onnx(component, precision), manifest) as partial:
        onnx.save_model(
            model or tiny_graph(component, precision),
            str(partial / "model.onnx"),
            save_as_external_data=component == "mmdit",
            location="model.onnx.data",
            size_threshold=0,
        )
        (partial / "layers.json").write_text("{}")


def save_tiny_model(build: Path) -> None:
    """All five components, and the MMDiT in FP8 too."""
    for component in COMPONENTS:
        save_source(build, component)
    save_source(build, "mmdit", Precision.FP8)


def engines(build: Path, *arguments: str) -> None:
    """Run the command in this process, for the CPU unless `arguments` name another target."""
    target_given = [] if "--target" in arguments else ["--target", "cpu"]
    main(["build", "--model", "tiny", "--build", str(build), *target_given, *arguments])


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifact, "_HASHES", tmp_path / "build" / ".sha256.json")
    monkeypatch.setattr(target, "find_gpu", lambda: None)
    (tmp_path / "build").mkdir()
    save_tiny_model(tmp_path / "build")
    return tmp_path / "build"


def engine_folder(build: Path, component: str, precision: Precision = Precision.FP16) -> Path:
    return Layout("tiny", build).engine("cpu", component, precision)


def test_each_component_gets_one_engine_whose_manifest_tells_what_it_is(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(build, "--precision", "fp8")
    printed = capsys.readouterr().out
    for component in COMPONENTS:
        precision = Precision.FP8 if component == "mmdit" else Precision.FP16
        folder = engine_folder(build, component, precision)
        manifest = read_manifest(folder)
        source = read_manifest(Layout("tiny", build).onnx(component, precision))
        assert manifest.kind == "engine"
        assert manifest.checkpoint == "c0ffee"
        assert manifest.made_from["model.onnx"] == source.files["model.onnx"]
        assert manifest.settings["precision"] == precision.value
        assert manifest.settings["target"] == "cpu"
        assert manifest.settings["family"] == FAMILY.model_dump()
        assert manifest.settings["shapes"]["name"] == "any-64-256"
        assert set(manifest.versions) == {"onnx", "onnxruntime"}
        assert str(folder / "model.onnx") in printed
    latent = read_manifest(engine_folder(build, "mmdit", Precision.FP8)).settings["profiles"][1]["latent"]
    assert latent[0] == [1, 4, 8, 8]
    assert latent[2] == [16, 4, 32, 32]


def test_external_weights_travel_with_the_engine_and_both_copies_can_still_be_read(build: Path) -> None:
    engines(build, "--precision", "fp16")
    folder = engine_folder(build, "mmdit")
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
    ]
    onnx.load(str(folder / "model.onnx"))
    onnx.load(str(Layout("tiny", build).onnx("mmdit") / "model.onnx"))


def test_a_second_run_builds_nothing_and_loads_no_heavy_library(build: Path) -> None:
    engines(build)
    code = (
        "import sys\n"
        "from engines.__main__ import main\n"
        f"main(['build', '--model', 'tiny', '--build', {str(build)!r}, '--target', 'cpu'])\n"
        "heavy = {'onnx', 'onnxruntime', 'tensorrt', 'polygraphy', 'torch'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for component in COMPONENTS:
        assert f"{component}: up to date" in done.stdout


def test_a_changed_onnx_file_remakes_its_engine_alone_and_says_why(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(build)
    changed = tiny_graph("t5")
    changed.producer_name = "another exporter"
    save_source(build, "t5", model=changed)
    capsys.readouterr()
    engines(build)
    printed = capsys.readouterr().out
    assert "t5: building (made_from differ: model.onnx" in printed
    assert printed.count(": building") == 1


def test_another_shape_set_remakes_the_engines_and_a_changed_report_beside_the_onnx_does_not(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(build)
    fp8 = Layout("tiny", build).onnx("mmdit", Precision.FP8)
    manifest = json.loads((fp8 / "manifest.json").read_text())
    manifest["files"]["layers.json"] = "changed"
    (fp8 / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    engines(build)
    assert ": building" not in capsys.readouterr().out
    large = FAMILY.model_copy(update={"max_latent": 64})
    for component in COMPONENTS:
        precision = Precision.FP8 if component == "mmdit" else Precision.FP16
        save_source(build, component, precision, family=large)
    engines(build, "--shapes", "square-512")
    assert "clip_l: building (settings differ: family" in capsys.readouterr().out


def test_a_damaged_engine_is_made_again(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines(build)
    (engine_folder(build, "clip_g") / "model.onnx").write_bytes(b"half a file")
    capsys.readouterr()
    engines(build)
    assert "clip_g: building (model.onnx changed on disk)" in capsys.readouterr().out
    onnx.checker.check_model(str(engine_folder(build, "clip_g") / "model.onnx"))


@pytest.mark.parametrize(
    ("stranger", "words"),
    [
        ({"checkpoint": "bad"}, "another checkpoint"),
        ({"family": FAMILY.model_copy(update={"t5_tokens": 9})}, "another family"),
    ],
)
def test_a_component_of_another_model_is_named(build: Path, stranger: dict[str, object], words: str) -> None:
    save_source(build, "clip_g", **stranger)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=f"^clip_g in .*{words}.* than clip_l, t5, mmdit"):
        engines(build)


@pytest.mark.parametrize(("precision", "command"), [("fp8", "make fp8"), ("fp16", "make onnx")])
def test_a_missing_onnx_file_names_the_command_that_makes_it(
    build: Path, precision: str, command: str
) -> None:
    (Layout("tiny", build).onnx("mmdit", Precision(precision)) / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"mmdit.*run `{command} MODEL=tiny` first"):
        engines(build, "--precision", precision)


def _renamed(graph: onnx.GraphProto) -> None:
    graph.input[1].name = "sigma"


def _other_dtype(graph: onnx.GraphProto) -> None:
    graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16


def _one_row(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _fixed_height(graph: onnx.GraphProto) -> None:
    graph.output[0].type.tensor_type.shape.dim[2].dim_value = 8


def _open_context(graph: onnx.GraphProto) -> None:
    graph.input[2].type.tensor_type.shape.dim[1].dim_param = "tokens"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_renamed, "input 'sigma' is not in the contract; input 'timestep' is missing"),
        (_other_dtype, r"input 'timestep' is FP16 \[rows, 1\], expected FP32 \[rows, 1\]"),
        (_one_row, r"input 'latent' is FP16 \[1, 4, h, w\], expected FP16 \[rows, 4, h, w\]"),
        (_fixed_height, r"output 'velocity' is FP16 \[rows, 4, 8, w\]"),
        (_open_context, r"input 'context' is FP16 \[rows, tokens, 12\], expected FP16 \[rows, 84, 12\]"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused_in_words(
    build: Path, break_it: object, words: str
) -> None:
    model = tiny_graph("mmdit")
    break_it(model.graph)  # type: ignore[operator]
    save_source(build, "mmdit", model=model)
    with pytest.raises(EngineError, match=f"^mmdit: .*{words}"):
        engines(build, "--precision", "fp16")
    assert not engine_folder(build, "mmdit").exists()


def test_a_file_that_is_no_onnx_is_refused(build: Path) -> None:
    folder = Layout("tiny", build).onnx("t5")
    (folder / "model.onnx").write_bytes(b"no graph")
    manifest = read_manifest(folder)
    manifest.files["model.onnx"] = artifact.sha256(folder / "model.onnx")
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(EngineError, match="^t5: .* is no valid ONNX model"):
        engines(build)
    model = tiny_graph("t5")
    model.graph.node[0].op_type = "NoSuchOperator"
    save_source(build, "t5", model=model)
    with pytest.raises(EngineError, match="^t5: .* is no valid ONNX model: .*NoSuchOperator[^\n]*$"):
        engines(build)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize(("precision", "command"), [("fp8", "make fp8"), ("fp16", "make onnx")])
def test_an_onnx_file_edited_after_its_manifest_was_written_is_refused_and_the_former_engine_stays(
    build: Path, precision: str, command: str, name: str
) -> None:
    engines(build, "--precision", precision)
    before = read_manifest(engine_folder(build, "mmdit", Precision(precision)))
    file = Layout("tiny", build).onnx("mmdit", Precision(precision)) / name
    file.write_bytes(file.read_bytes() + b"\0")
    (engine_folder(build, "mmdit", Precision(precision)) / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=f"^mmdit: .*{name} changed since .*run `{command}` again"):
        engines(build, "--precision", precision)
    assert read_manifest(engine_folder(build, "mmdit", Precision(precision))) == before


def test_an_output_whose_dims_the_file_leaves_open_is_measured(build: Path) -> None:
    model = tiny_graph("clip_l")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "Addhidden_dim_1"
    save_source(build, "clip_l", model=model)
    engines(build)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "Addhidden_dim_2"
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((1, 9), np.float16), "to_hidden"))
    save_source(build, "clip_l", model=model)
    with pytest.raises(EngineError, match=r"clip_l: output 'hidden' is float16 \[1, 77, 9\].*\[1, 77, 4\]"):
        engines(build)


def test_an_output_that_is_not_finite_is_refused_and_the_former_engine_stays(build: Path) -> None:
    engines(build, "--precision", "fp16")
    before = read_manifest(engine_folder(build, "mmdit"))
    model = tiny_graph("mmdit")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.full((1, 4, 1, 1), np.inf, np.float16), "bias")
    )
    save_source(build, "mmdit", model=model)
    with pytest.raises(EngineError, match="^mmdit: output 'velocity' holds values that are not finite"):
        engines(build, "--precision", "fp16")
    assert read_manifest(engine_folder(build, "mmdit")) == before
    assert not list(engine_folder(build, "mmdit").parent.glob("*.partial"))


def test_a_graph_that_onnx_runtime_cannot_run_is_refused_in_words(build: Path) -> None:
    model = tiny_graph("vae_decoder")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((FAMILY.latent_channels + 1, 3, 8, 8), np.float16), "kernel")
    )
    save_source(build, "vae_decoder", model=model)
    with pytest.raises(
        EngineError, match="^vae_decoder: ONNX Runtime cannot run it: .*, at 1 rows of 64×64 pixels$"
    ):
        engines(build)
