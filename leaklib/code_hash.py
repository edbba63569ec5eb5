"""A short hash of the code that makes a number: the same code, the same hash.

Comments, docstrings and layout do not count: editing them must not throw away the finished rows of
a long study. Everything that can change a result counts: the source of the leaklib package, and for
a study's own function its source, its default values, the plain values it reads from around it
(``epochs = 40`` in a notebook) and the functions beside it that it calls.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def code_version(*extra: str | bytes | Callable[..., Any]) -> str:
    """Hash the source of the leaklib package and of what else decides a result.

    Args:
        *extra: Functions (hashed with the plain values and neighbours they use), or text and bytes
            that belong to the code, such as the source of a notebook.

    Returns:
        Twelve hexadecimal digits.

    Raises:
        TypeError: An extra is neither text nor a function whose code can be found.
    """
    digest = hashlib.sha256(package_digest().encode())
    for item in extra:
        digest.update(b"\0")
        if isinstance(item, str):
            digest.update(item.encode())
        elif isinstance(item, bytes):
            digest.update(item)
        else:
            for part in _function_parts(item, set()):
                digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=1)
def package_digest() -> str:
    """Hash the modules of the leaklib package, once per process."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(strip_source(path.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()


def strip_source(source: str) -> str:
    """Return the syntax tree of the source as text: no comments, docstrings or layout.

    Source that is no plain Python (a notebook cell with ``%magic``) is returned as it is.
    """
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                node.body = node.body[1:]
    return ast.dump(tree)


def _function_parts(function: object, seen: set[int]) -> Iterator[str]:
    """Yield the texts that decide what a function computes, itself first."""
    if isinstance(function, functools.partial):
        yield from _function_parts(function.func, seen)
        yield _stable_text((function.args, dict(sorted(function.keywords.items()))), function)
        return
    function = inspect.unwrap(function) if callable(function) else function
    if inspect.isbuiltin(function):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    if not isinstance(function, FunctionType):
        raise TypeError(
            f"expected a function, got {type(function).__name__}: write it as a function, "
            "or name the version of the code yourself with code='...'"
        )
    if id(function) in seen:
        return
    seen.add(id(function))
    try:
        yield strip_source(inspect.getsource(function))
    except (OSError, TypeError):  # typed at a prompt or made by exec: no source to read
        yield _bytecode(function.__code__)
    yield _stable_text((function.__defaults__, function.__kwdefaults__), function)
    names = _global_names(function.__code__)
    around = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        around[name] = cell.cell_contents
    for name, value in sorted(around.items()):
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            yield from _function_parts(value, seen)
        elif isinstance(value, type) and value.__module__ == function.__module__:
            yield f"{name}={_class_source(value)}"
        else:
            text = _plain_text(value)
            if text is not None:
                yield f"{name}={text}"


def _class_source(cls: type) -> str:
    try:
        return strip_source(inspect.getsource(cls))
    except (OSError, TypeError):
        return cls.__qualname__


def _global_names(code: CodeType) -> set[str]:
    """Names that a function or a function inside it may look up outside."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names


def _bytecode(code: CodeType) -> str:
    constants = [
        _bytecode(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _plain_text(value: object) -> str | None:
    """Text of a value that decides results and can be compared, else None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain_text(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return f"{type(value).__qualname__}{fields}"
    if type(value).__module__ == "torch" and type(value).__name__ in {"dtype", "device", "Size"}:
        return repr(value)
    try:
        if hasattr(value, "detach"):  # a torch tensor
            value = value.detach().cpu().numpy()
        if hasattr(value, "tobytes") and hasattr(value, "dtype"):
            head = f"{value.dtype}{getattr(value, 'shape', ())}"
            return hashlib.sha256(head.encode() + value.tobytes()).hexdigest()
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RuntimeError):
        return None


def _stable_text(value: object, function: object) -> str:
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(
            f"the arguments bound to {function} have no stable text ({text}): bind plain values, "
            "or name the version of the code yourself with code='...'"
        )
    return text
