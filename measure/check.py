"""All that only a GPU with TensorRT can tell about a model's engines, in one go, with a table at the end.

FP16 and both FP8 engines (attention's products in FP16, and in FP8) are built and judged; the faster one that
passes the gate and is as accurate as its ONNX file is kept. The stages are run as their own commands, and
reuse what is up to date. An FP8 engine that fails is told, and does not keep the rest from being measured.
"""

import datetime
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.forecast.model_costs import model_costs
from engines.forecast.roofline import milliseconds
from engines.source import sources
from measure.attention import (
    VARIANTS,
    Candidate,
    bring,
    check_whole,
    chosen,
    policy_file,
    policy_text,
    store,
)
from measure.check_page import BEFOREHAND, CheckRecord, Plan, page, step_times
from measure.child import Ended, lines
from measure.outputs import Job as OutputsJob
from measure.part import Part
from measure.plan import Job as PlanJob
from measure.record import slug
from measure.reference import machine, rows_of, told
from mmdit.artifact import Layout, read_manifest, shown
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import EngineError, TargetError
from mmdit.family import PARTS
from mmdit.gpus import card_named
from mmdit.step_times import write
from mmdit.target import Target, find_gpu, resolve, tensorrt_version

_TORCH = ("eager-fp16", "compile-fp16", "compile-bf16", "compile-fp8")


@dataclass(frozen=True)
class Asked:
    """What to check; `shapes` is the shape set's name.

    `onnx`, `fp8`, `engines` and `gate` are more arguments of `export onnx`, `export fp8`, `engines build` and
    `quality gate`: those that the deployed engines were made with. `minutes` limits each variant in torch.
    """

    model: str
    target: str
    build: Path
    policy: Path | None
    shapes: str | None
    onnx: Sequence[str]
    fp8: Sequence[str]
    engines: Sequence[str]
    gate: Sequence[str]
    rows: tuple[int, ...]
    minutes: float
    folder: Path


def check(asked: Asked, command: str) -> Path:
    """Build, judge, compare, time and write it all down; returns the record's path.

    Raises TargetError, before anything is made, where a GPU, TensorRT or torch with CUDA is missing;
    EngineError when a stage of FP16 fails, and at the end when an engine could not be made, run or compared
    or was too far from ONNX Runtime's outputs. What was found until then is written.
    """
    target = _target(asked.target)
    print(f"{BEFOREHAND}\n", flush=True)
    record = CheckRecord(
        date=datetime.date.today().isoformat(),
        command=command,
        machine=machine("cuda") | {"tensorrt": tensorrt_version()},
        model=Layout(asked.model, asked.build).name,
        target=target.name,
    )
    gpu = slug(record.machine["gpu"] or "")
    path = asked.folder / f"{record.date}-gpu-check-{gpu}-{slug(record.model)}.json"
    for _ in _steps(asked, target, record):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    for times in step_times(record):
        name = f"{path.stem}-{slug(times.precision)}-{times.size[0]}x{times.size[1]}.json"
        (path.parent / "step-times").mkdir(exist_ok=True)
        write(times, path.parent / "step-times" / name)
    print(page(record))
    print(f"{shown(path)}\n{shown(path.with_suffix('.md'))}")
    if failures := record.failures():
        raise EngineError(
            f"{len(failures)} of what was checked failed; {shown(path.with_suffix('.md'))} has the rest: "
            + "; ".join(failures)
        )
    return path


def _target(name: str) -> Target:
    target, why = resolve(name, find_gpu(), tensorrt_version())
    if target.compute_capability is None or target.missing:
        lacks = target.missing or why.partition("because ")[2] or "the target is cpu"
        raise TargetError(
            f"gpu-check builds and runs engines, which cannot be done here: {lacks}. Run it on the GPU's "
            "machine, in an environment with TensorRT (`pip install tensorrt`) and a CUDA build of torch "
            "(`make setup` may have installed torch's CPU build: docs/engines.md, After the build); "
            "`make gpu-reference` needs the GPU and that torch alone"
        )
    return target


def _steps(asked: Asked, target: Target, record: CheckRecord) -> Iterator[None]:
    """Each step's results go into the record; a yield after each."""
    layout = Layout(asked.model, asked.build)
    model = ["--model", asked.model, "--build", str(asked.build)]
    _stage("export", "onnx", *model, *asked.onnx)
    _stage(*_build(asked, target, Precision.FP16))
    for component in COMPONENTS:
        _time(record, asked, layout, component, Precision.FP16)
        yield
    _bound(record, asked, "mmdit fp16", Precision.FP16)
    _compare(record, asked, Precision.FP16)
    yield
    candidates = []
    for attention in VARIANTS if target.fp8 else ():
        candidates.append(_candidate(record, asked, layout, target, attention))
        yield
    if candidates:
        best, record.verdict = chosen(candidates)
        if best is not None:
            policy = _bring(layout, asked, target.name, best.attention)
            check_whole(layout, target.name, best.attention)
            record.kept, record.policy = best.attention, shown(policy)
    yield from _torch(record, asked, target)


def _build(asked: Asked, target: Target, precision: Precision) -> list[str]:
    words = ["engines", "build", "--model", asked.model, "--build", str(asked.build)]
    words += ["--target", target.name, "--precision", precision.value]
    return [*words, *(["--shapes", asked.shapes] if asked.shapes else []), *asked.engines]


def _candidate(
    record: CheckRecord, asked: Asked, layout: Layout, target: Target, attention: str
) -> Candidate:
    """Make, time, compare and judge an FP8 engine; whatever fails puts it out, and is told in the record."""
    model = ["--model", asked.model, "--build", str(asked.build), "--target", target.name]
    name = _name("mmdit", Precision.FP8, attention)
    policy = _bring(layout, asked, target.name, attention)
    try:
        _stage("export", "fp8", *model, "--policy", str(policy), *asked.fp8)
        _stage(*_build(asked, target, Precision.FP8))
        _time(record, asked, layout, "mmdit", Precision.FP8, attention)
        _bound(record, asked, name, Precision.FP8)
        _compare(record, asked, Precision.FP8, attention)
        _stage("quality", "gate", *model, "--report-only", *asked.gate)
        gate = read_manifest(layout.quality(target.name)).findings
        record.gates[attention] = {key: gate[key] for key in ("passed", "failures", "mission")}
    except EngineError as error:
        record.plans.setdefault(name, Plan()).error = str(error)
        print(f"  {error}", file=sys.stderr)
    plan, gate = record.plans[name], record.gates.get(attention, {"passed": False, "failures": []})
    reasons = [*filter(None, [plan.error]), *(record.too_far(name) or []), *gate["failures"]]
    return Candidate(
        attention=attention,
        milliseconds=plan.step,
        passed=gate["passed"] and not reasons,
        reason="; ".join(reasons) or "it passed",
    )


def _bring(layout: Layout, asked: Asked, target: str, attention: str) -> Path:
    from export.policy import Policy, read_policy

    own: Policy | None = None
    if asked.policy is not None:
        own = read_policy(asked.policy)
    bring(layout, target, attention)
    path = policy_file(layout, target, attention)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(policy_text(attention, own), encoding="utf-8")
    return path


def _stage(module: str, *arguments: str) -> None:
    words = ["-m", module, *arguments]
    print(f"python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise EngineError(
            f"`python {shlex.join(words)}` ended with status {status}: what it wrote stands above"
        )


def _time(
    record: CheckRecord,
    asked: Asked,
    layout: Layout,
    component: str,
    precision: Precision,
    attention: str | None = None,
) -> str:
    name = _name(component, precision, attention)
    job = PlanJob(
        folder=layout.engine(record.target, component, precision),
        rows=asked.rows if component == "mmdit" else (),
        layers=store(layout, record.target) / "layers" / f"{name.replace(' ', '-')}.json",
    )
    print(f"{name}: timing", flush=True)
    plan = record.plan(name)
    try:
        advice = "is the GPU busy with something else? `nvidia-smi` tells"
        for line in lines("measure.plan", job.model_dump_json(), minutes=60, advice=advice):
            plan.take(line)
    except Ended as error:
        plan.error = str(error)
        print(f"  {error}", file=sys.stderr)
    return name


def _name(component: str, precision: Precision, attention: str | None = None) -> str:
    return " ".join(filter(None, (component, precision.value, attention and f"attention-{attention}")))


def _bound(record: CheckRecord, asked: Asked, name: str, precision: Precision) -> None:
    """The least milliseconds that a known card allows the MMDiT's file that is in place."""
    card, size = card_named(record.machine["gpu"] or ""), record.plans[name].size
    if card is None or size is None:
        return
    found, family = sources(Layout(asked.model, asked.build), asked.model, precision)
    (mmdit,) = (source for source in found if source.component == "mmdit")
    row = model_costs([mmdit], family, [size]).at("mmdit", size, precision)
    record.bounds[name] = {rows: milliseconds(row, card, rows) for rows in asked.rows}


def _compare(record: CheckRecord, asked: Asked, precision: Precision, attention: str | None = None) -> None:
    job = OutputsJob(model=asked.model, build=asked.build, target=record.target, precision=precision)
    print(f"{precision.value}: comparing with ONNX Runtime", flush=True)
    label = {"variant": _name("", precision, attention)}
    try:
        advice = "ONNX Runtime and torch in FP32 run the model on the CPU: has it the cores and the memory?"
        found = lines("measure.outputs", job.model_dump_json(), minutes=180, advice=advice)
        record.comparisons.extend(label | each for each in found)
    except Ended as error:
        record.comparisons.append(label | {"component": "", "failure": str(error)})
        print(f"  {error}", file=sys.stderr)


def _torch(record: CheckRecord, asked: Asked, target: Target) -> Iterator[None]:
    from export.checkpoint import checkpoint_folder

    size = record.plans["mmdit fp16"].size
    if size is None:
        return
    for variant in (name for name in _TORCH if target.fp8 or "fp8" not in name):
        part = Part(
            model=record.model,
            variant=variant,
            size=size,
            rows=asked.rows,
            weights=checkpoint_folder(asked.model).resolve() / PARTS["mmdit"],
        )
        print(f"torch {variant}: measuring", flush=True)
        for row in rows_of(part, asked.minutes):
            record.torch.append({"variant": variant} | row)
            print(f"  {told(row)}", flush=True)
            yield
