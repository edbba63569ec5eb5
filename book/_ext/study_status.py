"""Sphinx extension of the study: header boxes of notebooks, the status table, links to the sources.

- A notebook's first Markdown cell (its form is in ``notebook_pages``) gets, in the book only, a
  header box in place of its quotation: the same words, the verdict as a badge, the facts of the
  run whose outputs the page shows, and three tabs of commands that run it again. The notebook
  file, which the download button serves, stays as it is.
- ``{study-status}``: one row for each notebook of the table of contents.
- ``{notebook-picture}``: a picture that a notebook stored, see ``notebook_pictures``.
- ``{source}`` role: ``{source}`data/README.md` `` links to a file of the repository, whose address
  is in ``_config.yml`` and nowhere else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))

from notebook_pages import (
    NotebookPage,
    describe_run,
    read_page,
    split_header,
    split_verdict,
)
from notebook_pictures import NotebookPicture

FOLDER = "notebooks/"


def header_box(page: NotebookPage) -> str:
    """MyST of a notebook's header box."""
    colour, short, rest = split_verdict(page.words.get("Verdict", ""))
    lines = [":::::{admonition} At a glance", ":class: study-header", ""]
    for label in ("Paper", "Claim"):
        if label in page.words:
            lines += [f"**{label}.** {page.words[label]}\n"]
    lines += [f"**Verdict.** {{bdg-{colour}}}`{short}` {rest}\n"]
    lines += [f"**This page.** {describe_run(page.run) or 'run facts unknown'}\n"]
    if page.recorded:
        lines += [f"**Paper-scale run.** {describe_run(page.recorded)}\n"]
    lines += _rerun_tabs(page)
    return "\n".join([*lines, ":::::", ""])


def _rerun_tabs(page: NotebookPage) -> list[str]:
    """Three tabs of commands; each line is what a reader pastes at the repository's root."""
    command = f".venv/bin/leaklib run {page.name}"
    shared = ("profile", "device", "data_root", "out")
    own = next((name for name in page.parameters if name not in shared), "seed")
    names = ", ".join(f"`{name}`" for name in page.parameters) or "see `leaklib list`"
    tabs = {
        "Smoke": (
            command,
            "Embedded pictures, one processor core, as on this page. The executed notebook is "
            f"`_build/executed/{page.name}.ipynb`.",
        ),
        "Paper scale": (
            f"{command} -p profile paper -p device cuda -p data_root DATA",
            "Data sets of the papers, larger budgets. `DATA` is a folder of image sets, see "
            "[How to run it again](../book/rerun.md).",
        ),
        "Own parameters": (
            f"{command} -p {own} VALUE",
            f"Any of {names}. `leaklib list` says what each means.",
        ),
    }
    lines = ["::::{tab-set}", ":sync-group: rerun", ""]
    for label, (line, text) in tabs.items():
        lines += [f":::{{tab-item}} {label}", f":sync: {label}", "", "```bash", line, "```"]
        lines += [text, ":::", ""]
    return [*lines, "::::"]


def rewrite_notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the header box into a notebook's first Markdown cell, in memory."""
    if not docname.startswith(FOLDER) or not source[0].lstrip().startswith("{"):
        return
    notebook = json.loads(source[0])
    page = read_page(notebook, docname.removeprefix(FOLDER), Path(app.srcdir) / "data" / "results")
    if not page.words:
        return
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            before, _, after = split_header(text)
            cell["source"] = f"{before}{header_box(page)}\n{after}"
            break
    source[0] = json.dumps(notebook)


class StudyStatus(SphinxDirective):
    """``{study-status}``: claim, verdict, this build's run, recorded run of every notebook."""

    def run(self) -> list[nodes.Node]:
        """Read the notebooks of the built tree and lay out the table."""
        root = Path(self.env.srcdir)
        rows = []
        for path in sorted((root / FOLDER).glob("*.ipynb")):
            if f"{FOLDER}{path.stem}" not in self.env.found_docs:
                continue
            self.env.note_dependency(str(path))
            notebook = json.loads(path.read_text(encoding="utf-8"))
            rows.append(_status_row(read_page(notebook, path.stem, root / "data" / "results")))
        if not rows:
            return [nodes.paragraph(text="No experiment has been run yet.")]
        lines = [
            ":::{list-table}",
            ":header-rows: 1",
            ":class: study-status",
            ":widths: 22 32 16 15 15",
            "",
            *_table_row(["Experiment", "Claim tested", "Verdict", "This build", "Paper-scale run"]),
            *[line for row in rows for line in row],
            ":::",
        ]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, self.env.docname), self.content_offset, node)
        return node.children


def _status_row(page: NotebookPage) -> list[str]:
    """One notebook as a row of the list table."""
    colour, short, _ = split_verdict(page.words.get("Verdict", ""))
    build = describe_run({k: v for k, v in page.run.items() if k in ("seconds", "date")})
    if build:
        build = f"{page.run.get('profile', '')} · {build}".lstrip(" ·")
    if page.recorded is None:
        paper = "not recorded"
    else:
        shown = {k: v for k, v in page.recorded.items() if k in ("seconds", "device_name", "date")}
        paper = describe_run(shown) or "recorded"
    return _table_row(
        [
            f"[{page.title}](/{FOLDER}{page.name}.ipynb)",
            page.words.get("Claim", "–"),
            f"{{bdg-{colour}}}`{short}`",
            build or "–",
            paper,
        ]
    )


def _table_row(cells: list[str]) -> list[str]:
    """Lines of one row of a list table."""
    return [f"{'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]


def link_sources(app: Sphinx, config: Config) -> None:
    """Point the ``source`` role at the repository that ``_config.yml`` names."""
    theme: dict[str, Any] = config.html_theme_options
    address = f"{theme['repository_url']}/blob/{theme.get('repository_branch') or 'main'}/%s"
    config.extlinks = {**config.extlinks, "source": (address, "%s")}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("config-inited", link_sources)
    app.connect("source-read", rewrite_notebook)
    app.add_directive("study-status", StudyStatus)
    app.add_directive("notebook-picture", NotebookPicture)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
