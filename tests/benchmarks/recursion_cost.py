"""Seconds of the recursive attack against a dense one, and of counting ranks, in one run.

    python tests/benchmarks/recursion_cost.py [--side 16] [--victims 16] [--rounds 3]

The dense attack is the tests' reference: rows written out by loops over pixels and solved by
numpy's least squares, one picture at a time, as the published code does. CNN6 at a reduced side,
because the dense one takes minutes and gigabytes at 32 pixels. Speed is reported as a ratio from
the same run, never asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from leaklib.attacks import rgap
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build
from leaklib.rank import rank_analysis

sys.path.append(str(Path(__file__).resolve().parents[1]))
from attacks.dense_rgap import reconstruct


def seconds(work):
    begin = time.process_time()
    work()
    return time.process_time() - begin


def attack_cost(side, victims, rounds):
    """CPU seconds a picture: all together, one at a time, dense."""
    shape = (3, side, side)
    model = build("cnn6", input_shape=shape, classes=1).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(victims, 1, *shape, generator=generator, dtype=torch.float64)
    labels = (model(images[:, 0]) < 0).long()
    shared = share_gradient(model, Victims(images, labels), loss=LOGISTIC)
    grads = {name: tensor[0].numpy() for name, tensor in shared.items()}
    single = shared.replace({name: tensor[:1] for name, tensor in shared.items()})

    def together():
        rgap(model, shared, image_shape=shape, labels=labels)

    def alone():
        rgap(model, single, image_shape=shape, labels=labels[:1])

    def dense():
        reconstruct(model, grads, shape, label=int(labels[0, 0]))

    together()
    times = [(seconds(together) / victims, seconds(alone), seconds(dense)) for _ in range(rounds)]
    ours, one, slow = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [c / a for a, _, c in times]
    print(
        f"cnn6 {side:3d} px  together {ours:.3f} s a picture   alone {one:.3f}   dense {slow:.2f}  "
        f"dense/together {statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"
    )


def counting_cost(side):
    """Milliseconds of a rank analysis by counting."""
    model = build("cnn6", input_shape=(3, side, side), classes=1)
    spent = seconds(lambda: rank_analysis(model, (3, side, side)))
    print(f"cnn6 {side:3d} px  rank analysis by counting {1e3 * spent:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    attack_cost(chosen.side, chosen.victims, chosen.rounds)
    for pixels in (32, 224):
        counting_cost(pixels)
