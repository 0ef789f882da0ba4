"""Lower bounds from FLOPs, bytes and a card's peaks; the published models' against known figures."""

from pathlib import Path

import pytest

from bench.roofline_chart import draw_ceilings
from engines.forecast.costs import Costs, Products
from engines.forecast.model_costs import published, read_costs, write_costs
from engines.forecast.page import TABLES
from engines.forecast.roofline import (
    FP8,
    FP8_ATTENTION,
    FP16,
    SIZES,
    bound,
    bounds,
    milliseconds,
    step,
    step_times,
)
from mmdit.errors import ArtifactError
from mmdit.gpus import CARDS, Card

CARD = Card("toy", "hopper", 10**10, 1e12, 100e12, 200e12, "toy")
ROOT = Path(__file__).resolve().parents[2]
H100 = CARDS[0]
SIZE = (1024, 1024)


def row(*products) -> Costs:
    fields = ("kind", "attention", "flops", "weight_bytes")
    made = tuple(Products(**dict(zip(fields, each, strict=True))) for each in products)
    return Costs(products=made, weights=0, activations=0, live=0, scores=0)


@pytest.fixture(scope="module")
def models():
    return {model.family.variant: model for model in published()}


@pytest.mark.parametrize(
    ("product", "rows", "expected"),
    [
        (("fp16", False, 100e9, 10**6), 1, 1.0),
        (("fp8", False, 100e9, 10**6), 1, 0.5),
        (("fp32", False, 100e9, 10**6), 1, 2.0),
        (("fp16", False, 10**6, 10**9), 1, 1.0),
        (("fp16", False, 10**6, 10**9), 8, 1.0),
        (("fp16", False, 100e9, 10**9), 8, 8.0),
    ],
)
def test_a_product_takes_the_longer_of_multiplying_and_reading_its_weights(product, rows, expected):
    """Weights are read once for all rows."""
    assert milliseconds(row(product), CARD, rows) == pytest.approx(expected)


def test_a_product_waits_for_the_one_before_it():
    """One that multiplies does not hide that another reads."""
    both = row(("fp16", False, 100e9, 0), ("fp16", False, 0, 10**9))
    assert milliseconds(both, CARD) == pytest.approx(2.0)


def test_fp8_attention_changes_attentions_products_alone():
    """The linears stay what the file has."""
    both = row(("fp16", True, 100e9, 0), ("fp16", False, 100e9, 0))
    assert milliseconds(both, CARD, fp8_attention=True) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("variant", "size", "attention", "expected"),
    [
        ("large", (1024, 1024), FP8, 1.63),
        ("medium", (1024, 1024), FP8, 1.45),
        ("large", (512, 512), FP8, 1.84),
        ("large", (1024, 1024), FP8_ATTENTION, 2.0),
        ("medium", (1024, 1024), FP8_ATTENTION, 2.0),
    ],
)
def test_the_ceiling_of_fp8s_gain_is_what_the_flops_allow(models, variant, size, attention, expected):
    """From counts of FLOPs alone, made with torch; reading the modulation's weights moves it a little."""
    assert bound(models[variant], H100, attention, size).gain == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(("variant", "expected"), [(FP16, 63.0), (FP8, 38.8), (FP8_ATTENTION, 31.5)])
def test_larges_step_on_an_h100_is_what_its_peaks_give(models, variant, expected):
    """Two rows at 1024², milliseconds; reading the modulation's weights adds 2 to 3 % to the peaks'."""
    found = bound(models["large"], H100, variant, SIZE).step
    assert 1.01 * expected < found < 1.03 * expected


def test_a_picture_is_its_encoders_steps_and_vae(models):
    """The prompt and the negative prompt are encoded one after another."""
    found = bound(models["medium"], H100, FP8, SIZE)
    assert found.rows == 2 and found.steps == 40
    assert found.picture == pytest.approx(found.text_encoders + 40 * found.step + found.vae_decoder)
    alone = sum(milliseconds(models["medium"].at(name, SIZE), H100) for name in ("clip_l", "clip_g", "t5"))
    assert found.text_encoders == pytest.approx(2 * alone)


def test_every_model_size_card_and_variant_has_a_bound(models):
    """And no bound of a narrower variant is above that of a wider one."""
    found = bounds(models.values())
    assert len(found) == len(models) * len(SIZES) * len(CARDS) * 3
    assert all(each.gain >= 1 for each in found)


def test_rows_share_the_reading_of_weights(models):
    """More rows take longer, and each of them no longer than alone."""
    times = step_times(models["large"], H100, FP8, (512, 512))
    assert (times.source, times.gpu, times.precision) == ("roofline", "H100 80 GB", "fp8")
    assert times.milliseconds[2] == pytest.approx(step(models["large"], H100, FP8, (512, 512), 2), abs=1e-3)
    each = [milliseconds / rows for rows, milliseconds in times.milliseconds.items()]
    assert each == sorted(each, reverse=True)


def test_costs_that_were_not_computed_are_an_error(models):
    """It names the component and the size."""
    with pytest.raises(ArtifactError, match="no costs of mmdit in fp8 at 640×333"):
        bound(models["large"], H100, FP8, (640, 333))


def test_costs_read_back_as_they_were_written(models, tmp_path):
    """A damaged file is an error."""
    file = tmp_path / "costs.json"
    write_costs(models["medium"], file)
    assert read_costs(file) == models["medium"]
    file.write_text(file.read_text()[:1000])
    with pytest.raises(ArtifactError, match="holds no model's costs"):
        read_costs(file)


def test_the_chart_is_a_picture(models, tmp_path):
    """Drawn for two models."""
    draw_ceilings(list(models.values()), H100, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("title", TABLES)
def test_the_page_holds_the_tables_that_the_code_prints(title):
    """`make forecast` prints them."""
    assert TABLES[title](published()) in (ROOT / "docs/engines.md").read_text(encoding="utf-8")
