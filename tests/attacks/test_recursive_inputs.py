"""The inputs that the recursion found for every layer, kept on request."""

import numpy as np
import pytest
import torch
from attacks.rgap_cases import FULL, SHORT, VICTIMS, attack, case, truth


@pytest.mark.parametrize("name", FULL)
def test_inputs_are_those_of_a_forward_pass(name):
    one = case(name)
    found = attack(one, keep_inputs=True)
    assert list(found.inputs) == [layer.name for layer in found.layers]
    for victim in range(VICTIMS):
        values, _ = truth(one, victim)
        for layer, kept in found.inputs.items():
            assert kept.dtype == torch.float64
            if layer in values:  # a pooling of the image itself is not there
                size = np.abs(values[layer][0]).max()
                np.testing.assert_allclose(
                    kept[victim].numpy(), values[layer][0], rtol=0, atol=1e-9 * size, err_msg=layer
                )


@pytest.mark.parametrize("name", ["leaky", "nested", "residual", *SHORT])
def test_the_first_input_is_the_picture(name):
    found = attack(case(name), keep_inputs=True)
    first = next(iter(found.inputs.values()))
    torch.testing.assert_close(first, found.images[:, 0], rtol=0, atol=0)


@torch.no_grad()
def test_they_are_what_the_recursion_held_and_not_a_forward_pass():
    one = case("short second layer")
    found = attack(one, keep_inputs=True, labels=None)
    again, passed = found.images[:, 0], {}
    for layer, module in one.model.named_children():
        passed[layer], again = again, module(again)
    deficient = next(layer.name for layer in found.layers if layer.deficit)
    kept, fresh = found.inputs[deficient], passed[deficient]
    assert float((kept - fresh).norm() / kept.norm()) > 1e-2


def test_published_values_between_layers_are_rounded():
    found = attack(case("leaky"), keep_inputs=True, solver="published")
    for layer in found.layers[:-1]:
        kept = found.inputs[layer.name]
        assert torch.equal(kept, kept.float().double())


def test_nothing_is_kept_unless_asked_for():
    one = case("leaky")
    assert attack(one).inputs is None
    assert torch.equal(attack(one).images, attack(one, keep_inputs=True).images)
