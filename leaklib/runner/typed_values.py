"""Values typed on a command line, read as the types that Python annotations name.

Known are ``int``, ``float``, ``bool``, ``str``, ``None``, ``list[...]``, ``tuple[...]``, ``dict``,
``Literal[...]`` and unions of them (``X | None``, ``Optional[X]``). Other types take any value.
"""

from __future__ import annotations

import ast
import contextlib
from typing import Any

WORDS = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
_NO = object()


def read_value(text: str, kind: str) -> Any:
    """Read a text as a value of a type.

    >>> read_value("3", "float"), read_value("none", "int | None"), read_value("a,b", "list[str]")
    (3.0, None, ['a', 'b'])

    Raises:
        ValueError: The text is no such value.
    """
    node = ast.parse(kind, mode="eval").body
    for value in _readings(text):
        fitted = _fit(value, node)
        if fitted is not _NO:
            return fitted
    raise ValueError(f"expected {kind}, got {text!r}")


def fit_value(value: object, kind: str) -> Any:
    """Return the value in the type; an int serves as a float, a list as a tuple.

    Raises:
        ValueError: It is of another type.
    """
    fitted = _fit(value, ast.parse(kind, mode="eval").body)
    if fitted is _NO:
        raise ValueError(f"expected {kind}, got {value!r}")
    return fitted


def _readings(text: str) -> list[object]:
    """What a typed text may mean: the strictest first, lists last."""
    readings = _readings_of_one(text)
    inside = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    if not any(bracket in inside for bracket in "[({"):
        parts = [part.strip() for part in inside.split(",")] if inside else []
        readings.append([_readings_of_one(part)[0] for part in parts])  # numbers
        readings.append(parts)  # texts
    return readings


def _readings_of_one(text: str) -> list[object]:
    readings: list[object] = []
    if text.lower() in ("none", "null"):
        readings.append(None)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            readings.append(number(text))
    if text.lower() in WORDS:
        readings.append(WORDS[text.lower()])
    with contextlib.suppress(ValueError, SyntaxError):
        literal = ast.literal_eval(text)
        if not isinstance(literal, str):  # a quoted text keeps its quotes
            readings.append(literal)
    return [*readings, text]


def _fit(value: Any, kind: ast.expr) -> Any:
    """The value in the type, or ``_NO``."""
    if isinstance(kind, ast.Constant):
        return value if kind.value is None and value is None else _NO
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        left = _fit(value, kind.left)
        return left if left is not _NO else _fit(value, kind.right)
    if isinstance(kind, ast.Name | ast.Attribute):
        return _fit_plain(value, kind.id if isinstance(kind, ast.Name) else kind.attr)
    if not isinstance(kind, ast.Subscript):
        return value
    base = ast.unparse(kind.value).rsplit(".", 1)[-1]
    inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    if base == "Optional":
        return None if value is None else _fit(value, inner[0])
    if base == "Union":
        fits = (_fit(value, item) for item in inner)
        return next((fit for fit in fits if fit is not _NO), _NO)
    if base == "Literal":
        options = [ast.literal_eval(item) for item in inner]
        same = (o for o in options if type(o) is type(value) and o == value)
        return next(same, _NO)
    if base in ("list", "List", "Sequence", "tuple", "Tuple"):
        if not isinstance(value, list | tuple):
            return _NO
        fixed = base.lower() == "tuple" and not (len(inner) == 2 and ast.unparse(inner[1]) == "...")
        if fixed and len(inner) != len(value):
            return _NO
        parts = [_fit(v, inner[i] if fixed else inner[0]) for i, v in enumerate(value)]
        if any(part is _NO for part in parts):
            return _NO
        return tuple(parts) if base.lower() == "tuple" else parts
    return value if isinstance(value, dict) or base.lower() != "dict" else _NO


def _fit_plain(value: Any, name: str) -> Any:
    if name == "bool":
        return value if isinstance(value, bool) else _NO
    if name == "float":
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if ok else _NO
    if name == "int":
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    types = {"str": str, "list": list, "tuple": tuple, "dict": dict}
    return value if isinstance(value, types.get(name, object)) else _NO
