"""The notebook file before and after a run: parameters put in, machine paths taken out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from leaklib.files import write_atomic
from leaklib.run_info import plain

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
OURS = {"injected-parameters", "papermill-error-cell-tag"}  # cells that runs add


def write_prepared(notebook: Path, given: Mapping[str, object], path: Path) -> None:
    """Write a copy to be run: the given parameters behind the declared ones, no traces of old runs.

    papermill would keep the parameters that an earlier run left in the notebook, and would write
    tuples as text.
    """
    copy = nbformat.read(notebook, as_version=4)
    copy.cells = [cell for cell in copy.cells if not _tags(cell) & OURS]
    for key in ("papermill", "leaklib"):
        copy.metadata.pop(key, None)
    copy.metadata["kernelspec"] = dict(KERNEL)
    if given:
        lines = ["# Parameters", *(f"{name} = {_source(value)}" for name, value in given.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines))
        cell.metadata["tags"] = ["injected-parameters"]
        cell.pop("id", None)
        if (copy.nbformat, copy.nbformat_minor) >= (4, 5):
            cell["id"] = "injected-parameters"  # a fixed one: the same run gives the same file
        declared = [i for i, other in enumerate(copy.cells) if "parameters" in _tags(other)]
        copy.cells.insert(declared[0] + 1, cell)
    path.write_text(nbformat.writes(copy), encoding="utf-8")


def write_executed(
    partial: Path,
    target: Path,
    notebook: Path,
    given: Mapping[str, object],
    described: Mapping[str, Any],
    *,
    root: Path,
) -> None:
    """Move a run into place, with its provenance and without machine paths in the metadata.

    Args:
        partial: What papermill wrote; removed at the end.
        target: The executed notebook.
        notebook: The notebook that was run.
        given: The parameters that differed from the defaults.
        described: See :func:`leaklib.run_info.provenance`.
        root: Folder of the project; paths inside it are given from there.
    """
    executed = nbformat.read(partial, as_version=4)
    run = executed.metadata.setdefault("papermill", {})
    run["parameters"] = plain(given)
    run["input_path"], run["output_path"] = _inside(notebook, root), _inside(target, root)
    executed.metadata["leaklib"] = dict(described)
    write_atomic(target, nbformat.writes(executed) + "\n")
    partial.unlink(missing_ok=True)


def _inside(path: Path, root: Path) -> str:
    path = path.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def _source(value: object) -> str:
    """Python source of a plain value; ``repr`` has no source for infinities."""
    if isinstance(value, float) and value - value != 0:
        return f'float("{value}")'
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_source, value))
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{comma})"
    return repr(value)
