"""Attacks by gradient matching: DLG, iDLG and inverting gradients.

All search for a dummy image whose gradient is the shared one. They differ in the distance, the
optimiser and what they take for known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.attacks import adam, lbfgs
from leaklib.attacks.driver import RunSettings, Trace, drive, snapshot_counts
from leaklib.attacks.ghost_matching import ghost_problem
from leaklib.attacks.labels import check_last_layer, last_layer, recover_label, recover_labels
from leaklib.attacks.matching_settings import Matching
from leaklib.attacks.problem import Problem, matching_problem
from leaklib.attacks.reconstruction import Reconstruction, choose_restart
from leaklib.attacks.starting import starting_variables
from leaklib.checkpoint import digest
from leaklib.gradients.client import Loss
from leaklib.gradients.payload import SharedGradient
from leaklib.gradients.stochastic import Noise, StochasticLayer, stochastic_layers


def dlg(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    labels: Tensor | None = None,
    classes: int | None = None,
    label_shape: tuple[int, ...] = (),
    matching: Matching | None = None,
    max_evaluations: int = 2_500,
    history: int = 100,
    gradient_tolerance: float = 0.0,
    restarts: int = 1,
    start: str | Mapping[str, Tensor] = "normal",
    loss: Loss = F.cross_entropy,
    run: RunSettings | None = None,
) -> Reconstruction:
    """Deep leakage from gradients: min over (x, y) of ‖∇θ L(x, softmax(y)) − ĝ‖² by L-BFGS.

    The attacker's noise for a stochastic model stays that of the first evaluation, one draw per
    victim and restart: L-BFGS compares values and gradients of different steps, which fresh noise
    would spoil. The final objective is the mean over fresh noises all the same.

    Cost: max_evaluations per victim and restart, each about 7/3 gradient evaluations.
    Source: Zhu, Liu & Han 2019, Algorithm 1, with a strong-Wolfe line search instead of fixed
    steps, which leave some runs stuck. L-BFGS and the soft label are as in the released code.

    Args:
        model: the shared model, in the client's mode.
        shared: the released gradients.
        image_shape: (channels, height, width) of one private image, or the shape of another input.
        generator: draws the starts.
        labels: (victims, batch, ...) if known; None finds them jointly, as published.
        classes: number of classes; None reads it off the last layer.
        label_shape: axes of one input's unknown label, such as (tokens,) for the next tokens.
        matching: distance, masks and priors; None is the plain squared distance.
        max_evaluations: budget of each victim and restart.
        history: curvature pairs that L-BFGS remembers; fewer save memory but converge far slower.
        gradient_tolerance: a victim stops when no entry of the objective's gradient exceeds this.
        restarts: independent starts per victim; the lowest objective is returned.
        start: "normal", "uniform", "grey", or variables with a leading (victims * restarts) axis.
        loss: the client's loss.
        run: progress, snapshots and checkpoint.

    Returns:
        Reconstruction; pixels are not boxed.

    Raises:
        ValueError: payload, labels or settings that do not fit, before any evaluation.
    """
    matching = matching or Matching("l2")
    run = run or RunSettings()
    problem, x, identity = _prepare(
        model, shared, image_shape=image_shape, generator=generator, labels=labels,
        classes=classes, label_shape=label_shape, matching=matching, restarts=restarts, start=start,
        loss=loss,
    )  # fmt: skip
    identity |= {"attack": "dlg", "history": history, "gradient_tolerance": gradient_tolerance}
    state, trace = drive(
        lbfgs.start(x, history=history),
        lambda s: lbfgs.tick(s, problem.evaluate, gradient_tolerance=gradient_tolerance),
        max_evaluations=max_evaluations, settings=_checked(run), identity=identity, label="DLG",
    )  # fmt: skip
    return conclude(problem, state, trace, labels, restarts)


def idlg(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    **settings: Any,
) -> Reconstruction:
    """Improved DLG: the label is read off the last layer, then only the image is sought.

    Source: Zhao, Mopuri & Bilen 2020; see `recover_label`. Settings are those of `dlg` but for
    `labels`.

    Raises:
        TypeError: `labels` given; that is `dlg`.
        ValueError: batch > 1, or no last layer was shared.
    """
    if "labels" in settings:
        raise TypeError("idlg recovers the labels itself; to give them, call dlg(labels=...)")
    check_last_layer(model, shared)
    return dlg(model, shared, image_shape=image_shape, generator=generator,
               labels=recover_label(shared), **settings)  # fmt: skip


def invert_gradients(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    labels: Tensor | None = None,
    matching: Matching | None = None,
    optimiser: adam.AdamSettings | None = None,
    max_evaluations: int | None = None,
    restarts: int = 1,
    start: str | Mapping[str, Tensor] = "normal",
    loss: Loss = F.cross_entropy,
    noise: Noise | None = None,
    run: RunSettings | None = None,
) -> Reconstruction:
    """Inverting gradients: min 1 − cos(∇θ L(x, y), ĝ) + α TV(x) by signed Adam inside the box.

    For a stochastic model every evaluation has fresh noise, and so have the few at the end whose
    mean is the objective returned (`Matching.score_noises`). The best iterate is that of the lowest
    single value.

    Cost: one evaluation a step, each about 7/3 gradient evaluations; where no sample sees another,
    without forming the large gradients, see `ghost_problem`.
    Source: Geiping et al. 2020, Eq. 4; steps and their decay as in the released code.

    Args:
        model: the shared model, in the client's mode.
        shared: the released gradients.
        image_shape: (channels, height, width) of one private image, or the shape of another input.
        generator: draws the starts.
        labels: (victims, batch, ...); None recovers them from the last layer first.
        matching: distance, masks and priors; None is cosine with TV weight 1e-4.
        optimiser: learning rate, signs, decay, box and stopping; None is the default of
            `AdamSettings`, whose box is that of pixels; other inputs need box=None.
        max_evaluations: budget of each victim and restart; None is the planned number of steps.
        restarts: independent starts per victim; the lowest objective is returned.
        start: "normal", "uniform", "grey", or {"images": ...} with a leading
            (victims * restarts) axis.
        loss: the client's loss.
        noise: the victims' own noise of a stochastic model, where the attacker has found it out
            (`recover_noise`): then every evaluation has it.
        run: progress, snapshots and checkpoint.

    Returns:
        Reconstruction, the best iterate that was evaluated.

    Raises:
        ValueError: payload, labels or settings that do not fit, before any evaluation.
    """
    matching = matching or Matching("cosine", tv_weight=1e-4)
    optimiser = optimiser or adam.AdamSettings()
    run = run or RunSettings()
    if optimiser.box is not None and len(image_shape) != 3:
        raise ValueError(
            f"expected no pixel box for inputs of shape {image_shape}, got {optimiser.box}; pass "
            "optimiser=AdamSettings(box=None)"
        )
    if labels is None:
        check_last_layer(model, shared)
        labels = recover_labels(shared)
    problem, x, identity = _prepare(
        model, shared, image_shape=image_shape, generator=generator, labels=labels, classes=None,
        matching=matching, restarts=restarts, start=start, loss=loss, ghost=True, noise=noise,
    )  # fmt: skip
    identity |= {"attack": "invert_gradients"} | {k: str(v) for k, v in asdict(optimiser).items()}
    state, trace = drive(
        adam.start(x, optimiser),
        lambda s: adam.tick(s, problem.at(s.evaluations), optimiser),
        max_evaluations=optimiser.steps if max_evaluations is None else max_evaluations,
        settings=_checked(run), identity=identity, label="inverting gradients",
    )  # fmt: skip
    return conclude(problem, state, trace, labels, restarts)


def _prepare(
    model: nn.Module,
    shared: SharedGradient,
    *,
    image_shape: tuple[int, ...],
    generator: torch.Generator,
    labels: Tensor | None,
    classes: int | None,
    matching: Matching,
    restarts: int,
    start: str | Mapping[str, Tensor],
    loss: Loss,
    label_shape: tuple[int, ...] = (),
    ghost: bool = False,
    noise: Noise | None = None,
) -> tuple[Problem, Tensor, dict[str, Any]]:
    """Check everything, build the problem, where asked without gradients, and its start."""
    if restarts < 1:
        raise ValueError(f"expected restarts >= 1, got {restarts}")
    if labels is not None and labels.shape[:2] != (shared.victims, shared.batch):
        raise ValueError(
            f"expected labels (victims, batch) = ({shared.victims}, {shared.batch}), got "
            f"{tuple(labels.shape)}"
        )
    if labels is None and classes is None:
        check_last_layer(model, shared)
        classes = max(2, shared.tensors[last_layer(shared)[0]].shape[1])  # a logit parts two
    if labels is not None:
        labels = _checked_labels(labels, model, shared)
    seed = None
    if stochastic_layers(model):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    posed: dict[str, Any] = {
        "image_shape": image_shape, "labels": labels, "matching": matching, "restarts": restarts,
        "loss": loss, "noise_seed": seed, "noise": noise,
    }  # fmt: skip
    problem = ghost_problem(model, shared, **posed) if ghost else None
    problem = problem or matching_problem(
        model, shared, **posed, classes=classes or 0, label_shape=label_shape
    )
    x = problem.pack(starting_variables(problem.shapes, shared, restarts, start, generator))
    _try_once(problem, x)
    facts = {
        "matching": str(matching), "restarts": restarts, "image_shape": str(image_shape),
        "loss": getattr(loss, "__qualname__", str(loss)), "reduction": shared.reduction,
        "protocol": str(shared.protocol), "training": model.training,
        "payload": digest(shared.tensors), "start": digest({"start": x}),
        "model": digest(model.state_dict()),
        "known noise": "none" if noise is None else digest(noise),
        "noise": f"{seed} {[m for m in model.modules() if isinstance(m, StochasticLayer)]}",
        "labels": "joint" if labels is None else digest({"labels": labels}),
        "statistics": digest(
            {f"{n} {i}": t for n, pair in (shared.statistics or {}).items()
             for i, t in enumerate(pair)}
        ),
    }  # fmt: skip
    return problem, x, facts


def _checked_labels(labels: Tensor, model: nn.Module, shared: SharedGradient) -> Tensor:
    """Labels on the payload's device, in the range of the classes."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    classes = max(2, len(matrices[-1])) if matrices else None  # one logit parts two
    if labels.is_floating_point() or bool((labels < 0).any()):
        raise ValueError(f"expected integer labels >= 0, got {labels.flatten()[:5].tolist()} ...")
    if classes is not None and bool((labels >= classes).any()):
        raise ValueError(f"expected labels below {classes}, got {int(labels.max())}")
    return labels.to(shared.device)


def _try_once(problem: Problem, x: Tensor) -> None:
    """Evaluate one row, so that a wrong image shape fails with a reason, not mid-run."""
    row = torch.zeros(1, dtype=torch.int64, device=x.device)
    try:
        problem.evaluate(x[:1], row)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            "expected an image_shape and labels that the model accepts; the model answered: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _checked(run: RunSettings) -> RunSettings:
    return replace(run, snapshots=snapshot_counts(run.snapshots))


def conclude(
    problem: Problem,
    state: lbfgs.LBFGSState | adam.AdamState,
    trace: Trace,
    labels: Tensor | None,
    restarts: int,
) -> Reconstruction:
    """Choose among restarts by the attack's objective and unpack the winners."""
    objective = problem.score(state.best_x, state.best_value)
    chosen = choose_restart(objective, restarts)
    found = problem.unpack(state.best_x[chosen])
    unpack: Callable[[Tensor], Tensor] = lambda x: problem.unpack(x)["images"]  # noqa: E731
    rows = chosen.cpu()
    scoring = problem.score_noises if problem.stochastic else 0
    return Reconstruction(
        images=found["images"],
        labels=labels if labels is not None else found["label_logits"].argmax(2),
        objective=objective[chosen],
        evaluations=(state.evaluations + scoring).view(-1, restarts).sum(1),
        frames=torch.stack([unpack(f[chosen]) for f in trace.frames])
        if len(trace.frames)
        else None,
        history=trace.values[:, rows],
        history_evaluations=trace.evaluations[:, rows],
        restart=chosen % restarts,
    )
