"""δ and its report against numpy."""

import numpy as np
import pytest
import torch

from leaklib.defenses import GaussianNoise, Only, Prune, noise_report, perturbation
from leaklib.gradients.payload import SharedGradient


def gradient():
    generator = torch.Generator().manual_seed(7)
    shapes = {"body": (4, 5), "temperature": (), "fc": (2, 4)}
    tensors = {
        name: torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return SharedGradient(tensors, batch=1)


def flat(tensors):
    return np.concatenate([t.reshape(3, -1).numpy() for t in tensors.values()], axis=1)


def test_delta_is_the_noise_that_was_added():
    shared = gradient()
    noise = {name: torch.full_like(t, 0.25) for name, t in shared.items()}
    released = shared.replace({name: t + noise[name] for name, t in shared.items()})
    delta = perturbation(shared, released)
    assert list(delta) == list(shared.names)
    for name in delta:
        torch.testing.assert_close(delta[name], noise[name])


def test_report_equals_numpy():
    shared = gradient()
    body = shared.tensors["body"].clone()
    body[0, 0, :3] += 1.0  # three entries of victim 0
    body[1] *= 2  # all of victim 1; victim 2 untouched
    report = noise_report(shared, shared.replace({**shared.tensors, "body": body}))
    g, d = flat(shared.tensors), flat({"body": body - shared.tensors["body"]})
    np.testing.assert_allclose(report.gradient_norm, np.linalg.norm(g, axis=1), rtol=1e-12)
    np.testing.assert_allclose(report.perturbation_norm, np.linalg.norm(d, axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        report.relative_norm, report.perturbation_norm / report.gradient_norm, rtol=1e-12
    )
    assert report.victim.tolist() == [0, 1, 2]
    assert report.changed_share.tolist() == [3 / 29, 20 / 29, 0]
    assert report.touched_share.tolist() == [20 / 29, 20 / 29, 0]


def test_report_of_a_defense_on_some_layers():
    shared = gradient().select(["body", "fc"])
    noisy = Only(["fc"], GaussianNoise(0.1))(shared, generator=torch.Generator().manual_seed(0))
    assert noise_report(shared, noisy).changed_share.tolist() == [8 / 28] * 3
    pruned = Only(["fc"], Prune(0.5))(shared)
    assert noise_report(shared, pruned).changed_share.tolist() == [4 / 28] * 3
    assert noise_report(shared, pruned).touched_share.tolist() == [8 / 28] * 3


def test_zero_over_zero_is_nan_without_a_warning():
    zero = SharedGradient({"w": torch.zeros(1, 3)}, batch=1)
    assert noise_report(zero, zero).relative_norm.isna().all()


def test_another_gradient_is_refused():
    shared = gradient()
    with pytest.raises(ValueError, match=r"difference in \['fc', 'temperature'\]"):
        perturbation(shared, shared.select(["body"]))
    other = shared.replace({**shared.tensors, "fc": shared.tensors["fc"][:, :1]})
    with pytest.raises(ValueError, match=r"difference in \['fc'\]"):
        noise_report(shared, other)
