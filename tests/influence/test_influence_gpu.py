"""I²F on a GPU: Gram, solves, eigenvalues and maps in float64 against the CPU."""

import copy

import pytest
import torch
from influence.cases import NAMES, case
from influence.gram_checks import random_directions, relative_error

from leaklib.data import load_images
from leaklib.influence import (
    extreme_eigenvalues,
    gram_matrix,
    i2f,
    i2f_lower_bound,
    influence_operator,
    sensitivity_map,
    spectrum,
    trace_estimate,
)
from leaklib.models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::leaklib.influence.checks.RankWarning"),
]
DEVICE = "cuda"


def both(model, inputs, labels, **settings):
    """The same operator on the CPU and on the GPU."""
    there = copy.deepcopy(model).to(DEVICE), inputs.to(DEVICE), labels.to(DEVICE)
    return (
        influence_operator(model, inputs, labels, **settings),
        influence_operator(*there, **settings),
    )


def both_of(name):
    one = case(name)
    return both(*one.arguments, loss=one.loss)


def noise_for(operator, *, vectors=2, seed=0):
    """Normal δ (victims, vectors, *shape) on the CPU: one draw for both devices."""
    draw = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(operator.victims, vectors, *s, generator=draw, dtype=operator.dtype)
        for n, s in operator.parameter_shapes.items()
    }


def moved(tensors):
    return {n: t.to(DEVICE) for n, t in tensors.items()}


def agree(there, here):
    """Equal to 1e-9 of the norm, and on the device."""
    assert there.device.type == DEVICE
    assert there.dtype == here.dtype == torch.float64
    assert relative_error(there.cpu(), here) < 1e-9


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def problem(operator):
    """What the solvers that know no network take of an operator."""
    sizes = {"victims": operator.victims, "d": operator.unknowns}
    return operator.gram_product, sizes | {"dtype": operator.dtype, "device": operator.device}


@pytest.mark.parametrize("method", ["ghost", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_gram(name, method):
    here, there = both_of(name)
    agree(gram_matrix(there, method=method), gram_matrix(here, method=method))
    u = random_directions(here, 3)
    found = gram_matrix(there, directions=u.to(DEVICE), method=method)
    agree(found, gram_matrix(here, directions=u, method=method))


@pytest.mark.parametrize("name", NAMES)
def test_solves(name):
    """Conjugate gradients stop at a residual of 1e-12, and ε = λ_max/100 multiplies it by 100."""
    here, there = both_of(name)
    delta, whole = noise_for(here), spectrum(here)
    damping = [0.01 * float(whole.largest.max()), 1.0]
    settings = {"damping": damping, "tolerance": 1e-12}
    expected = i2f(here, delta, **settings)
    found = i2f(there, moved(delta), **settings)
    assert bool(found.converged.all())
    agree(found.vector, expected.vector)
    agree(found.norm, expected.norm)
    agree(found.projected_norm, expected.projected_norm)
    closed = i2f(there, moved(delta), damping=damping, spectrum=spectrum(there))
    agree(closed.vector, expected.vector)


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_damping_draws_on_either_device(name):
    here, there = both_of(name)
    delta, share = noise_for(here), {"damping": 0.1, "relative_to": "lambda_max"}
    expected = i2f(here, delta, spectrum=spectrum(here), **share)
    for device in ("cpu", DEVICE):
        # λ_max to 1e-4 by residual, far closer by value
        found = i2f(there, moved(delta), generator=seeded(device), tolerance=1e-10, **share)
        torch.testing.assert_close(found.norm.cpu(), expected.norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_and_trace(name):
    operators = both_of(name)
    answers = []
    for operator in operators:
        apply, sizes = problem(operator)
        ends = extreme_eigenvalues(
            apply, **sizes, generator=seeded("cpu"), tolerance=1e-10, smallest=True
        )
        few = {"samples": 5, "generator": seeded("cpu")}
        traces = [trace_estimate(apply, **sizes, **few, method=m) for m in ("hutchinson", "xtrace")]
        answers.append((ends, traces))
    (here, trace_here), (there, trace_there) = answers
    agree(there.largest, here.largest)
    # the small end to the rounding of the large one
    gap = (there.smallest.cpu() - here.smallest).abs()
    assert bool((gap <= 1e-9 * here.largest).all())
    y = there.largest_vector[:, None]
    residual = there.largest[:, None, None] * y - operators[1].gram_product(y)
    assert bool((residual.norm(dim=2)[:, 0] <= 1e-8 * there.largest).all())
    for found, expected in zip(trace_there, trace_here, strict=True):
        agree(found.mean, expected.mean)


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_and_trace_with_a_generator_on_the_device(name):
    here, there = both_of(name)
    whole = spectrum(here)
    apply, sizes = problem(there)
    ends = extreme_eigenvalues(apply, **sizes, generator=seeded(DEVICE), tolerance=1e-10)
    agree(ends.largest, whole.largest)
    # as many samples as unknowns read the diagonal off
    found = trace_estimate(apply, **sizes, generator=seeded(DEVICE), samples=here.unknowns)
    agree(found.mean, whole.trace)


@pytest.mark.parametrize("name", NAMES)
def test_spectrum_and_map(name):
    here, there = (spectrum(operator) for operator in both_of(name))
    agree(there.eigenvalues, here.eigenvalues)
    gram = (here.vectors * here.eigenvalues[:, None]) @ here.vectors.mT
    agree((there.vectors * there.eigenvalues[:, None]) @ there.vectors.mT, gram)
    share = {"std": 0.1, "damping": 1e-2, "relative_to": "lambda_max"}
    agree(sensitivity_map(there, **share), sensitivity_map(here, **share))


@pytest.mark.slow
def test_resnet18():
    """Bound and Gram rows at 3x32x32."""
    image = load_images("patches", 1)
    model = build("resnet18", input_shape=(3, 32, 32), init="default", seed=1).double()
    here, there = both(model, image.images[:, None].double(), image.labels[:, None])
    delta = noise_for(here, vectors=1)
    expected = i2f_lower_bound(here, delta, generator=seeded("cpu"), tolerance=1e-6)
    found = i2f_lower_bound(there, moved(delta), generator=seeded("cpu"), tolerance=1e-6)
    assert bool(found.converged.all())
    agree(found.projected_norm, expected.projected_norm)
    agree(found.lambda_max, expected.lambda_max)
    agree(found.value, expected.value)
    u = random_directions(here, 4)
    rows = gram_matrix(there, directions=u.to(DEVICE), method="ghost")
    agree(rows, gram_matrix(here, directions=u, method="ghost"))


@pytest.mark.slow
def test_sixty_four_pictures_at_once():
    """One batched solve on the GPU; four of its pictures alone on the CPU."""
    pictures = load_images("digits28", 64)
    model = build("lenet4", input_shape=(1, 28, 28), init="uniform", seed=1).double()
    here, there = both(model, pictures.images[:, None].double(), pictures.labels[:, None])
    delta, rows = noise_for(here, vectors=1), [0, 21, 42, 63]
    settings = {"damping": 1e-2, "tolerance": 1e-12}
    found = i2f(there, moved(delta), **settings)
    assert bool(found.converged.all())
    assert found.vector.shape == (64, 1, 1, 1, 1, 28, 28)
    expected = i2f(here.select(rows), {n: d[rows] for n, d in delta.items()}, **settings)
    agree(found.vector[rows], expected.vector)
