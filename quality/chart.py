"""The report's chart: how far the MMDiT's velocity is off at each timestep, in FP8 and at the floor."""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pages.picture import encoded

FP8_COLOUR, FLOOR_COLOUR = "#c2410c", "#475569"


def velocity_chart(steps: list[dict[str, Any]]) -> str:
    """A data URI: the relative error over the timestep, the noisiest on the left as denoising goes."""
    timesteps = [step["timestep"] for step in steps]
    fp8, floor = ([step[name]["error"] for step in steps] for name in ("fp8", "floor"))
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "mmdit-trt", "font.size": 10}):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, values, colour in (
            ("FP8 against FP16", fp8, FP8_COLOUR),
            ("the floor: FP16 against FP32", floor, FLOOR_COLOUR),
        ):
            axes.plot(
                timesteps, [max(value, 1e-9) for value in values], "o-", ms=3.5, color=colour, label=name
            )
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("timestep (noise on the left, picture on the right)")
        axes.set_ylabel("relative error of the velocity")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return encoded(stream.getvalue(), "svg+xml")
