"""A sweep on a real Dask cluster: a scheduler and two workers in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from leaklib.runner.notebook_sweep import sweep_notebook
from leaklib.sweep import grid, sweep, sweep_manifest

pytest.importorskip("distributed", reason="needs leaklib[cluster]")

pytestmark = [
    pytest.mark.slow,
    # distributed leaves sockets and loops to the collector; nothing of ours
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SETTINGS = grid(seed=range(12))


def slow_row(setting):
    """A row that takes long enough for a worker to be killed in the middle."""
    from test_sweep import walk

    time.sleep(0.3)
    return walk({**setting, "scale": 1.0}) | {"pid": os.getpid()}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Start a scheduler and two workers; yield the address and the processes."""
    # the code may be edited while the tests run; that workers refuse other code is tested apart
    monkeypatch.setattr("leaklib.sweep.workers.package_digest", lambda: None)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "scheduler.json"

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    plain = ("--host", "127.0.0.1", "--no-dashboard")
    processes = [start("scheduler", *plain, "--port", "0", "--scheduler-file", str(file))]
    try:
        wait_for(file.exists)
        time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        for name in ("left", "right"):
            folder = str(tmp_path / name)
            worker = ("worker", address, *plain, "--nthreads", "1", "--no-nanny", "--name", name)
            processes.append(start(*worker, "--local-directory", folder))
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finished(folder):
    return len(list((folder / "rows").glob("*.json"))) if (folder / "rows").is_dir() else 0


def test_two_workers_one_killed_mid_way_give_the_serial_rows(cluster, tmp_path):
    address, (_, left, right) = cluster
    folder = tmp_path / "study"

    def kill_one():
        wait_for(lambda: finished(folder) >= 3)
        left.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = sweep(slow_row, SETTINGS, folder, scheduler=address, progress=False)
    killer.join()
    assert left.wait() == -signal.SIGKILL
    assert result.complete, result.manifest.to_string()
    assert set(result.table["pid"]) == {left.pid, right.pid}  # both had worked

    serial = sweep(slow_row, SETTINGS, tmp_path / "serial", progress=False)
    pd.testing.assert_frame_equal(
        result.table.drop(columns="pid"), serial.table.drop(columns="pid"), check_exact=True
    )


def test_a_failing_setting_on_a_cluster_keeps_its_error(cluster, tmp_path):
    address, _ = cluster

    def fragile(setting):
        return {"value": 1 / setting["seed"]}

    result = sweep(fragile, SETTINGS[:3], tmp_path / "s", scheduler=address, progress=False)
    assert list(result.manifest["status"]) == ["failed", "done", "done"]
    assert "ZeroDivisionError" in result.failed["error"].item()


def test_a_scheduler_that_goes_away_stops_the_sweep_and_keeps_the_rows(cluster, tmp_path):
    address, (scheduler, _, _) = cluster
    folder = tmp_path / "study"

    def stop():
        wait_for(lambda: finished(folder) >= 3)
        scheduler.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=stop)
    killer.start()
    with pytest.raises(ConnectionError, match="finished settings are kept"):
        sweep(slow_row, SETTINGS, folder, scheduler=address, progress=False)
    killer.join()
    status = list(sweep_manifest(folder)["status"])
    assert 3 <= status.count("done") < len(SETTINGS)
    assert status.count("failed") == 0
    assert sweep(slow_row, SETTINGS, folder, progress=False).complete


def test_a_scheduler_that_goes_away_before_a_result_arrives(cluster, tmp_path, monkeypatch):
    address, _ = cluster
    distributed = pytest.importorskip("distributed")

    def lost(_future):
        raise distributed.comm.CommClosedError("connection reset by peer")

    monkeypatch.setattr(distributed.Future, "result", lost)
    with pytest.raises(ConnectionError, match="finished settings are kept"):
        sweep(slow_row, SETTINGS, tmp_path, scheduler=address, progress=False)


def test_no_scheduler_is_an_error_that_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.setattr("leaklib.sweep.workers.CONNECT_SECONDS", 1)
    with pytest.raises(ConnectionError, match="`dask scheduler`"):
        sweep(slow_row, SETTINGS, tmp_path, scheduler="tcp://127.0.0.1:1", progress=False)


def test_notebooks_run_on_a_cluster(cluster, tmp_path):
    pytest.importorskip("papermill")
    address, _ = cluster
    path = Path(__file__).parent / "notebooks" / "fragile.ipynb"
    folder = tmp_path / "study"
    values = {"seed": [1, 13, 2]}
    result = sweep_notebook(path, values, folder, scheduler=address, progress=False)
    assert list(result.manifest["status"]) == ["done", "failed", "done"]
    assert "seed 13 is unlucky" in result.failed["error"].item()
    assert len(list(folder.glob("*.ipynb"))) == 3  # the failed one is kept too
