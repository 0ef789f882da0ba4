"""Known GPUs: found by the driver's name for them, and consistent with their target."""

import pytest

from mmdit.gpus import CARDS, card_named


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B200", None),
    ],
)
def test_a_card_is_known_by_the_name_that_the_driver_gives_it(name, card):
    """L40S is not L4, and what is not in the table is not guessed at."""
    found = card_named(name)
    assert (found.name if found else None) == card


def test_fp8_peaks_are_twice_those_of_fp16():
    """Of dense products; a factor of four would be a sparse figure that slipped in."""
    for card in CARDS:
        assert card.fp8 / card.fp16 == pytest.approx(2, rel=0.02)
        assert 20e9 < card.memory < 160e9 and 2e11 < card.bandwidth < 5e12
