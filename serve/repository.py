"""Engines → a Triton model repository: self-contained, validated, whole or not there.

It runs from a volume or an object store without this checkout: the Python models' code, their settings,
the tokenizers and the `tokenizers` library lie inside.
"""

import contextlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mmdit.artifact import Layout, Manifest, code_digest, digest, read_manifest, require, versions, whole
from mmdit.contract import (
    COMPONENTS,
    TEXT_ENCODERS,
    Precision,
    Signature,
    components,
    served_models,
)
from mmdit.errors import ArtifactError, RepositoryError
from mmdit.family import VAE_SCALE, Family
from mmdit.shapes import ShapeSet
from serve import model_config
from serve.quality import quality_of

POLICIES = Path(__file__).resolve().parent.parent / "model_repository"
_INSIDE = Path(__file__).with_name("inside")
_ONNXRUNTIME_ENGINE = Path(__file__).with_name("runtime") / "onnxruntime_engine.py"


class Engines:
    """The engines of one model for one target, checked to belong together."""

    def __init__(self, layout: Layout, target: str, precision: Precision) -> None:
        """Raises ArtifactError for a missing engine, RepositoryError for engines that do not fit."""
        make = f"make engines MODEL={layout.model} TARGET={target} PRECISION={precision.value}"
        self.layout = layout
        precisions = {name: Precision.FP16 for name in COMPONENTS} | {"mmdit": precision}
        self.folders = {name: layout.engine(target, name, precisions[name]) for name in COMPONENTS}
        self.manifests = {name: require(folder, make) for name, folder in self.folders.items()}
        self.tokenizers = layout.tokenizers
        parts = {**self.manifests, "tokenizers": require(layout.tokenizers, "make onnx")}
        for field in ("checkpoint", "family", "shapes", "runtime"):
            values = {
                name: manifest.checkpoint if field == "checkpoint" else manifest.settings[field]
                for name, manifest in parts.items()
                if field in ("checkpoint", "family") or name != "tokenizers"
            }
            common = values["mmdit"]
            others = [name for name, value in values.items() if value != common]
            if others:
                raise RepositoryError(
                    f"{', '.join(others)}: made from another {field} than the mmdit engine in "
                    f"{self.folders['mmdit']}; engines of different models cannot be served together, run "
                    f"`{make}`"
                )
        for name, folder in self.folders.items():
            for file in self.manifests[name].files:
                if not (folder / file).is_file():
                    raise ArtifactError(f"{folder / file} is gone: run `{make}` again")
        mmdit = self.manifests["mmdit"]
        self.family = Family.model_validate(mmdit.settings["family"])
        self.shapes = ShapeSet.model_validate(mmdit.settings["shapes"])
        self.runtime: str = mmdit.settings["runtime"]
        self.signatures: dict[str, Signature] = components(self.family, self.shapes)
        self.files = [  # component, file, SHA-256
            (name, file, value)
            for name, manifest in self.manifests.items()
            for file, value in manifest.files.items()
        ]


def package(
    engines: Engines, target: str, precision: Precision, output: Path, *, accept_quality: bool = False
) -> str | None:
    """Write the repository of a target into `output`, unless it is up to date.

    Returns why it was written, None when it was not. Raises RepositoryError for a policy or a repository
    that Triton would not load, and for FP8 engines whose quality gate was not passed, unless
    `accept_quality` says that they are wanted all the same.
    """
    settings: dict[str, Any] = {}
    if precision is Precision.FP8:
        files = {f"{engines.folders[name].name}/{file}": value for name, file, value in engines.files}
        settings["quality"] = quality_of(files, engines.layout, target, accept=accept_quality)
    manifest = Manifest(
        kind="repository",
        checkpoint=engines.manifests["mmdit"].checkpoint,
        made_from={f"{name}/{file}": value for name, file, value in engines.files}
        | {f"tokenizers/{k}": v for k, v in read_manifest(engines.tokenizers).files.items()}
        | {"policies": _policies_digest(), "inside": code_digest(_INSIDE), "packager": _packager_digest()},
        settings={
            "target": target,
            "precision": precision.value,
            "runtime": engines.runtime,
            "family": engines.family.model_dump(mode="json"),
            "shapes": engines.shapes.model_dump(mode="json"),
        }
        | settings,
        versions=versions("tokenizers"),
    )
    reason = manifest.reason_to_rebuild(output)
    if reason is not None:
        with whole(output, manifest) as folder:
            write_repository(engines, precision, folder)
            check_repository(folder, engines.family, engines.shapes)
    return reason


def write_repository(engines: Engines, precision: Precision, folder: Path) -> None:
    """Write every model's folder."""
    served = served_models(engines.family)
    for path in sorted(POLICIES.glob("*/config.pbtxt")):
        name = path.parent.name
        config = model_config.policy(path)
        version = folder / name / "1"
        version.mkdir(parents=True)
        if name in engines.folders:
            engine = engines.manifests[name]
            profiles = len(engine.settings["profiles"])
            config, file = model_config.engine_config(
                config, engines.signatures[name], engines.runtime, profiles
            )
            for each in engine.files:
                _place(engines.folders[name] / each, version / each)
            if engines.runtime == "onnxruntime":
                shutil.copy(_ONNXRUNTIME_ENGINE, version / "model.py")
                # ONNX Runtime's optimizations are wrong about FP8 Q/DQ: see engines/session.py.
                fp8 = engine.settings["precision"] == Precision.FP8.value
                level = "ORT_DISABLE_ALL" if fp8 else "ORT_ENABLE_ALL"
                _write_json(version / "settings.json", {"graph_optimization_level": level})
        elif name == "text_to_image":
            config = model_config.ensemble_config(config, served[name], engines.family)
        elif name in served:
            decoupled = name == "text_to_image_stream"
            config = model_config.python_config(config, served[name], decoupled=decoupled)
            shutil.copy(path.parent / "1/model.py", version / "model.py")
            shutil.copytree(_INSIDE, version / "inside", ignore=shutil.ignore_patterns("__pycache__"))
            _write_json(version / "settings.json", _settings(engines))
            if name == "text_encoder":
                tokenizers = read_manifest(engines.tokenizers).files
                (version / "tokenizers_json").mkdir()
                for file in tokenizers:
                    shutil.copy(engines.tokenizers / file, version / "tokenizers_json" / file)
                _copy_library("tokenizers", version)
        else:
            raise RepositoryError(f"{path}: the contract has no model {name!r}")
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


def _place(source: Path, destination: Path) -> None:
    """Hard-link a plan, which is gigabytes; copy an ONNX file, whose external data may have one link only."""
    if source.suffix == ".plan":
        with contextlib.suppress(OSError):  # another file system
            os.link(source, destination)
            return
    shutil.copy2(source, destination)


def _settings(engines: Engines) -> dict[str, Any]:
    return {
        "family": engines.family.model_dump(mode="json"),
        "shapes": engines.shapes.model_dump(mode="json"),
        "pixels_per_latent": VAE_SCALE,
        "encoders": {
            name: [tensor.name for tensor in engines.signatures[name].outputs] for name in TEXT_ENCODERS
        },
    }


def _copy_library(name: str, version: Path) -> None:
    """Put an installed pure or abi3 library beside a model, for Pythons that do not have it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RepositoryError(f"the {name} library is not installed: run `make setup`")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyi")
    shutil.copytree(Path(spec.origin).parent, version / name, ignore=ignore)


def _policies_digest() -> str:
    files = sorted(path for path in POLICIES.rglob("*") if path.suffix in (".pbtxt", ".py"))
    return digest({str(path.relative_to(POLICIES)): path.read_text() for path in files})


def _packager_digest() -> str:
    return digest(
        [code_digest(Path(__file__).parent / "runtime"), Path(__file__).read_text()]
        + [Path(str(model_config.__file__)).read_text()]
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
