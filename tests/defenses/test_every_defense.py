"""What holds for all defenses: the contract of the call, checked on one table."""

import doctest
import importlib
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

import leaklib.defenses
from leaklib.defenses import (
    Clip,
    Compose,
    GaussianNoise,
    LaplaceNoise,
    Only,
    Prune,
    Quantize,
    Sign,
)
from leaklib.defenses._base import check_generator
from leaklib.gradients.payload import FedAvg, SharedGradient

DETERMINISTIC = [
    Clip(0.5),
    Clip(0.5, scope="tensor"),
    Prune(0.5),
    Prune(0.5, scope="tensor"),
    Prune(0.0),
    Sign(),
    Sign(scaled=True),
    Quantize(1),
    Quantize(4),
    Compose([Clip(0.5), Prune(0.3)]),
    Compose(),
    Only(["body"], Clip(0.1)),
]
RANDOM = [
    GaussianNoise(0.1),
    GaussianNoise(0.1, relative_to="rms"),
    LaplaceNoise(0.1),
    LaplaceNoise(0.1, relative_to="rms"),
    Quantize(1, stochastic=True),
    Quantize(4, stochastic=True),
    Compose([Clip(0.5), GaussianNoise(0.1)]),
    Only(["body", "fc.bias"], GaussianNoise(0.1)),
]
EVERY = [pytest.param(defense, id=repr(defense)) for defense in DETERMINISTIC + RANDOM]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(victims=3, dtype=torch.float64):
    shapes = {"body.0.weight": (4, 5), "body.0.bias": (4,), "fc.weight": (2, 4), "fc.bias": (2,)}
    generator = seeded(7)
    tensors = {
        name: torch.randn(victims, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    # Victims of very different size: a statistic over the wrong axis would show.
    size = torch.tensor([1.0, 100.0, 0.01], dtype=dtype)[:victims]
    tensors = {name: t * size.reshape(-1, *(1,) * (t.ndim - 1)) for name, t in tensors.items()}
    return SharedGradient(tensors, batch=4, reduction="sum", protocol=FedAvg(3, 0.1))


MODULES = [
    "bottleneck", "clipping", "compose", "insertion", "layer_order", "noise", "partial",
    "perturbation", "pruning", "quantisation",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(f"leaklib.defenses.{module}"))
    assert result.failed == 0
    assert result.attempted > 0


def test_public_names_are_there():
    assert all(hasattr(leaklib.defenses, name) for name in leaklib.defenses.__all__)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("defense", EVERY)
def test_form_is_kept_and_the_input_untouched(defense, dtype):
    shared = gradient(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in shared.items()}
    released = defense(shared, generator=seeded())
    assert released.names == shared.names
    for name, tensor in released.items():
        assert tensor.dtype == dtype
        assert tensor.shape == shared.tensors[name].shape
        assert tensor.isfinite().all()
        assert torch.equal(shared.tensors[name], before[name])
    assert (released.batch, released.reduction) == (4, "sum")
    assert released.protocol == FedAvg(3, 0.1)


@pytest.mark.parametrize("defense", [pytest.param(d, id=repr(d)) for d in DETERMINISTIC])
def test_a_victim_alone_gets_the_same_release(defense):
    shared = gradient()
    together = defense(shared)
    for v in range(3):
        alone = defense(shared.replace({n: t[v : v + 1] for n, t in shared.items()}))
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor[0], together.tensors[name][v], rtol=1e-14, atol=0)


@pytest.mark.parametrize("defense", [pytest.param(d, id=repr(d)) for d in RANDOM])
def test_randomness_comes_from_the_generator_alone(defense):
    shared = gradient()
    torch.manual_seed(1)
    first = defense(shared, generator=seeded(5))
    torch.manual_seed(2)
    again, other = defense(shared, generator=seeded(5)), defense(shared, generator=seeded(6))
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in shared.names)
    assert any(not torch.equal(first.tensors[n], other.tensors[n]) for n in shared.names)
    with pytest.raises(ValueError, match=r'pass generator=torch.Generator\("cpu"\)'):
        defense(shared)


@pytest.mark.parametrize("defense", [pytest.param(d, id=repr(d)) for d in RANDOM])
def test_a_victims_release_does_not_depend_on_the_others_values(defense):
    shared = gradient()
    changed = {n: t.clone() for n, t in shared.items()}
    for tensor in changed.values():
        tensor[1:] *= -3
    first = defense(shared, generator=seeded())
    second = defense(shared.replace(changed), generator=seeded())
    for name in shared.names:
        assert torch.equal(first.tensors[name][0], second.tensors[name][0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("defense", [d for d in EVERY if d.values[0] != Compose()])
def test_a_gradient_that_is_not_finite_is_refused(defense, poison):
    shared = gradient()
    shared.tensors["body.0.weight"][1, 0, 0] = poison
    with pytest.raises(ValueError, match=r"'body\.0\.weight' of victim 1"):
        defense(shared, generator=seeded())


@pytest.mark.parametrize("defense", EVERY)
def test_a_zero_gradient_is_no_problem(defense):
    shared = gradient()
    zero = shared.replace({n: torch.zeros_like(t) for n, t in shared.items()})
    released = defense(zero, generator=seeded())
    assert all(tensor.isfinite().all() for tensor in released.tensors.values())


@pytest.mark.parametrize("defense", EVERY)
def test_settings_are_frozen_and_say_themselves(defense):
    assert eval(repr(defense), vars(leaklib.defenses)) == defense
    assert hash(defense) == hash(eval(repr(defense), vars(leaklib.defenses)))
    with pytest.raises(FrozenInstanceError):
        setattr(defense, fields(defense)[0].name, None)


def test_generator_on_another_device_is_refused():
    generator = seeded()
    assert check_generator(generator, torch.device("cpu"), "GaussianNoise") is generator
    with pytest.raises(ValueError, match=r'on cuda:1.*on cpu.*torch.Generator\("cuda:1"\)'):
        check_generator(generator, torch.device("cuda:1"), "GaussianNoise")


@pytest.mark.gpu
@pytest.mark.parametrize("defense", EVERY)
def test_device_follows_the_input(defense):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shared = gradient()
    there = shared.replace({n: t.cuda() for n, t in shared.items()})
    released = defense(there, generator=torch.Generator("cuda").manual_seed(0))
    assert all(tensor.is_cuda for tensor in released.tensors.values())
    if defense in DETERMINISTIC:
        expected = defense(shared)
        for name, tensor in released.items():
            torch.testing.assert_close(tensor.cpu(), expected.tensors[name])
