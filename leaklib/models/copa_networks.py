"""The networks of the layer-wise hybrid attack: two to four convolutions without bias, then linear.

Every network is `conv1, act1, ..., flatten, fc`, and `last` behind it where the loss sees an
activation of the logits. Only `fc` has a bias. The names are those of the released code:
cnn2_c1, cnn2_c2, cnn4_c1 and cnn4_c2, which we take for the paper's CNN2 V1, CNN2 V2, CNN4 V1 and
CNN4 V2.

Source: Chen & Campbell (arXiv 2210.13231), released code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from leaklib.models.chains import Layer, chain
from leaklib.models.initialisation import Activation, activation_by_name
from leaklib.models.networks import Shape


@dataclass(frozen=True)
class Plan:
    """Convolutions (filters, kernel, stride, padding), their activation, that of the logits."""

    layers: tuple[Layer, ...]
    activation: str = "tanh"
    last: str = "identity"

    @property
    def smallest(self) -> int:
        """Smallest side of an image, in pixels: one position of the last kernel, traced back."""
        side = 1
        for _, kernel, stride, padding in reversed(self.layers):
            side = max(1, (side - 1) * stride + kernel - 2 * padding)
        return side


PLANS: dict[str, Plan] = {
    "cnn2_c0": Plan(((1, 3, 2, 0),), last="tanh"),
    "cnn2_c1": Plan(((6, 3, 1, 0),)),
    "cnn2_c2": Plan(((6, 4, 2, 0),)),
    "cnn2_c4": Plan(((1, 3, 1, 0),), last="tanh"),
    "cnn2_c5": Plan(((3, 3, 1, 1),), last="tanh"),
    "cnn2_c6": Plan(((12, 5, 2, 0),)),
    "cnn3_c1": Plan(((6, 3, 1, 0), (3, 4, 2, 0))),
    "cnn3_c2": Plan(((6, 4, 2, 0), (3, 3, 2, 0))),
    "cnn3_c3": Plan(((6, 3, 1, 0), (9, 3, 1, 0))),
    "cnn3_c4": Plan(((1, 3, 1, 0), (6, 3, 1, 0))),
    "cnn3_c8": Plan(((9, 3, 1, 0), (3, 4, 2, 0)), last="tanh"),
    "cnn3_c9": Plan(((5, 3, 1, 0), (7, 3, 1, 0)), last="tanh"),
    "cnn4_c1": Plan(((6, 3, 1, 0), (5, 4, 2, 0), (3, 4, 1, 0))),
    "cnn4_c2": Plan(((16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2))),
    "cnn4_c3": Plan(((6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2))),
    "lenet2": Plan(((12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2))),
}
# The study of activations: the convolutions of the base network, other activations.
for _base in ("cnn2_c1", "cnn2_c2", "cnn2_c4", "cnn3_c1", "cnn3_c2", "cnn3_c3", "cnn3_c4"):
    PLANS[f"{_base}1"] = Plan(PLANS[_base].layers, "leaky_relu", "sigmoid")
for _base in ("cnn3_c1", "cnn3_c2", "cnn3_c3", "cnn3_c4"):
    PLANS[f"{_base}2"] = Plan(PLANS[_base].layers, "softplus", "sigmoid")
PLANS["cnn3_c13"] = Plan(PLANS["cnn3_c1"].layers, "tanh", "sigmoid")
PLANS["cnn3_c14"] = Plan(PLANS["cnn3_c1"].layers, "identity", "sigmoid")
PLANS["cnn3_c15"] = Plan(PLANS["cnn3_c1"].layers, "identity", "tanh")


def copa_builder(name: str) -> Callable[..., nn.Sequential]:
    """The builder of a plan, for the registry.

    Args:
        name: a name of `PLANS`.

    Returns:
        A builder whose option `last` changes the activation of the logits.
    """
    plan = PLANS[name]

    def build_plan(
        input_shape: Shape, classes: int, activation: Activation, *, last: str = plan.last
    ) -> nn.Sequential:
        network = chain(
            input_shape, classes, activation, layers=plan.layers, bias=False, head_bias=True
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(network.named_children())
        if last != "identity":
            parts["last"] = activation_by_name(last)()
        return nn.Sequential(parts)

    widths = "-".join(str(layer[0]) for layer in plan.layers)
    build_plan.__doc__ = f"Hybrid attack's {name}: filters {widths}, {plan.last} on the logits."
    return build_plan
