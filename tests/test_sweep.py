"""Sweeps: rows, keys, failures, kills, and the same answers here, in processes and on a cluster."""

import json
import math
import os
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from leaklib.code_hash import package_digest
from leaklib.sweep import grid, read_sweep, setting_key, sweep, sweep_manifest
from leaklib.sweep.workers import attempt

SETTINGS = grid(seed=range(4), scale=[0.5, 2.0])


def walk(setting):
    """A row of numbers that only the setting decides; their last digit tells a wrong setting."""
    source = random.Random(setting["seed"])
    steps = [source.gauss(0.0, setting["scale"]) for _ in range(100)]
    return {"sum": math.fsum(steps), "largest": max(steps), "steps": len(steps)}


EXPECTED = pd.DataFrame([{**setting, **walk(setting)} for setting in SETTINGS])


def counted(setting, *, log):
    with Path(log).open("a") as handle:
        handle.write(json.dumps(setting) + "\n")
    return walk(setting)


def calls(log):
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


def quiet(function, settings, folder, **options):
    return sweep(function, settings, folder, progress=False, **options)


def test_grid_varies_the_last_name_fastest():
    assert grid(a=[1, 2], b="x", c=np.arange(2)) == [
        {"a": 1, "b": "x", "c": 0},
        {"a": 1, "b": "x", "c": 1},
        {"a": 2, "b": "x", "c": 0},
        {"a": 2, "b": "x", "c": 1},
    ]


def test_rows_come_in_the_order_of_the_settings(tmp_path):
    result = quiet(walk, SETTINGS[::-1], tmp_path)
    pd.testing.assert_frame_equal(result.table, EXPECTED[::-1].reset_index(drop=True))
    assert result.complete
    assert list(result.manifest["status"]) == ["done"] * len(SETTINGS)
    pd.testing.assert_frame_equal(read_sweep(tmp_path), result.table)
    pd.testing.assert_frame_equal(read_sweep(tmp_path, SETTINGS), EXPECTED)


def test_local_processes_give_the_serial_rows(tmp_path):
    result = quiet(walk, SETTINGS, tmp_path, jobs=2)
    pd.testing.assert_frame_equal(result.table, EXPECTED)


def test_processes_take_functions_defined_on_the_spot_and_run_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")

    def threads(setting):
        return {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}

    table = quiet(threads, grid(seed=range(3)), tmp_path, jobs=2, code="1").table
    assert set(table["threads"]) == {"1"}
    assert os.getpid() not in set(table["pid"])


def test_several_rows_a_setting(tmp_path):
    def steps(setting):
        return [{"step": i, "value": i * setting["seed"]} for i in range(setting["seed"])]

    table = quiet(steps, grid(seed=[2, 0, 1]), tmp_path).table
    assert table.to_dict("list") == {"seed": [2, 2, 1], "step": [0, 1, 0], "value": [0, 2, 0]}


def test_scalars_of_numpy_and_torch_become_plain_and_floats_keep_every_bit(tmp_path):
    torch = pytest.importorskip("torch")

    def row(setting):
        return {
            "a": np.float64(0.1) + 0.2,
            "b": torch.tensor(3),
            "c": math.nan,
            "d": -math.inf,
            "e": None,
            "f": np.bool_(True),
        }

    quiet(row, [{"seed": 0}], tmp_path)
    cells = read_sweep(tmp_path).iloc[0]
    assert cells["a"] == 0.1 + 0.2
    assert cells["b"] == 3
    assert math.isnan(cells["c"])
    assert cells["d"] == -math.inf
    assert cells["e"] is None
    assert cells["f"]


def test_a_second_call_computes_nothing_and_new_settings_only(tmp_path):
    log = tmp_path / "log"
    function = partial(counted, log=str(log))
    quiet(function, SETTINGS[:5], tmp_path / "rows")
    quiet(function, SETTINGS[:5], tmp_path / "rows")
    assert calls(log) == SETTINGS[:5]
    result = quiet(function, SETTINGS, tmp_path / "rows")
    assert calls(log) == SETTINGS
    pd.testing.assert_frame_equal(result.table, EXPECTED)


def test_another_code_version_never_meets_old_rows(tmp_path):
    quiet(lambda setting: {"value": 1}, [{"seed": 0}, {"seed": 1}], tmp_path, code="old")
    result = quiet(lambda setting: {"value": 2}, [{"seed": 0}], tmp_path, code="new")
    assert result.table.to_dict("list") == {"seed": [0], "value": [2]}
    both = grid(seed=[0, 1])
    assert list(read_sweep(tmp_path, both)["value"]) == [2]
    asked = read_sweep(tmp_path, both, stale=True)
    assert asked.to_dict("list") == {"seed": [0, 1], "value": [2, 1], "code": ["new", "old"]}
    assert list(sweep_manifest(tmp_path, both)["status"]) == ["done", "missing"]


def test_the_code_version_follows_the_function_by_default(tmp_path):
    factor = 1

    def value(setting):
        return {"value": factor * setting["seed"]}

    assert quiet(value, [{"seed": 3}], tmp_path).table["value"].item() == 3
    factor = 10  # a number that the function reads from around it
    assert quiet(value, [{"seed": 3}], tmp_path).table["value"].item() == 30


def test_a_failure_is_recorded_and_tried_again(tmp_path):
    healthy = tmp_path / "healthy"

    def fragile(setting):
        if setting["seed"] == 1 and not healthy.exists():
            raise ValueError("singular matrix")
        return {"value": setting["seed"]}

    settings = grid(seed=range(3))
    result = quiet(fragile, settings, tmp_path, code="1")
    assert list(result.manifest["status"]) == ["done", "failed", "done"]
    assert result.manifest["error"][1] == "ValueError: singular matrix"
    assert list(result.failed["seed"]) == [1]
    assert not result.complete
    assert list(result.table["seed"]) == [0, 2]
    row = json.loads((tmp_path / "rows" / f"{setting_key(settings[1], '1')}.json").read_text())
    assert row["error"]["type"] == "ValueError"
    assert "in fragile: raise ValueError" in row["error"]["traceback"][-1]
    assert str(tmp_path) not in json.dumps(row["error"]["traceback"])

    healthy.touch()
    assert not quiet(fragile, settings, tmp_path, code="1", retry_failed=False).complete
    assert quiet(fragile, settings, tmp_path, code="1").complete


def test_exit_and_unusable_rows_are_failures_of_their_setting(tmp_path):
    answers = [lambda: sys.exit(3), lambda: 5, lambda: {"image": np.zeros(3)}, lambda: {"ok": 1}]

    def answer(setting):
        return answers[setting["seed"]]()

    manifest = quiet(answer, grid(seed=range(4)), tmp_path, code="1").manifest
    assert list(manifest["status"]) == ["failed", "failed", "failed", "done"]
    assert "SystemExit: 3" in manifest["error"][0]
    assert "expected a row" in manifest["error"][1]
    assert "column 'image', got ndarray" in manifest["error"][2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"net": object()}, "setting 'net'"),
        ({"noise": math.nan}, "setting 'noise'"),
        ({"seed": np.int64(1)}, r"setting 'seed', got np.int64\(1\) \(int64\)"),
        ({1: 2}, "text as names"),
        ("seed", "as a dict"),
    ],
)
def test_a_setting_that_is_not_plain_is_refused_before_any_work(tmp_path, setting, message):
    log = tmp_path / "log"
    with pytest.raises(TypeError, match=message):
        quiet(partial(counted, log=str(log)), [{"seed": 0, "scale": 1.0}, setting], tmp_path / "s")
    assert not log.exists()


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="distinct settings"):
        quiet(walk, [SETTINGS[0], SETTINGS[0]], tmp_path)
    with pytest.raises(ValueError, match="jobs >= 1"):
        quiet(walk, SETTINGS, tmp_path, jobs=0)
    with pytest.raises(ValueError, match="and settings"):
        quiet(walk, [], tmp_path)
    with pytest.raises(FileNotFoundError, match="run it first"):
        read_sweep(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another folder"):
        quiet(walk, SETTINGS, tmp_path / "file" / "rows")


def test_equal_settings_have_equal_keys_whatever_their_order():
    assert setting_key({"a": 1, "b": 2.0}, "1") == setting_key({"b": 2.0, "a": 1}, "1")
    keys = {setting_key(setting, "1") for setting in ({"a": 1}, {"a": 1.0}, {"a": True})}
    assert len(keys | {setting_key({"a": 1}, "2")}) == 4


def test_a_damaged_row_is_computed_again(tmp_path):
    quiet(walk, SETTINGS, tmp_path, code="1")
    path = tmp_path / "rows" / f"{setting_key(SETTINGS[2], '1')}.json"
    path.write_text(path.read_text()[:40])
    assert list(sweep_manifest(tmp_path)["status"]).count("missing") == 1
    pd.testing.assert_frame_equal(quiet(walk, SETTINGS, tmp_path, code="1").table, EXPECTED)


def test_an_interruption_keeps_what_is_finished(tmp_path):
    def interrupted(setting):
        if setting == SETTINGS[3]:
            raise KeyboardInterrupt
        return walk(setting)

    with pytest.raises(KeyboardInterrupt) as stop:
        quiet(interrupted, SETTINGS, tmp_path, code="1")
    assert "3 of 8 settings are finished; run again to go on" in stop.value.__notes__
    assert list(sweep_manifest(tmp_path)["status"]) == ["done"] * 3 + ["missing"] * 5
    pd.testing.assert_frame_equal(quiet(walk, SETTINGS, tmp_path, code="1").table, EXPECTED)


def test_progress_names_failures_and_counts_settings(tmp_path, capsys):
    def fragile(setting):
        raise ValueError("singular matrix")

    sweep(fragile, grid(seed=[7]), tmp_path / "study", code="1")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "failed: {'seed': 7}: ValueError: singular matrix" in shown.err
    assert "study" in shown.err
    assert "1/1" in shown.err


def test_a_worker_with_other_code_is_refused():
    assert attempt(walk, SETTINGS[0], package=package_digest())["status"] == "done"
    outcome = attempt(walk, SETTINGS[0], package="another")
    assert outcome["status"] == "failed"
    assert "install the same code on every worker" in outcome["error"]["message"]


def test_a_cluster_without_the_package_or_the_scheduler_is_explained(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "distributed", None)
        with pytest.raises(ImportError, match=r"pip install 'leaklib\[cluster\]'"):
            quiet(walk, SETTINGS, tmp_path, scheduler="tcp://127.0.0.1:1")
