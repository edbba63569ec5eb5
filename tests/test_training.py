"""Training against gradient descent by hand, what it leaves alone, bad input."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from leaklib.data import load_images
from leaklib.defenses import GaussianNoise, Only, Sign, insert_bottleneck
from leaklib.models import build
from leaklib.training import evaluate, train


def some_data(n=20, classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 4, 4, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (n,), generator=generator)


def small_model(seed=0):
    """With everything that has a state: running statistics and random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_whole_batch_equals_descent_by_hand(optimiser):
    images, labels = some_data(dtype=torch.float64)
    settings = {"input_shape": (1, 4, 4), "classes": 3, "hidden": (5,), "activation": "tanh"}
    model, by_hand = build("mlp", **settings).double(), build("mlp", **settings).double()
    train(
        model,
        (images, labels),
        epochs=4,
        batch_size=20,
        lr=0.05,
        optimiser=optimiser,
        generator=rng(),
    )

    theta = list(by_hand.parameters())
    first, second = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    for step in range(1, 5):
        grads = torch.autograd.grad(cross_entropy(by_hand(images), labels), theta)
        for p, g, m, v in zip(theta, grads, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            unbiased_m, unbiased_v = m / (1 - 0.9**step), v / (1 - 0.999**step)
            move = g if optimiser == "sgd" else unbiased_m / (unbiased_v.sqrt() + 1e-8)
            p.data -= 0.05 * move
    for p, q in zip(model.parameters(), theta, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        assert p.grad is None


def test_the_divergence_of_a_bottleneck_is_minimised_too():
    """One step of descent by hand, with a deviation so small that there is no noise."""
    images, labels = some_data(dtype=torch.float64)
    model = build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,)).double()
    settings = {"width": 2, "kl_weight": 0.5, "kl": "nats"}
    model = insert_bottleneck(model, image_shape=(1, 4, 4), **settings)
    encoder = model.fc.bottleneck.encoder
    encoder.weight.data[2:], encoder.bias.data[2:] = 0, -50
    by_hand = copy.deepcopy(model)
    row = train(
        model, (images, labels), epochs=1, batch_size=20, lr=0.1, optimiser="sgd", generator=rng()
    ).history.iloc[0]

    theta = dict(by_hand.named_parameters())
    hidden = torch.relu(images.flatten(1) @ theta["hidden1.weight"].T + theta["hidden1.bias"])
    code = hidden @ theta["fc.bottleneck.encoder.weight"].T + theta["fc.bottleneck.encoder.bias"]
    mean, spread = code[:, :2], code[:, 2:]
    deviation = torch.nn.functional.softplus(spread)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(mean, deviation), normal(torch.zeros_like(mean), 1.0)
    )
    decoded = mean @ theta["fc.bottleneck.decoder.weight"].T + theta["fc.bottleneck.decoder.bias"]
    logits = decoded @ theta["fc.layer.weight"].T + theta["fc.layer.bias"]
    loss = cross_entropy(logits, labels) + 0.5 * divergence.sum(1).mean()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-9)
    grads = torch.autograd.grad(loss, list(theta.values()))
    for (name, before), grad in zip(theta.items(), grads, strict=True):
        after = model.get_parameter(name).detach()
        torch.testing.assert_close(after, before.detach() - 0.1 * grad, rtol=1e-7, atol=1e-9)


def test_a_defense_stands_between_the_gradient_and_the_optimiser():
    data, steps = some_data(), {}
    for name, defense in (("plain", None), ("sign", Sign()), ("one layer", Only(["fc"], Sign()))):
        model = build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(
            model, data, epochs=1, batch_size=20, lr=0.1, optimiser="sgd", generator=rng(),
            defense=defense,
        )  # fmt: skip
        steps[name] = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    for name, step in steps["plain"].items():
        torch.testing.assert_close(steps["sign"][name], 0.1 * step.sign(), rtol=1e-5, atol=1e-7)
        expected = 0.1 * step.sign() if name.startswith("fc") else step
        torch.testing.assert_close(steps["one layer"][name], expected, rtol=1e-5, atol=1e-7)


def test_a_noisy_defense_is_repeatable():
    states = []
    for seed in (0, 0, 1):
        model = small_model()
        train(model, some_data(), epochs=2, generator=rng(seed), defense=GaussianNoise(0.1))
        states.append(model.state_dict())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_evaluation_of_a_model_that_draws_noise():
    images, labels = some_data(200)
    model = build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,))
    model = insert_bottleneck(model, image_shape=(1, 4, 4), width=2)
    with pytest.raises(ValueError, match=r"generator for the noise of fc.bottleneck.noise"):
        evaluate(model, images, labels)
    with pytest.raises(ValueError, match="draws >= 1, got 0"):
        evaluate(model, images, labels, draws=0, generator=rng())
    before = torch.random.get_rng_state()
    many = evaluate(model, images, labels, draws=4, generator=rng())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert many == evaluate(model, images, labels, draws=4, generator=rng())
    one = evaluate(model, images, labels, generator=rng())
    assert many != one
    # the mean over fresh noises, whose first is that of a single draw
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng())))
        losses = [cross_entropy(model(images), labels).item() for _ in range(4)]
    assert many.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert one.loss == pytest.approx(losses[0], rel=1e-5)
    quiet = insert_bottleneck(
        build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,)), image_shape=(1, 4, 4),
        width=2, sampling="training",
    )  # fmt: skip
    assert evaluate(quiet.train(), images, labels) == evaluate(quiet, images, labels)
    assert quiet.training


class Spy(nn.Module):
    """Remembers the images that it sees, by the value of their first pixel."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(16, 3), []

    def forward(self, images):
        self.seen.append(images[:, 0, 0, 0].tolist())
        return self.fc(images.flatten(1))


def test_an_epoch_sees_every_image_once_in_a_new_order():
    images, labels = some_data(10)
    spy = Spy()
    train(spy, (images, labels), epochs=2, batch_size=4, generator=rng())
    assert [len(batch) for batch in spy.seen] == [4, 4, 2, 4, 4, 2]
    first, second = [sum(spy.seen[i : i + 3], start=[]) for i in (0, 3)]  # noqa: RUF017
    everything = images[:, 0, 0, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second
    assert first != everything


def test_history_and_states_describe_the_run():
    data, validation = some_data(), some_data(seed=1)
    model = build("linear", input_shape=(1, 4, 4), classes=3)
    result = train(
        model,
        data,
        epochs=3,
        lr=0.1,
        batch_size=20,
        generator=rng(),
        validation=validation,
        keep_epochs=(3, 0, 1),
    )
    history = result.history
    assert list(history.columns) == [
        "epoch",
        "loss",
        "accuracy",
        "validation_loss",
        "validation_accuracy",
    ]
    assert history["epoch"].tolist() == [1, 2, 3]
    assert list(result.states) == [0, 1, 3]
    assert same(result.states[3], model.state_dict())
    probe = build("linear", input_shape=(1, 4, 4), classes=3)
    assert same(result.states[0], probe.state_dict())
    # with one batch an epoch, its loss is that of the weights at its start
    assert history["loss"][0] == pytest.approx(evaluate(probe, *data).loss, rel=1e-6)
    probe.load_state_dict(result.states[1])
    assert history["loss"][1] == pytest.approx(evaluate(probe, *data).loss, rel=1e-6)
    assert history["accuracy"][1] == pytest.approx(evaluate(probe, *data).accuracy)
    measured = evaluate(probe, *validation)
    assert history["validation_loss"][0] == pytest.approx(measured.loss)
    assert history["validation_accuracy"][0] == pytest.approx(measured.accuracy)


def test_history_weighs_the_last_batch_by_its_size():
    data = some_data(10)
    model = build("linear", input_shape=(1, 4, 4), classes=3)
    before = evaluate(model, *data)
    row = train(model, data, epochs=1, batch_size=4, lr=1e-12, generator=rng()).history.iloc[0]
    assert row["loss"] == pytest.approx(before.loss, rel=1e-6)
    assert row["accuracy"] == pytest.approx(before.accuracy)


def test_it_learns_the_embedded_digits():
    images = load_images("digits", split="train")
    model = build("mlp", input_shape=(1, 8, 8), hidden=(32,))
    train(model, images, epochs=10, lr=1e-2, generator=rng())
    held_out = load_images("digits", split="test")
    assert evaluate(model, held_out.images, held_out.labels).accuracy > 0.9


def test_evaluate_equals_the_definition():
    images, labels = some_data(23)
    model = small_model().train()
    reference = small_model().eval()
    probabilities = torch.softmax(reference(images), dim=1)
    loss = -probabilities[torch.arange(23), labels].log().mean().item()
    accuracy = (probabilities.argmax(1) == labels).float().mean().item()
    for batch_size in (1, 7, 512):
        measured = evaluate(model, images, labels, batch_size=batch_size)
        assert measured == pytest.approx((accuracy, loss), rel=1e-5)
    assert model.training


def test_the_mode_of_every_layer_comes_back():
    model = small_model().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    train(model, some_data(), epochs=1, generator=rng(), validation=some_data())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="labels up to 8"):
        train(model, some_data(classes=9), epochs=1, generator=rng())
    assert [module.training for module in model.modules()] == modes


def test_train_mode_during_training():
    model = small_model().eval()
    with torch.no_grad():
        train(model, some_data(), epochs=1, generator=rng())
    assert model[1].num_batches_tracked == 1
    assert not model.training


def test_only_the_generator_decides():
    states = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        model = small_model()
        train(model, some_data(), epochs=2, batch_size=8, generator=rng(seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(model.state_dict())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_frozen_parameters_stay():
    model = build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,))
    model.hidden1.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, some_data(), epochs=1, lr=0.1, generator=rng())
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"fc.weight", "fc.bias"}


def nan_image():
    images, labels = some_data()
    images[3, 0, 1, 1] = math.nan
    return images, labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "expected epochs >= 1.*got epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"optimiser": "lbfgs"}, "unknown optimiser 'lbfgs': choose one of adam, sgd"),
        ({"keep_epochs": (1, 5)}, r"keep_epochs: expected epochs from 0 to 2, got \[5\]"),
        ({"data": (some_data()[0], some_data(19)[1])}, r"data: .*\(20, 1, 4, 4\) and \(19,\)"),
        ({"data": (some_data()[0][:, 0], some_data()[1])}, r"data: .*\(20, 4, 4\)"),
        ({"data": (torch.rand(0, 1, 4, 4), torch.zeros(0).long())}, "at least one"),
        ({"data": ((some_data()[0] * 255).byte(), some_data()[1])}, "got torch.uint8"),
        ({"data": nan_image()}, "data: expected finite"),
        ({"validation": nan_image()}, "validation: expected finite"),
        ({"data": (some_data()[0], some_data()[1].float())}, "int64 labels from 0"),
        ({"data": (some_data()[0], some_data()[1] - 1)}, "int64 labels from 0"),
        ({"data": some_data(classes=50)}, r"labels up to 4\d, got \(20, 3\); build the model"),
        ({"model": small_model().requires_grad_(False)}, "unfreeze one"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    settings = {"model": small_model(), "data": some_data(), "epochs": 2, "generator": rng()}
    with pytest.raises(ValueError, match=message):
        train(**{**settings, **change})


def test_a_diverging_run_stops():
    model = build("mlp", input_shape=(1, 4, 4), classes=3, hidden=(5,))
    with pytest.raises(FloatingPointError, match=r"in epoch \d: lower lr=1e\+30"):
        train(model, some_data(), epochs=9, lr=1e30, optimiser="sgd", generator=rng())


def test_progress_on_request(capsys):
    train(small_model(), some_data(), epochs=2, generator=rng())
    assert capsys.readouterr().err == ""
    train(small_model(), some_data(), epochs=2, batch_size=8, generator=rng(), progress=True)
    shown = capsys.readouterr().err
    assert "epoch 2 of 2" in shown
    assert "6/6" in shown
    assert "loss=" in shown
