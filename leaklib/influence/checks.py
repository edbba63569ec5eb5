"""What an influence operator refuses, and what it warns of, before any work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.gradients.client import Loss
from leaklib.gradients.payload import SharedGradient
from leaklib.gradients.stateless import without_side_effects
from leaklib.influence.objective import differentiable_attention

FORMS = ("auto", "graph", "functional")
DTYPES = (torch.float32, torch.float64)


class RankWarning(UserWarning):
    """J has fewer columns than rows: some directions of the input leave no trace."""


def check_settings(
    *, form: str, reduction: str, dtype: torch.dtype | None, chunk: int | None
) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ValueError: with the known values.
    """
    if form not in FORMS:
        raise ValueError(f"expected form in {FORMS}, got {form!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"expected dtype None or one of {DTYPES}, got {dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected chunk >= 1 or None, got {chunk}; None goes by memory")


def check_inputs(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, dtype: torch.dtype | None
) -> None:
    """Refuse inputs and labels that cannot be the model's.

    Raises:
        TypeError: inputs that are not floating.
        ValueError: shape, value, dtype or device.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("expected a model with parameters, got none; there is no gradient")
    if not inputs.is_floating_point():
        raise TypeError(
            f"expected floating inputs, got {inputs.dtype}; J is a derivative in x, so pass 8-bit "
            "pixels as inputs.float() / 255, and tokens as their embeddings"
        )
    if inputs.ndim < 3 or not inputs.numel():
        raise ValueError(
            "expected non-empty inputs (victims, batch, *input shape), got "
            f"{tuple(inputs.shape)}; for one input a victim use inputs.unsqueeze(1)"
        )
    if first.device != inputs.device or labels.device != inputs.device:
        raise ValueError(
            f"expected model, inputs and labels on one device, got {first.device}, "
            f"{inputs.device} and {labels.device}; move them with .to(...)"
        )
    finite = inputs.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            "expected finite inputs, got NaN or infinity in victim "
            f"{int((~finite).nonzero()[0])}; mend it"
        )
    if dtype is None and (first.dtype != inputs.dtype or inputs.dtype not in DTYPES):
        raise ValueError(
            f"expected model and inputs in float32 or both in float64, got {first.dtype} and "
            f"{inputs.dtype}; pass dtype=torch.float64, which casts copies of both"
        )
    if labels.shape[:2] != inputs.shape[:2]:
        raise ValueError(
            f"expected labels (victims, batch, ...) = {tuple(inputs.shape[:2])} + (...), got "
            f"{tuple(labels.shape)}; one label an input"
        )


def evaluable_copy(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy in eval mode, free of side effects; refused where eval mode means another network.

    Raises:
        ValueError: dropout or BatchNorm in train mode, or anything else that differs there.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"expected BatchNorm with running statistics, got {name!r} on those of the batch: "
                "then every input also acts through the mean and variance, which is another "
                "problem (on ResNet-20 at batch 1 the norm of JJᵀu is 1559 instead of 39.9); call "
                "model.eval(), and build it with track_running_stats=True"
            )
    frozen = without_side_effects(model)
    if any(module.training for module in frozen.modules()):
        # dropout inside attention or by function, stochastic depth: no class tells
        one = inputs[0].to(next(frozen.parameters()).dtype)
        evaluated = copy.deepcopy(frozen).eval()
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.no_grad(), differentiable_attention(), torch.random.fork_rng(devices):
            same = _equal(frozen(one), evaluated(one))
        if not same:
            raise ValueError(
                "expected a network that does in train mode what it does in eval mode, got "
                "different outputs, as from dropout; call model.eval()"
            )
    return frozen.eval()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.allclose(first, second, equal_nan=True))


@torch.no_grad()
def check_loss(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, loss: Loss, reduction: str
) -> None:
    """Refuse labels that the network's outputs do not fit, and a loss that is no finite number.

    Raises:
        TypeError: labels for cross-entropy that are neither int64 nor of the inputs' dtype.
        ValueError: labels out of range or of another shape; a loss that is not a finite scalar.
    """
    with differentiable_attention():
        outputs = model(inputs[0])
    if loss is F.cross_entropy:
        _check_cross_entropy(outputs, labels)
    value = loss(outputs, labels[0], reduction=reduction)
    if value.ndim:
        raise ValueError(
            f"expected a scalar loss under reduction={reduction!r}, got shape "
            f"{tuple(value.shape)}; reduce it inside the loss"
        )
    if not value.isfinite():
        raise ValueError(
            f"expected a finite loss, got {value.item()} at the first victim; check the weights "
            "and the loss"
        )


def _check_cross_entropy(outputs: Tensor, labels: Tensor) -> None:
    shape = tuple(outputs.shape)
    if len(shape) < 2 or shape[0] != labels.shape[1]:
        raise ValueError(
            f"expected outputs (batch, classes) with batch {labels.shape[1]}, got {shape}; pass a "
            "loss that fits the network"
        )
    if labels.is_floating_point():
        if tuple(labels.shape[1:]) != shape:
            raise ValueError(
                f"expected soft labels (victims, *outputs) = (victims, *{shape}), got "
                f"{tuple(labels.shape)}; hard labels must be int64"
            )
        wrong = ((labels.double().sum(2) - 1).abs() > 1e-5).flatten(1).any(1)
        bad = wrong | (labels < 0).flatten(1).any(1)
        if bad.any():
            raise ValueError(
                "expected soft labels >= 0 that sum to one, got others in victim "
                f"{int(bad.nonzero()[0])}; pass probabilities, not logits"
            )
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"expected int64 labels, got {labels.dtype}; pass labels.long()")
    if tuple(labels.shape[1:]) != (shape[0], *shape[2:]):
        raise ValueError(
            f"expected labels (victims, {', '.join(map(str, (shape[0], *shape[2:])))}), got "
            f"{tuple(labels.shape)}; one label an input"
        )
    bad = ((labels < 0) | (labels >= shape[1])).flatten(1).any(1)
    if bad.any():
        victim = int(bad.nonzero()[0])
        raise ValueError(
            f"expected labels from 0 to {shape[1] - 1}, got {labels[victim].tolist()} in victim "
            f"{victim}; count classes from 0"
        )


def warn_of_rank(parameters: int, unknowns: int) -> None:
    """Warn where J cannot have full row rank.

    Warns:
        RankWarning: p < d.
    """
    if parameters < unknowns:
        warnings.warn(
            f"fewer shared parameters than unknowns, p = {parameters} < d = {unknowns}: at least "
            f"{unknowns - parameters} directions of the input leave no trace in the gradient, and "
            "undamped I²F is infinite there; pass damping > 0, or share more layers",
            RankWarning,
            stacklevel=3,
        )


def input_vectors(u: Tensor, *, unknowns: int, like: Tensor) -> Tensor:
    """Vectors u (victims, vectors, d) in the dtype of `like`.

    Raises:
        ValueError: shape, dtype or device.
    """
    if u.ndim != 3 or u.shape[0] != len(like) or u.shape[2] != unknowns or not u.shape[1]:
        raise ValueError(
            f"expected u (victims, vectors, d) = ({len(like)}, vectors, {unknowns}), got "
            f"{tuple(u.shape)}; flatten the input axes, and use u.unsqueeze(1) for one vector"
        )
    return _cast("u", u, like)


def parameter_vectors(
    v: Mapping[str, Tensor] | SharedGradient,
    *,
    shapes: Mapping[str, torch.Size],
    victims: int,
    like: Tensor,
) -> dict[str, Tensor]:
    """Vectors v, name -> (victims, vectors, *shape), from such with or without the second axis.

    Raises:
        ValueError: names, shapes, dtype or device.
    """
    tensors = v.tensors if isinstance(v, SharedGradient) else v
    if set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise ValueError(
            f"expected the operator's shared parameters, got {missing} missing and {extra} beyond; "
            "build the operator with layers=... of the layers that v covers, or cut v to it"
        )
    result, counts = {}, set()
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.ndim == len(shape) + 1:
            tensor = tensor.unsqueeze(1)
        if tensor.shape[:1] + tensor.shape[2:] != (victims, *shape) or not tensor.shape[1]:
            raise ValueError(
                f"expected {name!r} as (victims, *shape) = {(victims, *shape)} or (victims, "
                f"vectors, *shape), got {tuple(tensors[name].shape)}; was it taken on another "
                "model, or other victims?"
            )
        counts.add(tensor.shape[1])
        result[name] = _cast(name, tensor, like)
    if len(counts) > 1:
        raise ValueError(f"expected as many vectors in every tensor, got {sorted(counts)}")
    return result


def _cast(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Widen float32 to float64; the other way would lose digits unsaid."""
    fits = torch.promote_types(tensor.dtype, like.dtype) == like.dtype
    if tensor.device != like.device or not tensor.is_floating_point() or not fits:
        raise ValueError(
            f"expected {name!r} as {like.dtype} on {like.device}, got {tensor.dtype} on "
            f"{tensor.device}; build the operator with dtype={tensor.dtype}, or use .to(...)"
        )
    return tensor.detach().to(like.dtype)
