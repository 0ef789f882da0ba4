"""Likeness and flaws of constructed pictures, where the answer is known beforehand."""

import numpy as np
import pytest

from miniature.scenes import Object, Scene, draw
from quality import metrics

SCENE = Scene("white", (Object("red", "circle", "large", "left"),))


def noisy(picture: np.ndarray, sigma: float, where: np.ndarray | None = None) -> np.ndarray:
    """The picture with noise of `sigma` levels, everywhere or where a mask says."""
    noise = np.random.default_rng(0).normal(0, sigma, picture.shape)
    if where is not None:
        noise *= where[..., None]
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def test_equal_pictures_are_as_alike_as_can_be():
    """SSIM 1, and a PSNR that JSON can hold."""
    picture = draw(SCENE, 128, 128)
    mask = metrics.drawn_objects(picture)
    assert metrics.similarity(picture, picture) == 1.0
    assert metrics.similarity_over(picture, picture, mask) == 1.0
    assert metrics.psnr(picture, picture) == metrics.MOST_PSNR


def test_plain_background_does_not_flatter_the_similarity_over_objects():
    """A change in an object alone costs more over the object's pixels than over the whole picture."""
    picture = draw(SCENE, 128, 128)
    mask = metrics.drawn_objects(picture)
    changed = noisy(picture, 20, mask)
    assert metrics.similarity_over(picture, changed, mask) < metrics.similarity(picture, changed) - 0.1


def test_a_change_outside_the_objects_does_not_count_over_objects():
    """But for the window's width."""
    picture = draw(SCENE, 128, 128)
    mask = metrics.drawn_objects(picture)
    far = ~metrics.drawn_objects(picture)
    far[:, :76] = False
    assert metrics.similarity_over(picture, noisy(picture, 20, far), mask) > 0.999


def test_the_mean_over_all_pixels_is_the_mean_over_a_mask_of_all():
    """An empty mask stands for the whole picture: a picture without an object is compared too."""
    one = draw(SCENE, 128, 128)
    other = noisy(one, 10)
    whole, nothing = np.ones((128, 128), bool), np.zeros((128, 128), bool)
    assert metrics.similarity_over(one, other, whole) == metrics.similarity_over(one, other, nothing)
    assert metrics.similarity_over(one, other, whole) == pytest.approx(
        metrics.similarity(one, other), abs=0.02
    )


def test_objects_are_the_drawn_ones_with_a_margin_of_four_pixels():
    """A large circle on the left, 54 pixels wide around column 32."""
    mask = metrics.drawn_objects(draw(SCENE, 128, 128))
    columns = np.flatnonzero(mask.any(axis=0))
    assert abs(columns[0] - (32 - 27 - 4)) <= 1 and abs(columns[-1] - (32 + 27 + 4 - 1)) <= 1


def test_any_pictures_structure_is_found_without_knowing_what_it_shows():
    """A textured square on a plain background with the noise of a decoder: the square, not the rest."""
    picture = np.full((128, 128, 3), 200, np.uint8)
    picture[40:80, 40:80] = np.random.default_rng(1).integers(0, 255, (40, 40, 3))
    mask = metrics.structured(noisy(picture, 0.8))
    assert mask[40:80, 40:80].all()
    assert not mask[:25].any() and not mask[:, 95:].any()


@pytest.mark.parametrize(
    ("picture", "flaw"),
    [
        (None, "not finite"),
        (np.zeros((64, 64, 3), np.uint8), "black"),
        (noisy(np.full((64, 64, 3), 3, np.uint8), 2), "black"),
        (np.full((64, 64, 3), 128, np.uint8), "flat"),
        (noisy(np.full((64, 64, 3), (250, 190, 205), np.uint8), 0.8), "flat"),
        (draw(SCENE, 64, 64), None),
        (draw(Scene("black", (Object("blue", "cross", "small", "top"),)), 64, 64), None),
    ],
)
def test_a_picture_that_is_none_is_told(picture, flaw):
    """Overflow shows as black, a lost signal as one flat colour; a dark scene with an object is a picture."""
    assert metrics.flaw(picture) == flaw


def test_the_cosine_and_the_relative_error_of_velocities_are_what_their_names_say():
    """By hand: a right angle, a doubled vector, and the same direction."""
    one, other = np.array([3.0, 0.0], np.float16), np.array([0.0, 4.0], np.float16)
    assert metrics.cosine(one, other) == 0.0
    assert metrics.cosine(one, 2 * one) == pytest.approx(1.0)
    assert metrics.relative_error(2 * one, one) == pytest.approx(1.0)
    assert metrics.relative_error(one, one) == 0.0


def test_what_is_not_finite_is_as_wrong_as_can_be():
    """NaN compares as false with every threshold, and JSON has no word for it."""
    broken = np.array([np.nan, np.inf], np.float16)
    assert metrics.cosine(broken, np.ones(2)) == 0.0
    assert metrics.relative_error(broken, np.ones(2)) == 1e3
