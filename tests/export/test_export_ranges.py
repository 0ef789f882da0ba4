"""The range of a file's weights, as it is found while they are written."""

import numpy as np
import pytest
import torch
from onnx import helper

from export.ranges import Ranges
from export.weights import E4M3_MAX, Graph, Weight
from mmdit.artifact import read_manifest
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import EngineError


def ranges(**weights: torch.Tensor) -> Ranges:
    found = Ranges()
    for name, weight in weights.items():
        found.add(name, weight, weight)
    return found


def test_the_largest_and_the_most_subnormal_weight_are_named():
    """Shares count values; zero is normal."""
    large = torch.tensor([1.0, -300.0, 0.0, 2.0]).half()
    small = torch.tensor([6.2e-5, 6.0e-5, -1e-6, 0.5]).half()  # 6.1e-5 is the smallest normal number
    assert ranges(large=large, small=small).found() == {
        "tensors": 2,
        "largest": {"magnitude": 300.0, "in": "large"},
        "subnormal": {"share": 2 / 8, "worst": 2 / 4, "in": "small"},
        "zeroed": {"share": 0.0, "worst": 0.0, "in": ""},
    }


def test_an_island_in_fp32_is_held_against_fp32():
    """What FP16 would hold as a subnormal number is none there."""
    assert ranges(island=torch.tensor([1e-6, 1e-40])).subnormal == 1


def test_what_e4m3_rounds_to_zero_is_counted():
    """By its own scale: E4M3's smallest number is 2^-9, its smallest normal one 2^-6."""
    weight = torch.tensor([[448.0, 2.0**-6, 2.0**-9, 2.0**-11, 0.0]]).half()
    graph = Graph(helper.make_model(helper.make_graph([], "g", [], [])), {}, {"w": weight})
    graph.weights["w/e4m3"] = Weight("w", scale=torch.tensor(448 / E4M3_MAX))
    found = Ranges()
    found.add("w", weight, graph.stored("w/e4m3"))
    assert (found.values, found.subnormal, found.zeroed) == (5, 1, 1)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_weight_that_is_not_finite_is_an_error(value):
    """It names the weight."""
    with pytest.raises(EngineError, match=f"^blocks.1.weight: its largest magnitude is {value}, expected"):
        ranges(**{"blocks.1.weight": torch.tensor([1.0, value]).half()})


def test_every_manifest_tells_its_weights_range(build):
    """FP8 zeroes some values, FP16 none."""
    for component in COMPONENTS:
        found = read_manifest(build.onnx(component)).findings["weights"]
        assert found["tensors"] > 10 and found["zeroed"]["share"] == 0
    fp8 = read_manifest(build.onnx("mmdit", Precision.FP8)).findings["weights"]
    assert 0 < fp8["zeroed"]["share"] < fp8["subnormal"]["share"] < 0.05
