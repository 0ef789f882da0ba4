"""One component's engine: reused where its manifest says that it is the same, else built."""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.graph import check_graph
from engines.onnxruntime_from_onnx import onnxruntime_from_onnx
from engines.plan_from_onnx import Options, plan_from_onnx
from engines.source import MODEL, Source
from mmdit.artifact import Layout, Manifest, versions, whole
from mmdit.contract import components, profiles
from mmdit.errors import TargetError
from mmdit.family import Family
from mmdit.shapes import ShapeSet
from mmdit.target import Gpu, Target

PLAN = "model.plan"


@dataclass(frozen=True)
class Build:
    """What all engines of one run share. A TensorRT target has a GPU and a version of TensorRT."""

    layout: Layout
    family: Family
    shapes: ShapeSet
    target: Target
    options: Options = Options()
    gpu: Gpu | None = None
    tensorrt: str | None = None


def engine(source: Source, build: Build) -> Path:
    """The file of a component's engine, built unless it is up to date; says which, and why.

    Imports no runtime when there is nothing to build. Raises EngineError or TargetError.
    """
    component, target = source.component, build.target
    folder = build.layout.engine(target.name, component, source.precision)
    file = folder / (PLAN if target.runtime == "tensorrt" else MODEL)
    wanted = Manifest(
        kind="engine",
        checkpoint=source.manifest.checkpoint,
        made_from=source.files | source.calibration,
        settings=_settings(source, build),
        versions=_versions(build),
    )
    reason = wanted.reason_to_rebuild(folder)
    if reason is None:
        print(f"{component}: up to date")
        return file
    print(f"{component}: building ({reason})", flush=True)
    signature = components(build.family, build.shapes)[component]
    check_graph(source.onnx, component, signature)
    with whole(folder, wanted) as partial:
        if target.runtime == "tensorrt":
            assert build.gpu is not None  # resolve() gives no TensorRT target without one
            wanted.findings = plan_from_onnx(
                source,
                partial / PLAN,
                signature=signature,
                shapes=build.shapes,
                options=build.options,
                timing_caches=build.layout.root.parent / "timing-caches",
                gpu=build.gpu,
            )
        else:
            wanted.findings = onnxruntime_from_onnx(
                source, partial, signature=signature, shapes=build.shapes, family=build.family
            )
    return file


def _settings(source: Source, build: Build) -> dict[str, Any]:
    signature = components(build.family, build.shapes)[source.component]
    settings = {
        "component": source.component,
        "precision": source.precision.value,
        "runtime": build.target.runtime,
        "target": build.target.name,
        "family": build.family.model_dump(),
        "shapes": build.shapes.model_dump(),
        "profiles": profiles(signature, build.shapes),
        "options": build.options.settings if build.target.runtime == "tensorrt" else {},
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists
    return as_read_back


def _versions(build: Build) -> dict[str, str]:
    tools = ("polygraphy",) if build.target.runtime == "tensorrt" else ("onnx", "onnxruntime")
    try:
        found = versions(*tools)
    except metadata.PackageNotFoundError as error:
        raise TargetError(
            f"target {build.target.name!r} needs the package {error.name}: `pip install {error.name}`"
        ) from None
    if build.target.compute_capability is not None:
        found["tensorrt"] = str(build.tensorrt)
        found["compute_capability"] = "{}.{}".format(*build.target.compute_capability)
    return found
