"""The charts of docs/benchmarks/scheduling.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.curves import ONE, STEPS, UNTOLD, WHOLE, EngineCurve
from bench.scheduling import Point, most
from bench.style import COLOURS, NAMES, line, plain

_POLICIES = (ONE, WHOLE, UNTOLD, STEPS)


def draw_prices(
    prices: Sequence[EngineCurve],
    found: Sequence[Point],
    engines: Sequence[EngineCurve],
    path: Path,
    *,
    bound: bool,
) -> Path:
    """Draw what sharing calls does by what a second request costs in a call; returns the PNG's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110)
    panels = figure.subplots(1, 3)
    by_policy = {policy: [each for each in found if each.policy == policy] for policy in _POLICIES}
    xs = [curve.price for curve in prices]
    one = by_policy[ONE]
    series: list[dict[str, list[float]]] = [
        {policy: [most(curve, policy) for curve in prices] for policy in (WHOLE, UNTOLD, STEPS)},
        *(
            {
                policy: [
                    getattr(each, name) / getattr(alone, name)
                    for each, alone in zip(by_policy[policy], one, strict=True)
                ]
                for policy in (WHOLE, UNTOLD, STEPS)
            }
            for name in ("mean", "p95")
        ),
    ]
    titles = ("most throughput", "mean latency at 70 % load", "95th percentile of latency at 70 % load")
    for axes, values, title in zip(panels, series, titles, strict=True):
        axes.axhline(1, **line(ONE))
        for policy, ys in values.items():
            axes.plot(xs, ys, **line(policy))
        plain(axes, title, xlim=(-0.02, 1.02), ylim=(0, 8.2) if axes is panels[0] else (0, 1.7))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        for engine in engines:
            axes.plot(
                engine.price, 0, marker="^", color="0.25", markersize=7, clip_on=False, zorder=5, alpha=0.8
            )
    panels[0].set_ylabel("times one at a time", fontsize=9)
    panels[1].set_xlabel("what a second request costs in a call, of what it costs alone", fontsize=10)
    first, text = panels[0], {"fontsize": 9, "color": "0.25"}
    upward: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "center"}
    sub_linear, linear, *sd35 = engines
    first.annotate(sub_linear.name, (sub_linear.price, 1.2), **upward, **text)
    first.annotate(linear.name, (linear.price + 0.01, 1.2), **upward, **text)
    if sd35 and bound:
        for side in ("512²", "1024²"):
            places = [each.price for each in sd35 if side in each.name]
            place = sum(places) / len(places) - 0.02
            first.annotate(f"SD3.5 at {side} (computed)", (place, 1.35), **upward, **text)
    for each in () if bound else sd35:
        first.annotate(each.name, (each.price, 1.35), **upward, **text)
    first.annotate(
        "step scheduler and\nwhole requests in batches", (0.2, 4.6), fontsize=9, color=COLOURS[STEPS]
    )
    _label(panels[2], ONE, (0.3, 1.02))
    _label(panels[2], WHOLE, (0.02, 0.74))
    _label(panels[2], STEPS, (0.42, 0.33))
    _label(panels[2], UNTOLD, (0.5, 1.38))
    figure.suptitle(
        "Where step batching pays: where a call has room for a second request", fontsize=12, x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(path)
    return path


def draw_loads(engines: Sequence[EngineCurve], found: Sequence[Point], path: Path) -> Path:
    """Draw throughput and latencies as load rises, over the invented engines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), dpi=110)
    rows = figure.subplots(len(engines), 3, squeeze=False)
    for panels, curve, right in zip(rows, engines, (4.0, 1.5), strict=True):
        for policy in _POLICIES:
            if policy == UNTOLD and curve.worth == curve.most:
                continue
            line_ = sorted(
                (each for each in found if each.curve == curve and each.policy == policy),
                key=lambda each: each.load,
            )
            line_ = [each for each in line_ if each.load <= right]
            panels[0].plot([each.load for each in line_], [each.throughput for each in line_], **line(policy))
            kept = [each for each in line_ if each.keeps_up]
            for axes, name in zip(panels[1:], ("mean", "p95"), strict=True):
                axes.plot(
                    [each.load for each in kept], [getattr(each, name) for each in kept], **line(policy)
                )
        panels[0].plot([0, right], [0, right], color="0.75", linewidth=1, linestyle="--", zorder=1)
        plain(panels[0], f"{curve.name}: throughput", xlim=(0, right), ylim=(0, right))
        panels[0].set_ylabel("times one at a time", fontsize=9)
        for axes, name, top in (
            (panels[1], "mean latency", 6 * curve.alone),
            (panels[2], "95th percentile of latency", 12 * curve.alone),
        ):
            plain(axes, f"{curve.name}: {name}", xlim=(0, right), ylim=(0, top))
            axes.set_ylabel("seconds", fontsize=9)
        for axes in panels:
            axes.set_xticks(
                [0, 1, 2, 3, 4] if right == 4 else [0, 0.5, 1, 1.5],
                ["0", "100 %", "200 %", "300 %", "400 %"] if right == 4 else ["0", "50 %", "100 %", "150 %"],
            )
    for axes in rows[-1]:
        axes.set_xlabel("load, of what one at a time can do", fontsize=9)
    first, second = rows[0], rows[1]
    first[0].annotate("served as it comes", (0.55, 0.8), fontsize=8, color="0.5", rotation=39)
    _label(first[0], ONE, (1.6, 1.1))
    first[0].annotate(
        "step scheduler and\nwhole requests in batches", (0.5, 3.3), fontsize=9, color=COLOURS[STEPS]
    )
    _label(first[1], ONE, (1.06, 4.6))
    _label(first[1], WHOLE, (1.75, 2.05))
    _label(first[1], STEPS, (1.9, 0.25))
    for axes, place in ((second[0], (0.45, 0.25)), (second[1], (0.62, 0.3))):
        every = "all four alike" if axes is second[0] else "step scheduler and\none at a time"
        axes.annotate(every, place, fontsize=9, color=COLOURS[STEPS])
    _label(second[1], UNTOLD, (0.14, 3.4))
    _label(second[2], WHOLE, (0.96, 6.4))
    figure.tight_layout()
    figure.savefig(path)
    return path


def drawn(engine: EngineCurve) -> bool:
    """Whether an engine has a column among those of SD3.5: FP16 is left to the table."""
    return not engine.name.endswith("FP16")


def draw_engines(engines: Sequence[EngineCurve], found: Sequence[Point], path: Path, *, bound: bool) -> Path:
    """Draw the mean latency over SD3.5's engines as load rises, beside one at a time's."""
    from matplotlib.figure import Figure

    shown = [each for each in engines if drawn(each)]
    figure = Figure(figsize=(11, 3.6), dpi=110)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, curve in zip(panels, shown, strict=True):
        means = {(each.policy, each.load): each.mean for each in found if each.curve == curve}
        loads = sorted({load for _, load in means})
        for policy in _POLICIES:
            axes.plot(loads, [means[policy, load] / means[ONE, load] for load in loads], **line(policy))
        plain(axes, f"{curve.name}\n{curve.alone:.2f} s alone", xlim=(0.15, 0.95), ylim=(0.8, 1.8))
        axes.set_xticks([0.2, 0.4, 0.6, 0.8], ["20 %", "40 %", "60 %", "80 %"])
        axes.set_xlabel("load, of what one at a time can do", fontsize=8.5)
    panels[0].set_ylabel("mean latency,\ntimes one at a time", fontsize=9)
    _label(panels[0], UNTOLD, (0.19, 1.32))
    _label(panels[0], WHOLE, (0.6, 0.83))
    panels[-1].annotate(
        "step scheduler and\none at a time, the same", (0.19, 0.84), fontsize=9, color=COLOURS[STEPS]
    )
    kind = "SD3.5 on an H100: computed, not measured" if bound else "SD3.5: measured step times"
    figure.suptitle(f"{kind}. The GPU is full with one request", fontsize=12, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path)
    return path


def _label(axes: Any, policy: str, place: tuple[float, float]) -> None:
    axes.annotate(NAMES[policy], place, fontsize=9, color=COLOURS[policy], va="bottom")
