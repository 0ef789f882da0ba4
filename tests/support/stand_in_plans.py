"""A model's TensorRT engines as their stages leave them, with plans of a few bytes."""

import json
from pathlib import Path

from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import COMPONENTS, Precision, components, profiles
from mmdit.family import Family
from mmdit.shapes import ShapeSet
from serve.engine_set import Engines
from serve.repository import package

CAPABILITIES = {"hopper": "9.0", "ada": "8.9", "sm90": "9.0", "sm86": "8.6"}


def write_engines(
    layout: Layout,
    family: Family,
    shapes: ShapeSet,
    *,
    checkpoint="one",
    only=COMPONENTS,
    precision=Precision.FP8,
    target="hopper",
    tensorrt="11.4.0.106",
    options=None,
):
    """Engines for TensorRT whose plans are a few bytes, tokenizers and a projection, as their stages do."""
    of_mmdit = precision
    for name in only:
        precision = of_mmdit if name == "mmdit" else Precision.FP16
        signature = components(family, shapes)[name]
        manifest = Manifest(
            kind="engine",
            checkpoint=checkpoint,
            made_from={"model.onnx": name},
            settings={
                **{"component": name, "precision": precision.value, "runtime": "tensorrt"},
                **{"target": target, "family": family.model_dump(mode="json")},
                "shapes": shapes.model_dump(mode="json"),
                "profiles": json.loads(json.dumps(profiles(signature, shapes))),
                "options": options or {},
            },
            versions={"tensorrt": tensorrt, "compute_capability": CAPABILITIES[target]},
            findings={"gpu": f"a card of {target}", "driver": "600.1", "engine_bytes": 16},
        )
        with whole(layout.engine(target, name, precision), manifest) as folder:
            (folder / "model.plan").write_bytes(f"{target} {name}".ljust(16).encode()[:16])
    for exported, names in (
        (layout.tokenizers, ("clip_l", "clip_g", "t5")),
        (layout.preview, ("projection",)),
    ):
        manifest = Manifest(
            kind=exported.name,
            checkpoint="one",
            made_from={},
            settings={"family": family.model_dump(mode="json")},
            versions={},
        )
        with whole(exported, manifest) as folder:
            for name in names:
                (folder / f"{name}.json").write_text("{}")


def packaged(layout: Layout) -> Path:
    """The repository of Hopper's engines."""
    output = layout.repository("hopper", Precision.FP8)
    package([Engines(layout, "hopper", Precision.FP8)], output, accept_quality=True)
    return output
