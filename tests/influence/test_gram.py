"""The Gram matrix against dense Jacobians, in every form and in blocks."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from influence.cases import DTYPE, NAMES, case, dense_jacobian
from influence.gram_checks import (
    jacobian_of,
    operator_of,
    random_directions,
    relative_error,
)

from leaklib.influence.ghost import ghost_features
from leaklib.influence.ghost_layers import FORMS
from leaklib.influence.ghost_plan import make_plan
from leaklib.influence.gram import gram_matrix, jacobian_rows
from leaklib.influence.gram_blocks import blocked_gram
from leaklib.influence.operator import influence_operator

pytestmark = pytest.mark.filterwarnings("ignore::leaklib.influence.checks.RankWarning")


def forced(plan, form):
    return replace(plan, matrix={n: replace(m, form=form) for n, m in plan.matrix.items()})


@pytest.mark.parametrize("method", ["ghost", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_gram_is_that_of_the_dense_jacobian(name, method):
    jac = dense_jacobian(case(name))
    gram = gram_matrix(operator_of(name), method=method)
    assert relative_error(gram, jac @ jac.mT) < 1e-12
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_every_layer_is_exact(name, form):
    operator = operator_of(name)
    compute = ghost_features(operator, forced(make_plan(operator, directions=4), form))
    u = random_directions(operator, 4)
    for i, jac in enumerate(dense_jacobian(case(name))):
        with torch.no_grad():
            held, streamed = compute(operator.inputs[i], operator.labels[i], u[i])
        gram = sum(h @ s.T for h, s in zip(held, streamed, strict=True))
        rows = u[i] @ jac
        assert relative_error(gram, rows @ rows.T) < 1e-12


@pytest.mark.parametrize("method", ["ghost", "dense"])
@pytest.mark.parametrize(
    "sizes", [{}, {"chunk": 1}, {"chunk": 3}, {"memory": 1}, {"memory": 30_000, "chunk": 2}]
)
def test_chunks_and_blocks_change_nothing(sizes, method):
    operator = operator_of("batch of 2")
    u = random_directions(operator, 7)
    rows = u @ dense_jacobian(case("batch of 2"))
    gram = gram_matrix(operator, directions=u, method=method, **sizes)
    assert relative_error(gram, rows @ rows.mT) < 1e-12


def test_sum_reduction_of_a_batch():
    one = case("batch of 3, soft")
    jac = dense_jacobian(one, reduction="sum")
    operator = influence_operator(*one.arguments, reduction="sum")
    assert relative_error(gram_matrix(operator), jac @ jac.mT) < 1e-12


def test_the_squared_loss_of_torch_goes_by_activations():
    one = case("mlp")
    targets = one.inputs.flatten(2)[..., :4]
    operator = influence_operator(one.model, one.inputs, targets, loss=F.mse_loss)
    pairs = zip(one.inputs, targets, strict=True)
    jac = torch.stack([jacobian_of(one.model, x, y, F.mse_loss) for x, y in pairs])
    assert relative_error(gram_matrix(operator, method="ghost"), jac @ jac.mT) < 1e-12


@pytest.mark.parametrize("layers", [["1.weight"], ["1.bias"], ["3"]])
def test_shared_parameters_alone_count(layers):
    operator = operator_of("mlp", layers=layers)
    model, everything = case("mlp").model, dense_jacobian(case("mlp"))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    parts = dict(zip(sizes, everything.split(list(sizes.values()), dim=2), strict=True))
    jac = torch.cat([parts[n] for n in operator.parameter_shapes], dim=2)
    assert jac.shape[2] < everything.shape[2]
    assert relative_error(gram_matrix(operator), jac @ jac.mT) < 1e-12


def test_rows_are_the_jacobian_and_its_products():
    operator, jac = operator_of("residual"), dense_jacobian(case("residual"))
    assert relative_error(jacobian_rows(operator), jac) < 1e-12
    u = random_directions(operator, 3)
    assert relative_error(jacobian_rows(operator, directions=u, chunk=2), u @ jac) < 1e-12


def test_hooks_of_the_pass_are_gone_afterwards():
    operator = operator_of("residual")
    gram_matrix(operator)
    assert not any(m._forward_hooks for m in operator.model.modules())


def test_float32_agrees_with_float64():
    one = case("residual")
    exact = gram_matrix(operator_of("residual"))
    model = copy.deepcopy(one.model).float()
    single = gram_matrix(influence_operator(model, one.inputs.float(), one.labels))
    assert single.dtype == torch.float32
    assert relative_error(single.double(), exact) < 1e-5


def test_float32_sums_over_millions_of_terms_keep_their_digits():
    flat = torch.rand(1, 2, 2**23, generator=torch.Generator().manual_seed(0))

    def rows(part):
        return [flat[:, part]], [flat[:, part]]

    gram = blocked_gram(rows, victims=1, k=2, chunk=2, block=2, like=flat)
    exact = torch.stack([(flat[0].double() * row.double()).sum(1) for row in flat[0]])
    assert relative_error(gram[0].double(), exact) < 2e-6


def test_victims_of_a_small_network_go_in_groups():
    operator = operator_of("convolutions")
    u = random_directions(operator, 5)
    looped = [
        gram_matrix(operator.select([i]), directions=u[i : i + 1])
        for i in range(operator.victims)
    ]  # fmt: skip
    together = gram_matrix(operator, directions=u, chunk=2)
    torch.testing.assert_close(together, torch.cat(looped), rtol=1e-12, atol=0)


def test_bad_arguments_are_refused_with_the_way_out():
    operator = operator_of("mlp")
    with pytest.raises(ValueError, match="flatten"):
        gram_matrix(operator, directions=torch.zeros(2, 3, 8, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"\.to\("):
        gram_matrix(operator, directions=torch.zeros(2, 3, 9))
    with pytest.raises(ValueError, match="method"):
        gram_matrix(operator, method="exact")
    with pytest.raises(ValueError, match="chunk"):
        gram_matrix(operator, chunk=0)
    with pytest.raises(ValueError, match="raise the limit"):
        jacobian_rows(operator, limit=1000)
