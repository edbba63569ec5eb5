"""I²F against a dense solve, its closed form against the iteration, and what it says aloud."""

import copy
import math

import numpy as np
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

from leaklib.influence.checks import RankWarning
from leaklib.influence.damping import ConvergenceWarning
from leaklib.influence.i2f import i2f
from leaklib.influence.operator import influence_operator
from leaklib.influence.prediction import predicted_error
from leaklib.influence.spectrum import singular_directions, spectrum, spectrum_of_gram


def of(operator):
    return spectrum_of_gram(operator.gram(), input_shape=operator.input_shape)


def dense_i2f(jacobian, flat, eps):
    """(JJᵀ + εI)⁻¹Jδ from the SVD of J, victim by victim: never through JJᵀ."""
    rows = []
    for jac, delta in zip(jacobian.numpy(), flat.numpy(), strict=True):
        u, s, vt = np.linalg.svd(jac, full_matrices=False)
        rows.append((delta @ vt.T * s / (s**2 + eps)) @ u.T)
    return torch.from_numpy(np.stack(rows))


@PROPERTY
@given(operators(spread=2.0), st.integers(0, 99))
def test_closed_form_is_a_dense_solve(operator, seed):
    found, delta = of(operator), random_perturbation(operator, seed)
    shares = [0.0, 0.01, 1.0]
    answer = i2f(operator, delta, damping=shares, relative_to="lambda_max", spectrum=found)
    assert answer.vector.shape == (operator.victims, 3, 3, *operator.input_shape)
    torch.testing.assert_close(answer.damping, found.largest[:, None] * torch.tensor(shares))
    for victim in range(operator.victims):
        one = operator.select([victim])
        for k, eps in enumerate(answer.damping[victim].tolist()):
            expected = dense_i2f(one.jacobian, operator.flat(delta)[[victim]], eps)[0]
            size = expected.norm(dim=1)
            error = (answer.vector[victim, :, k].flatten(1) - expected).norm(dim=1)
            assert bool((error <= 1e-9 * size).all()), (error / size, eps)
            torch.testing.assert_close(answer.norm[victim, :, k], size, rtol=1e-9, atol=0)
    torch.testing.assert_close(answer.rmse, answer.norm / math.sqrt(operator.unknowns))
    expected = (operator.flat(delta) @ operator.jacobian.mT).norm(dim=2)
    torch.testing.assert_close(answer.projected_norm, expected)
    assert bool(answer.converged.all())
    assert bool((answer.error_bound == 0).all())
    assert bool((answer.products == 0).all())


@PROPERTY
@given(operators(spread=1.0), st.integers(0, 99))
def test_iteration_agrees_with_the_closed_form(operator, seed):
    found, delta = of(operator), random_perturbation(operator, seed)
    shares = [1e-3, 0.1, 1.0]
    exact = i2f(operator, delta, damping=shares, relative_to="lambda_max", spectrum=found)
    iterated = i2f(
        operator, delta, damping=shares, relative_to="lambda_max", tolerance=1e-8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    # Lanczos finds λ_max, and with it the damping, to 1e-4
    torch.testing.assert_close(iterated.damping, exact.damping, rtol=1e-3, atol=0)
    torch.testing.assert_close(iterated.norm, exact.norm, rtol=2e-3, atol=0)
    assert bool(iterated.converged.all())
    for k in range(3):
        same = [
            predicted_error(
                found.select([v]), operator.jv(delta)[[v]], damping=iterated.damping[v].tolist()
            )
            for v in range(found.victims)
        ]
        vector = torch.cat([one.vector for one in same])[:, :, k].flatten(2)
        error = (iterated.vector[:, :, k].flatten(2) - vector).norm(dim=2)
        bound = iterated.error_bound[:, :, k] + 1e-12 * vector.norm(dim=2)
        assert bool((error <= bound).all()), (error, bound)
        assert bool((error <= 1e-4 * vector.norm(dim=2)).all())


@PROPERTY
@given(operators(), st.integers(0, 99), st.floats(-3, 3), st.floats(-3, 3))
def test_scales(operator, seed, a, b):
    """J → cJ and ε → c²ε divides I²F by c; δ → aδ multiplies it by a."""
    c, a = 10**b, 10**a
    delta = random_perturbation(operator, seed)
    eps = (of(operator).largest[0] * 0.1).item()
    one = i2f(operator, delta, damping=eps, spectrum=of(operator))
    scaled = DenseOperator(c * operator.jacobian, operator.parameter_shapes)
    other = {n: a * t for n, t in delta.items()}
    two = i2f(scaled, other, damping=c**2 * eps, spectrum=of(scaled))
    torch.testing.assert_close(two.norm, a / c * one.norm, rtol=1e-9, atol=0)
    relative = i2f(scaled, other, damping=0.1, relative_to="lambda_max", spectrum=of(scaled))
    torch.testing.assert_close(relative.norm[0], two.norm[0], rtol=1e-9, atol=0)


@PROPERTY
@given(operators(), st.floats(-3, 3))
def test_along_a_singular_direction(operator, exponent):
    """δ = α v_i gives α u_i/σ_i: exactly α/σ_i."""
    alpha, found = 10**exponent, of(operator)
    indices = range(operator.unknowns)
    v = singular_directions(operator, found, indices)
    answer = i2f(operator, {n: alpha * t for n, t in v.items()}, damping=0.0, spectrum=found)
    expected = alpha / found.singular_values
    torch.testing.assert_close(answer.norm[:, :, 0], expected, rtol=1e-5, atol=0)
    error = answer.vector[:, :, 0].flatten(2) - expected[:, :, None] * found.vectors.mT
    assert bool((error.norm(dim=2) <= 1e-5 * expected).all())


@PROPERTY
@given(operators(full_rank=False, spread=1.0), st.integers(0, 99))
def test_undamped_and_singular_is_infinite_and_said(operator, seed):
    found, delta = of(operator), random_perturbation(operator, seed)
    eps = float(found.largest.mean()) or 1.0
    with pytest.warns(RankWarning, match="leave no trace"):
        answer = i2f(operator, delta, damping=[0.0, eps], spectrum=found)
    assert bool(answer.norm[:, :, 0].isinf().all())
    assert not bool(answer.converged[:, :, 0].any())
    assert bool(answer.norm[:, :, 1].isfinite().all())
    expected = dense_i2f(operator.jacobian, operator.flat(delta), eps)
    error = (answer.vector[:, :, 1].flatten(2) - expected).norm()
    assert float(error) <= 1e-12 * float(expected.norm())


def test_entries_untouched_by_hidden_directions_stay_exact():
    """The second of three pixels is dead: it alone is unknown."""
    jacobian = torch.tensor([[[2.0, 1.0], [0.0, 0.0], [1.0, 2.0]]], dtype=torch.float64)
    operator = DenseOperator(jacobian)
    with pytest.warns(RankWarning, match="victim 0 has 1 of 3 directions"):
        answer = i2f(
            operator, {"theta": torch.tensor([[1.0, 0.0]])}, damping=0.0, spectrum=of(operator)
        )
    expected = torch.tensor([2 / 3, torch.inf, -1 / 3], dtype=torch.float64)
    torch.testing.assert_close(answer.vector.flatten(), expected)
    assert answer.norm.item() == math.inf


def test_paper_and_pencil():
    """J = [[2, 1], [1, 2]], δ = (1, 0): J⁻¹δ = (2, −1)/3; with ε = 1, (8, −2)/20."""
    jacobian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    operator = DenseOperator(jacobian)
    delta = {"theta": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    answer = i2f(operator, delta, damping=[0.0, 1.0], spectrum=of(operator))
    # K + I = [[6, 4], [4, 6]], inverse [[6, -4], [-4, 6]]/20, times Jδ = (2, 1): (8, -2)/20
    expected = torch.tensor([[2 / 3, -1 / 3], [0.4, -0.1]], dtype=torch.float64)
    torch.testing.assert_close(answer.vector[0, 0, :, 0], expected)
    iterated = i2f(operator, delta, damping=1.0, tolerance=1e-12)
    torch.testing.assert_close(iterated.vector[0, 0, 0, 0], expected[1])


def test_moves_the_real_attack():
    """The solution of (w·x − 1)x = g moves as predicted, to first order in δ."""
    jacobian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    operator = DenseOperator(jacobian)
    step = 1e-4
    moved = {"theta": torch.tensor([[step, 0.0]], dtype=torch.float64)}
    predicted = i2f(operator, moved, damping=0.0, spectrum=of(operator)).vector.flatten()
    x, g = torch.ones(2, dtype=torch.float64), torch.tensor([1 + step, 1.0], dtype=torch.float64)
    for _ in range(20):  # Newton
        jac = (x.sum() - 1) * torch.eye(2, dtype=torch.float64) + torch.outer(torch.ones(2), x)
        x = x - torch.linalg.solve(jac.T, (x.sum() - 1) * x - g)
    torch.testing.assert_close(x - 1, predicted, rtol=0, atol=10 * step**2)


def test_unconverged_iteration_warns():
    operator = random_operator(1, d=6, p=9, spread=3.0)
    delta = random_perturbation(operator, 0)
    with pytest.warns(ConvergenceWarning, match=r"missed the residual 1e-10 .* after at most 3"):
        answer = i2f(operator, delta, damping=1e-9, tolerance=1e-10, max_products=3)
    assert not bool(answer.converged.all())
    assert float(answer.residual.max()) > 1e-10


def test_undamped_iteration_guarantees_nothing():
    """With σ from 1 to 1e-3 a residual of 1e-2 leaves the norm wrong by far: it must be said."""
    operator = random_operator(1, victims=1, d=6, p=9, spread=3.0)
    delta = random_perturbation(operator, 0)
    with pytest.warns(ConvergenceWarning, match="does not guarantee"):
        answer = i2f(operator, delta, damping=0.0, tolerance=1e-2)
    exact = i2f(operator, delta, damping=0.0, spectrum=of(operator))
    assert bool(answer.converged.all())
    assert bool(answer.error_bound.isinf().all())
    assert float((answer.norm / exact.norm).min()) < 0.5


def test_no_perturbation_no_error():
    operator = random_operator(0)
    delta = random_perturbation(operator, 0, scale=0.0)
    for found in (None, of(operator)):
        answer = i2f(operator, delta, damping=0.1, spectrum=found)
        assert not bool(answer.norm.any())
        assert bool(answer.converged.all())


def test_refuses():
    operator = random_operator(0)
    delta, found = random_perturbation(operator, 0), of(operator)
    with pytest.raises(ValueError, match=r'generator=torch.Generator\("cpu"\)'):
        i2f(operator, delta, relative_to="lambda_max")
    with pytest.raises(ValueError, match="expected relative_to"):
        i2f(operator, delta, relative_to="trace")
    for spectrum_ in (None, found):
        with pytest.raises(ValueError, match="damping >= 0"):
            i2f(operator, delta, damping=-1.0, spectrum=spectrum_)
        with pytest.raises(ValueError, match="finite Jδ"):
            i2f(operator, {n: t * torch.nan for n, t in delta.items()}, spectrum=spectrum_)
    with pytest.raises(ValueError, match="spectrum of 2 victims"):
        i2f(operator, delta, spectrum=of(operator.select([0])))
    with pytest.raises(ValueError, match=r"expected Jδ of shape .* = \(2, vectors, 5\)"):
        predicted_error(found, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", ["mlp", "batch of 2", "next tokens"])
def test_of_a_network(name):
    one = case(name)
    operator = influence_operator(*one.arguments, loss=one.loss)
    delta = operator.jtu(torch.ones(2, 1, operator.unknowns, dtype=torch.float64))
    flat = torch.cat([t.flatten(2) for t in delta.values()], 2)
    expected = dense_i2f(dense_jacobian(one), flat, 0.5)
    exact = i2f(operator, delta, damping=0.5, spectrum=spectrum(operator))
    torch.testing.assert_close(exact.vector[:, :, 0].flatten(2), expected, rtol=1e-9, atol=1e-12)
    assert exact.vector.shape[3:] == one.inputs.shape[1:]
    torch.testing.assert_close(exact.rmse, exact.vector.flatten(3).square().mean(3).sqrt())
    iterated = i2f(operator, delta, damping=0.5, tolerance=1e-10)
    torch.testing.assert_close(iterated.vector, exact.vector, rtol=1e-7, atol=1e-9)


def test_float32_operator():
    one = case("mlp")
    operator = influence_operator(copy.deepcopy(one.model).float(), one.inputs.float(), one.labels)
    delta = operator.gradient()
    exact = i2f(operator, delta, damping=0.1, spectrum=spectrum(operator))
    iterated = i2f(operator, delta, damping=0.1)
    assert exact.vector.dtype == torch.float64
    assert iterated.vector.dtype == torch.float32
    torch.testing.assert_close(iterated.norm, exact.norm, rtol=1e-3, atol=0)


def test_fewer_equations_than_unknowns_are_infinite_without_a_spectrum_too():
    model = torch.nn.Linear(6, 3).double()
    x = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, delta = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 3, dtype=torch.float64)
    with pytest.warns(RankWarning):
        operator = influence_operator(model, x, labels, layers=["bias"])
    with pytest.warns(ConvergenceWarning):
        answer = i2f(operator, {"bias": delta}, damping=[0.0, 1.0])
    assert answer.norm[..., 0].isinf().all()
    assert not answer.converged[..., 0].any()
    assert answer.norm[..., 1].isfinite().all()
    assert answer.converged[..., 1].all()
