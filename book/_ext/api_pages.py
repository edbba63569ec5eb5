"""The API page: a room's names in a table, its docstrings folded away, links between rooms.

``{leaklib-room} data`` lists the public names of ``leaklib.data`` (its ``__all__``, else what the
file defines) with the first line of each docstring; below, closed, the docstrings.

Docstrings of the library are read in editors. They hold equations such as ``|g_j| <= c`` and no
markup but backticks and lists, so every other character of markup is escaped here.

A room such as ``leaklib.data`` shows names that live in helper files (``leaklib.victims.Victims``).
Types and references point at the file, the page documents the room. Where exactly one documented
name has the same last part, the link goes there.
"""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

_VERBATIM = re.compile(
    r"``.+?``"  # literal
    r"|(?::[\w:]+:)?`[^`]+`"  # role or name
    r"|^[ ]*>>>.*(?:\n(?![ ]*$).*)*"  # doctest with its output
    r"|^(?P<indent>[ ]*).*::[ ]*\n(?:(?:(?P=indent)[ ]+.*|[ ]*)(?:\n|\Z))+",  # literal block
    re.MULTILINE,
)
_MARKUP = re.compile(r"(?<!\\)[|*]|(?<=\w)_(?!\w)")


def escape(text: str) -> str:
    r"""Escape what reStructuredText would take for markup, outside literals.

    >>> print(escape("|g| is `a|b` and g_j* or p_"))
    \|g\| is `a|b` and g_j\* or p\_
    """
    parts, end = [], 0
    for verbatim in _VERBATIM.finditer(text):
        parts += [_MARKUP.sub(r"\\\g<0>", text[end : verbatim.start()]), verbatim.group()]
        end = verbatim.end()
    return "".join([*parts, _MARKUP.sub(r"\\\g<0>", text[end:])])


def escape_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Escape a docstring in place, before napoleon reads its sections."""
    lines[:] = escape("\n".join(lines)).split("\n")


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Resolve a reference to ``leaklib.FILE.NAME`` or ``NAME`` by its last part, if unambiguous."""
    target: str = node.get("reftarget", "")
    if node.get("refdomain") != "py" or ("." in target and not target.startswith("leaklib.")):
        return None
    last = target.rpartition(".")[2]
    objects: dict[str, Any] = env.domaindata["py"]["objects"]
    found = [name for name, entry in objects.items() if name.endswith(f".{last}") and not entry[3]]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, found[0])


def public_names(module: ModuleType) -> list[str]:
    """Names of a room: its ``__all__``, else the functions and classes that its file defines."""
    if hasattr(module, "__all__"):
        # constants and unions of types, such as a room's stages, have no docstring of their own
        return [name for name in module.__all__ if callable(getattr(module, name))]
    return [
        name
        for name, thing in vars(module).items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
        and not name.startswith("_")
    ]


class LeaklibRoom(SphinxDirective):
    """``{leaklib-room} NAME``: the table of names and the folded docstrings of one module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Lay out the room."""
        name = f"leaklib.{self.arguments[0]}"
        names = public_names(importlib.import_module(name))
        lines = ["```{eval-rst}", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   ~{name}.{member}" for member in names]
        lines += ["```", "", f":::{{dropdown}} Details of {self.arguments[0]}", "```{eval-rst}"]
        lines += [f".. automodule:: {name}", f"   :members: {', '.join(names)}", "```", ":::"]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, self.env.docname), self.content_offset, node)
        return node.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and both handlers."""
    app.add_directive("leaklib-room", LeaklibRoom)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    app.connect("missing-reference", resolve)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
