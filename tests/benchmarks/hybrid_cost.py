"""CPU milliseconds of one step of the hybrid attack's correction, against a dense one, in one run.

    python tests/benchmarks/hybrid_cost.py [--victims 16] [--rounds 3] [--network cnn2_c1]

The reference does what the published code does for the layer next to the image: the rows U as a
dense float64 matrix, one victim at a time, double backward by autograd. The published code also
copies U in every step; a second reference does, too. Speed is reported as ratios, never asserted.
Memory is the growth of the process's peak.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from leaklib.attacks.hybrid import PUBLISHED
from leaklib.attacks.hybrid.correction import layer_problem
from leaklib.attacks.recursive.descent import descend
from leaklib.attacks.recursive.opening import open_recursion
from leaklib.attacks.recursive.steps import StepSettings
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.layer_system.block import gradient_block
from leaklib.layer_system.published import weight_matrix
from leaklib.layer_system.split import CUTOFF
from leaklib.models import build
from leaklib.peak_memory import peak_memory_mib

SHAPE = (3, 32, 32)


def seconds(work):
    begin = time.process_time()
    work()
    return time.process_time() - begin


def dense_step(model, shared, rows, victim, *, copied):
    """One evaluation of J and its slope for one victim, with a dense U, copied first or not."""
    system, target = rows.system, rows.target
    channels = SHAPE[0]
    block = gradient_block(system.geometry, system.preactivation_grad[[victim]])[0, 0]
    k_rows = torch.block_diag(*[block] * channels)
    matrix = torch.cat([weight_matrix(system.geometry, system.weight), k_rows])
    grad = (target[1][victim] / system.scale[victim]).movedim(1, 0).flatten()
    right = torch.cat([target[0][victim].flatten(), grad])
    names, params = zip(*model.named_parameters(), strict=True)
    goal = [shared.tensors[n][victim] for n in names]
    label = rows.label[[victim]]
    weights = PUBLISHED[0]

    def step():
        image = rows.value[victim].to(shared.dtype)[None].requires_grad_()
        loss = F.cross_entropy(model(image), label)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        total = 0
        for g, t in zip(grads, goal, strict=True):
            total = total + weights.cosine * (1 - (g * t).sum() / (g.norm() * t.norm()))
        total = total + weights.tv * (image[..., 1:, :] - image[..., :-1, :]).abs().mean()
        total = total + weights.tv * (image[..., 1:] - image[..., :-1]).abs().mean()
        used = matrix.clone() if copied else matrix
        misfit = used @ image.double().flatten() - right
        total = total + weights.system * misfit.square().sum()
        torch.autograd.grad(total, image)
        return total.detach()

    return step


def main(network, victims, rounds):
    model = build(network, seed=10)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(victims, 1, *SHAPE, generator=generator)
    labels = torch.randint(10, (victims, 1), generator=generator)
    shared = share_gradient(model, Victims(images, labels))
    before = peak_memory_mib()
    opening = open_recursion(model, shared, image_shape=SHAPE, labels=labels)
    settings = StepSettings(
        "auto", "minimum norm", CUTOFF, opening.tolerance, rounding=False, keep_system=True
    )
    rows = descend(opening, settings)
    stage = opening.stages[0]
    problem = layer_problem(model, shared, stage, rows, PUBLISHED[0])
    x, every = rows.value.flatten(1).float(), torch.arange(victims)
    problem.evaluate(x, every)
    held = peak_memory_mib()  # before any dense row exists
    steps = {
        "dense": dense_step(model, shared, rows, 0, copied=False),
        "dense, U copied in every step": dense_step(model, shared, rows, 0, copied=True),
    }
    value = problem.evaluate(x, every)[0][0]
    torch.testing.assert_close(value, steps["dense"]().to(value.dtype), rtol=1e-3, atol=1e-4)

    together, alone = [], {name: [] for name in steps}
    for _ in range(rounds):
        together.append(seconds(lambda: [problem.evaluate(x, every) for _ in range(5)]) / 5)
        for name, step in steps.items():
            alone[name].append(seconds(lambda step=step: [step() for _ in range(5)]) / 5)
    geometry = rows.system.geometry
    dense = (geometry.filters * geometry.positions + model[0].weight.numel()) * geometry.unknowns
    ours = 1e3 * statistics.median(together) / victims
    print(f"{network} {victims} victims  ours {ours:.2f} ms a picture and step")
    print(
        f"  memory: systems and a step add {held - before:.0f} MiB for all victims; dense rows are "
        f"{dense * 8 / 2**20:.0f} MiB a victim"
    )
    for name, times in alone.items():
        ratios = [victims * b / a for a, b in zip(together, times, strict=True)]
        print(
            f"  {name:32s} {1e3 * statistics.median(times):6.1f} ms   ratio "
            f"{statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="cnn2_c1")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    main(chosen.network, chosen.victims, chosen.rounds)
