"""A notebook over a grid of parameters: every setting an independent, resumable run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from leaklib.code_hash import code_version, strip_source
from leaklib.files import write_atomic
from leaklib.records import read_record
from leaklib.records.tables import tidy, write_csv
from leaklib.runner.execute import project_root, run_notebook
from leaklib.runner.notebook import NotebookInfo, ParameterError, read_notebook
from leaklib.sweep import SweepResult, grid, setting_key, sweep


def sweep_notebook(
    notebook: str | Path,
    values: Mapping[str, Sequence[object]],
    folder: str | Path | None = None,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run a notebook once for every combination of parameter values.

    Each run is ``folder/KEY.ipynb``. A notebook with a parameter ``out`` writes its record to
    ``folder/KEY``; the tables of all records, with the parameters in front, become
    ``folder/table.csv``. A second call runs what is missing or failed.

    Args:
        notebook: The notebook; the workers of a cluster must be able to read it at this path.
        values: Parameter -> its values.
        folder: Where the runs go; by default ``_build/sweeps/NAME`` in the project.
        jobs: Local processes.
        scheduler: Address of a Dask scheduler, instead of local processes.
        progress: Show a bar with the time left.

    Raises:
        ParameterError: An unknown or ill-typed parameter; nothing was run.
    """
    info = read_notebook(notebook)
    settings = [info.resolve(setting) for setting in grid(**values)]
    default = project_root(info.path) / "_build" / "sweeps" / info.path.stem
    folder = Path(folder) if folder is not None else default
    code = code_version(strip_source(info.code))
    for setting in settings:
        key = setting_key(setting, code)
        if not (folder / f"{key}.ipynb").exists():  # done, but somebody removed it
            (folder / "rows" / f"{key}.json").unlink(missing_ok=True)
    function = partial(
        run_setting,
        notebook=str(info.path.resolve()),
        folder=str(folder.resolve()),
        code=code,
        own_out="out" in info.parameters and "out" not in values,
    )
    options: dict[str, Any] = {"jobs": jobs, "scheduler": scheduler, "progress": progress}
    result = sweep(function, settings, folder, code=code, **options)
    _gather(folder, settings, code)
    return result


def run_setting(
    setting: dict[str, Any], *, notebook: str, folder: str, code: str, own_out: bool
) -> dict[str, Any]:
    """Run one setting; the row names the executed notebook."""
    key = setting_key(setting, code)
    given = dict(setting)
    if own_out:  # relative to the notebook, where the kernel works: no machine path in the file
        given["out"] = os.path.relpath(Path(folder) / key, Path(notebook).parent)
    run_notebook(notebook, Path(folder) / f"{key}.ipynb", parameters=given, progress=False)
    return {"notebook": f"{key}.ipynb"}


def split_values(info: NotebookInfo, name: str, text: str) -> list[Any]:
    """Read ``v1,v2,...`` as values of a parameter; commas inside brackets do not separate.

    Raises:
        ParameterError: An unknown parameter or an ill-typed value.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    values = [info.resolve({name: part.strip()}, typed=True)[name] for part in parts]
    if len({repr(value) for value in values}) < len(values):
        raise ParameterError(f"expected distinct values for parameter {name!r}, got {text!r}")
    return values


def _gather(folder: Path, settings: Sequence[dict[str, Any]], code: str) -> None:
    tables = []
    for setting in settings:
        record = folder / setting_key(setting, code)
        if (record / "provenance.json").exists():
            table = read_record(record).table
            new = {name: value for name, value in setting.items() if name not in table}
            front = pd.DataFrame([new] * len(table), index=table.index)
            tables.append(pd.concat([front, table], axis=1))
    if tables:
        text, _ = write_csv(tidy(pd.concat(tables, ignore_index=True)))
        write_atomic(folder / "table.csv", text)
