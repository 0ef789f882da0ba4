"""The loss curve of a training, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def draw_curve(title: str, losses: list[float], scores: list[dict[str, float]], path: Path) -> None:
    """Draw the losses, their running mean of 50, and whatever `sample` scored, over the steps."""
    figure = Figure(figsize=(8, 4.5), dpi=100)
    axes = figure.subplots()
    window = min(50, len(losses))
    total = 0.0
    mean = []
    for index, loss in enumerate(losses):
        total += loss - (losses[index - window] if index >= window else 0.0)
        mean.append(total / min(index + 1, window))
    axes.plot(range(1, len(losses) + 1), losses, color="0.85", linewidth=0.5)
    axes.plot(range(1, len(losses) + 1), mean, color="black", label="loss")
    axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    names = sorted({name for score in scores for name in score} - {"step"})
    if names:
        right = axes.twinx()
        for name in names:
            known = [score for score in scores if name in score]
            right.plot([s["step"] for s in known], [s[name] for s in known], ".-", label=name)
        right.set_ylabel("score")
        right.legend(loc="center right")
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path)
