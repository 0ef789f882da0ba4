"""The chart of docs/benchmarks/serving.md."""

from pathlib import Path

from bench.curves import ONE, STEPS
from bench.serving import CLIENTS, LOADS, LOOP, Found, latency, rate
from bench.style import line, plain

_STYLES = {
    LOOP: {"color": "#b0413e", "linewidth": 1.7},
    ONE: line(ONE),
    STEPS: line(STEPS),
}


def draw_serving(clients: Found, loads: Found, path: Path) -> Path:
    """Draw pictures a second and latencies by clients, and latencies by load; returns the PNG's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.3), dpi=110)
    rates, closed, open_ = figure.subplots(1, 3)
    for way, style in _STYLES.items():
        marker = {"marker": "o", "markersize": 4} | style
        rates.plot(CLIENTS, [rate(clients[way, each]) for each in CLIENTS], label=way, **marker)
        for axes, found, cells in ((closed, clients, CLIENTS), (open_, loads, LOADS)):
            axes.plot(cells, [latency(found[way, each], 50) for each in cells], **marker)
            axes.plot(
                cells, [latency(found[way, each], 95) for each in cells], **(marker | {"linestyle": ":"})
            )
    for axes in (rates, closed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(CLIENTS, list(map(str, CLIENTS)))
        axes.set_xlabel("clients, each with one request at a time", fontsize=9)
    open_.set_xticks(LOADS, [f"{load:.0%}" for load in LOADS])
    open_.set_xlabel("requests at random: load of one at a time", fontsize=9)
    top = 1.25 * max(rate(runs) for runs in clients.values())
    plain(rates, "pictures a second", ylim=(0, top))
    for axes, title, found in (
        (closed, "latency by clients, s: p50, and p95 dotted", clients),
        (open_, "latency by load, s: p50, and p95 dotted", loads),
    ):
        plain(axes, title, ylim=(0, 1.1 * max(latency(runs, 95) for runs in found.values())))
    rates.legend(frameon=False, fontsize=9, loc="lower right", labelcolor="linecolor")
    figure.suptitle("The miniature's 128×128 picture, 20 steps, on a CPU", fontsize=12, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path)
    return path
