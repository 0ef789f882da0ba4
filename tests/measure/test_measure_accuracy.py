"""What gpu-check derives from an engine: its layers' precisions, and how far its outputs are off."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from measure_samples import ELEVEN, TEN, outputs

from engines.__main__ import main as engines
from measure.accuracy import compared, difference
from measure.inspector import summary
from measure.outputs import Job as outputs_job
from measure.outputs import comparisons
from mmdit.artifact import Layout
from mmdit.contract import Precision


def test_the_inspector_tells_precisions_and_fused_attention() -> None:
    """A softmax by itself is not a fused attention, nor is a layer for its module's name."""
    ten = summary(json.dumps({"Layers": TEN, "Bindings": []}))
    assert ten.layers == {"fp8": 1, "fp16": 2, "fp32": 1} and ten.products == {"fp8": 1, "fp16": 1}
    assert (ten.attention_fused, ten.softmax_alone, ten.fused_share) == ({"fp16": 1}, 1, 0.5)
    eleven = summary(json.dumps({"Layers": ELEVEN}))
    assert eleven.layers == {"fp8": 2, "fp16": 1, "bf16": 1}
    assert (eleven.attention_fused, eleven.softmax_alone, eleven.fused_share) == ({"fp8": 1}, 0, 1.0)


def test_layers_without_details_are_counted_as_unknown() -> None:
    """A plan that was built with LAYER_NAMES_ONLY gives strings."""
    found = summary('{"Layers": ["conv", "/Softmax"]}')
    assert (found.unknown, found.layers, found.softmax_alone) == (2, {"unknown": 2}, 1)
    with pytest.raises(ValueError, match="Expecting"):
        summary("no JSON")


def test_a_difference_is_relative_to_what_was_expected() -> None:
    assert difference(np.array([3.0, 4.1]), np.array([3.0, 4.0])).relative == pytest.approx(0.02)
    assert difference(np.array([2.0, 0.0]), np.array([1.0, 0.0])).cosine == pytest.approx(1)
    assert difference(np.array([math.nan]), np.array([1.0])).relative == math.inf
    assert difference(np.zeros(2), np.zeros(2)).relative == 0


@pytest.mark.parametrize(
    ("errors", "failure"),
    [
        ({"plan": 0.004, "torch_fp16": 0.001}, None),
        ({"plan": 0.005, "torch_fp16": 0.001}, "relative error 5.00e-03, expected at most 4.24e-03"),
        ({"plan": -0.02, "onnxruntime": 0.01, "torch_fp16": 0.001}, None),
        ({"plan": 0.5, "torch_fp16": math.inf, "onnxruntime": 0.001}, "relative error"),
        ({"plan": math.nan}, "it holds values that are not finite"),
    ],
)
def test_the_bound_is_three_root_two_of_the_larger_error(
    errors: dict[str, float], failure: str | None
) -> None:
    """Where torch's plain FP16 overflows, ONNX Runtime's error alone."""
    (found,) = compared("mmdit", Precision.FP16, **outputs(**errors))
    assert (found.failure or "").startswith(failure or "") and (found.failure is None) == (failure is None)


@pytest.mark.parametrize(("plan", "good"), [(0.0149, True), (0.0151, False), (math.nan, False)])
def test_fp8_is_held_to_one_and_a_half_times_its_files_own_error(plan: float, good: bool) -> None:
    """However far torch's FP16 is: the plan runs the same scales as the file."""
    errors = {"plan": 0.01 + plan * 1.01, "onnxruntime": 0.01, "torch_fp16": 0.5}
    (found,) = compared("mmdit", Precision.FP8, **outputs(**errors))
    assert (found.failure is None) == good and found.bound == pytest.approx(0.015)


@pytest.mark.slow
def test_outputs_of_the_miniature_are_within_the_bound_that_they_give(build: Layout, miniature: Path) -> None:
    """With ONNX Runtime in the plan's place: every component in FP16, then the FP8 MMDiT alone."""
    found = []
    for precision in Precision:
        words = ["build", "--model", str(miniature), "--build", str(build.root.parent), "--target", "cpu"]
        engines([*words, "--precision", precision.value])
        job = outputs_job(model=str(miniature), build=build.root.parent, target="cpu", precision=precision)
        found += list(comparisons(job))
    assert [each.component for each in found] == ["clip_l"] * 2 + ["clip_g"] * 2 + [
        *("t5", "mmdit", "vae_decoder", "mmdit")
    ]
    for each in found:
        assert each.failure is None and each.plan.relative == 0
        assert 0 < each.onnxruntime.relative < 0.1 and 0 < each.torch_fp16.relative < 0.02
    assert found[-1].bound > found[-3].bound  # FP8's scales cost more than FP16's rounding
