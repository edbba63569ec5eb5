"""Tidy tables as text that gives back the same numbers, and their comparison with a reference.

A table travels as CSV with the shortest digits that round-trip, and a list of column types beside
it. Missing is an empty field. Cells that are no number, truth value or text are written as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Tolerance:
    """Two numbers agree when |value - reference| <= atol + rtol * |reference|.

    Attributes:
        rtol: Relative part, >= 0.
        atol: Absolute part, >= 0, in the unit of the column.
    """

    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ValueError(f"expected tolerances >= 0, got rtol={self.rtol}, atol={self.atol}")

    def allows(self, value: float, reference: float) -> bool:
        """Whether the two agree; NaN agrees with NaN, infinity with the same infinity."""
        if math.isnan(value) or math.isnan(reference):
            return math.isnan(value) and math.isnan(reference)
        if math.isinf(value) or math.isinf(reference):
            return value == reference
        return abs(value - reference) <= self.atol + self.rtol * abs(reference)

    def __str__(self) -> str:
        parts = [f"{name} {part:g}" for name, part in vars(self).items() if part]
        return " and ".join(parts) or "exact"


Rule = Tolerance | Literal["exact", "ignore"]


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """Bring a table to the form in which it is stored: plain columns, plain cells, no index.

    Raises:
        TypeError: It is not a data frame.
        ValueError: Two columns share a name.
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"expected a pandas DataFrame, got {type(table).__name__}")
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    names = [str(name) for name in table.columns]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"expected distinct columns, got {repeated} more than once: rename them")
    columns = {name: _plain_column(table.iloc[:, position]) for position, name in enumerate(names)}
    return pd.DataFrame(columns, index=pd.RangeIndex(len(table)))


def _plain_column(column: pd.Series) -> pd.Series:
    column = column.reset_index(drop=True)
    if getattr(column.dtype, "kind", "O") in "biuf" and not hasattr(column.dtype, "categories"):
        return column  # truth values and numbers, their nullable kin too
    cells = [_plain_cell(cell) for cell in column]
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {bool}:
        return pd.Series(cells, dtype="boolean" if None in cells else "bool")
    if kinds == {int}:
        return pd.Series(cells, dtype="Int64" if None in cells else "int64")
    if kinds and kinds <= {int, float}:
        return pd.Series([math.nan if cell is None else cell for cell in cells], dtype="float64")
    return pd.Series([cell if cell is None else str(cell) for cell in cells], dtype="str")


def _plain_cell(cell: object) -> object:
    if hasattr(cell, "item") and getattr(cell, "size", None) is not None:
        try:
            cell = cell.item()  # a scalar of numpy or torch
        except (ValueError, RuntimeError):
            return str(cell)
    if cell is None or cell is pd.NA or cell is pd.NaT:
        return None
    return cell


def write_csv(table: pd.DataFrame) -> tuple[str, dict[str, str]]:
    """Write a tidy table as CSV text and its column types.

    Returns:
        The text, and column name -> type name, which :func:`read_csv` needs.
    """
    columns = [[name, *_texts(table[name])] for name in table.columns]
    lines = [",".join(map(_field, row)) for row in zip(*columns, strict=True)]
    text = "\n".join(lines) + "\n"
    kinds = {name: str(table[name].dtype) for name in table.columns}
    for name, kind in kinds.items():
        # an empty field is a missing text, unless the column has empty texts and none is missing
        if kind == "str" and (table[name] == "").any() and not table[name].isna().any():
            kinds[name] = "str, empty kept"
    return text, kinds


def _texts(column: pd.Series) -> list[str]:
    # numpy's scalars print the fewest digits that give the same bits back, float32 too
    cells = column.to_numpy() if isinstance(column.dtype, np.dtype) else column.array
    return ["" if pd.isna(cell) else str(cell) for cell in cells]


def _field(text: str) -> str:
    """Quote a field where needed; the csv module leaves a lone carriage return bare."""
    if any(character in text for character in ',"\r\n') or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text


def read_csv(text: str, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Read CSV text back into the same table, bit for bit.

    Raises:
        ValueError: The columns are not those of ``kinds``, or a cell does not fit its type.
    """
    if not kinds:
        return pd.DataFrame()
    raw = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=False)
    if list(raw.columns) != list(kinds):
        raise ValueError(f"expected the columns {list(kinds)}, got {list(raw.columns)}")
    return pd.DataFrame({name: _typed(raw[name], kind) for name, kind in kinds.items()})


def _typed(cells: pd.Series, kind: str) -> pd.Series:
    if kind == "str, empty kept":
        return cells.astype("str")
    values: list[Any] = [None if cell == "" else cell for cell in cells]
    dtype: Any = kind
    if kind in ("bool", "boolean"):
        words = {"True": True, "False": False, None: None}
        return pd.Series([words[value] for value in values], dtype=dtype)
    if kind.lower().startswith("float"):
        # Python's own reading of decimals is exact; pandas' fast one is not
        numbers = [math.nan if value is None else float(value) for value in values]
        return pd.Series(numbers, dtype="float64").astype(dtype)
    if kind.lower().startswith(("int", "uint")):
        return pd.Series([None if v is None else int(v) for v in values], dtype=dtype)
    if kind != "str":
        raise ValueError(f"expected a known column type, got {kind!r} for {cells.name!r}")
    return pd.Series(values, dtype="str")


def compare_tables(
    table: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    keys: Sequence[str],
    tolerances: Mapping[str, Rule] | None = None,
) -> list[str]:
    """List how a table differs from its reference. The order of rows and columns is free.

    Args:
        table: What this run found.
        reference: What is expected.
        keys: Columns that together name a row.
        tolerances: Column -> :class:`Tolerance`, ``"exact"`` or ``"ignore"``. A column not named
            must be equal. NaN equals NaN, missing equals missing.

    Returns:
        One line per difference, with row, column, both values and the tolerance; empty if none.

    Raises:
        ValueError: A key or a tolerance names no column, or two rows share their keys.
    """
    rules = dict(tolerances or {})
    table, reference = tidy(table), tidy(reference)
    known = list(dict.fromkeys([*reference.columns, *table.columns]))
    for name in [*keys, *rules]:
        if name not in known:
            raise ValueError(f"expected columns of the tables, got {name!r}: they have {known}")
    for rule in rules.values():
        if not (isinstance(rule, Tolerance) or rule in ("exact", "ignore")):
            raise ValueError(f"expected Tolerance(...), 'exact' or 'ignore', got {rule!r}")
    if not keys:
        raise ValueError("expected the columns that name a row in `keys`, got none")

    compared = [name for name in known if rules.get(name) != "ignore" or name in keys]
    lines = [f"column {name!r} is missing" for name in compared if name not in table]
    lines += [f"column {name!r} is not in the reference" for name in compared
              if name not in reference]  # fmt: skip
    if any(name not in table or name not in reference for name in keys):
        return lines
    rows, expected = _rows_by_key(table, keys), _rows_by_key(reference, keys)
    lines += [f"row {_name(keys, key)} is missing" for key in expected if key not in rows]
    lines += [f"row {_name(keys, key)} is not in the reference" for key in rows
              if key not in expected]  # fmt: skip
    shared = [name for name in compared
              if name in table and name in reference and name not in keys]  # fmt: skip
    for key in expected:
        if key in rows:
            for name in shared:
                got, want = rows[key][name], expected[key][name]
                rule = rules.get(name, "exact")
                if not _agree(got, want, rule):
                    lines.append(
                        f"row {_name(keys, key)}, column {name!r}: got {got!r}, "
                        f"reference {want!r}, tolerance {rule}"
                    )
    return lines


def _rows_by_key(table: pd.DataFrame, keys: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    columns = {name: [_value(cell) for cell in table[name].tolist()] for name in table.columns}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for position in range(len(table)):
        row = {name: cells[position] for name, cells in columns.items()}
        key = tuple("nan" if row[name] != row[name] else row[name] for name in keys)
        if key in rows:
            raise ValueError(f"expected one row for {_name(keys, key)}, got two: add a key column")
        rows[key] = row
    return rows


def _value(cell: object) -> object:
    return None if cell is pd.NA else cell


def _name(keys: Sequence[str], key: tuple[Any, ...]) -> str:
    return "(" + ", ".join(f"{name}={part!r}" for name, part in zip(keys, key, strict=True)) + ")"


def _agree(value: object, reference: object, rule: Rule) -> bool:
    if all(item is None or item != item for item in (value, reference)):
        return True  # missing on both sides
    if not isinstance(rule, Tolerance):
        return bool(value == reference)
    if isinstance(value, int | float) and isinstance(reference, int | float):
        return rule.allows(value, reference)
    return bool(value == reference)
