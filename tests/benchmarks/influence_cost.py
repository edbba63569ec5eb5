"""Cost of I²F as ratios measured in one run: solves, bounds, Gram rows, memory, batching.

    python tests/benchmarks/influence_cost.py [--device cuda] [--parts solve bound ghost]

The unit is one gradient evaluation, ∇θ L of one picture by `torch.autograd.grad`. The reference
solver is written here from its published description: gradient descent on (JJᵀ + εI)b = Jδ, every
product by forward pass and two backward passes of its own. CPU time of this process, one thread;
wall time where a GPU does the work. Prints, asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from leaklib.data import load_images
from leaklib.influence import (
    conjugate_gradient,
    extreme_eigenvalues,
    gram_matrix,
    i2f,
    i2f_lower_bound,
    influence_operator,
    jacobian_rows,
    spectrum,
)
from leaklib.models import build

STEP, STEPS, STOP = 0.01, 2000, 9e-5  # of the reference solver
STD = 1e-5**0.5


def clock(device):
    """CPU seconds of this process; wall seconds where a GPU does the work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work, device, repeats=5):
    """Median over the repeats, after one call to warm up."""
    work()
    found = []
    for _ in range(repeats):
        begin = clock(device)
        work()
        found.append(clock(device) - begin)
    return statistics.median(found)


def lenet28(device):
    """The LeNet of the paper at one picture of MNIST, or at an embedded digit of that size."""
    try:
        private = load_images("mnist", indices=[0])
    except FileNotFoundError:
        private = load_images("digits", indices=[0], size=28)
    model = build("lenet4", input_shape=(1, 28, 28), init="uniform", seed=1).to(device)
    return model, private.images[:, None].to(device), private.labels[:, None].to(device)


def resnet(device):
    """ResNet-18 at one random picture 3x32x32."""
    model = build("resnet18", input_shape=(3, 32, 32), seed=1).to(device)
    image = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, image.to(device), torch.tensor([[7]], device=device)


def noise(model, victims=1):
    """δ ~ N(0, STD²) of the size of the gradient."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: STD * torch.randn(victims, *p.shape, generator=draw).to(p.device)
        for name, p in model.named_parameters()
    }


def gradient_evaluation(model, images, labels):
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(
        F.cross_entropy(model(images[0]), labels[0]), parameters
    )  # fmt: skip


def naive_jv(model, image, label, v):
    image = image.clone().requires_grad_()
    loss = F.cross_entropy(model(image), label)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, v, strict=True)), image)[0]


def naive_jtu(model, image, label, u):
    image = image.clone().requires_grad_()
    loss = F.cross_entropy(model(image), label)
    (slope,) = torch.autograd.grad(loss, image, create_graph=True)
    return torch.autograd.grad((slope * u).sum(), list(model.parameters()))


def gradient_descent(model, image, label, delta, damping):
    """The reference solver: b and the iterations it took."""
    target = naive_jv(model, image, label, delta)
    b = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image.device)
    for done in range(STEPS):
        product = naive_jv(model, image, label, naive_jtu(model, image, label, b))
        residual = product + damping * b - target
        norm = float(residual.norm())
        if norm < STOP or norm != norm:
            return b, done
        b = b - STEP * residual
    return b, STEPS


def solve(device):
    """(a) (JJᵀ + I)⁻¹Jδ by conjugate gradients, against gradient descent."""
    model, images, labels = lenet28(device)
    delta = noise(model)
    exact = influence_operator(model, images, labels)
    truth = i2f(exact, delta, damping=1.0, spectrum=spectrum(exact)).vector.flatten()

    def ours():
        return i2f(influence_operator(model, images, labels), delta, damping=1.0)

    def error(b):
        return float((b.double().flatten() - truth).norm() / truth.norm())

    before = seconds(ours, device)
    begin = clock(device)
    b, steps = gradient_descent(
        model, images[0], labels[0], [d[0] for d in delta.values()], 1.0
    )  # fmt: skip
    theirs = clock(device) - begin
    mine = statistics.median([before, seconds(ours, device)])
    found = ours()
    print(
        f"solve, eps 1, lenet4 28x28: gradient descent {theirs:.2f} s, {steps} steps, error "
        f"{error(b):.1e}; conjugate gradients {mine * 1e3:.1f} ms, {int(found.products)} products, "
        f"error {error(found.vector):.1e}; ratio {theirs / mine:.0f}"
    )


def bound(device):
    """(b) The lower bound of ResNet-18, all included."""
    model, images, labels = resnet(device)
    delta, evaluate = noise(model), gradient_evaluation(model, images, labels)

    def ours():
        draw = torch.Generator(device).manual_seed(0)
        return i2f_lower_bound(
            influence_operator(model, images, labels), delta, generator=draw
        )  # fmt: skip

    ratios = []
    for _ in range(3):
        unit = seconds(evaluate, device)
        ratios.append(seconds(ours, device, repeats=1) / unit)
    print(
        f"lower bound, resnet18 3x32x32: {statistics.median(ratios):.1f} gradient evaluations "
        f"({min(ratios):.1f} to {max(ratios):.1f}), {int(ours().products)} products"
    )


def ghost(device, directions=64, chunk=32):
    """(c) A row of JJᵀ of ResNet-18 from activations, against an explicit row of J."""
    model, images, labels = resnet(device)
    evaluate = gradient_evaluation(model, images, labels)
    operator = influence_operator(model, images, labels)
    draw = torch.Generator().manual_seed(2)
    u = torch.randn(1, directions, operator.unknowns, generator=draw).to(device)
    unit = seconds(evaluate, device)
    rows = seconds(
        lambda: gram_matrix(operator, directions=u, method="ghost", chunk=chunk), device, repeats=1
    )
    unit = statistics.median([unit, seconds(evaluate, device)])
    few = u[:, :4]
    explicit = seconds(lambda: jacobian_rows(operator, directions=few), device, repeats=1)
    print(
        f"ghost row, resnet18 3x32x32, {directions} rows by {chunk}: "
        f"{rows / directions / unit:.2f} gradient evaluations a row; an explicit row of J "
        f"{explicit / 4 / unit:.2f}"
    )


def batching(device, vectors=128):
    """(e) Products of many vectors in one call, against one at a time."""
    model, images, labels = lenet28(device)
    draw = torch.Generator().manual_seed(3)
    u = torch.randn(1, vectors, images[0].numel(), generator=draw).to(device)
    together = influence_operator(model, images, labels)
    alone = influence_operator(model, images, labels, form="graph")
    for name in ("jtu", "gram_product"):
        at_once, one = getattr(together, name), getattr(alone, name)
        batched = seconds(lambda at_once=at_once: at_once(u), device, repeats=3) / vectors
        few = u[:, :32].split(1, dim=1)
        single = seconds(lambda one=one, few=few: [one(w) for w in few], device, repeats=3) / 32
        naive = seconds(
            lambda name=name: naive_product(name, model, images, labels, u[0, 0]), device
        )  # fmt: skip
        print(
            f"{'Jᵀu' if name == 'jtu' else 'JJᵀu'}, lenet4 28x28: {vectors} together "
            f"{batched * 1e3:.3f} ms a vector, one at a time {single * 1e3:.2f} (ratio "
            f"{single / batched:.1f}), with passes of its own {naive * 1e3:.2f} (ratio "
            f"{naive / batched:.1f})"
        )


def naive_product(name, model, images, labels, u):
    found = naive_jtu(model, images[0], labels[0], u.view_as(images[0]))
    return found if name == "jtu" else naive_jv(model, images[0], labels[0], found)


def memory(device):
    """(d) Peak memory of the solvers on ResNet-18, each in a process of its own."""
    found = {}
    for work in ("training", "conjugate gradients", "Lanczos"):
        command = [sys.executable, __file__, "--device", str(device), "--peak", work]
        # freed tensors go back to the system at once: the peak is of what lives, not of the heap
        surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
        found[work] = json.loads(done.stdout)
    step = found.pop("training")
    for work, peak in found.items():
        print(
            f"memory, resnet18 3x32x32, {work}: {peak['all']:.0f} MiB, network included, over a "
            f"training step's {step['all']:.0f}: ratio {peak['all'] / step['all']:.2f}; without "
            f"the network {peak['own']:.0f} over {step['own']:.0f}: ratio "
            f"{peak['own'] / step['own']:.2f}"
        )


def most_used(device):
    """Peak memory of this process so far, MiB; what tensors take where a GPU holds them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # not `ru_maxrss`, which starts from what the parent process took
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except FileNotFoundError:  # bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak(work, device):
    """MiB that the work takes at its peak, with the network and without, as JSON."""
    start = most_used(device)
    model, images, labels = resnet(device)
    built = most_used(device)
    if work == "training":
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(model(images[0]), labels[0]).backward()
            optimiser.step()
    else:
        operator = influence_operator(model, images, labels)
        draw = torch.Generator(device).manual_seed(0)
        if work == "Lanczos":
            extreme_eigenvalues(
                operator.gram_product, victims=1, d=operator.unknowns, generator=draw,
                device=device,
            )  # fmt: skip
        else:
            b = torch.randn(1, 1, operator.unknowns, generator=draw, device=device)
            conjugate_gradient(
                operator.gram_product, b, shifts=torch.tensor([0.1, 1.0]), max_products=20
            )
    print(json.dumps({"all": most_used(device) - start, "own": most_used(device) - built}))


PARTS = {"solve": solve, "bound": bound, "ghost": ghost, "memory": memory, "batching": batching}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = torch.device(arguments.device)
    if arguments.peak:
        peak(arguments.peak, where)
    else:
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
        print(f"{name}, torch {torch.__version__}, 1 thread")
        for part in arguments.parts:
            PARTS[part](where)
