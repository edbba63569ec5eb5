"""The rows of a recursive attack: one for each victim and hypothesis about its last layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from leaklib.layer_system.operators import LayerSystem


@dataclass(frozen=True)
class Solved:
    """A layer that was solved, for all rows.

    Args:
        name: module path.
        residual: of its balanced equations (rows,).
        condition: of its system (rows,).
        unknowns: entries of its input.
        rank: generic rank of its equations, None where no formula is known.
        steps: of the hybrid (rows,), None where it was not used.
        layer_input: the input that was found (rows, *shape), None where it is not kept.
    """

    name: str
    residual: Tensor
    condition: Tensor
    unknowns: int
    rank: int | None
    steps: Tensor | None = None
    layer_input: Tensor | None = None

    def select(self, which: Tensor) -> Solved:
        """Some of the rows, by a mask or by their indices."""
        return replace(
            self, residual=self.residual[which], condition=self.condition[which],
            steps=None if self.steps is None else self.steps[which],
            layer_input=None if self.layer_input is None else self.layer_input[which],
        )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Where the recursion stands: what it believes of one tensor inside the network.

    Args:
        victim: whose row it is (rows,).
        label: hypothesis (rows,).
        margin: hypothesis (rows,).
        value: the tensor (rows, *shape).
        grad: gradient of the loss there, of the same shape.
        worst: largest residual so far (rows,).
        solved: layers done, nearest the output first.
        known: which entries of the value are known, None: all.
        sides: activation -> on which side of the kink its output lies.
        system: balanced equations of the convolution that was just solved, where they are kept.
        target: their right-hand side.
    """

    victim: Tensor
    label: Tensor
    margin: Tensor
    value: Tensor
    grad: Tensor
    worst: Tensor
    solved: tuple[Solved, ...]
    known: Tensor | None = None
    sides: dict[str, Tensor] = field(default_factory=dict)
    system: LayerSystem | None = None
    target: tuple[Tensor, ...] | None = None

    def select(self, which: Tensor) -> Rows:
        """Some of the rows, by a mask or by their indices."""
        return Rows(
            self.victim[which], self.label[which], self.margin[which], self.value[which],
            self.grad[which], self.worst[which],
            tuple(s.select(which) for s in self.solved),
            None if self.known is None else self.known[which],
            {name: side[which] for name, side in self.sides.items()},
            None if self.system is None else self.system.select(which),
            None if self.target is None else tuple(part[which] for part in self.target),
        )  # fmt: skip

    def after(self, value: Tensor, grad: Tensor, solved: Solved) -> Rows:
        """The rows in front of a layer that was just solved."""
        worst = solved.residual.maximum(self.worst)
        return replace(
            self, value=value, grad=grad, worst=worst, known=None, solved=(*self.solved, solved),
            system=None, target=None,
        )  # fmt: skip

    def keep_input(self) -> Rows:
        """Remember the value as the input of the layer that was just solved."""
        *before, newest = self.solved
        return replace(self, solved=(*before, replace(newest, layer_input=self.value)))
