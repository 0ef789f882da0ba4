"""`make report`: one page about what FP8 cost, from the gate's artifact and the export's audit.

`build/<model>/report/index.html` needs nothing beside itself: no network, no other file.
"""

import json
from pathlib import Path
from typing import Any

import pages
from engines.source import MODEL
from mmdit.artifact import (
    MEASUREMENTS,
    Layout,
    Manifest,
    digest,
    read_manifest,
    require,
    sha256,
    shown,
    whole,
)
from mmdit.contract import Precision
from mmdit.errors import ArtifactError
from quality.gate import GATE
from quality.gpu_check import newest
from quality.subject import Subject

PAGE = "index.html"
AUDIT = "audit.json"
_PARTS = ("report", "page", "pictures", "chart", "gpu_check")
_CODE = [*(Path(__file__).with_name(f"{name}.py") for name in _PARTS), *pages.FILES]


def report(layout: Layout, target: str, measurements: Path = MEASUREMENTS) -> Path:
    """Write the page unless it is up to date, and give its path.

    What gpu-check last found lies in `measurements`.

    Raises ArtifactError when the gate was not run, or was run on other engines than those that are there.
    """
    make = f"make gate MODEL={layout.model} TARGET={target}"
    folder = layout.quality(target)
    gate = require(folder, make)
    subject = Subject(layout, target)
    files = subject.files
    if others := sorted(name for name, value in files.items() if gate.made_from.get(name) != value):
        raise ArtifactError(
            f"{shown(folder)} is about other engines than those that are there ({others[0]}): run `{make}`"
        )
    onnx = layout.onnx("mmdit", Precision.FP8)
    made_from = read_manifest(subject.folders["mmdit-fp8"]).made_from
    exported = require(onnx, make).files
    if any(exported.get(name) != made_from[name] for name in made_from if name.startswith(MODEL)):
        raise ArtifactError(f"{shown(onnx)} is not what the FP8 engine was made from: run `{make}`")
    audit = onnx / AUDIT
    check = newest(measurements, layout.name, target)
    manifest = Manifest(
        kind="report",
        checkpoint=gate.checkpoint,
        made_from={"quality": digest(gate.files), AUDIT: sha256(audit)}
        | ({check.name: sha256(check)} if check else {}),
        settings={"target": target, "code": digest([path.read_text() for path in _CODE])},
        versions=gate.versions,
    )
    reason = manifest.reason_to_rebuild(layout.report)
    if reason is None:
        print(f"report: up to date: {shown(layout.report / PAGE)}")
        return layout.report / PAGE
    from quality.page import page

    content: dict[str, Any] = json.loads((folder / GATE).read_text(encoding="utf-8"))
    layers = json.loads(audit.read_text(encoding="utf-8"))
    with whole(layout.report, manifest) as partial:
        (partial / PAGE).write_text(page(content, folder, layers, check), encoding="utf-8")
    print(f"report: written ({reason}): {shown(layout.report / PAGE)}")
    return layout.report / PAGE
