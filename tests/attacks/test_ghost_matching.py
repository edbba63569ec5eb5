"""Matching from activations, against the generic problem: dense networks and all settings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attacks.ghost_checks import SHAPE, assert_same, both, point, rng
from conftest import random_victims, small_mlp
from torch.func import functional_call

import leaklib.attacks.matching
from leaklib.attacks import AdamSettings, Matching, invert_gradients
from leaklib.attacks.attacker_noise import attacker_noise
from leaklib.attacks.ghost_matching import ghost_problem
from leaklib.data import PrivateInputs
from leaklib.defenses import Compose, GaussianNoise, Only, Prune, insert_bottleneck
from leaklib.gradients import FedAvg, collected_losses, share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build
from leaklib.models.transformer import transformer

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


def test_one_logit():
    model = build("mlp", input_shape=SHAPE, hidden=(6,), classes=1).double()
    victims = random_victims(classes=2)
    shared = share_gradient(model, victims, loss=LOGISTIC)
    ghost, generic = both(model, shared, labels=victims.labels, loss=LOGISTIC)
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
        model, shared, image_shape=SHAPE, labels=victims.labels, restarts=2,
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


def test_other_settings_are_left_to_the_generic_problem():
    model, victims = small_mlp(), random_victims()
    steps = share_gradient(model, victims, protocol=FedAvg(2, 0.1))
    assert both(model, steps, labels=victims.labels)[0] is None
    one = share_gradient(model, victims, protocol=FedAvg(1, 0.1))
    assert both(model, one, labels=victims.labels)[0] is not None
    shared = share_gradient(model, victims)
    twice = lambda outputs, labels, *, reduction: 2 * F.cross_entropy(outputs, labels, reduction=reduction)  # noqa: E731, E501
    assert both(model, shared, labels=victims.labels, loss=twice)[0] is None
    settings = {"labels": victims.labels, "restarts": 1, "loss": F.cross_entropy}
    wrong = ghost_problem(model, shared, image_shape=(1, 9, 9), matching=Matching(), **settings)
    assert wrong is None  # the generic problem says what is wrong
    # one label a position: the mean has more terms than the batch
    words = transformer(tokens=4, dim=6, outputs=10, task="next token").double()
    sentences = PrivateInputs(
        torch.rand(3, 1, 4, 6, generator=rng(), dtype=torch.float64),
        torch.randint(10, (3, 1, 4), generator=rng()),
    )
    blocks = {"image_shape": (4, 6), "matching": Matching(layers=("blocks", "head"))}
    spoken = share_gradient(words, sentences)
    assert both(words, spoken, labels=sentences.labels, **blocks)[0] is None
    with torch.inference_mode():
        made_there = shared.replace({n: t.clone() for n, t in shared.items()})
        assert both(model, shared, labels=victims.labels)[0] is None
    assert both(model, made_there, labels=victims.labels)[0] is None
    settings["image_shape"] = SHAPE
    for matching in (Matching(bn_weight=1.0), Matching(support=True)):
        assert ghost_problem(model, shared, matching=matching, **settings) is None


def test_bad_payloads_are_refused():
    model, victims = small_mlp(), random_victims()
    shared = share_gradient(model, victims)
    settings = {
        "image_shape": SHAPE, "labels": victims.labels, "restarts": 1, "loss": F.cross_entropy,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'conv9'.*known"):
        ghost_problem(model, shared, matching=Matching(layers=("conv9",)), **settings)
    with pytest.raises(ValueError, match="weight >= 0"):
        ghost_problem(model, shared, matching=Matching(layer_weights={"fc": -1.0}), **settings)
    with pytest.raises(ValueError, match="taken on another model"):
        ghost_problem(small_mlp(hidden=(5,)), shared, matching=Matching(), **settings)


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
