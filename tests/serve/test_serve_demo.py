"""The demo: prompts in, one grid of pictures out, through a server of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniature.reader import read
from miniature.scenes import Object, Scene, draw
from serve.__main__ import DEMO_PROMPTS
from serve.grid import grid

ROOT = Path(__file__).resolve().parents[2]


def test_the_grid_holds_every_picture_as_it_is_but_larger():
    pictures = [
        draw(Scene("white", (Object(colour, "circle", "large", "left"),)), 128, 128)
        for colour in ("red", "green", "blue", "yellow", "cyan")
    ]
    sheet = np.asarray(grid(pictures, ["a word " * 60] * 5))
    width = sheet.shape[1] // 4
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 4)
        top, left = 12 + row * ((sheet.shape[0] - 12) // 2), 12 + column * ((sheet.shape[1] - 12) // 4)
        cell = sheet[top : top + 256 : 2, left : left + 256 : 2]
        assert np.array_equal(cell, picture)
        assert read(np.ascontiguousarray(cell)) == read(picture)
    assert width > 256


def test_the_captions_are_written_below_the_pictures():
    blank = np.full((128, 128, 3), 255, np.uint8)
    with_words, without = (np.asarray(grid([blank], [text])) for text in ("a large red circle", ""))
    assert (with_words != without).any() and not (without != 255).any()


def test_the_demos_prompts_fit_below_their_pictures_and_are_all_different():
    from PIL import ImageFont

    from serve import grid as module

    font = ImageFont.load_default(module._FONT_SIZE)
    assert len(set(DEMO_PROMPTS)) == 8
    assert all(len(module._wrapped(prompt, 256, font)) <= module._LINES for prompt in DEMO_PROMPTS)


@pytest.mark.usefixtures("fp16_repository")
def test_the_demo_serves_its_prompts_and_stops(build, miniature, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "serve", "demo", "--model", str(miniature)),
            *("--build", str(build.root.parent), "--target", "cpu", "--precision", "fp16"),
            *("--steps", "2", "--prompt", "a circle", "--prompt", "a cross"),
            *("--out", str(tmp_path / "demo.png")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("demo.png: 2 pictures, seeds from 1\n")
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width == 2 * (256 + 12) + 12
