"""Three ways to run a task over settings: here, in local processes, on a Dask cluster.

Each yields ``(position, outcome)`` as soon as a setting is finished, in any order. An outcome is
plain: ``status`` ("done" or "failed"), ``rows``, ``seconds``, ``error``. A worker that dies takes
nothing with it but the setting it was at.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from pathlib import Path
from typing import Any

from leaklib.code_hash import package_digest

Setting = dict[str, Any]
Outcome = dict[str, Any]
Outcomes = Generator[tuple[int, Outcome], None, None]
Function = Callable[[Setting], Mapping[str, Any] | Sequence[Mapping[str, Any]]]

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


CONNECT_SECONDS = 30


def attempt(function: Function, setting: Setting, *, package: str | None = None) -> Outcome:
    """Run one setting and describe how it ended; only an interruption escapes.

    Args:
        function: One setting -> one row or a list of rows.
        setting: Plain values.
        package: Hash of the leaklib package that the caller has; another one here is a failure.
    """
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    error = None
    try:
        if package is not None and package != package_digest():
            raise RuntimeError(
                "this worker has another version of leaklib than the caller: install the same "
                "code on every worker and restart it"
            )
        rows = _as_rows(function(dict(setting)))
    except (Exception, SystemExit) as raised:
        frames = traceback.extract_tb(raised.__traceback__)[1:][-8:]
        error = {
            "type": type(raised).__name__,
            "message": str(raised),
            "traceback": [
                f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames
            ],
        }
    return {
        "status": "failed" if error else "done",
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 3),
        "error": error,
    }


def run(
    function: Function, settings: Sequence[Setting], *, jobs: int, scheduler: str | None
) -> Outcomes:
    """Run the settings on the cluster of a scheduler, in local processes, or here."""
    if not settings:
        return run_here(function, settings)
    if scheduler is not None:
        return run_cluster(function, settings, scheduler=scheduler)
    if jobs > 1:
        return run_local(function, settings, jobs=jobs)
    return run_here(function, settings)


def run_here(function: Function, settings: Sequence[Setting]) -> Outcomes:
    """Run the settings one after another in this process."""
    for position, setting in enumerate(settings):
        yield position, attempt(function, setting)


def run_local(function: Function, settings: Sequence[Setting], *, jobs: int) -> Outcomes:
    """Run the settings in ``jobs`` processes of one thread each.

    When a process dies (out of memory, a crash), nobody knows which of the settings in flight did
    it. Each of them is tried once more, alone; the one that dies again has failed.
    """
    queue = deque(range(len(settings)))
    while queue:
        suspects: list[int] = []
        for position, outcome in _pool(function, settings, queue, jobs):
            if outcome is None:
                suspects.append(position)
            else:
                yield position, outcome
        for suspect in suspects:
            for position, outcome in _pool(function, settings, deque([suspect]), 1):
                yield position, outcome or _died("its process died twice")


def _pool(
    function: Function, settings: Sequence[Setting], queue: deque[int], jobs: int
) -> Iterator[tuple[int, Outcome | None]]:
    """Work off the queue until it is empty or a process dies; None marks what was lost."""
    # joblib's loky sends functions defined in a notebook, which the standard pool cannot
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    pool = ProcessPoolExecutor(
        max_workers=jobs, env=ONE_THREAD, initializer=_follow_parent, initargs=(os.getpid(),)
    )
    task = partial(attempt, function)
    running: dict[Any, int] = {}
    broken = False
    try:
        while running or (queue and not broken):
            while queue and not broken and len(running) < jobs:
                try:
                    future = pool.submit(task, settings[queue[0]])
                except BrokenProcessPool:
                    broken = True
                else:
                    running[future] = queue.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                position = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken = True
                    yield position, None
                elif isinstance(error, Exception):
                    yield position, _died(f"it could not be sent to a process: {error}")
                else:
                    yield position, future.result()
    finally:
        pool.shutdown(wait=False, kill_workers=True)


def _follow_parent(parent: int) -> None:
    """End this process when the sweep is killed: loky's workers would stay and compute on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cluster(function: Function, settings: Sequence[Setting], *, scheduler: str) -> Outcomes:
    """Run the settings on a Dask cluster, which moves those of a dead worker to another.

    Args:
        function: One setting -> one row or a list of rows.
        settings: Plain values.
        scheduler: Address such as ``tcp://10.0.0.1:8786``.

    Raises:
        ImportError: ``distributed`` is not installed.
        ConnectionError: The scheduler does not answer, or went away.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ImportError(
            "expected the package `distributed` for a sweep on a cluster, got none: "
            "pip install 'leaklib[cluster]'"
        ) from error
    try:
        client = Client(scheduler, set_as_default=False, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"expected a Dask scheduler at {scheduler}, got no answer ({error}): start one with "
            "`dask scheduler` and workers with `dask worker ADDRESS`"
        ) from error
    run = f"sweep-{time.time_ns():x}"
    with client:
        task = partial(attempt, function, package=package_digest())
        keys = [f"{run}-{position}" for position in range(len(settings))]
        futures = client.map(task, list(settings), key=keys, pure=False)
        for future in as_completed(futures, loop=client.loop):
            position, outcome = int(future.key.rsplit("-", 1)[1]), None
            try:
                if future.status == "finished":
                    outcome = future.result()
                elif future.status == "error":
                    outcome = _died(f"the cluster gave it up: {future.exception()}")
            except OSError:  # it went away between the news of a result and the result
                pass
            if outcome is None:
                raise ConnectionError(
                    f"the Dask scheduler at {scheduler} went away: start it again and repeat the "
                    "sweep; finished settings are kept"
                )
            yield position, outcome


def _died(message: str) -> Outcome:
    error = {"type": "WorkerDied", "message": message, "traceback": []}
    return {"status": "failed", "rows": [], "seconds": None, "error": error}


def _as_rows(result: object) -> list[dict[str, Any]]:
    rows = [result] if isinstance(result, Mapping) else result
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            f"expected a row (a dict) or a list of rows from the function, got {result!r:.80}"
        )
    return [{str(name): _scalar(name, value) for name, value in row.items()} for row in rows]


def _scalar(name: object, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy or torch
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"expected a number, text, truth value or None in column {name!r}, got "
        f"{type(value).__name__}: save arrays in a file of their own and return plain values"
    )
