"""What a defense changed: the perturbation δ = ĝ − g and its size."""

import pandas as pd
import torch
from torch import Tensor

from leaklib.defenses._base import rows, squared_norms
from leaklib.gradients.payload import SharedGradient

__all__ = ["noise_report", "perturbation"]


def perturbation(shared: SharedGradient, released: SharedGradient) -> dict[str, Tensor]:
    """δ = ĝ − g, tensor by tensor.

    Args:
        shared: The gradient before the defense.
        released: The gradient after it.

    Returns:
        Parameter name to (victims, *parameter shape).

    Raises:
        ValueError: The two do not hold the same tensors.

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[3.0, -4.0]])}, batch=1)
    >>> released = SharedGradient({"fc.weight": torch.tensor([[3.0, 0.0]])}, batch=1)
    >>> perturbation(shared, released)
    {'fc.weight': tensor([[0., 4.]])}
    """
    before = {name: tensor.shape for name, tensor in shared.items()}
    after = {name: tensor.shape for name, tensor in released.items()}
    if before != after:
        differ = sorted(
            name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
        )
        raise ValueError(
            f"expected the same names and shapes before and after, got a difference in {differ}; "
            "pass the gradient that this release was made from"
        )
    return {name: released.tensors[name] - tensor for name, tensor in shared.items()}


def noise_report(shared: SharedGradient, released: SharedGradient) -> pd.DataFrame:
    """Size of the perturbation, one row per victim.

    Args:
        shared: The gradient before the defense.
        released: The gradient after it.

    Returns:
        Table with the columns ``victim``; ``gradient_norm`` ‖g‖; ``perturbation_norm`` ‖δ‖;
        ``relative_norm`` ‖δ‖/‖g‖ (NaN for 0/0); ``changed_share``, the share of entries with
        δ ≠ 0; ``touched_share``, the share of entries that belong to a tensor with some δ ≠ 0:
        how much of the gradient a partial perturbation covers; ``touched_rms``, the root mean
        square of g over these tensors, and ``noise_to_rms``, that of δ divided by it: the strength
        of a noise that does not depend on the scale of the gradient (NaN where nothing is
        touched).

    Raises:
        ValueError: The two do not hold the same tensors.

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[3.0, -4.0]])}, batch=1)
    >>> released = SharedGradient({"fc.weight": torch.tensor([[3.0, 0.0]])}, batch=1)
    >>> noise_report(shared, released).iloc[0].round(3).tolist()
    [0.0, 5.0, 4.0, 0.8, 0.5, 1.0, 3.536, 0.8]
    """
    delta = shared.replace(perturbation(shared, released))
    squares = torch.stack(list(squared_norms(shared).values()))  # (tensors, victims)
    gradient_norm = squares.sum(dim=0).sqrt()
    perturbation_norm = torch.stack(list(squared_norms(delta).values())).sum(dim=0).sqrt()
    sizes = [tensor[0].numel() for tensor in delta.tensors.values()]
    counts = [(rows(tensor) != 0).sum(dim=1) for tensor in delta.tensors.values()]
    changed = torch.stack(counts).sum(dim=0)
    hit = torch.stack(counts) > 0
    touched = (hit * torch.tensor(sizes, device=hit.device)[:, None]).sum(dim=0)
    touched_norm = (hit * squares).sum(dim=0).sqrt()
    columns = {
        "victim": torch.arange(shared.victims),
        "gradient_norm": gradient_norm,
        "perturbation_norm": perturbation_norm,
        "relative_norm": perturbation_norm / gradient_norm,
        "changed_share": changed.double() / sum(sizes),
        "touched_share": touched.double() / sum(sizes),
        "touched_rms": touched_norm / touched.double().sqrt(),
        "noise_to_rms": perturbation_norm / touched_norm,
    }
    return pd.DataFrame({name: one.detach().cpu().numpy() for name, one in columns.items()})
