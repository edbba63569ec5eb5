"""Influence: how far a change of the shared gradient moves the picture that matches it best.

    operator = influence_operator(model, inputs, labels)     # J = ∂(∇θ L)/∂x, as products
    spec = spectrum(operator)                                # of JJᵀ, in float64
    answer = i2f(operator, perturbation(shared, released), damping=0.0, spectrum=spec)
    answer.rmse                                              # predicted error per entry

`i2f_lower_bound` needs no spectrum and serves any size. All of it is batched over victims.

Source: Zhang, Hong, Deng, Mahdavi, Zhou, Understanding Deep Gradient Leakage via Inversion
Influence Functions (arXiv 2309.13016).
"""

from leaklib.influence.bounds import (
    LowerBound,
    expected_lower_bound,
    i2f_lower_bound,
    lower_bound,
    perturbation_norm,
    perturbation_upper_bound,
    upper_bound,
)
from leaklib.influence.checks import RankWarning
from leaklib.influence.conjugate_gradient import Solution, conjugate_gradient
from leaklib.influence.damping import ConvergenceWarning
from leaklib.influence.expectation import (
    direction_error,
    expected_square,
    expected_square_estimate,
    sample_projected_noise,
    sensitivity_map,
)
from leaklib.influence.gram import gram_matrix, jacobian_rows
from leaklib.influence.i2f import i2f
from leaklib.influence.lanczos import Extremes, extreme_eigenvalues
from leaklib.influence.noise_level import noise_std_for_error
from leaklib.influence.operator import InfluenceOperator, influence_operator
from leaklib.influence.prediction import Influence, predicted_error
from leaklib.influence.spectrum import (
    Spectrum,
    singular_directions,
    spectrum,
    spectrum_of_gram,
)
from leaklib.influence.trace import Estimate, trace_estimate, trace_of_function

__all__ = [
    "ConvergenceWarning",
    "Estimate",
    "Extremes",
    "Influence",
    "InfluenceOperator",
    "LowerBound",
    "RankWarning",
    "Solution",
    "Spectrum",
    "conjugate_gradient",
    "direction_error",
    "expected_lower_bound",
    "expected_square",
    "expected_square_estimate",
    "extreme_eigenvalues",
    "gram_matrix",
    "i2f",
    "i2f_lower_bound",
    "influence_operator",
    "jacobian_rows",
    "lower_bound",
    "noise_std_for_error",
    "perturbation_norm",
    "perturbation_upper_bound",
    "predicted_error",
    "sample_projected_noise",
    "sensitivity_map",
    "singular_directions",
    "spectrum",
    "spectrum_of_gram",
    "trace_estimate",
    "trace_of_function",
    "upper_bound",
]
