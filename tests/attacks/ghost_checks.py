"""What the tests of matching from activations share."""


import torch
import torch.nn.functional as F

from leaklib.attacks import Matching
from leaklib.attacks.ghost_matching import ghost_problem
from leaklib.attacks.problem import matching_problem

SHAPE = (1, 8, 8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def both(model, shared, **settings):
    settings = {
        "image_shape": SHAPE, "matching": Matching(), "restarts": 1, "loss": F.cross_entropy,
    } | settings  # fmt: skip
    generic = matching_problem(model, shared, **settings, classes=10)
    return ghost_problem(model, shared, **settings), generic


def point(problem, rows, seed=9):
    return problem.pack(
        {
            n: torch.rand(rows, *shape, generator=rng(seed), dtype=torch.float64)
            for n, shape in problem.shapes.items()
        }
    )


def assert_same(ghost, generic, x, rows, *, rtol=1e-10):
    value, gradient = ghost.evaluate(x, rows)
    expected, slope = generic.evaluate(x, rows)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-13)
    torch.testing.assert_close(gradient, slope, rtol=rtol, atol=rtol * float(slope.abs().max()))
