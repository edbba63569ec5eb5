"""Matching from activations, against the generic problem and against dense arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_victims, small_lenet, small_mlp
from torch import nn
from torch.func import functional_call

import leaklib.attacks.ghost_layers
import leaklib.attacks.ghost_matching
import leaklib.attacks.matching
from leaklib.attacks import AdamSettings, Matching, dlg, invert_gradients
from leaklib.attacks.attacker_noise import attacker_noise
from leaklib.attacks.ghost_layers import find_layers
from leaklib.attacks.ghost_matching import ghost_problem
from leaklib.attacks.ghost_targets import (
    choose_rows,
    factor_target,
    inner_product,
    squared_distance,
    squared_norm,
)
from leaklib.attacks.problem import matching_problem
from leaklib.defenses import Compose, GaussianNoise, Only, Prune, insert_bottleneck
from leaklib.gradients import FedAvg, collected_losses, share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build

SHAPE = (1, 8, 8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def both(model, shared, **settings):
    settings = {
        "image_shape": SHAPE, "labels": None, "classes": 10, "matching": Matching(),
        "restarts": 1, "loss": F.cross_entropy,
    } | settings  # fmt: skip
    return ghost_problem(model, shared, **settings), matching_problem(model, shared, **settings)


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


MODELS = {
    "relu": {},
    "gelu, three layers": {"hidden": (12, 9, 7), "activation": "gelu"},
    "without bias": {"hidden": (12,), "bias": False, "activation": "tanh"},
    "normalised": {"normalisation": "mnist", "activation": "softplus"},
}
DEFENSES = {
    "none": None,
    "noise": GaussianNoise(1e-2),
    "pruned": Prune(0.8, scope="tensor"),
    "partial": Only(["hidden1"], GaussianNoise(1e-2)),
}
MATCHINGS = {
    "l2": Matching("l2"),
    "cosine": Matching("cosine"),
    "layer cosine": Matching("layer_cosine"),
    "masked, weighted, TV": Matching(
        "cosine", layers=("hidden1",), layer_weights={"hidden1": 2.5}, tv_weight=0.3
    ),
    "weights alone": Matching("l2", layers=("hidden1.weight", "fc.weight"), tv_weight=0.1),
}


CASES = [("relu", defense) for defense in DEFENSES] + [(model, "partial") for model in MODELS][1:]


@pytest.mark.parametrize(("model", "defense"), CASES)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients_are_those_of_the_generic_problem(model, defense, matching, batch):
    model, victims = small_mlp(**MODELS[model]), random_victims(batch=batch)
    shared = share_gradient(model, victims, reduction="sum" if batch == 3 else "mean")
    if DEFENSES[defense] is not None:
        shared = DEFENSES[defense](shared, generator=rng())
    ghost, generic = both(
        model, shared, labels=victims.labels, matching=MATCHINGS[matching], restarts=2
    )
    # every row, some rows, one row, and an order that is not the victims'
    for rows in ([0, 1, 2, 3, 4, 5], [0, 1, 4], [3], [5, 0, 2]):
        rows = torch.tensor(rows)
        assert_same(ghost, generic, point(ghost, 6)[rows], rows)


@pytest.mark.parametrize("batch", [1, 2])
def test_joint_labels(batch):
    model, victims = small_mlp(), random_victims(batch=batch)
    shared = share_gradient(model, victims)
    ghost, generic = both(model, shared)
    assert ghost.shapes == generic.shapes
    assert_same(ghost, generic, point(ghost, 3), torch.arange(3))


def test_one_logit_and_a_penalty():
    model = build("mlp", input_shape=SHAPE, hidden=(6,), classes=1).double()
    victims = random_victims(classes=2)
    shared = share_gradient(model, victims, loss=LOGISTIC)

    def penalty(images, rows):
        scale = (1 + rows).view(-1, 1, 1, 1, 1)
        return (scale * images.square()).flatten(1).sum(1), 2 * scale * images

    ghost, generic = both(
        model, shared, labels=victims.labels, loss=LOGISTIC, penalty=penalty, classes=2
    )
    assert_same(ghost, generic, point(ghost, 3), torch.arange(3))


@pytest.mark.parametrize("defense", ["none", "partial"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_small_distance_keeps_its_digits(defense, batch):
    """Near the solution ‖G‖² − 2⟨G, Ĝ⟩ + ‖Ĝ‖² would have lost them all."""
    model, victims = small_mlp(), random_victims(batch=batch)
    shared = share_gradient(model, victims)
    if DEFENSES[defense] is not None:
        shared = Only(["hidden1"], GaussianNoise(1e-9))(shared, generator=rng())
    ghost, generic = both(model, shared, labels=victims.labels)
    x = ghost.pack({"images": victims.images})
    x = x + 1e-7 * torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    assert 0 < float(generic.evaluate(x, torch.arange(3))[0].max()) < 1e-12
    value, gradient = ghost.evaluate(x, torch.arange(3))
    expected, slope = generic.evaluate(x, torch.arange(3))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))


def test_float32_is_as_good_as_the_generic_problem():
    model, victims = small_mlp().float(), random_victims(dtype=torch.float32)
    shared = share_gradient(model, victims)
    assert shared.dtype == torch.float32
    for matching in (Matching("l2"), Matching("cosine", tv_weight=0.1)):
        ghost, generic = both(model, shared, labels=victims.labels, matching=matching)
        x = point(ghost, 3).float()
        assert_same(ghost, generic, x, torch.arange(3), rtol=1e-4)


def test_a_dead_network_has_a_finite_objective():
    model, victims = small_mlp(), random_victims()
    with torch.no_grad():
        model.hidden1.bias.fill_(-100.0)
    shared = share_gradient(model, victims)
    for matching in (Matching("l2"), Matching("layer_cosine")):
        ghost, generic = both(model, shared, labels=victims.labels, matching=matching)
        assert_same(ghost, generic, point(ghost, 3), torch.arange(3))


def naive(model, shared, images, label, noise, *, row, victim, matching, extra):
    """Value and image gradient of one row by double backward through every parameter."""
    images = images[row].clone().requires_grad_()
    with collected_losses() as terms:
        logits = functional_call(model, {n: e[row, 0] for n, e in noise.items()}, (images,))
    loss = F.cross_entropy(logits, label[victim], reduction=shared.reduction)
    if extra:
        loss = loss + sum(t.mean() if shared.reduction == "mean" else t.sum() for t in terms)
    names, params = zip(*model.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(loss, params, create_graph=True), strict=True))
    kept = [n for n in names if any(n.startswith(layer) for layer in matching.layers or ("",))]
    mine = torch.cat([grads[n].flatten() for n in kept])
    theirs = torch.cat([shared.tensors[n][victim].flatten() for n in kept])
    if matching.distance == "l2":
        value = (mine - theirs).square().sum()
    else:
        value = 1 - torch.cosine_similarity(mine, theirs, dim=0)
    return value.detach(), torch.autograd.grad(value, images)[0].flatten()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "matching",
    [Matching("l2"), Matching("cosine"), Matching("cosine", layers=("hidden1", "fc.bottleneck"))],
    ids=["l2", "cosine", "ignore decoder and head"],
)
def test_a_bottleneck_with_noise_of_its_own_in_every_row(batch, extra, reduction, matching):
    layers = ("hidden1", "fc.bottleneck.encoder")
    matching = replace(matching, layers=layers if matching.layers else None)
    model = small_mlp(activation="gelu")
    model = insert_bottleneck(model, image_shape=SHAPE, width=4, kl_weight=0.3)
    victims = random_victims(batch=batch)
    shared = share_gradient(model, victims, generator=rng(), reduction=reduction)
    shared = Only(["hidden1"], GaussianNoise(1e-2))(shared, generator=rng(1))
    problem = ghost_problem(
        model, shared, image_shape=SHAPE, labels=victims.labels, classes=10, restarts=2,
        matching=replace(matching, extra_losses=extra), loss=F.cross_entropy, noise_seed=7,
    )  # fmt: skip
    assert problem.stochastic
    drawn = attacker_noise(model, batch, seed=7)(torch.arange(6), 3)
    x, rows = point(problem, 6), torch.tensor([0, 1, 3, 5])
    value, gradient = problem.evaluate(x[rows], rows, 3)
    for i, row in enumerate(rows.tolist()):
        expected, slope = naive(
            model, shared, problem.unpack(x)["images"], victims.labels, drawn, row=row,
            victim=row // 2, matching=matching, extra=extra,
        )  # fmt: skip
        torch.testing.assert_close(value[i], expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(gradient[i], slope, rtol=1e-9, atol=1e-12)


def test_a_bottleneck_needs_a_seed_and_leaves_the_global_generator_alone():
    model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=4)
    victims = random_victims()
    shared = share_gradient(model, victims, generator=rng())
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="expected noise_seed .*fc.bottleneck.noise"):
        both(model, shared, labels=victims.labels)
    ghost, generic = both(model, shared, labels=victims.labels, noise_seed=1)
    assert_same(ghost, generic, point(ghost, 3), torch.arange(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ghost.score_noises == generic.score_noises == 8


def test_a_whole_attack_takes_the_same_steps(monkeypatch):
    """Signed Adam, fresh noise every step, two restarts, the score over further noises."""
    model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=4)
    victims = random_victims()
    shared = share_gradient(model, victims, generator=rng())
    found = []
    for ghost in (ghost_problem, lambda *_args, **_settings: None):
        monkeypatch.setattr(leaklib.attacks.matching, "ghost_problem", ghost)
        attacked = invert_gradients(
            model, shared, image_shape=SHAPE, generator=rng(3), labels=victims.labels,
            matching=Matching("cosine", layers=("hidden1",), tv_weight=1e-3),
            optimiser=AdamSettings(steps=40), restarts=2,
        )  # fmt: skip
        found.append(attacked)
    torch.testing.assert_close(found[0].images, found[1].images, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[0].objective, found[1].objective, rtol=1e-8, atol=1e-10)
    assert torch.equal(found[0].restart, found[1].restart)
    assert float(found[0].history[-1].max()) < float(found[0].history[0].min())


def test_a_joint_search_for_image_and_label(monkeypatch):
    model, victims = small_mlp(activation="sigmoid"), random_victims()
    shared = share_gradient(model, victims)
    monkeypatch.setattr(leaklib.attacks.matching, "matching_problem", ghost_problem)
    found = dlg(model, shared, image_shape=SHAPE, generator=rng(2), max_evaluations=400)
    assert torch.equal(found.labels, victims.labels)
    # far below what rounding would leave of ‖G‖² − 2⟨G, Ĝ⟩ + ‖Ĝ‖²
    assert float(found.objective.max()) < 1e-18
    torch.testing.assert_close(found.images, victims.images, rtol=0, atol=1e-5)


class Residual(nn.Module):
    """In place as torchvision's blocks are: the sum overwrites what the norm gave."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm, self.act = norm, nn.Softplus()

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return self.act(out)


def frozen_batchnorm():
    norm = nn.BatchNorm2d(6)
    norm.running_mean.copy_(torch.linspace(-1, 1, 6))
    norm.running_var.copy_(torch.linspace(0.5, 2, 6))
    return norm


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.Tanh(),
        Residual(6, norm), nn.AvgPool2d(2), nn.Conv2d(6, 9, 1, padding="valid"), nn.GELU(),
        nn.Conv2d(9, 40, 3, padding="same"), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(40), nn.ReLU(inplace=True), nn.Linear(40, 10),
    )  # fmt: skip


def small_vit():
    options = {"patch": 4, "dim": 16, "layers": 1, "heads": 2, "hidden": 12}
    return build("vit", input_shape=SHAPE, classes=10, **options)


def convolutional_bottleneck():
    model = convolutional(nn.GroupNorm(2, 6))
    return insert_bottleneck(model, before="8", kind="cvb", image_shape=SHAPE, width=4)


NETWORKS = {
    "lenet": small_lenet,
    "group norm": lambda: convolutional(nn.GroupNorm(3, 6)),
    "frozen batch norm": lambda: convolutional(frozen_batchnorm()).eval(),
    "vit": small_vit,
    "rows of a picture": lambda: nn.Sequential(
        nn.Linear(8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(24, 10)
    ),
    "in place": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 10)
    ),
    "convolutional bottleneck": convolutional_bottleneck,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("distance", ["l2", "cosine", "layer_cosine"])
@pytest.mark.parametrize("batch", [1, 2])
def test_networks_with_positions(network, distance, batch):
    torch.manual_seed(0)
    model = NETWORKS[network]().double()
    victims = random_victims(batch=batch)
    shared = share_gradient(model, victims, generator=rng())
    if batch == 2:  # dense targets
        shared = GaussianNoise(1e-2)(shared, generator=rng())
    ghost, generic = both(
        model, shared, labels=victims.labels, matching=Matching(distance, tv_weight=0.1),
        restarts=2, noise_seed=3,
    )  # fmt: skip
    for rows in ([0, 1, 2, 3, 4, 5], [5, 0, 2]):
        rows = torch.tensor(rows)
        assert_same(ghost, generic, point(ghost, 6)[rows], rows)


def test_resnet18():
    model = build("resnet18", input_shape=SHAPE, classes=10, norm="group", activation="gelu")
    model, victims = model.double(), random_victims()
    ghost, generic = both(
        model, share_gradient(model, victims), labels=victims.labels, matching=Matching("cosine")
    )
    assert_same(ghost, generic, point(ghost, 3)[:2], torch.arange(2))


@pytest.mark.parametrize("factored", [True, False])
def test_both_forms_of_every_layer(monkeypatch, factored):
    """Each layer contracted, and each gradient formed, whatever is cheaper."""
    describe = leaklib.attacks.ghost_layers._describe
    monkeypatch.setattr(
        leaklib.attacks.ghost_layers, "_describe",
        lambda module, *args: replace(
            describe(module, *args), factored=factored and isinstance(module, nn.Conv2d | nn.Linear)
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model, victims = convolutional(nn.GroupNorm(2, 6)).double(), random_victims(batch=2)
    shared = share_gradient(model, victims)
    for released in (shared, Prune(0.5, scope="tensor")(shared, generator=rng())):
        for distance in ("l2", "cosine"):
            ghost, generic = both(
                model, released, labels=victims.labels, matching=Matching(distance)
            )
            assert_same(ghost, generic, point(ghost, 3), torch.arange(3))


def test_the_cheaper_form_is_chosen():
    model = build("resnet18", norm="group", stem="imagenet")
    names = tuple(name for name, _ in model.named_parameters())
    layers = find_layers(model, names, image_shape=(3, 32, 32), batch=1)
    # 64 filters on 256 positions, and 512 filters on one
    assert (layers["conv1"].factored, layers["conv1"].positions) == (False, 256)
    last = layers["layer4.1.conv2"]
    assert (last.factored, last.positions) == (True, 1)


def test_rows_in_blocks_give_the_same(monkeypatch):
    torch.manual_seed(0)
    model, victims = convolutional(nn.GroupNorm(2, 6)).double(), random_victims()
    model = insert_bottleneck(model, before="12", image_shape=SHAPE, width=4)
    shared = share_gradient(model, victims, generator=rng())
    settings = {"labels": victims.labels, "matching": Matching("cosine"), "noise_seed": 2}
    whole = both(model, shared, restarts=2, **settings)[0]
    monkeypatch.setattr(leaklib.attacks.ghost_matching, "_ENTRIES", 5000)
    blocks = both(model, shared, restarts=2, **settings)[0]
    x, rows = point(whole, 6), torch.arange(6)
    for one, other in zip(whole.evaluate(x, rows, 4), blocks.evaluate(x, rows, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


class Twin(nn.Module):
    """A layer of ours whose forward pass mixes samples."""

    def forward(self, x):
        return x - x.mean(0)


class Twice(nn.Module):
    """A layer of ours that uses another one's weight a second time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + self.layer.weight.mean()


class Overwriting(nn.Module):
    """A layer of ours that overwrites the input of the layer inside."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(64, 64)

    def forward(self, x):
        x = 1 * x
        out = self.inside(x)
        x.mul_(0.5)
        return out


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
                          nn.Linear(64, 10))  # fmt: skip
    model[3].weight = model[1].weight
    return model


def called_twice():
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(64, 10))


def hooked():
    model = small_mlp()
    model.hidden1.register_forward_hook(lambda _m, _i, out: 2 * out)
    return model


OTHERS = {
    "samples mixed": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Twin()),
    "batch norm in train mode": lambda: convolutional(nn.BatchNorm2d(6)).train(),
    "tied weights": tied,
    "called twice": called_twice,
    "weight used outside": lambda: nn.Sequential(nn.Flatten(), Twice(nn.Linear(64, 10))),
    "hook": hooked,
    "groups": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)
    ),
    "uneven padding": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 2, padding="same"), nn.Flatten(), nn.Linear(256, 10)
    ),
    "circular padding": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 10)
    ),
    "a parameter of no known layer": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10), nn.PReLU()
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("network", OTHERS)
def test_other_networks_are_left_to_the_generic_problem(network):
    model, victims = OTHERS[network]().double(), random_victims()
    ghost, generic = both(model, share_gradient(model, victims), labels=victims.labels)
    assert ghost is None
    assert generic.evaluate(point(generic, 3), torch.arange(3))[0].isfinite().all()


def test_an_input_that_is_overwritten_is_left_to_the_generic_problem():
    model = nn.Sequential(nn.Flatten(), Overwriting(), nn.Linear(64, 10)).double()
    names = tuple(name for name, _ in model.named_parameters())
    assert find_layers(model, names, image_shape=SHAPE, batch=1) is None
    assert find_layers(model, ("2.weight",), image_shape=SHAPE, batch=1) is not None


def test_other_settings_are_left_to_the_generic_problem():
    model, victims = small_mlp(), random_victims()
    steps = share_gradient(model, victims, protocol=FedAvg(2, 0.1))
    assert both(model, steps, labels=victims.labels)[0] is None
    assert both(model, share_gradient(model, victims, protocol=FedAvg(1, 0.1)))[0] is not None
    shared = share_gradient(model, victims)
    twice = lambda outputs, labels, *, reduction: 2 * F.cross_entropy(outputs, labels, reduction=reduction)  # noqa: E731, E501
    assert both(model, shared, labels=victims.labels, loss=twice)[0] is None
    settings = {
        "labels": victims.labels, "classes": 10, "restarts": 1, "loss": F.cross_entropy,
    }  # fmt: skip
    wrong = ghost_problem(model, shared, image_shape=(1, 9, 9), matching=Matching(), **settings)
    assert wrong is None  # the generic problem says what is wrong
    settings["image_shape"] = SHAPE
    for matching in (Matching(bn_weight=1.0), Matching(support=True)):
        assert ghost_problem(model, shared, matching=matching, **settings) is None


def test_bad_payloads_are_refused():
    model, victims = small_mlp(), random_victims()
    shared = share_gradient(model, victims)
    settings = {
        "image_shape": SHAPE, "labels": victims.labels, "classes": 10, "restarts": 1,
        "loss": F.cross_entropy,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'conv9'.*known"):
        ghost_problem(model, shared, matching=Matching(layers=("conv9",)), **settings)
    with pytest.raises(ValueError, match="weight >= 0"):
        ghost_problem(model, shared, matching=Matching(layer_weights={"fc": -1.0}), **settings)
    with pytest.raises(ValueError, match="taken on another model"):
        ghost_problem(small_mlp(hidden=(5,)), shared, matching=Matching(), **settings)


def test_targets_by_dense_arithmetic():
    """Rank 2 exactly, rank 2 and noise, and zero, for rows in and out of order."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    generator = rng(4)
    exact = draw(3, 7, 2) @ draw(3, 2, 11)
    exact[2] = 0
    noisy = exact + 1e-3 * draw(3, 7, 11)
    for released, dense in ((exact, False), (noisy, True)):
        target = factor_target(released, 2)
        assert (target.rest is not None) == dense
        rebuilt = target.left @ target.right + (0 if target.rest is None else target.rest)
        torch.testing.assert_close(rebuilt, released, rtol=1e-12, atol=1e-12)
        eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
        torch.testing.assert_close(target.left.mT @ target.left, eye)
        torch.testing.assert_close(target.square, released.square().sum((1, 2)))
        for victims in ([0, 1, 2], [0, 0, 1, 1, 2, 2], [2, 0, 0, 1], [1]):
            victims = torch.tensor(victims)
            rows = choose_rows(victims, 3)
            assert (rows.block is None) == (victims.tolist() in ([2, 0, 0, 1], [1]))
            a, delta = draw(len(victims), 2, 11), draw(len(victims), 2, 7)
            grads = delta.mT @ a
            torch.testing.assert_close(squared_norm(a, delta), grads.square().sum((1, 2)))
            chosen = released[victims]
            torch.testing.assert_close(
                inner_product(target, rows, a, delta), (grads * chosen).sum((1, 2))
            )
            torch.testing.assert_close(
                squared_distance(target, rows, a, delta), (grads - chosen).square().sum((1, 2))
            )


def test_a_batch_of_defended_and_undefended_victims():
    model, victims = small_mlp(), random_victims()
    shared = share_gradient(model, victims)
    tensors = {n: t.clone() for n, t in shared.items()}
    noisy = Compose([GaussianNoise(1e-2)])(shared, generator=rng())
    for name, tensor in tensors.items():
        tensor[1] = noisy.tensors[name][1]
    ghost, generic = both(
        model, shared.replace(tensors), labels=victims.labels, matching=Matching("cosine")
    )
    assert_same(ghost, generic, point(ghost, 3), torch.arange(3))
