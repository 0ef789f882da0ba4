"""The plan of memory and disk: from weights, profiles and a few facts; refusals and warnings with numbers."""

import re
from dataclasses import replace

import pytest

from engines.forecast.model_costs import model_costs, published, sizes_planned
from engines.forecast.planner import (
    PROCESS,
    ComponentPlan,
    MemoryPlan,
    check_fits,
    fits_table,
    plan_build,
    plan_table,
)
from engines.source import sources
from engines.tensorrt.options import Options
from mmdit.contract import Precision
from mmdit.errors import EngineError
from mmdit.gpus import CARDS, GB
from mmdit.shapes import shape_set

PLAN = MemoryPlan(
    "toy",
    "square-1024",
    (
        ComponentPlan("t5", 10 * GB, (GB // 10,), 0),
        ComponentPlan("mmdit", 4 * GB, (1 * GB, 3 * GB), 9 * GB),
    ),
)
PLENTY = {"memory": 100 * GB, "free_memory": 100 * GB, "free_disk": 100 * GB, "options": Options()}


@pytest.fixture(scope="module")
def medium():
    return published()[0]


def planned(model, shapes="square-1024", precision=Precision.FP8) -> MemoryPlan:
    return plan_build(model, shape_set(model.family, shapes), precision)


def of(plan: MemoryPlan, component: str) -> ComponentPlan:
    return next(each for each in plan.components if each.component == component)


def test_serving_takes_the_weights_once_and_a_context_for_each_profile():
    """With what CUDA and Triton's pool take."""
    assert PLAN.serving == 14 * GB + GB // 10 + 4 * GB + PROCESS + (64 << 20)


def test_building_takes_about_twice_what_its_largest_component_runs_in():
    """One component at a time, one profile at a time."""
    assert of(PLAN, "mmdit").building == pytest.approx(2.1 * 7 * GB)
    assert PLAN.building == pytest.approx(2.1 * 10.1 * GB + PROCESS)


def test_every_profile_has_its_context_and_fp8_half_the_weights(medium):
    """The static profile first; the text encoders and the VAE have one."""
    fp16, fp8 = (planned(medium, "any-256-1536", precision) for precision in (Precision.FP16, Precision.FP8))
    profiles = len(shape_set(medium.family, "any-256-1536").ranges)
    assert [len(each.activations) for each in fp8.components] == [1, 1, 1, profiles, 1]
    assert of(fp8, "mmdit").weights == pytest.approx(0.505 * of(fp16, "mmdit").weights, rel=0.01)
    assert of(fp8, "t5") == of(fp16, "t5")


def test_more_rows_take_more_memory(medium):
    """The static profile carries two rows, the other eight."""
    static, wide = of(planned(medium), "mmdit").activations
    assert wide == 4 * static


def test_the_published_text_encoders_have_their_published_sizes(medium):
    """Billions of parameters in FP16: 4.76 of T5-XXL's encoder, 0.124 and 0.695 of the CLIPs."""
    plan = planned(medium)
    for component, parameters in {"t5": 4.76e9, "clip_l": 0.124e9, "clip_g": 0.695e9}.items():
        assert of(plan, component).weights == pytest.approx(2 * parameters, rel=0.005)


def test_what_fits_gives_no_warning():
    """On a large GPU with a large disk."""
    assert check_fits(PLAN, **PLENTY) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"free_memory": 24 * GB}, r"building t5 takes about 22.2 GB .* 24.0 GB are free"),
        ({"memory": 21 * GB}, r"serving takes about 19.2 GB of the GPU's 21.0 GB, 4.1 GB of it"),
    ],
)
def test_what_is_close_gives_a_warning_with_the_numbers(changed, message):
    """The figures are estimates: above 85 % they may not hold."""
    (warning,) = check_fits(PLAN, **PLENTY | changed)
    assert re.search(message, warning)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"memory": 10 * GB}, r"t5: its weights take 10.0 GB .* of the GPU's 10.0 GB"),
        ({"free_disk": 13 * GB}, r"its plans take about 14.0 GB on disk, and 13.0 GB are free"),
    ],
)
def test_what_surely_does_not_fit_is_refused_with_the_numbers(changed, message):
    """Weights are no estimate."""
    with pytest.raises(EngineError, match=message):
        check_fits(PLAN, **PLENTY | changed)


def test_what_was_asked_for_because_of_it_is_not_refused():
    """Streamed weights on a small card, stripped plans on a small disk, and a part of the plans alone."""
    small = PLENTY | {"memory": 10 * GB}
    assert check_fits(PLAN, **small | {"options": Options(weight_streaming=True)}) == []
    full = PLENTY | {"free_disk": 5 * GB}
    assert check_fits(PLAN, **full | {"options": Options(strip=True)}) == []
    assert check_fits(PLAN, **full, stale=["mmdit"]) == []
    close = PLENTY | {"free_memory": 24 * GB}
    assert check_fits(PLAN, **close | {"options": Options(workspace_gib=4)}) == []


def test_what_only_the_estimates_exceed_is_not_refused():
    """The weights fit, and the build may do with less than is usual."""
    assert len(check_fits(PLAN, **PLENTY | {"memory": 11_050_000_000, "free_memory": 11 * GB})) == 2


@pytest.mark.parametrize(
    ("memory", "verdict"), [(16, "no"), (20, "no build"), (22, "close"), (30, "yes")], ids=str
)
def test_the_table_tells_a_gpu_that_could_serve_and_not_build(medium, monkeypatch, memory, verdict):
    """T5 in FP16 is built in 21.1 GB; Medium is served in 17.3 GB."""
    card = replace(CARDS[0], name="toy", memory=memory * GB)
    monkeypatch.setattr("engines.forecast.planner.CARDS", (card,))
    header, _, first, *rest = fits_table([medium]).splitlines()
    assert f"toy: {memory}.0" in header and len(rest) == 3 * 3 - 1
    assert [cell.strip() for cell in first.strip("|").split("|")][-1] == verdict


def test_a_models_own_files_can_be_planned(build):
    """The miniature, by its ONNX files; the table names every component."""
    found, family = sources(build, "miniature", Precision.FP8)
    shapes = shape_set(family)
    plan = plan_build(model_costs(found, family, sizes_planned(shapes)), shapes, Precision.FP8)
    size = sum(path.stat().st_size for source in found for path in source.folder.glob("model.onnx*"))
    assert plan.disk == pytest.approx(size, rel=0.15)  # the graphs themselves are part of so small files
    assert all(source.component in plan_table(plan) for source in found)
