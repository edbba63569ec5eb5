"""Order of composition, and restriction that leaves the other tensors alone."""

import pytest
import torch

from leaklib.defenses import Clip, Compose, GaussianNoise, Only, Prune, Sign
from leaklib.gradients.payload import SharedGradient


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient():
    generator = seeded(7)
    shapes = {"body.0.weight": (4, 5), "body.0.bias": (4,), "bodyguard.weight": (3,), "fc": (2, 4)}
    return SharedGradient(
        {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()},
        batch=1,
    )


def test_order_is_left_to_right():
    shared = gradient()
    composed = Compose([Clip(1.0), GaussianNoise(0.5)])(shared, generator=seeded())
    by_hand = GaussianNoise(0.5)(Clip(1.0)(shared), generator=seeded())
    reversed_ = Clip(1.0)(GaussianNoise(0.5)(shared, generator=seeded()))
    for name in shared.names:
        assert torch.equal(composed.tensors[name], by_hand.tensors[name])
        assert not torch.allclose(composed.tensors[name], reversed_.tensors[name])


def test_one_stream_runs_through_all_defenses():
    shared = gradient().replace({"w": torch.zeros(1, 1000)})
    once = GaussianNoise(1.0)(shared, generator=seeded()).tensors["w"]
    twice = Compose([GaussianNoise(1.0)] * 2)(shared, generator=seeded()).tensors["w"]
    assert float((twice - 2 * once).std()) > 1  # restarted streams would add up to twice the first


def test_empty_composition_is_no_defense():
    shared = gradient()
    assert Compose()(shared) is shared


def test_other_layers_are_the_same_tensor_objects_in_the_same_order():
    shared = gradient()
    released = Only(["body"], GaussianNoise(1.0))(shared, generator=seeded())
    assert released.names == shared.names
    for name in ("bodyguard.weight", "fc"):
        assert released.tensors[name] is shared.tensors[name]
    for name in ("body.0.weight", "body.0.bias"):
        assert not torch.allclose(released.tensors[name], shared.tensors[name])


def test_the_defense_sees_the_chosen_layers_only():
    shared = gradient()
    released = Only("body.0", Prune(0.5))(shared)
    expected = Prune(0.5)(shared.select(["body.0"]))
    for name, tensor in expected.items():
        assert torch.equal(released.tensors[name], tensor)


def test_restrictions_compose():
    shared = gradient()
    released = Compose([Only(["fc"], Sign()), Only(["body.0.bias"], Clip(0.1))])(shared)
    assert torch.equal(released.tensors["fc"], shared.tensors["fc"].sign())
    assert released.tensors["body.0.weight"] is shared.tensors["body.0.weight"]
    norms = released.tensors["body.0.bias"].norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), 0.1))


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'head'; known: body.0.weight"):
        Only(["head"], Sign())(gradient())


@pytest.mark.parametrize("layers", [[], [""], [1]])
def test_no_layer_is_refused(layers):
    with pytest.raises(ValueError, match="expected names of layers"):
        Only(layers, Sign())


@pytest.mark.parametrize("bad", [Sign, "sign", None])
def test_what_is_no_defense_is_refused(bad):
    with pytest.raises(ValueError, match=r"expected a defense such as Prune\(0.9\)"):
        Compose([Clip(1.0), bad])
    with pytest.raises(ValueError, match=r"expected a defense such as Prune\(0.9\)"):
        Only(["fc"], bad)


def test_a_bare_defense_is_no_sequence():
    with pytest.raises(ValueError, match=r"write Compose\(\[...\]\)"):
        Compose(Sign())
