"""R-GAP: a private picture in closed form, one layer after another from the output to the image.

    x_i = argmin ‖[W_i; s K_i] x − [z_i; s ∇W_i]‖,
    z_{i−1} = σ⁻¹(x_i) − b_{i−1},   k_{i−1} = (W_iᵀ k_i) ⊙ σ'(z_{i−1}).

It starts with what the last layer says (`last_layer`) and needs no search where every layer has
full rank. Source: Zhu & Blaschko 2021, Algorithm 1. Ours are the balanced rows, the operators in
place of matrices, the unknown label, both roots, biases, further activations, and the hybrid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from leaklib.attacks.last_layer import LastLayer, read_last_layer
from leaklib.attacks.recursive.checks import check_gradient, check_labels, check_settings, head_of
from leaklib.attacks.recursive.report import (
    LayerReport,
    RecursiveReconstruction,
    outside_box,
)
from leaklib.attacks.recursive.rows import Rows, Solved
from leaklib.attacks.recursive.steps import StepSettings, step
from leaklib.chain import (
    ConvStage,
    ElementwiseStage,
    LinearStage,
    ResidualStage,
    Stage,
    read_chain,
)
from leaklib.gradients.payload import SharedGradient, check_payload
from leaklib.layer_system.solve import Solver
from leaklib.layer_system.split import CUTOFF
from leaklib.margin_losses import LOGISTIC, MarginLoss
from leaklib.precision import full_float32

# A hypothesis is dropped when its worst residual exceeds the best one's by this factor.
_WORSE = 10.0


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

    Computes in float64 whatever the gradient's dtype. Piecewise-linear activations let errors of
    float32 gradients through at their size, MSE about 1e-11; smooth ones amplify them.
    Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1 and Eq. 5-9.

    Args:
        model: a chain, see `leaklib.chain.read_chain`, in eval mode.
        shared: the released gradients, all weights of the chain.
        image_shape: (channels, height, width).
        loss: of a model with one logit; None is logistic there, and cross-entropy of the softmax
            for more logits.
        labels: (victims, 1) if known; None tries both, and the next layer's residual decides.
        solver: of each layer, see `solve_layer`; "published" reproduces the paper's unscaled rows
            and its float32 values between layers.
        deficient: what to do where a layer has fewer equations than unknowns. "minimum norm" as
            published; "hybrid" adds what the layer before implies, see `fill_deficit`.
        truncation: with solver="gradient first", singular values to leave out, see `solve_split`.
        mixture: accept a batch of several pictures and run as if it were one; the answer is a
            linear combination of the batch (paper, section 4.3).
        pruned: refuse a gradient with many exact zeros, which are no equations, or "keep" them.
        keep_inputs: return the input found for every layer, too.
        progress: show a bar over the layers.

    Returns:
        RecursiveReconstruction; pixels are not boxed. Cost: no gradient evaluation; per layer a few
        hundred products with its own weights at most.

    Raises:
        ValueError: before any long work: a layer that cannot be undone, a payload that does not
            fit, several pictures, a dead layer; later: a label that contradicts its gradient.
    """
    check_settings(solver, deficient, pruned)
    stages = read_chain(model, image_shape)
    check_payload(model, shared)
    head, last, behind = head_of(stages)
    check_gradient(stages, shared, mixture=mixture, pruned=pruned)
    margin_loss = loss or (LOGISTIC if last.output_shape == (1,) else None)
    labels = check_labels(labels, shared, last.output_shape[0], margin_loss)
    # One logit or two without bias: both labels stay in the race, so that a wrong one is noticed.
    undecided = last.output_shape[0] <= 2 and _gradient(shared, f"{last.name}.bias") is None
    hypotheses = read_last_layer(
        last.weight,
        last.bias,
        shared.tensors[f"{last.name}.weight"].double(),
        _gradient(shared, f"{last.name}.bias"),
        loss=margin_loss or "softmax",
        labels=None if undecided else labels,
        # the published code takes the activation behind the last layer for the identity
        activation=None if solver == "published" else behind,
    )
    settings = StepSettings(
        solver, deficient, truncation,
        tolerance=1e-13 if shared.dtype == torch.float64 else 1e-10,
        rounding=solver == "published", keep_inputs=keep_inputs,
    )  # fmt: skip
    grads = {name: tensor.double() for name, tensor in shared.items()}
    rows = _descend(stages[: head + 1], last, hypotheses, grads, settings, labels, progress)
    return _conclude(stages, rows, hypotheses, shared)


def _descend(
    stages: tuple[Stage, ...],
    last: LinearStage,
    hypotheses: LastLayer,
    grads: Mapping[str, Tensor],
    settings: StepSettings,
    labels: Tensor | None,
    progress: bool,
) -> Rows:
    """Walk from the last layer's input to the image, dropping hypotheses on the way."""
    rows = Rows(
        victim=hypotheses.victim,
        label=hypotheses.label,
        margin=hypotheses.margin,
        value=hypotheses.layer_input,
        grad=hypotheses.preactivation_grad @ last.weight,
        worst=hypotheses.residual,
        solved=(_solved_head(last, hypotheses),),
    )
    rows = rows.keep_input() if settings.keep_inputs else rows
    first = True
    for index in tqdm(
        range(len(stages) - 2, -1, -1), desc="R-GAP", unit="layer", disable=not progress
    ):
        before = len(rows.solved)
        rows = step(stages, index, rows, grads, settings)
        if len(rows.solved) > before:
            rows = rows.keep_input() if settings.keep_inputs else rows
            if labels is not None and first:
                rows = _keep_given(rows, labels, stages[index].name)
            rows, first = _drop_worse(rows), False
    if labels is not None and first:  # a network of one layer
        rows = _keep_given(rows, labels, last.name)
    return rows


def _solved_head(last: LinearStage, hypotheses: LastLayer) -> Solved:
    """The last layer as a solved one: an outer product, always of full rank."""
    inputs = last.input_shape[0]
    ones = torch.ones_like(hypotheses.residual)
    return Solved(last.name, hypotheses.residual, ones, inputs, inputs)


def _keep_given(rows: Rows, labels: Tensor, layer: str) -> Rows:
    """Keep the given labels, or say that the gradient speaks against one."""
    given = rows.label == labels[rows.victim, 0]
    for victim in rows.victim.unique().tolist():
        mine = rows.victim == victim
        with_given = rows.worst[mine & given].amin() if bool((mine & given).any()) else torch.inf
        other = mine & ~given
        against = rows.worst[other].amin() if bool(other.any()) else torch.inf
        if with_given > 1e-2 and with_given > _WORSE * against:
            raise ValueError(
                f"expected labels that fit the gradient, got label {int(labels[victim, 0])} for "
                f"victim {victim}: layer {layer!r} then has the residual {float(with_given):.2g}, "
                f"against {float(against):.2g} with the other label; pass labels=None to have "
                "labels found"
            )
    return rows.select(given)


def _drop_worse(rows: Rows) -> Rows:
    """Drop hypotheses whose equations contradict each other far more than another's do."""
    best = rows.worst.new_full((int(rows.victim.max()) + 1,), torch.inf)
    best = best.scatter_reduce(0, rows.victim, rows.worst.nan_to_num(nan=torch.inf), "amin")
    keep = rows.worst <= (_WORSE * best[rows.victim]).clamp_min(1e-9)
    # where everything is NaN or equally bad, all stay
    kept = torch.zeros_like(best).scatter_add(0, rows.victim, keep.to(best.dtype))
    return rows.select(keep | (kept[rows.victim] == 0))


def _conclude(
    stages: tuple[Stage, ...], rows: Rows, hypotheses: LastLayer, shared: SharedGradient
) -> RecursiveReconstruction:
    """Choose one hypothesis a victim by the pixel range, and report every layer."""
    violation = outside_box(rows.value)
    chosen, twin = [], []
    for victim in range(shared.victims):
        mine = (rows.victim == victim).nonzero()[:, 0]
        order = mine[violation[mine].argsort(stable=True)]
        chosen.append(int(order[0]))
        same = [int(r) for r in order[1:] if rows.label[r] == rows.label[order[0]]]
        twin.append(same[0] if same else -1)
    index = torch.tensor(chosen, device=rows.value.device)
    others = torch.tensor(twin, device=rows.value.device)
    images = rows.value[index].unsqueeze(1)
    twins = torch.where(
        (others < 0).view(-1, 1, 1, 1, 1), torch.nan, rows.value[others.clamp_min(0)].unsqueeze(1)
    )
    best = rows.select(index)
    flips = _sign_flips(stages, best)
    by_name = {solved.name: solved for solved in best.solved}
    reports = []
    for stage in stages:
        if stage.name not in by_name:
            continue
        solved = by_name[stage.name]
        none = torch.zeros(shared.victims, dtype=torch.int64, device=images.device)
        reports.append(
            LayerReport(
                stage.name, solved.unknowns, solved.rank, solved.residual,
                solved.condition, flips.get(stage.name, none),
                none if solved.steps is None else solved.steps,
            )
        )  # fmt: skip
    return RecursiveReconstruction(
        images=images.to(shared.dtype),
        labels=best.label.unsqueeze(1),
        objective=torch.stack([report.residual for report in reports]).amax(0),
        evaluations=torch.zeros(shared.victims, dtype=torch.int64, device=images.device),
        layers=tuple(reports),
        margins=best.margin,
        margin_roots=_roots(hypotheses, best.label),
        twins=twins.to(shared.dtype),
        inputs=_inputs(stages, best),
    )


def _inputs(stages: tuple[Stage, ...], rows: Rows) -> dict[str, Tensor] | None:
    """Layer -> the input found for it, from the image to the output; None if none was kept."""
    kept = {s.name: s.layer_input for s in rows.solved if s.layer_input is not None}
    return {stage.name: kept[stage.name] for stage in stages if stage.name in kept} or None


def _roots(hypotheses: LastLayer, labels: Tensor) -> Tensor:
    """All roots of each victim under its label, ascending, NaN where there is none."""
    found = hypotheses.margin.new_full((len(labels), 2), torch.nan)
    for victim, label in enumerate(labels.tolist()):
        # of one label: behind an activation the other's differ by rounding, and would count twice
        mine = (hypotheses.victim == victim) & (hypotheses.label == label)
        roots = hypotheses.margin[mine]
        roots = roots[roots.isfinite()].sort().values
        found[victim, : len(roots)] = roots
    return found


def _sign_flips(stages: tuple[Stage, ...], rows: Rows) -> dict[str, Tensor]:
    """Layer -> entries of its output that a forward pass puts on the kink's other side."""
    flips: dict[str, Tensor] = {}
    value, layer = rows.value, ""
    for stage in stages:
        fresh = stage.forward(value)
        if isinstance(stage, ElementwiseStage):
            if stage.inverse.kink is not None and stage.name in rows.sides:
                differ = (fresh >= stage.inverse.kink) != rows.sides[stage.name]
                flips[layer] = differ.flatten(1).sum(1)
        elif isinstance(stage, ConvStage | LinearStage | ResidualStage):
            layer = stage.name
        value = fresh
    return flips


def _gradient(shared: SharedGradient, name: str) -> Tensor | None:
    return shared.tensors[name].double() if name in shared.tensors else None
