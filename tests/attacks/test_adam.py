import pytest
import torch

from leaklib.attacks import adam
from leaklib.attacks.adam import AdamSettings


def bowl(x, rows):
    """A different bowl for every row: centre 0.1·(row + 1), curvature row + 1."""
    curvature = (rows + 1).to(x.dtype)[:, None]
    away = x - 0.1 * curvature
    return (curvature * away**2).sum(1), 2 * curvature * away


def starts(rows=3, size=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, size, generator=generator, dtype=torch.float64)


def run(x, settings, ticks, evaluate=bowl):
    state, log = adam.start(x, settings), []
    for _ in range(ticks):
        if not state.active.any():
            break
        adam.tick(state, evaluate, settings)
        log.append(state.x.clone())
    return state, log


@pytest.mark.parametrize("signed", [False, True])
def test_equals_torch_adam_with_its_scheduler(signed):
    settings = AdamSettings(lr=0.05, signed=signed, steps=40, box=None)
    _, log = run(starts(), settings, 40)
    for row in range(3):
        x = starts()[row].clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.05)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [15, 25, 35], gamma=0.1)
        for t in range(40):
            _, gradient = bowl(x.detach()[None], torch.tensor([row]))
            x.grad = gradient[0].sign() if signed else gradient[0]
            optimiser.step()
            schedule.step()
            torch.testing.assert_close(log[t][row], x.detach(), rtol=1e-10, atol=1e-12)


def test_batched_rows_walk_the_path_of_single_rows():
    settings = AdamSettings(lr=0.2, steps=80, milestones=(), patience=4, stop_after=15)
    together, log = run(starts(), settings, 80)
    for row in range(3):
        alone, path = run(
            starts()[row : row + 1], settings, 80,
            lambda x, rows, row=row: bowl(x, rows + row),
        )  # fmt: skip
        for t, x in enumerate(path):
            assert torch.equal(x[0], log[t][row])
        assert alone.evaluations[0] == together.evaluations[row]
        assert torch.equal(alone.best_x[0], together.best_x[row])
    assert len(set(together.evaluations.tolist())) > 1, "the case should stop rows apart"


def test_best_is_the_iterate_that_was_evaluated():
    seen = []

    def evaluate(x, rows):
        value, gradient = bowl(x, rows)
        seen.append((x.clone(), value.clone()))
        return value, gradient

    state, _ = run(starts(rows=1), AdamSettings(lr=0.3, steps=30), 30, evaluate)
    best = min(range(30), key=lambda t: float(seen[t][1][0]))
    assert torch.equal(state.best_x[0], seen[best][0][0])
    assert float(state.best_value[0]) == float(seen[best][1][0])


def test_box_holds_and_binds():
    state, log = run(starts(), AdamSettings(lr=0.5, steps=20, box=(0.15, 0.25)), 20)
    assert all(float(x.min()) >= 0.15 and float(x.max()) <= 0.25 for x in log)
    torch.testing.assert_close(state.best_x[2], torch.full((4,), 0.25, dtype=torch.float64))


def test_patience_lowers_the_rate_of_that_row_alone():
    def flat_for_row_one(x, rows):
        value, gradient = bowl(x, rows)
        value[rows == 1] = 7.0
        return value, gradient

    settings = AdamSettings(lr=0.01, signed=False, steps=9, milestones=(), patience=4, box=None)
    state, _ = run(starts(rows=2), settings, 9, flat_for_row_one)
    assert float(state.lr[1]) == pytest.approx(0.01 * 0.1**2)
    assert float(state.lr[0]) == pytest.approx(0.01)


def test_nan_row_stops_and_keeps_its_best():
    calls = iter(range(100))

    def evaluate(x, rows):
        value, gradient = bowl(x, rows)
        if next(calls) == 3:
            value[rows == 0], gradient[rows == 0] = torch.nan, torch.nan
        return value, gradient

    state, _ = run(starts(rows=2), AdamSettings(steps=20), 20, evaluate)
    assert state.evaluations.tolist() == [4, 20]
    assert torch.isfinite(state.best_x).all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="lr > 0"):
        AdamSettings(lr=0)
    with pytest.raises(ValueError, match="low < high"):
        AdamSettings(box=(1.0, 0.0))
