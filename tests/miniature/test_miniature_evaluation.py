"""The evaluation: held-out captions, honest scores, one page, and an error where something is missing."""

import json
import re

import numpy as np
import pytest

from miniature import evaluation
from miniature.evaluation import evaluate
from miniature.scenes import draw
from miniature.tasks import scores, tasks
from mmdit.errors import MmditError
from quality.metrics import similarity


def test_every_caption_is_of_a_scene_that_training_never_saw():
    work = tasks(200)
    assert len({task.scene for task in work}) == len({task.caption for task in work}) == 200
    assert all(task.scene.held_out for task in work)
    assert sum(len(task.scene.objects) == 2 for task in work) == 133


def test_the_captions_are_the_same_every_time_and_a_shorter_list_begins_alike():
    assert tasks(50) == tasks(200)[:50]


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_a_number_of_captions_out_of_range_is_refused(count):
    with pytest.raises(MmditError, match=f"^{count} captions were asked for"):
        tasks(count)


def test_perfect_pictures_score_1_and_empty_ones_0():
    work = tasks(30)
    rng = np.random.default_rng(0)
    perfect = [draw(task.scene, 128, 128, rng) for task in work]
    assert set(scores(perfect, work).values()) == {1.0}
    nothing = [np.full((128, 128, 3), (0, 255, 0), np.uint8)] * len(work)  # no background of theirs
    assert set(scores(nothing, work).values()) == {0.0}


def test_a_picture_is_like_itself_and_less_like_its_neighbour():
    one, other = (draw(task.scene, 128, 128) for task in tasks(2))
    assert similarity(one, one) == 1.0
    noisy = np.clip(one + np.random.default_rng(0).normal(0, 5, one.shape), 0, 255).astype(np.uint8)
    assert similarity(one, other) < similarity(one, noisy) < 0.99


def test_a_missing_repository_is_named_with_the_command_that_makes_it(tmp_path, miniature):
    with pytest.raises(MmditError, match="repository/cpu-fp16 is not there yet: run `make evaluate`"):
        evaluate(tmp_path, tmp_path / "out", miniature, target="cpu", captions=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fp16_repository", "fp8_repository")
def test_both_precisions_are_served_read_and_shown(build, miniature, tmp_path, monkeypatch, capsys):
    """Two real servers, one after the other, and diffusers."""
    monkeypatch.setattr(evaluation, "OTHER_COUNT", 1)
    evaluate(build.root.parent, tmp_path, miniature, target="cpu", captions=4)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert set(results["scores"]) == {"fp32", "fp16", "fp8"}
    assert set(results["ssim"]) == {"fp8 against fp16", "fp16 against fp32"}
    assert results["ssim"]["fp16 against fp32"]["minimum"] > 0.98  # the same noise, the same caption
    page = (tmp_path / "index.html").read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 3 * 4
    for task in tasks(4):
        assert task.caption in page
    assert "fp8: colour" in capsys.readouterr().out
