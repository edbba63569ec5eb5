"""The slow reference of R-GAP against autograd and against the truth, without the attack."""

import numpy as np
import pytest
from attacks.dense_layers import describe, gradient_rows, output_shape, read, spread, weight_rows
from attacks.dense_rgap import SLOPES, last_layer, margins, reconstruct
from attacks.rgap_cases import FULL, NAMES, SHORT, VICTIMS, case, truth
from scipy.special import lambertw


def solve(one, victim):
    """The reference's answer for one victim of a case."""
    label = int(one.victims.labels[victim, 0])
    grads = truth(one, victim)[1]
    return reconstruct(one.model, grads, one.image_shape, label=label, loss=one.loss)


def layers_of(one):
    """Every layer with weights of a case, inside blocks too, and the shape of its input."""
    for stage in read(describe(one.model), one.image_shape)[0]:
        if stage.layer["kind"] == "residual":
            first, second, shortcut = (stage.layer[p] for p in ("first", "second", "shortcut"))
            yield first, stage.shape
            yield second, output_shape(first, stage.shape)
            if shortcut["kind"] == "conv":
                yield shortcut, stage.shape
        elif stage.layer["kind"] != "pool":
            yield stage.layer, stage.shape


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_satisfies_both_systems(name):
    one = case(name)
    for victim in range(VICTIMS):
        values, grads = truth(one, victim)
        for layer, shape in layers_of(one):
            x, z, k = (tensor.reshape(-1) for tensor in values[layer["name"]])
            assert x.size == np.prod(shape), layer["name"]
            forward = weight_rows(layer, shape) @ x + spread(layer, shape)
            np.testing.assert_allclose(forward, z, rtol=1e-12, atol=1e-13, err_msg=layer["name"])
            backward = gradient_rows(layer, shape, k) @ x
            wanted = grads[f"{layer['name']}.weight"].reshape(-1)
            assert np.abs(backward - wanted).max() < 1e-13 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", FULL)
def test_the_true_input_of_every_layer_comes_back(name):
    one = case(name)
    for victim in range(VICTIMS):
        values, grads = truth(one, victim)
        found = solve(one, victim)
        for solved in found.stages:
            x, _, k = (tensor.reshape(-1) for tensor in values[solved.name])
            np.testing.assert_allclose(solved.x, x, rtol=0, atol=1e-11, err_msg=solved.name)
            if f"{solved.name}.weight" in grads:  # of a block, k stands before its activation
                np.testing.assert_allclose(solved.k, k, rtol=0, atol=1e-11 * np.abs(k).max())
            assert solved.rank == solved.unknowns
            assert solved.residual < 1e-12
        image = one.victims.images[victim, 0].numpy()
        np.testing.assert_allclose(found.image, image, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SHORT)
def test_a_short_layer_is_short(name):
    one = case(name)
    found = solve(one, 0)
    wrong = [stage for stage in found.stages if stage.rank < stage.unknowns]
    assert [stage.name for stage in wrong] == ["2" if "second" in name else "0"]
    # the short layer's own equations hold; the next layer's no longer fit together
    assert wrong[0].residual < 1e-12
    assert np.abs(found.image - one.victims.images[0, 0].numpy()).max() > 0.1
    if "second" in name:
        assert found.stages[0].residual > 1e-2


@pytest.mark.parametrize("tau", [-30.0, -1.0, -1e-6, 1e-6, 0.1, 0.27, 0.36, 0.9])
def test_margins_in_closed_form(tau):
    def real(*values):
        return sorted(float(v.real) for v in values if np.isreal(v))

    branches = (0,) if tau < 0 else (0, -1)
    logistic = real(*(tau - lambertw(-tau * np.exp(tau), b) for b in branches))
    exponential = real(*(-lambertw(-tau, b) for b in branches))
    np.testing.assert_allclose(margins(tau, "logistic"), logistic, rtol=1e-8)
    np.testing.assert_allclose(margins(tau, "exponential"), exponential, rtol=1e-8)
    assert margins(tau, "hinge") == [tau]
    for loss in SLOPES:
        for mu in margins(tau, loss):
            assert mu * SLOPES[loss](mu) == pytest.approx(-tau, rel=1e-9)


def test_a_wrong_label_does_not_fit_the_next_layer():
    one = case("leaky")
    grads = truth(one, 0)[1]
    wrong = 1 - int(one.victims.labels[0, 0])
    found = reconstruct(one.model, grads, one.image_shape, label=wrong, answer=0)
    assert found.stages[-1].residual < 1e-12
    assert found.stages[-2].residual > 0.1


def test_three_classes_have_one_answer():
    one = case("softmax")
    for victim in range(VICTIMS):
        stages, behind = read(describe(one.model), one.image_shape)
        grads, label = truth(one, victim)[1], int(one.victims.labels[victim, 0])
        (answer,) = last_layer(stages[-1], behind, grads, label=label, loss="softmax")
        np.testing.assert_allclose(answer[0].sum(), 0, atol=1e-12)
