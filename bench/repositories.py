"""Triton repositories for the benchmarks: packaged ones with another engine or policy, one made to measure.

`running` serves them like any other.
"""

import json
import shutil
from pathlib import Path

from mmdit.artifact import MANIFEST, Manifest
from mmdit.contract import COMPONENTS
from mmdit.family import VAE_SCALE
from serve.repository import POLICIES

MODELS = Path(__file__).with_name("models")
INSIDE = POLICIES.parent / "serve" / "inside"
_ENGINE = """backend: "python" max_batch_size: 16
input { name: "latent" data_type: TYPE_FP16 dims: [ 16, -1, -1 ] }
input { name: "timestep" data_type: TYPE_FP32 dims: 1 }
input { name: "context" data_type: TYPE_FP16 dims: [ 333, 4096 ] }
input { name: "pooled" data_type: TYPE_FP16 dims: 2048 }
output { name: "velocity" data_type: TYPE_FP16 dims: [ 16, -1, -1 ] }
"""
_STEP = {
    "step_models": [
        {"name": "mmdit", "inputs": ["latent", "timestep", "context", "pooled"], "outputs": ["velocity"]}
    ]
}
_STEP_COST = """backend: "python"
input { name: "rounds" data_type: TYPE_INT32 dims: 1 }
input { name: "steps" data_type: TYPE_INT32 dims: 1 }
output { name: "scheduled" data_type: TYPE_FP64 dims: -1 }
output { name: "engine" data_type: TYPE_FP64 dims: -1 }
output { name: "host" data_type: TYPE_FP64 dims: -1 }
output { name: "bare" data_type: TYPE_FP64 dims: -1 }
output { name: "renewed" data_type: TYPE_FP64 dims: -1 }
"""


def one_at_a_time(packaged: Path, folder: Path) -> Path:
    """A copy of a packaged repository whose step scheduler makes one picture after the other.

    A table of step times without gain tells it to, as a measured one would.
    """
    shutil.copytree(packaged, folder)
    path = folder / "denoiser" / "1" / "settings.json"
    settings = json.loads(path.read_text())
    settings["step_times"] = [
        {"size": each["opt"], "milliseconds": {"2": 20.0, "4": 40.0}} for each in settings["shapes"]["ranges"]
    ]
    path.write_text(json.dumps(settings))
    return folder


def with_stand_ins(packaged: Path, folder: Path, base_ms: float, row_ms: float) -> Path:
    """A copy of a packaged repository whose `mmdit` takes a fixed time, and the other engines none."""
    shutil.copytree(packaged, folder)
    for name in COMPONENTS:
        config = (folder / name / "config.pbtxt").read_text()
        if name == "mmdit":
            _stand_in(folder / name, config, base_ms, row_ms)
        else:
            _stand_in(folder / name, config, 0, 0, scale=VAE_SCALE if name == "vae_decoder" else 1)
    return folder


def for_step_cost(folder: Path) -> Path:
    """A repository of the stand-in engine, which returns at once, and of the model that measures."""
    _stand_in(folder / "mmdit", _ENGINE, 0, 0)
    version = folder / "step_cost" / "1"
    version.mkdir(parents=True)
    (folder / "step_cost" / "config.pbtxt").write_text(_STEP_COST)
    shutil.copy(MODELS / "step_cost.py", version / "model.py")
    shutil.copytree(INSIDE, version / "inside", ignore=shutil.ignore_patterns("__pycache__"))
    (version / "settings.json").write_text(json.dumps(_STEP))
    manifest = Manifest(
        kind="repository", checkpoint="", made_from={}, settings={"runtime": "stand-in"}, versions={}
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def _stand_in(model: Path, config: str, base_ms: float, row_ms: float, scale: int = 1) -> None:
    version = model / "1"
    shutil.rmtree(version, ignore_errors=True)
    version.mkdir(parents=True)
    shutil.copy(MODELS / "stand_in_engine.py", version / "model.py")
    parameters = "".join(
        f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'
        for name, value in (("base_ms", base_ms), ("row_ms", row_ms), ("scale", scale))
    )
    (model / "config.pbtxt").write_text(config + parameters)
