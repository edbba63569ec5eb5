"""Every bound holds for random J and δ, is reached where it can be, and says where it is void."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from influence.cases import case, dense_jacobian
from influence.dense_operator import (
    PROPERTY,
    DenseOperator,
    operators,
    random_operator,
    random_perturbation,
)

from leaklib.influence.bounds import (
    expected_lower_bound,
    i2f_lower_bound,
    lower_bound,
    perturbation_norm,
    perturbation_upper_bound,
    upper_bound,
)
from leaklib.influence.checks import RankWarning
from leaklib.influence.damping import ConvergenceWarning
from leaklib.influence.expectation import expected_square, sample_projected_noise
from leaklib.influence.i2f import i2f
from leaklib.influence.operator import influence_operator
from leaklib.influence.spectrum import singular_directions, spectrum_of_gram

# Slack for rounding of quantities that may be equal.
ABOVE, BELOW = 1 + 1e-9, 1 - 1e-9


def of(operator):
    return spectrum_of_gram(operator.gram(), input_shape=operator.input_shape)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@PROPERTY
@given(operators(spread=3.0), st.integers(0, 99))
def test_undamped(operator, seed):
    """‖Jδ‖/λ_max <= I₀ <= ‖δ‖/σ_min and I₀ <= ‖Jδ‖/λ_min."""
    found, delta = of(operator), random_perturbation(operator, seed)
    answer = i2f(operator, delta, damping=0.0, spectrum=found)
    value, projected = answer.norm[:, :, 0], answer.projected_norm
    size = perturbation_norm(operator, delta)
    torch.testing.assert_close(size, operator.flat(delta).norm(dim=2))
    sigma_min = found.smallest.sqrt()
    slack = 1 + 1e-7  # σ_min comes from JJᵀ
    assert bool((lower_bound(projected, found.largest) <= ABOVE * value).all())
    assert bool((value <= slack * upper_bound(projected, found.smallest)).all())
    assert bool((value <= slack * perturbation_upper_bound(size, sigma_min=sigma_min)).all())


@PROPERTY
@given(
    st.one_of(operators(), operators(full_rank=False)),
    st.integers(0, 99),
    st.floats(-6, 3),
    st.floats(-6, 6),
)
def test_damped(operator, seed, log_eps, log_delta):
    """‖Jδ‖/(λ_max + ε) <= I_ε <= min(‖Jδ‖/(λ_min + ε), ‖δ‖ max σ/(σ² + ε), ‖δ‖/(2√ε))."""
    found = of(operator)
    delta = random_perturbation(operator, seed, scale=10**log_delta)
    eps = 10**log_eps * (float(found.largest.max()) or 1.0)
    answer = i2f(operator, delta, damping=eps, spectrum=found)
    value, projected = answer.norm[:, :, 0], answer.projected_norm
    size = perturbation_norm(operator, delta)
    low = lower_bound(projected, found.largest, damping=eps)
    free = perturbation_upper_bound(size, damping=eps)
    known = perturbation_upper_bound(
        size, damping=eps, sigma_min=found.smallest.sqrt(), sigma_max=found.largest.sqrt()
    )
    assert bool((low <= ABOVE * value).all())
    assert bool((value <= ABOVE * upper_bound(projected, found.smallest, damping=eps)).all())
    assert bool((value <= ABOVE * known).all())
    assert bool((known <= ABOVE * free).all())
    torch.testing.assert_close(free, size / (2 * math.sqrt(eps)))


@PROPERTY
@given(operators(spread=2.0))
def test_reached_along_singular_directions(operator):
    """The first direction reaches the lower bounds, the last one the upper bounds."""
    found = of(operator)
    v = singular_directions(operator, found, [0, operator.unknowns - 1])
    answer = i2f(operator, v, damping=0.0, spectrum=found)
    value, projected = answer.norm[:, :, 0], answer.projected_norm
    size = perturbation_norm(operator, v)
    torch.testing.assert_close(lower_bound(projected, found.largest)[:, 0], value[:, 0])
    expected = upper_bound(projected, found.smallest)[:, 1]
    torch.testing.assert_close(expected, value[:, 1], rtol=1e-6, atol=0)
    expected = perturbation_upper_bound(size, sigma_min=found.smallest.sqrt())[:, 1]
    torch.testing.assert_close(expected, value[:, 1], rtol=1e-6, atol=0)


@PROPERTY
@given(st.floats(-3, 3))
def test_worst_damped_direction_has_the_damping_as_eigenvalue(exponent):
    """σ = √ε reaches ‖δ‖/(2√ε), at every scale."""
    sigma = 10**exponent
    operator = DenseOperator(torch.tensor([[[sigma]]], dtype=torch.float64))
    delta = {"theta": torch.tensor([[2.0]], dtype=torch.float64)}
    answer = i2f(operator, delta, damping=sigma**2, spectrum=of(operator))
    torch.testing.assert_close(answer.norm[:, :, 0], torch.full((1, 1), 1 / sigma).double())
    free = perturbation_upper_bound(torch.tensor([[2.0]]), damping=sigma**2)
    torch.testing.assert_close(free.double(), answer.norm[:, :, 0], rtol=1e-6, atol=0)


def test_published_bound_has_no_damping_and_does_not_bound_the_damped():
    operator = random_operator(0, d=3, p=5, spread=0.1)
    found, delta = of(operator), random_perturbation(operator, 0)
    eps = 10 * float(found.largest.max())
    answer = i2f(operator, delta, damping=eps, spectrum=found)
    published = lower_bound(answer.projected_norm, found.largest)
    assert bool((published > answer.norm[:, :, 0]).all())


@PROPERTY
@given(operators(), st.integers(0, 99))
def test_cheap_bound(operator, seed):
    found, delta = of(operator), random_perturbation(operator, seed)
    answer = i2f_lower_bound(operator, delta, generator=seeded(seed), damping=0.5)
    torch.testing.assert_close(answer.lambda_max, found.largest, rtol=1e-3, atol=0)
    assert bool((answer.lambda_max <= ABOVE * found.largest).all())
    expected = (operator.flat(delta) @ operator.jacobian.mT).norm(dim=2)
    torch.testing.assert_close(answer.projected_norm, expected)
    torch.testing.assert_close(
        answer.value, expected / (answer.lambda_max[:, None] + 0.5), rtol=1e-9, atol=0
    )
    undamped = i2f_lower_bound(operator, delta, generator=seeded(seed))
    exact = i2f(operator, delta, damping=0.0, spectrum=found).norm[:, :, 0]
    slack = 1 + (undamped.error / undamped.lambda_max)[:, None]
    assert bool((undamped.value <= ABOVE * slack * exact).all())
    assert bool((undamped.products <= operator.unknowns).all())
    assert bool(undamped.converged.all())


def test_cheap_bound_of_a_network():
    one = case("convolutions")
    operator = influence_operator(*one.arguments)
    delta, jacobian = operator.gradient(), dense_jacobian(one)
    flat = torch.cat([t.flatten(1) for t in delta.values()], 1)
    expected = torch.linalg.matrix_norm(jacobian, 2) ** 2
    answer = i2f_lower_bound(operator, delta, generator=seeded(), tolerance=1e-8)
    torch.testing.assert_close(answer.lambda_max, expected, rtol=1e-8, atol=0)
    projected = torch.linalg.vecdot(jacobian, flat[:, None]).norm(dim=1)
    torch.testing.assert_close(answer.projected_norm[:, 0], projected)
    torch.testing.assert_close(answer.value[:, 0], projected / expected, rtol=1e-7, atol=0)


def test_unconverged_eigenvalue_warns():
    operator = random_operator(0, victims=1, d=7, p=9, spread=0.01)
    with pytest.warns(ConvergenceWarning, match="1 of 1 victims after 2 products"):
        answer = i2f_lower_bound(
            operator, random_perturbation(operator, 0), generator=seeded(), tolerance=1e-12,
            max_products=2,
        )  # fmt: skip
    assert not bool(answer.converged.any())


def test_void_bounds_are_infinite_and_said():
    dead = DenseOperator(torch.zeros(1, 2, 3, dtype=torch.float64))
    delta = {"theta": torch.ones(1, 3, dtype=torch.float64)}
    with pytest.warns(RankWarning, match="1 of 1 victims"):
        answer = i2f_lower_bound(dead, delta, generator=seeded())
    assert answer.value.item() == math.inf
    one, zero = torch.ones(2, 1), torch.tensor([1.0, 0.0])
    with pytest.warns(RankWarning, match="leaves no trace"):
        assert upper_bound(one, zero).flatten().tolist() == [1, math.inf]
    assert upper_bound(one, zero, damping=0.5).flatten().tolist() == pytest.approx([2 / 3, 2])
    assert perturbation_upper_bound(torch.tensor([[1.0], [0.0]])).isinf().all()
    assert perturbation_upper_bound(one, damping=1.0, sigma_max=0.0).flatten().tolist() == [0, 0]


@PROPERTY
@given(operators(spread=2.0), st.floats(0.1, 10))
def test_expected_lower_bound(operator, std):
    """It is the root mean square of I_lb, and below that of I₀."""
    found = of(operator)
    bound = expected_lower_bound(found.trace, found.largest, std=std)
    assert bool((bound**2 <= ABOVE * expected_square(found, std=std)).all())
    direct = std * operator.jacobian.square().sum((1, 2)).sqrt() / found.largest
    torch.testing.assert_close(bound, direct)


def test_expected_lower_bound_is_the_mean_of_draws():
    found = of(random_operator(3, d=6, p=9, spread=0.5))
    draws = sample_projected_noise(found, std=0.3, draws=20_000, generator=seeded())
    values = lower_bound(draws.norm(dim=2), found.largest)
    expected = expected_lower_bound(found.trace, found.largest, std=0.3)
    torch.testing.assert_close(values.square().mean(1).sqrt(), expected, rtol=0.02, atol=0)


def test_refuses():
    one = torch.ones(1, 1)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite damping >= 0"):
            lower_bound(one, one[0], damping=wrong)
        with pytest.raises(ValueError, match="finite damping >= 0"):
            perturbation_upper_bound(one, damping=wrong)
        with pytest.raises(ValueError, match="standard deviation"):
            expected_lower_bound(one[0], one[0], std=wrong)
    with pytest.raises(ValueError, match="sigma_min <= sigma_max"):
        perturbation_upper_bound(one, sigma_min=2.0, sigma_max=1.0)
    operator = random_operator(0)
    delta = random_perturbation(operator, 0)
    delta["bias"] = delta["bias"] * torch.nan
    with pytest.raises(ValueError, match="finite Jδ"):
        i2f_lower_bound(operator, delta, generator=seeded())
    with pytest.raises(ValueError, match=r"expected 'weight' as \(victims, \*shape\)"):
        perturbation_norm(operator, delta | {"weight": torch.zeros(2, 1, 2)})
