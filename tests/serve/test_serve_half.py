"""FP32 to FP16 and back, beside numpy's conversions."""

import numpy as np
import pytest

from serve.inside.fp16 import plus_weighted, write


def to_half(values):
    out = np.empty(values.shape, np.float16)
    write(values, out)
    return out


EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_half_is_added_as_numpy_adds_it():
    """All that are finite, alone and with guidance's weights."""
    finite = EVERY_HALF[np.isfinite(EVERY_HALF)]
    found = plus_weighted(np.zeros(len(finite), np.float32), finite[None], [1.0])
    np.testing.assert_array_equal(found, finite.astype(np.float32))
    halves = np.stack([finite, finite[::-1]])
    values = np.linspace(-3, 3, len(finite)).astype(np.float32)
    wide = halves.astype(np.float64)
    expected = values - 0.25 * wide[0] + 0.35 * wide[1]
    bound = 2.0**-22 * (np.abs(values) + 0.25 * np.abs(wide[0]) + 0.35 * np.abs(wide[1]))
    assert (np.abs(plus_weighted(values, halves, [-0.25, 0.35]) - expected) <= bound).all()


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_an_engine_overflowed_to_stays_as_it_is(odd):
    halves = np.array([[1.5, odd, -2.0], [1, 1, 1]], np.float16)
    found = plus_weighted(np.ones(3, np.float32), halves, [2.0, 1.0])
    np.testing.assert_array_equal(found, np.array([5, odd, -2], np.float32))


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


def test_what_half_does_not_hold_is_infinite_and_nan_stays():
    values = np.array([65519.9, 65520, 1e5, 131072, 3e38, np.inf, -np.inf, -1e6, np.nan], np.float32)
    np.testing.assert_array_equal(to_half(values), [65504, *[np.inf] * 5, -np.inf, -np.inf, np.nan])


def test_each_row_gets_the_same_values():
    rows = np.empty((2, 3), np.float16)
    write(np.array([1.5, -2, 1e6], np.float32), rows)
    assert rows.tolist() == [[1.5, -2, np.inf]] * 2
    write(np.array([0.5, -2, 1], np.float32), rows)
    assert rows.tolist() == [[0.5, -2, 1]] * 2


def test_the_shape_stays_and_the_input_too():
    values = np.full((2, 3, 4), 1.5, np.float32)[:, ::-1]
    halves = to_half(values)
    assert halves.shape == (2, 3, 4)
    assert plus_weighted(values[0], halves, [1.0, 1.0]).shape == (3, 4)
    assert (values == 1.5).all()
    assert (halves == 1.5).all()
    assert to_half(np.zeros((0, 4), np.float32)).shape == (0, 4)
