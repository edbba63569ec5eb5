"""What a notebook asks for: its title, and the typed and commented parameters of its first cell.

    seed: int = 0  # every random number of the run comes from it
    # Which layers are shared.
    # None: all of them.
    layers: list[str] | None = None

Its meaning is the comment behind it, or else the comment lines right above it. Nothing is executed:
the cell is read as a syntax tree.
"""

from __future__ import annotations

import ast
import io
import json
import textwrap
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaklib.runner.typed_values import fit_value, read_value


class ParameterError(ValueError):
    """A parameter that a notebook does not have, or a value that is not of its type."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Attributes:
        name: Its name.
        kind: Its type as written, such as ``int`` or ``list[str] | None``.
        default: Its default value; the source text where that is no plain value.
        meaning: The comment behind it, or the comment lines right above it.
    """

    name: str
    kind: str
    default: Any
    meaning: str

    def parse(self, text: str) -> Any:
        """Read a value typed on the command line.

        Raises:
            ParameterError: It is not of the parameter's type.
        """
        try:
            return read_value(text, self.kind)
        except ValueError:
            raise ParameterError(self._refusal(text)) from None

    def check(self, value: object) -> Any:
        """Return the value in the parameter's type (an int serves as float, a tuple as list).

        Raises:
            ParameterError: It is not of the parameter's type.
        """
        try:
            return fit_value(value, self.kind)
        except ValueError:
            raise ParameterError(self._refusal(value)) from None

    def _refusal(self, value: object) -> str:
        return f"expected {self.kind} for parameter {self.name!r}, got {value!r}"


@dataclass(frozen=True)
class NotebookInfo:
    """A notebook's path, first heading, parameters, and the source of its code cells."""

    path: Path
    title: str
    parameters: Mapping[str, Parameter]
    code: str

    def resolve(self, given: Mapping[str, object], *, typed: bool = False) -> dict[str, Any]:
        """Check the given parameters against the declared ones.

        Args:
            given: Name -> value; with ``typed`` the text of the command line.
            typed: Whether the values are still text.

        Raises:
            ParameterError: An unknown name or a value of another type, with the known parameters.
        """
        try:
            unknown = [name for name in given if name not in self.parameters]
            if unknown:
                raise ParameterError(f"{self.path.name} has no parameter {', '.join(unknown)}")
            return {
                name: self.parameters[name].parse(str(value))
                if typed
                else self.parameters[name].check(value)
                for name, value in given.items()
            }
        except ParameterError as error:
            raise ParameterError(f"{error}\n\nknown parameters:\n{self.describe()}") from None

    def describe(self, width: int = 96) -> str:
        """List the parameters: name, type, default, meaning, in columns."""
        rows = [(p.name, p.kind, _literal(p.default)) for p in self.parameters.values()]
        if not rows:
            return "  (none)"
        sizes = [min(max(len(row[i]) for row in rows), 28) for i in range(3)]
        lines = []
        for row, parameter in zip(rows, self.parameters.values(), strict=True):
            head = "  " + "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True))
            indent = " " * (6 + sum(sizes) + 2)
            meaning = textwrap.wrap(parameter.meaning, max(24, width - len(indent))) or [""]
            if len(head) + 2 > len(indent):  # a long type or default: the meaning goes below
                lines.append(head.rstrip())
            else:
                lines.append((head + "  " + meaning.pop(0)).rstrip())
            lines += [indent + part for part in meaning if part]
        return "\n".join(lines)


def read_notebook(path: str | Path) -> NotebookInfo:
    """Read what a notebook is about and what it asks for.

    Raises:
        FileNotFoundError: There is no such file.
        ParameterError: It is no notebook, or its parameters cell is no Python.
    """
    path = Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [(c["cell_type"], "".join(c["source"]), _tags(c)) for c in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"expected a notebook (format 4), got {path}: {error!r}") from error
    headings = (
        line.lstrip("#").strip()
        for kind, source, _ in sources
        if kind == "markdown"
        for line in source.splitlines()
        if line.startswith("#")
    )
    declared = next((source for _, source, tags in sources if "parameters" in tags), "")
    code = "\n\n".join(
        s for kind, s, tags in sources if kind == "code" and "injected-parameters" not in tags
    )
    try:
        parameters = {p.name: p for p in parse_parameters(declared)}
    except SyntaxError as error:
        raise ParameterError(
            f"expected plain Python in the parameters cell of {path}: {error}"
        ) from error
    return NotebookInfo(path, next(headings, path.stem), parameters, code)


def parse_parameters(source: str) -> list[Parameter]:
    """Read the parameters that a cell declares.

    >>> parse_parameters("seed: int = 0  # of every random number")
    [Parameter(name='seed', kind='int', default=0, meaning='of every random number')]
    """
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#: ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    parameters = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue  # an import of Literal, say
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        kind = _kind(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        if not isinstance(target, ast.Name):
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            default = ast.unparse(node.value)
        meaning = [behind] if (behind := comments.get(node.end_lineno or 0)) else []
        line = node.lineno - 1
        while not behind and line in alone:
            meaning.insert(0, comments[line])
            line -= 1
        kind = kind or (type(default).__name__ if default is not None else "object")
        parameters.append(Parameter(target.id, kind, default, " ".join(meaning)))
    return parameters


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) and '"' not in value else repr(value)


def _kind(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.unparse(ast.parse(annotation.value, mode="eval"))  # it was quoted
    return ast.unparse(annotation)
