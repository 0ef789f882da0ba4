"""The report as HTML: the verdict first, then what it rests on."""

from pathlib import Path
from typing import Any

from engines.runtimes import runtime
from pages import render
from quality.chart import velocity_chart
from quality.figure import FIGURES
from quality.gpu_check import summary
from quality.pictures import pictures


def page(content: dict[str, Any], folder: Path, audit: Any, check: Path | None = None) -> str:
    """The whole page; `content` is gate.json, `folder` holds its pictures, `audit` the export's audit.json.

    `check` is the page of gpu-check, where there is one.
    """
    rows, gain = pictures(content["pictures"], folder)
    return render(
        "report.html.j2",
        gate=content,
        figures=FIGURES,
        pictures=rows,
        gain=gain,
        chart=velocity_chart(content["steps"]),
        audit=audit,
        emulates_fp8=runtime(content["runtime"]).emulates_fp8,
        check=summary(check) if check else None,
    )
