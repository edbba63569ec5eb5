"""Evaluations per CPU-second: victims together against one victim at a time, in one run.

    python tests/benchmarks/attack_throughput.py [--device cuda] [--victims 16]

The reference is what every published code does: a Python loop over victims, double backward
through the distance, torch's own optimiser. Both sides count one evaluation as one objective with
its image gradient. Speed is reported as a ratio of two medians from the same run, never asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from leaklib.attacks import Matching, lbfgs
from leaklib.attacks.problem import matching_problem
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.models import build

CASES = {
    "lenet": ({"classes": 100, "init": "uniform"}, "l2", 30),
    "convnet": ({}, "cosine", 1),
    "resnet18": ({}, "cosine", 1),
}


def clock(device):
    """CPU seconds of this process; wall seconds where a GPU does the work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work, device):
    begin = clock(device)
    work()
    return clock(device) - begin


def loop_objective(model, parameters, target, image, label, distance):
    """One evaluation as the published codes write it."""
    loss = F.cross_entropy(model(image), label)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    if distance == "l2":
        return sum(((g - t) ** 2).sum() for g, t in zip(grads, target, strict=True))
    inner = sum((g * t).sum() for g, t in zip(grads, target, strict=True))
    norm = sum((g * g).sum() for g in grads).sqrt()
    return 1 - inner / (norm * sum((t * t).sum() for t in target).sqrt())


def compare(name, victims, device, rounds):
    options, distance, repeats = CASES[name]
    model = build(name, **options).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(victims, 1, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (victims, 1), generator=generator).to(device)
    shared = share_gradient(model, Victims(images, labels))
    problem = matching_problem(
        model, shared, image_shape=(3, 32, 32), labels=labels, classes=10,
        matching=Matching(distance), restarts=1, loss=F.cross_entropy,
    )  # fmt: skip
    start = torch.rand(victims, 3 * 32 * 32, generator=generator).to(device)
    rows = torch.arange(victims, device=device)
    parameters = list(model.parameters())
    targets = [[t[i] for t in shared.tensors.values()] for i in range(victims)]

    def together():
        for _ in range(repeats):
            problem.evaluate(start, rows)

    def alone():
        for victim in range(min(victims, 4)):
            image = start[victim].view(1, 3, 32, 32).clone().requires_grad_()
            for _ in range(repeats):
                objective = loop_objective(
                    model, parameters, targets[victim], image, labels[victim], distance
                )
                torch.autograd.grad(objective, image)

    report(name, "evaluation", together, alone, victims, repeats, device, rounds)
    if name != "lenet":
        return

    def together_attack():
        state = lbfgs.start(start, history=100)
        while int(state.evaluations.sum()) < 5 * repeats * victims:
            lbfgs.tick(state, problem.evaluate)

    def alone_attack():
        for victim in range(min(victims, 4)):
            image = start[victim].view(1, 3, 32, 32).clone().requires_grad_()
            spent = 0
            optimiser = torch.optim.LBFGS(
                [image], lr=1, max_iter=10**6, max_eval=5 * repeats, history_size=100,
                tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
            )  # fmt: skip

            def closure(image=image, victim=victim, optimiser=optimiser):
                nonlocal spent
                spent += 1
                optimiser.zero_grad()
                objective = loop_objective(
                    model, parameters, targets[victim], image, labels[victim], distance
                )
                (image.grad,) = torch.autograd.grad(objective, image)
                return objective

            while spent < 5 * repeats:
                optimiser.step(closure)

    report(name, "L-BFGS attack", together_attack, alone_attack, victims, 5 * repeats, device,
           rounds)  # fmt: skip


def report(name, what, together, alone, victims, evaluations, device, rounds):
    """Alternate the two sides, so that a drift of the machine's speed hits both."""
    together(), alone()
    ratios, ours, theirs = [], [], []
    for _ in range(rounds):
        ours.append(victims * evaluations / seconds(together, device))
        theirs.append(min(victims, 4) * evaluations / seconds(alone, device))
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"{name:9s} {what:13s} together {statistics.median(ours):8.1f}/s   one at a time "
        f"{statistics.median(theirs):8.1f}/s   ratio {statistics.median(ratios):5.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{arguments.victims} victims, {arguments.device}, torch {torch.__version__}, 1 thread")
    for network in arguments.networks:
        compare(network, arguments.victims, torch.device(arguments.device), arguments.rounds)
