"""From pictures and velocities to figures: each of FP8 against FP16, and of the floor, FP16 against FP32."""

from typing import Any

import numpy as np

from quality import metrics, perceptual
from quality.figure import Figure
from quality.measurement import PAIRS, Measurement
from quality.metrics import Picture
from quality.prompts import Task


def compared(measurement: Measurement, tasks: list[Task]) -> tuple[list[Figure], list[dict[str, Any]]]:
    """The figures, and for each task what its pictures measure."""
    shape = next(
        (p.shape for made in measurement.pictures.values() for p in made if p is not None), (8, 8, 3)
    )
    black = np.zeros(shape, np.uint8)
    made = {
        name: [black if picture is None else picture for picture in pictures]
        for name, pictures in measurement.pictures.items()
    }
    each: list[dict[str, Any]] = []
    for number, task in enumerate(tasks):
        mask = _mask(task, made["fp16"][number])
        each.append(
            {"prompt": task.prompt, "negative_prompt": task.negative_prompt, "seed": task.seed}
            | {"flaws": {name: metrics.flaw(measurement.pictures[name][number]) for name in made}}
            | {pair: _alike(made[a][number], made[b][number], mask) for pair, (a, b) in PAIRS.items()}
        )
    return [
        *_of_pictures(each),
        *_perceptual(made, tasks, each),
        *_of_velocities(measurement),
        *_flawed(each),
        *_read(made, tasks, each),
    ], each


def _figure(name: str, values: dict[str, float]) -> Figure:
    return Figure(name=name, fp8=values["fp8"], floor=values["floor"])


def _mask(task: Task, fp16: Picture) -> metrics.Mask:
    if task.scene is None:
        return metrics.structured(fp16)
    from miniature.scenes import draw

    height, width, _ = fp16.shape
    return metrics.drawn_objects(draw(task.scene, height, width))


def _alike(one: Picture, other: Picture, mask: metrics.Mask) -> dict[str, float]:
    return {
        "ssim": metrics.similarity(one, other),
        "ssim_objects": metrics.similarity_over(one, other, mask),
        "psnr": metrics.psnr(one, other),
    }


def _of_pictures(each: list[dict[str, Any]]) -> list[Figure]:
    def figure(name: str, field: str, summary: Any) -> Figure:
        values = {pair: float(summary([entry[pair][field] for entry in each])) for pair in PAIRS}
        return _figure(name, values)

    return [
        figure("ssim_mean", "ssim", np.mean),
        figure("ssim_5th_percentile", "ssim", lambda values: np.percentile(values, 5)),
        figure("ssim_minimum", "ssim", np.min),
        figure("ssim_objects_mean", "ssim_objects", np.mean),
        figure("ssim_objects_minimum", "ssim_objects", np.min),
        figure("psnr_mean", "psnr", np.mean),
        figure("psnr_minimum", "psnr", np.min),
    ]


def _perceptual(
    made: dict[str, list[Picture]], tasks: list[Task], each: list[dict[str, Any]]
) -> list[Figure]:
    figures = []
    try:
        means = {}
        for pair, (one, other) in PAIRS.items():
            distances = perceptual.lpips(list(zip(made[one], made[other], strict=True)))
            for entry, distance in zip(each, distances, strict=True):
                entry[pair]["lpips"] = distance
            means[pair] = float(np.mean(distances))
        figures.append(_figure("lpips_mean", means))
    except perceptual.Absent as reason:
        figures.append(Figure(name="lpips_mean", fp8=None, floor=None, absent=str(reason)))
    try:
        prompts = [task.prompt for task in tasks]
        scores = {name: perceptual.clip_scores(prompts, pictures) for name, pictures in made.items()}
        for number, entry in enumerate(each):
            entry["clip_scores"] = {name: values[number] for name, values in scores.items()}
        lost = {pair: float(np.mean(scores[b]) - np.mean(scores[a])) for pair, (a, b) in PAIRS.items()}
        figures.append(_figure("clip_score_lost", lost))
    except perceptual.Absent as reason:
        figures.append(Figure(name="clip_score_lost", fp8=None, floor=None, absent=str(reason)))
    return figures


def _of_velocities(measurement: Measurement) -> list[Figure]:
    cosines = measurement.cosines
    errors = {pair: float(np.mean([step[pair]["error"] for step in measurement.steps])) for pair in PAIRS}
    return [
        _figure("velocity_cosine_mean", {pair: float(np.mean(values)) for pair, values in cosines.items()}),
        _figure("velocity_cosine_minimum", {pair: min(values) for pair, values in cosines.items()}),
        _figure("velocity_error_mean", errors),
    ]


def _flawed(each: list[dict[str, Any]]) -> list[Figure]:
    count = {
        pair: float(sum(entry["flaws"][name] is not None for entry in each))
        for pair, (name, _) in PAIRS.items()
    }
    return [_figure("flawed_pictures", count)]


def _read(made: dict[str, list[Picture]], tasks: list[Task], each: list[dict[str, Any]]) -> list[Figure]:
    """What a program that knows the miniature's world reads in its pictures; nothing for other models."""
    scenes = [task.scene for task in tasks if task.scene is not None]
    if len(scenes) < len(tasks):
        reason = "only the miniature's own captions have scenes that a program can read"
        return [Figure(name="reader_points_lost", fp8=None, floor=None, absent=reason)]
    from miniature import tasks as miniature
    from miniature.reader import read

    work = [miniature.Task(scene, task.prompt, task.seed) for scene, task in zip(scenes, tasks, strict=True)]
    scores = {name: miniature.scores(pictures, work) for name, pictures in made.items()}
    for number, entry in enumerate(each):
        entry["read"] = {name: read(pictures[number]).told() for name, pictures in made.items()}
    lost = {
        pair: 100
        * max(0.0, *(scores[b][what] - scores[a][what] for what in ("colour", "shape", "size", "place")))
        for pair, (a, b) in PAIRS.items()
    }
    return [_figure("reader_points_lost", lost)]
