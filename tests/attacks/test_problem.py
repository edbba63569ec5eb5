import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_victims, residual_network, small_lenet

from leaklib.attacks import Matching
from leaklib.attacks.priors import total_variation
from leaklib.attacks.problem import matching_problem
from leaklib.gradients import FedAvg, batchnorm_statistics, share_gradient

SHAPE = (1, 8, 8)


def problem_and_point(model, shared, *, labels=None, matching=None, restarts=1, chunk=None):
    problem = matching_problem(
        model, shared, image_shape=SHAPE, labels=labels, classes=10,
        matching=matching or Matching(), restarts=restarts, loss=F.cross_entropy, chunk=chunk,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    rows = shared.victims * restarts
    variables = {
        "images": torch.randn(rows, shared.batch, *SHAPE, generator=generator, dtype=torch.float64)
    }
    if labels is None:
        variables["label_logits"] = torch.randn(
            rows, shared.batch, 10, generator=generator, dtype=torch.float64
        )
    return problem, variables


def naive(model, shared, variables, *, labels, matching, row, victim):
    """One row by plain double backward."""
    leaves = {n: v[row].clone().requires_grad_() for n, v in variables.items()}
    label = leaves["label_logits"].softmax(-1) if labels is None else labels[victim]
    twin = copy.deepcopy(model)
    loss = F.cross_entropy(twin(leaves["images"]), label, reduction=shared.reduction)
    params = dict(twin.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    grads = dict(zip(params, grads, strict=True))
    kept = [
        n
        for n in shared.tensors
        if matching.layers is None or any(n.startswith(x) for x in matching.layers)
    ]
    mine = torch.cat([grads[n].flatten() for n in kept])
    theirs = torch.cat([shared.tensors[n][victim].flatten() for n in kept])
    if matching.distance == "l2":
        objective = (mine - theirs).square().sum()
    else:
        objective = 1 - torch.cosine_similarity(mine, theirs, dim=0)
    objective = objective + matching.tv_weight * total_variation(leaves["images"])
    if matching.bn_weight:
        for name, (mean, var) in batchnorm_statistics(twin, leaves["images"]).items():
            known_mean, known_var = (part[victim] for part in shared.statistics[name])
            distance = (mean - known_mean).norm() + (var - known_var).norm()
            objective = objective + matching.bn_weight * distance
    slopes = torch.autograd.grad(objective, list(leaves.values()))
    return objective.detach(), torch.cat([s.flatten() for s in slopes])


CASES = {
    "l2, joint label": (Matching("l2"), False),
    "l2, known label": (Matching("l2"), True),
    "cosine, TV": (Matching("cosine", tv_weight=0.3), True),
    "masked": (Matching("cosine", layers=("conv1", "fc.bias")), True),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_objective_and_gradient_equal_naive_double_backward(case, batch, chunk):
    matching, known = CASES[case]
    model, victims = small_lenet(), random_victims(batch=batch)
    shared = share_gradient(model, victims, reduction="sum")
    labels = victims.labels if known else None
    problem, variables = problem_and_point(
        model, shared, labels=labels, matching=matching, restarts=2, chunk=chunk
    )
    rows = torch.tensor([0, 1, 2, 4, 5])
    value, gradient = problem.evaluate(problem.pack(variables)[rows], rows)
    for i, row in enumerate(rows.tolist()):
        expected, slope = naive(
            model, shared, variables, labels=labels, matching=matching, row=row, victim=row // 2
        )
        torch.testing.assert_close(value[i], expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(gradient[i], slope, rtol=1e-8, atol=1e-11)


def test_batchnorm_prior_in_train_mode_equals_naive():
    model, victims = residual_network().train(), random_victims(batch=3)
    shared = share_gradient(model, victims, statistics=True)
    matching = Matching("cosine", bn_weight=0.7)
    problem, variables = problem_and_point(model, shared, labels=victims.labels, matching=matching)
    rows = torch.arange(3)
    value, gradient = problem.evaluate(problem.pack(variables), rows)
    for row in range(3):
        expected, slope = naive(
            model, shared, variables, labels=victims.labels, matching=matching, row=row, victim=row
        )
        torch.testing.assert_close(value[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient[row], slope, rtol=1e-8, atol=1e-10)


def test_without_shared_statistics_the_running_ones_serve():
    model, victims = residual_network(), random_victims(batch=2)
    shared = share_gradient(model, victims)
    plain, variables = problem_and_point(model, shared, labels=victims.labels)
    prior, _ = problem_and_point(
        model, shared, labels=victims.labels, matching=Matching("l2", bn_weight=2.0)
    )
    x, rows = plain.pack(variables), torch.arange(3)
    ((_, (mean, var)),) = batchnorm_statistics(model, variables["images"][1]).items()
    norm = model[2].norm
    expected = 2 * ((mean - norm.running_mean).norm() + (var - norm.running_var).norm())
    gained = prior.evaluate(x, rows)[0][1] - plain.evaluate(x, rows)[0][1]
    torch.testing.assert_close(gained, expected.detach(), rtol=1e-9, atol=1e-11)
    lenet = small_lenet()
    with pytest.raises(ValueError, match="BatchNorm"):
        problem_and_point(
            lenet, share_gradient(lenet, victims), labels=victims.labels,
            matching=Matching(bn_weight=1.0),
        )  # fmt: skip


def test_layer_weights_scale_their_layer_and_zero_masks_it():
    model, victims = small_lenet(), random_victims()
    shared = share_gradient(model, victims)

    def value(**settings):
        problem, variables = problem_and_point(
            model, shared, labels=victims.labels, matching=Matching("l2", **settings)
        )
        return problem.evaluate(problem.pack(variables), torch.arange(3))[0]

    conv = value(layers=("conv1", "conv2", "conv3"))
    fc = value(layers=("fc",))
    torch.testing.assert_close(value(), conv + fc)
    torch.testing.assert_close(value(layer_weights={"fc": 3.0}), conv + 3 * fc)
    torch.testing.assert_close(value(layer_weights={"fc": 0.0}), conv)


@pytest.mark.parametrize("steps", [1, 3])
def test_fedavg_update_of_the_private_image_has_objective_zero(steps):
    model, victims = small_lenet(), random_victims(batch=2)
    shared = share_gradient(model, victims, protocol=FedAvg(steps, 0.2))
    problem, variables = problem_and_point(model, shared, labels=victims.labels)
    truth = problem.pack({"images": victims.images})
    value, gradient = problem.evaluate(truth, torch.arange(3))
    assert float(value.max()) < 1e-25
    assert float(gradient.abs().max()) < 1e-12
    # And the gradient there and elsewhere is that of the objective: finite differences.
    x = problem.pack(variables)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    h = 1e-6
    up = problem.evaluate(x + h * direction, torch.arange(3))[0]
    down = problem.evaluate(x - h * direction, torch.arange(3))[0]
    slope = (problem.evaluate(x, torch.arange(3))[1] * direction).sum(1)
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-5, atol=1e-8)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"l2, cosine, layer_cosine.*'l3'"):
        Matching("l3")
    with pytest.raises(ValueError, match="tv_weight >= 0"):
        Matching(tv_weight=-1.0)
    model, victims = small_lenet(), random_victims()
    shared = share_gradient(model, victims)
    with pytest.raises(ValueError, match="'conv9'.*known"):
        problem_and_point(model, shared, matching=Matching(layers=("conv9",)))
    with pytest.raises(ValueError, match="weight >= 0"):
        problem_and_point(model, shared, matching=Matching(layer_weights={"fc": -1.0}))
