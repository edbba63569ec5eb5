"""Notebooks as the book shows them: outputs, header boxes, pictures, built pages.

Links and citations are checked by a strict build, see `make book-strict`; it sets BOOK_HTML for the
tests of the built pages, which are skipped without it.
"""

import ast
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import notebook_pages  # noqa: E402
import notebook_pictures  # noqa: E402

PAGES = sorted((ROOT / "book").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read_notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if "".join(cell["source"]).strip()]


# --- notebooks ----------------------------------------------------------------------------------


@each_notebook
def test_notebook_was_executed(path):
    cells = code_cells(read_notebook(path))
    assert cells
    for cell in cells:
        assert cell["execution_count"], f"never run: {''.join(cell['source'])[:80]}"
        assert not [out for out in cell["outputs"] if out["output_type"] == "error"]


@each_notebook
def test_notebook_has_header_and_facts(path):
    page = notebook_pages.read_page(read_notebook(path), path.stem, ROOT / "data" / "results")
    assert page.title != path.stem
    assert set(page.words) == set(notebook_pages.LABELS)
    assert notebook_pages.split_verdict(page.words["Verdict"])[1] != "open"
    assert page.run["profile"] == "smoke"
    assert {"seconds", "date"} <= set(page.run)


@each_notebook
def test_notebook_runs_at_smoke_by_default(path):
    notebook = read_notebook(path)
    tagged = [c for c in code_cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    defaults = {
        node.target.id: ast.literal_eval(node.value)
        for node in ast.parse("".join(tagged[0]["source"])).body
        if isinstance(node, ast.AnnAssign)
    }
    assert defaults["profile"] == "smoke"
    assert defaults["device"] == "cpu"
    assert {"seed", "data_root", "out"} <= set(defaults)
    assert not any(
        "injected-parameters" in c["metadata"].get("tags", []) for c in notebook["cells"]
    )


@each_notebook
def test_notebook_names_no_machine_path(path):
    pictures = r'"[\w./]*image/png": (?:"[^"]*"|\[[^\]]*\])'
    text = re.sub(pictures, "", path.read_text(encoding="utf-8"))
    found = re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|private)/", text)
    assert not found, f"machine path {found.group()!r}"


@pytest.mark.skipif(not notebook_pictures.README_SOURCE.exists(), reason="notebook not there")
def test_picture_of_the_readme_is_the_notebooks():
    source, key = notebook_pictures.README_SOURCE, notebook_pictures.README_KEY
    shown = notebook_pictures.README_PICTURE
    assert shown.relative_to(ROOT).as_posix() in README
    assert shown.read_bytes() == notebook_pictures.stored_picture(source, key), "do: make picture"


# --- header boxes -------------------------------------------------------------------------------

CELL = """# Title

> **Paper.** [Somebody](https://example.org)
> and others
>
> **Claim.** It holds.
>
> **Verdict.** Not reproduced: it does not.

Text.

> A quotation that is none of ours.
"""


def test_header_is_split_from_the_first_cell():
    before, words, after = notebook_pages.split_header(CELL)
    assert before == "# Title\n\n"
    assert words["Paper"] == "[Somebody](https://example.org) and others"
    assert words["Claim"] == "It holds."
    assert notebook_pages.split_verdict(words["Verdict"]) == (
        "danger",
        "Not reproduced",
        "it does not.",
    )
    assert after.startswith("\nText.")
    assert notebook_pages.split_header("# Title\n\n> just a quotation\n")[1] == {}


def test_run_facts_come_from_the_notebook_and_the_record(tmp_path):
    (tmp_path / "name").mkdir()
    record = {"seconds": 9000, "parameters": {"profile": "paper"}, "device_name": "GPU"}
    (tmp_path / "name" / "provenance.json").write_text(json.dumps(record))
    notebook = {
        "cells": [{"cell_type": "markdown", "source": CELL.splitlines(keepends=True)}],
        "metadata": {
            "papermill": {"duration": 7.2, "parameters": {}},
            "leaklib": {"profile": "smoke", "commit": "a" * 40, "dirty": True, "seconds": 6.0},
        },
    }
    page = notebook_pages.read_page(notebook, "name", tmp_path)
    assert (
        notebook_pages.describe_run(page.run) == "profile smoke · 6 s · commit aaaaaaa with changes"
    )
    assert notebook_pages.describe_run(page.recorded) == "profile paper · 2.5 h · on GPU"
    assert notebook_pages.read_page(notebook, "other", tmp_path).recorded is None


def test_missing_picture_is_an_error_that_names_the_others(tmp_path):
    output = {"data": {"x/image/png": "aGk="}, "metadata": {"scrapbook": {"name": "there"}}}
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": [{"outputs": [output]}]}))
    assert notebook_pictures.stored_picture(path, "there") == b"hi"
    with pytest.raises(KeyError, match="found: there"):
        notebook_pictures.stored_picture(path, "gone")


# --- built pages --------------------------------------------------------------------------------

HTML = Path(os.environ["BOOK_HTML"]) if os.environ.get("BOOK_HTML") else None
built = pytest.mark.skipif(HTML is None, reason="BOOK_HTML is not set: make book-strict sets it")


class Loads(HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.search_fields = 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in {"script", "img", "iframe", "source", "video", "audio", "embed"}:
            self.found.append(attrs.get("src"))
        if tag == "link" and not {"canonical", "author", "search", "index", "next", "prev"} & set(
            (attrs.get("rel") or "").split()
        ):
            self.found.append(attrs.get("href"))
        self.search_fields += "search-button-field" in (attrs.get("class") or "").split()


def built_pages():
    pages = [page for folder in ("book", "notebooks") for page in (HTML / folder).glob("*.html")]
    assert len(pages) == len(PAGES) + len(NOTEBOOKS)
    return pages


@built
def test_built_pages_load_nothing_from_elsewhere_and_lack_nothing():
    for page in built_pages():
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        for address in filter(None, loads.found):
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            if not address.startswith(("data:", "#")):
                file = page.parent / address.split("?")[0].split("#")[0]
                assert file.exists(), f"{page.name} shows {address}, which is not there"


@built
def test_built_styles_load_nothing_from_elsewhere():
    for style in HTML.rglob("*.css"):
        text = style.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"(?:@import\s+|url\()\s*[\"']?(https?:)?//[^)\"']+", text)
        assert not found, f"{style.name}: {found.group()}"


@built
def test_built_pages_have_one_search_field():
    for page in built_pages():
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.search_fields == 1, page.name


@built
def test_built_notebooks_have_header_boxes_and_launch_buttons():
    for path in NOTEBOOKS:
        text = (HTML / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "study-header" in text
        assert f"leaklib run {path.stem}" in re.sub(r"<[^>]+>", "", text)
        assert "mybinder.org" in text
        assert f"_sources/notebooks/{path.name}" in text
