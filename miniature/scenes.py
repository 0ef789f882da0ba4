"""The world that the miniature is trained on: one or two flat objects before a plain background.

An object is a shape in a colour and a size. A scene places one object (left, right, top, bottom or
centre) or two (left and right, or top and bottom). Lengths are in units of the shorter side of the
picture, so a scene can be drawn at any size. `held_out` says which scenes training never sees.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

SHAPES = ("circle", "triangle", "cross")
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 80, 220),
    "yellow": (250, 210, 40),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 215),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "brown": (115, 75, 45),
    "pink": (250, 190, 205),
}
SIZES = {"small": 38 / 128, "large": 54 / 128}  # width and height of an object
PLACES: dict[str, tuple[float, float]] = {  # row and column of its centre, as parts of the picture
    "left": (0.5, 0.25),
    "right": (0.5, 0.75),
    "top": (0.25, 0.5),
    "bottom": (0.75, 0.5),
    "centre": (0.5, 0.5),
}
PAIRS = (("left", "right"), ("top", "bottom"))
JITTER = 1.5 / 128  # of a centre, either way
SIZE_JITTER = 0.03  # of a size, either way
ARM = 0.3  # width of a cross's arms, as a part of its size
WORLD = (SHAPES, COLOURS, BACKGROUNDS, SIZES, PLACES, PAIRS, JITTER, SIZE_JITTER, ARM)


@dataclass(frozen=True, order=True)
class Object:
    """One object; the fields are keys of SHAPES, COLOURS, SIZES and PLACES."""

    colour: str
    shape: str
    size: str
    place: str

    @property
    def kind(self) -> int:
        """The number of its colour and shape, from 0."""
        return list(COLOURS).index(self.colour) * len(SHAPES) + SHAPES.index(self.shape)


@dataclass(frozen=True, order=True)
class Scene:
    """A background and one or two objects; of two, the left or the upper one is first."""

    background: str
    objects: tuple[Object, ...]

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination.

        Of a single object, colour, shape and place together decide; of two, their colours and shapes,
        wherever they stand. Every colour occurs in training with every shape, and at every place.
        """
        if len(self.objects) == 1:
            (only,) = self.objects
            return (only.kind + 5 * list(PLACES).index(only.place)) % 9 == 0
        first, second = self.objects
        return (first.kind + second.kind) % 8 == 3


def scenes() -> list[Scene]:
    """Every scene there is, in an order that does not change."""
    kinds = list(product(COLOURS, SHAPES, SIZES))
    found = [
        Scene(background, (Object(colour, shape, size, place),))
        for background, (colour, shape, size), place in product(BACKGROUNDS, kinds, PLACES)
    ]
    for background, one, other, (here, there) in product(BACKGROUNDS, kinds, kinds, PAIRS):
        if one[:2] != other[:2]:
            found.append(Scene(background, (Object(*one, here), Object(*other, there))))
    return found


def draw(scene: Scene, height: int, width: int, rng: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [height, width, 3], edges smooth over one pixel.

    With `rng`, each object is moved and resized a little; without it, it stands where it should.
    """
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    unit = min(height, width)
    for thing in scene.objects:
        shift_y, shift_x, swell = rng.uniform(-1, 1, 3) if rng else (0.0, 0.0, 0.0)
        row, column = PLACES[thing.place]
        y = np.arange(height)[:, None] + 0.5 - row * height - shift_y * JITTER * unit
        x = np.arange(width)[None, :] + 0.5 - column * width - shift_x * JITTER * unit
        size = SIZES[thing.size] * unit * (1 + swell * SIZE_JITTER)
        covered = np.clip(0.5 - distance(thing.shape, y, x, size), 0, 1)[..., None].astype(np.float32)
        picture += covered * (np.array(COLOURS[thing.colour], np.float32) - picture)
    return np.round(picture).astype(np.uint8)


def distance(shape: str, y: NDArray, x: NDArray, size: float) -> NDArray[np.floating]:
    """How far, in pixels, the points (y, x) lie outside a shape around (0, 0); negative inside it.

    y: [height, 1], downwards; x: [1, width]; the result is [height, width]. Every shape fills a
    square of `size` pixels; a triangle stands on its side.
    """
    half = size / 2
    if shape == "circle":
        return np.hypot(y, x) - half
    if shape == "triangle":
        flank = (2 * np.abs(x) - (y + half)) / np.sqrt(5)  # twice as steep as a diagonal
        return np.maximum(flank, y - half)
    if shape == "cross":
        arm = ARM * size / 2
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - half)
        across = np.maximum(np.abs(y) - arm, np.abs(x) - half)
        return np.minimum(upright, across)
    raise ValueError(f"{shape!r} is no shape: expected one of {', '.join(SHAPES)}")
