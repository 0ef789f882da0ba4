"""Says what a scene shows, in many ways: the captions of the training and of the evaluation."""

import numpy as np

from miniature.scenes import Object, Scene

WORDS = {  # what each name may be called; the first is the plainest
    "circle": ("circle", "circle", "disc"),
    "triangle": ("triangle",),
    "cross": ("cross", "cross", "plus sign"),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "grey"),
    "small": ("small", "small", "little"),
    "large": ("large", "large", "big"),
}
WHERE = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "above", "in the upper half"),
    "bottom": ("at the bottom", "below", "in the lower half"),
    "centre": ("in the centre", "in the center", "in the middle"),
}
# {a} is the left or upper object, {b} the other
SIDE_BY_SIDE = (
    "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left",
    "{a} to the left of {b}",
    "{b} to the right of {a}",
    "{a} left of {b}",
    "{b} right of {a}",
)
STACKED = (
    "{a} at the top and {b} at the bottom",
    "{b} at the bottom and {a} at the top",
    "{a} above {b}",
    "{b} below {a}",
    "{a} over {b}",
    "{b} under {a}",
)
FRAMES = (
    "{scene} on a {background} background",
    "{scene}, {background} background",
    "on a {background} background, {scene}",
    "a picture of {scene} on a {background} background",
    "{scene} in front of a {background} background",
    "there is {scene} on a {background} background",
)
OMITTED = 0.1  # how often training leaves out a size, or the background


def caption(scene: Scene, rng: np.random.Generator | None = None, *, whole: bool = True) -> str:
    """A sentence for `scene`; without `rng` the plainest one.

    With `whole` it tells everything that the scene holds; otherwise a size or the background is
    sometimes left out.
    """

    def choose(ways: tuple[str, ...]) -> str:
        return ways[rng.integers(len(ways))] if rng else ways[0]

    def name(word: str) -> str:
        return choose(WORDS.get(word, (word,)))

    def omit() -> bool:
        return not whole and rng is not None and rng.random() < OMITTED

    def describe(thing: Object) -> str:
        size = "" if omit() else f"{name(thing.size)} "
        return f"a {size}{name(thing.colour)} {name(thing.shape)}"

    first = scene.objects[0]
    if len(scene.objects) == 1:
        text = f"{describe(first)} {choose(WHERE[first.place])}"
    else:
        arrangement = SIDE_BY_SIDE if first.place == "left" else STACKED
        text = choose(arrangement).format(a=describe(first), b=describe(scene.objects[1]))
    return text if omit() else choose(FRAMES).format(scene=text, background=name(scene.background))
