"""The weights back into a stripped plan, from the ONNX file that it was built from.

Plans without weights are small enough to keep for every GPU beside one set of ONNX files. On the GPU's
machine, whose TensorRT built the plan, this makes the plan that a server runs.
"""

import os
from pathlib import Path
from typing import Any

from engines.engine import STRIPPED, Build
from engines.source import Source, check_unchanged
from engines.tensorrt.child import in_child
from engines.tensorrt.failures import explained
from engines.tensorrt.plan_from_onnx import PLAN, found_on, read_back, write_whole
from mmdit.artifact import Manifest, require, sha256, whole
from mmdit.contract import Signature, components
from mmdit.errors import ArtifactError, EngineError


def refit(source: Source, build: Build) -> Path:
    """Replace a component's stripped plan by the full one; the file is the one that `engine` would make.

    Does nothing where the plan is full. Raises ArtifactError when there is no plan, or the ONNX files are not
    those that it was built from; EngineError when TensorRT or the GPU is another, or it cannot be refitted.
    """
    component, target = source.component, build.target
    folder = build.layout.engine(target.name, component, source.precision)
    plan = folder / PLAN
    manifest = require(folder, f"make engines TARGET={target.name}")
    if not manifest.settings.get("options", {}).get("strip"):
        print(f"{component}: its plan has its weights")
        return plan
    check_unchanged(source)
    _check_origin(source, manifest, build)
    if sha256(plan) != manifest.files.get(PLAN):
        raise ArtifactError(f"{plan} changed since it was built: fetch it again, or build it again")
    options = manifest.settings["options"] | {"strip": False}
    full = manifest.model_copy(
        update={
            "made_from": {**manifest.made_from, STRIPPED: manifest.files[PLAN]},
            "settings": manifest.settings | {"options": options},
        }
    )
    print(f"{component}: refitting", flush=True)
    with whole(folder, full) as partial:
        found = in_child(
            component,
            plan_from_stripped,
            source,
            plan,
            partial / PLAN,
            components(build.family, build.shapes)[component],
        )
        assert build.gpu is not None  # _check_origin
        full.findings = manifest.findings | found | found_on(build.gpu, str(build.tensorrt))
    return plan


def plan_from_stripped(source: Source, stripped: Path, plan: Path, signature: Signature) -> dict[str, Any]:
    """Write the plan that `stripped` is with the weights of `source`; give what it says of itself.

    Raises EngineError, with TensorRT's own words. Call it through `engines.tensorrt.child`.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with explained(source.component, "built no full plan"):
        import tensorrt as trt
        from polygraphy.backend.trt import EngineFromBytes, get_trt_logger

        engine = EngineFromBytes(stripped.read_bytes())()
        refitter = trt.Refitter(engine, get_trt_logger())
        parser = trt.OnnxParserRefitter(refitter, get_trt_logger())
        if not parser.refit_from_file(str(source.onnx)):
            errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
            raise RuntimeError(f"the weights of {source.onnx} do not fit: {'; '.join(errors)}")
        if not refitter.refit_cuda_engine():
            raise RuntimeError(f"{source.onnx} lacks the weights {refitter.get_missing_weights()}")
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # set for an engine built without them
        write_whole(plan, engine.serialize_with_config(config))
        del config, parser, refitter, engine
        return read_back(source.component, plan, signature)


def _check_origin(source: Source, manifest: Manifest, build: Build) -> None:
    component = source.component
    if build.gpu is None or build.tensorrt is None:
        raise EngineError(f"{component}: refitting needs the GPU and TensorRT: {build.target.missing}")
    differing = sorted(
        name
        for name in manifest.made_from.keys() | source.made_from.keys()
        if manifest.made_from.get(name) != source.made_from.get(name)
    )
    if differing:
        raise ArtifactError(
            f"{component}: its stripped plan was not built from {source.folder}, whose "
            f"{', '.join(differing)} differs: other weights in it would give wrong pictures; fetch the ONNX "
            "files that it was built from, or build it again"
        )
    capability = "{}.{}".format(*build.gpu.compute_capability)
    for what, built, here in (
        ("TensorRT", manifest.versions.get("tensorrt"), build.tensorrt),
        ("compute capability", manifest.versions.get("compute_capability"), capability),
    ):
        if built != here:
            raise EngineError(
                f"{component}: its stripped plan was built with {what} {built}, and this machine has {here}: "
                "refit it where it runs, or build it again here"
            )
