"""Which layers are contracted from activations, and what becomes of all others."""

import pytest
import torch
import torch.nn.functional as F
from influence.cases import DTYPE
from influence.gram_checks import (
    check_model,
    jacobian_of,
    operator_of,
    random_input,
    relative_error,
)
from torch import nn

from leaklib.influence.ghost_plan import make_plan
from leaklib.influence.gram import gram_matrix
from leaklib.influence.operator import influence_operator

pytestmark = pytest.mark.filterwarnings("ignore::leaklib.influence.checks.RankWarning")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


class Functional(nn.Module):
    """A layer whose weight is also used outside of it."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(torch.tanh(self.inner(x)), self.inner.weight)))


class Discarded(nn.Module):
    """A layer called once more for nothing: the graph of the loss shows one use."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        self.inner(h)
        return self.out(h)


class Keyword(nn.Module):
    """A layer called by keyword, between raw parameters."""

    def __init__(self):
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.rand(5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(input=torch.tanh(x * self.scale)) * self.scale.sum()


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(x + self.attend(x, x, x, need_weights=False)[0]).mean(1))


def doubled_output():
    layer = nn.Linear(5, 3)
    layer.register_forward_hook(lambda _module, _args, output: 2 * output)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("model", "shape", "matrix", "generic"),
    [
        (Functional, (5,), {"out"}, {"inner.weight", "inner.bias"}),
        (Discarded, (5,), {"out"}, {"inner.weight", "inner.bias"}),
        (Keyword, (5,), {"fc"}, {"scale"}),
        (doubled_output, (5,), {"0"}, {"2.weight", "2.bias"}),
        (
            SelfAttention, (3, 4), {"out"},
            {"attend.in_proj_weight", "attend.in_proj_bias", "attend.out_proj.weight",
             "attend.out_proj.bias", "norm.weight", "norm.bias"},
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(),
                nn.Linear(48, 3),
            ),
            (1, 4, 4), {"3"}, {"0.weight", "0.bias"},
        ),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)
            ),
            (5,), {"2"},
            {"0.bias", "0.parametrizations.weight.original0",
             "0.parametrizations.weight.original1"},
        ),
        (lambda: nn.Linear(5, 3), (5,), {""}, set()),
    ],
    ids=[
        "functional", "discarded", "keyword", "hook", "attention", "circular", "parametrised",
        "bare",
    ],
)  # fmt: skip
def test_what_is_no_plain_layer_takes_the_generic_path(model, shape, matrix, generic):
    plan = check_model(model(), random_input(2, 2, *shape), 3)
    assert set(plan.matrix) == matrix
    assert set(plan.generic) == generic


def test_twice_used_and_tied_layers_take_the_generic_path():
    plan = make_plan(operator_of("twice used"), directions=4)
    assert not any(n.startswith("inner") for n in plan.matrix)
    assert {"inner.weight", "inner.bias"} <= set(plan.generic)


def test_normalisation_layers_are_contracted():
    assert set(make_plan(operator_of("batch of 2"), directions=4).scale) == {"1", "5"}
    plan = make_plan(operator_of("groupnorm"), directions=4)
    assert plan.scale == {"1": ("weight", "bias")}
    assert not plan.generic


class Square(torch.autograd.Function):
    """x², with a derivative of every kind but for a rule under vmap."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


class ReverseSquare(Square):
    """The same without forward mode."""

    jvp = torch.autograd.Function.jvp


class Squared(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


def test_an_operation_that_does_not_batch_is_said_and_done_one_by_one():
    with pytest.warns(RuntimeWarning, match="one at a time"):
        check_model(Squared(Square), random_input(2, 2, 4), 3)


def test_an_operation_without_forward_mode_is_said_and_done_by_rows():
    model, x = Squared(ReverseSquare).to(DTYPE), random_input(1, 2, 4)
    y = torch.tensor([[0, 2]])
    operator = influence_operator(model, x, y, form="graph")
    with pytest.raises(RuntimeError, match='method="dense"'):
        gram_matrix(operator, method="ghost")
    with pytest.warns(RuntimeWarning, match="row by row"):
        gram = gram_matrix(operator)
    jac = jacobian_of(model, x[0], y[0])
    assert relative_error(gram[0], jac @ jac.T) < 1e-12
