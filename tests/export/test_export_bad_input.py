"""Bad input to `python -m export`: exit status 2, one readable line, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from export_command import assert_one_error
from safetensors.numpy import load_file, save_file

from export import checkpoint as checkpoint_module
from export.modules import load_module
from mmdit.artifact import MANIFEST, Layout, read_manifest
from mmdit.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[Path], None]


def configure(path: str, **values: object) -> Change:
    """Set values of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / path).write_text(json.dumps(kept))

    return change


def replace(path: str, text: str) -> Change:
    return lambda folder: (folder / path).write_text(text) and None


def cut(path: str, size: int) -> Change:
    """Cut a file off; a negative size counts from its end."""
    return lambda folder: os.truncate(folder / path, size % (folder / path).stat().st_size)


def edit_tensors(path: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / path)
        edit(tensors)
        save_file(tensors, folder / path, metadata={"format": "pt"})

    return change


def too_large(tensors: dict[str, np.ndarray]) -> None:
    tensors["text_projection.weight"] = np.full_like(tensors["text_projection.weight"], 1e6, dtype=np.float32)


def too_narrow(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][:-1])})


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "lacks text_encoder_2"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_3"), "lacks tokenizer_3"),
    "a text encoder saved as null": (
        configure("model_index.json", text_encoder_3=[None, None]),
        "lacks text_encoder_3",
    ),
    "no model_index.json": (lambda folder: (folder / "model_index.json").unlink(), "does not exist"),
    "no weights": (
        lambda folder: (folder / VAE).unlink(),
        "has no diffusion_pytorch_model.safetensors",
    ),
    "no shard": (lambda folder: (folder / SHARD).unlink(), "is missing, but"),
    "a header cut off": (cut(VAE, 1000), "damaged or cut off"),
    "the last byte cut off": (
        cut("text_encoder_3/model-00001-of-00002.safetensors", -1),
        "damaged or cut off",
    ),
    "an empty file of weights": (cut("text_encoder/model.safetensors", 0), "damaged or cut off"),
    "a config that is no JSON": (replace("transformer/config.json", "{"), "cannot be read as JSON"),
    "a config that is a list": (replace("vae/config.json", "[]"), "holds no JSON object"),
    "a config without the layers": (
        configure("transformer/config.json", num_layers=...),
        "lacks 'num_layers'",
    ),
    "a config without the VAE's blocks": (
        configure("vae/config.json", block_out_channels=...),
        "lacks 'block_out_channels'",
    ),
    "a config with a word for a number": (configure("transformer/config.json", num_layers="many"), "'many'"),
    "a config with null for a number": (configure("transformer/config.json", patch_size=None), "wrong type"),
    "an index that is no JSON": (replace(INDEX, '{"weight_map": {'), "is damaged"),
    "an index that is a list": (replace(INDEX, "[]"), "is damaged"),
    "an index of numbers": (replace(INDEX, '{"weight_map": {"a": 3}}'), "is damaged"),
    "a tokenizer that is no JSON": (replace("tokenizer/vocab.json", "{"), "tokenizer cannot be read"),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer/vocab.json").unlink(),
        "tokenizer cannot be read",
    ),
    "another scheduler": (
        configure("scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler"),
        "DPMSolverMultistepScheduler",
    ),
    "a scheduler with dynamic shifting": (
        configure("scheduler/scheduler_config.json", use_dynamic_shifting=True),
        "'use_dynamic_shifting'",
    ),
    "another pipeline": (configure("model_index.json", _class_name="FluxPipeline"), "'FluxPipeline'"),
    "parts that do not fit": (configure("text_encoder_3/config.json", d_model=96), "joint_attention_dim"),
    "a tensor missing of a text encoder": (
        edit_tensors("text_encoder/model.safetensors", lambda tensors: tensors.pop("text_projection.weight")),
        "lack text_projection.weight (1 missing",
    ),
    "a text encoder's tensor of another shape": (
        edit_tensors("text_encoder/model.safetensors", too_narrow("text_projection.weight")),
        "do not fit config.json",
    ),
    "a weight that FP16 cannot hold": (
        edit_tensors("text_encoder/model.safetensors", too_large),
        "text_projection.weight has values that are not finite in FP16",
    ),
}


def assert_whole(build: Path) -> None:
    """Each folder with a final name has its manifest and the files that it lists; no other is left."""
    for folder in build.glob("*/onnx/*"):
        assert not folder.name.startswith(".")
        manifest = read_manifest(folder)
        assert {path.name for path in folder.iterdir()} == {MANIFEST, *manifest.files}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, miniature, tmp_path, run_export):
    """Whatever is wrong with the folder, the line names the file or the part."""
    change, words = DAMAGE[damage]
    folder, build = tmp_path / "miniature", tmp_path / "build"
    shutil.copytree(miniature, folder)
    change(folder)
    status, stderr = run_export("onnx", "--model", folder, "--build", build)
    assert_one_error(status, stderr, words)
    assert_whole(build)


@pytest.mark.parametrize(
    ("component", "damage", "words"),
    [
        (
            "mmdit",
            edit_tensors(SHARD, lambda tensors: tensors.pop("proj_out.weight")),
            "lack proj_out.weight",
        ),
        ("mmdit", edit_tensors(SHARD, too_narrow("proj_out.weight")), "do not fit config.json"),
        (
            "vae_decoder",
            edit_tensors(VAE, lambda tensors: tensors.pop("decoder.conv_in.bias")),
            "lack decoder.",
        ),
        ("vae_decoder", edit_tensors(VAE, too_narrow("decoder.conv_in.weight")), "do not fit config.json"),
    ],
    ids=[
        "a tensor missing in a shard",
        "another shape",
        "a tensor missing of the VAE",
        "another shape of it",
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(component, damage, words, miniature, tmp_path):
    """diffusers would leave a missing weight without data, as transformers would draw it at random."""
    folder = tmp_path / "miniature"
    shutil.copytree(miniature, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        load_module(component, folder, torch.float16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae"),
        (cut(SHARD, -1), "damaged or cut off"),
        (edit_tensors("text_encoder/model.safetensors", too_large), "not finite in FP16"),
    ],
    ids=["no VAE", "a shard cut off", "a weight that FP16 cannot hold"],
)
def test_the_command_ends_with_status_2_and_no_traceback(damage, words, miniature, tmp_path):
    """The same in a process of its own, with whatever the libraries write by themselves."""
    folder, build = tmp_path / "miniature", tmp_path / "build"
    shutil.copytree(miniature, folder)
    damage(folder)
    ended = subprocess.run(
        [sys.executable, "-m", "export", "onnx", "--model", folder, "--build", build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_error(ended.returncode, ended.stderr, words)
    assert_whole(build)


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "~/nothing", "word", "a/b/c"])
def test_a_model_that_is_no_folder_and_no_hub_id_is_refused(model, run_export, tmp_path):
    """A mistyped path is not looked up on the hub."""
    status, stderr = run_export("onnx", "--model", model, "--build", tmp_path)
    assert_one_error(status, stderr, f"MODEL={model}", "neither a folder here nor a hub id")


def test_a_missing_miniature_names_the_command_that_restores_it(run_export, monkeypatch, tmp_path):
    """It is a part of the repository."""
    monkeypatch.setattr(checkpoint_module, "MINIATURE", tmp_path / "none")
    assert_one_error(*run_export("onnx", "--build", tmp_path), "git checkout miniature/checkpoint")


@pytest.mark.parametrize("tokens", ["0", "-3", "513"])
def test_a_length_that_t5_is_not_used_with_is_refused(tokens, miniature, run_export, tmp_path):
    """diffusers refuses more than 512 tokens; less than one is none."""
    status, stderr = run_export("onnx", "--model", miniature, "--build", tmp_path, "--t5-tokens", tokens)
    assert_one_error(status, stderr, f"{tokens} T5 tokens", "1 to 512")


def test_a_build_folder_that_cannot_be_made_is_named(miniature, run_export, tmp_path):
    """A file lies where the folder should be."""
    (tmp_path / "file").write_text("")
    status, stderr = run_export("onnx", "--model", miniature, "--build", tmp_path / "file")
    assert_one_error(status, stderr, str(tmp_path / "file"), "--build")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--calibration-prompts", 0, "prompts"),
        ("--calibration-prompts", 100_000, "100000 calibration prompts were asked for"),
        ("--calibration-steps", 0, "steps"),
        ("--calibration-batch", -1, "batch"),
    ],
)
def test_calibration_settings_out_of_bounds_are_refused(option, value, words, build, miniature, run_export):
    """Before anything is calibrated; the artifacts that are there stay."""
    before = sorted(build.root.rglob("*"))
    status, stderr = run_export("fp8", "--model", miniature, "--build", build.root.parent, option, value)
    assert_one_error(status, stderr, words, str(value))
    assert sorted(build.root.rglob("*")) == before


def test_fp8_without_onnx_names_the_command_that_makes_it(miniature, run_export, tmp_path):
    """The stages' order, in the words of the Makefile."""
    status, stderr = run_export("fp8", "--model", miniature, "--build", tmp_path)
    assert_one_error(status, stderr, f"run `make onnx MODEL={miniature}` first")


def test_fp8_of_another_checkpoint_than_the_onnx_files_is_refused(build, miniature, run_export, tmp_path):
    """Calibrating a checkpoint whose parts were never checked would only fail later, or not at all."""
    folder = tmp_path / "miniature"
    shutil.copytree(miniature, folder)
    configure("scheduler/scheduler_config.json", shift=2.0)(folder)
    onnx = Layout(str(folder), tmp_path / "build").onnx("mmdit")
    shutil.copytree(build.onnx("mmdit"), onnx)
    status, stderr = run_export("fp8", "--model", folder, "--build", tmp_path / "build")
    assert_one_error(status, stderr, "another checkpoint", "make onnx")


def test_a_policy_that_matches_nothing_is_refused(build, miniature, run_export, tmp_path):
    """Before anything is calibrated; the pattern is named."""
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rule]]\npattern = 'blocks.*'\nprecision = 'fp16'\n")
    before = sorted(build.root.rglob("*"))
    arguments = ("fp8", "--model", miniature, "--build", build.root.parent, "--policy", policy)
    assert_one_error(*run_export(*arguments), "'blocks.*' matches none of the 68 layers")
    assert sorted(build.root.rglob("*")) == before


@pytest.mark.parametrize("damage", ["another checkpoint", "missing"])
def test_a_calibration_that_does_not_fit_is_refused(damage, build, miniature, run_export, tmp_path):
    """The artifacts that are there stay."""
    saved = tmp_path / "calibration.json"
    if damage != "missing":
        content = json.loads((build.calibration / "calibration.json").read_text())
        saved.write_text(json.dumps(content | {"checkpoint": "0" * 64}))
    before = sorted(build.root.rglob("*"))
    arguments = ("fp8", "--model", miniature, "--build", build.root.parent, "--calibration", saved)
    assert_one_error(*run_export(*arguments), str(saved), *(["0" * 64] if damage != "missing" else []))
    assert sorted(build.root.rglob("*")) == before
