"""Scores of a batch of reconstructions: assignment, labels, one tidy table.

The metrics of single images live in :mod:`leaklib.metrics.similarity`, the confidence intervals in
:mod:`leaklib.metrics.intervals`.
"""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leaklib.metrics.intervals import success_rate
from leaklib.metrics.similarity import as_pair, lpips, mse, psnr_db, ssim


def label_accuracy(recovered: Tensor, true: Tensor) -> Tensor:
    """Share of a batch's labels that were recovered, as multisets: order does not count.

    With counts r_c and t_c of class c, Σ_c min(r_c, t_c) / batch.

    Args:
        recovered: Integer labels, (..., batch). A value that no label has, such as -1, says
            "not recovered".
        true: Integer labels of the same shape.

    Returns:
        (...) float64 in [0, 1].

    Raises:
        ValueError: Shapes differ, the batch is empty or the labels are not integers.

    One 3 and the 7 are found, the second 3 is not:

    >>> float(label_accuracy(torch.tensor([7, 3, 5]), torch.tensor([3, 3, 7])) * 3)
    2.0
    """
    _check_labels(recovered, true)
    # Classes are renumbered 0..k-1, so that a gap or a negative value costs nothing.
    classes, numbered = torch.stack([recovered, true]).unique(return_inverse=True)
    counts = numbered.new_zeros(*numbered.shape[:-1], classes.numel())
    counts.scatter_add_(-1, numbered, torch.ones_like(numbered))
    return counts.amin(dim=0).sum(dim=-1).double() / true.shape[-1]


def match_batch(reconstructed: Tensor, originals: Tensor) -> Tensor:
    """Which reconstruction belongs to which original: the assignment with the least total MSE.

    A gradient does not tell the order of its batch, so the images come back in any order. One
    assignment per victim serves all metrics; matching each metric on its own would flatter it.

    Args:
        reconstructed: (victims, batch, channels, height, width).
        originals: Private images of the same shape, in [0, 1].

    Returns:
        (victims, batch) int64, on the device of the images: original j of victim v pairs with
        ``reconstructed[v, permutation[v, j]]``. A reconstruction with NaN or inf pixels takes an
        original that the others leave over.

    Raises:
        ValueError: As :func:`mse`, or not five axes.

    Cost: batch² distances and a batch³ assignment per victim.

    >>> originals = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1, 1)
    >>> match_batch(originals[:, [2, 0, 1]], originals).tolist()
    [[1, 2, 0]]
    """
    reconstructed, originals = as_pair(reconstructed, originals)
    if originals.ndim != 5:
        raise ValueError(
            "expected (victims, batch, channels, height, width), "
            f"got shape {tuple(originals.shape)}; add the missing axes with unsqueeze"
        )
    distance = torch.cdist(
        originals.flatten(2),
        reconstructed.flatten(2),
        compute_mode="donot_use_mm_for_euclid_dist",  # the fast way loses digits near zero
    ).square()  # (victims, originals, reconstructions)
    # A diverged reconstruction is equally far from all originals. Any constant says so: exactly
    # one original takes it, so the constant does not change which assignment is best.
    diverged = ~reconstructed.flatten(2).isfinite().all(dim=-1)
    cost = distance.masked_fill(diverged.unsqueeze(1), 0.0).cpu().numpy()
    columns = [torch.as_tensor(linear_sum_assignment(one)[1]) for one in cost]
    permutation = torch.stack(columns) if columns else torch.empty(originals.shape[:2])
    return permutation.to(device=originals.device, dtype=torch.int64)


def score(
    images: Tensor,
    originals: Tensor,
    *,
    labels: Tensor | None = None,
    true_labels: Tensor | None = None,
    lpips_net: Literal["alex", "vgg"] | None = None,
) -> pd.DataFrame:
    """Score reconstructions against the private images: one row per victim and private image.

    Pixels are clamped to [0, 1] first, as any viewer would; an infinite pixel counts as NaN. Each
    private image is compared with the reconstruction that :func:`match_batch` gives it, and its
    label with the label of that reconstruction.

    Args:
        images: Reconstructions, (victims, batch, channels, height, width).
        originals: Private images of the same shape, in [0, 1].
        labels: Recovered labels, (victims, batch), in the order of ``images``.
        true_labels: Private labels, (victims, batch); needed with ``labels``.
        lpips_net: Also score :func:`lpips` with this network.

    Returns:
        Table with the columns ``victim``, ``image`` (position in the private batch),
        ``reconstruction`` (position of its partner), ``mse``, ``psnr_db``, ``ssim``, ``clamped``
        (a finite pixel was outside [0, 1]), then ``lpips`` and ``label_correct`` where asked for.

    Raises:
        ValueError: As :func:`match_batch` and :func:`ssim`; labels of a wrong shape, or only one
            of ``labels`` and ``true_labels``.

    >>> originals = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> score(originals, originals)[["victim", "image", "mse", "psnr_db"]].values.tolist()
    [[0.0, 0.0, 0.0, inf], [1.0, 0.0, 0.0, inf]]
    """
    if (labels is None) != (true_labels is None):
        raise ValueError("expected labels and true_labels together, got one; pass both or neither")
    images, originals = as_pair(images, originals)
    finite = images.isfinite()
    boxed = images.clamp(0, 1).masked_fill(~finite, torch.nan)
    permutation = match_batch(boxed, originals)
    victims, batch = permutation.shape
    rows = torch.arange(victims, device=images.device).unsqueeze(1)
    clamped = ((images != boxed) & finite).flatten(2).any(dim=-1)[rows, permutation]
    boxed = boxed[rows, permutation]
    columns = {
        "victim": rows.expand(victims, batch),
        "image": torch.arange(batch).expand(victims, batch),
        "reconstruction": permutation,
        "mse": mse(boxed, originals),
        "psnr_db": psnr_db(boxed, originals),
        "ssim": ssim(boxed, originals),
        "clamped": clamped,
    }
    if lpips_net is not None:
        columns["lpips"] = lpips(boxed, originals, net=lpips_net)
    if labels is not None and true_labels is not None:
        _check_labels(labels, true_labels)
        if true_labels.shape != permutation.shape:
            raise ValueError(
                f"expected labels of shape {(victims, batch)}, got {tuple(true_labels.shape)}; "
                "one label per image"
            )
        paired = labels.to(images.device)[rows, permutation]
        columns["label_correct"] = paired == true_labels.to(images.device)
    return pd.DataFrame({name: one.flatten().cpu().numpy() for name, one in columns.items()})


def success_table(
    rows: pd.DataFrame, *, by: Sequence[str], value: str = "psnr_db", threshold: float = 20.0
) -> pd.DataFrame:
    """Success rate with its Wilson interval for every group of a table of scores.

    Args:
        rows: One row per picture, as from :func:`score`, with the columns of ``by``.
        by: Columns that name a group; groups keep the order of their first row.
        value: Column that is compared with the threshold; NaN is a failure.
        threshold: A picture is recovered at this value or above.

    Returns:
        Table with the columns of ``by``, then ``n``, ``rate``, ``low``, ``high``.

    >>> rows = pd.DataFrame({"attack": ["a", "a", "b"], "psnr_db": [30.0, 10.0, 25.0]})
    >>> success_table(rows, by=["attack"])[["attack", "n", "rate"]].values.tolist()
    [['a', 2, 0.5], ['b', 1, 1.0]]
    """
    lines = []
    for names, part in rows.groupby(list(by), sort=False):
        rate = success_rate(part[value].to_numpy(), threshold=threshold)
        lines.append([*names, rate.n, rate.estimate, rate.low, rate.high])
    return pd.DataFrame(lines, columns=[*by, "n", "rate", "low", "high"])


def _check_labels(recovered: Tensor, true: Tensor) -> None:
    if recovered.shape != true.shape or true.ndim < 1 or true.shape[-1] < 1:
        raise ValueError(
            "expected two label tensors of one shape (..., batch), batch >= 1, "
            f"got {tuple(recovered.shape)} and {tuple(true.shape)}; one label per image"
        )
    for labels in (recovered, true):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"expected integer labels, got {labels.dtype}; convert with .long()")
