"""What the tests of the Gram matrix share: random directions and dense references."""

import torch
import torch.nn.functional as F
from influence.cases import DTYPE, case
from torch import nn

from leaklib.influence.ghost_plan import make_plan
from leaklib.influence.gram import gram_matrix
from leaklib.influence.operator import influence_operator


def operator_of(name, **kwargs):
    one = case(name)
    return influence_operator(*one.arguments, loss=one.loss, **kwargs)


def random_directions(operator, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = operator.victims, k, operator.unknowns
    return torch.randn(shape, generator=generator, dtype=DTYPE)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def jacobian_of(model, x, y, loss=F.cross_entropy):
    """J (d, p) of one victim by double backward through plain autograd, parameters as listed."""
    params = list(model.parameters())

    def flat_gradient(z):
        parts = torch.autograd.grad(loss(model(z), y), params, create_graph=True)
        return torch.cat([part.flatten() for part in parts])

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.jacobian(flat_gradient, x).flatten(1).T


def check_model(model, x, classes, *, method="ghost", seed=0):
    """K of a model that is in no table, against its dense Jacobian; returns the plan."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(DTYPE).eval()
    y = torch.randint(classes, x.shape[:2], generator=generator)
    operator = influence_operator(model, x, y)
    jac = torch.stack([jacobian_of(model, *one) for one in zip(x, y, strict=True)])
    assert relative_error(gram_matrix(operator, method=method), jac @ jac.mT) < 1e-12
    return make_plan(operator, directions=4)


def random_input(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
