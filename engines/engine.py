"""One component's engine: reused where its manifest says that it is the same, else built."""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.runtimes import runtime
from engines.source import Source, check_unchanged
from engines.tensorrt.options import Options
from mmdit.artifact import Layout, Manifest, read_manifest, versions, whole
from mmdit.code import code_of
from mmdit.contract import components, profiles
from mmdit.errors import ArtifactError, ContractError, TargetError
from mmdit.family import VAE_SCALE, Family
from mmdit.shapes import ShapeSet, tokens
from mmdit.target import Gpu, Target

STRIPPED = "stripped model.plan"  # among what a refitted plan was made from


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


def engine(source: Source, build: Build, prepared: dict[str, Any] | None = None) -> Path:
    """The file of a component's engine, built unless it is up to date; says which, and why.

    `prepared`: what the runtime's `check` found about the source. Imports no runtime when there is
    nothing to build. A plan is built in a process of its own, and the earlier one stays until the new one is
    whole. Raises ArtifactError for an ONNX file that changed since its manifest was written, ContractError
    for a profile outside the contract, EngineError or TargetError.
    """
    component, target = source.component, build.target
    folder = build.layout.engine(target.name, component, source.precision)
    row = runtime(target.runtime)
    file = folder / row.file
    wanted = _wanted(source, build)
    reason = wanted.reason_to_rebuild(folder)
    if reason is None:
        print(f"{component}: up to date")
        return file
    print(f"{component}: building ({reason})", flush=True)
    if not build.options.strip and _is_stripped(folder):
        print(
            f"{component}: a stripped plan is there; `make refit` adds its weights in less time", flush=True
        )
    wanted.made_from = source.made_from
    check_profiles(build.family, build.shapes)
    check_unchanged(source)
    with whole(folder, wanted) as partial:
        wanted.findings = row.functions.build(source, partial, build) | (prepared or {})
    return file


def _is_stripped(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder).settings.get("options", {}).get("strip"))
    except ArtifactError:
        return False


def up_to_date(source: Source, build: Build) -> bool:
    """Whether a component's engine is the one that would be built."""
    folder = build.layout.engine(build.target.name, source.component, source.precision)
    return _wanted(source, build).reason_to_rebuild(folder) is None


def _wanted(source: Source, build: Build) -> Manifest:
    folder = build.layout.engine(build.target.name, source.component, source.precision)
    return Manifest(
        kind="engine",
        checkpoint=source.manifest.checkpoint,
        made_from=source.made_from | _refitted_from(folder, build),
        settings=_settings(source, build),
        code=code_of(runtime(build.target.runtime).functions.build),
        versions=_versions(build),
    )


def check_profiles(family: Family, shapes: ShapeSet) -> None:
    """Raise ContractError where a shape set's range is outside what a family or the set itself allows."""
    for each in shapes.ranges:
        limit = family.max_latent * VAE_SCALE
        wrong = [side for size in (each.min, each.opt, each.max) for side in size if side % shapes.multiple]
        if wrong:
            why = f"{wrong[0]} is no multiple of {shapes.multiple}"
        elif max(each.max) > limit:
            why = f"{max(each.max)} is more than the {limit} that the position embedding covers"
        elif shapes.row_tokens and each.max_rows * tokens(family, each.max) > shapes.row_tokens:
            why = f"{each.max_rows} rows there are more than its budget of {shapes.row_tokens} rows × tokens"
        else:
            continue
        raise ContractError(
            f"shape set {shapes.name!r}: the profile of {each.min[0]}×{each.min[1]} to "
            f"{each.max[0]}×{each.max[1]} pixels is outside the contract: {why}; choose another with --shapes"
        )


def _refitted_from(folder: Path, build: Build) -> dict[str, str]:
    """The stripped plan that the plan in `folder` was refitted from, if so: as good as one built anew."""
    try:
        made_from = read_manifest(folder).made_from
    except ArtifactError:
        return {}
    return {STRIPPED: made_from[STRIPPED]} if STRIPPED in made_from and not build.options.strip else {}


def _settings(source: Source, build: Build) -> dict[str, Any]:
    signature = components(build.family, build.shapes)[source.component]
    row = runtime(build.target.runtime)
    settings = {
        "component": source.component,
        "precision": source.precision.value,
        "runtime": row.name,
        "target": build.target.name,
        "family": build.family.model_dump(),
        "shapes": build.shapes.model_dump(),
        "profiles": profiles(signature, build.shapes),
        "options": build.options.settings if row.has_options else {},
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists
    return as_read_back


def _versions(build: Build) -> dict[str, str]:
    try:
        found = versions(*runtime(build.target.runtime).tools)
    except metadata.PackageNotFoundError as error:
        raise TargetError(
            f"target {build.target.name!r} needs the package {error.name}: `pip install {error.name}`"
        ) from None
    if build.target.compute_capability is not None:
        found["tensorrt"] = str(build.tensorrt)
        found["compute_capability"] = "{}.{}".format(*build.target.compute_capability)
    return found
