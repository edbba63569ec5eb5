"""R-GAP against the slow reference and against the truth."""

import copy

import numpy as np
import pytest
import torch
from attacks.dense_layers import describe, gradient_rows, read
from attacks.dense_rgap import balance, reconstruct
from attacks.rgap_cases import FULL, NAMES, SHORT, VICTIMS, attack, case, share, truth
from torch import nn

from leaklib.attacks import rgap
from leaklib.data import Victims
from leaklib.gradients import FedAvg, share_gradient

DTYPE = torch.float64


def reference(one, victim, *, gradient_first=True):
    """The slow recursion's answer, the label known."""
    label, grads = int(one.victims.labels[victim, 0]), truth(one, victim)[1]
    return reconstruct(
        one.model, grads, one.image_shape, label=label, loss=one.loss,
        gradient_first=gradient_first,
    )  # fmt: skip


def relative_error(found, victims):
    """‖found − true‖/‖true‖ of every victim's picture."""
    wrong = (found.images.double() - victims.images.double()).flatten(1).norm(dim=1)
    return wrong / victims.images.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("solver", ["auto", "balanced"])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_says_the_same(name, solver):
    one = case(name)
    found = attack(one, solver=solver)
    for victim in range(VICTIMS):
        wanted = reference(one, victim, gradient_first=solver == "auto")
        # the error of conjugate gradients in the short layer grows in the layers that follow it
        bound = 1e-6 if (name, solver) == ("short second layer", "balanced") else 1e-10
        np.testing.assert_allclose(
            found.images[victim, 0].numpy(), wanted.image, rtol=0, atol=bound, err_msg=name
        )
        for layer, stage in zip(found.layers, wanted.stages, strict=True):
            assert layer.name == stage.name
            residual = float(layer.residual[victim])
            assert residual == pytest.approx(stage.residual, rel=1e-6, abs=1e-10), layer.name
            assert layer.unknowns == stage.unknowns or layer.rank is None, layer.name
            if "relu" in name or "pool" in name:  # counting is an upper bound there
                assert layer.rank is None or layer.rank >= stage.rank, layer.name
            elif layer.rank is not None:
                assert layer.rank == stage.rank, layer.name
                assert layer.deficit == stage.rank - stage.unknowns


@pytest.mark.parametrize("name", FULL)
def test_the_image_itself_comes_back_with_its_label(name):
    one = case(name)
    for labels in (one.victims.labels, None):
        found = attack(one, labels=labels)
        torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)
        assert torch.equal(found.labels, one.victims.labels)
        assert found.first_wrong_layer() == [None] * VICTIMS
        assert all(not layer.deficit and not layer.sign_flips.any() for layer in found.layers)
        assert float(found.objective.max()) < 1e-10
        assert found.evaluations.tolist() == [0] * VICTIMS


@pytest.mark.parametrize("name", ["leaky", "softmax, bias", "relu", "residual", "pooled", *SHORT])
def test_victims_do_not_meet(name):
    one = case(name)
    shared = share(one)
    together = attack(one, shared)
    for i in range(VICTIMS):
        alone = shared.replace({n: t[i : i + 1] for n, t in shared.items()})
        found = attack(one, alone, labels=one.victims.labels[i : i + 1])
        torch.testing.assert_close(found.images[0], together.images[i], rtol=1e-10, atol=1e-10)
        for layer, layers in zip(found.layers, together.layers, strict=True):
            torch.testing.assert_close(layer.residual[0], layers.residual[i], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", FULL)
def test_float32_gradients_give_float32_pictures(name):
    one = case(name)
    model, victims = copy.deepcopy(one.model).float(), one.victims.to(dtype=torch.float32)
    found = attack(one, share(one, victims, model=model), model=model, labels=None)
    assert found.images.dtype == torch.float32
    assert torch.equal(found.labels, victims.labels)
    error = relative_error(found, victims)
    bound = 1e-4 if name == "nested" else 3e-6  # five layers, the first one badly conditioned
    assert float(error.max()) < bound, error


@pytest.mark.parametrize("solver", ["gradient first", "published"])
@pytest.mark.parametrize(
    "name", ["leaky", "hinge, bias", "softmax", "elu", "geometry", "batchnorm"]
)
def test_other_solvers(name, solver):
    one = case(name)
    error = relative_error(attack(one, solver=solver), one.victims)
    if solver == "published":  # its float32 values between the layers show, and no more than they
        assert float(error.min()) > 1e-10
    assert float(error.max()) < (1e-4 if solver == "published" else 1e-11)


@pytest.mark.parametrize("settings", [{"reduction": "sum"}, {"protocol": FedAvg(1, 0.1)}])
def test_what_is_the_same_for_one_picture(settings):
    one = case("softmax")
    found = attack(one, share(one, **settings))
    torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)


def test_biases_in_front_of_the_last_layer_are_not_needed():
    one = case("softmax, bias")
    shared = share(one).select(["0.weight", "2.weight", "5"])
    found = attack(one, shared, labels=None)
    torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)


def test_the_images_are_never_seen():
    one = case("residual")
    images = one.victims.images.clone()
    victims = Victims(images, one.victims.labels)
    shared = share(one, victims)
    kept = {n: t.clone() for n, t in shared.items()}
    weights = {n: t.clone() for n, t in one.model.state_dict().items()}
    first = attack(one, shared)
    images.fill_(torch.nan)
    again = attack(one, shared)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert all(torch.equal(t, kept[n]) for n, t in shared.items())
    assert all(torch.equal(t, weights[n]) for n, t in one.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in one.model.parameters())


@pytest.mark.parametrize(("seed", "victim"), [(0, 2), (2, 2), (9, 1)])
def test_a_system_on_which_conjugate_gradients_rest_for_long(seed, victim):
    # condition 1e3 to 1e4: hundreds of iterations bring nothing, and then it goes on
    one = case("short second layer", seed)
    found = attack(one)
    assert float(found.layers[1].residual[victim]) < 1e-10
    wanted = reference(one, victim).image
    np.testing.assert_allclose(found.images[victim, 0].numpy(), wanted, rtol=0, atol=1e-10)


class TestReport:
    def test_a_short_layer_is_named(self):
        found = attack(case("short second layer"))
        layers = {layer.name: layer for layer in found.layers}
        assert layers["2"].deficit == -288
        assert [layers[n].deficit for n in ("0", "4")] == [0, 0]
        assert float(layers["2"].residual.max()) < 1e-10  # it answers without any residual
        assert float(layers["0"].residual.min()) > 1e-2  # and the next one pays for it
        assert bool(layers["0"].sign_flips.all())
        assert found.first_wrong_layer() == ["2"] * VICTIMS

    @pytest.mark.parametrize(
        "name",
        [
            "short first layer", "short first layer, bias", "short first layer, relu",
            "pooled away",
        ],
    )  # fmt: skip
    def test_a_short_first_layer_is_named(self, name):
        # no residual tells: the equations hold for a wrong picture
        found = attack(case(name))
        assert float(found.objective.max()) < 1e-10
        assert found.first_wrong_layer() == ["0"] * VICTIMS

    def test_the_condition_is_that_of_the_system(self):
        one = case("geometry")
        found = attack(one, solver="balanced")
        stage = read(describe(one.model), one.image_shape)[0][0]
        for victim in range(VICTIMS):
            k = truth(one, victim)[0]["0"][2].reshape(-1)
            scaled = balance(stage.layer, k) * gradient_rows(stage.layer, stage.shape, k)
            wanted = np.linalg.cond(np.concatenate([stage.rows, scaled]))
            assert float(found.layers[0].condition[victim]) == pytest.approx(wanted, rel=0.05)

    def test_the_table_has_a_row_a_layer_and_victim(self):
        found = attack(case("leaky"))
        table = found.table()
        assert len(table) == len(found.layers) * VICTIMS
        assert set(table["layer"]) == {"0", "2", "5"}
        assert not table["sign_flips"].any()


class TestHybrid:
    @pytest.mark.parametrize("solver", ["auto", "balanced", "gradient first", "published"])
    def test_the_layer_before_fills_the_deficit(self, solver):
        one = case("short second layer")
        found = attack(one, deficient="hybrid", solver=solver)
        bound = 1e-4 if solver == "published" else 1e-10
        torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=bound)
        assert found.first_wrong_layer() == [None] * VICTIMS
        steps = {layer.name: layer.steps for layer in found.layers}
        assert int(steps["2"].min()) >= 1
        assert not steps["4"].any()
        assert float(found.objective.max()) < bound

    def test_nothing_lies_in_front_of_the_first_layer(self):
        one = case("short first layer")
        plain, filled = attack(one), attack(one, deficient="hybrid")
        torch.testing.assert_close(filled.images, plain.images, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("name", ["leaky", "residual", "relu"])
    def test_full_layers_need_none(self, name):
        one = case(name)
        assert torch.equal(attack(one, deficient="hybrid").images, attack(one).images)


class TestMixture:
    def batches(self, one, batch):
        generator = torch.Generator().manual_seed(batch)
        images = torch.rand(2, batch, *one.image_shape, generator=generator, dtype=DTYPE)
        return Victims(images, torch.randint(2, (2, batch), generator=generator))

    @pytest.mark.parametrize("name", ["perceptron", "behind the last", "perceptron, softmax"])
    @pytest.mark.parametrize("batch", [2, 5])
    def test_a_batch_gives_a_linear_combination(self, name, batch):
        one = case(name)
        victims = self.batches(one, batch)
        found = attack(one, share(one, victims), labels=None, mixture=True)
        assert found.images.shape == (2, 1, *one.image_shape)
        for mixed, images in zip(found.images.flatten(1), victims.images.flatten(2), strict=True):
            weights = torch.linalg.lstsq(images.T, mixed[:, None]).solution
            left = (images.T @ weights - mixed[:, None]).norm() / mixed.norm()
            assert float(left) < 1e-10
            assert int((weights.abs() > 1e-6 * weights.abs().max()).sum()) == batch

    def test_it_has_to_be_asked_for(self):
        one = case("perceptron")
        with pytest.raises(ValueError, match="batch 1, got 3.*mixture=True"):
            attack(one, share(one, self.batches(one, 3)), labels=None)

    def test_a_batch_of_one_is_no_mixture(self):
        one = case("perceptron")
        assert torch.equal(attack(one, mixture=True).images, attack(one).images)


def test_what_does_nothing_changes_nothing():
    one = case("softmax")
    layers = [nn.Dropout(0.5), *one.model, nn.Identity()]
    model = nn.Sequential(*layers).eval()
    shared = share_gradient(model, one.victims)
    found = rgap(model, shared, image_shape=one.image_shape, labels=one.victims.labels)
    torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)


def test_adaptive_pooling_is_average_pooling():
    torch.manual_seed(0)
    front, act = nn.Conv2d(2, 8, 3, padding=1), nn.LeakyReLU(0.2)
    back = (nn.Flatten(), nn.Linear(128, 4))
    found = []
    for pool in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4)):
        model = nn.Sequential(front, pool, act, *back).to(DTYPE)
        victims = case("softmax").victims
        labels = victims.labels % 4
        shared = share_gradient(model, Victims(victims.images, labels))
        found.append(rgap(model, shared, image_shape=(2, 8, 8), labels=labels))
        torch.testing.assert_close(found[-1].images, victims.images, rtol=0, atol=1e-10)
    assert [layer.name for layer in found[0].layers] == [layer.name for layer in found[1].layers]


def test_a_block_whose_second_layer_alone_says_too_little():
    # 3 filters on 36 places: what lies between the two convolutions comes out of both together
    one = case("thin block")
    found = attack(one)
    sound = torch.stack([layer.residual for layer in found.layers]).amax(0) < 1e-9
    assert bool(sound.any())
    assert float(relative_error(found, one.victims)[sound].max()) < 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FULL)
def test_the_same_on_a_gpu(name):
    one = case(name)
    model, victims = copy.deepcopy(one.model).cuda(), one.victims.to(device="cuda")
    shared = share(one, victims, model=model)
    for labels in (victims.labels, None):
        found = attack(one, shared, model=model, labels=labels)
        tensors = (found.labels, found.objective, found.margins, found.margin_roots, found.twins)
        assert all(tensor.is_cuda for tensor in (found.images, *tensors))
        torch.testing.assert_close(found.images, victims.images, rtol=0, atol=1e-9)
        assert torch.equal(found.labels, victims.labels)
    assert len(found.table()) == len(found.layers) * VICTIMS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["balanced", "gradient first", "published"])
def test_every_solver_on_a_gpu(solver):
    one = case("short second layer")
    model = copy.deepcopy(one.model).cuda()
    shared = share(one, one.victims.to(device="cuda"), model=model)
    settings = {"model": model, "labels": one.victims.labels.cuda(), "solver": solver}
    filled = attack(one, shared, deficient="hybrid", **settings)
    here = attack(one, deficient="hybrid", solver=solver)
    bound = 1e-3 if solver == "published" else 1e-9
    torch.testing.assert_close(filled.images.cpu(), here.images, rtol=0, atol=bound)
