"""LPIPS and CLIP score: measured where their weights lie, else absent with a reason, never downloaded."""

import socket
from pathlib import Path

import numpy as np
import pytest

from miniature.scenes import Object, Scene, draw
from quality import perceptual
from quality.perceptual import Absent, clip_scores, lpips

PICTURES = [
    draw(Scene("white", (Object(colour, "circle", "large", "left"),)), 64, 64) for colour in ("red", "blue")
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a host fails the test."""

    def refuse(*arguments: object, **_: object) -> None:
        pytest.fail(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def clip(miniature, tmp_path_factory) -> Path:
    """A tiny CLIP with random weights, saved as the real one is."""
    import export.quiet  # noqa: F401  isort: skip
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(miniature / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_100_times_a_cosine_of_each_prompt_and_its_picture(clip):
    """From -100 to 100, another one for another picture, the same one for the same."""
    one, other, again = clip_scores(
        ["a red circle"] * 3, [PICTURES[0], PICTURES[1], PICTURES[0]], model=str(clip)
    )
    assert -100 <= one <= 100 and one != other
    assert one == pytest.approx(again, abs=1e-4)


def test_a_prompt_longer_than_clip_reads_is_cut(clip):
    """77 tokens, as the text encoders do."""
    assert np.isfinite(clip_scores(["a circle " * 200], PICTURES[:1], model=str(clip))).all()


def test_without_clips_weights_the_score_is_absent_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Absent, match="is not in the Hugging Face cache"):
        clip_scores(["a circle"], PICTURES[:1], model="nobody/no-clip-of-this-name")


@pytest.mark.parametrize("missing", ["torchmetrics", "torchvision"])
def test_without_its_libraries_lpips_is_absent_and_names_the_one(monkeypatch, missing):
    monkeypatch.setattr(perceptual.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(Absent, match=f"{missing} is not installed"):
        lpips([(PICTURES[0], PICTURES[1])])


def test_without_alexnets_weights_lpips_is_absent_and_nothing_is_fetched(tmp_path, monkeypatch):
    """torchmetrics would download them."""
    import torch

    monkeypatch.setattr(perceptual.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Absent, match="alexnet-owt-7be5be79.pth"):
        lpips([(PICTURES[0], PICTURES[1])])
