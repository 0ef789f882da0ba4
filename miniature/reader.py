"""Reads a picture back: its background, and which objects in which colours, sizes and places.

It knows the world of scenes.py and nothing else: no network. Whatever it cannot explain, it does not
see as something near; a blot is an object of unknown shape.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from miniature.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, distance

UNKNOWN = "unknown"
COLOUR_TOLERANCE = 60.0  # distance in RGB within which a pixel has a named colour
BACKGROUND_SHARE = 0.3  # of the pixels, at least, are the background's
SPECK = 0.06**2  # of the shorter side squared: what is smaller is no object
SHAPE_OVERLAP = 0.8  # intersection over union with the ideal shape, at least
PLACE_TOLERANCE = 0.12  # of height and of width, from the ideal centre


@dataclass(frozen=True)
class Seen:
    """One object as read; each field is a name of scenes.py or "unknown"."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str
    objects: tuple[Seen, ...]

    def told(self) -> str:
        """It in words."""
        objects = [f"{o.size} {o.colour} {o.shape} ({o.place})" for o in self.objects]
        return f"{', '.join(objects) or 'nothing'} on {self.background}"


@dataclass(frozen=True)
class Score:
    """How a reading answers a scene, in objects; `count` is the larger of both numbers of objects.

    So an object that is missing and one too many each cost as much as a wrong one.
    """

    count: int
    colour: int
    shape: int
    size: int
    place: int
    background: bool

    @property
    def whole(self) -> bool:
        """Whether everything is right."""
        return self.background and self.colour == self.shape == self.size == self.place == self.count


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a picture, uint8 [height, width, 3]."""
    height, width, _ = picture.shape
    unit = min(height, width)
    names = [*BACKGROUNDS, *COLOURS]
    palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)
    far = np.linalg.norm(picture[:, :, None].astype(np.float32) - palette, axis=-1)
    nearest = np.where(far.min(-1) <= COLOUR_TOLERANCE, far.argmin(-1), -1)
    shares = np.bincount(nearest[nearest >= 0], minlength=len(names))[: len(BACKGROUNDS)]
    if shares.max() < BACKGROUND_SHARE * height * width:
        return Reading(UNKNOWN, ())
    background = int(shares.argmax())
    # An edge is half background, half object: it counts for the nearer of the two.
    foreground = _foreground(picture, palette[background])
    blots, _ = ndimage.label(foreground)
    objects = []
    for number, box in enumerate(ndimage.find_objects(blots), start=1):
        mask = blots == number
        if mask.sum() >= SPECK * unit * unit:
            objects.append(_object(mask, box, nearest, names, unit))
    # What is neither background nor object should not be there, but thinly, along an edge.
    strange = (far[..., background] > COLOUR_TOLERANCE) & ~foreground
    stains, found = ndimage.label(ndimage.binary_opening(strange, iterations=2))
    for number in range(1, found + 1):
        if (stains == number).sum() >= SPECK * unit * unit:
            objects.append(Seen(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN))
    return Reading(names[background], tuple(objects))


def _foreground(picture: NDArray[np.uint8], background: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the picture is nearer to an object's colour than to its background."""
    pixels = picture.astype(np.float32)
    colours = np.array(list(COLOURS.values()), np.float32)
    to_object = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).min(-1)
    return to_object < np.linalg.norm(pixels - background, axis=-1)


def _object(
    mask: NDArray[np.bool_],
    box: tuple[slice, slice],
    nearest: NDArray[np.integer],
    names: list[str],
    unit: int,
) -> Seen:
    height, width = mask.shape
    inside = nearest[mask]
    inside = inside[inside >= 0]
    colour = UNKNOWN
    if len(inside) >= 0.5 * mask.sum():
        counts = np.bincount(inside, minlength=len(names))
        winner = int(counts.argmax())
        if winner >= len(BACKGROUNDS) and counts[winner] >= 0.6 * mask.sum():
            colour = names[winner]
    rows, columns = box
    side = ((rows.stop - rows.start) + (columns.stop - columns.start)) / 2
    y, x = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
    place = UNKNOWN
    for name, (row, column) in PLACES.items():
        if abs(y / height - row) <= PLACE_TOLERANCE and abs(x / width - column) <= PLACE_TOLERANCE:
            place = name
    ideal = {name: part * unit for name, part in SIZES.items()}
    size = min(ideal, key=lambda name: abs(ideal[name] - side))
    if abs(ideal[size] - side) > 0.25 * ideal[size]:
        size = UNKNOWN
    return Seen(colour, _shape(mask, y, x, side), size, place)


def _shape(mask: NDArray[np.bool_], y: float, x: float, side: float) -> str:
    """The shape whose ideal form overlaps the mask best, if it does so well enough."""
    height, width = mask.shape
    rows = np.arange(height)[:, None] + 0.5 - y
    columns = np.arange(width)[None, :] + 0.5 - x
    overlaps = {}
    for shape in SHAPES:
        form = distance(shape, rows, columns, side) < 0
        overlaps[shape] = (form & mask).sum() / max((form | mask).sum(), 1)
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= SHAPE_OVERLAP else UNKNOWN


def score(reading: Reading, scene: Scene) -> Score:
    """Compare a reading with what it should be; objects are matched so that it comes out best.

    Place, colour, shape and size of one object are judged on the same match. Of matches that are as good
    the one counts that has more colours and shapes right: these say which object it is, and then two
    objects that have changed places are two wrong places.
    """
    count = max(len(reading.objects), len(scene.objects))
    right = reading.background == scene.background
    best = Score(count, 0, 0, 0, 0, right)
    if not reading.objects or len(reading.objects) > 6:
        return best
    wanted: list[object] = [*scene.objects] + [None] * (count - len(scene.objects))
    given: list[Seen | None] = [*reading.objects, *[None] * (count - len(reading.objects))]
    fields = ("colour", "shape", "size", "place")
    for order in permutations(given):
        pairs = [(a, b) for a, b in zip(wanted, order, strict=True) if a is not None and b is not None]
        sums = [sum(getattr(a, field) == getattr(b, field) for a, b in pairs) for field in fields]
        colour, shape, size, place = sums
        candidate = Score(count, colour, shape, size, place, right)
        if _worth(candidate) > _worth(best):
            best = candidate
    return best


def _worth(result: Score) -> tuple[int, int]:
    identity = result.colour + result.shape
    return identity + result.size + result.place, identity
