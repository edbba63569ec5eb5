"""Gaussian noise: closed forms against draws, against one another, and against the dense J."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from influence.dense_operator import PROPERTY, DenseOperator, operators, random_operator

from leaklib.influence.checks import RankWarning
from leaklib.influence.expectation import (
    direction_error,
    expected_square,
    expected_square_estimate,
    sample_projected_noise,
    sensitivity_map,
)
from leaklib.influence.i2f import i2f
from leaklib.influence.noise_level import noise_std_for_error
from leaklib.influence.prediction import predicted_error
from leaklib.influence.spectrum import singular_directions, spectrum_of_gram


def of(operator):
    return spectrum_of_gram(operator.gram(), input_shape=operator.input_shape)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@PROPERTY
@given(operators(spread=2.0), st.floats(0, 2), st.sampled_from([0.0, 1e-3, 1.0]))
def test_expected_square_is_the_frobenius_norm_of_the_solution_operator(operator, std, share):
    """E‖(K + εI)⁻¹Jδ‖² = s² ‖(K + εI)⁻¹J‖²_F, by the SVD of J."""
    found = of(operator)
    value = expected_square(found, std=std, damping=share, relative_to="lambda_max")
    sigma = torch.linalg.svdvals(operator.jacobian)
    eps = share * found.largest[:, None]
    expected = std**2 * (sigma / (sigma**2 + eps)).square().sum(1)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_expected_square_is_the_mean_over_noise_on_the_gradient(damping):
    operator = random_operator(5, d=6, p=9, spread=1.0)
    found, std, draws = of(operator), 0.2, 20_000
    flat = std * torch.randn(2, draws, 9, generator=seeded(), dtype=torch.float64)
    answer = i2f(operator, operator.named(flat), damping=damping, spectrum=found)
    values = answer.norm[:, :, 0].square()
    expected = expected_square(found, std=std, damping=damping)
    five_sigma = 5 * values.std(1) / math.sqrt(draws)
    assert bool(((values.mean(1) - expected).abs() <= five_sigma).all())
    # where the error is, entry by entry
    spread = answer.vector[:, :, 0].square().mean(1).sqrt()
    predicted = sensitivity_map(found, std=std, damping=damping)
    assert predicted.shape == (2, 1, 2, 3)
    torch.testing.assert_close(spread, predicted, rtol=0.05, atol=0)


@PROPERTY
@given(operators(), st.floats(0.1, 10), st.sampled_from([0.0, 1e-3, 1.0]))
def test_map_squares_sum_to_the_expectation(operator, std, share):
    found = of(operator)
    settings = {"damping": share, "relative_to": "lambda_max"}
    squares = sensitivity_map(found, std=std, **settings).square().flatten(1).sum(1)
    torch.testing.assert_close(squares, expected_square(found, std=std, **settings))


@PROPERTY
@given(operators(spread=2.0), st.floats(0.1, 10))
def test_map_is_the_diagonal_of_the_covariance(operator, std):
    found = of(operator)
    eps = 0.1 * float(found.largest[0])
    damped = operator.gram() + eps * torch.eye(operator.unknowns, dtype=torch.float64)
    solution = torch.linalg.solve(damped, operator.jacobian)
    expected = std * (solution @ solution.mT).diagonal(dim1=1, dim2=2).sqrt()
    value = sensitivity_map(found, std=std, damping=eps).flatten(1)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)


@PROPERTY
@given(operators(spread=2.0), st.floats(-3, 3), st.sampled_from([0.0, 0.1]))
def test_direction_error_is_the_error_along_the_direction(operator, exponent, share):
    found, alpha = of(operator), 10**exponent
    settings = {"damping": share, "relative_to": "lambda_max"}
    indices = list(range(operator.unknowns))
    v = singular_directions(operator, found, indices)
    answer = i2f(operator, {n: alpha * t for n, t in v.items()}, spectrum=found, **settings)
    value = direction_error(found, indices, scale=alpha, **settings)
    torch.testing.assert_close(value, answer.rmse[:, :, 0].square(), rtol=1e-8, atol=0)
    undamped = alpha**2 / (operator.unknowns * found.singular_values**2)
    if share == 0:
        torch.testing.assert_close(value, undamped)


@PROPERTY
@given(operators(), st.floats(-3, 3), st.sampled_from([0.0, 1e-3, 1.0]))
def test_noise_level_inverts_the_expectation(operator, exponent, share):
    found, rmse = of(operator), 10**exponent
    settings = {"damping": share, "relative_to": "lambda_max"}
    std = noise_std_for_error(found, rmse=rmse, **settings)
    reached = (expected_square(found, std=std, **settings) / operator.unknowns).sqrt()
    torch.testing.assert_close(reached, torch.full_like(reached, rmse), rtol=1e-12, atol=0)


@PROPERTY
@given(operators(), st.floats(-3, 3))
def test_scales(operator, exponent):
    """J → cJ asks for c times the noise, and divides the error of equal noise by c."""
    c = 10**exponent
    one, other = of(operator), of(DenseOperator(c * operator.jacobian))
    settings = {"damping": 0.01, "relative_to": "lambda_max"}
    torch.testing.assert_close(
        noise_std_for_error(other, rmse=0.1, **settings),
        c * noise_std_for_error(one, rmse=0.1, **settings), rtol=1e-9, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        expected_square(other, std=0.5, **settings),
        expected_square(one, std=0.5, **settings) / c**2, rtol=1e-9, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [None, 3])
def test_projected_noise_has_the_covariance_of_jδ(rank):
    operator = random_operator(7, d=5, p=9, spread=0.7, rank=rank)
    std, draws = 0.4, 40_000
    noise = sample_projected_noise(of(operator), std=std, draws=draws, generator=seeded())
    assert noise.shape == (2, draws, 5)
    covariance = noise.mT @ noise / draws
    expected = std**2 * operator.gram()
    # standard error of an entry: √((K_ii K_jj + K_ij²)/draws)
    diagonal = expected.diagonal(dim1=1, dim2=2)
    error = ((diagonal[:, :, None] * diagonal[:, None] + expected**2) / draws).sqrt()
    assert bool(((covariance - expected).abs() <= 5 * error).all())
    assert bool((noise.mean(1).abs() <= 5 * (diagonal / draws).sqrt()).all())


def test_projected_noise_serves_the_prediction():
    found = of(random_operator(8, d=6, p=9, spread=1.0))
    noise = sample_projected_noise(found, std=0.1, draws=20_000, generator=seeded())
    values = predicted_error(found, noise, damping=0.05).norm[:, :, 0].square()
    expected = expected_square(found, std=0.1, damping=0.05)
    torch.testing.assert_close(values.mean(1), expected, rtol=0.05, atol=0)
    again = sample_projected_noise(found, std=0.1, draws=20_000, generator=seeded())
    assert torch.equal(noise, again)
    per_victim = sample_projected_noise(
        found, std=torch.tensor([0.1, 0.2]), draws=20_000, generator=seeded()
    )
    torch.testing.assert_close(per_victim[1], 2 * noise[1])


def test_estimate_without_a_spectrum():
    operator = random_operator(9, victims=2, d=60, p=80, spread=1.0)
    expected = expected_square(of(operator), std=0.3, damping=0.1)
    found = expected_square_estimate(operator, std=0.3, damping=0.1, generator=seeded(), samples=40)
    allowed = 5 * found.standard_error + found.quadrature_error
    assert bool(((found.mean - expected).abs() <= allowed).all())
    assert bool((found.standard_error <= 0.1 * expected).all())
    exact = expected_square_estimate(
        operator, std=0.3, damping=0.1, generator=seeded(), samples=60, steps=60
    )
    torch.testing.assert_close(exact.mean, expected, rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match="damping > 0"):
        expected_square_estimate(operator, std=0.3, damping=0.0, generator=seeded())


@PROPERTY
@given(operators(full_rank=False, spread=1.0), st.sampled_from([0.0, 0.3]))
def test_singular_and_undamped_is_infinite_and_said(operator, std):
    found = of(operator)
    with pytest.warns(RankWarning, match="leave no trace"):
        assert bool(expected_square(found, std=std).isinf().all())
    with pytest.warns(RankWarning, match="leave no trace"):
        assert bool(sensitivity_map(found, std=std).isinf().flatten(1).any(1).all())
    with pytest.warns(RankWarning, match="leave no trace"):
        assert not bool(noise_std_for_error(found, rmse=std).any())
    with pytest.warns(RankWarning, match="leave no trace"):
        assert bool(direction_error(found, [operator.unknowns - 1], scale=std).isinf().all())
    eps = float(found.largest.max()) or 1.0
    assert bool(expected_square(found, std=std, damping=eps).isfinite().all())


def test_map_shows_the_dead_pixel_and_only_that():
    """The second of three pixels leaves no trace; the others have σ = 3 and 1."""
    jacobian = torch.tensor([[[2.0, 1.0], [0.0, 0.0], [1.0, 2.0]]], dtype=torch.float64)
    found = of(DenseOperator(jacobian, input_shape=(1, 3)))
    with pytest.warns(RankWarning):
        value = sensitivity_map(found, std=3.0)
    expected = torch.tensor([5.0, torch.inf, 5.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(value.flatten(), expected)


def test_no_noise_level_where_nothing_is_shared():
    dead = of(DenseOperator(torch.zeros(1, 2, 3, dtype=torch.float64)))
    with pytest.warns(RankWarning, match="the gradient says nothing"):
        assert noise_std_for_error(dead, rmse=0.1, damping=1.0).item() == math.inf


def test_refuses():
    found = of(random_operator(0))
    for wrong in (-1.0, math.nan, math.inf):
        for call in (
            lambda w: expected_square(found, std=w),
            lambda w: sensitivity_map(found, std=w),
            lambda w: direction_error(found, [0], scale=w),
            lambda w: noise_std_for_error(found, rmse=w),
            lambda w: sample_projected_noise(found, std=w, draws=1, generator=seeded()),
        ):
            with pytest.raises(ValueError, match="standard deviation or scale >= 0"):
                call(wrong)
    with pytest.raises(ValueError, match="expected one damping, got 2"):
        expected_square(found, std=1.0, damping=[0.1, 1.0])
    with pytest.raises(ValueError, match="one number or 2 of them"):
        expected_square(found, std=torch.ones(3))
    with pytest.raises(ValueError, match="draws >= 1"):
        sample_projected_noise(found, std=1.0, draws=0, generator=seeded())
    with pytest.raises(ValueError, match=r"indices from 0"):
        direction_error(found, [5], scale=1.0)
