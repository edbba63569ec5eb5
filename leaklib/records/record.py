"""Run records: a tidy table, where it comes from, and the data of its figures, in one folder.

    folder/table.csv          one row per victim or setting
    folder/provenance.json    parameters, code, versions, device, data; checksums of the rest
    folder/figures/NAME.npz   the arrays that a figure shows

A record changes all at once. A new one is written to ``.writing-*`` beside the old, becomes
``.pending`` by one rename (from here on it counts), and its files then move into place one by one.
Readers look in ``.pending`` first and check every file against its checksum, so that they see the
old record or the new; a writer that died in between is finished by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leaklib.files import prepare_folder
from leaklib.records.arrays import compare_arrays, pack_arrays, unpack_arrays
from leaklib.records.tables import Rule, Tolerance, compare_tables, read_csv, tidy, write_csv
from leaklib.run_info import Checksummed, plain, provenance

FIGURE_TOLERANCE = Tolerance(rtol=1e-3, atol=1e-6)
MACHINE_PARAMETERS = frozenset({"device", "data_root", "out"})


@dataclass(frozen=True)
class Record:
    """A record read back.

    Attributes:
        table: The tidy table, with the values and types that were written.
        provenance: See :func:`leaklib.run_info.provenance`; also the keys and tolerances with
            which later runs are compared.
        figures: Figure name -> array name -> array.
    """

    table: pd.DataFrame
    provenance: dict[str, Any]
    figures: dict[str, dict[str, np.ndarray]]


def write_record(
    folder: str | Path,
    table: pd.DataFrame,
    *,
    parameters: Mapping[str, Any],
    keys: Sequence[str] | None = None,
    tolerances: Mapping[str, Rule] | None = None,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: float | None = None,
    data: Mapping[str, str] | Iterable[Checksummed] | None = None,
) -> Path:
    """Write a record. An earlier one stays whole until the new one is complete.

    Args:
        folder: The record's folder; other files in it are left alone.
        table: One row per victim or setting. The index is dropped unless it has a name.
        parameters: Every setting of the run.
        keys: Columns that name a row, for the comparison with later runs.
        tolerances: Column -> tolerance of that comparison; ``"figures/NAME"`` -> that of a figure
            (by default 0.1 %). A column not named must come out equal.
        figures: Figure name -> array name -> array, such as a figure's fingerprint.
        seconds: Wall time of the run.
        data: Data set name -> checksum, or the image sets.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be written. An earlier record is untouched.
        ValueError: Names or arrays that cannot be stored; or, after the record is written, keys
            that do not name its rows and tolerances of columns that it does not have.
    """
    folder = prepare_folder(folder)
    table = tidy(table)
    text, kinds = write_csv(table)
    files = {"table.csv": text.encode("utf-8")}
    for name, arrays in (figures or {}).items():
        files[_figure_file(name)] = pack_arrays(arrays, what=f"figure {name!r}")
    described = provenance(parameters=parameters, seconds=seconds, data=data)
    described |= {
        "table": {"rows": len(table), "columns": kinds},
        "keys": list(keys or []),
        "tolerances": {name: plain(rule) for name, rule in (tolerances or {}).items()},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["provenance.json"] = (json.dumps(described, indent=2) + "\n").encode("utf-8")
    for left in folder.glob(".writing-*"):  # of a writer that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    writing = folder / f".writing-{uuid.uuid4().hex[:8]}"
    try:
        for name, content in files.items():
            path = writing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        _install(folder)  # what a writer that died had finished
        os.rename(writing, folder / ".pending")
        _install(folder)
    except OSError as error:
        raise OSError(
            f"could not write the record {folder} ({error.strerror or error}): earlier or new, "
            "the record there is whole; free space or choose another folder, then run again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    if keys:  # after the work is safe: would a comparison with this record make sense?
        compare_tables(table, table, keys=keys, tolerances=_split_rules(tolerances or {})[0])
    return folder


def _install(folder: Path) -> None:
    """Move the files of a complete pending record into place; may be stopped and repeated."""
    pending = folder / ".pending"
    if not pending.is_dir():
        return
    if (pending / "provenance.json").exists():
        new = json.loads((pending / "provenance.json").read_text(encoding="utf-8"))["sha256"]
        for name in new:
            if (pending / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(pending / name, folder / name)
        for path in (folder / "figures").glob("*.npz"):
            if f"figures/{path.name}" not in new:  # a figure of the record that is replaced
                path.unlink()
        os.replace(pending / "provenance.json", folder / "provenance.json")  # the last file
    shutil.rmtree(pending)


def read_record(folder: str | Path) -> Record:
    """Read a record and check that it is whole.

    Raises:
        FileNotFoundError: There is no record, or one of its files is gone.
        ValueError: A file is cut short or was changed after it was written, or is no JSON.
    """
    folder = Path(folder)
    for _ in range(20):  # a writer may be swapping the files under this reader: look again
        before = _marks(folder)
        try:
            return _read(folder)
        except (OSError, ValueError):
            time.sleep(0.02)
            if _marks(folder) == before:
                raise
    return _read(folder)


def _marks(folder: Path) -> list[tuple[int, int]]:
    """What changes when a writer swaps files."""
    marks = []
    for path in (folder / ".pending", folder / "table.csv", folder / "provenance.json"):
        try:
            state = path.stat()
            marks.append((state.st_ino, state.st_mtime_ns))
        except OSError:
            marks.append((0, 0))
    return marks


def _read(folder: Path) -> Record:
    again = "run the notebook again, or restore the folder from version control"
    text = _bytes(folder, "provenance.json", again)
    try:
        described = json.loads(text)
        sums, kinds = described["sha256"], described["table"]["columns"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a record's JSON in {folder / 'provenance.json'}, got {error!r}: {again}"
        ) from error
    contents = {}
    for name, expected in sums.items():
        contents[name] = _bytes(folder, name, again)
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ValueError(
                f"expected {folder / name} as it was written (checksum {expected[:12]}), got "
                f"{len(contents[name])} others: the file was cut short or edited; {again}"
            )
    table = read_csv(contents.pop("table.csv").decode("utf-8"), kinds)
    figures = {Path(name).stem: unpack_arrays(content) for name, content in contents.items()}
    return Record(table=table, provenance=described, figures=figures)


def _bytes(folder: Path, name: str, again: str) -> bytes:
    for path in (folder / ".pending" / name, folder / name):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(f"expected a record in {folder}, got no {name}: {again}")


def compare_records(
    folder: str | Path,
    reference: str | Path,
    *,
    keys: Sequence[str] | None = None,
    tolerances: Mapping[str, Rule] | None = None,
) -> list[str]:
    """List how a record differs from its reference: settings, table, figures.

    Args:
        folder: The record of this run.
        reference: The committed record.
        keys: Columns that name a row; by default those that the reference names.
        tolerances: As in :func:`write_record`; by default those of the reference.

    Returns:
        One line per difference; empty if there is none.
    """
    got, want = read_record(folder), read_record(reference)
    keys = list(want.provenance.get("keys", []) if keys is None else keys)
    rules = _rules(want.provenance.get("tolerances", {})) if tolerances is None else tolerances
    column_rules, figure_rules = _split_rules(rules)
    lines = _compare_parameters(got.provenance["parameters"], want.provenance["parameters"])
    lines += compare_tables(got.table, want.table, keys=keys, tolerances=column_rules)
    for name in dict.fromkeys([*want.figures, *got.figures]):
        rule = figure_rules.get(f"figures/{name}", FIGURE_TOLERANCE)
        if rule != "ignore":
            limit = rule if isinstance(rule, Tolerance) else Tolerance()
            lines += compare_arrays(
                got.figures.get(name), want.figures.get(name), limit, what=f"figure {name!r}"
            )
    return lines


def _rules(stored: Mapping[str, Any]) -> dict[str, Rule]:
    return {
        name: Tolerance(float(rule["rtol"]), float(rule["atol"]))
        if isinstance(rule, dict)
        else rule
        for name, rule in stored.items()
    }


def _split_rules(rules: Mapping[str, Rule]) -> tuple[dict[str, Rule], dict[str, Rule]]:
    figures = {name: rule for name, rule in rules.items() if name.startswith("figures/")}
    return {name: rule for name, rule in rules.items() if name not in figures}, figures


def _compare_parameters(got: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys([*want, *got]) if name not in MACHINE_PARAMETERS]
    return [
        f"parameter {name!r}: got {got.get(name)!r}, reference {want.get(name)!r}"
        for name in names
        if got.get(name) != want.get(name)
    ]


def _figure_file(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"expected a figure name of letters, digits, _ . or -, got {name!r}")
    return f"figures/{name}.npz"
