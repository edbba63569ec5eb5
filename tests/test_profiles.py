import pytest

from leaklib.runner.profiles import choose_plan

PLANS = {"smoke": {"victims": 4, "images": "patches"}, "paper": {"victims": 50, "images": "mnist"}}


def test_a_given_value_replaces_the_profiles_and_an_empty_one_does_not():
    assert choose_plan("paper", PLANS) == PLANS["paper"]
    assert choose_plan("smoke", PLANS, victims=7, images="") == {"victims": 7, "images": "patches"}
    assert PLANS["smoke"]["victims"] == 4


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="among smoke, paper, got 'papr'"):
        choose_plan("papr", PLANS)
    with pytest.raises(ValueError, match="got victms"):
        choose_plan("smoke", PLANS, victms=3)
    with pytest.raises(ValueError, match="'paper' differs in"):
        choose_plan("smoke", {"smoke": {}, "paper": {"victims": 1}})
