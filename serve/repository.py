"""Engines → a Triton model repository: self-contained, validated, whole or not there.

It runs from a volume or an object store without this checkout: the Python models' code, their settings,
the tokenizers and the `tokenizers` library lie inside.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.runtimes import ModelFiles
from mmdit.artifact import Manifest, digest, read_manifest, versions, whole
from mmdit.code import code_of
from mmdit.contract import TEXT_ENCODERS, Precision, Signature, components, served_models
from mmdit.errors import RepositoryError
from mmdit.family import VAE_SCALE, Family
from mmdit.shapes import ShapeSet
from mmdit.step_times import StepTimes
from serve import model_config, warm_up
from serve.engine_set import Engines
from serve.quality import quality_of
from serve.server_memory import cuda_pool, shared_memory
from serve.timing import check_step_times

POLICIES = Path(__file__).resolve().parent.parent / "model_repository"
_STEP = ("mmdit",)  # the models of a denoising step, in their order
_INSIDE = Path(__file__).with_name("inside")


def package(
    engines: Sequence[Engines],
    output: Path,
    *,
    accept_quality: bool = False,
    step_times: Sequence[StepTimes] = (),
    cache_pictures: bool = False,
) -> str | None:
    """Write the repository of one or several targets' engines into `output`, unless it is up to date.

    Returns why it was written, None when it was not. Raises RepositoryError for a policy or a repository
    that Triton would not load, for targets whose engines or step times are not of one model, and for FP8
    engines whose quality gate was not passed, unless `accept_quality` says that they are wanted all the same.
    Whatever was wrong, an earlier repository stays as it is.

    `step_times`, as `make gpu-check` measures them, tell the step scheduler where sharing calls pays; without
    them it shares as many rows as the shape set allows. With `cache_pictures` the same request to
    `text_to_image` is answered from Triton's response cache, and must bring its seed.
    """
    first = engines[0]
    _check_one_config(engines)
    configs = {path.parent.name: model_config.policy(path) for path in _policies()}
    components_served = [name for name in first.folders if name in configs]
    files = first.runtime.functions.triton_config(
        {name: configs[name] for name in components_served},
        {name: {each.target: each.folders[name] for each in engines} for name in components_served},
        first.layout.model,
    )
    check_step_times(step_times, first.family)
    quality = {
        each.target: quality_of(each.files(by_folder=True), each.layout, each.target, accept=accept_quality)
        for each in engines
        if each.precision is Precision.FP8
    }
    manifest = Manifest(
        kind="repository",
        checkpoint=first.checkpoint,
        made_from={f"{each.target}/{file}": value for each in engines for file, value in each.files().items()}
        | {f"tokenizers/{k}": v for k, v in read_manifest(first.tokenizers).files.items()}
        | {f"preview/{k}": v for k, v in read_manifest(first.preview).files.items()}
        | {"policies": _texts_digest(POLICIES), "inside": _texts_digest(_INSIDE)},
        settings={
            "targets": [each.target for each in engines],
            "precisions": {each.target: each.precision.value for each in engines},
            "runtime": first.runtime.name,
            "family": first.family.model_dump(mode="json"),
            "shapes": first.shapes.model_dump(mode="json"),
            "plans": files.plans,
            "quality": quality,
            "step_times": [each.model_dump(mode="json") for each in step_times],
            "cache_pictures": cache_pictures,
        },
        code=code_of(write_repository, check_repository, _memory, first.runtime.functions.triton_config),
        versions=versions("tokenizers"),
    )
    reason = manifest.reason_to_rebuild(output)
    if reason is not None:
        with whole(output, manifest) as folder:
            write_repository(first, folder, configs, files, step_times, cache_pictures)
            check_repository(folder, first.family, first.shapes)
            manifest.findings = _memory(first, folder)
    return reason


def write_repository(
    engines: Engines,
    folder: Path,
    configs: Mapping[str, model_config.ModelConfig],
    files: ModelFiles,
    step_times: Sequence[StepTimes] = (),
    cache_pictures: bool = False,
) -> None:
    """Write every model's folder; `engines` are those of any target, `files` the engines of all."""
    served = served_models(engines.family, cache_pictures=cache_pictures)
    row_by_row = engines.runtime.python_backend
    for name, config in configs.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        if name in files.files:
            for file, source in files.files[name].items():
                (_place if files.linked else shutil.copy2)(source, version / file)
            signature = engines.signatures[name]
            calls = warm_up.calls(signature, engines.shapes, row_by_row)
            config = model_config.engine_config(config, signature, calls)
            if name in files.settings:
                _write_json(version / "settings.json", files.settings[name])
        elif name == "text_to_image":
            config = model_config.ensemble_config(
                config, served[name], engines.family, cache_pictures=cache_pictures
            )
        elif name in served:
            decoupled = name == "text_to_image_stream"
            config = model_config.python_config(config, served[name], decoupled=decoupled)
            shutil.copy(POLICIES / name / "1/model.py", version / "model.py")
            shutil.copytree(_INSIDE, version / "inside", ignore=shutil.ignore_patterns("__pycache__"))
            _write_json(version / "settings.json", _settings(engines, step_times))
            if name == "text_to_image_stream":
                for file in read_manifest(engines.preview).files:
                    shutil.copy(engines.preview / file, version / file)
            if name == "prompt_encoder":
                tokenizers = read_manifest(engines.tokenizers).files
                (version / "tokenizers_json").mkdir()
                for file in tokenizers:
                    shutil.copy(engines.tokenizers / file, version / "tokenizers_json" / file)
                _copy_library("tokenizers", version)
        else:
            raise RepositoryError(f"{POLICIES / name}: the contract has no model {name!r}")
        (folder / name / "config.pbtxt").write_text(model_config.to_text(config))


def check_repository(folder: Path, family: Family, shapes: ShapeSet) -> None:
    """Raise RepositoryError unless every config of a written repository agrees with the contract."""
    expected = components(family, shapes) | served_models(family)
    configs = {}
    for path in sorted(folder.glob("*/config.pbtxt")):
        configs[path.parent.name] = model_config.written(path)
    if configs.keys() != expected.keys():
        raise RepositoryError(f"{folder} has {sorted(configs)}, the contract says {sorted(expected)}")
    for name, config in configs.items():
        model_config.check_config(config, expected[name])
    model_config.check_ensemble(configs)


def _check_one_config(engines: Sequence[Engines]) -> None:
    """Raise RepositoryError unless one config of a model does for every target's plan."""
    first = engines[0]
    if len(engines) > 1 and not all(each.runtime.bound_to_gpu for each in engines):
        raise RepositoryError(
            f"{', '.join(each.target for each in engines)}: only TensorRT plans can lie side by side, "
            "package the others alone"
        )
    for each in engines[1:]:
        for field in ("shapes", "profiles"):  # the tokenizers have seen to checkpoint and family
            if getattr(each, field) != getattr(first, field):
                raise RepositoryError(
                    f"the engines for {each.target} have another {field} than those for {first.target}: "
                    "build both from the same files, with the same --shapes"
                )


def _policies() -> list[Path]:
    return sorted(POLICIES.glob("*/config.pbtxt"))


def _memory(engines: Engines, folder: Path) -> dict[str, Any]:
    """What a server over the repository needs beyond the engines, with its policies' limits."""

    def limit(model: str, name: str) -> int:
        value = model_config.written(folder / model / "config.pbtxt").parameters[name].string_value
        if not value.isdigit():
            raise RepositoryError(
                f"{POLICIES / model}/config.pbtxt: the parameter {name} is {value!r}, expected a number"
            )
        return int(value)

    return {
        "shared_memory_bytes": shared_memory(
            engines.family,
            engines.shapes,
            engines.runtime.name,
            requests=limit("denoiser", "max_requests"),
            streams=limit("text_to_image_stream", "max_streams"),
            prompts=2 * limit("text_encoder", "max_requests") * limit("text_encoder", "max_prompt_bytes"),
        ),
        "cuda_pool_bytes": cuda_pool(engines.family, engines.shapes),
    }


def _place(source: Path, destination: Path) -> None:
    """Hard-link a plan, which is gigabytes. (An ONNX file is copied: its external data may have one link.)"""
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def _settings(engines: Engines, step_times: Sequence[StepTimes]) -> dict[str, Any]:
    return {
        "family": engines.family.model_dump(mode="json"),
        "shapes": engines.shapes.model_dump(mode="json"),
        "pixels_per_latent": VAE_SCALE,
        "step_times": [each.model_dump(mode="json") for each in step_times],
        "step_models": [_step_model(name, engines.signatures[name]) for name in _STEP],
        "encoders": {
            name: [tensor.name for tensor in engines.signatures[name].outputs] for name in TEXT_ENCODERS
        },
    }


def _step_model(name: str, signature: Signature) -> dict[str, Any]:
    """A model of the denoising step, as `serve/inside/step_models.py` reads it."""
    return {
        "name": name,
        "inputs": [tensor.name for tensor in signature.inputs],
        "outputs": [tensor.name for tensor in signature.outputs],
    }


def _copy_library(name: str, version: Path) -> None:
    """Put an installed pure or abi3 library beside a model, for Pythons that do not have it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RepositoryError(f"the {name} library is not installed: run `make setup`")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyi")
    shutil.copytree(Path(spec.origin).parent, version / name, ignore=ignore)


def _texts_digest(folder: Path) -> str:
    """The SHA-256 of the policies and Python files of a folder that are copied into the repository."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".pbtxt", ".py"))
    return digest({str(path.relative_to(folder)): path.read_text() for path in files})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
