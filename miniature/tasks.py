"""What the miniature is asked to draw when it is judged, and what a program reads in its pictures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniature.grammar import caption
from miniature.scenes import Scene, scenes
from mmdit.errors import MmditError


@dataclass(frozen=True)
class Task:
    """A held-out scene, a caption of it, and the seed of the noise."""

    scene: Scene
    caption: str
    seed: int
    height: int = 128
    width: int = 128


def tasks(count: int, height: int = 128, width: int = 128) -> list[Task]:
    """The first `count` held-out captions, the same every time: a third single objects, the rest pairs.

    Raises MmditError when there are not so many.
    """
    unseen = [scene for scene in scenes() if scene.held_out]
    rng = np.random.default_rng([20, height, width])
    single = [scene for scene in unseen if len(scene.objects) == 1]
    double = [scene for scene in unseen if len(scene.objects) == 2]
    most = 3 * len(single)
    if not 1 <= count <= most:
        raise MmditError(f"{count} captions were asked for: expected 1 to {most}")
    ones = iter([single[index] for index in rng.permutation(len(single))])
    twos = iter([double[index] for index in rng.permutation(len(double))])
    chosen = [next(ones) if number % 3 == 0 else next(twos) for number in range(count)]
    return [Task(scene, caption(scene, rng), seed, height, width) for seed, scene in enumerate(chosen)]


def scores(pictures: list[NDArray[np.uint8]], work: list[Task]) -> dict[str, float]:
    """Shares from 0 to 1 of what the pictures' objects have right; `work` says what they should show.

    The reader (and scipy with it) is loaded when it is needed.
    """
    from miniature.reader import read, score

    read_as = [score(read(picture), task.scene) for picture, task in zip(pictures, work, strict=True)]
    count = sum(each.count for each in read_as)
    pairs = [each for each, task in zip(read_as, work, strict=True) if len(task.scene.objects) == 2]

    def share(field: str) -> float:
        return sum(getattr(each, field) for each in read_as) / count

    return {
        "colour": share("colour"),
        "shape": share("shape"),
        "size": share("size"),
        "place": share("place"),
        "both_places": sum(each.place == each.count for each in pairs) / len(pairs) if pairs else 1.0,
        "background": sum(each.background for each in read_as) / len(read_as),
        "everything": sum(each.whole for each in read_as) / len(read_as),
    }
