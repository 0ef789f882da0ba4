"""How the benchmarks' charts look: the same colour for the same way of serving in all of them."""

from typing import Any

from bench.curves import ONE, STEPS, UNTOLD, WHOLE

COLOURS = {ONE: "#7a7a7a", WHOLE: "#d08a1d", STEPS: "#1b6ca8", UNTOLD: "#1b6ca8"}
DASHES = {UNTOLD: (0, (1, 1.6))}
NAMES = {  # on two lines, to stand at a line's end
    ONE: "one at a time",
    WHOLE: "whole requests\nin batches",
    STEPS: "step scheduler",
    UNTOLD: "step scheduler\nwithout a table",
}


def line(policy: str, **given: Any) -> dict[str, Any]:
    """The line of a policy."""
    return {
        "color": COLOURS[policy],
        "linestyle": DASHES.get(policy, "-"),
        "linewidth": 2.2 if policy == STEPS else 1.7,
        "zorder": 3 if policy == STEPS else 2,
    } | given


def plain(axes: Any, title: str = "", **given: Any) -> None:
    """Axes without a frame, with a pale grid of values."""
    axes.grid(axis="y", color="0.91", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("0.6")
    axes.tick_params(color="0.6", labelsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(**given)
