"""Engines for ONNX Runtime: five tiny graphs that keep the contract, and graphs that do not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from tiny_model import (
    FAMILY,
    ROOT,
    engine_folder,
    engines,
    save_source,
    tiny_graph,
)

from mmdit import artifact
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import ArtifactError, EngineError


def test_each_component_gets_one_engine_whose_manifest_tells_what_it_is(
    tiny_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(tiny_build, "--precision", "fp8")
    printed = capsys.readouterr().out
    for component in COMPONENTS:
        precision = Precision.FP8 if component == "mmdit" else Precision.FP16
        folder = engine_folder(tiny_build, component, precision)
        manifest = read_manifest(folder)
        source = read_manifest(Layout("tiny", tiny_build).onnx(component, precision))
        assert manifest.kind == "engine"
        assert manifest.checkpoint == "c0ffee"
        assert manifest.made_from["model.onnx"] == source.files["model.onnx"]
        assert manifest.settings["precision"] == precision.value
        assert manifest.settings["target"] == "cpu"
        assert manifest.settings["family"] == FAMILY.model_dump()
        assert manifest.settings["shapes"]["name"] == "any-64-256"
        assert set(manifest.versions) == {"onnx", "onnxruntime"}
        assert str(folder / "model.onnx") in printed
    manifest = read_manifest(engine_folder(tiny_build, "mmdit", Precision.FP8))
    latent = manifest.settings["profiles"][1]["latent"]
    assert latent[0] == [1, 4, 8, 8]
    assert latent[2] == [16, 4, 32, 32]


def test_external_weights_travel_with_the_engine_and_both_copies_can_still_be_read(tiny_build: Path) -> None:
    engines(tiny_build, "--precision", "fp16")
    folder = engine_folder(tiny_build, "mmdit")
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
    ]
    onnx.load(str(folder / "model.onnx"))
    onnx.load(str(Layout("tiny", tiny_build).onnx("mmdit") / "model.onnx"))


def test_a_second_run_builds_nothing_and_loads_no_heavy_library(tiny_build: Path) -> None:
    engines(tiny_build)
    code = (
        "import sys\n"
        "from engines.__main__ import main\n"
        f"main(['build', '--model', 'tiny', '--build', {str(tiny_build)!r}, '--target', 'cpu'])\n"
        "heavy = {'onnx', 'onnxruntime', 'tensorrt', 'polygraphy', 'torch'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for component in COMPONENTS:
        assert f"{component}: up to date" in done.stdout


def test_a_changed_onnx_file_remakes_its_engine_alone_and_says_why(
    tiny_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(tiny_build)
    changed = tiny_graph("t5")
    changed.producer_name = "another exporter"
    save_source(tiny_build, "t5", model=changed)
    capsys.readouterr()
    engines(tiny_build)
    printed = capsys.readouterr().out
    assert "t5: building (made_from differ: model.onnx" in printed
    assert printed.count(": building") == 1


def test_another_shape_set_remakes_the_engines_and_a_changed_report_beside_the_onnx_does_not(
    tiny_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines(tiny_build)
    fp8 = Layout("tiny", tiny_build).onnx("mmdit", Precision.FP8)
    manifest = json.loads((fp8 / "manifest.json").read_text())
    manifest["files"]["layers.json"] = "changed"
    (fp8 / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    engines(tiny_build)
    assert ": building" not in capsys.readouterr().out
    large = FAMILY.model_copy(update={"max_latent": 64})
    for component in COMPONENTS:
        precision = Precision.FP8 if component == "mmdit" else Precision.FP16
        save_source(tiny_build, component, precision, family=large)
    engines(tiny_build, "--shapes", "square-512")
    assert "clip_l: building (settings differ: family" in capsys.readouterr().out


def test_a_damaged_engine_is_made_again(tiny_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines(tiny_build)
    (engine_folder(tiny_build, "clip_g") / "model.onnx").write_bytes(b"half a file")
    capsys.readouterr()
    engines(tiny_build)
    assert "clip_g: building (model.onnx changed on disk)" in capsys.readouterr().out
    onnx.checker.check_model(str(engine_folder(tiny_build, "clip_g") / "model.onnx"))


@pytest.mark.parametrize(
    ("stranger", "words"),
    [
        ({"checkpoint": "bad"}, "another checkpoint"),
        ({"family": FAMILY.model_copy(update={"t5_tokens": 9})}, "another family"),
    ],
)
def test_a_component_of_another_model_is_named(
    tiny_build: Path, stranger: dict[str, object], words: str
) -> None:
    save_source(tiny_build, "clip_g", **stranger)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=f"^clip_g in .*{words}.* than clip_l, t5, mmdit"):
        engines(tiny_build)


@pytest.mark.parametrize(("precision", "command"), [("fp8", "make fp8"), ("fp16", "make onnx")])
def test_a_missing_onnx_file_names_the_command_that_makes_it(
    tiny_build: Path, precision: str, command: str
) -> None:
    (Layout("tiny", tiny_build).onnx("mmdit", Precision(precision)) / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"mmdit.*run `{command} MODEL=tiny` first"):
        engines(tiny_build, "--precision", precision)


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
    tiny_build: Path, break_it: object, words: str
) -> None:
    model = tiny_graph("mmdit")
    break_it(model.graph)  # type: ignore[operator]
    save_source(tiny_build, "mmdit", model=model)
    with pytest.raises(EngineError, match=f"^mmdit: .*{words}"):
        engines(tiny_build, "--precision", "fp16")
    assert not engine_folder(tiny_build, "mmdit").exists()


def test_a_file_that_is_no_onnx_is_refused(tiny_build: Path) -> None:
    folder = Layout("tiny", tiny_build).onnx("t5")
    (folder / "model.onnx").write_bytes(b"no graph")
    manifest = read_manifest(folder)
    manifest.files["model.onnx"] = artifact.sha256(folder / "model.onnx")
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(EngineError, match="^t5: .* is no valid ONNX model"):
        engines(tiny_build)
    model = tiny_graph("t5")
    model.graph.node[0].op_type = "NoSuchOperator"
    save_source(tiny_build, "t5", model=model)
    with pytest.raises(EngineError, match="^t5: .* is no valid ONNX model: .*NoSuchOperator[^\n]*$"):
        engines(tiny_build)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize(("precision", "command"), [("fp8", "make fp8"), ("fp16", "make onnx")])
def test_an_onnx_file_edited_after_its_manifest_was_written_is_refused_and_the_former_engine_stays(
    tiny_build: Path, precision: str, command: str, name: str
) -> None:
    engines(tiny_build, "--precision", precision)
    before = read_manifest(engine_folder(tiny_build, "mmdit", Precision(precision)))
    file = Layout("tiny", tiny_build).onnx("mmdit", Precision(precision)) / name
    file.write_bytes(file.read_bytes() + b"\0")
    (engine_folder(tiny_build, "mmdit", Precision(precision)) / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=f"^mmdit: .*{name} changed since .*run `{command}` again"):
        engines(tiny_build, "--precision", precision)
    assert read_manifest(engine_folder(tiny_build, "mmdit", Precision(precision))) == before


def test_an_output_whose_dims_the_file_leaves_open_is_measured(tiny_build: Path) -> None:
    model = tiny_graph("clip_l")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "Addhidden_dim_1"
    save_source(tiny_build, "clip_l", model=model)
    engines(tiny_build)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "Addhidden_dim_2"
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((1, 9), np.float16), "to_hidden"))
    save_source(tiny_build, "clip_l", model=model)
    with pytest.raises(EngineError, match=r"clip_l: output 'hidden' is float16 \[1, 77, 9\].*\[1, 77, 4\]"):
        engines(tiny_build)


def test_an_output_that_is_not_finite_is_refused_and_the_former_engine_stays(tiny_build: Path) -> None:
    engines(tiny_build, "--precision", "fp16")
    before = read_manifest(engine_folder(tiny_build, "mmdit"))
    model = tiny_graph("mmdit")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.full((1, 4, 1, 1), np.inf, np.float16), "bias")
    )
    save_source(tiny_build, "mmdit", model=model)
    with pytest.raises(EngineError, match="^mmdit: output 'velocity' holds values that are not finite"):
        engines(tiny_build, "--precision", "fp16")
    assert read_manifest(engine_folder(tiny_build, "mmdit")) == before
    assert not list(engine_folder(tiny_build, "mmdit").parent.glob("*.partial"))


def test_a_graph_that_onnx_runtime_cannot_run_is_refused_in_words(tiny_build: Path) -> None:
    model = tiny_graph("vae_decoder")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((FAMILY.latent_channels + 1, 3, 8, 8), np.float16), "kernel")
    )
    save_source(tiny_build, "vae_decoder", model=model)
    with pytest.raises(
        EngineError, match="^vae_decoder: ONNX Runtime cannot run it: .*, at 1 rows of 64×64 pixels$"
    ):
        engines(tiny_build)
