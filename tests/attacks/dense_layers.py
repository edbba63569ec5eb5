"""A network read as plain steps, and its layers and activations as matrices and formulas.

The slow reference of the recursive attack's tests: loops over places and taps, nothing shared with
the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray
from torch import nn

Shape = tuple[int, ...]


# --- the matrices of one layer ----------------------------------------------------------------


def meetings(layer: dict, shape: Shape):
    """Every (filter, channel in the group, tap, place) with the input entry that they meet."""
    filters, channels, taps_high, taps_wide = layer["weight"].shape
    per_group = filters // layer["groups"]
    (sy, sx), (py, px), (dy, dx) = layer["stride"], layer["padding"], layer["dilation"]
    _, high, wide = output_shape(layer, shape)
    for f in range(filters):
        for c in range(channels):
            channel = f // per_group * channels + c
            for i in range(taps_high):
                for j in range(taps_wide):
                    for row in range(high):
                        for col in range(wide):
                            y, x = row * sy + i * dy - py, col * sx + j * dx - px
                            if 0 <= y < shape[1] and 0 <= x < shape[2]:
                                entry = (channel * shape[1] + y) * shape[2] + x
                                yield (f, c, i, j), (f, row, col), entry


def output_shape(layer: dict, shape: Shape) -> Shape:
    """(filters, height, width), or (outputs,) of a dense layer."""
    if layer["kind"] == "linear":
        return (len(layer["weight"]),)
    if layer["kind"] == "residual":
        return output_shape(layer["second"], output_shape(layer["first"], shape))
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            shape[1:], layer["padding"], layer["dilation"], layer["weight"].shape[2:],
            layer["stride"], strict=True,
        )
    ]  # fmt: skip
    return (len(layer["weight"]), *sizes)


def weight_rows(layer: dict, shape: Shape) -> ndarray:
    """W with z = W x + b: (outputs, inputs)."""
    if layer["kind"] == "linear":
        return layer["weight"]
    out = output_shape(layer, shape)
    rows = np.zeros((*out, int(np.prod(shape))))
    for weight, place, entry in meetings(layer, shape):
        rows[(*place, entry)] += layer["weight"][weight]
    return rows.reshape(-1, rows.shape[-1])


def gradient_rows(layer: dict, shape: Shape, k: ndarray) -> ndarray:
    """K with vec(∂L/∂W) = K x, for k = ∂L/∂z: (weights, inputs)."""
    if layer["kind"] == "linear":
        return np.kron(k.reshape(-1, 1), np.eye(int(np.prod(shape))))
    k = k.reshape(output_shape(layer, shape))
    rows = np.zeros((*layer["weight"].shape, int(np.prod(shape))))
    for weight, place, entry in meetings(layer, shape):
        rows[(*weight, entry)] += k[place]
    return rows.reshape(-1, rows.shape[-1])


def spread(layer: dict, shape: Shape) -> ndarray:
    """The bias of every output (outputs,), zero where the layer has none."""
    out = output_shape(layer, shape)
    bias = np.zeros(out[0]) if layer["bias"] is None else layer["bias"]
    return np.broadcast_to(bias.reshape(-1, *[1] * (len(out) - 1)), out).reshape(-1)


def pool_rows(step: dict, shape: Shape) -> tuple[ndarray, Shape]:
    """Average pooling as a matrix, one row a place, padding counted or not."""
    channels, high, wide = shape
    (ky, kx), (sy, sx), (py, px) = step["kernel"], step["stride"], step["padding"]
    out = (channels, (high + 2 * py - ky) // sy + 1, (wide + 2 * px - kx) // sx + 1)
    rows = np.zeros((*out, *shape))
    for c, row, col in np.ndindex(*out):
        met = [
            (row * sy + i - py, col * sx + j - px)
            for i in range(ky)
            for j in range(kx)
            if 0 <= row * sy + i - py < high and 0 <= col * sx + j - px < wide
        ]
        for y, x in met:
            rows[c, row, col, c, y, x] = 1 / (ky * kx if step["count_padding"] else len(met))
    return rows.reshape(int(np.prod(out)), -1), out


# --- activations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """σ⁻¹ and σ' as functions of σ's own output a, and which outputs tell z at all."""

    inverse: Callable[[ndarray], ndarray]
    slope: Callable[[ndarray], ndarray]
    known: Callable[[ndarray], ndarray] = field(default=lambda a: np.ones(a.shape, dtype=bool))


def activation(name: str, value: float = 0.0) -> Activation:
    """By name; `value` is LeakyReLU's slope, ELU's alpha or Softplus' beta."""
    v = value
    table = {
        "identity": (lambda a: a, np.ones_like),
        "leaky": (lambda a: np.where(a >= 0, a, a / v), lambda a: np.where(a >= 0, 1.0, v)),
        "tanh": (np.arctanh, lambda a: 1 - a**2),
        "sigmoid": (lambda a: np.log(a / (1 - a)), lambda a: a * (1 - a)),
        # log(expm1(v a)) without overflow
        "softplus": (
            lambda a: a + np.log(-np.expm1(-v * a)) / v,
            lambda a: -np.expm1(-v * a),
        ),
        "elu": (
            lambda a: np.where(a >= 0, a, np.log1p(np.minimum(a, 0) / v)),
            lambda a: np.where(a >= 0, 1.0, a + v),
        ),
    }
    if name == "relu":
        # zeros come back from a solve as rounding errors of either sign
        def active(a: ndarray) -> ndarray:
            return a > 1e-9 * np.abs(a).max()

        return Activation(lambda a: np.where(active(a), a, 0), lambda a: 1.0 * active(a), active)
    return Activation(*table[name])


def scaling(scale: ndarray, shift: ndarray) -> Activation:
    """A normalisation with known statistics, a = scale·z + shift."""
    return Activation(lambda a: (a - shift) / scale, lambda a: np.broadcast_to(scale, a.shape))


# --- reading a network ------------------------------------------------------------------------


def describe(model: nn.Module, prefix: str = "") -> list[dict]:
    """A chain of modules as plain steps with numpy arrays."""
    steps = []
    for key, module in model.named_children():
        name = f"{prefix}{key}"
        if isinstance(module, nn.Sequential):
            steps += describe(module, f"{name}.")
        elif hasattr(module, "shortcut"):
            parts = {"first": module.conv1, "second": module.conv2, "shortcut": module.shortcut}
            named = {"first": "conv1", "second": "conv2", "shortcut": "shortcut"}
            block = {
                part: _step(layer, f"{name}.{named[part]}")
                for part, layer in parts.items()
                if layer is not None
            }
            inner, outer = _step(module.act1, f"{name}.act1"), _step(module.act2, f"{name}.act2")
            if module.shortcut is None:
                steps += [block["first"], inner, block["second"], outer]
            else:
                steps.append({"kind": "residual", "name": name, **block, "act": inner["act"]})
                steps.append(outer)
        else:
            steps.append(_step(module, name))
    return steps


def _array(tensor) -> ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _step(module: nn.Module, name: str) -> dict:
    match module:
        case nn.Conv2d():
            padding = module.padding
            if padding == "valid":
                padding = 0
            elif padding == "same":
                reach = zip(_pair(module.dilation), module.kernel_size, strict=True)
                padding = tuple(d * (k - 1) // 2 for d, k in reach)
            return {
                "kind": "conv", "name": name, "weight": _array(module.weight),
                "bias": _array(module.bias), "stride": _pair(module.stride),
                "padding": _pair(padding), "dilation": _pair(module.dilation),
                "groups": module.groups,
            }  # fmt: skip
        case nn.Linear():
            return {
                "kind": "linear", "name": name, "weight": _array(module.weight),
                "bias": _array(module.bias),
            }  # fmt: skip
        case nn.AvgPool2d():
            return {
                "kind": "pool", "name": name, "kernel": _pair(module.kernel_size),
                "stride": _pair(module.stride), "padding": _pair(module.padding),
                "count_padding": module.count_include_pad,
            }  # fmt: skip
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            scale = _array((module.running_var + module.eps).rsqrt())
            shift = -_array(module.running_mean) * scale
            if module.affine:
                scale, shift = scale * _array(module.weight), shift * _array(module.weight)
                shift = shift + _array(module.bias)
            return {"kind": "scale", "name": name, "scale": scale, "shift": shift}
        case nn.Flatten():
            return {"kind": "flatten", "name": name}
        case nn.Identity():
            return {"kind": "act", "name": name, "act": ("identity",)}
        case nn.LeakyReLU():
            return {"kind": "act", "name": name, "act": ("leaky", module.negative_slope)}
        case nn.Tanh() | nn.Sigmoid() | nn.ReLU():
            return {"kind": "act", "name": name, "act": (type(module).__name__.lower(),)}
        case nn.Softplus():
            return {"kind": "act", "name": name, "act": ("softplus", module.beta)}
        case nn.ELU():
            return {"kind": "act", "name": name, "act": ("elu", module.alpha)}
    if hasattr(module, "mean") and hasattr(module, "std"):
        mean, std = _array(module.mean).reshape(-1), _array(module.std).reshape(-1)
        return {"kind": "scale", "name": name, "scale": 1 / std, "shift": -mean / std}
    raise TypeError(f"the reference knows no {type(module).__name__} ({name})")


@dataclass(frozen=True)
class Stage:
    """One layer with a linear system about its input, and what stands in front of it.

    Args:
        layer: a convolution, dense layer, residual block or pooling.
        shape: of the layer's input x.
        before: the elementwise maps between the layer in front and x, in order.
        pool: Q where a pooling stands directly behind a convolution, z = Q (W x + b).
    """

    layer: dict
    shape: Shape
    before: tuple[Activation, ...]
    pool: ndarray | None = None

    @property
    def rows(self) -> ndarray:
        """W of the layer alone."""
        if self.layer["kind"] == "pool":
            return pool_rows(self.layer, self.shape)[0]
        return weight_rows(self.layer, self.shape)


def read(steps: list[dict], image_shape: Shape) -> tuple[list[Stage], tuple[Activation, ...]]:
    """Stages of a chain from the image on, and the elementwise maps behind the last."""
    stages: list[Stage] = []
    shape, between, previous = tuple(image_shape), [], ""
    for step in steps:
        kind = step["kind"]
        if kind == "pool" and previous == "conv":
            matrix, shape = pool_rows(step, shape)
            one = stages[-1]
            stages[-1] = Stage(one.layer, one.shape, one.before, matrix)
        elif kind in ("conv", "linear", "residual", "pool"):
            stages.append(Stage(step, shape, tuple(between)))
            shape = pool_rows(step, shape)[1] if kind == "pool" else output_shape(step, shape)
            between = []
        elif kind == "act":
            between.append(activation(*step["act"]))
        elif kind == "scale":
            each, channels = int(np.prod(shape[1:])), shape[0]
            spread_out = [
                np.repeat(np.broadcast_to(step[part], channels), each)
                for part in ("scale", "shift")
            ]
            between.append(scaling(*spread_out))
        else:
            shape = (int(np.prod(shape)),)
        previous = kind
    return stages, tuple(between)
