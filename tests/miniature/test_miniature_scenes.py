"""The drawn world, its captions, and the reader that tells them back."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from miniature.grammar import WORDS, caption
from miniature.reader import UNKNOWN, Reading, Seen, read, score
from miniature.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Object, Scene, draw, scenes
from serve.__main__ import DEMO_PROMPTS

ROOT = Path(__file__).resolve().parents[2]
RED_CIRCLE = Object("red", "circle", "large", "left")
BLUE_CROSS = Object("blue", "cross", "small", "right")
PAIR = Scene("white", (RED_CIRCLE, BLUE_CROSS))


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return scenes()


# The scenes


def test_every_scene_is_there_once(world):
    kinds = len(COLOURS) * len(SHAPES) * len(SIZES)
    single = len(BACKGROUNDS) * kinds * len(PLACES)
    pairs = len(BACKGROUNDS) * 2 * kinds * (kinds - len(SIZES))  # never the same colour and shape twice
    assert len(set(world)) == len(world) == single + pairs


def test_what_is_held_out_is_a_tenth_and_leaves_every_colour_with_every_shape_and_place(world):
    unseen = [scene for scene in world if scene.held_out]
    assert 0.1 < len(unseen) / len(world) < 0.15
    seen = Counter(
        pair
        for scene in world
        if not scene.held_out and len(scene.objects) == 1
        for thing in scene.objects
        for pair in ((thing.colour, thing.shape), (thing.colour, thing.place), (thing.shape, thing.place))
    )
    wanted = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    wanted |= {(name, place) for name in (*COLOURS, *SHAPES) for place in PLACES}
    assert wanted <= seen.keys()


def test_a_held_out_pair_is_held_out_in_every_arrangement(world):
    """Which stands where, their sizes and the background do not decide."""
    held_out = {
        frozenset((thing.colour, thing.shape) for thing in scene.objects)
        for scene in world
        if scene.held_out and len(scene.objects) == 2
    }
    for scene in world:
        if len(scene.objects) == 2:
            pair = frozenset((thing.colour, thing.shape) for thing in scene.objects)
            assert scene.held_out == (pair in held_out)


@pytest.mark.parametrize("scene", [PAIR, Scene("black", (RED_CIRCLE,))])
def test_a_caption_names_everything_in_its_scene(scene):
    text = caption(scene)
    for thing in scene.objects:
        for word in (thing.colour, thing.shape, thing.size):
            assert word in text
    assert scene.background in text


def test_a_scene_has_many_captions_and_one_caption_has_one_scene(world):
    rng = np.random.default_rng(0)
    assert len({caption(PAIR, rng) for _ in range(500)}) > 150
    meant: dict[str, Scene] = {}
    for scene in world[::7]:
        for _ in range(3):
            assert meant.setdefault(caption(scene, rng), scene) == scene


def test_every_caption_fits_the_training(world):
    """32 tokens of each encoder; a caption that is cut would lose its end without a word."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    from miniature.mmdit_training import SHORT

    checkpoint = ROOT / "miniature/checkpoint"
    tokenizers = [
        CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        T5TokenizerFast.from_pretrained(checkpoint / "tokenizer_3"),
    ]
    rng = np.random.default_rng(0)
    texts = [caption(scene, rng) for scene in world[::3]]
    for tokenizer in tokenizers:
        assert max(map(len, tokenizer(texts).input_ids)) <= SHORT


def test_the_demos_prompts_are_captions_of_held_out_scenes(world):
    rng = np.random.default_rng(0)
    found = set()
    for scene in world:
        described = [f"{thing.colour} {thing.shape}" for thing in scene.objects]
        plain = [plainly(prompt) for prompt in DEMO_PROMPTS]
        candidates = [
            prompt
            for prompt, text in zip(DEMO_PROMPTS, plain, strict=True)
            if scene.background in text and all(words in text for words in described)
        ]
        if candidates:
            said = {plainly(caption(scene, rng)) for _ in range(400)}
            for prompt in candidates:
                if plainly(prompt) in said:
                    assert scene.held_out, prompt
                    found.add(prompt)
    assert found == set(DEMO_PROMPTS)


def plainly(text: str) -> str:
    """A caption with the plainest of its synonyms."""
    for plain, ways in WORDS.items():
        for way in ways:
            text = text.replace(f"{way} ", f"{plain} ").replace(f"{way},", f"{plain},")
    return text


def test_a_training_caption_sometimes_leaves_a_size_or_the_background_out():
    rng = np.random.default_rng(0)
    texts = [caption(PAIR, rng, whole=False) for _ in range(300)]
    assert 0.05 < sum("background" not in text for text in texts) / 300 < 0.2
    assert 0.05 < sum("large" not in text and "big" not in text for text in texts) / 300 < 0.2


# The reader

DRAWN = [(128, 128), (112, 160), (160, 112), (96, 128), (256, 256), (80, 112)]


@pytest.mark.slow
@pytest.mark.parametrize("height, width", DRAWN)
def test_at_least_99_percent_of_drawn_scenes_are_read_right(world, height, width):
    """With sensor noise on top, so that no exact colour helps."""
    rng = np.random.default_rng(height * width)
    right = 0
    for _ in range(150):
        scene = world[rng.integers(len(world))]
        picture = draw(scene, height, width, rng) + rng.normal(0, 6, (height, width, 3))
        right += score(read(np.clip(picture, 0, 255).astype(np.uint8)), scene).whole
    assert right >= 0.99 * 150


def noise(kind: int, rng: np.random.Generator) -> np.ndarray:
    """White noise, clouds of three finenesses, blocks, and clouds in the scenes' own colours."""
    if kind == 0:
        return rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
    if kind == 4:
        return np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    clouds = ndimage.gaussian_filter(rng.normal(size=(128, 128, 3)), (5 * kind % 16 + 3,) * 2 + (0,))
    if kind == 5:
        palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.uint8)
        return palette[np.digitize(clouds[..., 0] / clouds.std(), np.linspace(-1.5, 1.5, 10))]
    return np.clip(128 + 60 * clouds / clouds.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("field", ["colour", "shape", "size", "place"])
def test_at_most_5_percent_of_noise_is_read_as_the_scene(world, field):
    rng = np.random.default_rng(0)
    count = right = 0
    for number in range(240):
        scene = world[rng.integers(len(world))]
        result = score(read(noise(number % 6, rng)), scene)
        count += len(scene.objects)
        right += getattr(result, field)
    assert right <= 0.05 * count


def test_random_blots_on_the_right_background_are_rarely_read_as_the_scene(world):
    """Clouds in an object's colour: a reader that does not punish extra objects gives them half."""
    rng = np.random.default_rng(0)
    count = whole = shape = 0
    for _ in range(120):
        scene = world[rng.integers(len(world))]
        picture = draw(Scene(scene.background, ()), 128, 128)
        clouds = ndimage.gaussian_filter(rng.normal(size=(128, 128)), 6)
        colours = np.array([COLOURS[thing.colour] for thing in scene.objects], np.uint8)
        blots = clouds > 1.2 * clouds.std()
        picture[blots] = colours[rng.integers(len(colours))]
        result = score(read(picture), scene)
        count += result.count
        shape += result.shape
        whole += result.whole
    assert whole == 0 and shape <= 0.05 * count


def test_an_object_too_many_costs_as_much_as_a_wrong_one():
    more = Scene("white", (RED_CIRCLE, BLUE_CROSS))
    result = score(read(draw(more, 128, 128)), Scene("white", (RED_CIRCLE,)))
    assert (result.count, result.colour, result.shape, result.place, result.whole) == (2, 1, 1, 1, False)


def test_a_missing_object_costs_as_much_as_a_wrong_one():
    result = score(read(draw(Scene("white", (RED_CIRCLE,)), 128, 128)), PAIR)
    assert (result.count, result.colour, result.whole) == (2, 1, False)


def test_swapped_places_are_two_wrong_places():
    swapped = Scene(
        "white",
        (Object("blue", "cross", "small", "left"), Object("red", "circle", "large", "right")),
    )
    result = score(read(draw(swapped, 128, 128)), PAIR)
    assert (result.colour, result.shape, result.size, result.place) == (2, 2, 2, 0)


@pytest.mark.parametrize(
    "one, other",
    [(("red", "circle"), ("red", "cross")), (("red", "circle"), ("blue", "circle"))],
    ids=["same colour", "same shape"],
)
def test_swapped_places_are_wrong_places_also_when_the_objects_are_alike(one, other):
    asked = Scene("white", (Object(*one, "large", "left"), Object(*other, "large", "right")))
    swapped = Scene("white", (Object(*other, "large", "left"), Object(*one, "large", "right")))
    result = score(read(draw(swapped, 128, 128)), asked)
    assert (result.colour, result.shape, result.size, result.place) == (2, 2, 2, 0)


def test_swapped_colours_are_two_wrong_colours():
    swapped = Scene(
        "white",
        (Object("blue", "circle", "large", "left"), Object("red", "cross", "small", "right")),
    )
    result = score(read(draw(swapped, 128, 128)), PAIR)
    assert (result.colour, result.shape, result.size, result.place) == (0, 2, 2, 2)


def test_a_blot_is_an_object_of_unknown_shape():
    picture = draw(Scene("white", ()), 128, 128)
    picture[20:40, 20:60] = COLOURS["red"]
    picture[40:60, 20:30] = COLOURS["red"]
    (blot,) = read(picture).objects
    assert (blot.colour, blot.shape) == ("red", UNKNOWN)


@pytest.mark.parametrize("stain", [*BACKGROUNDS.values(), (190, 190, 190), (60, 60, 60)], ids=str)
def test_a_stain_that_is_neither_object_nor_background_counts_as_an_object(stain):
    for background, colour in BACKGROUNDS.items():
        picture = draw(Scene(background, (RED_CIRCLE,)), 128, 128)
        picture[85:120, 70:120] = stain
        distance = np.linalg.norm(np.subtract(stain, colour))
        assert len(read(picture).objects) == (2 if distance > 60 else 1)


@pytest.mark.parametrize("opacity", [0.3, 0.4, 0.6])
def test_a_ghost_of_an_object_counts_as_an_object(opacity):
    alone, both = Scene("white", (RED_CIRCLE,)), PAIR
    ghost = (1 - opacity) * draw(alone, 128, 128) + opacity * draw(both, 128, 128)
    result = score(read(ghost.astype(np.uint8)), alone)
    assert result.count == 2 and not result.whole


def test_an_empty_background_is_read_as_nothing():
    assert read(draw(Scene("pink", ()), 128, 128)) == Reading("pink", ())
    assert Reading("pink", ()).told() == "nothing on pink"
    assert Reading("pink", (Seen("red", "cross", "small", "top"),)).told() == "small red cross (top) on pink"


# The command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miniature", "read", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_tells_what_a_picture_shows(tmp_path):
    Image.fromarray(draw(PAIR, 128, 128)).save(tmp_path / "pair.png")
    done = run(str(tmp_path / "pair.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("large red circle (left), small blue cross (right) on white")


def test_a_file_that_is_no_picture_is_refused_with_status_2(tmp_path):
    (tmp_path / "no.png").write_text("no")
    Image.fromarray(draw(PAIR, 128, 128)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    for name, why in (
        ("no", "is no whole picture"),
        ("cut", "is no whole picture"),
        ("gone", "is not there"),
    ):
        path = tmp_path / f"{name}.png"
        done = run(str(path))
        assert done.returncode == 2
        assert why in done.stderr and done.stderr.count("\n") == 1
