"""TensorRT plans that the packager refuses, and what it tells of those that it takes."""

import json
import shutil

import pytest
from stand_in_plans import packaged, write_engines

from engines.tensorrt.compatibility import Plan
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import ArtifactError, RepositoryError
from mmdit.shapes import shape_set


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:7]), r"has 7 bytes, expected 16"),
        (lambda plan: plan.write_bytes(b"another of 16 by"), "changed after it was written"),
    ],
)
def test_the_packager_names_a_damaged_engine_and_leaves_the_earlier_repository(hopper, damage, reason):
    repository = packaged(hopper)
    before = (repository / "manifest.json").read_bytes()
    plan = hopper.engine("hopper", "vae_decoder", Precision.FP16) / "model.plan"
    plan.unlink()
    plan.write_bytes(b"hopper vae_deco ")
    damage(plan)
    with pytest.raises(ArtifactError, match=rf"vae_decoder-fp16/model\.plan {reason}.*make engines"):
        packaged(hopper)
    assert (repository / "manifest.json").read_bytes() == before
    assert (repository / "vae_decoder/1/model.plan").read_bytes() == b"hopper vae_decod"


def test_an_engine_copied_from_another_gpu_with_its_manifest_is_refused(hopper, large, tmp_path):
    """As is one that another TensorRT built; the repository that was there stays."""
    repository = packaged(hopper)
    before = (repository / "manifest.json").read_bytes()
    shapes = shape_set(large, "square-1024")
    mmdit = hopper.engine("hopper", "mmdit", Precision.FP8)
    shutil.rmtree(mmdit)
    write_engines(hopper, large, shapes, only=["mmdit"], target="ada")
    shutil.copytree(hopper.engine("ada", "mmdit", Precision.FP8), mmdit)
    with pytest.raises(
        RepositoryError, match=r"built for ada .* 8\.9, on a card of ada\), and hopper is 9\.0"
    ):
        packaged(hopper)
    write_engines(hopper, large, shapes, only=["mmdit"], tensorrt="10.16.2.1")
    with pytest.raises(RepositoryError, match="one server loads them all, and has one TensorRT"):
        packaged(hopper)
    assert (repository / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("strip", r"model\.plan is stripped.*`python -m engines refit --model large --target hopper` first"),
        ("weight_streaming", r"for weight streaming, but Triton's TensorRT backend sets no budget"),
    ],
)
def test_a_plan_that_triton_cannot_use_is_refused_with_the_way_out(large, tmp_path, option, message):
    layout = Layout("large", tmp_path)
    shapes = shape_set(large, "square-1024")
    write_engines(layout, large, shapes, options={option: True})
    with pytest.raises(RepositoryError, match=message):
        packaged(layout)
    assert not layout.repository("hopper", Precision.FP8).exists()


def test_an_engine_whose_manifest_tells_no_tensorrt_is_refused(hopper):
    path = hopper.engine("hopper", "t5", Precision.FP16) / "manifest.json"
    content = json.loads(path.read_text())
    del content["versions"]["tensorrt"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="t5-fp16: its manifest does not tell the tensorrt"):
        packaged(hopper)


def test_the_repositorys_manifest_tells_where_each_plan_came_from(hopper):
    """GPU, compute capability, TensorRT, driver and what it was made from, for each component."""
    plans = [Plan.model_validate(each) for each in read_manifest(packaged(hopper)).settings["plans"]]
    assert [plan.component for plan in plans] == list(COMPONENTS)
    for plan in plans:
        assert plan.gpu == "a card of hopper" and plan.driver == "600.1"
        assert (plan.compute_capability, plan.tensorrt) == ("9.0", "11.4.0.106")
        assert set(plan.made_from) >= {"model.onnx"}
