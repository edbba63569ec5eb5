"""A function of one setting mapped over many, so that a study can be killed and go on.

Every finished setting is one file, ``folder/rows/KEY.json``, written at once under a key of setting
and code version. A second call of the same sweep computes what is missing or failed and nothing
else. The same call runs here, in local processes, or on a Dask cluster:

    result = sweep(attack_one, grid(seed=range(5), noise=[0.0, 0.01]), "results", jobs=2)
    result.table        # one row per finished setting (or the rows it returned), in order
    result.manifest     # one row per setting: done, failed (with the error) or missing
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from leaklib.code_hash import code_version
from leaklib.files import prepare_folder, write_atomic
from leaklib.sweep.workers import Function, Outcome, Setting, run


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        table: Rows of the finished settings, in the order of the settings; the setting's values
            come first in every row.
        manifest: One row per setting: its values, ``status``, ``seconds``, ``error``, ``key``.
    """

    table: pd.DataFrame
    manifest: pd.DataFrame

    @property
    def failed(self) -> pd.DataFrame:
        """The part of the manifest that failed."""
        return self.manifest[self.manifest["status"] == "failed"]

    @property
    def complete(self) -> bool:
        """Whether every setting is done."""
        return bool((self.manifest["status"] == "done").all())


def grid(**values: object) -> list[Setting]:
    """Every combination of the values, the last name varying fastest.

    >>> grid(seed=[0, 1], noise=0.1)
    [{'seed': 0, 'noise': 0.1}, {'seed': 1, 'noise': 0.1}]
    """
    axes = []
    for value in values.values():
        if hasattr(value, "tolist"):
            value = value.tolist()  # numpy's numbers are no plain values
        if isinstance(value, Iterable) and not isinstance(value, str | dict):
            axes.append(list(value))
        else:
            axes.append([value])
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*axes)]


def sweep(
    function: Function,
    settings: Sequence[Setting],
    folder: str | Path,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    code: str | None = None,
    retry_failed: bool = True,
) -> SweepResult:
    """Map a function over settings; every finished one is kept at once.

    Args:
        function: One setting (a dict of plain values) -> one row (a dict of plain values) or a
            list of rows. For processes and clusters it must be picklable with cloudpickle, which
            functions defined in a notebook are.
        settings: Distinct dicts of text, numbers, truth values, None, and lists or dicts of them.
        folder: Where the rows live.
        jobs: Local processes; 1 runs here, without a process. Each has one torch thread.
        scheduler: Address of a Dask scheduler, ``tcp://HOST:PORT``; ``jobs`` is then ignored.
        progress: Show a bar with the time left, and failures as they come.
        code: Version of the code, part of every row's key. By default a hash of leaklib, the
            function and the plain values it reads from around it, so that changed code never
            meets old rows. Give a text to keep rows across changes that do not matter.
        retry_failed: Try earlier failures again.

    Returns:
        The rows of these settings and how each setting ended. A setting that raises is recorded
        with its error and does not stop the others.

    Raises:
        TypeError: A setting holds a value that is not plain.
        ValueError: There are no settings, two are equal, or ``jobs`` < 1.
        OSError: The folder cannot be written, or the scheduler is not there.
        KeyboardInterrupt: Interrupted; finished settings are kept.
    """
    if jobs < 1 or not settings:
        raise ValueError(f"expected jobs >= 1 and settings, got jobs={jobs}, settings={settings}")
    folder = Path(folder)
    settings = [_plain_setting(setting) for setting in settings]
    code = code_version(function) if code is None else code
    keys = [setting_key(setting, code) for setting in settings]
    for key, times in Counter(keys).items():
        if times > 1:
            raise ValueError(f"expected distinct settings, got twice: {settings[keys.index(key)]}")
    prepare_folder(folder / "rows")
    write_atomic(folder / "sweep.json", json.dumps({"code": code, "settings": settings}, indent=1))

    known = {"done"} if retry_failed else {"done", "failed"}
    todo = [i for i, key in enumerate(keys) if _read_row(folder, key).get("status") not in known]
    waiting = [settings[i] for i in todo]
    outcomes = run(function, waiting, jobs=jobs, scheduler=scheduler)
    finished, failures = len(settings) - len(todo), 0
    look: dict[str, Any] = {
        "desc": folder.name,
        "unit": "setting",
        "dynamic_ncols": True,
        "disable": not progress,
    }
    bar = tqdm(total=len(settings), initial=finished, **look)
    try:
        for position, outcome in outcomes:
            setting, error = waiting[position], outcome["error"]
            _write_row(folder, keys[todo[position]], setting, code, outcome)
            finished += 1
            if error:
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)
                if progress:
                    bar.write(f"failed: {setting}: {error['type']}: {error['message']}", sys.stderr)
            bar.update()
    except KeyboardInterrupt as stop:
        stop.add_note(f"{finished} of {len(settings)} settings are finished; run again to go on")
        raise
    finally:
        outcomes.close()  # ends the worker processes now, not when memory is collected
        bar.close()
    return SweepResult(read_sweep(folder, settings), sweep_manifest(folder, settings))


def read_sweep(
    folder: str | Path, settings: Sequence[Setting] | None = None, *, stale: bool = False
) -> pd.DataFrame:
    """Read the rows of the finished settings, in order.

    Args:
        folder: The sweep's folder.
        settings: Which settings; by default those of the last call of :func:`sweep`.
        stale: Take rows of other code versions too, where the last one has none; a column
            ``code`` then says which version made each row.

    Raises:
        FileNotFoundError: No sweep was started in the folder.
    """
    code, wanted = _contents(folder, settings)
    old: dict[str, dict[str, Any]] = {}
    if stale:
        files = (_read_row(folder, path.stem) for path in (Path(folder) / "rows").glob("*.json"))
        for row in sorted((row for row in files if row), key=lambda row: row["date"]):
            if row["status"] == "done":
                old[_canonical(row["setting"])] = row
    table = []
    for setting in wanted:
        row = _read_row(folder, setting_key(setting, code))
        if row.get("status") != "done":
            row = old.get(_canonical(setting), {})
        for values in row.get("rows", ()):
            made_by = {"code": row["code"]} if stale else {}
            table.append({**setting, **values, **made_by})
    return pd.DataFrame(table)


def sweep_manifest(folder: str | Path, settings: Sequence[Setting] | None = None) -> pd.DataFrame:
    """List the settings with ``status`` (done, failed, missing), seconds, error and key."""
    code, wanted = _contents(folder, settings)
    table = []
    for setting in wanted:
        key = setting_key(setting, code)
        row = _read_row(folder, key)
        error = row.get("error") and f"{row['error']['type']}: {row['error']['message']}"
        status, seconds = row.get("status", "missing"), row.get("seconds")
        how = {"status": status, "seconds": seconds, "error": error, "key": key}
        table.append({**setting, **how})
    return pd.DataFrame(table)


def setting_key(setting: Setting, code: str) -> str:
    """Name of a setting under a code version: sixteen hexadecimal digits."""
    return hashlib.sha256(f"{_canonical(setting)}\n{code}".encode()).hexdigest()[:16]


def _contents(
    folder: str | Path, settings: Sequence[Setting] | None
) -> tuple[str, Sequence[Setting]]:
    path = Path(folder) / "sweep.json"
    if not path.exists():
        raise FileNotFoundError(f"expected a sweep in {folder}, got no sweep.json: run it first")
    content = json.loads(path.read_text(encoding="utf-8"))
    if settings is None:
        return content["code"], content["settings"]
    return content["code"], [_plain_setting(setting) for setting in settings]


def _write_row(folder: Path, key: str, setting: Setting, code: str, outcome: Outcome) -> None:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    row = {"setting": setting, "code": code, "date": date, **outcome}
    write_atomic(folder / "rows" / f"{key}.json", json.dumps(row, indent=1) + "\n")


def _read_row(folder: str | Path, key: str) -> dict[str, Any]:
    try:
        row = json.loads((Path(folder) / "rows" / f"{key}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a damaged file is computed again
        return {}
    return row if isinstance(row, dict) and "status" in row else {}


def _canonical(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _plain_setting(setting: object) -> Setting:
    """The setting as JSON gives it back, so that a fresh and a resumed run see the same values."""
    if not isinstance(setting, dict) or not all(isinstance(name, str) for name in setting):
        raise TypeError(f"expected a setting as a dict with text as names, got {setting!r}")
    for name, value in setting.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"expected text, a finite number, a truth value, None, or lists and dicts of them "
                f"in setting {name!r}, got {value!r} ({type(value).__name__}): convert it, or let "
                "the function build it from plain values"
            ) from error
    return json.loads(json.dumps(setting))
