"""Sweeps that are killed: a worker, the whole study, an interruption; nothing finished is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from test_sweep import EXPECTED, SETTINGS, quiet, walk

from leaklib.sweep import grid


def die_once(setting, *, folder):
    """Kill the own process at one setting, the first time only."""
    mark = Path(folder) / "died"
    if setting == SETTINGS[2] and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return walk(setting)


def die_always(setting):
    if setting["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return walk(setting)


def test_a_killed_worker_process_loses_nothing(tmp_path):
    result = quiet(partial(die_once, folder=str(tmp_path)), SETTINGS, tmp_path / "s", jobs=2)
    assert result.complete, result.manifest
    pd.testing.assert_frame_equal(result.table, EXPECTED)


def test_a_setting_that_kills_its_process_twice_fails_alone(tmp_path):
    result = quiet(die_always, SETTINGS, tmp_path, jobs=2)
    assert list(result.failed["seed"]) == [1, 1]
    assert result.failed["error"].str.contains("died twice").all()
    pd.testing.assert_frame_equal(
        result.table, EXPECTED[EXPECTED["seed"] != 1].reset_index(drop=True)
    )


def test_a_function_that_cannot_be_sent_is_a_failure_with_its_reason(tmp_path):
    lock = __import__("threading").Lock()
    result = quiet(lambda setting: {"x": lock}, grid(seed=[0]), tmp_path, jobs=2, code="1")
    assert "could not be sent to a process" in result.failed["error"].item()


STUDY = """
import os, sys, time
sys.path.insert(0, {tests!r})
from leaklib.sweep import sweep
import test_sweep

def slow(setting):
    time.sleep(0.15)
    return test_sweep.walk(setting) | {{"pid": os.getpid()}}

sweep(slow, test_sweep.SETTINGS, {folder!r}, jobs={jobs}, progress=False, code="1")
"""


def runs(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def rows_of(folder):
    return sorted((folder / "rows").glob("*.json")) if (folder / "rows").is_dir() else []


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_goes_on_where_it_was(tmp_path, jobs, stop):
    script = STUDY.format(tests=str(Path(__file__).parent), folder=str(tmp_path), jobs=jobs)
    study = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(rows_of(tmp_path)) < 3 and study.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (os.killpg if stop == signal.SIGINT else os.kill)(study.pid, stop)
    assert study.wait(timeout=30) != 0

    finished = rows_of(tmp_path)
    assert 3 <= len(finished) < len(SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in finished}
    workers = {json.loads(path.read_text())["rows"][0]["pid"] for path in finished}
    result = quiet(walk, SETTINGS, tmp_path, code="1")
    pd.testing.assert_frame_equal(result.table.drop(columns="pid"), EXPECTED)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "workers outlive the study that was killed"
        time.sleep(0.05)
