"""Threshold profiles: what passes, what fails and why, and what a floor changes."""

import pytest
from pydantic import ValidationError

from mmdit.errors import QuantizationError
from quality.figure import FIGURES, Figure
from quality.gate import judged
from quality.profile import Profile, Threshold, profile


def figure(fp8: float | None, floor: float | None = 1.0, name: str = "ssim_mean") -> Figure:
    return Figure(name=name, fp8=fp8, floor=floor, absent="" if fp8 is not None else "no weights")


@pytest.mark.parametrize("name", ["miniature", "sd35"])
def test_each_profile_names_known_figures_and_says_what_its_numbers_rest_on(name):
    """The real weights' profile says that nobody has measured it."""
    found = profile(name)
    assert found.thresholds.keys() <= FIGURES.keys()
    assert ("not measured on real weights" in found.measured) == (name == "sd35")
    for figure_name, threshold in found.thresholds.items():
        assert (threshold.at_least is not None) == FIGURES[figure_name].higher, figure_name


def test_the_miniatures_profile_asks_what_was_promised():
    """Mean SSIM of 0.97, whole and over objects; two points of the reader's scores; no broken picture."""
    asked = profile("miniature").thresholds
    assert asked["ssim_mean"].at_least == asked["ssim_objects_mean"].at_least == 0.97
    assert asked["reader_points_lost"].at_most == 2
    assert asked["flawed_pictures"].at_most == 0


@pytest.mark.parametrize(
    ("threshold", "fp8", "passes"),
    [
        ({"at_least": 0.97}, 0.97, True),
        ({"at_least": 0.97}, 0.9699, False),
        ({"at_most": 2}, 2.0, True),
        ({"at_most": 2}, 2.1, False),
        ({"at_least": 0.97}, float("nan"), False),
    ],
)
def test_a_bound_is_kept_or_the_failure_names_value_and_bound(threshold, fp8, passes):
    """The bound itself is good enough; NaN never is."""
    failure = Threshold(**threshold).judged(figure(fp8))
    assert (failure is None) == passes
    if failure:
        assert f"{fp8:.4g}" in failure and f"{next(iter(threshold.values())):.4g}" in failure


def test_a_floor_below_the_bound_eases_it_only_where_the_profile_says_so():
    """FP8 cannot be asked to be nearer to FP16 than FP16 is to FP32."""
    eased = Threshold(at_least=0.97, eased_by_floor=True)
    assert eased.judged(figure(0.94, floor=0.93)) is None
    assert eased.judged(figure(0.92, floor=0.93)) is not None
    assert eased.judged(figure(0.96, floor=0.99)) is not None
    assert Threshold(at_least=0.97).judged(figure(0.94, floor=0.93)) is not None
    assert Threshold(at_most=0.1, eased_by_floor=True).judged(figure(0.15, floor=0.2)) is None


def test_fp16_engines_that_are_broken_cannot_let_fp8_pass():
    """Two black pictures are alike: the floor has bounds of its own."""
    threshold = Threshold(at_least=0.97, floor_at_least=0.9, eased_by_floor=True)
    assert "FP16 itself is not right" in str(threshold.judged(figure(1.0, floor=0.3)))
    assert "FP16 itself is not right" in str(Threshold(at_most=0, floor_at_most=0).judged(figure(0, floor=4)))


def test_a_figure_that_is_absent_fails_unless_it_may_be():
    """And then says why it is."""
    assert "no weights" in str(Threshold(at_most=0.1).judged(figure(None, None, "lpips_mean")))
    assert Threshold(at_most=0.1, optional=True).judged(figure(None, None, "lpips_mean")) is None


def test_a_threshold_on_a_figure_that_was_never_measured_fails():
    """A profile for another kind of model is not passed by silence."""
    chosen = Profile(description="", measured="", thresholds={"reader_points_lost": Threshold(at_most=2.0)})
    entries, failures = judged([figure(1.0)], chosen)
    assert len(failures) == 1 and "reader's score" in failures[0]
    assert {entry["name"]: entry["bound"] for entry in entries}["ssim_mean"] is None


@pytest.mark.parametrize("fields", [{}, {"at_least": 1, "at_most": 1}, {"at_leats": 1}])
def test_a_threshold_has_one_bound_and_no_unknown_field(fields):
    with pytest.raises(ValidationError):
        Threshold(**fields)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("own", "[miniature]", "profile 'own' is unknown: expected one of miniature"),
        ("own", "[own", "cannot be read"),
        ("own", "[own]\ndescription = ''", "own.measured: Field required"),
        (
            "own",
            "[own]\ndescription = ''\nmeasured = ''\n[own.thresholds]\nsim = { at_least = 1 }",
            r"\['sim'\] are no figures",
        ),
    ],
)
def test_a_profile_that_cannot_be_right_is_refused(tmp_path, name, text, words):
    """Unknown, not TOML, not whole, or about a figure that is none."""
    file = tmp_path / "profiles.toml"
    file.write_text(text)
    with pytest.raises(QuantizationError, match=words):
        profile(name, file)
