"""Attacks on a model that draws noise: the ignored part, the attacker's own noise, the score."""

import pytest
import torch
import torch.nn.functional as F
from bottleneck_reference import naive_loss
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import (
    AdamSettings,
    Matching,
    RunSettings,
    adam,
    analytic,
    dlg,
    expected_probabilities,
    ignore_stochastic,
    invert_gradients,
    lbfgs,
)
from leaklib.attacks.attacker_noise import SCORING, attacker_noise
from leaklib.attacks.problem import matching_problem
from leaklib.defenses import Prune, attack_layers, insert_bottleneck
from leaklib.gradients import FedAvg, share_gradient

SHAPE = (1, 8, 8)
DTYPE = torch.float64
NOISE = "fc.bottleneck.noise"
KEPT = ("hidden1.weight", "hidden1.bias")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bottled(model=None, **settings):
    settings = {"width": 5, "kl_weight": 0.3} | settings
    return insert_bottleneck(model or small_mlp(), image_shape=SHAPE, **settings)


def shared_by(model, victims, **settings):
    return share_gradient(model, victims, generator=seeded(2), **settings)


def problem_of(model, shared, labels, matching, *, restarts=1, seed=11, chunk=None):
    problem = matching_problem(
        model, shared, image_shape=SHAPE, labels=labels, classes=10, restarts=restarts,
        matching=matching, loss=F.cross_entropy, noise_seed=seed, chunk=chunk,
    )  # fmt: skip
    x = torch.rand(shared.victims * restarts, 64, generator=seeded(4), dtype=DTYPE)
    return problem, x


def by_hand(model, shared, x, label, noise, *, names, victim, beta, support=False):
    """1 − cos over `names` and its slope, by double backward with this noise."""
    image = x.view(1, *SHAPE).clone().requires_grad_()
    loss = naive_loss(model, image, label, noise, beta=beta)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [params[n] for n in names], create_graph=True)
    mine = torch.cat([g.flatten() for g in grads])
    theirs = torch.cat([shared.tensors[n][victim].flatten() for n in names])
    if support:
        mine = mine[theirs != 0]
        theirs = theirs[theirs != 0]
    value = 1 - torch.cosine_similarity(mine, theirs, dim=0)
    return value.detach(), torch.autograd.grad(value, image)[0].flatten()


CASES = {
    "all layers": Matching("cosine"),
    "ignore": Matching("cosine", layers=KEPT),
    "no divergence": Matching("cosine", extra_losses=False),
    "support": Matching("cosine", layers=KEPT, support=True),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("chunk", [None, 1])
def test_objective_and_slope_equal_double_backward_with_the_same_noise(case, chunk):
    matching, model, victims = CASES[case], bottled(), random_victims(victims=2)
    shared = shared_by(model, victims)
    if matching.support:
        shared = Prune(0.7, scope="tensor")(shared)
    problem, x = problem_of(model, shared, victims.labels, matching, restarts=2, chunk=chunk)
    rows = torch.tensor([0, 1, 3])
    noise = attacker_noise(model, 1, seed=11)(rows, 70)[NOISE]
    assert noise.shape == (3, 1, 1, 5)
    value, slope = problem.evaluate(x[rows], rows, 70)
    for i, row in enumerate(rows.tolist()):
        expected = by_hand(
            model, shared, x[row], victims.labels[row // 2], noise[i, 0], victim=row // 2,
            names=matching.layers or shared.names, beta=0.3 if matching.extra_losses else 0.0,
            support=matching.support,
        )  # fmt: skip
        torch.testing.assert_close(value[i], expected[0], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(slope[i], expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("distance", ["l2", "cosine", "layer_cosine"])
def test_the_cost_of_the_ignore_attack_does_not_depend_on_the_ignored_entries(distance):
    model, victims = bottled(), random_victims(victims=2)
    shared = shared_by(model, victims)
    other = shared.replace(
        {n: t if n in KEPT else torch.randn_like(t) for n, t in shared.items()}
    )
    matching = Matching(distance, layers=attack_layers(model, image_shape=SHAPE))
    values = []
    for one in (shared, other):
        problem, x = problem_of(model, one, victims.labels, matching)
        values.append(problem.evaluate(x, torch.arange(2), 3))
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])


@pytest.mark.parametrize("distance", ["l2", "cosine", "layer_cosine"])
def test_support_gives_the_derivative_of_its_value(distance):
    model, victims = bottled(), random_victims(victims=2)
    shared = Prune(0.8, scope="tensor")(shared_by(model, victims))
    problem, x = problem_of(model, shared, victims.labels, Matching(distance, support=True))
    direction = torch.randn(x.shape, generator=seeded(), dtype=DTYPE)
    rows, h = torch.arange(2), 1e-6
    up = problem.evaluate(x + h * direction, rows)[0]
    down = problem.evaluate(x - h * direction, rows)[0]
    slope = (problem.evaluate(x, rows)[1] * direction).sum(1)
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-5, atol=1e-8)


def test_at_the_private_image_the_support_of_a_pruned_gradient_matches():
    model, victims = small_mlp(), random_victims(victims=2)
    pruned = Prune(0.9, scope="tensor")(share_gradient(model, victims))
    for support, zero in ((True, True), (False, False)):
        problem, _ = problem_of(
            model, pruned, victims.labels, Matching("l2", support=support), seed=None
        )
        value = problem.evaluate(victims.images.flatten(1), torch.arange(2))[0]
        assert bool((value < 1e-25).all()) == zero


class TestNoise:
    def test_it_is_standard_normal_and_different_everywhere(self):
        draw = attacker_noise(bottled(width=50), 1, steps=2, seed=5)
        noise = torch.stack([draw(torch.arange(20), t)[NOISE] for t in range(100)])
        assert noise.shape == (100, 20, 2, 1, 50)
        assert abs(float(noise.mean())) < 0.01
        assert abs(float(noise.std()) - 1) < 0.01
        assert len(noise.unique()) == noise.numel()

    def test_a_rows_noise_depends_on_seed_row_and_evaluation_alone(self):
        model = bottled()
        draw = attacker_noise(model, 1, seed=5)
        late = draw(torch.tensor([3, 8]), 1000)[NOISE]
        draw(torch.arange(9), 0)
        assert torch.equal(draw(torch.tensor([8]), 1000)[NOISE][0], late[1])
        again = attacker_noise(model, 1, seed=5)
        assert torch.equal(again(torch.tensor([8]), 1000)[NOISE][0], late[1])
        other = attacker_noise(model, 1, seed=6)
        assert not torch.equal(other(torch.tensor([8]), 1000)[NOISE][0], late[1])
        assert not torch.equal(draw(torch.tensor([8]), SCORING)[NOISE][0], late[1])

    def test_float32_has_the_same_noise_rounded(self):
        rows = torch.arange(2)
        wide = attacker_noise(bottled(), 1, seed=5)(rows, 9)[NOISE]
        narrow = attacker_noise(bottled().float(), 1, seed=5)(rows, 9)[NOISE]
        assert torch.equal(narrow, wide.float())

    def test_a_deterministic_model_has_none(self):
        assert attacker_noise(small_mlp(), 1, seed=None) is None
        assert attacker_noise(bottled(sampling="training"), 1, seed=None) is None
        with pytest.raises(ValueError, match="noise_seed"):
            attacker_noise(bottled(), 1, seed=None)


def attack(model, shared, labels, *, steps=12, seed=3, **settings):
    return invert_gradients(
        model, shared, image_shape=SHAPE, generator=seeded(seed), labels=labels,
        optimiser=AdamSettings(steps=steps, milestones=()), **settings,
    )  # fmt: skip


class TestSearch:
    def test_adam_meets_fresh_noise_at_every_evaluation(self):
        model, victims = bottled(), random_victims(victims=2)
        shared = shared_by(model, victims)
        problem, x = problem_of(model, shared, victims.labels, Matching("cosine"))
        settings = AdamSettings(steps=5, milestones=())
        state, rows = adam.start(x, settings), torch.arange(2)
        expected = torch.full((2,), torch.inf, dtype=DTYPE)
        for number in range(5):
            expected = torch.minimum(expected, problem.evaluate(state.x, rows, number)[0])
            adam.tick(state, problem.at(state.evaluations), settings)
            torch.testing.assert_close(state.best_value, expected, rtol=0, atol=0)

    def test_the_objective_is_the_mean_over_noises_that_the_search_has_not_met(self):
        model, victims = bottled(), random_victims(victims=2)
        shared = shared_by(model, victims)
        lucky = attack(model, shared, victims.labels, matching=Matching("cosine", score_noises=0))
        found = attack(model, shared, victims.labels, matching=Matching("cosine", score_noises=6))
        assert torch.equal(found.images, lucky.images)
        assert found.evaluations.tolist() == [18, 18]
        assert lucky.evaluations.tolist() == [12, 12]
        generator = seeded(3)
        seed = int(torch.randint(2**62, (), generator=generator))
        problem, _ = problem_of(model, shared, victims.labels, Matching("cosine"), seed=seed)
        values = [
            problem.evaluate(found.images.flatten(1), torch.arange(2), SCORING + i)[0]
            for i in range(6)
        ]
        torch.testing.assert_close(found.objective, torch.stack(values).mean(0))
        assert bool((found.objective > lucky.objective).all()), "the single best value was luck"

    def test_the_first_victim_does_not_depend_on_how_many_follow(self):
        model, victims = bottled(), random_victims(victims=3)
        shared = shared_by(model, victims)
        together = attack(model, shared, victims.labels)
        one = shared.replace({n: t[:1] for n, t in shared.items()})
        alone = attack(model, one, victims.labels[:1])
        torch.testing.assert_close(alone.images[0], together.images[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(alone.objective[0], together.objective[0])

    @pytest.mark.parametrize("method", ["adam", "lbfgs"])
    def test_an_interrupted_run_resumes_with_the_same_noise(self, method, tmp_path, monkeypatch):
        model, victims = bottled(), random_victims(victims=2)
        shared = shared_by(model, victims)

        def run(checkpoint=None):
            settings = {"run": RunSettings(checkpoint=checkpoint, checkpoint_seconds=0)}
            if method == "adam":
                return attack(model, shared, victims.labels, restarts=2, **settings)
            return dlg(
                model, shared, image_shape=SHAPE, generator=seeded(3), labels=victims.labels,
                max_evaluations=12, restarts=2, **settings,
            )  # fmt: skip

        whole = run()
        module = {"adam": adam, "lbfgs": lbfgs}[method]
        ticks, original = iter(range(100)), module.tick

        def stopping(*args, **settings):
            if next(ticks) == 5:
                raise KeyboardInterrupt
            return original(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(module, "tick", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run.pt")
        resumed = run(tmp_path / "run.pt")
        assert torch.equal(resumed.images, whole.images)
        assert torch.equal(resumed.objective, whole.objective)
        assert torch.equal(resumed.history, whole.history)

    def test_lbfgs_keeps_the_noise_of_its_row(self):
        model, victims = bottled(), random_victims(victims=2)
        shared = shared_by(model, victims)
        settings = {"image_shape": SHAPE, "generator": seeded(3), "labels": victims.labels}
        found = dlg(
            model, shared, max_evaluations=40, matching=Matching(score_noises=0), **settings
        )
        seed = int(torch.randint(2**62, (), generator=seeded(3)))
        problem, _ = problem_of(model, shared, victims.labels, Matching(), seed=seed)
        value = problem.evaluate(found.images.flatten(1), torch.arange(2))[0]
        torch.testing.assert_close(found.objective, value)
        assert bool((found.history[1:] <= found.history[:-1]).all())

    def test_a_deterministic_model_keeps_its_stream(self):
        model, victims = small_mlp(), random_victims(victims=2)
        shared = share_gradient(model, victims)
        ours, theirs = seeded(3), seeded(3)
        invert_gradients(
            model, shared, image_shape=SHAPE, generator=ours, labels=victims.labels,
            optimiser=AdamSettings(steps=1),
        )  # fmt: skip
        torch.randn(2, 64, generator=theirs)
        assert torch.equal(ours.get_state(), theirs.get_state())

    @pytest.mark.parametrize("protocol", [None, FedAvg(2, 0.1)])
    def test_convolutional_bottleneck_and_local_steps(self, protocol):
        model = insert_bottleneck(small_lenet(), "conv2", image_shape=SHAPE, kind="cvb")
        victims = random_victims(victims=2, batch=2)
        shared = shared_by(model, victims, protocol=protocol)
        found = attack(model, shared, victims.labels, steps=3)
        assert found.images.shape == (2, 2, *SHAPE)
        assert torch.isfinite(found.objective).all()


def test_ignoring_the_noise_finds_what_the_noise_hides():
    model, victims = bottled(width=64, kl_weight=1e-3), random_victims(victims=3)
    shared = shared_by(model, victims)
    steps = AdamSettings(lr=0.05, steps=400)
    errors = {}
    for preset in ("all", "ignore_bottleneck_and_after", "ignore_decoder_and_after"):
        found = ignore_stochastic(
            model, shared, image_shape=SHAPE, generator=seeded(), labels=victims.labels,
            preset=preset, optimiser=steps, matching=Matching("cosine"),
        )  # fmt: skip
        errors[preset] = float((found.images - victims.images).square().mean())
    assert errors["ignore_bottleneck_and_after"] < 0.2 * errors["all"], errors
    assert errors["ignore_decoder_and_after"] < 0.5 * errors["all"], errors


def test_the_first_layer_tells_the_image_in_spite_of_the_bottleneck():
    model, victims = bottled(), random_victims(victims=4)
    found = analytic(model, shared_by(model, victims), image_shape=SHAPE)
    torch.testing.assert_close(found.images, victims.images, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.labels, victims.labels)


def test_expected_probabilities_average_over_noise_too():
    model = bottled()
    first = expected_probabilities(model, SHAPE, generator=seeded())
    torch.manual_seed(9)
    assert torch.equal(expected_probabilities(model, SHAPE, generator=seeded()), first)
    torch.testing.assert_close(first.sum(), torch.tensor(1.0, dtype=DTYPE))


class TestBadInput:
    def test_settings(self):
        with pytest.raises(ValueError, match="score_noises >= 0"):
            Matching(score_noises=-1)

    def test_no_bottleneck_or_nothing_shared_before_it(self):
        model, victims = small_mlp(), random_victims()
        settings = {"image_shape": SHAPE, "generator": seeded(), "labels": victims.labels}
        with pytest.raises(ValueError, match="one bottleneck, got none"):
            ignore_stochastic(model, share_gradient(model, victims), **settings)
        model = bottled()
        shared = shared_by(model, victims, layers=["fc"])
        with pytest.raises(ValueError, match="choose another preset"):
            ignore_stochastic(model, shared, **settings)

    def test_a_gradient_that_is_not_finite(self):
        model, victims = bottled(), random_victims()
        shared = shared_by(model, victims)
        shared.tensors["hidden1.weight"][1, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="'hidden1.weight' of victim 1"):
            ignore_stochastic(
                model, shared, image_shape=SHAPE, generator=seeded(), labels=victims.labels
            )

    def test_an_image_of_another_shape(self):
        model, victims = bottled(), random_victims()
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            ignore_stochastic(
                model, shared_by(model, victims), image_shape=(1, 9, 9), generator=seeded(),
                labels=victims.labels,
            )  # fmt: skip


@pytest.mark.gpu
def test_device_follows_the_model():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, victims = bottled(), random_victims(victims=2)
    shared = shared_by(model, victims)
    there = shared_by(model.cuda(), victims.to("cuda"))  # noise by the same CPU generator
    for name, tensor in there.items():
        torch.testing.assert_close(tensor.cpu(), shared.tensors[name], rtol=1e-9, atol=1e-12)
    problem, x = problem_of(model, there, victims.labels.cuda(), Matching("cosine"))
    value, _ = problem.evaluate(x.cuda(), torch.arange(2).cuda(), 7)
    model.cpu()
    problem, x = problem_of(model, shared, victims.labels, Matching("cosine"))
    torch.testing.assert_close(value.cpu(), problem.evaluate(x, torch.arange(2), 7)[0])
