"""The gate on the miniature's own engines: passed as they are, failed once they are damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from engines.__main__ import main as build_engines
from mmdit.artifact import MANIFEST, Layout, read_manifest, sha256
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, QuantizationError
from quality import measurement
from quality.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--count", "2", "--steps", "6")


def command(layout: Layout, *more: str) -> list[str]:
    """The gate's command line for a model that was built with the tests."""
    return ["gate", "--model", layout.model, "--build", str(layout.root.parent), "--target", "cpu", *more]


@pytest.fixture(scope="module")
def engines(build) -> Layout:
    """The miniature's engines in both precisions."""
    for precision in ("fp16", "fp8"):
        arguments = ["--model", build.model, "--build", str(build.root.parent)]
        build_engines(["build", *arguments, "--target", "cpu", "--precision", precision])
    return build


@pytest.fixture(scope="module")
def judged(engines) -> Layout:
    """The same, after a gate of two pictures and six steps was passed."""
    assert main(command(engines, *FEW)) == 0
    return engines


@pytest.fixture(scope="module")
def damaged(engines, tmp_path_factory) -> Layout:
    """A copy of the engines in which one layer's FP8 weights count eight times as much."""
    layout = Layout(engines.model, tmp_path_factory.mktemp("damaged"))
    shutil.copytree(engines.root, layout.root, ignore=shutil.ignore_patterns("quality", "repository"))
    folder = layout.onnx("mmdit", Precision.FP8)
    model = onnx.load(folder / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = next(
        constants[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and "transformer_blocks.1/ff/" in node.name
    )
    eightfold = np.asarray(8 * numpy_helper.to_array(scale), np.float16)
    scale.CopyFrom(numpy_helper.from_array(eightfold, scale.name))
    onnx.save(model, folder / "model.onnx")
    manifest = read_manifest(folder)
    manifest.files["model.onnx"] = sha256(folder / "model.onnx")
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    build_engines(["build", "--model", layout.model, "--build", str(layout.root.parent), "--target", "cpu"])
    return layout


def gate_json(layout: Layout) -> dict:
    return json.loads((layout.quality("cpu") / "gate.json").read_text())


def test_the_miniatures_fp8_engines_pass(judged):
    """And every figure has its floor, which is nearer to perfect than FP8."""
    content = gate_json(judged)
    assert content["passed"] and content["failures"] == [] and content["mission"]["met"]
    figures = {entry["name"]: entry for entry in content["figures"]}
    for name in ("ssim_mean", "ssim_objects_mean", "ssim_minimum", "psnr_mean", "velocity_cosine_mean"):
        assert figures[name]["fp8"] < figures[name]["floor"], name
    assert figures["velocity_error_mean"]["fp8"] > 5 * figures["velocity_error_mean"]["floor"]
    assert figures["ssim_mean"]["bound"] == 0.97


def test_the_gates_key_covers_the_runtime_that_is_loaded_by_its_name(judged):
    """An import by name is not in any source: the gate adds its runtime's function."""
    assert "engines/onnxruntime/session.py" in read_manifest(judged.quality("cpu")).code


def test_the_floors_pictures_are_those_that_are_served(judged, miniature):
    """FP32's pictures are diffusers' own, from the same seeds: PSNR of 50 dB or more. Measured: equal."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from quality.metrics import psnr

    pipeline = StableDiffusion3Pipeline.from_pretrained(miniature, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    entry = gate_json(judged)["pictures"][1]
    expected = pipeline(
        entry["prompt"],
        negative_prompt=entry["negative_prompt"],
        num_inference_steps=6,
        guidance_scale=4.5,
        height=128,
        width=128,
        generator=torch.Generator("cpu").manual_seed(entry["seed"]),
        output_type="np",
    ).images[0]
    with Image.open(judged.quality("cpu") / entry["files"]["fp32"]) as image:
        found = psnr(np.asarray(image), np.round(255 * expected).astype(np.uint8))
    print(f"{found:.1f} dB")
    assert found >= 50


def test_each_picture_is_kept_with_what_was_measured_and_read_in_it(judged):
    """Three PNGs a prompt, and their SSIM is the one that is told."""
    from quality.metrics import similarity

    content, folder = gate_json(judged), judged.quality("cpu")
    assert len(content["pictures"]) == 2
    for entry in content["pictures"]:
        pictures = {name: np.asarray(Image.open(folder / file)) for name, file in entry["files"].items()}
        assert pictures.keys() == {"fp32", "fp16", "fp8"} and pictures["fp8"].shape == (128, 128, 3)
        assert entry["fp8"]["ssim"] == pytest.approx(similarity(pictures["fp8"], pictures["fp16"]))
        assert entry["floor"]["ssim"] == pytest.approx(similarity(pictures["fp16"], pictures["fp32"]))
        assert " on " in entry["read"]["fp8"]


def test_the_velocity_is_compared_at_every_step_from_noise_to_picture(judged):
    """Six steps, timesteps falling from 1000."""
    steps = gate_json(judged)["steps"]
    timesteps = [step["timestep"] for step in steps]
    assert len(steps) == 6 and timesteps[0] == 1000 and timesteps == sorted(timesteps, reverse=True)
    assert all(0 < step["floor"]["error"] < step["fp8"]["error"] < 0.5 for step in steps)


def test_a_gate_that_is_up_to_date_is_told_again_without_torch(judged):
    """Nothing heavy is loaded: `make demo` asks every time."""
    code = (
        "import sys; from quality.__main__ import main\n"
        f"assert main({command(judged, *FEW)!r}) == 0\n"
        "assert not {'torch', 'onnxruntime', 'skimage', 'scipy', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gate: up to date" in done.stdout and "gate: passed (profile miniature)" in done.stdout


def test_other_thresholds_judge_the_same_pictures_again(judged, tmp_path, monkeypatch, capsys):
    """Measuring takes an hour on a real model, judging a moment."""
    layout = Layout(judged.model, tmp_path)
    shutil.copytree(judged.root, layout.root)
    before = gate_json(layout)
    monkeypatch.setattr(measurement, "measured", None)
    assert main(command(layout, *FEW, "--profile", "sd35")) == 0
    after = gate_json(layout)
    assert "gate: judging again what was measured" in capsys.readouterr().out
    assert after["profile"]["name"] == "sd35" and after["figures"][0]["bound"] == 0.90
    assert [after[key] for key in ("pictures", "steps")] == [before[key] for key in ("pictures", "steps")]
    assert (layout.quality("cpu") / after["pictures"][0]["files"]["fp8"]).is_file()


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from quality.__main__ import main\n"
        "try: main(['gate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'onnxruntime', 'skimage', 'scipy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_fp8_engine_that_was_damaged_fails_and_leaves_its_pictures(damaged, capsys):
    """Exit status 2 with what failed in words; with --report-only the same, but no error."""
    with pytest.raises(QuantizationError, match=r"failed the gate: SSIM, mean is 0\.\d+, expected at least"):
        main(command(damaged, *FEW))
    assert "gate: FAILED (profile miniature)" in capsys.readouterr().out
    content = gate_json(damaged)
    assert not content["passed"] and not content["mission"]["met"]
    assert (damaged.quality("cpu") / content["pictures"][0]["files"]["fp8"]).is_file()
    assert content["figures"][0]["floor"] > 0.99  # FP16 was not touched
    with pytest.raises(QuantizationError, match="failed the gate"):  # up to date, and failed still
        main(command(damaged, *FEW))
    assert main(command(damaged, *FEW, "--report-only")) == 0


def test_engines_of_another_checkpoint_than_the_one_at_hand_are_refused(engines, tmp_path):
    """The floor would be another model's."""
    changed = tmp_path / "miniature"
    shutil.copytree(engines.model, changed)
    index = json.loads((changed / "model_index.json").read_text())
    (changed / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0"}))
    layout = Layout(str(changed), tmp_path / "build")
    layout.root.parent.mkdir()
    shutil.copytree(engines.root, layout.root, ignore=shutil.ignore_patterns("quality", "repository"))
    with pytest.raises(ArtifactError, match="has changed since the engines were made from it"):
        main(command(layout, *FEW))
    assert not layout.quality("cpu").exists()


def test_a_missing_engine_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ArtifactError, match="run `make gate MODEL=miniature TARGET=cpu` first"):
        main(["gate", "--target", "cpu", "--build", str(tmp_path)])


@pytest.mark.parametrize("more", [("--count", "0"), ("--steps", "0"), ("--profile", "own")])
def test_what_cannot_be_asked_is_refused_before_anything_is_made(engines, more):
    """A count, steps, a profile."""
    with pytest.raises(QuantizationError, match=more[1]):
        main(command(engines, *more))


def test_a_target_without_fp8_has_nothing_to_judge(capsys):
    """sm86 gets FP16 engines; that is no failure."""
    assert main(["gate", "--target", "sm86"]) == 0
    assert "sm86 has no FP8" in capsys.readouterr().out
