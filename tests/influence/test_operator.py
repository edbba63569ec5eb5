"""The operator's products against a Jacobian materialised without it."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from influence.cases import DTYPE, NAMES, Case, case, dense_jacobian
from torch import nn

from leaklib.data import Victims
from leaklib.defenses import GaussianNoise, perturbation
from leaklib.gradients import share_gradient
from leaklib.influence.operator import InfluenceOperator, influence_operator
from leaklib.models import build

FORMS = ["graph", "functional"]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def operator_of(one: Case, **settings) -> InfluenceOperator:
    return influence_operator(*one.arguments, loss=one.loss, **settings)


def flat(tensors):
    """name -> (victims, vectors, *shape) to (victims, vectors, p)."""
    return torch.cat([tensor.flatten(2) for tensor in tensors.values()], dim=-1)


def vectors_for(operator, *, vectors=3, seed=0, dtype=None):
    """Normal u (victims, vectors, d) and v."""
    generator = torch.Generator().manual_seed(seed)
    lead = (operator.victims, vectors)

    def draw(*shape):
        return torch.randn(*lead, *shape, generator=generator, dtype=DTYPE).to(
            operator.device, dtype or operator.dtype
        )

    return draw(operator.unknowns), {n: draw(*s) for n, s in operator.parameter_shapes.items()}


@cache
def lone_jacobian(one, i):
    """The dense Jacobian with example i of every victim's batch alone."""
    alone = Case(f"{i}", one.model, one.inputs[:, i : i + 1], one.labels[:, i : i + 1])
    return dense_jacobian(alone)


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_products_against_the_dense_jacobian(name, form):
    one = case(name)
    jac, operator = dense_jacobian(one), operator_of(one, form=form)
    u, v = vectors_for(operator)
    assert jac.shape == (operator.victims, operator.unknowns, operator.parameters)
    assert relative(operator.jv(v), flat(v) @ jac.mT) < 1e-10
    assert relative(flat(operator.jtu(u)), u @ jac) < 1e-10
    assert relative(operator.gram_product(u), u @ jac @ jac.mT) < 1e-10
    for key, tensor in operator.jtu(u).items():
        assert tensor.shape == (operator.victims, 3, *operator.parameter_shapes[key])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_its_finite_differences(name, form):
    one, step = case(name), 1e-5
    operator = operator_of(one, form=form)
    u, _ = vectors_for(operator, vectors=1)

    def gradient_at(offset):
        inputs = one.inputs + offset * u.unflatten(-1, operator.input_shape).squeeze(1)
        moved = influence_operator(one.model, inputs, one.labels, loss=one.loss, form=form)
        return torch.cat([g.flatten(1) for g in moved.gradient().values()], dim=1)

    for i, (x, y) in enumerate(zip(one.inputs, one.labels, strict=True)):
        value = one.loss(one.model(x), y, reduction="mean")
        parts = torch.autograd.grad(value, list(one.model.parameters()))
        plain = torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(gradient_at(0.0)[i], plain, **TOLERANCE)
    slope = (gradient_at(step) - gradient_at(-step)) / (2 * step)
    assert relative(slope, flat(operator.jtu(u)).squeeze(1)) < 1e-7


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), seed=st.integers(0, 2**20))
def test_adjoint_linear_and_positive(name, form, seed):
    operator = operator_of(case(name), form=form)
    u, v = vectors_for(operator, vectors=2, seed=seed)
    jtu, jv, gram = flat(operator.jtu(u)), operator.jv(v), operator.gram_product(u)
    torch.testing.assert_close((jv * u).sum(-1), (flat(v) * jtu).sum(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((u * gram).sum(-1), jtu.square().sum(-1), rtol=1e-9, atol=1e-12)
    double = operator.gram_product(2 * u[:, :1] - u[:, 1:])
    torch.testing.assert_close(double, 2 * gram[:, :1] - gram[:, 1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_batched_victims_equal_one_at_a_time_and_chunks_change_nothing(form):
    one = case("residual", victims=3)
    operator = operator_of(one, form=form)
    u, v = vectors_for(operator, vectors=5)
    for i in range(3):
        alone = operator.select(i)
        assert alone.victims == 1
        one_v = {n: t[i : i + 1] for n, t in v.items()}
        torch.testing.assert_close(alone.jv(one_v), operator.jv(v)[i : i + 1], **TOLERANCE)
        expected = operator.gram_product(u)[i : i + 1]
        torch.testing.assert_close(alone.gram_product(u[i : i + 1]), expected, **TOLERANCE)
    for chunk in (1, 2, 5, 6, 10, 100):
        cut = operator_of(one, form=form, chunk=chunk)
        torch.testing.assert_close(cut.jv(v), operator.jv(v), **TOLERANCE)
        torch.testing.assert_close(flat(cut.jtu(u)), flat(operator.jtu(u)), **TOLERANCE)
        torch.testing.assert_close(cut.gram_product(u), operator.gram_product(u), **TOLERANCE)
        torch.testing.assert_close(cut.gradient(), operator.gradient(), **TOLERANCE)


def test_select_takes_what_an_axis_takes():
    operator = operator_of(case("mlp", victims=4))
    for rows in (
        2,
        slice(1, 3),
        [3, 0],
        torch.tensor([1]),
        torch.tensor([True, False, False, True]),
    ):
        picked = operator.select(rows)
        index = torch.arange(4)[rows].reshape(-1)
        assert torch.equal(picked.inputs, operator.inputs[index])
        assert torch.equal(picked.labels, operator.labels[index])


@pytest.mark.parametrize("form", FORMS)
def test_layers_restrict_the_columns(form):
    one = case("residual")
    whole, part = dense_jacobian(one), operator_of(one, form=form, layers=["6", "1.conv.weight"])
    sizes = [p.numel() for p in one.model.parameters()]
    starts = [n in part.parameter_shapes for n, _ in one.model.named_parameters()]
    kept = torch.cat([torch.full((s,), k) for s, k in zip(sizes, starts, strict=True)])
    assert list(part.parameter_shapes) == ["1.conv.weight", "6.weight", "6.bias"]
    u, v = vectors_for(part)
    assert relative(part.jv(v), flat(v) @ whole[..., kept].mT) < 1e-10
    assert relative(flat(part.jtu(u)), u @ whole[..., kept]) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_layer_is_not_shared(form):
    model = build("mlp", input_shape=(1, 2, 2), hidden=(5,), classes=3).to(DTYPE)
    last = list(model.children())[-1].requires_grad_(False)
    operator = influence_operator(
        model, torch.rand(1, 1, 1, 2, 2, dtype=DTYPE), torch.tensor([[1]]), form=form
    )
    assert operator.parameters == 5 * 4 + 5
    assert last.weight.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_block_structure_of_a_private_batch(form, reduction):
    one = case("batch of 3, soft")
    operator = operator_of(one, form=form, reduction=reduction)
    victims, n, per = 2, 3, 16
    eye = torch.eye(n * per, dtype=DTYPE).expand(victims, -1, -1)
    gram = operator.gram_product(eye).unflatten(-1, (n, per)).unflatten(1, (n, per))
    alone = [lone_jacobian(one, i) for i in range(n)]
    scale = n**2 if reduction == "mean" else 1
    for i in range(n):
        for j in range(n):
            block = alone[i] @ alone[j].mT / scale
            torch.testing.assert_close(gram[:, i, :, j], block, **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_linear_softmax_closed_form(form):
    # g_W = r xᵀ, g_b = r, with r = softmax(Wx + b) − y, so J u = (ṙ xᵀ + r uᵀ, ṙ)
    one = case("linear")
    operator = operator_of(one, form=form)
    u, _ = vectors_for(operator, vectors=1)
    weight, bias = one.model[1].weight, one.model[1].bias
    x, y = one.inputs.flatten(1), F.one_hot(one.labels[:, 0], 3).to(DTYPE)
    s = (x @ weight.T + bias).softmax(-1).detach()
    moved = u[:, 0] @ weight.T.detach()
    dr = s * moved - s * (s * moved).sum(-1, keepdim=True)
    tangent = dr[:, :, None] * x[:, None] + (s - y)[:, :, None] * u[:, 0, None]
    torch.testing.assert_close(operator.jtu(u)["1.weight"][:, 0], tangent, **TOLERANCE)
    torch.testing.assert_close(operator.jtu(u)["1.bias"][:, 0], dr, **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_close_to_float64_and_a_cast_is_exact(form):
    one = case("convolutions")
    single = Case("single", copy.deepcopy(one.model).float(), one.inputs.float(), one.labels)
    exact = operator_of(one, form=form)
    rough = operator_of(single, form=form, dtype=torch.float32)
    wide = operator_of(single, form=form, dtype=torch.float64)
    u, v = vectors_for(exact)
    narrow_v = {n: t.float() for n, t in v.items()}
    assert rough.dtype == rough.gram_product(u.float()).dtype == torch.float32
    assert relative(rough.gram_product(u.float()).double(), exact.gram_product(u)) < 1e-5
    assert relative(rough.jv(narrow_v).double(), exact.jv(v)) < 1e-5
    assert wide.dtype == torch.float64
    # float32 vectors are widened, as a perturbation computed in float32 is
    assert wide.jv(narrow_v).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_a_perturbation_fits_as_it_is(form):
    model = build("lenet4", input_shape=(1, 8, 8), init="uniform").to(DTYPE)
    victims = Victims(torch.rand(2, 1, 1, 8, 8, dtype=DTYPE), torch.tensor([[1], [2]]))
    shared = share_gradient(model, victims)
    noisy = GaussianNoise(0.1)(shared, generator=torch.Generator().manual_seed(0))
    delta = perturbation(shared, noisy)
    operator = influence_operator(model, victims.images, victims.labels, form=form)
    torch.testing.assert_close(operator.gradient(), dict(shared.items()), **TOLERANCE)
    assert operator.jv(delta).shape == (2, 1, 64)
    torch.testing.assert_close(operator.jv(shared.replace(delta)), operator.jv(delta), **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_do_not_depend_on_the_input(form):
    # a loss linear in the outputs leaves the bias' gradient constant, and its Jv zero
    def linear_loss(outputs, labels, *, reduction):
        return (outputs * labels).sum()

    model = nn.Linear(2, 2).to(DTYPE)
    inputs, labels = torch.randn(1, 1, 2, dtype=DTYPE), torch.randn(1, 1, 2, dtype=DTYPE)
    operator = influence_operator(model, inputs, labels, loss=linear_loss, form=form)
    u = torch.ones(1, 1, 2, dtype=DTYPE)
    torch.testing.assert_close(operator.jtu(u)["weight"][0, 0], labels[0].T @ u[0], **TOLERANCE)
    assert not operator.jtu(u)["bias"].any()
    only_bias = influence_operator(
        nn.Linear(2, 2).to(DTYPE), inputs, labels, loss=linear_loss, form=form, layers=["bias"]
    )
    assert not only_bias.gram_product(u).any()
    assert not only_bias.jv({"bias": torch.ones(1, 2, dtype=DTYPE)}).any()


@pytest.mark.parametrize("weights", [1, 6])
def test_prelu_of_several_victims(weights):
    # torch's own is wrong under two vmaps, without a word where victims or vectors are one
    model = nn.Sequential(nn.Linear(5, 6), nn.PReLU(weights), nn.Linear(6, 3)).to(DTYPE)
    inputs, labels = torch.randn(3, 2, 5, dtype=DTYPE), torch.tensor([[0, 1], [2, 0], [1, 1]])
    one = Case("prelu", model, inputs, labels)
    operator, jac = operator_of(one, form="functional"), dense_jacobian(one)
    for vectors in (1, 2, 3):
        u, v = vectors_for(operator, vectors=vectors)
        assert relative(operator.jv(v), flat(v) @ jac.mT) < 1e-10
        assert relative(operator.gram_product(u), u @ jac @ jac.mT) < 1e-10


def test_nothing_of_the_callers_is_touched():
    one = case("batchnorm")
    before = {n: t.clone() for n, t in one.model.state_dict().items()}
    inputs = one.inputs.clone()
    operator = influence_operator(one.model, inputs, one.labels)
    u, _ = vectors_for(operator)
    first = operator.gram_product(u)
    inputs.zero_()
    one.model.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(operator.gram_product(u), first, **TOLERANCE)
    assert not first.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in one.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in one.model.parameters())


def test_auto_goes_by_size_and_by_vectors():
    small = operator_of(case("mlp", victims=1))
    u, _ = vectors_for(small, vectors=8)
    assert small.form == "auto"
    small.gram_product(u)
    assert not small._kept
    small.gram_product(u[:, :1])
    assert len(small._kept) == 1
    large = build("mlp", input_shape=(1, 2, 2), hidden=(800, 800), classes=2)
    operator = influence_operator(large, torch.rand(3, 1, 1, 2, 2), torch.zeros(3, 1).long())
    assert operator.form == "graph"
    operator.gram_product(torch.randn(3, 2, 4))
    assert len(operator._kept) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_on_a_gpu(name, form):
    one = case(name)
    here = operator_of(one, form="functional")
    there = influence_operator(
        copy.deepcopy(one.model).cuda(), one.inputs.cuda(), one.labels.cuda(), loss=one.loss,
        form=form,
    )  # fmt: skip
    u, v = vectors_for(here)
    cuda_v = {n: t.cuda() for n, t in v.items()}
    assert relative(there.jv(cuda_v).cpu(), here.jv(v)) < 1e-9
    assert relative(flat(there.jtu(u.cuda())).cpu(), flat(here.jtu(u))) < 1e-9
    assert relative(there.gram_product(u.cuda()).cpu(), here.gram_product(u)) < 1e-9
