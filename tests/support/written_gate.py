"""A quality gate's artifact about engines, as the gate writes it, with a verdict that a test chooses."""

from typing import Any

from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import Precision
from serve.engine_set import Engines

FIGURES = {
    "ssim_mean": {"name": "ssim_mean", "fp8": 0.991, "floor": 0.999, "bound": 0.97, "failure": None},
    "lpips_mean": {"name": "lpips_mean", "fp8": None, "floor": None, "bound": None, "failure": None},
}


def write_gate(layout: Layout, target: str = "hopper", *, passed: bool = True, **other: str) -> None:
    """A gate about the engines that are there, or with `other` hashes of some files."""
    engines = Engines(layout, target, Precision.FP8)
    failures = [] if passed else ["SSIM, mean is 0.91, expected at least 0.97"]
    findings: dict[str, Any] = {
        "passed": passed,
        "failures": failures,
        "mission": {"figure": "ssim_mean", "asked": 0.97, "measured": 0.991, "met": passed},
        "figures": FIGURES,
    }
    manifest = Manifest(
        kind="quality",
        checkpoint="one",
        made_from=engines.files(by_folder=True) | other,
        settings={
            "profile": "miniature",
            "prompts": 16,
            "steps": 20,
            "size": [128, 128],
            "thresholds": {"ssim_mean": {"at_least": 0.97}},
        },
        versions={},
        findings=findings,
    )
    with whole(layout.quality(target), manifest) as folder:
        (folder / "gate.json").write_text("{}")
