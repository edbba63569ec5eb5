"""Pruning, also called gradient compression: release only the largest entries."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leaklib.defenses._base import check_choice, per_victim, rows
from leaklib.gradients.payload import SharedGradient, check_finite

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune:
    """Set the smallest entries to zero: ĝ = g where |g| > q, else 0, q = quantile(|g|, ratio).

    q is the linearly interpolated quantile of one victim, so a share of about ``ratio`` of the
    entries is removed. Entries equal to q go too: a tensor of equal magnitudes, such as one of a
    single entry, is removed whole. A ratio of 0 is no pruning.

    Settings:
        ratio: Share to remove, in [0, 1).
        scope: "global" for one quantile over all tensors, "tensor" for one per tensor.

    Raises:
        ValueError: A setting out of range; at the call, a gradient that is not finite.

    Cost: one selection, linear in the number of parameters; "global" copies the gradient once.

    Source: the threshold is that of I²F's released code, arXiv:2309.13016.

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[-4.0, 1.0, 2.0, -3.0]])}, batch=1)
    >>> Prune(0.5)(shared).tensors["fc.weight"]
    tensor([[-4.,  0.,  0., -3.]])
    """

    ratio: float
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"expected a ratio in [0, 1), got {self.ratio}; 0.9 removes 90 % of the entries"
            )
        check_choice(self.scope, ("global", "tensor"), "scope")

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the sparse gradient."""
        check_finite(shared)
        if self.ratio == 0:
            return shared
        if self.scope == "global":
            everything = torch.cat([rows(one) for one in shared.tensors.values()], dim=1)
            limits = dict.fromkeys(shared.names, _limit(everything, self.ratio))
        else:
            limits = {name: _limit(rows(one), self.ratio) for name, one in shared.items()}
        return shared.replace(
            {
                name: one.where(one.abs() > per_victim(limits[name], one), torch.zeros_like(one))
                for name, one in shared.items()
            }
        )


def _limit(grad: Tensor, ratio: float) -> Tensor:
    """The largest magnitude to remove, per row of (victims, entries).

    The interpolated quantile lies at position h = ratio·(n − 1) of the sorted magnitudes a₀ ≤ a₁
    ≤ ..., between a_k and a_{k+1} for k = ⌊h⌋. No magnitude lies strictly between those two, so
    |g| > quantile and |g| > a_k keep the same entries. One order statistic is then enough: no
    interpolation, hence no rounding, and no limit on n (torch.quantile used to stop at 2²⁴).
    """
    k = math.floor(ratio * (grad.shape[1] - 1))
    return grad.abs().kthvalue(k + 1, dim=1).values
