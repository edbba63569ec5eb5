"""CPU milliseconds of one gradient-matching step, by two ways, in one run.

    python tests/benchmarks/ghost_cost.py [--victims 16] [--rounds 5] [--steps 10]
                                          [--networks mlp cnn resnet18 vit]

The reference does what the published code does: one victim at a time, the gradient of all
parameters with its graph, double backward by autograd. Ours works from activations, for all
victims at once; it is measured without a defense and with noise on every gradient, which leaves
dense targets. The generic problem of this library stands beside. Speed is reported as a ratio,
never asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from leaklib.attacks import Matching
from leaklib.attacks.ghost_matching import ghost_problem
from leaklib.attacks.priors import total_variation
from leaklib.attacks.problem import matching_problem
from leaklib.data import Victims
from leaklib.defenses import GaussianNoise
from leaklib.gradients import share_gradient
from leaklib.models import build

SHAPE = (3, 32, 32)
TV_WEIGHT = 1e-6


def seconds(work, times):
    begin = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begin) / times


def published_step(model, shared, label, image):
    """Cost and image gradient of the first victim by double backward."""
    names, params = zip(*model.named_parameters(), strict=True)
    target = [shared.tensors[n][0] for n in names]
    image = image.clone().requires_grad_()
    grads = torch.autograd.grad(F.cross_entropy(model(image), label), params, create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(grads, target, strict=True))
    norm = sum(g.square().sum() for g in grads).sqrt()
    fixed = sum(t.square().sum() for t in target).sqrt()
    cost = 1 - inner / (norm * fixed) + TV_WEIGHT * total_variation(image)
    return cost.detach(), torch.autograd.grad(cost, image)[0]


def measure(network, name, model, shared, labels, start, rounds, steps):
    """Check that the three agree, time them in turn, print medians."""
    settings = {
        "image_shape": SHAPE, "labels": labels, "restarts": 1,
        "matching": Matching("cosine", tv_weight=TV_WEIGHT), "loss": F.cross_entropy,
    }  # fmt: skip
    ghost = ghost_problem(model, shared, **settings)
    generic = matching_problem(model, shared, **settings, classes=10)
    victims = len(start)
    x, every = ghost.pack({"images": start}), torch.arange(victims)
    value, gradient = ghost.evaluate(x, every)
    expected, slope = published_step(model, shared, labels[0], start[0])
    torch.testing.assert_close(value[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[0], slope.flatten(), rtol=1e-3, atol=1e-8)

    ours, library, published = [], [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: ghost.evaluate(x, every), steps) / victims)
        library.append(seconds(lambda: generic.evaluate(x, every), 1) / victims)
        published.append(
            seconds(lambda: published_step(model, shared, labels[0], start[0]), steps)
        )
    ratios = [b / a for a, b in zip(ours, published, strict=True)]
    print(
        f"{network} {victims} victims, {name}  ours {1e3 * statistics.median(ours):.2f} ms a "
        f"picture and step   generic {1e3 * statistics.median(library):.1f}   one at a time "
        f"{1e3 * statistics.median(published):.1f}   ratio {statistics.median(ratios):.0f} "
        f"({min(ratios):.0f} to {max(ratios):.0f})"
    )


OPTIONS = {"resnet18": {"norm": "group", "stem": "imagenet"}}


def main(network, victims, rounds, steps):
    model = build(network, normalisation="cifar10-precode", seed=1, **OPTIONS.get(network, {}))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(victims, 1, *SHAPE, generator=generator)
    labels = torch.randint(10, (victims, 1), generator=generator)
    start = torch.rand(images.shape, generator=generator)
    plain = share_gradient(model, Victims(images, labels))
    noisy = GaussianNoise(1e-3)(plain, generator=generator)
    for name, shared in (("no defense", plain), ("noise", noisy)):
        measure(network, name, model, shared, labels, start, rounds, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn", "resnet18", "vit"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for network in chosen.networks:
        main(network, chosen.victims, chosen.rounds, chosen.steps)
