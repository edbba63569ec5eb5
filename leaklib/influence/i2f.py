"""I²F: how far off the best match lies when the shared gradient is perturbed by δ.

The attacker knows the labels and minimises ‖∇θ L(x) − g₀ − δ‖² over x. To first order in δ the
minimum next to the private input moves by

    x̂ − x = (JJᵀ)⁻¹ J δ,    J = ∂(∇θ L)/∂x,

and the norm of that is I²F. The damped form is (JJᵀ + εI)⁻¹Jδ. An attack by the cosine of the
gradients does not see their scale: for it P = I − ĝĝᵀ, ĝ = g/‖g‖, comes between, (JPJᵀ)⁻¹JPδ. On
LeNet and MNIST the norms of both agree to three digits. They need not: the gradient of a ReLU
network without biases and with one logit lies in the row space of J (a brighter picture only scales
it), and JPJᵀ is singular. This module computes the form above.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from leaklib.influence.conjugate_gradient import conjugate_gradient
from leaklib.influence.damping import (
    ConvergenceWarning,
    Damping,
    RelativeTo,
    absolute_damping,
    check_relative,
)
from leaklib.influence.lanczos import extreme_eigenvalues
from leaklib.influence.operator import InfluenceOperator
from leaklib.influence.prediction import Influence, check_finite, predicted_error
from leaklib.influence.spectrum import Spectrum, check_same_problem, in_float64

# An iterative answer whose residual leaves room for a larger relative error than this is reported.
GUARANTEE = 0.1


def i2f(
    operator: InfluenceOperator,
    perturbation: Mapping[str, Tensor],
    *,
    damping: Damping = 1.0,
    relative_to: RelativeTo = None,
    spectrum: Spectrum | None = None,
    tolerance: float = 1e-4,
    max_products: int = 1000,
    generator: torch.Generator | None = None,
) -> Influence:
    """Inversion influence function I_ε(δ) = ‖(JJᵀ + εI)⁻¹Jδ‖ and the error it predicts.

    The damping is absolute, and its effect depends on the scale of J: scaling the loss by c scales
    JJᵀ by c². A damping far above λ_max turns I_ε into ‖Jδ‖/ε; use `relative_to`, or a small one.

    Cost: one product Jδ for each δ; then, with a spectrum, next to nothing for any number of ε.
    Without one, conjugate gradients: about 2.7 gradient evaluations of multiplications (3 to 5 in
    time) a product with JJᵀ and δ, for all ε at once.

    Args:
        operator: J of each victim.
        perturbation: δ = released − shared gradient: parameter name -> (victims, *shape), or
            (victims, vectors, *shape) for several.
        damping: ε >= 0, one or several; 0 is the undamped I²F.
        relative_to: "lambda_max" takes the damping as a share of each victim's largest eigenvalue.
        spectrum: of this operator: closed form in float64 instead of an iteration in the dtype of
            the operator.
        tolerance: relative residual at which an iteration stops.
        max_products: limit of an iteration, in products with JJᵀ.
        generator: start of the search for λ_max; needed for a relative damping without a spectrum.

    Returns:
        Influence. Where an undamped JJᵀ is singular its norm is infinite with a spectrum, and
        without one if p < d; else the iteration leaves out the directions without a trace, and
        warns.

    Raises:
        ValueError: a δ that does not fit or is not finite, another victim's spectrum, a bad
            damping, or a missing generator.

    Warns:
        RankWarning: JJᵀ + εI is singular up to rounding.
        ConvergenceWarning: the iteration missed its tolerance, or its residual does not guarantee
            the answer to 10 %, as without damping.

    Source: Zhang et al. 2023, Eq. 4, with the damping of their experiments.

    Two pixels x = (1, 1), weights w = (1, 1), target 1, loss ½(w·x − 1)². The gradient is
    (w·x − 1)x, so J = (w·x − 1) I + w xᵀ = [[2, 1], [1, 2]]. Noise δ = (1, 0) on the gradient moves
    the solution by J⁻¹δ = (2, −1)/3, of norm √5/3 = 0.745:

    >>> from leaklib.influence import influence_operator, spectrum
    >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> model.weight.data.fill_(1.0)
    tensor([[1., 1.]], dtype=torch.float64)
    >>> half_square = lambda out, target, reduction: 0.5 * (out - target).square().sum()
    >>> pixels = torch.ones(1, 1, 2, dtype=torch.float64)
    >>> target = torch.ones(1, 1, 1, dtype=torch.float64)
    >>> operator = influence_operator(model, pixels, target, loss=half_square)
    >>> delta = {"weight": torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)}
    >>> answer = i2f(operator, delta, damping=0.0, spectrum=spectrum(operator))
    >>> answer.vector.flatten()
    tensor([ 0.6667, -0.3333], dtype=torch.float64)
    >>> round(answer.norm.item(), 6), round(answer.projected_norm.item() ** 2, 6)
    (0.745356, 5.0)
    """
    if spectrum is not None:
        check_same_problem(operator, spectrum)
        exact = in_float64(operator)
        delta = {n: one.to(exact.device, exact.dtype) for n, one in perturbation.items()}
        return predicted_error(spectrum, exact.jv(delta), damping=damping, relative_to=relative_to)
    projected = check_finite(operator.jv(perturbation))  # (victims, vectors, d)
    eps = absolute_damping(
        damping,
        lambda_max=_largest(operator, generator) if check_relative(relative_to) else None,
        victims=operator.victims, device=projected.device,
    )  # fmt: skip
    solution = conjugate_gradient(
        operator.gram_product, projected, shifts=eps, tolerance=tolerance, max_products=max_products
    )
    # with fewer equations than unknowns some change of the input leaves no trace at all
    lost = (eps == 0) & (operator.parameters < operator.unknowns)
    lost = lost[:, None].expand_as(solution.converged)
    answer = Influence(
        vector=solution.x.unflatten(-1, tuple(operator.input_shape)),
        norm=torch.linalg.vector_norm(solution.x, dim=-1, dtype=torch.float64).where(
            ~lost, torch.inf
        ),
        damping=eps,
        projected_norm=torch.linalg.vector_norm(projected, dim=-1, dtype=torch.float64),
        residual=solution.residual,
        converged=solution.converged & ~lost,
        products=solution.products,
    )
    _report(answer, tolerance, max_products)
    return answer


def _largest(operator: InfluenceOperator, generator: torch.Generator | None) -> Tensor:
    """λ_max of every victim by Lanczos."""
    if generator is None:
        raise ValueError(
            "expected a generator or a spectrum for a relative damping, got neither; pass "
            f'generator=torch.Generator("{operator.device}").manual_seed(seed)'
        )
    found = extreme_eigenvalues(
        operator.gram_product, victims=operator.victims, d=operator.unknowns, generator=generator,
        dtype=operator.dtype, device=operator.device,
    )  # fmt: skip
    if not bool(found.converged.all()):
        warnings.warn(
            "Lanczos did not find λ_max to its tolerance; the absolute damping is off by up to "
            f"{float((found.largest_error / found.largest).max()):.1%} of itself",
            ConvergenceWarning,
            stacklevel=3,
        )
    return found.largest


def _report(answer: Influence, tolerance: float, max_products: int) -> None:
    """Say aloud what an iterative answer does not guarantee."""
    missed = ~answer.converged
    weak = answer.error_bound > GUARANTEE * answer.norm
    if bool(missed.any()):
        message = (
            f"conjugate gradients missed the residual {tolerance:g} in {int(missed.sum())} of "
            f"{missed.numel()} solves (worst {float(answer.residual.max()):.2g} after at most "
            f"{max_products} products); raise max_products or the damping, or pass a spectrum"
        )
    elif bool(weak.any()):
        message = (
            f"the residual of {int(weak.sum())} of {weak.numel()} solves does not guarantee the "
            f"norm to {GUARANTEE:.0%}: small eigenvalues hide behind it; lower the tolerance, "
            "raise the damping above 0, or pass a spectrum for the exact answer"
        )
    else:
        return
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
