"""Federated averaging against averaging by hand; its schedule; killed runs; defenses."""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import leaklib.federated
import leaklib.training_steps
from leaklib.data import load_images
from leaklib.defenses import (
    GaussianNoise,
    Only,
    Prune,
    Sign,
    insert_bottleneck,
    partial_perturbation,
)
from leaklib.federated import Federation, split_clients, train_federated
from leaklib.federated_schedule import best_round, finished, learning_rate
from leaklib.models import build
from leaklib.training import evaluate, train

SHAPE = (1, 4, 4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_data(n=43, classes=3, seed=0, dtype=torch.float32):
    images = torch.rand(n, *SHAPE, generator=rng(seed), dtype=dtype)
    return images, torch.randint(classes, (n,), generator=rng(seed + 1))


def small_mlp(seed=0, **settings):
    settings = {"input_shape": SHAPE, "classes": 3, "hidden": (5,), "activation": "tanh"} | settings
    return build("mlp", seed=seed, **settings)


def with_every_state(seed=0):
    """Running statistics, a count of batches, dropout, and a bottleneck that draws noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval()
    return insert_bottleneck(model, "5", image_shape=SHAPE, width=2, seed=seed)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_clients_share_all_images_once():
    parts = split_clients(43, 4, 0.2, generator=rng())
    sizes = [(len(training), len(validation)) for training, validation in parts]
    assert sizes == [(9, 2), (9, 2), (9, 2), (8, 2)]
    everything = torch.cat([torch.cat(part) for part in parts])
    assert sorted(everything.tolist()) == list(range(43))
    assert everything.tolist() != list(range(43))
    again = split_clients(43, 4, 0.2, generator=rng())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(parts, again, strict=True))
    # the published setting
    parts = split_clients(50_000, 10, 0.1, generator=rng())
    assert {(len(t), len(v)) for t, v in parts} == {(4500, 500)}
    assert all(len(v) == 0 for _, v in split_clients(10, 3, 0.0, generator=rng()))
    for images, share in ((3, 0.1), (8, 0.1), (4, 0.9)):
        with pytest.raises(ValueError, match=rf"share of {share}, got {images}; take fewer"):
            split_clients(images, 4, share, generator=rng())


@pytest.mark.parametrize("defend", [None, "gradients", "upload"])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_rounds_equal_averaging_by_hand(defend, optimiser):
    """Whole-batch steps in float64, so the order of the images does not matter."""
    images, labels = some_data(dtype=torch.float64)
    lr, defense = 0.05, Sign(scaled=True) if defend else None
    federation = Federation(
        clients=3, rounds=3, local_epochs=2, batch_size=100, lr=lr, optimiser=optimiser,
        validation_share=0, defend=defend or "gradients",
    )  # fmt: skip
    model = small_mlp().double()
    result = train_federated(
        model, (images, labels), generator=rng(), federation=federation, defense=defense
    )
    parts = [t for t, _ in split_clients(43, 3, 0.0, generator=rng())]
    assert result.client_images == (15, 14, 14)
    assert result.best_round == 3

    by_hand = small_mlp().double()
    theta = [p.detach().clone() for p in by_hand.parameters()]
    released = lambda tensor: tensor.sign() * tensor.abs().mean()  # noqa: E731
    losses = []
    for _ in range(3):
        mean, total = [torch.zeros_like(p) for p in theta], 0.0
        for rows in parts:
            for p, t in zip(by_hand.parameters(), theta, strict=True):
                p.data.copy_(t)
            first, second = ([torch.zeros_like(t) for t in theta] for _ in range(2))
            for step in (1, 2):
                loss = cross_entropy(by_hand(images[rows]), labels[rows])
                grads = torch.autograd.grad(loss, list(by_hand.parameters()))
                for p, g, m, v in zip(by_hand.parameters(), grads, first, second, strict=True):
                    g = released(g) if defend == "gradients" else g
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    corrected = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                    p.data -= lr * (g if optimiser == "sgd" else corrected)
            total += len(rows) / 43 * loss.item()
            for k, (p, t) in enumerate(zip(by_hand.parameters(), theta, strict=True)):
                update = t - p.detach()
                update = released(update) if defend == "upload" else update
                mean[k] += len(rows) / 43 * (t - update)
        losses.append(total)
        theta = mean
    for p, t in zip(model.parameters(), theta, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=1e-9, atol=1e-11)
        assert p.grad is None
    # the loss as seen in the last local epoch of each round
    torch.testing.assert_close(torch.tensor(result.history["loss"]), torch.tensor(losses).double())


def test_one_client_and_one_round_is_plain_training():
    data, model, plain = some_data(), small_mlp(), small_mlp()
    federation = Federation(clients=1, rounds=1, batch_size=100, lr=0.01, validation_share=0)
    train_federated(model, data, generator=rng(), federation=federation)
    train(plain, data, epochs=1, batch_size=100, lr=0.01, generator=rng())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def losses(*values):
    return [{"validation_loss": float(value)} for value in values]


def test_the_schedule():
    settings = Federation(lr=1.0, lr_patience=2, stop_patience=3, rounds=9)
    history = losses(5, 6, 6, 4, 4, 5)
    rates = [learning_rate(history[:count], settings) for count in range(7)]
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    # a plateau that goes on lowers again and again
    assert learning_rate(losses(1, 2, 2, 2, 2), settings) == 0.25
    assert learning_rate(losses(1, 2, 2, 2, 2), Federation(lr=1.0, lr_patience=0)) == 1
    assert best_round(losses(3, 2, 2, 4)) == 2
    assert not finished(losses(3, 2, 2, 4), settings)
    assert finished(losses(3, 2, 2, 4, 4), settings)
    assert finished(losses(*range(9, 0, -1)), settings)
    assert not finished(losses(1, *range(2, 9)), Federation(stop_patience=0))
    without = [{"loss": 1.0}] * 80
    assert not finished(without, Federation())
    assert learning_rate(without, Federation(lr=1.0)) == 1


def test_the_published_settings():
    assert Federation() == Federation(
        clients=10, rounds=300, local_epochs=1, batch_size=64, lr=1e-3, optimiser="adam",
        validation_share=0.1, lr_patience=15, lr_factor=0.5, stop_patience=40,
    )  # fmt: skip


def test_a_run_stops_early_and_keeps_its_best_round(monkeypatch):
    """Validation losses 3, 1, 2, 2, ...: the second round's weights come back."""
    told, seen = iter([3.0, 1.0] + [2.0] * 20), []

    def measure(model, data):
        seen.append({n: t.clone() for n, t in model.state_dict().items()})
        return leaklib.training_steps.Evaluation(accuracy=0.5, loss=next(told))

    monkeypatch.setattr(leaklib.federated, "measure", measure)
    model = small_mlp()
    federation = Federation(clients=2, lr_patience=2, stop_patience=4)
    result = train_federated(model, some_data(), generator=rng(), federation=federation)
    assert result.best_round == 2
    assert result.history["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert result.history["lr"].tolist() == [1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4]
    assert same(model.state_dict(), seen[1])
    assert not same(model.state_dict(), seen[-1])


def test_validation_is_measured_on_the_images_held_out():
    data, model = some_data(), small_mlp()
    federation = Federation(clients=3, rounds=1, validation_share=0.3)
    row = train_federated(model, data, generator=rng(), federation=federation).history.iloc[0]
    held = torch.cat([v for _, v in split_clients(43, 3, 0.3, generator=rng())])
    expected = evaluate(model, data[0][held], data[1][held])
    assert row["validation_loss"] == pytest.approx(expected.loss)
    assert row["validation_accuracy"] == pytest.approx(expected.accuracy)


def test_buffers_are_averaged():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))
    images, labels = some_data(n=31)
    federation = Federation(clients=2, rounds=1, batch_size=100, validation_share=0)
    train_federated(model, (images, labels), generator=rng(), federation=federation)
    parts = [images[t] for t, _ in split_clients(31, 2, 0.0, generator=rng())]
    assert [len(p) for p in parts] == [16, 15]
    mean = sum(len(p) / 31 * 0.1 * p.mean() for p in parts)
    torch.testing.assert_close(model[0].running_mean, mean.view(1))
    assert model[0].num_batches_tracked == 1
    assert model[0].num_batches_tracked.dtype == torch.int64


# --- killed runs ---------------------------------------------------------------------------------

FEDERATION = Federation(clients=3, rounds=4, batch_size=8, validation_share=0.2)
DEFENSE = Only(["0"], GaussianNoise(0.01))


def whole_run(rounds=4, defend="gradients", **settings):
    model, generator = with_every_state(), rng()
    federation = Federation(**{**vars(FEDERATION), "rounds": rounds, "defend": defend})
    result = train_federated(
        model, some_data(), generator=generator, federation=federation, defense=DEFENSE, **settings
    )
    return model.state_dict(), result, generator.get_state()


def kill_after(batches, monkeypatch):
    forward, count = leaklib.training_steps.forward, iter(range(batches))

    def dying(model, data, rows):
        if model.training and next(count, None) is None:
            raise KeyboardInterrupt
        return forward(model, data, rows)

    monkeypatch.setattr(leaklib.training_steps, "forward", dying)


@pytest.mark.parametrize("defend", ["gradients", "upload"])
@pytest.mark.parametrize("batches", [2, 6, 16])
def test_a_killed_run_ends_with_the_same_bits(batches, defend, tmp_path, monkeypatch):
    """Three clients of two batches: in the first round, between two rounds, within the third."""
    path = tmp_path / "new folder" / "run.pt"
    with monkeypatch.context() as patch:
        kill_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            whole_run(defend=defend, checkpoint=path)
    assert path.exists() == (batches >= 6)
    state, result, generator = whole_run(defend=defend, checkpoint=path)
    expected_state, expected, expected_generator = whole_run(defend=defend)
    assert same(state, expected_state)
    assert torch.equal(generator, expected_generator)
    pd.testing.assert_frame_equal(result.history, expected.history, check_exact=True)
    assert result.best_round == expected.best_round
    with monkeypatch.context() as patch:
        kill_after(0, patch)  # a finished run trains no further
        assert same(whole_run(defend=defend, checkpoint=path)[0], expected_state)


def test_a_finished_run_can_be_extended_and_not_shortened(tmp_path):
    path = tmp_path / "run.pt"
    whole_run(rounds=2, checkpoint=path)
    assert same(whole_run(rounds=4, checkpoint=path)[0], whole_run(rounds=4)[0])
    with pytest.raises(ValueError, match="at round 4, beyond rounds=3: ask for at least 4"):
        whole_run(rounds=3, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"federation": Federation(clients=2, rounds=1, lr=0.02)}, "lr"),
        ({"defense": GaussianNoise(0.2)}, "defense"),
        ({"defense": None}, "defense"),
        ({"data": some_data(seed=5)}, "data"),
        ({"model": small_mlp(seed=5)}, "initial weights"),
        ({"generator": rng(5)}, "generator"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, named, tmp_path):
    def settings():
        return {
            "model": small_mlp(), "data": some_data(), "generator": rng(),
            "federation": Federation(clients=2, rounds=1), "defense": GaussianNoise(0.1),
            "checkpoint": tmp_path / "run.pt",
        }  # fmt: skip

    train_federated(**settings())
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in: {named};"):
        train_federated(**{**settings(), **change})


# --- defenses ------------------------------------------------------------------------------------


def test_a_partial_perturbation_moves_the_layers_before_the_bottleneck_alone():
    """One step of descent: the other layers take the undefended step, bit by bit."""
    states = []
    federation = Federation(
        clients=1, rounds=1, batch_size=100, optimiser="sgd", lr=0.1, validation_share=0
    )
    for noisy in (False, True):
        model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=2)
        defense = partial_perturbation(model, GaussianNoise(1.0), image_shape=SHAPE)
        train_federated(
            model, some_data(), generator=rng(), federation=federation,
            defense=defense if noisy else None,
        )  # fmt: skip
        states.append(model.state_dict())
    plain, defended = states
    moved = {n for n in plain if not torch.equal(plain[n], defended[n])}
    assert moved == {"hidden1.weight", "hidden1.bias"}


def test_the_noise_of_a_defense_is_not_that_of_the_layers_and_never_repeats():
    """Drawn anew for every step, client and round, from a stream apart from the model's."""
    seen = []

    class Spy:
        def __call__(self, shared, *, generator=None):
            seen.append(torch.randn(3, generator=generator))
            assert shared.victims == 1
            return shared

    model = insert_bottleneck(small_mlp(), image_shape=SHAPE, width=2)
    noises = []
    keep = lambda *_: noises.append(torch.random.get_rng_state())  # noqa: E731
    model.fc.bottleneck.register_forward_pre_hook(keep)
    train_federated(model, some_data(), generator=rng(), federation=FEDERATION, defense=Spy())
    drawn = torch.stack(seen)
    assert len(drawn) == 4 * 3 * 2
    assert len(drawn.unique(dim=0)) == len(drawn)
    for state in noises:
        twin = torch.Generator()
        twin.set_state(state)
        assert not (drawn == torch.randn(3, generator=twin)).all(1).any()


@pytest.mark.parametrize("defense", [None, Prune(0.5, scope="tensor"), GaussianNoise(1e-3)])
def test_it_learns_the_embedded_digits(defense):
    model = build("mlp", input_shape=(1, 8, 8), hidden=(32,))
    model = insert_bottleneck(model, image_shape=(1, 8, 8), width=16)
    federation = Federation(clients=4, rounds=12, lr=1e-2, lr_patience=0)
    digits = load_images("digits", split="train")
    result = train_federated(
        model, digits, generator=rng(), federation=federation, defense=defense
    )
    assert len(result.history) == 12
    held_out = load_images("digits", split="test")
    measured = evaluate(model, held_out.images, held_out.labels, draws=3, generator=rng())
    assert measured.accuracy > 0.85


def test_only_the_generator_decides():
    states = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        model = with_every_state()
        federation = Federation(clients=2, rounds=2)
        train_federated(model, some_data(), generator=rng(seed), federation=federation)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not model.training
        states.append(model.state_dict())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "expected clients.* got 0, 300"),
        ({"lr": math.inf}, "finite lr > 0"),
        ({"lr_factor": 1.5}, "lr_factor <= 1"),
        ({"validation_share": 1.0}, r"validation_share in \[0, 1\)"),
        ({"stop_patience": -1}, "stop_patience >= 0"),
        ({"optimiser": "lbfgs"}, "optimiser among adam, sgd"),
        ({"defend": "images"}, "'gradients' or 'upload', got 'adam' and 'images'"),
    ],
)
def test_bad_settings_say_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        Federation(**change)


def test_bad_input_says_what_to_do():
    for change, message in (
        ({"data": (torch.rand(9, 4, 4), torch.zeros(9).long())}, r"data: .*\(9, 4, 4\)"),
        ({"model": small_mlp().requires_grad_(False)}, "unfreeze one"),
        ({"data": some_data(n=12)}, "got 12; take fewer clients"),
        ({"defense": Only(["conv9"], Sign())}, "'conv9'"),
    ):
        settings = {"model": small_mlp(), "data": some_data(n=200), "generator": rng()}
        with pytest.raises(ValueError, match=message):
            train_federated(**{**settings, **change})


def test_a_diverging_run_stops():
    settings = {"generator": rng(), "federation": Federation(clients=2, lr=1e30, optimiser="sgd")}
    with pytest.raises(FloatingPointError, match=r"in round \d: lower lr=1e\+30"):
        train_federated(small_mlp(activation="relu"), some_data(), **settings)


def test_progress_on_request(capsys):
    settings = {"federation": Federation(clients=2, rounds=2, batch_size=10), "generator": rng()}
    train_federated(small_mlp(), some_data(), **settings)
    assert capsys.readouterr().err == ""
    train_federated(small_mlp(), some_data(), progress=True, **settings)
    shown = capsys.readouterr().err
    assert "round 2 of 2" in shown
    assert "8/8" in shown


def test_a_weight_of_two_layers_is_released_under_both_names():
    """Otherwise the second name brings the undefended weight back."""

    def trained(defense):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        model[3].weight = model[1].weight
        model.append(nn.Linear(64, 3))
        images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        train_federated(
            model, (images, torch.arange(12) % 3),
            generator=torch.Generator().manual_seed(2), defense=defense,
            federation=Federation(clients=2, rounds=1, validation_share=0, defend="upload"),
        )  # fmt: skip
        return model[1].weight.detach()

    assert (trained(GaussianNoise(10.0)) - trained(None)).abs().mean() > 1
