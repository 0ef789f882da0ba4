"""Templates: HTML is escaped, Markdown is not, and a value that is missing is an error."""

import pytest
from jinja2 import UndefinedError

from mmdit.code import code_of
from pages import number, render, size
from quality import report

AUDIT = {
    "name": "<model>",
    "totals": {
        **{"linear_flops_in_fp8": 0.9, "all_flops_in_fp8": 0.7},
        **{"weight_bytes": 2_100_000_000, "weight_bytes_fp16": 4_000_000_000},
    },
    "layers": [
        {
            **{"name": name, "group": group, "precision": "fp8", "reason": "large", "flops": flops},
            **{"bytes": 10, "bytes_fp16": 20, "amax": 1.5, "scale": 0.01, "weight_amax": 2.0},
            "weight_scale": [0.001, 0.004],
        }
        for name, group, flops in (("a", "few", 1_000_000), ("b", "most", 3_000_000))
    ],
    "attention": [{"name": "a", "precision": "fp8", "flops": 5_000_000, "scales": {"q": 0.5, "k": 0.25}}],
    "remedies": [],
    "rules": [{"rule": "a & b", "places": 2, "broken": ["here", "there"]}],
}


def test_an_audit_ranks_its_groups_and_names_broken_places():
    text = render("audit.html.j2", **AUDIT)
    assert text.index("most: 1 layers, 75.0 %") < text.index("few: 1 layers, 25.0 %")
    assert "2 places break a rule" in text and "broken at here, there" in text
    assert "2.10 GB for 4.00 GB" in text and "q 0.5, k 0.25" in text


def test_html_is_escaped():
    text = render("audit.html.j2", **AUDIT)
    assert "&lt;model&gt;" in text and "a &amp; b" in text and "<model>" not in text


def test_a_page_holds_its_style():
    """The style sheet itself is not escaped."""
    assert ".layers td:first-child { overflow-wrap" in render("audit.html.j2", **AUDIT)


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="weight_bytes"):
        render("audit.html.j2", **AUDIT | {"totals": {"linear_flops_in_fp8": 0.9, "all_flops_in_fp8": 0.7}})


def test_a_changed_template_makes_the_report_again():
    """The report's key covers the templates and the style sheet."""
    names = {"__init__.py", "style.css", "base.html.j2", "report.html.j2"}
    assert {f"pages/{name}" for name in names} <= code_of(report._write).keys()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (12, "12"),
        (1_234_567, "1,234,567"),
        (3.0, "3"),
        (0.012345, "0.01235"),
        (float("inf"), "inf"),
        ([1.0, 2.5], "1 to 2.5"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("count", "text"), [(606_515, "0.6 MB"), (2_100_000_000, "2.10 GB")])
def test_sizes_have_a_unit(count, text):
    assert size(count) == text
