"""A whole training: both stages resume to the same weights, also by force; nothing damaged is trained on."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from miniature import latents, mmdit_training, run, training
from miniature.checkpoint import RECORD, TOKENIZERS, check_whole
from miniature.mmdit_training import TextToVelocity
from miniature.training import read_state, write_state
from mmdit.errors import CheckpointError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ((128, 128, 24, 0.5), (96, 128, 16, 0.5))


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few latents, and no samples, which take as long as all else."""
    for module in (latents, mmdit_training):
        monkeypatch.setattr(module, "SIZES", SMALL)
    for stage in (run.VaeStage, run.MmditStage):
        monkeypatch.setattr(stage, "sample", lambda self, path: {})


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A training of a few steps of each stage, through the same code as the real one."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert run.train(folder, seed=1, minutes=5, vae_steps=6, steps=4)
    return folder


def test_both_stages_resume_to_the_same_weights(trained, tmp_path, small, monkeypatch):
    """The VAE stopped after 3 of its 6 steps, the MMDiT after 2 of its 4."""
    for stage, stop in ((run.VaeStage, 3), (run.MmditStage, 2)):
        step = stage.step

        def interrupted(self, number, step=step, stop=stop):
            if number == stop:
                raise RuntimeError("power cut")
            return step(self, number)

        monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(stage, "step", interrupted)
            with pytest.raises(RuntimeError, match="power cut"):
                run.train(tmp_path, seed=1, minutes=5, vae_steps=6, steps=4)
    assert run.train(tmp_path, seed=1, minutes=5, vae_steps=6, steps=4)
    for name in ("vae.pt", "mmdit.pt"):
        whole, parts = (read_state(folder / name)["stage"] for folder in (trained, tmp_path))
        for part in whole:
            if part not in ("muon", "adam", "optimizer"):
                assert all(torch.equal(whole[part][key], parts[part][key]) for key in whole[part])


def test_a_killed_training_resumes(tmp_path):
    """A real process, killed while it trains; what it had saved is whole."""
    command = [sys.executable, "-m", "miniature", "train", "--folder", str(tmp_path), "--vae-steps", "400"]
    code = (
        "import sys; from miniature import training; training.SAVE_SECONDS = 0.0;"
        "from miniature.__main__ import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command[3:]], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "vae.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.kill()
    process.wait()
    step = read_state(tmp_path / "vae.pt")["step"]
    assert step >= 1
    done = subprocess.run(
        [*command, "--minutes", "0.2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"resumes at step {step} of 400" in done.stdout and "the same command goes on" in done.stdout
    assert read_state(tmp_path / "vae.pt")["step"] > step


def test_the_written_checkpoint_holds_the_averaged_weights(trained, tmp_path):
    run.write(trained, tmp_path / "checkpoint")
    record = check_whole(tmp_path / "checkpoint")["training"]
    assert (record["vae"]["steps"], record["mmdit"]["steps"]) == (6, 4)
    average = read_state(trained / "mmdit.pt")["stage"]["average"]
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(tmp_path / "checkpoint", subfolder="transformer")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[f"transformer.{name}"].half().float())


def test_a_training_starts_from_a_checkpoint(trained, tmp_path, small):
    """With its VAE, its tokenizers and its weights: in FP16, as they are stored."""
    run.write(trained, tmp_path / "checkpoint")
    run.train(tmp_path / "next", seed=2, minutes=5, vae_steps=1, steps=1, start=tmp_path / "checkpoint")
    state = read_state(tmp_path / "next/mmdit.pt")
    assert state["settings"]["started_from"]["mmdit"]["steps"] == 4
    average = read_state(trained / "mmdit.pt")["stage"]["average"]
    now = state["stage"]["average"]
    assert now.keys() == average.keys() == TextToVelocity().state_dict().keys()
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert (now[name] - average[name]).abs().mean() < 0.1 * average[name].abs().mean()
    for name in TOKENIZERS:
        for path in (trained / "tokenizers" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "next/tokenizers" / name / path.name).read_bytes()
    assert not (tmp_path / "next/vae.pt").exists()


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", RECORD])
def test_a_damaged_part_of_the_checkpoint_to_start_from_is_named(trained, tmp_path, part):
    run.write(trained, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / part
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is not a miniature" if part == RECORD else part):
        run.train(tmp_path / "next", seed=2, minutes=5, vae_steps=1, steps=1, start=tmp_path / "checkpoint")
    assert not (tmp_path / "next").exists()


def test_damaged_latents_are_named(trained, tmp_path, small):
    shutil.copytree(trained, tmp_path / "it")
    path = tmp_path / "it/latents.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="latents.pt is damaged"):
        run.train(tmp_path / "it", seed=1, minutes=5, vae_steps=6, steps=4)


def test_a_damaged_tokenizer_is_named(trained, tmp_path, small):
    shutil.copytree(trained, tmp_path / "it")
    (tmp_path / "it/tokenizers/tokenizer_2/merges.txt").write_text("a b\n")
    for use in (
        lambda: run.train(tmp_path / "it", seed=1, minutes=5, vae_steps=6, steps=4),
        lambda: run.write(tmp_path / "it", tmp_path / "checkpoint"),
    ):
        with pytest.raises(CheckpointError, match="tokenizer_2/merges.txt.*remove it to make it again"):
            use()


def test_an_mmdit_is_not_trained_on_upon_another_vae(trained, tmp_path, small):
    """As after `vae.pt` was removed because it was damaged, and trained again."""
    shutil.copytree(trained, tmp_path / "it")
    state = read_state(tmp_path / "it/vae.pt")
    state["stage"]["vae"]["decoder.conv_out.bias"] += 1e-3
    write_state(tmp_path / "it/vae.pt", state)
    with pytest.raises(CheckpointError, match="mmdit.pt belongs to another training \\(vae "):
        run.train(tmp_path / "it", seed=1, minutes=5, vae_steps=6, steps=4)


def test_latents_of_another_world_are_made_again(trained, tmp_path, small, monkeypatch):
    shutil.copytree(trained / "tokenizers", tmp_path / "it/tokenizers")
    for name in ("vae.pt", "latents.pt"):
        shutil.copy(trained / name, tmp_path / "it" / name)
    before = read_state(tmp_path / "it/latents.pt")["settings"]
    monkeypatch.setattr(latents, "WORLD", "another")
    run.train(tmp_path / "it", seed=1, minutes=5, vae_steps=6, steps=1)
    assert read_state(tmp_path / "it/latents.pt")["settings"]["scenes"] != before["scenes"]


def test_there_is_nothing_to_write_before_the_training(tmp_path):
    with pytest.raises(CheckpointError, match="run `python -m miniature train` first"):
        run.write(tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_the_latents_are_what_the_pipeline_would_denoise(trained):
    """Mean about 0 and deviation about 1 once the VAE is trained; here only scaled and shifted right."""
    from diffusers import AutoencoderKL

    from miniature.configs import VAE
    from miniature.scenes import draw, scenes
    from miniature.vae_training import to_tensor

    vae = AutoencoderKL.from_config(VAE)
    vae.load_state_dict(read_state(trained / "vae.pt")["stage"]["vae"])
    pool, numbers = read_state(trained / "latents.pt")["pools"][0]
    seen = [scene for scene in scenes() if not scene.held_out]
    rng = np.random.default_rng([1, 7, 0])
    single = np.array([len(scene.objects) == 1 for scene in seen])
    rng.random(SMALL[0][2])
    rng.choice(np.flatnonzero(single), SMALL[0][2])
    rng.choice(np.flatnonzero(~single), SMALL[0][2])
    picture = draw(seen[int(numbers[0])], 128, 128, rng)
    with torch.no_grad():
        mode = vae.encode(to_tensor([picture])).latent_dist.mode()
    expected = (mode[0] - VAE["shift_factor"]) * VAE["scaling_factor"]
    assert (pool[0].float() - expected).abs().max() < 0.01


@pytest.mark.parametrize(
    "option", [("--minutes", "0"), ("--steps", "0"), ("--seed", "-1"), ("--vae-steps", "9999999")]
)
def test_an_option_out_of_range_is_refused_with_status_2(tmp_path, option):
    done = subprocess.run(
        [sys.executable, "-m", "miniature", "train", "--folder", str(tmp_path / "it"), *option],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{option[0]} {option[1]} is out of range" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "it").exists()
