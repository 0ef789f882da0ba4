"""The page of an evaluation: the scores, and every picture beside its caption."""

from typing import TYPE_CHECKING, Any

from miniature.reader import read, score
from pages import render
from pages.picture import data_uri

if TYPE_CHECKING:
    from miniature.evaluation import Picture
    from miniature.scenes import Scene
    from miniature.tasks import Task

MEANINGS = {
    "colour": "objects in the right colour",
    "shape": "objects of the right shape",
    "size": "objects of the right size",
    "place": "objects in the right place",
    "both_places": "two-object pictures with both in place",
    "background": "pictures with the right background",
    "everything": "pictures with everything right",
}
COLUMNS = {"fp32": "diffusers, FP32", "fp16": "Triton, FP16", "fp8": "Triton, FP8"}


def page(results: dict[str, Any], work: "list[Task]", made: "dict[str, list[Picture]]") -> str:
    """The page as HTML: scores against what was asked, then the pictures, the least alike first."""
    columns = {name: label for name, label in COLUMNS.items() if name in made}
    rows = [
        {
            "caption": task.caption,
            "seed": task.seed,
            "ssim": ssim,
            "pictures": [_shown(label, made[name][index], task.scene) for name, label in columns.items()],
        }
        for index, (task, ssim) in enumerate(zip(work, results["each_ssim"], strict=True))
    ]
    rows.sort(key=lambda row: row["ssim"])
    return render("miniature.html.j2", results=results, meanings=MEANINGS, columns=columns, rows=rows)


def _shown(label: str, picture: "Picture", scene: "Scene") -> dict[str, Any]:
    reading = read(picture)
    misread = None if score(reading, scene).whole else reading.told()
    return {"label": label, "source": data_uri(picture), "misread": misread}
