import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import (
    AdamSettings,
    Matching,
    RunSettings,
    analytic,
    dlg,
    idlg,
    invert_gradients,
)
from leaklib.attacks.reconstruction import choose_restart
from leaklib.gradients import share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.metrics import psnr_db
from leaklib.models import build

SHAPE = (1, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def setting(victims=3, **options):
    model, private = small_lenet(), random_victims(victims=victims, **options)
    return model, private, share_gradient(model, private)


def test_dlg_recovers_image_and_label():
    model, victims, shared = setting()
    found = dlg(model, shared, image_shape=SHAPE, generator=generator(), max_evaluations=600)
    assert torch.equal(found.labels, victims.labels)
    assert float(psnr_db(found.images, victims.images).min()) > 40
    assert found.images.shape == victims.images.shape
    assert bool((found.evaluations <= 600).all())


def test_idlg_recovers_with_fewer_unknowns():
    model, victims, shared = setting()
    found = idlg(model, shared, image_shape=SHAPE, generator=generator(), max_evaluations=600)
    assert torch.equal(found.labels, victims.labels)
    assert float(psnr_db(found.images, victims.images).min()) > 40
    with pytest.raises(TypeError, match="dlg"):
        idlg(model, shared, image_shape=SHAPE, generator=generator(), labels=victims.labels)


@pytest.mark.parametrize("known", [True, False])
def test_dlg_on_one_logit(known):
    """Both labels are valid although there is one output; unknown, they are found jointly."""
    layers = ((8, 3, 2, 1), (8, 3, 1, 1))
    settings = {"classes": 1, "activation": "sigmoid", "init": "uniform", "layers": layers}
    model = build("chain", input_shape=SHAPE, **settings).double()
    victims = random_victims(victims=4, classes=2)
    assert set(victims.labels.flatten().tolist()) == {0, 1}
    shared = share_gradient(model, victims, loss=LOGISTIC)
    labels = victims.labels if known else None
    found = dlg(model, shared, image_shape=SHAPE, generator=generator(), labels=labels,
                loss=LOGISTIC, max_evaluations=300)  # fmt: skip
    assert torch.equal(found.labels, victims.labels)
    assert float(psnr_db(found.images, victims.images).min()) > 40
    with pytest.raises(ValueError, match="below 2, got 2"):
        dlg(model, shared, image_shape=SHAPE, generator=generator(), labels=victims.labels + 1,
            loss=LOGISTIC)  # fmt: skip


def test_inverting_gradients_recovers_inside_the_box():
    model, victims, shared = setting()
    found = invert_gradients(
        model, shared, image_shape=SHAPE, generator=generator(), start="uniform",
        matching=Matching("cosine"), optimiser=AdamSettings(steps=600),
    )  # fmt: skip
    assert torch.equal(found.labels, victims.labels)
    assert float(psnr_db(found.images, victims.images).min()) > 25
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1


@pytest.mark.parametrize("attack", ["dlg", "invert"])
def test_batched_attack_walks_the_path_of_single_attacks(attack):
    model, _victims, shared = setting(victims=4)
    begin = torch.rand(4, 1, *SHAPE, generator=generator(7), dtype=torch.float64)
    logits = torch.randn(4, 1, 10, generator=generator(8), dtype=torch.float64)

    def recover(rows):
        part = shared.replace({n: t[rows] for n, t in shared.items()})
        start = {"images": begin[rows], "label_logits": logits[rows]}
        run = RunSettings(snapshots=(0, 5, 20, 40))
        if attack == "dlg":
            return dlg(model, part, image_shape=SHAPE, generator=generator(), start=start,
                       max_evaluations=40, run=run)  # fmt: skip
        return invert_gradients(model, part, image_shape=SHAPE, generator=generator(),
                                start=start, optimiser=AdamSettings(steps=40), run=run)  # fmt: skip

    together = recover(torch.arange(4))
    for victim in range(4):
        alone = recover(torch.tensor([victim]))
        torch.testing.assert_close(
            together.frames[:, victim], alone.frames[:, 0], rtol=1e-6, atol=1e-8
        )
        torch.testing.assert_close(
            together.history[:, victim], alone.history[:, 0], rtol=1e-5, atol=1e-10
        )


@pytest.mark.parametrize("attack", ["dlg", "idlg", "invert", "analytic"])
def test_poisoned_truth_changes_nothing(attack):
    """The attack sees the gradient alone: overwriting the private images leaves it as it was."""
    model = small_mlp() if attack == "analytic" else small_lenet()
    victims = random_victims()
    shared = share_gradient(model, victims)
    private = {victims.images.untyped_storage().data_ptr()}
    assert not private & {t.untyped_storage().data_ptr() for t in shared.tensors.values()}

    def recover():
        settings = {"image_shape": SHAPE, "generator": generator()}
        match attack:
            case "dlg":
                return dlg(model, shared, max_evaluations=40, **settings)
            case "idlg":
                return idlg(model, shared, max_evaluations=40, **settings)
            case "invert":
                return invert_gradients(model, shared, optimiser=AdamSettings(steps=40), **settings)
            case _:
                return analytic(model, shared, image_shape=SHAPE)

    first = recover()
    victims.images.fill_(0.123)
    victims.labels.fill_(0)
    again = recover()
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


def test_the_generator_decides_everything():
    model, _, shared = setting()
    settings = {"image_shape": SHAPE, "max_evaluations": 30}
    one = dlg(model, shared, generator=generator(1), **settings)
    same = dlg(model, shared, generator=generator(1), **settings)
    other = dlg(model, shared, generator=generator(2), **settings)
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_restarts_are_chosen_by_the_objective():
    model, _, shared = setting(victims=2)
    begin = torch.rand(6, 1, *SHAPE, generator=generator(3), dtype=torch.float64)
    settings = {"image_shape": SHAPE, "generator": generator(), "labels": torch.zeros(2, 1).long()}
    settings |= {"optimiser": AdamSettings(steps=25)}
    best = invert_gradients(model, shared, restarts=3, start={"images": begin}, **settings)
    for victim in range(2):
        part = shared.replace({n: t[[victim]] for n, t in shared.items()})
        settings["labels"] = torch.zeros(1, 1).long()
        single = [
            invert_gradients(model, part, start={"images": begin[[3 * victim + r]]}, **settings)
            for r in range(3)
        ]
        objectives = [float(s.objective) for s in single]
        winner = objectives.index(min(objectives))
        assert int(best.restart[victim]) == winner
        torch.testing.assert_close(best.images[victim], single[winner].images[0])
        assert int(best.evaluations[victim]) == 75


def test_choose_restart_takes_rows_of_the_same_victim():
    objective = torch.tensor([3.0, 1.0, 2.0, 0.5, 0.1, 9.0])
    assert choose_restart(objective, 2).tolist() == [1, 3, 4]
    assert choose_restart(objective, 3).tolist() == [1, 4]


def test_snapshots_follow_the_run_and_then_stand_still():
    model, _, shared = setting(victims=2)
    run = RunSettings(snapshots=(0, 10, 50, 10_000))
    found = dlg(model, shared, image_shape=SHAPE, generator=generator(4), max_evaluations=50,
                run=run)  # fmt: skip
    assert found.frames.shape == (4, 2, 1, *SHAPE)
    assert torch.equal(found.frames[3], found.images)
    first = torch.randn(*(1, *SHAPE), generator=generator(4))
    torch.testing.assert_close(found.frames[0, 0].float(), first)
    short = dlg(model, shared, image_shape=SHAPE, generator=generator(4), max_evaluations=10)
    torch.testing.assert_close(found.frames[1], short.images)
    assert found.history_evaluations[-1].tolist() == found.evaluations.tolist()
    assert bool((found.history[1:] <= found.history[:-1]).all())


@pytest.mark.parametrize("attack", ["dlg", "invert"])
def test_an_interrupted_run_resumes_where_it_was(attack, tmp_path, monkeypatch):
    model, _, shared = setting(victims=2)

    def recover(checkpoint=None):
        run = RunSettings(checkpoint=checkpoint, checkpoint_seconds=0.0, snapshots=(10, 30))
        settings = {"image_shape": SHAPE, "generator": generator(), "run": run}
        if attack == "dlg":
            return dlg(model, shared, max_evaluations=40, **settings)
        return invert_gradients(model, shared, optimiser=AdamSettings(steps=40), **settings)

    whole = recover()
    path = tmp_path / "run.pt"
    from leaklib.attacks import matching

    module = matching.lbfgs if attack == "dlg" else matching.adam
    original, calls = module.tick, iter(range(1000))

    def killed(*args, **kwargs):
        if next(calls) == 17:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "tick", killed)
    with pytest.raises(KeyboardInterrupt):
        recover(path)
    assert path.exists()
    counted = iter(range(1000))
    monkeypatch.setattr(module, "tick", lambda *a, **k: (next(counted), original(*a, **k)))
    resumed = recover(path)
    assert next(counted) < len(whole.history) - 10
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.frames, whole.frames)
    assert torch.equal(resumed.history, whole.history)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, _, shared = setting(victims=2)
    path = tmp_path / "run.pt"
    settings = {"image_shape": SHAPE, "max_evaluations": 3, "run": RunSettings(checkpoint=path)}
    dlg(model, shared, generator=generator(), **settings)
    with pytest.raises(ValueError, match="differs in: start"):
        dlg(model, shared, generator=generator(5), **settings)
    with pytest.raises(ValueError, match="history"):
        dlg(model, shared, generator=generator(), history=3, **settings)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        dlg(model, shared, generator=generator(), **settings)
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    run = RunSettings(checkpoint=blocked / "run.pt")
    with pytest.raises(OSError, match="folder that can be written"):
        dlg(model, shared, generator=generator(), image_shape=SHAPE, run=run)


def test_progress_is_shown_with_the_time_left(capsys):
    model, _, shared = setting(victims=1)
    dlg(model, shared, image_shape=SHAPE, generator=generator(), max_evaluations=5,
        run=RunSettings(progress=True))  # fmt: skip
    shown = capsys.readouterr().err
    assert "DLG" in shown
    assert "5/5" in shown


def test_a_checkpoint_knows_labels_model_and_snapshots(tmp_path):
    model, victims, shared = setting(victims=2)
    path = tmp_path / "run.pt"

    def run(model=model, labels=victims.labels, **more):
        settings = {"image_shape": SHAPE, "max_evaluations": 3, "labels": labels}
        run = RunSettings(checkpoint=path, **more)
        return dlg(model, shared, generator=generator(), run=run, **settings)

    run()
    with pytest.raises(ValueError, match="differs in: labels"):
        run(labels=(victims.labels + 1) % 10)
    with pytest.raises(ValueError, match="differs in: model"):
        run(model=small_lenet(seed=99))
    with pytest.raises(ValueError, match="differs in: snapshots"):
        run(snapshots=(0, 2))


class TestBadInput:
    def test_labels_out_of_range_or_not_integers(self):
        model, _, shared = setting()
        settings = {"image_shape": SHAPE, "generator": generator()}
        with pytest.raises(ValueError, match="below 10, got 59"):
            dlg(model, shared, labels=torch.tensor([[1], [59], [2]]), **settings)
        with pytest.raises(ValueError, match="integer labels"):
            dlg(model, shared, labels=torch.rand(3, 1), **settings)

    @pytest.mark.parametrize("attack", [dlg, idlg, invert_gradients])
    def test_hidden_layers_are_not_taken_for_the_last_one(self, attack):
        model = small_mlp()
        shared = share_gradient(model, random_victims(), layers=["hidden1"])
        with pytest.raises(ValueError, match=r"last layer \(fc.weight\)"):
            attack(model, shared, image_shape=SHAPE, generator=generator())

    def test_wrong_image_shape_says_so_before_the_run(self):
        model, _, shared = setting()
        with pytest.raises(ValueError, match="image_shape"):
            dlg(model, shared, image_shape=(3, 8, 8), generator=generator())

    def test_labels_of_the_wrong_shape(self):
        model, _, shared = setting()
        with pytest.raises(ValueError, match=r"\(victims, batch\) = \(3, 1\)"):
            dlg(model, shared, image_shape=SHAPE, generator=generator(),
                labels=torch.tensor([1, 2, 3]))  # fmt: skip

    def test_start_unknown_or_of_the_wrong_shape(self):
        model, _, shared = setting()
        with pytest.raises(ValueError, match="normal, uniform, grey"):
            dlg(model, shared, image_shape=SHAPE, generator=generator(), start="zeros")
        with pytest.raises(ValueError, match=r"start\['images'\]"):
            dlg(model, shared, image_shape=SHAPE, generator=generator(),
                start={"images": torch.zeros(3, 1, 8, 8)})  # fmt: skip

    def test_another_models_payload(self):
        _, _, shared = setting()
        with pytest.raises(ValueError, match="known"):
            dlg(small_mlp(), shared, image_shape=SHAPE, generator=generator())

    @pytest.mark.parametrize("wrong", [{"restarts": 0}, {"max_evaluations": 0}])
    def test_empty_budgets(self, wrong):
        model, _, shared = setting()
        with pytest.raises(ValueError, match="expected .* >= 1"):
            dlg(model, shared, image_shape=SHAPE, generator=generator(), **wrong)

    def test_snapshots_out_of_order(self):
        model, _, shared = setting()
        with pytest.raises(ValueError, match="increasing"):
            dlg(model, shared, image_shape=SHAPE, generator=generator(),
                run=RunSettings(snapshots=(5, 2)))  # fmt: skip
