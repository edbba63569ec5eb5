"""What the book knows about a notebook: its words, its run and its recorded paper-scale run.

Reads files only; knows nothing of Sphinx, so tests and scripts use it too.

The words come from the notebook's first Markdown cell, so that they read the same in plain Jupyter.
The cell holds the title and one quotation with three bold labels, each a paragraph::

    # A picture appears from its gradient

    > **Paper.** [Zhu, Liu and Han (2019), *Deep leakage from gradients*](https://arxiv.org/abs/1906.08935)
    >
    > **Claim.** One private picture comes back from the gradient that a client shares.
    >
    > **Verdict.** Reproduced: every picture comes back.

The verdict starts with ``Reproduced``, ``Reproduced in part`` or ``Not reproduced``, then a colon or
a full stop. The facts of the run (profile, seconds, date, commit, device) come from the notebook's
``metadata.leaklib``, which ``leaklib run`` writes; those of the recorded paper-scale run from
``data/results/<notebook>/provenance.json``.
"""  # noqa: E501

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS = ("Paper", "Claim", "Verdict")
VERDICTS = {"not reproduced": "danger", "reproduced in part": "warning", "reproduced": "success"}
_QUOTE = re.compile(r"(?:^>[^\n]*\n?)+", re.MULTILINE)
_LABEL = re.compile(r"^\*\*(\w+)\.\*\*\s*", re.MULTILINE)


@dataclass(frozen=True)
class NotebookPage:
    """One notebook: ``words`` by label, ``run`` and ``recorded`` facts, ``parameters`` by name."""

    name: str
    title: str
    words: dict[str, str]
    run: dict[str, Any]
    recorded: dict[str, Any] | None
    parameters: tuple[str, ...]


def split_header(markdown: str) -> tuple[str, dict[str, str], str]:
    """Split a first cell into what precedes its header quotation, the header's words, the rest.

    Words are empty when there is no quotation that holds one of the labels.
    """
    for quote in _QUOTE.finditer(markdown):
        text = re.sub(r"^>[ ]?", "", quote.group(), flags=re.MULTILINE)
        parts = _LABEL.split(text)
        words = {
            label: " ".join(body.split())
            for label, body in zip(parts[1::2], parts[2::2], strict=True)
        }
        if set(words) & set(LABELS):
            return markdown[: quote.start()], words, markdown[quote.end() :]
    return markdown, {}, ""


def split_verdict(verdict: str) -> tuple[str, str, str]:
    """Split a verdict into its colour, its first words and the rest.

    >>> split_verdict("Reproduced in part: eight of ten.")
    ('warning', 'Reproduced in part', 'eight of ten.')
    >>> split_verdict("")
    ('secondary', 'open', '')
    """
    for start, colour in VERDICTS.items():
        if verdict.lower().startswith(start):
            return colour, verdict[: len(start)], verdict[len(start) :].lstrip(" .:,;")
    return "secondary", "open", verdict


def read_page(notebook: dict[str, Any], name: str, results: Path) -> NotebookPage:
    """Collect what is known about a notebook (its parsed JSON) and its recorded run."""
    cells = notebook.get("cells", [])
    first = next((_source(c) for c in cells if c.get("cell_type") == "markdown"), "")
    title = re.search(r"^#\s+(.+)$", first, re.MULTILINE)
    _, words, _ = split_header(first)
    return NotebookPage(
        name=name,
        title=title.group(1).strip() if title else name,
        words=words,
        run=_run_facts(notebook.get("metadata", {})),
        recorded=_recorded_facts(results / name / "provenance.json"),
        parameters=_parameter_names(cells),
    )


def describe_run(facts: dict[str, Any]) -> str:
    """One line of a run's facts, in a fixed order, those that are known.

    >>> describe_run({"profile": "smoke", "seconds": 41.2, "commit": "0123456789"})
    'profile smoke · 41 s · commit 0123456'
    """
    parts = []
    if facts.get("profile"):
        parts.append(f"profile {facts['profile']}")
    if isinstance(facts.get("seconds"), int | float):
        parts.append(_duration(facts["seconds"]))
    device = facts.get("device_name") or facts.get("device")
    if device:
        parts.append(f"on {device}")
    if facts.get("date"):
        parts.append(str(facts["date"])[:10])
    if facts.get("commit"):
        parts.append(f"commit {facts['commit'][:7]}{' with changes' if facts.get('dirty') else ''}")
    return " · ".join(parts)


def _source(cell: dict[str, Any]) -> str:
    """Text of a cell, which nbformat stores as a string or as a list of lines."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _run_facts(metadata: dict[str, Any]) -> dict[str, Any]:
    """Facts of the run whose outputs the notebook holds; papermill's own where leaklib's miss."""
    mill = metadata.get("papermill", {})
    facts = {
        "profile": mill.get("parameters", {}).get("profile"),
        "seconds": mill.get("duration"),
        "date": mill.get("start_time"),
    }
    own = metadata.get("leaklib", {})
    for source in (own.get("parameters", {}), own):
        facts.update({key: value for key, value in source.items() if value not in (None, "")})
    return facts


def _recorded_facts(path: Path) -> dict[str, Any] | None:
    """Facts of a recorded run, or None where there is none."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return {"profile": "paper", **record.get("parameters", {}), **record}


def _parameter_names(cells: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names assigned in the cell tagged ``parameters``."""
    for cell in cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            tree = ast.parse(_source(cell))
            return tuple(
                node.target.id
                for node in tree.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            )
    return ()


def _duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> _duration(41.2), _duration(600), _duration(9000)
    ('41 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
