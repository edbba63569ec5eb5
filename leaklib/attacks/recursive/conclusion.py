"""How a recursion ends: one hypothesis a victim, and a report of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from leaklib.attacks.last_layer import LastLayer
from leaklib.attacks.recursive.opening import Opening
from leaklib.attacks.recursive.report import LayerReport, RecursiveReconstruction, outside_box
from leaklib.attacks.recursive.rows import Rows
from leaklib.chain import ConvStage, ElementwiseStage, LinearStage, ResidualStage, Stage
from leaklib.gradients.payload import SharedGradient


def conclude(opening: Opening, rows: Rows, shared: SharedGradient) -> RecursiveReconstruction:
    """Choose one hypothesis a victim by the pixel range, and report every layer."""
    stages, hypotheses = opening.stages, opening.hypotheses
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
