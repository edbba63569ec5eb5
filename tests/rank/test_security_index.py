"""The index is the published sum, rounded and normalised on request."""

import pytest
from rank.networks import NETWORKS

from leaklib.rank import security_index


def test_the_sum_by_hand():
    assert security_index([-6, -4, -2]) == pytest.approx(-6 - 4 * 2 / 3 - 2 / 3)
    assert security_index([-7]) == -7
    assert security_index([]) == 0
    assert str(security_index([0, 0])) == "0.0"


# COPA's own numbers, each term rounded to an integer, halves to the even one.
PUBLISHED = {
    "cnn2_c1": 0, "cnn2_c2": -1470, "cnn2_c4": -2146, "cnn3_c1": -2266, "cnn3_c2": -1995,
    "cnn4_c1": -2772, "cnn4_c2": -6211, "lenet2": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rounding_as_published(name):
    assert security_index(NETWORKS[name][1], rounding="published") == PUBLISHED[name]


def test_rounding_is_term_by_term():
    assert security_index([0, -1, -1, -1], rounding="published") == -1  # 0.75, 0.5, 0.25
    assert security_index([0, -1, -1, -1]) == -1.5


def test_the_normalised_index_lies_between_minus_the_weights_and_zero():
    assert security_index([-5, -8], unknowns=[10, 16]) == pytest.approx(-0.5 - 0.25)
    assert security_index([-3, -3, -3], unknowns=[3, 3, 3]) == pytest.approx(-2.0)  # −(d + 1)/2


BAD = {
    "a surplus": (([312],), {}, "at most 0, got .312.*naive"),
    "another rounding": (([0],), {"rounding": "up"}, "'none', 'published'.*'up'"),
    "too few unknowns": (([0, 0],), {"unknowns": [3]}, "expected 2 numbers"),
    "no unknowns": (([0],), {"unknowns": [0]}, "at least 1"),
    "rounded and normalised": (
        ([0],), {"unknowns": [3], "rounding": "published"}, 'expected rounding="none"'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    arguments, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        security_index(*arguments, **options)
