"""FP32 to FP16 and back, against numpy's conversions."""

import numpy as np
import pytest

from serve.inside.half import from_half, to_half

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_half_comes_back_as_it_was():
    """All 65,536, NaN as infinity."""
    with np.errstate(invalid="ignore"):
        expected = EVERY_HALF.astype(np.float32)
    expected[np.isnan(expected)] = np.inf * np.where(np.signbit(expected[np.isnan(expected)]), -1, 1)
    found = from_half(EVERY_HALF)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_every_half_and_what_lies_half_way_beside_it_is_rounded_as_numpy_rounds():
    """Halves to even, at every finite half and one FP32 step beside each middle."""
    halves = np.sort(EVERY_HALF[np.isfinite(EVERY_HALF)]).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate(
        [
            halves,
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(-np.inf)),
        ]
    )
    normal = np.abs(values) >= np.float32(2.0**-14)
    np.testing.assert_array_equal(to_half(values[normal]), values[normal].astype(np.float16))
    # below, the multiplication has rounded once already: at most one of FP16's smallest steps
    error = to_half(values[~normal]).astype(np.float32) - values[~normal].astype(np.float16).astype(
        np.float32
    )
    assert np.abs(error).max() <= 2.0**-24


@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_of_all_magnitudes_are_rounded_as_numpy_rounds(seed):
    random = np.random.default_rng(seed)
    values = (random.standard_normal(100_000) * 2.0 ** random.integers(-13, 15, 100_000)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    normal = np.abs(values) >= np.float32(2.0**-14)
    np.testing.assert_array_equal(to_half(values)[normal], expected[normal])


def test_what_half_does_not_hold_is_infinite():
    """Beyond 65504, infinities, and NaN: no picture comes of any."""
    values = np.array([65519.9, 65520, 1e5, 131072, 3e38, np.inf, -np.inf, -1e6, np.nan], np.float32)
    found = to_half(values)
    assert found[0] == 65504
    assert np.isinf(found[1:]).all()
    assert (np.sign(found[1:-1]) == np.sign(values[1:-1])).all()


def test_the_shape_stays_and_the_input_too():
    values = np.full((2, 3, 4), 1.5, np.float32)[:, ::-1]
    assert to_half(values).shape == from_half(to_half(values)).shape == (2, 3, 4)
    assert (values == 1.5).all()
    assert from_half(np.zeros((0, 4), np.float16)).shape == (0, 4)
