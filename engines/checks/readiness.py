"""Whether a component's ONNX file is ready for TensorRT: what a build would find out after an hour.

Reads the graph, not the weights: seconds and megabytes whatever the model's size.
"""

from typing import Any

import onnx
from onnx import TensorProto

from engines.checks.graph import check_valid, differences, load
from engines.checks.graph_rules import GRAPH_RULES, bytes_of, external_data
from engines.source import Source
from mmdit.artifact import Manifest
from mmdit.contract import Precision, Signature
from mmdit.errors import EngineError
from mmdit.placement import RULES, SMALL, FileGraph, Finding

_SHOWN_RULES, _SHOWN_PLACES, _SHOWN_LENGTH = 4, 3, 160  # in an error's message; characters of a place
_MOST_SUBNORMAL = 0.5  # of a file's or a weight's values: half of them have lost bits
_MOST_ZEROED = 0.1  # of a weight's values


def check_ready(source: Source, signature: Signature) -> dict[str, dict[str, Any]]:
    """Rule → its sentence and how many places it looked at, for the manifest; none of them broken.

    Raises EngineError naming the component, the rules that are broken and their first places.
    """
    found = readiness(source, signature)
    broken = {rule: finding.broken for rule, finding in found.items() if finding.broken}
    if broken:
        told = [
            f"{rule} ({len(places)} of {found[rule].places} places: "
            + "; ".join(_cut(place) for place in places[:_SHOWN_PLACES])
            + (")" if len(places) <= _SHOWN_PLACES else "; …)")
            for rule, places in list(broken.items())[:_SHOWN_RULES]
        ]
        if len(broken) > _SHOWN_RULES:
            told.append(f"and {len(broken) - _SHOWN_RULES} more rules")
        made_by = "make fp8" if source.precision is Precision.FP8 else "make onnx"
        raise EngineError(
            f"{source.component}: {source.onnx} is not ready for TensorRT: it breaks {', '.join(told)}. "
            f"Export it again with `{made_by}`"
        )
    sentences = {rule.__name__: str(rule.__doc__) for rule in (*RULES, *GRAPH_RULES, external_data)}
    sentences |= {rule.__name__: str(rule.__doc__).split("\n")[0] for rule in (contract, weights)}
    recorded = source.manifest.findings.get("weights", "not recorded")
    return {
        rule: {"rule": sentences[rule], "places": finding.places}
        | ({"recorded": recorded} if rule == weights.__name__ else {})
        for rule, finding in found.items()
    }


def readiness(source: Source, signature: Signature) -> dict[str, Finding]:
    """Rule → the places that it looked at, and those that break it.

    Where external weights are missing the other rules are not asked. Raises EngineError when the file is
    not valid ONNX.
    """
    model = load(source.onnx, source.component)
    found = {external_data.__name__: external_data(model, source.folder)}
    if found[external_data.__name__].broken:
        return found
    check_valid(source.onnx, source.component)
    found[contract.__name__] = contract(model, signature)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and bytes_of(tensor) <= SMALL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(source.folder))
            tensor.data_location = TensorProto.DEFAULT
    graph = FileGraph.of(model)
    found |= {rule.__name__: rule(graph) for rule in (*GRAPH_RULES, *RULES)}
    found[weights.__name__] = weights(source.manifest)
    return found


def contract(model: onnx.ModelProto, signature: Signature) -> Finding:
    """Inputs and outputs are the contract's, and dynamic where its dims vary."""
    return Finding(len(signature.inputs) + len(signature.outputs), differences(model.graph, signature))


def weights(manifest: Manifest) -> Finding:
    """Most of the weights were normal numbers when they were written; an older manifest does not tell."""
    recorded = manifest.findings.get("weights")
    if recorded is None:
        return Finding(0)
    share = recorded["subnormal"]["share"]
    broken = [f"{share:.0%} of all values are subnormal"] if share > _MOST_SUBNORMAL else []
    return Finding(recorded["tensors"], broken)


def warnings(manifest: Manifest) -> list[str]:
    """Single weights that lost much: a key's bias, which softmax does not see, may be that small."""
    recorded = manifest.findings.get("weights", {})
    found = []
    for kind, most in (("subnormal", _MOST_SUBNORMAL), ("zeroed", _MOST_ZEROED)):
        worst = recorded.get(kind, {"worst": 0})
        if worst["worst"] > most:
            found.append(f"{worst['in']}: {worst['worst']:.0%} of its values are {kind} in the file")
    return found


def _cut(place: str) -> str:
    return place if len(place) <= _SHOWN_LENGTH else f"{place[:_SHOWN_LENGTH]}…"
