"""R-GAP: a private picture in closed form, one layer after another from the output to the image.

    x_i = argmin ‖[W_i; s K_i] x − [z_i; s ∇W_i]‖,
    z_{i−1} = σ⁻¹(x_i) − b_{i−1},   k_{i−1} = (W_iᵀ k_i) ⊙ σ'(z_{i−1}).

It starts with what the last layer says (`last_layer`) and needs no search where every layer has
full rank. Source: Zhu & Blaschko 2021, Algorithm 1. Ours are the balanced rows, the operators in
place of matrices, the unknown label, both roots, biases, further activations, and the hybrid.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from leaklib.attacks.recursive.checks import check_settings
from leaklib.attacks.recursive.conclusion import conclude
from leaklib.attacks.recursive.descent import descend
from leaklib.attacks.recursive.opening import open_recursion
from leaklib.attacks.recursive.report import RecursiveReconstruction
from leaklib.attacks.recursive.steps import StepSettings
from leaklib.gradients.payload import SharedGradient
from leaklib.layer_system.solve import Solver
from leaklib.layer_system.split import CUTOFF
from leaklib.margin_losses import MarginLoss
from leaklib.precision import full_float32


@full_float32()
def rgap(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, int, int],
    loss: MarginLoss | None = None,
    labels: Tensor | None = None,
    solver: Solver = "auto",
    deficient: Literal["minimum norm", "hybrid"] = "minimum norm",
    truncation: float = CUTOFF,
    mixture: bool = False,
    pruned: Literal["refuse", "keep"] = "refuse",
    keep_inputs: bool = False,
    progress: bool = False,
) -> RecursiveReconstruction:
    """Recover private pictures layer by layer, exactly where every layer has full rank.

    Computes in float64 whatever the gradient's dtype. Errors of float32 gradients grow with 1/slope
    of the activation and with the condition of the layers: MSE about 1e-11 on CNN6 with LeakyReLU
    of slope 0.2, worst with slope 0.01.
    Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1.

    Args:
        model: a chain, see `leaklib.chain.read_chain`, in eval mode.
        shared: the released gradients, all weights of the chain.
        image_shape: (channels, height, width).
        loss: of a model with one logit; None is logistic there, and cross-entropy of the softmax
            for more logits.
        labels: (victims, 1) if known; None tries both, and the next layer's residual decides.
        solver: of each layer, see `solve_layer`; "published" reproduces the released code's
            unscaled rows and its float32 values between layers. One thing differs: the released
            code finds the margin by 30,000 Adam steps (error about 2e-5), here it is exact.
        deficient: what to do where a layer has fewer equations than unknowns. "minimum norm" as
            published; "hybrid" adds what the layer before implies, see `fill_deficit`.
        truncation: with solver="gradient first" alone, singular values to leave out, in (0, 1),
            see `solve_split`.
        mixture: accept a batch of several pictures and run as if it were one. Through fully
            connected layers the answer is one linear combination of the batch; through convolutions
            it is noise, which the residuals show.
        pruned: refuse a gradient with many exact zeros, which are no equations, or "keep" them.
        keep_inputs: return the input found for every layer, too.
        progress: show a bar over the layers.

    Returns:
        RecursiveReconstruction; pixels are not boxed. Cost: no gradient evaluation; per layer up to
        a few thousand products with its own weights.

    Raises:
        ValueError: before any long work: a layer that cannot be undone, a payload that does not
            fit, several pictures, a dead layer; later: a label that contradicts its gradient.

    A small residual at a layer with a deficit proves nothing: many inputs fit its equations. Biases
    are used where there are any; a network with a bias has no twins.

    >>> import torch
    >>> from leaklib.data import Victims
    >>> from leaklib.gradients import share_gradient
    >>> from leaklib.margin_losses import LOGISTIC
    >>> from leaklib.models import build
    >>> model = build("cnn6", input_shape=(3, 16, 16)).double()
    >>> images = torch.rand(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    >>> private = Victims(images, torch.zeros(1, 1, dtype=torch.int64))
    >>> found = rgap(model, share_gradient(model, private, loss=LOGISTIC), image_shape=(3, 16, 16))
    >>> bool((found.images - images).abs().max() < 1e-8), found.first_wrong_layer()
    (True, [None])
    """
    check_settings(solver, deficient, pruned, truncation)
    published = solver == "published"
    opening = open_recursion(
        model, shared, image_shape=image_shape, loss=loss, labels=labels, mixture=mixture,
        pruned=pruned,
        # the published code takes the activation behind the last layer for the identity
        ignore_last_activation=published,
    )  # fmt: skip
    settings = StepSettings(
        solver, deficient, truncation, opening.tolerance, rounding=published,
        keep_inputs=keep_inputs,
    )  # fmt: skip
    return conclude(opening, descend(opening, settings, progress=progress), shared)
