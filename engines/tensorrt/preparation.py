"""All that can be known about engines before TensorRT is asked, on a machine with its GPU or without.

What fails here fails in a minute, not after an hour of a GPU: files that changed, graphs that TensorRT would
refuse or would not fuse, profiles that the graph does not run at, memory and disk that do not suffice.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from engines.checks.bounds import check_bounds
from engines.checks.readiness import check_ready, warnings
from engines.engine import Build, check_profiles, up_to_date
from engines.forecast.model_costs import model_costs, sizes_planned
from engines.forecast.planner import MemoryPlan, check_fits, plan_build, plan_table, verdict
from engines.source import Source, check_unchanged
from engines.table import table
from mmdit.contract import Precision, bounds, components
from mmdit.gpus import CARDS
from mmdit.progress import Progress
from mmdit.shapes import tokens


def prepare(found: Sequence[Source], build: Build) -> dict[str, dict[str, Any]]:
    """Check a model's ONNX files, profiles and memory for a TensorRT target, and print what was seen.

    Where the plans cannot be built here, print how to build them elsewhere. Returns findings by component,
    for the engines' manifests. Raises ArtifactError, ContractError or EngineError for what would break in the
    build or later.
    """
    signatures = components(build.family, build.shapes)
    check_profiles(build.family, build.shapes)
    findings: dict[str, dict[str, Any]] = {}
    rows = []
    told: list[str] = []
    with Progress("checking", len(found), "ONNX files") as progress:
        for source in found:
            start = time.monotonic()
            signature = signatures[source.component]
            check_unchanged(source)
            ready = check_ready(source, signature)
            ran = check_bounds(source, signature, build.shapes)
            findings[source.component] = {"readiness": ready, "profiles": ran}
            told += [f"{source.component}: {warning}" for warning in warnings(source.manifest)]
            places = sum(rule["places"] for rule in ready.values())
            how = "run" if "ran_at" in ran else "told from the graph"
            rows.append(
                (
                    source.component,
                    source.precision.value,
                    f"{len(ready)} rules hold in {places:,} places",
                    f"{len(bounds(signature, build.shapes))}, {how}",
                    f"{time.monotonic() - start:.1f} s",
                )
            )
            progress.advance()
        progress.note = "memory"
        costs = model_costs(found, build.family, sizes_planned(build.shapes))
    print(table(("component", "precision", "ready for TensorRT", "profiles", "checked in"), rows))
    print(f"\nprofiles of the MMDiT, shape set {build.shapes.name}:\n{_profiles(build)}")
    mmdit = next(source for source in found if source.component == "mmdit")
    told += _attention_warnings(mmdit, build)
    plan = plan_build(costs, build.shapes, mmdit.precision)
    print(f"\nmemory, computed from the graphs, not measured:\n{plan_table(plan)}")
    stale = [source.component for source in found if build.target.missing or not up_to_date(source, build)]
    told += _check_memory(plan, build, stale)
    for warning in told:
        print(f"warning: {warning}", file=sys.stderr)
    if build.target.missing:
        print(f"\n{_how_to_go_on(build, mmdit.precision)}")
    return findings


def _attention_warnings(mmdit: Source, build: Build) -> list[str]:
    most = build.target.fp8_attention_tokens
    height, width = build.shapes.ranges[0].opt
    count = tokens(build.family, (height, width))
    if mmdit.manifest.settings.get("attention") != "fp8" or most is None or count <= most:
        return []
    return [
        f"attention is FP8, and {height}×{width} has {count} tokens: by its release notes (10.6) TensorRT "
        f"fuses FP8 attention on {build.target.name} up to {most} only; compare with attention in FP16"
    ]


def _profiles(build: Build) -> str:
    rows = []
    for number, each in enumerate(build.shapes.ranges):
        sizes = [f"{size[0]}×{size[1]}" for size in (each.min, each.opt, each.max)]
        counts = [str(count) for count in (each.min_rows, each.opt_rows, each.max_rows)]
        kind = "static, for a CUDA graph" if each.static else ""
        rows.append((str(number), *sizes, " / ".join(counts), kind))
    return table(("profile", "smallest", "usual", "largest", "rows", ""), rows)


def _check_memory(plan: MemoryPlan, build: Build, stale: Sequence[str]) -> list[str]:
    """Warnings for the GPU that is here, or a refusal; for one elsewhere print which of its kind would do."""
    folder = build.layout.root
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder).free
    if build.gpu is not None and not build.target.missing:
        return check_fits(
            plan,
            memory=build.gpu.memory,
            free_memory=build.gpu.free_memory,
            free_disk=disk,
            options=build.options,
            stale=stale,
        )
    cards = [card for card in CARDS if card.target == build.target.name]
    if cards:
        print("\n" + table([card.name for card in cards], [[verdict(plan, card.memory) for card in cards]]))
    return []


def _how_to_go_on(build: Build, precision: Precision) -> str:
    """The commands that build what was prepared here on a machine with the GPU."""
    name, target = build.layout.name, build.target.name
    folders = " and ".join(
        f"build/{name}/{stage}" for stage in ("onnx", *(["onnx-fp8"] if precision is Precision.FP8 else []))
    )
    command = (
        f"-m engines build --model {name} --target {target} --precision {precision.value} "
        f"--shapes {build.shapes.name}{build.options.words}"
    )
    cards = [card.name for card in CARDS if card.target == target]
    gpu = f"{target} GPU ({', '.join(cards)})" if cards else f"GPU of {target}"
    gate = "(for FP8's quality gate also with --precision fp16), " if precision is Precision.FP8 else ""
    return (
        f"Everything before the build passed. To go on, copy {folders}\ninto a checkout on a machine with a "
        f"{gpu}, and there,\nwith the TensorRT of the Triton that will serve:\n"
        "  make setup && .venv/bin/pip install tensorrt==VERSION\n"
        f"  .venv/bin/python {command}\n"
        f"{gate}or in the container (deploy/README.md):\n"
        '  BUILD="$PWD/build" docker compose -f deploy/compose.yaml run --rm build \\\n'
        f"    .venv/bin/python {command}"
    )
