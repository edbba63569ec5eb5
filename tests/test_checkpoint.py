"""Killed training runs against whole ones; damaged and foreign checkpoints."""

import doctest

import pandas as pd
import pytest
import torch
from torch import nn

import leaklib.checkpoint
import leaklib.training_steps
from leaklib.training import train


def some_data(n=20, classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 4, 4, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (n,), generator=generator)


def small_model(seed=0):
    """With everything that has a state: running statistics and random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_doctests():
    assert doctest.testmod(leaklib.checkpoint).failed == 0


SETTINGS = {"epochs": 4, "batch_size": 8, "lr": 0.01, "keep_epochs": (0, 1, 4)}


def whole_run(**changes):
    model, generator = small_model(), rng()
    settings = {"validation": some_data(seed=1), **SETTINGS, **changes}
    result = train(model, some_data(), generator=generator, **settings)
    return model.state_dict(), result, generator.get_state()


def kill_after(batches, monkeypatch):
    forward, count = leaklib.training_steps.forward, iter(range(batches))

    def dying(model, data, rows):
        if model.training and next(count, None) is None:
            raise KeyboardInterrupt
        return forward(model, data, rows)

    monkeypatch.setattr(leaklib.training_steps, "forward", dying)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("batches", [1, 3, 8])
def test_a_killed_run_ends_with_the_same_bits(batches, optimiser, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "run.pt"
    with monkeypatch.context() as patch:
        kill_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            whole_run(checkpoint=path, optimiser=optimiser)
    assert path.exists() == (batches >= 3)  # three batches make an epoch
    assert [p.name for p in path.parent.iterdir()] == (["run.pt"] if batches >= 3 else [])
    state, result, generator = whole_run(checkpoint=path, optimiser=optimiser)
    expected_state, expected, expected_generator = whole_run(optimiser=optimiser)
    assert same(state, expected_state)
    assert torch.equal(generator, expected_generator)
    pd.testing.assert_frame_equal(result.history, expected.history, check_exact=True)
    assert list(result.states) == list(expected.states)
    assert all(same(result.states[e], expected.states[e]) for e in expected.states)


def test_resuming_does_not_repeat_epochs(tmp_path, monkeypatch):
    whole_run(checkpoint=tmp_path / "run.pt")
    with monkeypatch.context() as patch:
        kill_after(0, patch)  # a single batch would raise
        state, result, _ = whole_run(checkpoint=tmp_path / "run.pt")
    assert len(result.history) == 4
    assert same(state, whole_run()[0])


def test_a_finished_run_can_be_extended(tmp_path):
    path = tmp_path / "run.pt"
    whole_run(checkpoint=path, epochs=2, keep_epochs=())
    extended = whole_run(checkpoint=path, epochs=4, keep_epochs=(3,))
    assert same(extended[0], whole_run()[0])
    with pytest.raises(ValueError, match=r"at epoch 4, beyond epochs=3: ask for at least 4"):
        whole_run(checkpoint=path, epochs=3, keep_epochs=())
    with pytest.raises(ValueError, match=r"at epoch 4 and did not keep epochs \[1, 2\]"):
        whole_run(checkpoint=path, keep_epochs=(1, 2, 3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.02}, "lr"),
        ({"batch_size": 7}, "batch_size"),
        ({"optimiser": "sgd"}, "optimiser"),
        ({"data": some_data(seed=5)}, "data"),
        ({"validation": some_data(seed=5)}, "validation"),
        ({"model": small_model(seed=5)}, "initial weights"),
        ({"generator": rng(5)}, "generator"),
        ({"generator": rng(5), "lr": 0.02}, "lr, generator"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, named, tmp_path):
    path = tmp_path / "run.pt"
    first = {"model": small_model(), "data": some_data(), "generator": rng(), "lr": 0.01}
    train(**first, epochs=1, checkpoint=path)
    content = path.read_bytes()
    second = {"model": small_model(), "data": some_data(), "generator": rng(), "lr": 0.01}
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in: {named};"):
        train(**{**second, **change}, epochs=2, checkpoint=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage", ["half", "last byte", "flipped bits", "empty", "text", "list", "no settings"]
)
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    path = tmp_path / "run.pt"
    train(small_model(), some_data(), epochs=1, generator=rng(), checkpoint=path)
    whole = path.read_bytes()
    half = len(whole) // 2
    if damage in ("list", "no settings"):
        torch.save([1, 2] if damage == "list" else {"model": {}}, path)
    else:
        content = {
            "half": whole[:half],
            "last byte": whole[:-1],
            "flipped bits": whole[:half]
            + bytes(255 - b for b in whole[half : half + 600])
            + whole[half + 600 :],
            "empty": b"",
            "text": b"not a checkpoint",
        }
        path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"run\.pt is not a whole checkpoint.*delete it"):
        train(small_model(), some_data(), epochs=2, generator=rng(), checkpoint=path)


def test_a_checkpoint_loads_without_running_code(tmp_path):
    path = tmp_path / "run.pt"
    model = small_model()
    train(model, some_data(), epochs=1, generator=rng(), checkpoint=path)
    content = torch.load(path, weights_only=True)
    assert same(content["model"], model.state_dict())
    assert content["history"][0]["epoch"] == 1


def test_an_impossible_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model, path = small_model(), tmp_path / "file" / "run.pt"
    with pytest.raises(OSError, match="expected a folder that can be written"):
        train(model, some_data(), epochs=1, generator=rng(), checkpoint=path)
    assert same(model.state_dict(), small_model().state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_callers_generators_stay_and_a_run_resumes(tmp_path):
    before = torch.cuda.get_rng_state()
    for epochs in (1, 3):
        model = small_model().cuda()
        settings = {"generator": rng(), "checkpoint": tmp_path / "run.pt", "keep_epochs": (1,)}
        result = train(model, some_data(), epochs=epochs, batch_size=8, **settings)
    assert len(result.history) == 3
    assert result.states[1]["0.weight"].device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), before)
