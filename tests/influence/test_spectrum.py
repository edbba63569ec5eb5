"""The spectrum against numpy's SVD of J, its conventions, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from influence.cases import case, dense_jacobian
from influence.dense_operator import PROPERTY, DenseOperator, operators, random_operator

from leaklib.influence.checks import RankWarning
from leaklib.influence.damping import resolvent
from leaklib.influence.operator import influence_operator
from leaklib.influence.spectrum import (
    BATCHED_EIGH,
    in_float64,
    singular_directions,
    spectrum,
    spectrum_of_gram,
)


def of(operator):
    return spectrum_of_gram(operator.gram(), input_shape=operator.input_shape)


@PROPERTY
@given(operators())
def test_singular_values_are_numpys(operator):
    found = of(operator)
    expected = np.linalg.svd(operator.jacobian.numpy(), compute_uv=False) ** 2
    # squaring J costs half the digits of the small σ
    difference = np.abs(found.eigenvalues.numpy() - expected)
    assert (difference <= 1e-14 * expected[:, :1]).all(), difference / expected[:, :1]
    assert bool((found.eigenvalues.diff(dim=1) <= 0).all())
    assert found.rank().tolist() == [operator.unknowns] * operator.victims
    torch.testing.assert_close(found.trace, operator.jacobian.square().sum((1, 2)))
    torch.testing.assert_close(found.largest, torch.from_numpy(expected[:, 0]))


@PROPERTY
@given(operators(full_rank=False))
def test_vectors_rebuild_the_gram_matrix(operator):
    found, gram = of(operator), operator.gram()
    rebuilt = found.vectors @ (found.eigenvalues[:, :, None] * found.vectors.mT)
    scale = found.largest[:, None, None] + 1e-300
    torch.testing.assert_close(rebuilt / scale, gram / scale, rtol=0, atol=1e-13)
    identity = torch.eye(operator.unknowns, dtype=torch.float64).expand_as(gram)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, identity, rtol=0, atol=1e-13)


@PROPERTY
@given(operators(full_rank=False, spread=3.0))
def test_rank_is_numpys(operator):
    found = of(operator)
    assert found.rank().tolist() == np.linalg.matrix_rank(operator.jacobian.numpy()).tolist()
    short = found.rank() < operator.unknowns
    assert bool((found.condition.isinf() == short).all())
    assert bool(((found.smallest == 0) == short).all())
    assert bool((found.eigenvalues >= 0).all())
    assert bool((found.rounding <= found.resolution).all())


@PROPERTY
@given(operators(), st.floats(-4, 4))
def test_scaling_the_loss_scales_sigma(operator, exponent):
    c = 10**exponent
    one, other = of(operator), of(DenseOperator(c * operator.jacobian))
    torch.testing.assert_close(
        other.singular_values[:, 0], c * one.singular_values[:, 0], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(other.condition, one.condition, rtol=1e-5, atol=0)


def test_known_matrix_in_known_order():
    gram = torch.diag_embed(torch.tensor([[1.0, 9.0, 4.0], [2.0, 0.5, 8.0]], dtype=torch.float64))
    found = spectrum_of_gram(gram, input_shape=(1, 1, 3))
    assert found.eigenvalues.tolist() == [[9, 4, 1], [8, 2, 0.5]]
    assert found.singular_values[0].tolist() == [3, 2, 1]
    assert found.vectors.abs()[0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert found.condition.tolist() == [9, 16]
    assert found.smallest.tolist() == [1, 0.5]
    assert found.rank(0.2).tolist() == [2, 2]
    part = found.select([1])
    assert part.eigenvalues.tolist() == [[8, 2, 0.5]]
    assert (part.victims, part.unknowns, part.input_shape) == (1, 3, (1, 1, 3))


def test_large_matrices_one_at_a_time():
    d = BATCHED_EIGH + 1
    operator = random_operator(0, victims=2, d=d, p=d, spread=1.0)
    found = of(operator)
    expected = torch.linalg.svdvals(operator.jacobian)
    torch.testing.assert_close(found.singular_values, expected)


@PROPERTY
@given(operators())
def test_singular_directions(operator):
    """‖v_i‖ = 1, and J v_i = σ_i u_i."""
    found = of(operator)
    indices = [operator.unknowns - 1, 0]
    v = singular_directions(operator, found, indices)
    flat = operator.flat(v)
    one = torch.ones(operator.victims, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(flat, dim=2), one, rtol=1e-5, atol=0)
    expected = found.singular_values[:, indices, None] * found.vectors[:, :, indices].mT
    scale = found.singular_values[:, :1, None]
    torch.testing.assert_close(operator.jv(v) / scale, expected / scale, rtol=0, atol=1e-10)
    shapes = {n: one.shape[2:] for n, one in v.items()}
    assert shapes == operator.parameter_shapes


def test_singular_directions_refuse_what_leaves_no_trace():
    operator = random_operator(0, d=6, p=9, rank=4)
    found = of(operator)
    assert set(singular_directions(operator, found, [3])) == {"weight", "bias"}
    with pytest.raises(ValueError, match=r"below the rank, \[4, 4\] .* leaves no trace"):
        singular_directions(operator, found, [0, 4])
    for wrong in ([6], [-1], []):
        with pytest.raises(ValueError, match=r"from 0 \(largest σ\) to 5"):
            singular_directions(operator, found, wrong)
    with pytest.raises(ValueError, match="spectrum of 1 victims"):
        singular_directions(operator.select([0]), found, [0])


def test_negative_rounding_is_clipped_and_kept():
    gram = torch.diag_embed(torch.tensor([[1.0, -3e-16], [1.0, 0.5]], dtype=torch.float64))
    found = spectrum_of_gram(gram)
    assert found.eigenvalues.tolist() == [[1, 0], [1, 0.5]]
    assert found.rounding.tolist() == [3e-16, 0]
    assert found.rank().tolist() == [1, 2]


def test_float32_gram_has_the_resolution_of_float32():
    gram = torch.diag_embed(torch.tensor([[1.0, 1e-7]]))
    assert spectrum_of_gram(gram).rank().item() == 1
    assert spectrum_of_gram(gram.double()).rank().item() == 2
    assert spectrum_of_gram(gram).eigenvalues.dtype == torch.float64


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(2, 2), r"expected K of shape \(victims, d, d\), got \(2, 2\)"),
        (torch.zeros(1, 2, 3), r"got \(1, 2, 3\)"),
        (torch.full((1, 2, 2), torch.nan), "finite K"),
        (torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), "symmetric K"),
        (torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]), "positive semidefinite K"),
    ],
)
def test_refuses_what_is_no_gram_matrix(gram, message):
    with pytest.raises(ValueError, match=message):
        spectrum_of_gram(gram)
    with pytest.raises(ValueError, match="input_shape of 2 entries"):
        spectrum_of_gram(torch.eye(2)[None], input_shape=(1, 3))


def test_resolvent_says_what_rounding_hides():
    found = of(random_operator(0, d=5, p=9, rank=3))
    with pytest.warns(RankWarning, match="2 of 5 directions that leave no trace"):
        inverse, eps = resolvent(found, [0.0, 1e-30, 0.5], None)
    assert eps.tolist() == [[0.0, 1e-30, 0.5]] * 2
    assert inverse.isinf().sum((0, 2)).tolist() == [4, 4, 0]
    assert resolvent(found, torch.tensor(0.5), None)[1].tolist() == [[0.5]] * 2
    inverse, eps = resolvent(found, 0.5, "lambda_max")
    torch.testing.assert_close(eps[:, 0], 0.5 * found.largest)
    torch.testing.assert_close(inverse[:, 0], 1 / (found.eigenvalues + eps))
    for wrong in (-1.0, float("nan"), float("inf"), []):
        with pytest.raises(ValueError, match="damping >= 0"):
            resolvent(found, wrong, None)
    with pytest.raises(ValueError, match="relative_to=None"):
        resolvent(found, 1.0, "trace")


@pytest.mark.parametrize("name", ["mlp", "convolutions", "batch of 2", "transformer"])
def test_spectrum_of_a_network(name):
    """σ of the network's operator are numpy's of its independently built J."""
    one = case(name)
    found = spectrum(influence_operator(*one.arguments, loss=one.loss))
    expected = torch.linalg.svdvals(dense_jacobian(one)) ** 2
    expected = F.pad(expected, (0, found.unknowns - expected.shape[1]))
    difference = (found.eigenvalues - expected).abs().amax(1)
    assert bool((difference <= 1e-12 * found.largest).all()), difference / found.largest
    assert found.input_shape == one.inputs.shape[1:]


def test_float32_operator_has_a_float64_spectrum():
    one = case("mlp")
    exact = influence_operator(*one.arguments)
    model = copy.deepcopy(one.model).float()
    rounded = influence_operator(model, one.inputs.float(), one.labels)
    assert rounded.dtype == torch.float32
    found = spectrum(rounded)
    assert found.eigenvalues.dtype == torch.float64
    # the input and the weights were rounded, nothing after
    torch.testing.assert_close(found.eigenvalues, spectrum(exact).eigenvalues, rtol=1e-4, atol=0)
    again = influence_operator(model.double(), one.inputs.float().double(), one.labels)
    torch.testing.assert_close(found.eigenvalues, spectrum(again).eigenvalues, rtol=1e-9, atol=0)
    directions = singular_directions(rounded, found, [0])
    assert {one.dtype for one in directions.values()} == {torch.float32}


def test_cast_says_nothing_twice_and_keeps_everything():
    one = case("next tokens")
    operator = influence_operator(
        copy.deepcopy(one.model).float(), one.inputs.float(), one.labels, loss=one.loss,
        reduction="sum", layers=["head", "mix"],
    )  # fmt: skip
    cast = in_float64(operator)
    assert cast.dtype == torch.float64
    assert cast.parameter_shapes == operator.parameter_shapes
    assert (cast.loss, cast.reduction, cast.form) == (operator.loss, "sum", operator.form)
    assert in_float64(cast) is cast
    with pytest.warns(RankWarning):
        small = influence_operator(
            copy.deepcopy(one.model).float(), one.inputs.float(), one.labels, loss=one.loss,
            layers=["head.bias"],
        )  # fmt: skip
    in_float64(small)  # pytest makes an error of a second warning
